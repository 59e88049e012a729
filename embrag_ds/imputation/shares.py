"""Shares of the work: consecutive windows for each rank, as many sites for each as whole windows allow.

No window is computed twice. Where two ranks' windows overlap, the left rank writes the sites of the overlap, and the
right one lends it its own part of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from embrag_ds.data.windows import Window


@dataclass(frozen=True)
class Border:
    """Border of two ranks' shares: the core of the right one's first ``window`` begins with ``sites`` sites, from
    ``first`` on, that the left rank writes.
    """

    window: int
    first: int
    sites: int


@dataclass(frozen=True)
class Share:
    """Consecutive ``windows`` of a rank, with its borders to the rank before, to which it lends, and the one after."""

    windows: list[Window]
    before: Border | None = None
    after: Border | None = None

    @property
    def begin(self) -> int:
        """First site that the rank writes, of all sites of the panel."""
        return self.windows[0].core_start + (0 if self.before is None else self.before.sites)

    @property
    def end(self) -> int:
        """The site behind the last one."""
        return self.windows[-1].core_stop if self.after is None else self.after.first + self.after.sites


@dataclass(frozen=True)
class Division:
    """Division of sites among ranks: the windows divided hold the sites from ``offset`` on, of ``total`` in all."""

    ranks: int
    offset: int
    total: int

    def owner(self, place: float) -> int:
        """Rank of a place among the sites, from 0 on."""
        return min(self.ranks - 1, int(self.ranks * (self.offset + place) / self.total))

    def is_touched(self, rank: int, sites: int) -> bool:
        """Whether windows of so many sites may be a rank's."""
        return self.owner(0) <= rank <= self.owner(sites)

    def share(self, rank: int, windows: list[Window], wanted: np.ndarray, record: np.ndarray | None) -> Share:
        """A rank's share of the windows; it may have none.

        ``wanted`` int64 [S + 1] has the place of each panel row among the sites that are written. The sites of each
        ``record`` int64 [S], if given, are written by one rank.
        """
        middles = [(int(wanted[each.core_start]) + int(wanted[each.core_stop])) / 2 for each in windows]
        owners = [self.owner(middle) for middle in middles]
        borders: dict[int, Border] = {}
        for number in range(1, len(windows)):
            if owners[number] != owners[number - 1]:
                border = _border(windows, number, record)
                if border is None:
                    owners[number] = owners[number - 1]
                elif border.sites:
                    borders[number] = border
        own = [number for number, owner in enumerate(owners) if owner == rank]
        assert all(right == left + 1 for left, right in pairwise(own)), owners
        if not own:
            return Share([])
        return Share([windows[number] for number in own], borders.get(own[0]), borders.get(own[-1] + 1))


def _border(windows: list[Window], number: int, record: np.ndarray | None) -> Border | None:
    """Border before a window, given by its place among ``windows``; None where a third window is involved."""
    before, window = windows[number - 1], windows[number]
    until = max(window.core_start, before.core_stop)
    if record is not None:
        while until < window.core_stop and record[until] == record[until - 1]:
            until += 1
    free = windows[number + 1].core_start if number + 1 < len(windows) else window.core_stop
    if until > window.core_start and until >= min(window.core_stop, max(free, window.core_start + 1)):
        return None
    return Border(window.index, window.core_start, until - window.core_start)
