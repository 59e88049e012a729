"""Writing of bgzipped files."""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""Empty block that ends a bgzipped file."""
BGZF_TEXT = 0xFF00
"""Bytes of text in a block, as many as htslib puts there."""
_BGZF_START = BGZF_EOF[:16]
_JOB_BYTES = 16 * BGZF_TEXT
_MOST_THREADS = 4


class BgzfWriter:
    """Writer of a bgzipped file, compressed by threads of its own: the same bytes for any number of them.

    Its blocks are those that htslib makes. Memory holds a few MiB of text that waits for the threads. :meth:`write`
    and :meth:`close` raise OSError if the file cannot be written.
    """

    def __init__(self, path: Path, level: int) -> None:
        self._file = path.open("wb", buffering=0)  # nothing is left to be written, or to fail, when it is closed
        self._level = level
        self._threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self._threads, "bgzf")
        self._compressed: deque[tuple[memoryview, Future[list[bytes]]]] = deque()
        # Used again and again: new memory costs more than what is done in it.
        self._free: list[memoryview] = []
        self._text = memoryview(bytearray(_JOB_BYTES))
        self._filled = 0
        self._begins = [0]
        self.text_bytes = 0
        """Bytes of text written so far."""

    def write(self, text: bytes | memoryview) -> None:
        """Add text, which is copied."""
        self.text_bytes += len(text)
        left = memoryview(text)
        while left:
            fits = min(len(left), _JOB_BYTES - self._filled)
            self._text[self._filled : self._filled + fits] = left[:fits]
            self._filled += fits
            left = left[fits:]
            if self._filled == _JOB_BYTES:
                self._compress()

    def close(self) -> None:
        """Write what is left, and the block that ends the file."""
        self._compress()
        self._put_finished(0)
        self._put(BGZF_EOF)
        self.release()

    def release(self) -> None:
        """Drop what is not written, and end the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._file.close()

    def virtual(self, places: np.ndarray) -> np.ndarray:
        """BGZF's virtual offsets, uint64 [n], of places in the text, int64 [n]; call it after :meth:`close`."""
        block, inner = np.divmod(places, BGZF_TEXT)
        begins: np.ndarray = np.array(self._begins, dtype=np.uint64)[block]
        return begins << np.uint64(16) | inner.astype(np.uint64)

    def _compress(self) -> None:
        """Have the text that waits compressed."""
        job = self._pool.submit(_bgzf_blocks, self._text[: self._filled], self._level)
        self._compressed.append((self._text, job))
        self._put_finished(2 * self._threads)
        self._text = self._free.pop() if self._free else memoryview(bytearray(_JOB_BYTES))
        self._filled = 0

    def _put_finished(self, most: int) -> None:
        """Write the blocks that are ready, and wait for them where more than ``most`` jobs are not."""
        while self._compressed and (len(self._compressed) > most or self._compressed[0][1].done()):
            text, job = self._compressed.popleft()
            blocks = job.result()
            self._free.append(text)
            for block in blocks:
                self._begins.append(self._begins[-1] + len(block))
            self._put(b"".join(blocks))

    def _put(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) :]


def _bgzf_blocks(text: memoryview, level: int) -> list[bytes]:
    """The blocks of a text, of which all but the last hold :data:`BGZF_TEXT` bytes of it."""
    blocks = []
    for start in range(0, len(text), BGZF_TEXT):
        part = text[start : start + BGZF_TEXT]
        deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
        packed = deflate.compress(part) + deflate.flush()
        ends = struct.pack("<II", zlib.crc32(part), len(part))
        blocks.append(_BGZF_START + struct.pack("<H", len(_BGZF_START) + len(packed) + 9) + packed + ends)
    return blocks


@contextmanager
def bgzf_written(path: Path, level: int) -> Iterator[BgzfWriter]:
    """Yield a bgzipped file to write to, which is whole when the block ends without an exception."""
    out = BgzfWriter(path, level)
    try:
        yield out
        out.close()
    finally:
        out.release()
