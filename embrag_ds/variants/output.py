"""Imputed targets as VCF or BCF: what is written, and the writer."""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from embrag_ds.dependence import INDEPENDENT, Dependence
from embrag_ds.errors import UserError
from embrag_ds.variants.header import Contents, as_bytes, imputed_header
from embrag_ds.variants.published import Publication, check_output, last_positions, published
from embrag_ds.variants.sample_text import FORMATS, SampleTexts, Statistics, joined_text
from embrag_ds.variants.sites import SiteTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputOptions:
    """What an imputed file holds; the defaults are everything, one ALT a record.

    ``formats`` are the FORMAT fields, of GT, DS, HDS and GP. With ``sites_only`` there are no sample columns, and with
    ``typed_only`` no imputed sites. Imputed sites with DR2 below ``min_r2`` are left out. ``join_multiallelic`` joins
    the sites that were split from one record of the panel. Raises :class:`UserError` for values that cannot be.
    """

    formats: tuple[str, ...] = FORMATS
    sites_only: bool = False
    typed_only: bool = False
    min_r2: float = 0.0
    join_multiallelic: bool = False

    def __post_init__(self) -> None:
        known = ",".join(FORMATS)
        for name in self.formats:
            if name not in FORMATS:
                raise UserError(f"--format {','.join(self.formats)}: there is no field {name!r}; choose from {known}")
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise UserError(f"--format {','.join(self.formats)}: give each field once; choose from {known}")
        if not 0 <= self.min_r2 <= 1:
            raise UserError(f"--min-r2 {self.min_r2:g}: DR2 is from 0 to 1; give a number in this range")
        if self.sites_only and set(self.formats) != set(FORMATS):
            raise UserError("--sites-only writes no sample columns, so --format has no use; leave out one of them")
        if self.typed_only and self.min_r2 > 0:
            raise UserError("--typed-only leaves out what --min-r2 could filter: imputed sites; leave out one of them")

    @property
    def fields(self) -> tuple[str, ...]:
        """FORMAT fields in their order in a record.

        Where sites are joined, HDS is AP1 and AP2. They have one value an ALT, so that tools can split the record.
        """
        chosen = [name for name in FORMATS if name in self.formats]
        if self.join_multiallelic and "HDS" in chosen:
            place = chosen.index("HDS")
            chosen[place : place + 1] = ["AP1", "AP2"]
        return tuple(chosen)

    @property
    def written_fields(self) -> tuple[str, ...]:
        """FORMAT fields of the file: none where it has no sample columns."""
        return () if self.sites_only else self.fields


EVERYTHING = OutputOptions()
"""The defaults."""

_BLOCK_VALUES = 2**24 // 40
_MOST_WAITING = 2


