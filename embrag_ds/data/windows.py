"""Windows: stretches of consecutive sites on one contig, the unit of retrieval and of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from embrag_ds.data.sites import SiteTable
from embrag_ds.data.text import read_lines
from embrag_ds.errors import UserError


@dataclass(frozen=True)
class Window:
    """Sites [start, stop) of the panel, of which [core_start, core_stop) are predicted.

    The flanks outside the core are seen by retrieval only: a match that runs far beyond the core says
    more than what fits in it.
    """

    index: int
    start: int
    stop: int
    core_start: int
    core_stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def core(self) -> slice:
        """The core's place within the window."""
        return slice(self.core_start - self.start, self.core_stop - self.start)

    @property
    def core_sites(self) -> slice:
        """The core's place in the panel."""
        return slice(self.core_start, self.core_stop)


def make_windows(sites: SiteTable, window_sites: int, overlap_sites: int, flank_sites: int) -> list[Window]:
    """Cover every contig with cores of at most ``window_sites``, overlapping by ``overlap_sites``.

    A contig's cores are equally long (to one site), so none is a small remainder; no window crosses a
    contig's end, and none is padded. ``flank_sites`` are added to both sides where the contig has them.
    """
    windows: list[Window] = []
    step = window_sites - overlap_sites
    for first, last in sites.contig_runs():
        length = last - first
        count = max(1, -(-(length - overlap_sites) // step))
        starts = np.linspace(0, max(0, length - overlap_sites), count + 1).round().astype(int)
        for begin, end in pairwise(starts):
            core = (first + int(begin), first + min(length, int(end) + overlap_sites))
            windows.append(_flanked(len(windows), core, (first, last), flank_sites))
    return windows


def _flanked(index: int, core: tuple[int, int], contig: tuple[int, int], flank_sites: int) -> Window:
    start, stop = max(contig[0], core[0] - flank_sites), min(contig[1], core[1] + flank_sites)
    return Window(index, start, stop, *core)


def read_windows(path: Path, sites: SiteTable, flank_sites: int) -> list[Window]:
    """Read the windows' cores from a file: ``contig start end`` per line, base pairs, 1-based and inclusive.

    Windows that hold no site of the panel are left out; lines must be sorted as the panel is.
    """
    codes = {name: code for code, name in enumerate(sites.contigs)}
    runs = {int(sites.contig[first]): (first, last) for first, last in sites.contig_runs()}
    windows: list[Window] = []
    for number, line in enumerate(read_lines(path, "windows"), start=1):
        fields = line.split()
        if not fields or line.startswith("#"):
            continue
        try:
            contig, begin, end = fields[0], int(fields[1]), int(fields[2])
        except (IndexError, ValueError):
            raise UserError(f"{path}: line {number}: expected contig, start and end in base pairs") from None
        if contig not in codes:
            raise UserError(f"{path}: line {number}: contig {contig} is not in the panel")
        if end < begin:
            raise UserError(f"{path}: line {number}: end {end} lies before start {begin}")
        first, last = runs.get(codes[contig], (0, 0))
        start = first + int(np.searchsorted(sites.pos[first:last], begin, side="left"))
        stop = first + int(np.searchsorted(sites.pos[first:last], end, side="right"))
        if stop == start:
            continue
        if windows and (start < windows[-1].core_start or stop <= windows[-1].core_stop):
            raise UserError(f"{path}: line {number}: windows must be sorted, and none inside another")
        if len(windows) > 1 and start < windows[-2].core_stop:
            raise UserError(f"{path}: line {number}: at most two windows may overlap at a site")
        windows.append(_flanked(len(windows), (start, stop), (first, last), flank_sites))
    if not windows:
        raise UserError(f"{path}: no window holds a site of the panel")
    return windows


def uncovered(windows: list[Window], size: int) -> int:
    """How many of ``size`` sites lie in no core."""
    covered = np.zeros(size, dtype=bool)
    for window in windows:
        covered[window.core_sites] = True
    return int(size - covered.sum())


def blend_weights(windows: list[Window]) -> list[np.ndarray]:
    """Weight of each window at the sites of its core, float64: linear ramps that sum to 1 at every site.

    At most two cores may share a site, which :func:`make_windows` guarantees.
    """
    weights = [np.ones(window.core_stop - window.core_start) for window in windows]
    for left, right in pairwise(windows):
        shared = left.core_stop - right.core_start
        if shared <= 0:
            continue
        ramp = np.arange(1, shared + 1) / (shared + 1)
        weights[left.index][-shared:] = 1 - ramp
        weights[right.index][:shared] = ramp
    return weights
