"""Publishing of a variant file: text in, a bgzipped VCF or a BCF out, with its index, whole or not at all."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import pysam
import pysam.bcftools

from embrag_ds.errors import UserError
from embrag_ds.files import require_writable, written_together
from embrag_ds.variants.container import BgzfWriter, bgzf_written
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


def check_output(path: Path) -> None:
    """Raise :class:`UserError` for an ending other than .vcf.gz or .bcf, or if ``path`` cannot be written.

    A pipe or a device, to which a link may lead, is refused: htslib would put a file with an index in its place.
    """
    if not path.name.endswith((_VCF, _BCF)):
        raise UserError(f"{path}: the output is a bgzipped VCF or a BCF; give it a name ending in .vcf.gz or .bcf")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: it is a pipe or a device, which cannot have an index; give the name of a file")
    require_writable(path)


class Publication:
    """Text of a VCF on its way to a file, with the places of its records for the index."""

    def __init__(self, out: BgzfWriter, sites: SiteTable) -> None:
        self._out = out
        self._sites = sites
        self._ends = _ends(sites)
        self._records: list[tuple[int, int, int]] = []

    def write(self, text: bytes) -> None:
        """Write text that is no record: the header."""
        self._out.write(text)

    def write_record(self, sites: Sequence[int], *parts: bytes | memoryview) -> None:
        """Write the text of a record, in parts, of one site or several, which are rows of the table."""
        end = self._ends[sites[0]] if len(sites) == 1 else max(self._ends[site] for site in sites)
        self._records.append((sites[0], end, self._out.text_bytes))
        for part in parts:
            self._out.write(part)

    def tabix_index(self) -> bytes:
        """Content of the ``.tbi`` of the file, which must be closed.

        A record has a bin, which is the smallest that holds it, and stands in all windows of 16 kb that it overlaps (Li
        2011, Bioinformatics 27:718).
        """
        rows, ends, places = np.array(self._records, dtype=np.int64).reshape(-1, 3).T
        starts = self._out.virtual(np.append(places, self._out.text_bytes))
        contig, begins = self._sites.contig[rows], self._sites.pos[rows] - 1
        bounds = [0, *(np.flatnonzero(np.diff(contig)) + 1).tolist(), len(rows)] if len(rows) else [0]
        names = b"".join(as_bytes(self._sites.contigs[contig[first]]) + b"\0" for first in bounds[:-1])
        parts = [b"TBI\1", struct.pack("<8i", len(bounds) - 1, *_TABIX_OF_VCF, len(names)), names]
        for first, stop in pairwise(bounds):
            span = slice(first, stop)
            parts += [_bins(begins[span], ends[span], starts[first : stop + 1])]
            parts += [_windows(begins[span], ends[span], starts[span])]
        return b"".join([*parts, bytes(8)])


def _bins(begins: np.ndarray, ends: np.ndarray, starts: np.ndarray) -> bytes:
    """Bins of a contig's n records, and the pseudo-bin with their number; ``starts`` has the end of the last, too."""
    bins = np.zeros(len(begins), dtype=np.int64)
    for shift, first in _BINS:
        bins = np.where(begins >> shift == (ends - 1) >> shift, first + (begins >> shift), bins)
    # Consecutive records of a bin are a chunk.
    edges = np.concatenate([[0], np.flatnonzero(np.diff(bins)) + 1, [len(bins)]])
    chunks: dict[int, list[int]] = {}
    offsets = starts[edges].tolist()
    for number, begin, end in zip(bins[edges[:-1]].tolist(), offsets[:-1], offsets[1:], strict=True):
        chunks.setdefault(number, []).extend([begin, end])
    chunks[_PSEUDO_BIN] = [int(starts[0]), int(starts[-1]), len(begins), 0]
    listed = [struct.pack(f"<Ii{len(each)}Q", number, len(each) // 2, *each) for number, each in chunks.items()]
    return struct.pack("<i", len(listed)) + b"".join(listed)


def _windows(begins: np.ndarray, ends: np.ndarray, starts: np.ndarray) -> bytes:
    """For each window of 16 kb the first record that overlaps it, or, where none does, that of the window before."""
    first, last = begins >> _WINDOW, (ends - 1) >> _WINDOW
    offsets = np.full(int(last.max()) + 1, starts[0], dtype=np.uint64)
    known = np.zeros(len(offsets), dtype=bool)
    for record in np.flatnonzero((np.diff(first, prepend=-1) > 0) | (last > first)).tolist():
        span = slice(int(first[record]), int(last[record]) + 1)
        offsets[span] = np.where(known[span], offsets[span], starts[record])
        known[span] = True
    latest = np.maximum.accumulate(np.where(known, np.arange(len(offsets)), 0))
    return struct.pack("<i", len(offsets)) + offsets[latest].astype("<u8").tobytes()


@contextmanager
def published(path: Path, sites: SiteTable) -> Iterator[Publication]:
    """Context with what takes the text of a VCF, which becomes ``path`` with its index on success.

    A failure leaves nothing. If ``path`` ends in .bcf, htslib converts the finished text, which lies beside it until
    then.
    """
    # A .tbi cannot hold positions from 512 Mb on, which some plant and animal chromosomes reach.
    is_bcf = path.name.endswith(_BCF)
    suffix, other = (".csi", ".tbi") if is_bcf or max(_ends(sites), default=0) >= _TBI_LIMIT else (".tbi", ".csi")
    files = written_together(path, Path(f"{path}{suffix}"), obsolete=[Path(f"{path}{other}")])
    with files as (temporary, index):
        try:
            if is_bcf:
                with NamedTemporaryFile(prefix=".tmp-", suffix=_VCF, dir=temporary.parent) as text:
                    with bgzf_written(Path(text.name), 1) as out:
                        yield Publication(out, sites)
                    pysam.bcftools.view("--no-version", "-Ob", "-o", str(temporary), text.name, catch_stdout=False)
                pysam.bcftools.index("--csi", "--force", "-o", str(index), str(temporary), catch_stdout=False)
                return
            # Level 3 takes a third of the default level's time for a quarter more bytes.
            with bgzf_written(temporary, 3) as out:
                publication = Publication(out, sites)
                yield publication
            if suffix == ".tbi":
                with bgzf_written(index, 6) as out:
                    out.write(publication.tabix_index())
            else:
                pysam.tabix_index(str(temporary), preset="vcf", force=True, csi=True, index=str(index))
        except pysam.SamtoolsError as fault:
            raise UserError(f"{path}: cannot write it ({fault}); free some space in {path.parent}") from fault
        except OSError as fault:
            if fault.errno is None:  # pysam's: it knows no more
                raise UserError(f"{path}: cannot write it ({fault}); free some space in {path.parent}") from fault
            raise


def _ends(sites: SiteTable) -> list[int]:
    """Last position that each site covers, as an index sees it."""
    lengths = np.fromiter(map(len, sites.ref), dtype=np.int64, count=len(sites))
    ends: list[int] = (sites.pos + lengths - 1).tolist()
    for row, text in sites.extent.items():
        for entry in text.split(";"):
            key, _, value = entry.partition("=")
            end = int(value) if key == "END" else int(sites.pos[row]) + abs(int(value))
            ends[row] = max(ends[row], end)
    return ends
