"""Help texts that fit a screen: what most users need, and all of it where they ask for that."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

_FEW = 2
"""Examples of a help without rare options."""


class CommandParser(argparse.ArgumentParser):
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
