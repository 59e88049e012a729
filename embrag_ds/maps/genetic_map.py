"""Genetic maps: base-pair positions converted to centimorgans."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from embrag_ds.errors import UserError
from embrag_ds.files import write_text
from embrag_ds.maps.formats import ANY_CONTIG, Points, mean_rate, read_map_file, subject
from embrag_ds.variants.contigs import reconcile
from embrag_ds.variants.sites import SiteTable

logger = logging.getLogger(__name__)

_FEW = 0.01
_NEAR_CM = 1.0
"""At most the share of a contig's sites, and their distance from the map, that need no warning if they lie outside."""
_MORGANS = 0.05
"""Mean rate, in cM/Mb, below which cM may be Morgans: a human map in Morgans has 0.01."""
_JUMP_CM, _JUMP_RATE = 1.0, 1e3
"""Rise between two points, in cM and in cM/Mb, beyond which no real map goes: human hotspots reach 100 cM/Mb."""
_MOST_NAMED = 3


@dataclass(frozen=True)
class GeneticMap:
    """Genetic map: piecewise linear positions in cM along one or more contigs.

    ``points`` maps a contig, as the file names it, to its points (bp, cM), two float64 [n]. bp increases and cM does
    not decrease. The points of the contig ``""`` (:data:`ANY_CONTIG`) are for the only contig that a panel has.
    ``faults`` has the reasons, ready for errors, why the map of other contigs is of no use. Without any points, the
    rate is ``cm_per_mb`` everywhere. ``name`` stands for the map in errors.
    """

    name: str
    points: Points
    cm_per_mb: float | None = None
    faults: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def uniform(cm_per_mb: float = 1.0) -> GeneticMap:
        """Map with the same recombination rate, in cM per Mb, everywhere on every contig."""
        return GeneticMap(name="uniform map", points={}, cm_per_mb=cm_per_mb)

    @staticmethod
    def read(path: str | Path) -> GeneticMap:
        """Read a map in the format of PLINK, SHAPEIT, Eagle, HapMap, minimac4 or deCODE, plain, gzipped or bgzipped.

        Raises :class:`UserError` as :func:`embrag_ds.maps.formats.read_map_file` does. A contig with fewer than two
        points, without recombination, or with a mean rate out of bounds is an error only when it is needed.
        """
        found = read_map_file(Path(path))
        return GeneticMap(str(path), found.points, faults=found.faults)

    def write_plink(self, path: Path, contigs: Sequence[str]) -> None:
        """Write the points of the contigs named, under these names, as a PLINK map (contig, ``.``, cM, bp).

        Columns are one space apart: Selphi takes nothing else.
        Contigs that the map lacks are left out; without ``contigs`` it has its own. Raises :class:`UserError` if it
        lacks all, or if it names no contig and there is not exactly one.
        """
        contigs = contigs or list(self.points)
        own = self._contigs_for(contigs)
        lines = []
        for contig in contigs:
            bp, cm = self.points.get(own.get(contig, contig), (np.empty(0), np.empty(0)))
            lines += [f"{contig} . {c:.8f} {b:.0f}\n" for b, c in zip(bp, cm, strict=True)]
        if not lines:
            raise UserError(self._lacks(contigs))
        write_text(path, "".join(lines))

    def positions(self, sites: SiteTable) -> np.ndarray:
        """Genetic position of every site in cM: float64 [S], not decreasing along a contig.

        Positions are interpolated linearly between the map's points. Beyond its ends they continue with the contig's
        mean rate, so sites there stay apart and may have negative positions. Raises :class:`UserError` if the map lacks
        contigs, or if that of one is at fault.
        """
        if self.cm_per_mb is not None:
            return sites.pos * (self.cm_per_mb * 1e-6)
        own = self._own(sites)
        cm = np.empty(len(sites), dtype=np.float64)
        for start, stop in sites.contig_runs():
            cm[start:stop] = self._interpolate(own[sites.contigs[sites.contig[start]]], sites.pos[start:stop])
        return cm

    def log_doubts(self, sites: SiteTable) -> None:
        """Log what is doubtful about the map of these sites, as warnings with numbers.

        They tell how many sites lie outside the map, at which rate it is extrapolated there, a rate so low that cM may
        be Morgans, and jumps. Few sites just beyond the map's ends make a line without a warning.
        """
        if self.cm_per_mb is not None:
            return
        own = self._own(sites)
        outside = total = 0
        parts, warn = [], False
        for start, stop in sites.contig_runs():
            contig = sites.contigs[sites.contig[start]]
            bp, cm = self.points[own[contig]]
            rate, pos = mean_rate(bp, cm), sites.pos[start:stop]
            self._log_shape(contig, bp, cm)
            out = np.maximum(bp[0] - pos, pos - bp[-1])
            count = int((out > 0).sum())
            outside, total = outside + count, total + len(pos)
            if count == len(pos):
                parts.append(f"all {count:,} of contig {contig}, which it maps from {bp[0]:,.0f} to {bp[-1]:,.0f} only")
            elif count:
                parts.append(f"{count:,} before {bp[0]:,.0f} or after {bp[-1]:,.0f} on contig {contig}")
            if count:
                parts[-1] += f", extrapolated at {rate:.3g} cM/Mb"
                warn |= count > _FEW * len(pos) or out.max() * rate * 1e-6 > _NEAR_CM
        if parts:
            more = f"; and {len(parts) - _MOST_NAMED} more contigs" if len(parts) > _MOST_NAMED else ""
            logger.log(
                logging.WARNING if warn else logging.INFO,
                "map %s: %s of %s panel sites lie outside it: %s%s%s",
                self.name,
                f"{outside:,}",
                f"{total:,}",
                "; ".join(parts[:_MOST_NAMED]),
                more,
                "; does it belong to the panel's region and genome build?" if outside == total else "",
            )

    def _log_shape(self, contig: str, bp: np.ndarray, cm: np.ndarray) -> None:
        rate = mean_rate(bp, cm)
        if rate < _MORGANS:
            logger.warning(
                "map %s: %.3g cM/Mb on average on contig %s: its cM may be Morgans, which are 100 cM",
                self.name,
                rate,
                contig,
            )
        rise, width = np.diff(cm), np.diff(bp)
        jump = (rise > _JUMP_CM) & (rise > width * (_JUMP_RATE * 1e-6))
        if jump.any():
            first = int(np.argmax(jump))
            logger.warning(
                "map %s: jumps on contig %s: %d, the first of %.3g cM from %s to %s; is a line missing or misplaced?",
                self.name,
                contig,
                int(jump.sum()),
                rise[first],
                f"{bp[first]:,.0f}",
                f"{bp[first + 1]:,.0f}",
            )

    def _own(self, sites: SiteTable) -> dict[str, str]:
        """The map's name of every contig with sites. Raises :class:`UserError` unless it has a map of each."""
        used = list(dict.fromkeys(sites.contigs[sites.contig[start]] for start, _ in sites.contig_runs()))
        own = self._contigs_for(used)
        missing = [contig for contig in used if contig not in own]
        if missing:
            raise UserError(self._lacks(missing))
        for contig in used:
            if own[contig] in self.faults:
                raise UserError(f"{self.name}: {subject(own[contig])} {self.faults[own[contig]]}")
        return own

    def _contigs_for(self, contigs: Sequence[str]) -> dict[str, str]:
        """The map's name of every one of ``contigs`` that it has."""
        if ANY_CONTIG not in self.points:
            return reconcile(contigs, [*self.points, *self.faults])
        if len(contigs) > 1 or ANY_CONTIG in contigs:
            raise UserError(
                f"{self.name}: its columns name no contig, and the panel's are {_listed(contigs) or 'not declared'}; "
                "give a map with a column for the contig (pos chr cM)"
            )
        return dict.fromkeys(contigs, ANY_CONTIG)

    def _lacks(self, contigs: Sequence[str]) -> str:
        return (
            f"{self.name}: it has no contig {_listed(contigs)} (it has {_listed([*self.points, *self.faults])}); "
            "give a map that covers it, or leave out --map"
        )

    def _interpolate(self, contig: str, pos: np.ndarray) -> np.ndarray:
        bp, cm = self.points[contig]
        rate = (cm[-1] - cm[0]) / (bp[-1] - bp[0])
        before = np.minimum(pos - bp[0], 0) * rate
        beyond = np.maximum(pos - bp[-1], 0) * rate
        return np.interp(pos, bp, cm) + before + beyond


def _listed(contigs: Sequence[str], most: int = 30) -> str:
    more = f" and {len(contigs) - most} more" if len(contigs) > most else ""
    return ", ".join(contigs[:most]) + more
