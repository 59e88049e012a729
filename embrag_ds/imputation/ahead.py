"""Packing a panel in a process of its own, while the process that imputes still imports packages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from embrag_ds import children, logs
from embrag_ds.data.packing.reading import Reading, packed_folder
from embrag_ds.data.panel import open_panel
from embrag_ds.errors import UserError

if TYPE_CHECKING:
    from embrag_ds.data.inputs import PanelFiles

_LEAST_BYTES, _MOST_BYTES = 1 << 20, 10**8
"""A smaller file is packed before another process has begun. A larger one takes so long that its faults should not be
met twice, and that imports do not matter."""


@contextmanager
def packing_ahead(files: PanelFiles, cache_dir: Path | None) -> Iterator[None]:
    """Context in which a process of its own packs the panel, if it is not packed yet.

    Whoever opens the panel waits for it by the lock of the cache's entry, and meets a fault of the file itself. If the
    context ends by an error, so does that process.
    """
    process = None
    with suppress(UserError):  # it will be met again
        process = _start(files, cache_dir)
    if process is None:
        yield
        return
    try:
        yield
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()


def _start(files: PanelFiles, cache_dir: Path | None) -> subprocess.Popen[bytes] | None:
    """The process that packs, or None where it would not save time."""
    from embrag_ds.data.inputs import cache_directory, settings_for  # a tenth of a second that process does without

    path = files.panel
    if path is None or os.environ.get("LOCAL_RANK", "0") != "0" or not path.is_file():
        return None
    if not _LEAST_BYTES <= path.stat().st_size <= _MOST_BYTES:
        return None
    cache = cache_directory(settings_for(cache_dir))
    folder = packed_folder(path, cache, files.reading)
    if folder is None or folder.exists():
        return None
    return children.started(__name__, (path, cache, files.reading))


def serve() -> None:
    """Pack the panel that the command line describes, and show progress. Remarks are left to whoever opens it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    path, cache, reading = children.request_of_this_process()
    assert isinstance(reading, Reading)
    with suppress(UserError, KeyboardInterrupt), logs.progress_on_terminal():
        open_panel(path, cache, reading=reading)
