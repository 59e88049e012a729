"""Help texts that fit a screen, and errors of one line.

A help has what most users need, and all of it where they ask for that.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from embrag_ds.cli.command import one_line

_FEW = 2
"""Examples of a help without rare options."""


class Parser(argparse.ArgumentParser):
    """Parser that takes options by their whole names only, and whose errors are one line.

    An abbreviation could become another option when one is added.
    """

    def __init__(self, **given: Any):
        super().__init__(**given, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and one line: no usage, which would hide it."""
        self.exit(2, f"error: {one_line(message)}; {self._listing()}\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse all arguments; an unknown one is an error, even where a required one is missing, too."""
        given = list(sys.argv[1:] if args is None else args)
        options = [each.partition("=")[0] for each in self._own(given) if each.startswith("--") and each != "--"]
        # With a blank in it, it may be the value of an option.
        self._refuse([each for each in options if each not in self._option_string_actions and " " not in each])
        found, unknown = super().parse_known_args(given, namespace)
        self._refuse([each for each in unknown if each != "--"])
        return found, []

    def _own(self, given: list[str]) -> Iterable[str]:
        """Arguments in front of a command, and all where there is none."""
        return takewhile(lambda each: each.startswith("-"), given)

    def _refuse(self, unknown: Sequence[str]) -> None:
        """End the process with an error about the first unknown option, or else about the first other argument."""
        if not unknown:
            return
        option = next((each.partition("=")[0] for each in unknown if len(each) > 1 and each.startswith("-")), None)
        if option is None:
            self.error(f"unknown argument {unknown[0]}")
        known = [each for action in self._actions if action.help != argparse.SUPPRESS for each in action.option_strings]
        near = [each for each in known if each.startswith(option)] or difflib.get_close_matches(option, known, n=1)
        self.error(f"unknown option {option}" + (f" ({near[0]}?)" if near else ""))

    def _listing(self) -> str:
        return f"{self.prog} --help lists the commands"


class CommandParser(Parser):
    """Parser of a command whose ``--help`` leaves out its ``rare`` options, by name, and which ``--help-all`` lists.

    ``examples`` are commands, each followed by a line about it that is indented further. Where there are rare options,
    ``--help`` shows the first two of them.
    """

    def __init__(self, *, rare: Sequence[str] = (), examples: str = "", **given: Any):
        super().__init__(**given, add_help=False, formatter_class=_Formatter)
        self._rare = frozenset(rare)
        self._examples = examples
        self.general = self.add_argument_group("general")
        self.general.add_argument("-h", "--help", action="help", help="show this help and exit")
        about = "the same with rare options" if rare else argparse.SUPPRESS
        self.general.add_argument("--help-all", action=_HelpAll, nargs=0, help=about)

    def _own(self, given: list[str]) -> Iterable[str]:
        return takewhile(lambda each: each != "--", given)

    def _listing(self) -> str:
        return f"{self.prog} --help{'-all' if self._rare else ''} lists the options"

    def format_help(self) -> str:
        """The help that most users need."""
        return self._formatted(self._rare)

    def format_all(self) -> str:
        """The help with all options and examples."""
        return self._formatted(frozenset())

    def _formatted(self, left_out: frozenset[str]) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in sorted(self._action_groups, key=lambda each: each is self.general):
            shown = [each for each in group._group_actions if each.help != argparse.SUPPRESS]
            options = [each for each in shown if not left_out.intersection(each.option_strings)]
            if options:
                formatter.start_section(group.title)
                formatter.add_arguments(options)
                formatter.end_section()
        examples = _split(self._examples)
        if left_out:
            examples = examples[:_FEW]
        formatter.add_text("examples:\n" + "".join(examples))
        return formatter.format_help()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Formatter with room for the longest options, so that few take two lines."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)


class _HelpAll(argparse.Action):
    """Action of ``--help-all``."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        assert isinstance(parser, CommandParser)
        parser._print_message(parser.format_all(), sys.stdout)
        parser.exit()


def _split(examples: str) -> list[str]:
    """Examples, each with the line about it."""
    found, lines = [], ""
    goes_on = False
    for line in examples.splitlines(keepends=True):
        lines += line
        if line.startswith("      ") and not goes_on:
            found.append(lines)
            lines = ""
        goes_on = line.endswith("\\\n")
    return found