@dataclass(frozen=True)
class _Block:
    """Consecutive sites from ``first`` on: HDS float32 [2N, n], ``typed`` and ``known`` bool [n], ``haploid`` bool [n,
    N] or None. A typed site is known unless some of its alleles are imputed.
    """

    first: int
    hds: np.ndarray
    typed: np.ndarray
    known: np.ndarray
    haploid: np.ndarray | None

    def cut(self, start: int, stop: int) -> _Block:
        haploid = None if self.haploid is None else self.haploid[start:stop]
        rows = slice(start, stop)
        return _Block(self.first + start, self.hds[:, rows], self.typed[rows], self.known[rows], haploid)

    def followed_by(self, other: _Block) -> _Block:
        haploid = None
        if self.haploid is not None or other.haploid is not None:
            haploid = np.concatenate([self._all_haploid(), other._all_haploid()])
        return _Block(
            self.first,
            np.concatenate([self.hds, other.hds], axis=1),
            np.concatenate([self.typed, other.typed]),
            np.concatenate([self.known, other.known]),
            haploid,
        )

    def _all_haploid(self) -> np.ndarray:
        return np.zeros((self.hds.shape[1], len(self.hds) // 2), bool) if self.haploid is None else self.haploid


class ImputedRecords:
    """Writer of imputed records of N samples at ``sites``, or a range of them, block by block in site order.

    ``FORMAT`` is ``GT:DS:HDS:GP``, or those of them that ``options`` choose, to three decimals without the zeros
    behind. HDS is rounded, and GT, DS and GP follow from the rounded HDS. So a sample's columns agree exactly, and GP
    sums to 1. A haploid sample has one allele in GT, one value in HDS, two in GP, and DS in [0, 1]. GP of joined sites
    are products of HDS.

    ``INFO`` has ``AF``, ``DR2``, and the flag ``IMP`` at imputed sites. DR2 is minimac's Rsq (Das et al. 2016, Nat.
    Genet. 48:1284): the variance of HDS over p(1-p). It is at most 1, and 0 where p is 0 or 1; typed sites have 1. A
    typed site where some alleles are imputed has no ``IMP``, and DR2 by the formula. ``AN``, ``S_X`` and ``S_XX``
    (minimac4's names) are the number of haplotypes and the sums of HDS and of its square, from which DR2 of merged
    batches follows. All are of HDS before rounding, and a haploid sample counts once.

    Use it as a context manager. A thread of its own formats the blocks, and others compress them. What fails there is
    raised by a later :meth:`write`, or when the block ends.
    """

    _out: Publication

    def __init__(
        self,
        out: Publication | None,
        sites: SiteTable,
        samples: int,
        options: OutputOptions = EVERYTHING,
        first: int = 0,
        stop: int | None = None,
        dependence: Dependence = INDEPENDENT,
    ) -> None:
        """The range of sites is ``first`` to ``stop``, all by default; ``out`` may come later.

        GP follows from HDS by the ``dependence`` of a sample's two haplotypes.
        """
        if out is not None:
            self._out = out
        self._sites = sites
        self._ends = last_positions(sites)
        self._samples = samples
        self._options = options
        fields = self._fields = options.written_fields
        self._format = f"\t{':'.join(fields)}\t" if fields else ""
        self._sample_texts = SampleTexts(fields, dependence)
        self._next = first
        self._stop = len(sites) if stop is None else stop
        self.imputed = 0
        """Number of imputed sites so far, whether they are written or not."""
        self.below = 0
        """Number of those that are left out for their DR2."""
        self._held: _Block | None = None
        self._writing: deque[Future[None]] = deque()

    def __enter__(self) -> ImputedRecords:
        self._thread = ThreadPoolExecutor(1, "imputed")
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._finish(exc_type, exc, tb)

    def _finish(self, exc_type: Any, exc: Any, tb: Any) -> None:
        try:
            if exc_type is None:
                self._wait(0)
                assert self._next == self._stop, f"{self._next} of {self._stop} sites written"
        finally:
            self._thread.shutdown(cancel_futures=True)

    def _wait(self, most: int) -> None:
        """Wait until at most so many blocks are not written, and raise what the writing of the others raised."""
        while self._writing and (len(self._writing) > most or self._writing[0].done()):
            self._writing.popleft().result()

    def write(
        self,
        first: int,
        haplotype_dosage: np.ndarray,
        typed: np.ndarray,
        alleles_typed: np.ndarray,
        missing: np.ndarray | None = None,
        haploid: np.ndarray | None = None,
    ) -> None:
        """Write the sites ``first`` to ``first + n``, which must follow those written before.

        ``haplotype_dosage`` float32 [2N, n] are ALT probabilities in [0, 1]. ``typed`` bool [n] marks typed sites;
        there ``alleles_typed`` uint8 [2N, n] are written unchanged and the dosage is ignored, except where ``missing``
        bool [2N, n] marks alleles that the target lacks. ``haploid`` bool [N, n] marks samples that are haploid at a
        site; their two rows must agree.
        """
        assert first == self._next, f"sites {first}.. follow {self._next}"
        assert haplotype_dosage.shape == alleles_typed.shape == (2 * self._samples, len(typed))
        assert missing is None or missing.shape == haplotype_dosage.shape
        assert haploid is None or haploid.shape == (self._samples, len(typed))
        step = max(1, _BLOCK_VALUES // self._samples)
        for start in range(0, len(typed), step):
            part = slice(start, start + step)
            self._add(
                haplotype_dosage[:, part],
                typed[part],
                alleles_typed[:, part],
                None if missing is None else missing[:, part],
                None if haploid is None else haploid[:, part],
            )

    def _add(
        self,
        dosage: np.ndarray,
        typed: np.ndarray,
        alleles: np.ndarray,
        missing: np.ndarray | None,
        haploid: np.ndarray | None,
    ) -> None:
        known = typed
        given = typed
        if missing is not None and (lacking := missing & typed).any():
            known = typed & ~lacking.any(axis=0)
            given = typed & ~missing
        hds = np.where(given, alleles, dosage)
        each = haploid.T if haploid is not None and haploid.any() else None
        block = _Block(self._next, hds, typed, known, each)
        self._next += len(typed)
        if not self._options.join_multiallelic:
            self._begin_writing(block)
            return
        if self._held is not None:
            block = self._held.followed_by(block)
        whole = self._whole_records(block)
        self._held = block.cut(whole, len(block.typed)) if whole < len(block.typed) else None
        if whole:
            self._begin_writing(block.cut(0, whole))

    def _begin_writing(self, block: _Block) -> None:
        self._wait(_MOST_WAITING)
        self._writing.append(self._thread.submit(self._write_block, block))

    def _whole_records(self, block: _Block) -> int:
        """Number of the block's sites up to the last record that the next site does not continue."""
        record, stop = self._sites.record, block.first + len(block.typed)
        if record is None or stop == self._stop:
            return len(block.typed)
        while stop > block.first and record[stop - 1] == record[stop]:
            stop -= 1
        return stop - block.first

    def _write_block(self, block: _Block) -> None:
        rows, sums, squares = self._sample_texts.read(block.hds, block.haploid)
        number = np.full(len(rows), len(block.hds))
        if block.haploid is not None:
            number -= block.haploid.sum(axis=1)
        statistics = Statistics(number, sums, squares, block.known)
        kept = self._kept(block.typed, statistics.dr2)
        if not self._options.join_multiallelic:
            groups = [[row] for row in kept.tolist()]
        else:
            groups = self._records(block.first, kept)
        texts = self._sample_texts.joined(rows) if self._fields else None
        for group in groups:
            text: bytes | memoryview = b"\n"
            if texts is not None:
                text = texts[group[0]] if len(group) == 1 else self._joined(block, group)
            site = block.first + group[0]
            end = self._ends[site] if len(group) == 1 else max(self._ends[block.first + row] for row in group)
            contig, begin = self._sites.contigs[self._sites.contig[site]], int(self._sites.pos[site]) - 1
            self._out.write_record(contig, begin, end, self._fixed_columns(block, group, statistics), text)

    def _kept(self, typed: np.ndarray, dr2: np.ndarray) -> np.ndarray:
        """Rows of a block that are written."""
        if self._options.typed_only:
            return np.flatnonzero(typed)
        below = ~typed & (dr2 < self._options.min_r2)
        self.imputed += int((~typed).sum())
        self.below += int(below.sum())
        return np.flatnonzero(~below)

    def _records(self, first: int, rows: np.ndarray) -> list[list[int]]:
        """Rows of a block as lists of those that become one record."""
        if (numbers := self._sites.record) is None:
            return [[row] for row in rows.tolist()]

        def origin(row: int) -> tuple[int, str | None]:
            # A record has one END, so ALTs of different END stay apart.
            return int(numbers[first + row]), _extent_of(self._sites, first + row).get("END")

        return [list(group) for _, group in groupby(rows.tolist(), key=origin)]

    def _fixed_columns(self, block: _Block, group: list[int], statistics: Statistics) -> bytes:
        """Columns of a record before those of the samples."""
        sites, site = self._sites, block.first + group[0]
        if len(group) == 1:
            row = group[0]
            alt = sites.alt[site]
            imputed = not block.typed[row]
            info = (
                f"AF={statistics.af[row]:.6g};DR2={statistics.dr2[row]:.4g}{';IMP' if imputed else ''}"
                f";AN={statistics.number[row]};S_X={statistics.sum[row]};S_XX={statistics.square_sum[row]}"
            )
            if site in sites.extent:
                info = f"{info};{sites.extent[site]}"
        else:
            alt = ",".join(sites.alt[block.first + row] for row in group)
            info = self._joined_info(block, group, statistics)
        text = f"{sites.contigs[sites.contig[site]]}\t{sites.pos[site]}\t{sites.id[site]}\t{sites.ref[site]}\t{alt}"
        return as_bytes(f"{text}\t.\tPASS\t{info}{self._format}")

    def _joined_info(self, block: _Block, group: list[int], statistics: Statistics) -> str:
        entries = {
            "AF": ",".join(f"{statistics.af[row]:.6g}" for row in group),
            "DR2": ",".join(f"{statistics.dr2[row]:.4g}" for row in group),
            "IMP": None if block.typed[group].all() else "",
            "AN": str(statistics.number[group[0]]),
            "S_X": ",".join(statistics.sum[row] for row in group),
            "S_XX": ",".join(statistics.square_sum[row] for row in group),
        }
        extents = [_extent_of(self._sites, block.first + row) for row in group]
        entries["END"] = extents[0].get("END")
        if any("SVLEN" in extent for extent in extents):
            entries["SVLEN"] = ",".join(extent.get("SVLEN", ".") for extent in extents)
        return ";".join(f"{key}={value}" if value else key for key, value in entries.items() if value is not None)

    def _joined(self, block: _Block, group: list[int]) -> bytes:
        """Sample columns of a record of several ALTs."""
        thousandths = np.rint(block.hds[:, group].astype(np.float64) * 1000).astype(np.int64)
        columns = list(map(tuple, thousandths.tolist()))
        haploid = [False] * self._samples if block.haploid is None else block.haploid[group[0]].tolist()
        texts = (
            joined_text(self._fields, columns[2 * sample], None if one else columns[2 * sample + 1])
            for sample, one in enumerate(haploid)
        )
        return "\t".join(texts).encode() + b"\n"


class ImputedVcfWriter(ImputedRecords):
    """Writer of an imputed file with an index, whose records are those of :class:`ImputedRecords`.

    ``path`` must end in ``.vcf.gz`` or ``.bcf``. File and index appear when the block ends without an exception, and
    nothing is left otherwise. Raises :class:`UserError` if the file cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        sites: SiteTable,
        samples: tuple[str, ...] | list[str],
        source: str,
        options: OutputOptions = EVERYTHING,
        first: int = 0,
        stop: int | None = None,
        dependence: Dependence = INDEPENDENT,
    ) -> None:
        """The range of sites is ``first`` to ``stop``, all by default; ``source`` names the program in the header."""
        super().__init__(None, sites, len(samples), options, first, stop, dependence)
        self._path = Path(path)
        check_output(self._path)
        self._header = imputed_header(Contents.of(sites), samples, source, self._fields, dependence)

    def __enter__(self) -> ImputedVcfWriter:
        with ExitStack() as stack:
            self._out = stack.enter_context(published(self._path, max(self._ends, default=0)))
            super().__enter__()
            stack.push(self._finish)
            self._out.write(self._header)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.__exit__(exc_type, exc, tb)
        if exc_type is None:
            log_left_out(self._path, self._options, self.below, self.imputed)


def log_left_out(path: Path, options: OutputOptions, below: int, imputed: int) -> None:
    """Log how many of the imputed sites have too small a DR2, where there is a limit."""
    if options.min_r2 > 0:
        found = (path, below, imputed, options.min_r2)
        logger.info("%s: %d of %d imputed sites have DR2 below %g and are left out", *found)


def _extent_of(sites: SiteTable, site: int) -> dict[str, str]:
    """END and SVLEN of a site, where it has them."""
    text = sites.extent.get(site, "")
    return dict(entry.split("=", 1) for entry in text.split(";")) if text else {}
