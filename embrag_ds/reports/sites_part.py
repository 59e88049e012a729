"""Tallies over the sites of an imputed file, of a size that does not grow with their number."""

from __future__ import annotations

import heapq
from typing import Any, NamedTuple

import numpy as np

from embrag_ds.evaluation.metrics import DISJOINT_BINS, MAF_BINS, bin_members

LEVELS = (0.3, 0.8)
"""Values of DR2 that sites are counted from: those that are often asked for."""
DR2_BINS = 20
UNKNOWN_MAF = "unknown"
"""Name of the bin of sites whose frequency is not known."""
_MOST_BINS = 512
_MOST_GAPS = 20
_MOST_TRACKS = 60


class Gap(NamedTuple):
    """A stretch without typed sites: its length in base pairs, where it lies, and the imputed sites in it.

    It reaches from one typed site to the next, or from the contig's first site, or to its last one.
    """

    length: int
    contig: str
    first: int
    last: int
    imputed: int


class Density:
    """Counts of ascending positions (base pairs) along a contig, in at most 512 bins.

    The bins begin at ``start`` and are ``width`` base pairs wide, a power of two that grows as needed.
    """

    def __init__(self, start: int) -> None:
        self.start, self.width = start, 1
        self._counts = np.zeros(_MOST_BINS, dtype=np.int64)

    def add(self, positions: np.ndarray, last: int) -> None:
        """Add positions, int64 [n], between ``start`` and ``last``, which gets a bin, too."""
        while (last - self.start) // self.width >= _MOST_BINS:
            self._counts[: _MOST_BINS // 2] = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts[_MOST_BINS // 2 :] = 0
            self.width *= 2
        self._counts += np.bincount((positions - self.start) // self.width, minlength=_MOST_BINS)

    def counts(self, stop: int) -> list[int]:
        """Counts of the bins up to that of the position ``stop``, none beyond any ``last`` one."""
        return [int(each) for each in self._counts[: (stop - self.start) // self.width + 1]]


class Contig:
    """Counts of a contig's ``sites``, of which some are ``typed``, from the position ``first`` to ``last``.

    ``length`` is that of the header in base pairs, 0 where it has none. ``density`` has the typed sites along the
    contig; it may be set to None to save memory.
    """

    def __init__(self, name: str, length: int, first: int) -> None:
        self.name, self.length, self.first = name, length, first
        self.last = first
        self.sites = self.typed = self.longest_gap = 0
        self.density: Density | None = Density(first)
        # The last typed site (or the first one of all), and the imputed sites since then.
        self._typed_until, self._since = first, 0

    def add(self, positions: np.ndarray, typed: np.ndarray) -> list[Gap]:
        """Add sites, in order: ``positions`` int64 [n] and whether each is ``typed``, bool [n]; returns long gaps."""
        assert self.density is not None
        self.sites += len(positions)
        self.last = int(positions[-1])
        at = positions[typed]
        before = np.cumsum(~typed)
        self.density.add(at, self.last)
        if not len(at):
            self._since += int(before[-1])
            return []
        self.typed += len(at)
        starts = np.concatenate([[self._typed_until], at[:-1]])
        inside = np.diff(before[typed], prepend=-self._since)
        self._typed_until = int(at[-1])
        self._since = int(before[-1] - before[typed][-1])
        longest = np.argsort(starts - at, kind="stable")[:_MOST_GAPS]  # only these can be among the file's longest
        return [self._gap(int(starts[each]), int(at[each]), int(inside[each])) for each in longest]

    def finish(self) -> Gap:
        """The gap up to the contig's last site."""
        return self._gap(self._typed_until, self.last, self._since)

    def _gap(self, first: int, last: int, imputed: int) -> Gap:
        self.longest_gap = max(self.longest_gap, last - first)
        return Gap(last - first, self.name, first, last, imputed)


class SiteTallies:
    """Tallies over all sites of a file, in file order."""

    def __init__(self) -> None:
        self.contigs: list[Contig] = []
        self.gaps: list[Gap] = []
        """The longest gaps of all contigs, the longest first, once :meth:`finish` was called."""
        groups = len(DISJOINT_BINS) + 1
        self._sites = np.zeros(groups, dtype=np.int64)
        self._with_r2 = np.zeros(groups, dtype=np.int64)
        self._sums = np.zeros(groups)
        self._reach = np.zeros((groups, len(LEVELS)), dtype=np.int64)
        self._histogram = np.zeros((groups, DR2_BINS), dtype=np.int64)

    def add(
        self, contig: str, length: int, positions: list[int], typed: list[bool], af: list[float], dr2: list[float]
    ) -> None:
        """Add consecutive sites of one contig: position, whether typed, ALT frequency and DR2 (NaN where not known)."""
        places = np.array(positions, dtype=np.int64)
        is_typed = np.array(typed, dtype=bool)
        if not self.contigs or self.contigs[-1].name != contig:
            self._finish_contig()
            self.contigs.append(Contig(contig, length, positions[0]))
        self._keep(self.contigs[-1].add(places, is_typed))
        self._add_r2(np.array(af)[~is_typed], np.array(dr2)[~is_typed])

    def finish(self) -> None:
        """Close the last contig; call it once, after all sites."""
        self._finish_contig()
        self.gaps.sort(reverse=True)

    @property
    def sites(self) -> int:
        """Number of all sites."""
        return sum(contig.sites for contig in self.contigs)

    @property
    def typed(self) -> int:
        """Number of typed sites."""
        return sum(contig.typed for contig in self.contigs)

    def r2(self) -> list[dict[str, Any]]:
        """DR2 of the imputed sites by minor-allele frequency: a record for each bin, one for all, and one for sites of
        unknown frequency if there are any.
        """
        names = [*DISJOINT_BINS, UNKNOWN_MAF]
        rows = [[place] for place in range(len(names))]
        named = list(zip(names, rows, strict=True))
        if not self._sites[-1]:
            named.pop()
        return [self._r2_of(name, group) for name, group in [*named, ("all", list(range(len(names))))]]

    def _r2_of(self, name: str, rows: list[int]) -> dict[str, Any]:
        number = int(self._with_r2[rows].sum())
        return {
            "maf": name,
            "sites": int(self._sites[rows].sum()),
            "with_r2": number,
            "mean": float(self._sums[rows].sum()) / number if number else None,
            "at_least": {f"{level:g}": int(self._reach[rows, place].sum()) for place, level in enumerate(LEVELS)},
            "histogram": [int(each) for each in self._histogram[rows].sum(axis=0)],
        }

    def _add_r2(self, af: np.ndarray, dr2: np.ndarray) -> None:
        members = bin_members(af)[[place for place, each in enumerate(MAF_BINS) if each.name in DISJOINT_BINS]]
        groups = np.where(members.any(axis=0), members.argmax(axis=0), len(DISJOINT_BINS))
        self._sites += np.bincount(groups, minlength=len(self._sites))
        known = ~np.isnan(dr2)
        groups, dr2 = groups[known], dr2[known]
        self._with_r2 += np.bincount(groups, minlength=len(self._sites))
        self._sums += np.bincount(groups, weights=dr2, minlength=len(self._sites))
        for place, level in enumerate(LEVELS):
            self._reach[:, place] += np.bincount(groups[dr2 >= level], minlength=len(self._sites))
        # Minimac's may exceed 1, and rounding may make one negative.
        bins = np.floor(np.clip(dr2, 0, 1) * DR2_BINS + 1e-9).astype(np.int64).clip(max=DR2_BINS - 1)
        np.add.at(self._histogram, (groups, bins), 1)

    def _finish_contig(self) -> None:
        if not self.contigs:
            return
        self._keep([self.contigs[-1].finish()])
        drawn = [contig for contig in self.contigs if contig.density is not None]
        if len(drawn) > _MOST_TRACKS:
            min(drawn, key=lambda contig: contig.sites).density = None

    def _keep(self, gaps: list[Gap]) -> None:
        self.gaps = heapq.nlargest(_MOST_GAPS, [*self.gaps, *(gap for gap in gaps if gap.length > 0)])
