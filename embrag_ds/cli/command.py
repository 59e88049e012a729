"""How a command ends: with its result, or with one line that says what to mend."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType

from embrag_ds import logs
from embrag_ds.errors import UserError


def run_command(main: Callable[[], None], verbose: bool = False, debug: bool = False) -> None:
    """Run ``main`` with its log lines on stderr. A :class:`UserError` becomes one line there and exit status 2.

    With ``debug`` a fault's traceback is shown. SIGTERM unwinds like an exception, so temporary files are removed.
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
            print(f"error: {fault}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
