"""Windows: stretches of consecutive sites on one contig, the unit of retrieval and of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.data.sites import SiteTable
from embrag_ds.errors import UserError


@dataclass(frozen=True)
class Window:
    """Sites [start, stop) of the panel."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def make_windows(sites: SiteTable, window_sites: int, overlap_sites: int) -> list[Window]:
    """Cover every contig with windows of at most ``window_sites``, overlapping by ``overlap_sites``.

    A contig's windows are equally long (to one site), so none is a small remainder; none crosses a
    contig's end, and none is padded.
    """
    windows: list[Window] = []
    step = window_sites - overlap_sites
    for first, last in sites.contig_runs():
        length = last - first
        count = max(1, -(-(length - overlap_sites) // step))
        starts = np.linspace(0, max(0, length - overlap_sites), count + 1).round().astype(int)
        for begin, end in zip(starts[:-1], starts[1:], strict=True):
            stop = min(length, int(end) + overlap_sites)
            windows.append(Window(len(windows), first + int(begin), first + stop))
    return windows


def read_windows(path: Path, sites: SiteTable) -> list[Window]:
    """Read windows from a file: ``contig start end`` per line, base pairs, 1-based and inclusive.

    Windows that hold no site of the panel are left out; lines must be sorted as the panel is.
    """
    codes = {name: code for code, name in enumerate(sites.contigs)}
    runs = {int(sites.contig[first]): (first, last) for first, last in sites.contig_runs()}
    windows: list[Window] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as fault:
        raise UserError(f"{path}: cannot read the windows: {fault.strerror}") from fault
    for number, line in enumerate(lines, start=1):
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
        if windows and (start < windows[-1].start or stop <= windows[-1].stop):
            raise UserError(f"{path}: line {number}: windows must be sorted, and none inside another")
        if len(windows) > 1 and start < windows[-2].stop:
            raise UserError(f"{path}: line {number}: at most two windows may overlap at a site")
        windows.append(Window(len(windows), start, stop))
    if not windows:
        raise UserError(f"{path}: no window holds a site of the panel")
    return windows


def uncovered(windows: list[Window], size: int) -> int:
    """How many of ``size`` sites lie in no window."""
    covered = np.zeros(size, dtype=bool)
    for window in windows:
        covered[window.start : window.stop] = True
    return int(size - covered.sum())


def blend_weights(windows: list[Window]) -> list[np.ndarray]:
    """Weight of each window at its sites, float64 [L]: linear ramps that sum to 1 at every site.

    At most two windows may share a site, which :func:`make_windows` guarantees.
    """
    weights = [np.ones(len(window)) for window in windows]
    for left, right in zip(windows[:-1], windows[1:], strict=True):
        shared = left.stop - right.start
        if shared <= 0:
            continue
        ramp = np.arange(1, shared + 1) / (shared + 1)
        weights[left.index][-shared:] = 1 - ramp
        weights[right.index][:shared] = ramp
    return weights
