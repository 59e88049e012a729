"""Publishing of a variant file: text in, a bgzipped VCF or a BCF out, with its index, whole or not at all."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import numpy as np
import pysam
import pysam.bcftools

from embrag_ds.errors import UserError
from embrag_ds.files import require_writable, written_together
from embrag_ds.variants.container.bgzf import BgzfWriter, bgzf_written
from embrag_ds.variants.header import as_bytes
from embrag_ds.variants.sites import SiteTable

_TBI_LIMIT = 2**29
_TABIX_OF_VCF = (2, 1, 2, 0, ord("#"), 0)
"""Tabix's preset for VCF: format, columns of contig, begin and end, sign of a header line, and lines to skip."""
_WINDOW = 14
_BINS = [(26, 1), (23, 9), (20, 73), (17, 585), (14, 4681)]
"""Size of a level's bins as a power of two, and the number of its first bin, from the largest to the smallest."""
_PSEUDO_BIN = 37450
_BCF, _VCF = ".bcf", ".vcf.gz"
LEVEL = 3
"""Level of compression of a VCF: it takes a third of the default level's time for a quarter more bytes."""
SCRATCH_LEVEL = 1
"""That of text which is read once."""


def check_output(path: Path) -> None:
    """Raise :class:`UserError` for an ending other than .vcf.gz or .bcf, or if ``path`` cannot be written.

    A pipe or a device, to which a link may lead, is refused: htslib would put a file with an index in its place.
    """
    if not path.name.endswith((_VCF, _BCF)):
        raise UserError(f"{path}: the output is a bgzipped VCF or a BCF; give it a name ending in .vcf.gz or .bcf")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: it is a pipe or a device, which cannot have an index; give the name of a file")
    require_writable(path)


class Records:
    """Records of a text, in its order: their contigs, what they cover, and where in the text they begin."""

    def __init__(self) -> None:
        self.contigs: list[str] = []
        """Contig of each run of records on one contig."""
        self.starts: list[int] = []
        """Number of the first record of each run."""
        self.begin, self.end, self.place = array("q"), array("q"), array("q")

    def add(self, contig: str, begin: int, end: int, place: int) -> None:
        """Add a record that covers [begin, end), from 0 on, and begins at the byte ``place`` of the text."""
        if not self.contigs or self.contigs[-1] != contig:
            self.contigs.append(contig)
            self.starts.append(len(self.place))
        self.begin.append(begin)
        self.end.append(end)
        self.place.append(place)

    def runs(self) -> Iterator[tuple[str, np.ndarray]]:
        """Iterate over the runs: a contig, and begin, end and place of its records, int64 [3, n]."""
        columns = np.array([self.begin, self.end, self.place], dtype=np.int64).reshape(3, -1)
        edges = pairwise([*self.starts, columns.shape[1]])
        for contig, (first, stop) in zip(self.contigs, edges, strict=True):
            yield contig, columns[:, first:stop]

    def save(self, path: Path) -> None:
        """Write them as the arrays of an ``.npz`` file."""
        contigs = np.frombuffer("\n".join(self.contigs).encode("utf-8", "surrogateescape"), dtype=np.uint8)
        with path.open("wb") as out:
            columns = np.array([self.begin, self.end, self.place], dtype=np.int64).reshape(3, -1)
            np.savez(out, contigs=contigs, starts=np.array(self.starts, dtype=np.int64), columns=columns)

    @staticmethod
    def load(path: Path) -> Records:
        """Read what :meth:`save` wrote."""
        found = Records()
        with np.load(path) as stored:
            found.starts = stored["starts"].tolist()
            names = stored["contigs"].tobytes().decode("utf-8", "surrogateescape")
            found.contigs = names.split("\n") if found.starts else []
            for column, numbers in zip((found.begin, found.end, found.place), stored["columns"], strict=True):
                column.frombytes(numbers.tobytes())
        return found


