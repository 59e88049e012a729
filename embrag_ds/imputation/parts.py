"""Parts of an output, one for each rank, and their joining into the file that one rank would have written.

A bgzipped file is a row of blocks, each with 65,280 bytes of text, and these begin where the text before them ends.
So ranks first write their texts. When all lengths are known, each compresses the blocks that begin in its text; for the
end of its last one it reads on in the next part. Rank 0 then copies the blocks one behind the other.
"""

from __future__ import annotations

import errno
import gzip
import shutil
import struct
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.errors import UserError
from embrag_ds.variants.container.bgzf import BGZF_EOF, BGZF_TEXT, BgzfWriter, bgzf_written
from embrag_ds.variants.published import LEVEL, SCRATCH_LEVEL, Publication, Publishing, Records, TabixIndex, publishing

_READ_BYTES = 1 << 20
_SEEN_WITHIN_S = 60.0
_BLOCK_SIZE = slice(16, 18)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Parts:
    """Files of all ranks' parts of ``out``, in a ``folder`` that all ranks see."""

    out: Path
    folder: Path

    @contextmanager
    def written(self, rank: int) -> Iterator[tuple[Publication, BgzfWriter]]:
        """Yield what takes a rank's part, and the file that counts its text."""
        records = Records()
        with room_for(self.out, self.folder.parent), bgzf_written(self._file("text", rank), SCRATCH_LEVEL) as out:
            yield Publication(out, records), out
        with room_for(self.out, self.folder.parent):
            records.save(self._file("records", rank))

    def compress(self, rank: int, lengths: list[int]) -> None:
        """Compress the blocks that begin in a rank's text; ``lengths`` are those of all texts, in bytes."""
        begin = sum(lengths[:rank])
        start, stop = (-(-place // BGZF_TEXT) * BGZF_TEXT for place in (begin, begin + lengths[rank]))
        with room_for(self.out, self.folder.parent), bgzf_written(self._file("blocks", rank), LEVEL) as out:
            for text in self._text(rank, lengths, start, min(stop, sum(lengths))):
                out.write(text)

    def _text(self, rank: int, lengths: list[int], start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) of all text, which begin in a rank's part, in pieces."""
        offset = sum(lengths[:rank])
        for part in range(rank, len(lengths)):
            first, last = max(start, offset) - offset, min(stop, offset + lengths[part]) - offset
            if last > first:
                with gzip.open(seen(self._file("text", part))) as text:
                    text.seek(first)
                    while first < last:
                        piece = text.read(min(_READ_BYTES, last - first))
                        if not piece:
                            raise EOFError(f"{text.name} ends too early")
                        first += len(piece)
                        yield piece
            offset += lengths[part]

    def join(self, lengths: list[int], last: int) -> None:
        """Join the parts of all ranks, whose blocks are compressed unless the file is a BCF; ``last`` is that of
        :func:`publishing`.
        """
        with publishing(self.out, last) as files:
            if files.is_bcf:
                with files.text() as text:
                    self._copy("text", len(lengths), text)
                    files.convert(text)
            else:
                begins = self._copy("blocks", len(lengths), files.temporary)
                self._index(files, lengths, begins)

    def _copy(self, kind: str, ranks: int, to: Path) -> np.ndarray:
        """Copy the blocks of all files of a kind; returns where each begins and where the last ends, uint64."""
        begins, place = array("Q", [0]), 0
        with to.open("wb", buffering=_READ_BYTES) as out:
            for rank in range(ranks):
                path = seen(self._file(kind, rank))
                for block in _blocks(path):
                    out.write(block)
                    place += len(block)
                    begins.append(place)
                path.unlink()
            out.write(BGZF_EOF)
        return np.array(begins, dtype=np.uint64)

    def _index(self, files: Publishing, lengths: list[int], begins: np.ndarray) -> None:
        def virtual(places: np.ndarray) -> np.ndarray:
            block, inner = np.divmod(places, BGZF_TEXT)
            found: np.ndarray = begins[block] << np.uint64(16) | inner.astype(np.uint64)
            return found

        index, offset = TabixIndex(), 0
        for rank, length in enumerate(lengths):
            index.add_all(Records.load(seen(self._file("records", rank))), offset)
            offset += length
        files.write_index(index.content(virtual, offset))

    def _file(self, kind: str, rank: int) -> Path:
        return self.folder / f"{kind}-{rank}"


@contextmanager
def room_for(out: Path, folder: Path) -> Iterator[None]:
    """Turn the fault of a full disk in ``with``, where parts of ``out`` go to a ``folder``, into :class:`UserError`."""
    try:
        yield
    except OSError as fault:
        if fault.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"{out}: cannot write a part of it ({fault.strerror}); free some space in {folder}, or choose another"
        ) from fault


def _blocks(path: Path) -> Iterator[bytes]:
    """The blocks of a bgzipped file, but for the empty one at its end."""
    with path.open("rb", buffering=_READ_BYTES) as stream:
        while head := stream.read(len(BGZF_EOF)):
            (size,) = struct.unpack("<H", head[_BLOCK_SIZE])
            if head != BGZF_EOF:
                yield head + stream.read(size + 1 - len(head))


def seen(path: Path) -> Path:
    """A file that another machine has made, when this one sees it."""
    until = time.monotonic() + _SEEN_WITHIN_S
    while not path.exists() and path.parent.exists() and time.monotonic() < until:
        time.sleep(0.2)
    return path


def remove_folder(folder: Path) -> None:
    """Remove a folder with what ranks that end at the same time may still write there."""
    until = time.monotonic() + 2
    shutil.rmtree(folder, ignore_errors=True)
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.05)
        shutil.rmtree(folder, ignore_errors=True)
