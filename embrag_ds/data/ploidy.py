"""Ploidy of samples along the sites: haploid calls of X, Y and mitochondria, among diploid ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.ops.bits import pack_host, unpack_host
from embrag_ds.variants.genotypes import DIPLOID, HAPLOID, UNKNOWN


@dataclass(frozen=True)
class Ploidy:
    """Ranges of sites over which no sample's ploidy changes: R ranges of N samples.

    ``start`` int64 [R] is the first site of each range, 0 at first and increasing. ``haploid`` bool [R, N] marks the
    haploid samples of a range. A haploid sample has the same allele on both its haplotypes.
    """

    start: np.ndarray
    haploid: np.ndarray

    def at(self, sites: np.ndarray) -> np.ndarray:
        """Haploid samples at sites int64 [n], bool [n, N]."""
        return self.haploid[np.searchsorted(self.start, sites, side="right") - 1]

    def save(self, path: Path) -> None:
        """Write the ranges as an ``.npz`` file."""
        np.savez(path, start=self.start, haploid=pack_host(self.haploid))

    @staticmethod
    def load(path: Path, samples: int) -> Ploidy:
        """Read the ranges of ``samples`` samples written by :meth:`save`."""
        with np.load(path) as arrays:
            return Ploidy(arrays["start"], unpack_host(arrays["haploid"], 0, samples).view(bool))


class PloidyRecorder:
    """Recorder of the ploidy of N samples, site after site.

    The ploidy of a missing call is unknown: callers write ``./.`` for haploid samples, too. It is that of the sample's
    call before it, or else of its first one. A sample without any is haploid if all others always are.
    """

    def __init__(self, samples: int) -> None:
        self._now = np.zeros(samples, dtype=np.uint8)
        self._starts: list[int] = []
        self._ranges: list[np.ndarray] = []
        self._sites = 0
        self._all_diploid = False

    def add(self, ploidy: np.ndarray | None, missing: np.ndarray | None = None) -> None:
        """Add a site with the ploidy of each call, uint8 [N], and the missing alleles, bool [2N].

        ``ploidy`` is None where all calls are diploid, and ``missing`` where no allele is missing.
        """
        site = self._sites
        self._sites += 1
        if ploidy is None:
            if self._all_diploid:
                return
            ploidy = np.full_like(self._now, DIPLOID)
        if missing is not None:
            ploidy = np.where(missing[0::2] & missing[1::2], UNKNOWN, ploidy)
        self._begin(site, ploidy)

    def extend(self, other: PloidyRecorder) -> None:
        """Add the sites of another recorder of the same samples behind one's own."""
        for start, ploidy in zip(other._starts, other._ranges, strict=True):
            self._begin(self._sites + start, ploidy)
        self._sites += other._sites

    def _begin(self, site: int, ploidy: np.ndarray) -> None:
        """Begin a range at a site, unless its ploidy is that of the site before."""
        now = np.where(ploidy == UNKNOWN, self._now, ploidy)
        if not self._ranges or not np.array_equal(now, self._now):
            self._starts.append(site)
            self._ranges.append(now)
            self._now = now
            self._all_diploid = bool((now == DIPLOID).all())

    def result(self) -> Ploidy | None:
        """The ranges; None if every sample is diploid throughout."""
        codes = np.array(self._ranges, dtype=np.uint8).reshape(len(self._ranges), len(self._now))
        known = codes != UNKNOWN
        first = np.take_along_axis(codes, known.argmax(axis=0)[None], axis=0) if len(codes) else codes
        others = HAPLOID if known.any() and not (codes[known] == DIPLOID).any() else DIPLOID
        codes = np.where(known, codes, np.where(first == UNKNOWN, others, first))
        haploid = codes == HAPLOID
        if not haploid.any():
            return None
        changes = np.concatenate([[True], (haploid[1:] != haploid[:-1]).any(axis=1)])
        return Ploidy(np.array(self._starts, dtype=np.int64)[changes], haploid[changes])
