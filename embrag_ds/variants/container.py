"""Text of a variant file, whatever holds it: a plain file, gzip, bgzip, BCF, or a pipe.

Lines are bytes without their end of line. VCF is parsed from its text, and BCF from the text that htslib makes of it: a
record of thousands of samples is then one numpy operation instead of a Python loop.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import struct
import tempfile
import warnings
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pysam
import pysam.bcftools

from embrag_ds.errors import UserError
from embrag_ds.files import source_of
from embrag_ds.variants.header import foreign

# Our errors name file, record and remedy; htslib's messages on stderr would only repeat them.
pysam.set_verbosity(0)

logger = logging.getLogger(__name__)

BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""Empty block that ends a bgzipped file."""
BGZF_TEXT = 0xFF00
"""Bytes of text in a block, as many as htslib puts there."""
_BGZF_START = BGZF_EOF[:16]
_JOB_BYTES = 16 * BGZF_TEXT
_MOST_THREADS = 4
_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 16
_FIRST_BYTES = 1 << 12
_LONGEST_LINE = 1 << 28
# The last one comes from pysam, for a BCF whose blocks htslib takes for plain gzip.
_Damage = (OSError, EOFError, zlib.error, ValueError, NotImplementedError)


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


@contextmanager
def regular_file(path: Path) -> Iterator[Path]:
    """Yield ``path``, or the copy of what a pipe delivers: a file that can be read twice.

    Raises :class:`UserError` if there is no such file, or if it cannot be read.
    """
    given = source_of(path)
    try:
        if given.is_dir():
            raise UserError(f"{path}: it is a folder; give a VCF or BCF file")
        if given.is_file():
            yield given
            return
        if not given.exists():
            raise UserError(f"{path}: there is no such file; check the path")
        with _copied(given, path) as copy:
            yield copy
    except OSError as fault:
        if fault.filename is None or os.fspath(fault.filename) != os.fspath(given):
            raise
        raise UserError(f"{path}: it cannot be read ({fault.strerror}); check its permissions") from fault


@contextmanager
def _copied(pipe: Path, name: Path) -> Iterator[Path]:
    """Yield a copy of what a pipe delivers, in the folder for temporary files."""
    with ExitStack() as stack:
        stream = stack.enter_context(pipe.open("rb"))
        try:
            copy = stack.enter_context(tempfile.NamedTemporaryFile(prefix="embrag-pipe-"))
            shutil.copyfileobj(stream, copy, _BLOCK_BYTES)
            copy.flush()
        except OSError as fault:
            with suppress(OSError):  # closing tries to write the rest
                stack.close()
            raise UserError(
                f"{name}: what the pipe delivers cannot be kept ({fault.strerror}); set TMPDIR to a folder with room, "
                "or give a file"
            ) from fault
        yield Path(copy.name)


def _refuse_foreign(name: Path, start: bytes) -> None:
    if (found := foreign(start, name)) is not None:
        raise UserError(f"{name}: it is {found[0]}, not a VCF or BCF; {found[1]}")


