"""Text of a variant file, whatever holds it: a plain file, gzip, bgzip, BCF, or a pipe.

Lines are bytes without their end of line. VCF is parsed from its text, and BCF from the text that htslib makes of it: a
record of thousands of samples is then one numpy operation instead of a Python loop.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pysam
import pysam.bcftools

from embrag_ds.errors import UserError
from embrag_ds.files import source_of
from embrag_ds.variants.container.bgzf import BGZF_EOF
from embrag_ds.variants.container.seams import DAMAGE, find_seams, length_until
from embrag_ds.variants.header import foreign

# Our errors name file, record and remedy; htslib's messages on stderr would only repeat them.
pysam.set_verbosity(0)

logger = logging.getLogger(__name__)

_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 16
_FIRST_BYTES = 1 << 12
_LONGEST_LINE = 1 << 28


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


@dataclass(frozen=True)
class Part:
    """Part of a file: what follows ``start``, up to one of ``seams`` (:meth:`VariantText.seams`).

    At each of ``seams``, which increase, ``goes_on`` is called with its number. Where it says no, the part ends.
    ``start`` is one of the file's seams, or 0 for its first record.
    """

    start: int = 0
    seams: Sequence[int] = ()
    goes_on: Callable[[int], bool] = lambda number: False


WHOLE = Part()


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
        except DAMAGE as error:
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
        except DAMAGE as error:
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

    def _text_lines(self, part: Part = WHOLE) -> Iterator[bytes]:
        """Iterate over all lines of a text file, header included, or over those of a part of it."""
        file = self._opened()
        try:
            if part.start:
                file.seek(part.start)
            begun: list[bytes] = []  # pieces of a line whose end has not come
            length = 0
            is_first = part.start == 0
            for block, seam in self._blocks(file, part.seams):
                block = block.removeprefix(_BOM) if is_first else block
                is_first, start = False, 0
                # Faster than split(), by a tenth of the time that packing takes.
                while (end := block.find(b"\n", start)) >= 0:
                    begun.append(block[start:end])
                    yield begun[0] if len(begun) == 1 else b"".join(begun)
                    begun, length, start = [], 0, end + 1
                begun.append(block[start:])
                length += len(block) - start
                if length > _LONGEST_LINE:
                    raise ValueError(f"a line of over {_LONGEST_LINE >> 20} MiB")
                if seam is not None and not length and not part.goes_on(seam):
                    return
            if length:
                self._remark("its last line does not end; if the file was cut short, copy it again")
                yield b"".join(begun)
        finally:
            # After damage htslib reports the same error again when closing.
            with suppress(*DAMAGE):
                file.close()

    def _blocks(self, file: Any, places: Sequence[int]) -> Iterator[tuple[bytes, int | None]]:
        """Iterate over pieces of text, each with the number of the seam that it ends at, if it does.

        The file is read as it would be without seams, so that damage shows at the same place. How long the text up to a
        seam is, another reader finds. A seam that is not found, as in a file that has changed, is passed over.
        """
        seams = list(enumerate(places))[::-1]
        here = file.tell() if seams else 0
        while block := file.read(_BLOCK_BYTES):
            done = 0
            if seams:
                begin, here = here, file.tell()
                while seams and seams[-1][1] <= here:
                    number, seam = seams.pop()
                    length = self._length_until(begin, seam, block)
                    if length is not None:
                        yield block[done:length], number
                        done = length
            yield block[done:], None

    def _length_until(self, start: int, seam: int, block: bytes) -> int | None:
        with suppress(*DAMAGE), self._opened() as file:
            return length_until(file, start, seam, block)
        return None

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

    def seams(self, pieces: int) -> list[int]:
        """Places that divide the records into up to ``pieces`` parts, see :class:`Part`; none but in bgzipped text."""
        return find_seams(self._path, pieces) if self._is_bgzf and not self._is_bcf else []

    def lines(self, part: Part = WHOLE) -> Iterator[bytes]:
        """Iterate over the record lines, or over those of a part."""
        last = b""
        empty = 0
        try:
            for line in self._bcf_lines() if self._is_bcf else self._record_lines(part):
                if line:
                    yield line
                    last = line
                else:
                    empty += 1
        except DAMAGE as error:
            where = "after " + ":".join(last[:200].decode(errors="replace").split("\t")[:2]) if last else "at the start"
            raise UserError(
                f"{self.name}: {where}: the next record is damaged or malformed; write or copy the file again"
            ) from error
        if empty:
            self._remark(f"{empty} empty lines between the records are ignored")

    def _record_lines(self, part: Part) -> Iterator[bytes]:
        in_header = part.start == 0
        for line in self._text_lines(part):
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
