"""Helpers of the process that packs a file: processes that read the file from its end backwards, piece after piece.

A bgzipped VCF is divided into pieces. The process that packs reads from the start. Where a piece begins it looks
whether a helper has taken it. If so, helpers have taken all that follow, too, and it takes over what they packed. So
nobody waits for longer than one piece takes. A piece is taken by making its folder, which only one process can.

Helpers change nothing but the time. Where one fails, or the pieces do not fit together, the process that packs reads on
by itself, and meets the file's fault as if it had been alone.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from embrag_ds import children
from embrag_ds.data.packing.packer import Packed, Packer
from embrag_ds.data.packing.reading import Reading
from embrag_ds.errors import UserError
from embrag_ds.files import source_of
from embrag_ds.ops.cores import told_or_available
from embrag_ds.variants.container.text import Part
from embrag_ds.variants.records import VariantReader

logger = logging.getLogger(__name__)

_LEAST_BYTES = 4 << 20
"""A smaller file is read before a helper has begun."""
_PIECE_BYTES, _MOST_PIECES = 1 << 18, 64
_MOST_PROCESSES = 8
_SECONDS_BETWEEN_LOOKS = 0.005
_FOUND = "packed.pickle"


class _Request(NamedTuple):
    """What a helper is to do: ``pieces`` is the folder for the pieces, and ``parent`` the process that packs."""

    path: Path
    reading: Reading
    seams: list[int]
    pieces: Path
    parent: int


class Helpers:
    """Processes that pack a file's pieces into folders of ``directory``. Use it as a context.

    ``seams`` are the places between pieces. There are none, and no helpers, where they would not save time.
    """

    def __init__(self, vcf: VariantReader, directory: Path, reading: Reading) -> None:
        self._vcf = vcf
        self._pieces = directory / "pieces"
        self._lost = -1
        self._taken: deque[tuple[Packed, Path]] = deque()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.seams: list[int] = []
        path = source_of(vcf.path)
        number = min(_MOST_PROCESSES, _cores()) - 1
        if number > 0 and path.is_file() and path.stat().st_size >= _LEAST_BYTES:
            self.seams = vcf.seams(min(_MOST_PIECES, path.stat().st_size // _PIECE_BYTES))
        if self.seams:
            request = _Request(vcf.path, reading, self.seams, self._pieces, os.getpid())
            try:
                self._start(number, request)
            except BaseException:
                self._end()
                raise

    def _start(self, number: int, request: _Request) -> None:
        with suppress(OSError):  # no room on the disk, or as many processes as there can be
            self._pieces.mkdir()
            for _ in range(number):
                # Away from the terminal's Ctrl-C: the process that packs ends its helpers.
                options = {"start_new_session": True, "stdout": subprocess.DEVNULL}
                self._processes.append(children.started(__name__, request, **options))

    def __enter__(self) -> Helpers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for each in self._processes:
            each.kill()  # also one that is stopped; they have nothing to clean up
        for each in self._processes:
            each.wait()
        shutil.rmtree(self._pieces, ignore_errors=True)

    def leave(self, number: int) -> bool:
        """Whether the process that packs goes on at the seam ``number``; if not, the rest is in :meth:`taken`."""
        if number <= self._lost:
            return True
        try:
            if not _claimed(self._pieces / str(number)):
                self._taken.extend(self._rest(number))
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as fault:
            logger.debug("what helpers packed cannot be read: %s", fault)
        return not self._taken

    def taken(self) -> Iterator[tuple[Packed, Path]]:
        """Iterate over the pieces that helpers have packed, each with its folder, which is emptied afterwards."""
        while self._taken:
            part, folder = self._taken.popleft()
            yield part, folder
            _empty(folder)

    def _rest(self, number: int) -> list[tuple[Packed, Path]]:
        """The pieces from ``number`` on, or nothing where one is missing or does not fit."""
        found = []
        span = self._vcf.span
        for each in range(number, len(self.seams)):
            folder = self._pieces / str(each)
            part = self._packed(folder)
            joined = None if part is None else span.followed_by(part.span)
            if part is None or joined is None:
                self._lost = each  # up to there all is read here
                for unused in range(number, each + 1):
                    _empty(self._pieces / str(unused))
                return []
            span = joined
            found.append((part, folder))
        return found

    def _packed(self, folder: Path) -> Packed | None:
        """What a helper has found in a piece, waited for; None if all have ended without it."""
        while not (folder / _FOUND).exists():
            if all(each.poll() is not None for each in self._processes) and not (folder / _FOUND).exists():
                return None
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        found = pickle.loads((folder / _FOUND).read_bytes())
        assert isinstance(found, Packed)
        return found


def serve() -> None:
    """Pack pieces as the command line describes, until all are taken."""
    logging.disable()  # the process that packs reports what is doubtful
    _help(children.request_of_this_process())


def _help(request: _Request) -> None:
    reading = request.reading
    with (
        # The process that packs reads on by itself, and meets the fault where it lasts.
        suppress(UserError, OSError, MemoryError),
        VariantReader(request.path, duplicates=reading.duplicates, without_alt=reading.without_alt) as vcf,
    ):
        remarks = len(vcf.remarks)
        for number in reversed(range(len(request.seams))):
            folder = request.pieces / str(number)
            if os.getppid() != request.parent:
                return
            if not _claimed(folder):
                continue
            found = _packed_piece(vcf, folder, request, number)
            if found is None or len(vcf.remarks) > remarks:
                return
            temporary = folder / "unfinished"
            temporary.write_bytes(pickle.dumps(found))
            temporary.rename(folder / _FOUND)


def _packed_piece(vcf: VariantReader, folder: Path, request: _Request, number: int) -> Packed | None:
    """Pack the piece from a seam up to the next; None where that is not met, or the parent has ended."""
    ends = request.seams[number + 1 : number + 2]
    met: list[int] = []

    def stop(end: int) -> bool:
        met.append(end)
        return False

    with Packer(vcf, folder, request.reading) as packer:
        for site in vcf.sites(Part(request.seams[number], ends, stop)):
            if os.getppid() != request.parent:
                return None
            packer.add(site)
        return packer.packed() if len(met) == len(ends) else None


def _claimed(folder: Path) -> bool:
    """Whether this process is the one that packs a piece."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _empty(folder: Path) -> None:
    """Remove what is in a piece's folder, which stays: it says that the piece is taken."""
    for each in folder.iterdir():
        each.unlink(missing_ok=True)


def _cores() -> int:
    """Cores that this process may use, or fewer where fewer threads are asked for."""
    return min(len(os.sched_getaffinity(0)), told_or_available())
