"""Log lines: every module has a logger of its own name, and commands decide where the lines go.

Progress and remarks go to stderr, so that stdout holds only a command's result. Rank 0 logs everything. Other ranks log
only warnings and errors, prefixed with their rank.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from logging.handlers import MemoryHandler
from pathlib import Path

PACKAGE = "embrag_ds"


class RankFilter(logging.Filter):
    """Logging filter that passes all records of rank 0, and only warnings and errors of other ranks."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        return self.rank == 0 or record.levelno >= logging.WARNING


class _Stderr(logging.StreamHandler):
    """Handler that writes a line above the progress bars instead of behind one."""

    def emit(self, record: logging.LogRecord) -> None:
        bars = sys.modules.get("tqdm")  # imported where there is a bar
        with nullcontext() if bars is None else bars.tqdm.external_write_mode():
            super().emit(record)


class _Terminal(logging.Formatter):
    """Formatter for stderr: warnings and errors start with their level, lines of ranks other than 0 with the rank."""

    def __init__(self, rank: int):
        super().__init__("%(message)s")
        self._prefix = f"rank {rank}: " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        # Names may have bytes of no encoding (surrogates), at which not every stream that stands for stderr escapes.
        return f"{self._prefix}{level}{super().format(record)}".encode("utf-8", "backslashreplace").decode()


def rank_of_process() -> int:
    """Rank of this process as its launcher set it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def on_terminal(verbose: bool = False) -> Iterator[None]:
    """Write the package's log lines to stderr inside ``with``; debug lines too if ``verbose``."""
    handler = _Stderr()
    handler.setFormatter(_Terminal(rank_of_process()))
    handler.addFilter(RankFilter(rank_of_process()))
    with _attached(handler, logging.DEBUG if verbose else logging.INFO):
        yield


@contextmanager
def progress_on_terminal() -> Iterator[None]:
    """Write the progress of long work to stderr inside ``with``, and nothing else of the package."""
    handler = _Stderr()
    handler.setFormatter(_Terminal(rank_of_process()))
    handler.addFilter(logging.Filter(f"{PACKAGE}.progress"))
    with _attached(handler, logging.INFO):
        yield


class RunLog(MemoryHandler):
    """Log handler that buffers records until :meth:`write_to` names a file, and then writes all records there."""

    def __init__(self) -> None:
        super().__init__(capacity=0, flushOnClose=False)  # the capacity has no part in shouldFlush

    def write_to(self, path: Path) -> None:
        """Append the buffered records and all later ones to the file ``path``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.setTarget(file)
        self.flush()

    def shouldFlush(self, record: logging.LogRecord) -> bool:
        return self.target is not None

    def close(self) -> None:
        if self.target is not None:
            self.target.close()
        super().close()


@contextmanager
def kept_for_run() -> Iterator[RunLog]:
    """Collect the package's log lines, debug lines included, inside ``with``; yields the :class:`RunLog`."""
    run_log = RunLog()
    with _attached(run_log, logging.DEBUG):
        yield run_log


@contextmanager
def _attached(handler: logging.Handler, level: int) -> Iterator[None]:
    handler.setLevel(level)
    package = logging.getLogger(PACKAGE)
    before = package.level
    package.setLevel(min(level, before) if before else level)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before)
        handler.close()