class TabixIndex:
    """Tabix's index of a text, made contig by contig; memory holds the records of one.

    A record has a bin, which is the smallest that holds it, and stands in all windows of 16 kb that it overlaps (Li
    2011, Bioinformatics 27:718).
    """

    def __init__(self) -> None:
        self._records = Records()
        self._contigs: list[tuple[str, _Folded]] = []

    def add(self, contig: str, begin: int, end: int, place: int) -> None:
        """Add a record (:meth:`Records.add`)."""
        if self._records.contigs and self._records.contigs[-1] != contig:
            self._fold(place)
        self._records.add(contig, begin, end, place)

    def add_all(self, records: Records, offset: int) -> None:
        """Add the records of a part of the text that begins at the byte ``offset``."""
        for contig, columns in records.runs():
            self.add(contig, *(columns[:, 0] + (0, 0, offset)).tolist())
            rest = columns[:, 1:] + np.array([[0], [0], [offset]])
            own = self._records
            for column, more in zip((own.begin, own.end, own.place), rest, strict=True):
                column.frombytes(more.tobytes())

    def content(self, virtual: Callable[[np.ndarray], np.ndarray], text_bytes: int) -> bytes:
        """Content of the ``.tbi`` file of a text of so many bytes, whose places ``virtual`` turns into offsets."""
        self._fold(text_bytes)
        names = b"".join(as_bytes(contig) + b"\0" for contig, _ in self._contigs)
        parts = [b"TBI\1", struct.pack("<8i", len(self._contigs), *_TABIX_OF_VCF, len(names)), names]
        for _, folded in self._contigs:
            parts += [_bins(folded, virtual), _windows(folded, virtual)]
        return b"".join([*parts, bytes(8)])

    def _fold(self, place: int) -> None:
        """Keep of the newest contig, whose text ends at ``place``, no more than its index has."""
        for contig, columns in self._records.runs():
            self._contigs.append((contig, _folded(columns[0], columns[1], columns[2], place)))
        self._records = Records()


class _Folded(NamedTuple):
    """What an index has of a contig's n ``records``: ``chunks`` of bins, with begin and end of each as places in the
    text, and the place of each window's first record, int64.
    """

    records: int
    chunks: dict[int, list[int]]
    windows: np.ndarray


def _folded(begins: np.ndarray, ends: np.ndarray, places: np.ndarray, stop: int) -> _Folded:
    """Fold a contig's records, int64 [n] each, whose text ends at ``stop``."""
    bins = np.zeros(len(begins), dtype=np.int64)
    for shift, first in _BINS:
        bins = np.where(begins >> shift == (ends - 1) >> shift, first + (begins >> shift), bins)
    # Consecutive records of a bin are a chunk.
    edges = np.concatenate([[0], np.flatnonzero(np.diff(bins)) + 1])
    chunks: dict[int, list[int]] = {}
    offsets = [*places[edges].tolist(), stop]
    for number, begin, end in zip(bins[edges].tolist(), offsets[:-1], offsets[1:], strict=True):
        chunks.setdefault(number, []).extend([begin, end])
    chunks[_PSEUDO_BIN] = [int(places[0]), stop]
    return _Folded(len(begins), chunks, _first_places(begins, ends, places))


def _first_places(begins: np.ndarray, ends: np.ndarray, places: np.ndarray) -> np.ndarray:
    """For each window of 16 kb the first record that overlaps it, or, where none does, that of the window before."""
    first, last = begins >> _WINDOW, (ends - 1) >> _WINDOW
    found = np.full(int(last.max()) + 1, places[0], dtype=np.int64)
    known = np.zeros(len(found), dtype=bool)
    for record in np.flatnonzero((np.diff(first, prepend=-1) > 0) | (last > first)).tolist():
        span = slice(int(first[record]), int(last[record]) + 1)
        found[span] = np.where(known[span], found[span], places[record])
        known[span] = True
    latest = np.maximum.accumulate(np.where(known, np.arange(len(found)), 0))
    return found[latest]


