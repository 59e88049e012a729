"""Ranks that have stopped are noticed by the others, which wait for them in a collective operation without end.

The main thread of a rank calls :func:`beat` wherever it gets on. A thread of its own writes that to a small file in the
run folder, and goes on doing so while the main thread waits. When the main thread has not got on for
``train.patience_s``, the thread reads the files of the other ranks. A file that no longer changes belongs to a process
that was stopped or killed, or to a machine that is gone. Clocks of machines are never compared.

Where all files change, but no rank gets on, some wait in a collective for one whose main thread hangs elsewhere. A
phase may take longer than the patience if it announces itself (:func:`busy`), as the start does until the first step.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from embrag_ds.files import make_folder

logger = logging.getLogger(__name__)

FOLDER = ".alive"
"""Name of the folder, in a run folder, with a file for each rank; a clean end removes it."""
_WRITES_IN_PATIENCE = 20
_SLOWEST_S, _FASTEST_S = 10.0, 0.05
_READS = 3
_COLLECTIVE = f"torch{os.sep}distributed{os.sep}"
_START = "start"
_WIDTH = 512  # bytes of a file, written over in place: that needs no room on a disk that has become full


@dataclass
class Sign:
    """Content of a rank's file: ``pulse`` counts writes, and ``beats`` calls of :func:`beat`.

    ``waits`` says whether the main thread is in a collective operation, and ``phase`` is that of :func:`busy`.
    """

    pulse: int
    beats: int
    step: int
    phase: str
    waits: bool
    host: str
    pid: int


_NEVER_READ = Sign(0, 0, 0, "", False, "unknown machine", 0)


class _Progress:
    """How far the main thread of this process is. ``phase`` is empty outside of :func:`busy`."""

    def __init__(self) -> None:
        self.beats = 0
        self.step = 0
        self.phase = ""
        self.at = time.monotonic()


_progress = _Progress()


def beat(step: int | None = None) -> None:
    """Note that this rank gets on, and, after a step, the step; it costs a few assignments."""
    _progress.beats += 1
    _progress.at = time.monotonic()
    if step is not None:
        _progress.step = step
        _progress.phase = ""


@contextmanager
def busy(phase: str) -> Iterator[None]:
    """Context of a ``phase`` that may take longer than the patience, on any rank, without a :func:`beat`."""
    before = _progress.phase
    beat()
    _progress.phase = phase
    try:
        yield
    finally:
        _progress.phase = before
        beat()


class Words(NamedTuple):
    """Parts of the line about silent ranks: the setting of the patience, how far they were, and a remedy.

    The last two may name the ``{step}`` and the ``{folder}``.
    """

    setting: str
    last: str
    remedy: str


OF_TRAINING = Words(" (embrag.train.patience_s)", ", last at step {step}", "go on with --resume --run-dir {folder}")


class Watch:
    """Thread that writes this rank's file in ``run_dir``, and reads the others' when this rank waits for too long.

    ``end`` is called in that thread with a line that names the silent ranks, after the line was logged; by default the
    process ends at once with status 1, because the main thread cannot be interrupted. A rank whose file has gone is
    silent, too: construct it on every rank, and let all ranks pass a barrier. ``words`` are those of its line.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        ranks: int,
        patience_s: float,
        end: Callable[[str], None] | None = None,
        words: Words = OF_TRAINING,
    ):
        self._folder = run_dir / FOLDER
        self._run_dir = run_dir
        self._rank = rank
        self._ranks = ranks
        self._patience_s = patience_s
        self._end = end or _end_now
        self._words = words
        self._every_s = min(_SLOWEST_S, max(_FASTEST_S, patience_s / _WRITES_IN_PATIENCE))
        self._own = Sign(0, 0, 0, "", False, socket.gethostname(), os.getpid())
        self._known: dict[int, Sign] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alive", daemon=True)
        make_folder(self._folder)
        _progress.step, _progress.phase = 0, _START
        beat()
        self._write()
        self._thread.start()

    def close(self, well: bool = True) -> None:
        """Stop. After a good end, remove this rank's file, and the last rank removes the folder."""
        self._closing.set()
        self._thread.join(timeout=_SLOWEST_S)
        if not well:
            return
        with suppress(OSError):
            _file(self._folder, self._rank).unlink()
            self._folder.rmdir()

    def _run(self) -> None:
        watched: _Watched | None = None
        self._known = self._read()
        ran = time.monotonic()
        while not self._closing.wait(self._every_s):
            self._write()
            before, ran = ran, time.monotonic()
            waiting_s = ran - _progress.at
            if waiting_s < self._patience_s / 2:
                watched = None
            elif watched is None or ran - before > self._patience_s / 4:
                # This process itself may have been stopped, and the others with it: they need time to go on, too.
                watched = _Watched(self._read())
            elif waiting_s >= self._patience_s and watched.for_s() >= self._patience_s / 2:
                signs = self._read()
                silent = watched.silent(signs, replace(self._own))
                if silent:
                    self._report(silent)
                    return
                watched = _Watched(signs)

    def _write(self) -> None:
        own = self._own
        own.pulse += 1
        own.beats, own.step, own.phase = _progress.beats, _progress.step, _progress.phase[:100]
        own.waits = _main_thread_waits()
        text = json.dumps(asdict(own)).encode().ljust(_WIDTH - 1) + b"\n"
        # Another machine sees what was written when the file is closed. A fault of the disk is not this thread's to
        # report: those who write results there do.
        with suppress(OSError):
            descriptor = os.open(_file(self._folder, self._rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.pwrite(descriptor, text, 0)
            finally:
                os.close(descriptor)

    def _read(self) -> dict[int, Sign]:
        """The newest signs of the other ranks. A file that is no longer there leaves the last one known."""
        signs = {}
        for rank in range(self._ranks):
            if rank != self._rank:
                last = self._known.get(rank, _NEVER_READ)
                signs[rank] = self._known[rank] = _read(_file(self._folder, rank)) or last
        return signs

    def _report(self, silent: dict[int, Sign]) -> None:
        said = ", ".join(f"rank {rank} ({each.host}, process {each.pid})" for rank, each in sorted(silent.items()))
        step = min(each.step for each in silent.values())
        last, remedy = (each.format(step=step, folder=self._run_dir) for each in self._words[1:])
        line = (
            f"no sign of progress in {self._patience_s:g} s{self._words.setting} from {said}{last}; all ranks end: see "
            f"what stopped it, and {remedy}"
        )
        # Every rank's own log has the line, and the terminal has it once.
        first = next(rank for rank in range(self._ranks) if rank not in silent)
        level = logging.ERROR if self._rank == first else logging.INFO
        # On a thread of its own: the main thread may hang with the lock of a log handler.
        speaker = threading.Thread(target=logger.log, args=(level, line), daemon=True)
        speaker.start()
        speaker.join(timeout=_SLOWEST_S)
        self._end(line)


class _Watched:
    """What other ranks' files held when this rank had waited for a while."""

    def __init__(self, signs: dict[int, Sign]):
        self._signs = signs
        self._since = time.monotonic()

    def for_s(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self._since

    def silent(self, now: dict[int, Sign], own: Sign) -> dict[int, Sign]:
        """Ranks for which this one waits in vain; ``own`` is its sign."""
        stopped = {rank: sign for rank, sign in now.items() if sign.pulse == self._signs[rank].pulse}
        if stopped:
            return stopped
        gets_on = (sign.phase or sign.beats != self._signs[rank].beats for rank, sign in now.items())
        if own.phase or any(gets_on):
            return {}
        elsewhere = {rank: sign for rank, sign in now.items() if not sign.waits}
        return elsewhere if own.waits else {}


def clear(run_dir: Path) -> None:
    """Remove what a killed run left; on one rank, before any constructs its :class:`Watch`."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}"


def _read(path: Path) -> Sign | None:
    for _ in range(_READS):
        try:
            return Sign(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):  # it is being written this very moment
            time.sleep(_FASTEST_S)
        except OSError:
            break
    return None


def _main_thread_waits() -> bool:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if _COLLECTIVE in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _end_now(line: str) -> None:
    os._exit(1)
