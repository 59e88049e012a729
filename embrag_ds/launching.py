"""What the entry points share: how a run ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType

from embrag_ds.errors import UserError


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point. A :class:`UserError` becomes one line on stderr and exit status 2.

    SIGTERM unwinds like an exception, so temporary files are removed.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
