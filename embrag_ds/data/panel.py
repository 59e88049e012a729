"""Reference panels: a phased VCF or BCF packed into an on-disk cache, and views of subsets of its samples.

A cached panel is a folder named after a digest of the input's first and last MiB, size, and times of its last change.
The system sets the time of a change of status (``ctime``) whenever a file is written, whatever a program that copies
files does to the other time stamps. So another file under the same name is noticed, at the price that a panel which is
only renamed, or gets other permissions, is packed again. The folder holds:

================  ===========================================================================
file              content
================  ===========================================================================
``alleles.bits``  uint8 [S, ceil(2N / 8)], bit h of row s is haplotype h's allele at site s;
                  memory-mapped, so a window is one contiguous read
``missing.bits``  likewise the missing alleles of targets; only where there are any
``unphased.bits`` uint8 [S, ceil(N / 8)], the calls of targets that need phasing; only where there are any
``ploidy.npz``    haploid samples by site range (:class:`embrag_ds.data.ploidy.Ploidy`), if there are any
``sites.npz``     the site table (:meth:`embrag_ds.variants.sites.SiteTable.save`)
``excluded.tsv``  what was left out: contig, position, ID, REF, ALT and reason
``meta.json``     format number, sample ids, SHA-256 of the alleles, counts of records and of those left out by reason
================  ===========================================================================

It is an entry of :mod:`embrag_ds.data.cache`: there only when complete, and made again if it is damaged.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from embrag_ds.data.cache import building, remove_entry
from embrag_ds.data.packing.pack import pack
from embrag_ds.data.packing.reading import PANEL, Reading, packed_folder
from embrag_ds.data.ploidy import Ploidy
from embrag_ds.errors import UserError
from embrag_ds.files import read_lines, split_fields
from embrag_ds.ops.bits import pack_host, unpack_chosen, unpack_host
from embrag_ds.variants.sites import SiteTable

logger = logging.getLogger(__name__)

RARE = 0.01
"""Frequency (a fraction) below which an allele is rare."""
FEW = 10
"""Number of copies below which an allele is rare in any set: among n haplotypes the limit is max(RARE n, FEW)."""
_SITES_PER_READ = 2048
_STEADY = 10


@dataclass(frozen=True)
class Panel:
    """A cached panel of N samples at S sites, with one bit per allele.

    ``packed`` uint8 [S, ceil(2N / 8)] is memory-mapped; sample i owns the bits 2i and 2i + 1. ``skipped`` counts by
    reason what was left out of the input's ``records`` records, and the file ``excluded`` lists it. ``filled`` sites
    got their major allele for missing or unphased calls. ``ploidy`` is None where all samples are diploid.

    Targets are held likewise. Their missing alleles are bits of ``missing`` uint8 [S, ceil(2N / 8)], and their calls
    that need phasing of ``unphased`` uint8 [S, ceil(N / 8)]; None where there are none.

    ``recorded_sha256`` is the digest of ``packed``, counted when it was written; None for a panel made in memory.
    """

    path: Path
    sites: SiteTable
    samples: tuple[str, ...]
    packed: np.ndarray
    skipped: dict[str, int]
    records: int = 0
    filled: int = 0
    ploidy: Ploidy | None = None
    missing: np.ndarray | None = None
    unphased: np.ndarray | None = None
    excluded: Path | None = None
    recorded_sha256: str | None = None

    def alleles(self, start: int, stop: int, haplotypes: np.ndarray | None = None) -> np.ndarray:
        """Alleles of the sites [start, stop), uint8 [H, L]: of all haplotypes, or of those numbered (int64 [H])."""
        bits = unpack_host(self.packed[start:stop], 0, 2 * len(self.samples))
        chosen = bits if haplotypes is None else bits[:, haplotypes]
        return np.ascontiguousarray(chosen.T)

    def alleles_at(self, sites: np.ndarray, haplotypes: np.ndarray | None = None) -> np.ndarray:
        """Alleles at any site rows int64 [L], uint8 [L, H]: of all haplotypes, or of those numbered (int64 [H])."""
        rows = self.packed[sites]
        if haplotypes is None:
            return unpack_host(rows, 0, 2 * len(self.samples))
        return unpack_chosen(rows, haplotypes)

    @cached_property
    def alleles_sha256(self) -> str:
        """SHA-256 of the packed alleles: the same for the same calls, whatever file they come from."""
        return self.recorded_sha256 or hashlib.sha256(np.ascontiguousarray(self.packed).data).hexdigest()

    @cached_property
    def alt_count(self) -> np.ndarray:
        """Number of ALT copies at every site, int64 [S]; takes one pass over the packed alleles."""
        return self._copies(self.packed)

    @cached_property
    def allele_count(self) -> np.ndarray:
        """Number of alleles at every site, int64 [S]: two for each sample, one where it is haploid."""
        counts = np.full(len(self.packed), 2 * len(self.samples), dtype=np.int64)
        if self.ploidy is not None:
            ends = [*self.ploidy.start[1:].tolist(), len(counts)]
            for start, stop, haploid in zip(self.ploidy.start.tolist(), ends, self.ploidy.haploid, strict=True):
                counts[start:stop] -= int(haploid.sum())
        return counts

    @cached_property
    def monomorphic(self) -> np.ndarray:
        """Sites without two different alleles, bool [S]; missing alleles do not count."""
        known = self.allele_count
        if self.missing is not None:
            known = known - self._copies(self.missing)
        found: np.ndarray = (self.alt_count == 0) | (self.alt_count == known)
        return found

    def _copies(self, bits: np.ndarray) -> np.ndarray:
        """Number of haplotypes that count and are marked at every site, int64 [S]; ``bits`` as those of ``packed``."""
        copies = np.empty(len(bits), dtype=np.int64)
        for start, stop, counted in self.ranges():
            block = bits[start:stop] if counted is None else bits[start:stop] & pack_host(counted)
            copies[start:stop] = np.bitwise_count(block).sum(1, dtype=np.int64)
        return copies

    def ranges(self) -> Iterator[tuple[int, int, np.ndarray | None]]:
        """Iterate over short ranges of sites [start, stop), each with the haplotypes that count there, bool [2N].

        The second haplotype of a haploid sample repeats its first, and does not count. None where all do.
        """
        bounds = [0] if self.ploidy is None else self.ploidy.start.tolist()
        for number, (first, last) in enumerate(pairwise([*bounds, len(self.packed)])):
            counted = None if self.ploidy is None else counted_haplotypes(self.ploidy.haploid[number])
            for start in range(first, last, _SITES_PER_READ):
                yield start, min(start + _SITES_PER_READ, last), counted

    @cached_property
    def minimum_allele_count(self) -> int:
        """Least minor-allele count, above 0, of the panel's sites: the filter that its call set had passed."""
        minor = np.minimum(self.alt_count, self.allele_count - self.alt_count)
        return int(minor[minor > 0].min(initial=2 * len(self.samples)))


