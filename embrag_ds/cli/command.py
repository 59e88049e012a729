"""Execution of a command: log lines, the one-line error, and the exit status."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from embrag_ds import logs
from embrag_ds.errors import SaidByMain, UserError

logger = logging.getLogger(__name__)


def show(text: str) -> None:
    """Write a command's result to stdout, with escapes for what its encoding lacks.

    Where the reader has gone (``| head``), the process ends with the status that a shell gives such a process. Raises
    :class:`UserError` if stdout cannot be written to.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as fault:
        # Python would try again to write what is left when it ends.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(fault, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        raise UserError(f"standard output: cannot write to it ({fault.strerror}); write it elsewhere") from fault


def one_line(text: str) -> str:
    """The text without line ends and other control characters, which names of files and samples may have."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def run_command(main: Callable[[], None], verbose: bool = False, debug: bool = False) -> None:
    """Run ``main`` with log lines on stderr; a :class:`UserError` becomes one line there and exit status 2.

    ``debug`` keeps its traceback instead. SIGTERM ends the command like an exception, so that temporary files are
    removed; an interrupt gives exit status 130.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, terminate)
    with logs.on_terminal(verbose):
        try:
            main()
        except UserError as fault:
            if debug:
                raise
            if not isinstance(fault, SaidByMain):
                logger.error(one_line(str(fault)))
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