def _bins(folded: _Folded, virtual: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """Bins of a contig, and the pseudo-bin with the number of its records."""
    listed = [struct.pack("<i", len(folded.chunks))]
    for number, places in folded.chunks.items():
        offsets = virtual(np.array(places, dtype=np.int64)).tolist()
        offsets += [folded.records, 0] if number == _PSEUDO_BIN else []
        listed.append(struct.pack(f"<Ii{len(offsets)}Q", number, len(offsets) // 2, *offsets))
    return b"".join(listed)


def _windows(folded: _Folded, virtual: Callable[[np.ndarray], np.ndarray]) -> bytes:
    return struct.pack("<i", len(folded.windows)) + virtual(folded.windows).astype("<u8").tobytes()


class Publication:
    """Text of a VCF on its way to a file; its records are noted in ``records``, unless that is None, for the index."""

    def __init__(self, out: BgzfWriter, records: Records | TabixIndex | None) -> None:
        self._out = out
        self._records = records

    def write(self, text: bytes) -> None:
        """Write text that is no record: the header."""
        self._out.write(text)

    def write_record(self, contig: str, begin: int, end: int, *parts: bytes | memoryview) -> None:
        """Write the text, in parts, of a record that covers [begin, end) of a contig, from 0 on."""
        if self._records is not None:
            self._records.add(contig, begin, end, self._out.text_bytes)
        for part in parts:
            self._out.write(part)


@contextmanager
def published(path: Path, last: int) -> Iterator[Publication]:
    """Context with what takes the text of a VCF, which becomes ``path`` with its index on success.

    A failure leaves nothing. If ``path`` ends in .bcf, htslib converts the finished text, which lies beside it until
    then. ``last`` is the greatest position that a record covers.
    """
    with publishing(path, last) as files:
        if files.is_bcf:
            with files.text() as text:
                with bgzf_written(text, SCRATCH_LEVEL) as out:
                    yield Publication(out, None)
                files.convert(text)
            return
        index = TabixIndex()
        with bgzf_written(files.temporary, LEVEL) as out:
            yield Publication(out, index)
        files.write_index(index.content(out.virtual, out.text_bytes))


class Publishing:
    """Temporary files of a variant file and its index, which take their names together."""

    def __init__(self, temporary: Path, index: Path, is_bcf: bool, is_tbi: bool) -> None:
        self.temporary = temporary
        self.is_bcf = is_bcf
        self._index = index
        self._is_tbi = is_tbi

    @contextmanager
    def text(self) -> Iterator[Path]:
        """Yield a file for a BCF's text, which is there only inside ``with``."""
        with NamedTemporaryFile(prefix=".tmp-", suffix=_VCF, dir=self.temporary.parent) as text:
            yield Path(text.name)

    def convert(self, text: Path) -> None:
        """Have htslib convert a bgzipped text into the BCF, with its index."""
        pysam.bcftools.view("--no-version", "-Ob", "-o", str(self.temporary), str(text), catch_stdout=False)
        pysam.bcftools.index("--csi", "--force", "-o", str(self._index), str(self.temporary), catch_stdout=False)

    def write_index(self, tabix: bytes) -> None:
        """Write the index of a VCF, whose content as a ``.tbi`` is ``tabix``; htslib makes a ``.csi``."""
        if self._is_tbi:
            with bgzf_written(self._index, 6) as out:
                out.write(tabix)
        else:
            pysam.tabix_index(str(self.temporary), preset="vcf", force=True, csi=True, index=str(self._index))


@contextmanager
def publishing(path: Path, last: int) -> Iterator[Publishing]:
    """Context of a variant file that is written: it appears with its index on success, and a failure leaves nothing.

    ``last`` is the greatest position that a record covers.
    """
    # A .tbi cannot hold positions from 512 Mb on, which some plant and animal chromosomes reach.
    is_bcf = path.name.endswith(_BCF)
    suffix, other = (".csi", ".tbi") if is_bcf or last >= _TBI_LIMIT else (".tbi", ".csi")
    files = written_together(path, Path(f"{path}{suffix}"), obsolete=[Path(f"{path}{other}")])
    with files as (temporary, index):
        try:
            yield Publishing(temporary, index, is_bcf, suffix == ".tbi")
        except pysam.SamtoolsError as fault:
            raise UserError(f"{path}: cannot write it ({fault}); free some space in {path.parent}") from fault
        except OSError as fault:
            if fault.errno is None:  # pysam's: it knows no more
                raise UserError(f"{path}: cannot write it ({fault}); free some space in {path.parent}") from fault
            raise


def last_positions(sites: SiteTable) -> list[int]:
    """Last position that each site covers, as an index sees it."""
    lengths = np.fromiter(map(len, sites.ref), dtype=np.int64, count=len(sites))
    ends: list[int] = (sites.pos + lengths - 1).tolist()
    for row, text in sites.extent.items():
        for entry in text.split(";"):
            key, _, value = entry.partition("=")
            end = int(value) if key == "END" else int(sites.pos[row]) + abs(int(value))
            ends[row] = max(ends[row], end)
    return ends
