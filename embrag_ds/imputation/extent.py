"""Extent of an imputation: which of the panel's sites are written, and which windows that takes."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from embrag_ds.data.windows import Window
from embrag_ds.errors import UserError
from embrag_ds.variants.contigs import listed, reconcile
from embrag_ds.variants.sites import SiteTable

logger = logging.getLogger(__name__)

UntypedContigs = Literal["drop", "frequency"]
"""What becomes of a contig without typed sites: it is left out, or its dosages are the panel's allele frequencies."""
FEW_TYPED = 10
"""Number of typed sites below which a window is reported."""


@dataclass(frozen=True)
class Extent:
    """Panel sites that are written: ``spans`` of rows [start, stop), each on one contig, in order."""

    spans: list[tuple[int, int]]

    def rows(self) -> np.ndarray:
        """The sites' rows, int64 [n]."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.spans])

    def places(self, size: int) -> np.ndarray:
        """Place of each of the panel's ``size`` rows among the sites that are written, int64 [S + 1]."""
        wanted = np.zeros(size + 1, dtype=np.int64)
        wanted[self.rows() + 1] = 1
        return np.cumsum(wanted)

    def table(self, sites: SiteTable) -> SiteTable:
        """The table of the sites that are written, of the panel's."""
        rows = self.rows()
        return sites if len(rows) == len(sites) else sites.take(rows)

    def windows(self, windows: list[Window]) -> list[Window]:
        """The windows whose cores hold these sites, in order.

        They are those of the whole panel, so that a region's dosages do not depend on where it begins.
        """
        return [
            each for start, stop in self.spans for each in windows if each.core_start < stop and each.core_stop > start
        ]


def extent(
    sites: SiteTable,
    typed: np.ndarray,
    region: str | None,
    untyped: UntypedContigs,
    panel: str,
    target: str,
    contigs: Collection[str] | None = None,
) -> Extent:
    """Sites to write: those of ``region``, or all, on contigs with typed sites, or all contigs.

    ``contigs`` are the panel's to choose from, if not all. ``typed`` bool [S] marks typed sites. A region is
    ``contig``, ``contig:start-end``, ``contig:start-`` or ``contig:position``, in base pairs, 1-based and inclusive.
    The two names stand for the files in errors. Raises :class:`UserError` for another region.
    """
    runs = sites.contig_runs()
    if contigs is not None:
        runs = [run for run in runs if sites.contigs[sites.contig[run[0]]] in contigs]
    without = [run for run in runs if not typed[slice(*run)].any()]
    if region is not None:
        runs = [_in_region(sites, region, panel)]
    elif untyped == "drop":
        runs = [run for run in runs if run not in without]
    names = [sites.contigs[sites.contig[start]] for start, _ in without]
    chosen = {sites.contigs[sites.contig[start]] for start, _ in runs}
    left_out = [name for name in names if name not in chosen]
    if left_out and region is None:
        logger.warning(
            "%s is not typed on %s, which %d sites of %s are on: left out (--untyped-contigs frequency writes them)",
            target,
            listed(left_out),
            sum(stop - start for start, stop in without),
            panel,
        )
    if chosen & set(names):
        logger.warning(
            "%s is not typed on %s: dosages there are the panel's allele frequencies",
            target,
            listed(sorted(chosen & set(names))),
        )
    return Extent(runs)


def warn_of_few_typed(windows: list[Window], sites: SiteTable, typed: np.ndarray) -> None:
    """Warn of windows with fewer than :data:`FEW_TYPED` typed sites, flanks included."""
    before = np.concatenate([[0], np.cumsum(typed)])
    counts = np.array([before[each.stop] - before[each.start] for each in windows])
    few = np.flatnonzero(counts < FEW_TYPED)
    if not len(few):
        return
    worst = windows[int(counts.argmin())]
    logger.warning(
        "%d of %d windows have fewer than %d typed sites; %s:%d-%d has %d",
        len(few),
        len(windows),
        FEW_TYPED,
        sites.contigs[sites.contig[worst.start]],
        sites.pos[worst.start],
        sites.pos[worst.stop - 1],
        counts.min(),
    )


def _in_region(sites: SiteTable, region: str, panel: str) -> tuple[int, int]:
    contigs = sites.used_contigs()
    runs = dict(zip(contigs, sites.contig_runs(), strict=True))
    contig, start, stop = _parsed(region, contigs, panel)
    first, last = runs[contig]
    pos = sites.pos[first:last]
    rows = first + int(np.searchsorted(pos, start)), first + int(np.searchsorted(pos, stop, side="right"))
    if rows[0] >= rows[1]:
        raise UserError(
            f"--region {region}: {panel} has no site there; its sites on {contig} lie between {pos[0]} and {pos[-1]}"
        )
    return rows


def contig_of_region(region: str, contigs: list[str], panel: str) -> str:
    """The one of a panel's ``contigs`` that a region lies on; raises :class:`UserError` if there is none."""
    return _parsed(region, contigs, panel)[0]


def _parsed(region: str, contigs: list[str], panel: str) -> tuple[str, int, int]:
    """Contig, start and end of a region, inclusive."""
    name, start, stop = region, 1, int(np.iinfo(np.int64).max)
    # A contig's own name may have a colon, as those of HLA alleles do.
    if not reconcile([region], contigs):
        found = re.fullmatch(r"(.+):([0-9][0-9,]*)(?:(-)([0-9,]*))?", region)
        if found is None:
            raise UserError(_no_region(region, contigs, panel))
        name, start = found.group(1), _position(found.group(2))
        if found.group(3) is None:
            stop = start
        elif found.group(4).strip(","):
            stop = _position(found.group(4))
        if stop < start:
            raise UserError(f"--region {region}: it ends before it starts; give contig:start-end")
    contig = reconcile([name], contigs).get(name)
    if contig is None:
        raise UserError(_no_region(region, contigs, panel))
    return contig, start, stop


def _position(text: str) -> int:
    """A number with commas between digits; those beyond any position are cut off at 18 digits."""
    return int(text.replace(",", "")[:18])


def _no_region(region: str, contigs: list[str], panel: str) -> str:
    return (
        f"--region {region}: no such region of {panel}, whose contigs are {listed(contigs)}; give contig or "
        "contig:start-end"
    )