class VariantText:
    """Header and record lines of a variant file.

    ``header`` holds the lines up to the column names, the last one. :meth:`lines` may be iterated again. ``name``
    stands for the file in errors. A missing end-of-file block, empty lines and a byte-order mark are taken, the first
    two with a warning, which ``remarks`` keeps. Raises :class:`UserError` for a file that is no variant file, or is
    damaged.
    """

    def __init__(self, path: Path, name: Path | None = None) -> None:
        self._path = path
        self.name = path if name is None else name
        self.remarks: list[str] = []
        self._is_bgzf = False
        self._is_gzip = False
        self._is_bcf = self._recognise()
        try:
            self.header = self._bcf_header() if self._is_bcf else self._text_header()
        except _Damage as error:
            raise UserError(
                f"{self.name}: its header cannot be read ({error}); write or copy the file again"
            ) from error
        if not self.header or not self.header[-1].startswith(b"#CHROM"):
            raise UserError(f"{self.name}: its header does not end in a #CHROM line; add it (bcftools reheader)")

    def _remark(self, text: str) -> None:
        if text not in self.remarks:  # lines may be iterated again
            self.remarks.append(text)
            logger.warning("%s: %s", self.name, text)

    def _recognise(self) -> bool:
        """Whether the file is a BCF (else text). Raises :class:`UserError` if it is neither."""
        try:
            with self._path.open("rb") as raw:
                start = raw.read(_FIRST_BYTES)
                raw.seek(max(0, os.fstat(raw.fileno()).st_size - len(BGZF_EOF)))
                end = raw.read()
        except OSError as error:
            raise UserError(f"{self.name}: it cannot be read ({error.strerror}); check its permissions") from error
        if not start:
            raise UserError(f"{self.name}: it is empty; give a VCF or BCF file")
        _refuse_foreign(self.name, start)
        if start.startswith(b"\x1f\x8b"):
            self._is_bgzf = start[10:16] == b"\6\0BC\2\0"
            self._is_gzip = not self._is_bgzf
            if self._is_bgzf and end != BGZF_EOF:
                self._remark("it has no end-of-file block; if it was cut short, copy or write it again")
        try:
            with self._opened() as file:
                magic = file.read(_FIRST_BYTES).removeprefix(_BOM)
        except _Damage as error:
            raise UserError(f"{self.name}: its first block is damaged; write or copy the file again") from error
        _refuse_foreign(self.name, magic)
        if not magic.startswith((b"BCF\2", b"##", b"#CHROM", b"\n", b"\r")):
            raise UserError(f"{self.name}: it is not a VCF or BCF; give one")
        if magic.startswith(b"BCF") and self._is_gzip:
            raise UserError(
                f"{self.name}: it is a BCF in gzip, which needs bgzip; convert it (gzip -dc FILE | bcftools view -Ob)"
            )
        return magic.startswith(b"BCF")

    def _opened(self) -> Any:
        """Binary stream of the decompressed content."""
        if self._is_bgzf:
            return pysam.BGZFile(str(self._path), "rb", None)
        return gzip.open(self._path) if self._is_gzip else self._path.open("rb")

    def _text_lines(self) -> Iterator[bytes]:
        """Iterate over all lines of a text file, header included."""
        file = self._opened()
        try:
            block = file.read(_BLOCK_BYTES).removeprefix(_BOM)
            begun: list[bytes] = []  # pieces of a line whose end has not come
            length = 0
            while block:
                start = 0
                # Faster than split(), by a tenth of the time that packing takes.
                while (end := block.find(b"\n", start)) >= 0:
                    begun.append(block[start:end])
                    yield begun[0] if len(begun) == 1 else b"".join(begun)
                    begun, length, start = [], 0, end + 1
                begun.append(block[start:])
                length += len(block) - start
                if length > _LONGEST_LINE:
                    raise ValueError(f"a line of over {_LONGEST_LINE >> 20} MiB")
                block = file.read(_BLOCK_BYTES)
            if length:
                self._remark("its last line does not end; if the file was cut short, copy it again")
                yield b"".join(begun)
        finally:
            # After damage htslib reports the same error again when closing.
            with suppress(*_Damage):
                file.close()

    def _text_header(self) -> list[bytes]:
        header = []
        for line in self._text_lines():
            stripped = line.rstrip(b"\r")
            if stripped and not stripped.startswith(b"#"):
                break
            if stripped:
                header.append(stripped)
            if stripped.startswith(b"#CHROM"):
                break
        return header

    def _bcf_header(self) -> list[bytes]:
        # Read here because htslib's own header gains what the records and the index hold beyond it.
        with self._opened() as file:
            file.read(5)
            length = int.from_bytes(file.read(4), "little")
            # In pieces, because a damaged length may claim gigabytes.
            pieces = []
            while length and (piece := file.read(min(length, _BLOCK_BYTES))):
                pieces.append(piece)
                length -= len(piece)
            if length:
                raise ValueError("it ends early")
        # As htslib does, up to the first NUL or line of column names.
        text = b"".join(pieces).partition(b"\0")[0]
        lines = [line.rstrip(b"\r") for line in text.split(b"\n") if line.strip()]
        end = next((number for number, line in enumerate(lines, start=1) if line.startswith(b"#CHROM")), len(lines))
        return lines[:end]

    def lines(self) -> Iterator[bytes]:
        """Iterate over the record lines, from the first one on."""
        last = b""
        empty = 0
        try:
            for line in self._bcf_lines() if self._is_bcf else self._record_lines():
                if line:
                    yield line
                    last = line
                else:
                    empty += 1
        except _Damage as error:
            where = "after " + ":".join(last[:200].decode(errors="replace").split("\t")[:2]) if last else "at the start"
            raise UserError(
                f"{self.name}: {where}: the next record is damaged or malformed; write or copy the file again"
            ) from error
        if empty:
            self._remark(f"{empty} empty lines between the records are ignored")

    def _record_lines(self) -> Iterator[bytes]:
        in_header = True
        for line in self._text_lines():
            stripped = line[:-1] if line.endswith(b"\r") else line
            if in_header:
                in_header = not stripped.startswith(b"#CHROM")
            else:
                yield stripped

    def _bcf_records(self) -> Any:
        with warnings.catch_warnings():  # of the missing end-of-file block, which has been reported
            warnings.simplefilter("ignore")
            return pysam.VariantFile(str(self._path), "rb", ignore_truncation=True)

    def _bcf_lines(self) -> Iterator[bytes]:
        """Iterate over the records' text as htslib writes it.

        pysam decodes it as UTF-8. From the first record that is none, bcftools writes the text of the whole file, which
        takes disk space but changes no byte.
        """
        number = 0
        with self._bcf_records() as source:
            try:
                for record in source:
                    yield str(record).rstrip("\n").encode()
                    number += 1
                return
            except UnicodeDecodeError:
                logger.debug("%s: record %d is not UTF-8; bcftools writes its text", self.name, number + 1)
        with tempfile.NamedTemporaryFile(prefix="embrag-bcf-", suffix=".vcf") as text:
            try:
                pysam.bcftools.view("-Ov", "-o", text.name, str(self._path), catch_stdout=False)
            except pysam.SamtoolsError as error:
                raise ValueError(str(error)) from error
            yield from islice(VariantText(Path(text.name), self.name).lines(), number, None)