def counted_haplotypes(haploid: np.ndarray) -> np.ndarray:
    """Haplotypes that count, bool [..., 2N]: all but the second ones of the ``haploid`` samples, bool [..., N]."""
    return np.stack([np.ones_like(haploid), ~haploid], axis=-1).reshape(*haploid.shape[:-1], -1)


def skipped_records(skipped: dict[str, int]) -> str:
    """Text that lists skipped records by reason, for the log; empty if there are none."""
    return ", ".join(f"{count} records skipped ({reason})" for reason, count in skipped.items() if count)


def open_panel(path: Path, cache_dir: Path, progress: bool = True, reading: Reading = PANEL) -> Panel:
    """Open a panel, or targets, through the cache; the file is packed on first use, with a bar if ``progress``.

    A pipe is packed for this process alone. Raises :class:`UserError` as
    :class:`embrag_ds.variants.records.VariantReader` does, for calls that ``reading`` refuses, and for a file without
    sites. It also does so for a file that changes while it is read, and for a cache that cannot be written to.
    """
    folder = packed_folder(path, cache_dir, reading)
    directory = folder or cache_dir / f"panel-{secrets.token_hex(10)}"
    if folder is None:
        atexit.register(remove_entry, directory)
    tables = None
    with building(directory) as target:
        if target is not None:
            pack(path, target, reading, progress)
            if packed_folder(path, cache_dir, reading) != folder:
                raise UserError(f"{path}: it changed while it was read; start again when it is complete")
            tables = _tables(target)  # what cannot be read again must not become an entry
    sites, meta = tables or _tables(directory)
    if tables is None and progress:
        for remark in meta["remarks"]:
            logger.warning("%s: %s", path, remark)
    samples = tuple(meta["samples"])
    ploidy, missing, unphased = (directory / name for name in ("ploidy.npz", "missing.bits", "unphased.bits"))
    by_haplotype, by_sample = (len(sites), (2 * len(samples) + 7) // 8), (len(sites), (len(samples) + 7) // 8)
    return Panel(
        path,
        sites,
        samples,
        packed=map_packed(directory / "alleles.bits", by_haplotype),
        skipped=meta["skipped"],
        records=meta["records"],
        filled=meta["filled"],
        ploidy=Ploidy.load(ploidy, len(samples)) if ploidy.exists() else None,
        missing=map_packed(missing, by_haplotype) if missing.exists() else None,
        unphased=map_packed(unphased, by_sample) if unphased.exists() else None,
        excluded=directory / "excluded.tsv",
        recorded_sha256=meta["alleles_sha256"],
    )


def map_packed(path: Path | str, shape: tuple[int, ...]) -> np.memmap:
    """Map a file of packed alleles into memory, read-only: uint8 of ``shape`` [S, bytes]."""
    return np.memmap(path, dtype=np.uint8, mode="r", shape=shape)


def _tables(directory: Path) -> tuple[SiteTable, dict[str, Any]]:
    """Site table and description of a cached panel."""
    return SiteTable.load(directory / "sites.npz"), json.loads((directory / "meta.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Populations:
    """Population of every sample: the P ``names``, and ``of`` int64 [N], indices into them."""

    names: tuple[str, ...]
    of: np.ndarray


def read_populations(path: Path | None, samples: tuple[str, ...]) -> Populations:
    """Read the population of every one of ``samples`` from a table with lines ``sample <tab> population``.

    More columns, other samples, a header line and lines that begin with ``#`` are ignored, and so are blanks around a
    field. Without a file all samples form the one population ``all``. Raises :class:`UserError` for a malformed line,
    contradictory lines, or a sample without a line.
    """
    if path is None:
        return Populations(("all",), np.zeros(len(samples), dtype=np.int64))
    table: dict[str, str] = {}
    known = set(samples)
    for number, line in enumerate(read_lines(path, "sample table"), start=1):
        fields = split_fields(line)
        if not fields or (fields[0].startswith("#") and fields[0] not in known):
            continue
        if len(fields) < 2 or not fields[0] or not fields[1]:
            raise UserError(f"{path}: line {number}: expected sample and population, separated by a tab")
        if table.setdefault(fields[0], fields[1]) != fields[1]:
            raise UserError(f"{path}: line {number}: {fields[0]} has another population further up; keep one")
    missing = [sample for sample in samples if sample not in table]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} samples have no line, the first is {missing[0]}; add them, or omit --samples"
        )
    names = tuple(sorted({table[sample] for sample in samples}))
    code = {name: number for number, name in enumerate(names)}
    return Populations(names, np.array([code[table[sample]] for sample in samples], dtype=np.int64))


class PanelSubset:
    """Reference set: a subset of a panel's samples, with allele frequencies computed from it alone.

    Haplotypes are numbered 0 to H - 1 within the set. ``haplotypes`` int64 [H] are their numbers in the panel,
    ``sample_of`` int64 [H] the panel indices of their samples, and ``population_of`` int64 [H] their populations.
    """

    def __init__(self, panel: Panel, populations: Populations, samples: np.ndarray):
        self.panel = panel
        self.samples = np.sort(np.asarray(samples, dtype=np.int64))
        self.populations = populations
        self.haplotypes = (2 * self.samples[:, None] + np.arange(2)).reshape(-1)
        self.sample_of = np.repeat(self.samples, 2)
        self.population_of = populations.of[self.sample_of]

    def __len__(self) -> int:
        return len(self.haplotypes)

    def alleles(self, start: int, stop: int) -> np.ndarray:
        """Alleles of the sites [start, stop), uint8 [H, L]."""
        return self.panel.alleles(start, stop, self._columns)

    def alleles_at(self, sites: np.ndarray) -> np.ndarray:
        """Alleles at any site rows int64 [L], uint8 [L, H]."""
        return self.panel.alleles_at(sites, self._columns)

    def packed_at(self, sites: np.ndarray) -> np.ndarray:
        """The same packed, uint8 [L, ceil(H / 8)]."""
        return self.panel.packed[sites] if self._columns is None else pack_host(self.alleles_at(sites))

    @property
    def _columns(self) -> np.ndarray | None:
        """Its haplotypes among the panel's, int64 [H], or None for all."""
        return None if len(self.samples) == len(self.panel.samples) else self.haplotypes

    @cached_property
    def population_sizes(self) -> np.ndarray:
        """Number of haplotypes that count in every population, float32 [P, S], or [P, 1] if the same at all sites."""
        members = self._members()
        if self.panel.ploidy is None:
            return members.sum(0)[:, None]
        sizes = np.empty((members.shape[1], len(self.panel.sites)), dtype=np.float32)
        for start, stop, counted in self._blocks(members):
            sizes[:, start:stop] = counted.sum(0)[:, None]
        return sizes

    @cached_property
    def population_counts(self) -> np.ndarray:
        """Number of ALT copies in every population, float32 [P, S]."""
        if len(self.populations.names) == 1 and len(self.samples) == len(self.panel.samples):
            return self.panel.alt_count[None].astype(np.float32)
        members = self._members().T.astype(bool)
        counts = np.empty((len(members), len(self.panel.sites)), dtype=np.float32)
        for start, stop, counted in self.panel.ranges():
            packed = self.panel.packed[start:stop]
            for population, member in enumerate(members):
                chosen = np.zeros(2 * len(self.panel.samples), dtype=bool)
                chosen[self.haplotypes] = member
                if counted is not None:
                    chosen &= counted
                counts[population, start:stop] = np.bitwise_count(packed & pack_host(chosen)).sum(1, dtype=np.int64)
        return counts

    def counted(self, sites: slice) -> np.ndarray:
        """Haplotypes that count at some sites, float32 [H, L], or [H, 1] if the same at all sites of the panel.

        The second haplotype of a haploid sample repeats its first, and does not count.
        """
        ploidy = self.panel.ploidy
        if ploidy is None:
            return np.ones((len(self), 1), dtype=np.float32)
        haploid = ploidy.at(np.arange(sites.start, sites.stop))[:, self.sample_of]
        second = self.haplotypes % 2 == 1
        return np.ascontiguousarray(~(haploid & second).T).astype(np.float32)

    def _members(self) -> np.ndarray:
        """Which haplotype is of which population, float32 [H, P]."""
        members = np.zeros((len(self), len(self.populations.names)), dtype=np.float32)
        members[np.arange(len(self)), self.population_of] = 1
        return members

    def _blocks(self, members: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Short ranges of sites [start, stop), each with the ``members`` float32 [H, P] that count there."""
        for start, stop, counted in self.panel.ranges():
            yield start, stop, members if counted is None else members * counted[self.haplotypes, None]

    @cached_property
    def allele_frequency(self) -> np.ndarray:
        """ALT frequency in the set, float32 [S]."""
        return self.population_counts.sum(0) / self.population_sizes.sum(0)

    @cached_property
    def minor_allele_count(self) -> np.ndarray:
        """Number of copies of the minor allele in the set, float32 [S]."""
        copies = self.population_counts.sum(0)
        return np.minimum(copies, self.population_sizes.sum(0) - copies)

    @cached_property
    def good_turing_odds(self) -> np.ndarray:
        """Good-Turing correction of a minor allele's log odds, float32 [FEW + 1], by its number r of copies.

        Let n_r alleles have r copies among H haplotypes. Then a new haplotype carries each of them with probability
        ``(r + 1) n_{r+1} / (n_r H)`` (Good 1953, Biometrika 40:237). The correction is the logarithm of this over the
        plain estimate ``r / H``. It is 0 for counts that are not rare; the last entry stands for all greater counts.

        The estimate holds for any new haplotype from the same source as the set's. It matters where sites were filtered
        by their allele count in more samples than the set has. Alleles with few copies in the set are then scarce, and
        likelier in the other samples than their count suggests. Ten sites without any correction are added to every
        n_r, which keeps small panels steady.
        """
        most = min(FEW - 1, int(self.population_sizes.sum(0).max()) // 4)
        sites = np.bincount(self.minor_allele_count.astype(np.int64), minlength=FEW + 2).astype(np.float64)
        copies = np.arange(max(1, self.panel.minimum_allele_count), most + 1)
        odds = np.zeros(FEW + 1, dtype=np.float32)
        more = (copies + 1) * sites[copies + 1] + _STEADY * copies
        odds[copies] = np.log(more / (copies * sites[copies] + _STEADY * copies))
        return odds

    @property
    def passes_minimum_count(self) -> np.ndarray:
        """Sites whose minor-allele count in the set reaches the panel's minimum allele count, bool [S].

        Any other site is in the panel only because of the copies that samples outside the set have.
        """
        return self.minor_allele_count >= self.panel.minimum_allele_count
