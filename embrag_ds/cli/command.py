"""Execution of a command: log lines, the one-line error, and the exit status."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType

from embrag_ds import logs
from embrag_ds.errors import UserError

logger = logging.getLogger(__name__)


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
            logger.error(fault)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
