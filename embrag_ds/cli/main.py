"""The command ``embrag``: one parser for training, imputing, evaluating, reporting and simulating."""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

from embrag_ds import __version__
from embrag_ds.cli import evaluate, impute, report, simulate, train
from embrag_ds.cli.command import run_command
from embrag_ds.cli.help import CommandParser, Parser
from embrag_ds.errors import UserError
from embrag_ds.runs.launchers import take_place

logger = logging.getLogger(__name__)

COMMANDS = {"train": train, "impute": impute, "evaluate": evaluate, "report": report, "simulate": simulate}
Run = Callable[[argparse.Namespace], None]


def make_parser() -> argparse.ArgumentParser:
    """Parser of ``embrag`` with all its commands."""
    parser = Parser(
        prog="embrag",
        description="Genotype imputation with retrieval from a reference panel.",
        epilog="embrag COMMAND --help describes a command, with examples.",
    )
    _add_version(parser)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=CommandParser, prog="embrag"
    )
    for name, command in COMMANDS.items():
        _add_command(commands.add_parser(name, help=command.DESCRIPTION, **_texts(name)), name)
    return parser


def main(command: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Run ``embrag``, or only its ``command`` as a script in ``launch/`` does; ``arguments`` default to the process's.

    A fault of the user's input ends the process with status 2 (:func:`embrag_ds.cli.command.run_command`).
    """
    parser = make_parser() if command is None else _parser_of(command)
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    run: Run = options.run
    misplaced: UserError | None = None
    if run in (train.run, impute.run):
        try:
            take_place()  # before log lines, which only rank 0 writes
        except UserError as fault:
            misplaced = fault

    def begin() -> None:
        if misplaced is not None:
            raise misplaced
        logger.debug("embrag_ds %s, Python %s, %s", __version__, platform.python_version(), platform.platform())
        run(options)

    run_command(begin, options.verbose, options.debug)


def _parser_of(name: str) -> CommandParser:
    """Parser of one command alone."""
    parser = CommandParser(**_texts(name))
    _add_command(parser, name)
    return parser


def _texts(name: str) -> dict[str, Any]:
    command = COMMANDS[name]
    return {
        "usage": f"%(prog)s {command.USAGE} [options]",
        "description": command.DESCRIPTION,
        "examples": command.EXAMPLES,
        "rare": getattr(command, "RARE", ()),
    }


def _add_command(parser: CommandParser, name: str) -> None:
    command = COMMANDS[name]
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)
    general = parser.general
    general.add_argument("-v", "--verbose", action="store_true", help="say more")
    general.add_argument("--debug", action="store_true", help="show the traceback of a fault")
    _add_version(general)


def _add_version(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument("--version", action="version", version=f"embrag_ds {__version__}")
