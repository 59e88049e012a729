"""Genetic maps: base-pair positions converted to centimorgans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.errors import UserError
from embrag_ds.files import read_lines, write_text
from embrag_ds.variants.sites import SiteTable

_CONTIG_NAMES = {"chr", "chrom", "chromosome"}
_POS_NAMES = {"pos", "position", "bp"}
_CM_NAMES = {"cm", "map", "genetic_map"}


@dataclass(frozen=True)
class GeneticMap:
    """Genetic map: piecewise linear positions in cM along one or more contigs.

    ``points`` maps a contig, without the prefix ``chr``, to its points (bp, cM), two float64 [n]. bp increases and cM
    does not decrease. A contig without points has the rate ``cm_per_mb`` everywhere, or no map if that is None.
    ``name`` stands for the map in errors.
    """

    name: str
    points: dict[str, tuple[np.ndarray, np.ndarray]]
    cm_per_mb: float | None = None

    @staticmethod
    def uniform(cm_per_mb: float = 1.0) -> GeneticMap:
        """Map with the same recombination rate, in cM per Mb, everywhere on every contig."""
        return GeneticMap(name="uniform map", points={}, cm_per_mb=cm_per_mb)

    @staticmethod
    def read(path: str | Path) -> GeneticMap:
        """Read a plain or gzipped map of whitespace-separated columns.

        Without a header line the columns are those of PLINK: contig, id, cM, bp. With one they are found by name. This
        covers HapMap and Eagle maps (``chr position COMBINED_rate(cM/Mb) Genetic_Map(cM)``) and SHAPEIT maps
        (``pos chr cM``).

        Raises :class:`UserError` with file and line for a value that is no finite number, bp that do not increase, or
        cM that decrease. It also raises one for a contig with fewer than two points or without recombination.
        """
        path = Path(path)
        points = _read_points(path, read_lines(path, "genetic map"))
        if not points:
            raise UserError(f"{path}: it has no points; give a PLINK, HapMap or SHAPEIT genetic map")
        for contig, (bp, cm) in points.items():
            if len(bp) < 2 or cm[0] == cm[-1]:
                raise UserError(
                    f"{path}: contig {contig} needs at least two points with different cM; "
                    "give its whole map or remove the contig"
                )
        return GeneticMap(name=str(path), points=points)

    def write_plink(self, path: Path, contigs: Sequence[str]) -> None:
        """Write the points of the contigs named, under these names, as a PLINK map (contig, ``.``, cM, bp)."""
        lines = []
        for contig in contigs:
            bp, cm = self.points.get(_canonical(contig), (np.empty(0), np.empty(0)))
            lines += [f"{contig}\t.\t{c:.8f}\t{b:.0f}\n" for b, c in zip(bp, cm, strict=True)]
        write_text(path, "".join(lines))

    def positions(self, sites: SiteTable) -> np.ndarray:
        """Genetic position of every site in cM: float64 [S], not decreasing along a contig.

        Positions are interpolated linearly between the map's points. Beyond its ends they continue with the contig's
        mean rate, so sites there stay apart and may have negative positions. Raises :class:`UserError` if the map lacks
        a contig.
        """
        cm = np.empty(len(sites), dtype=np.float64)
        for start, stop in sites.contig_runs():
            contig = sites.contigs[sites.contig[start]]
            cm[start:stop] = self._interpolate(contig, sites.pos[start:stop])
        return cm

    def _interpolate(self, contig: str, pos: np.ndarray) -> np.ndarray:
        points = self.points.get(_canonical(contig))
        if points is None:
            if self.cm_per_mb is None:
                raise UserError(
                    f"{self.name}: it has no contig {contig} (it has {', '.join(self.points)}); "
                    "give a map that covers it"
                )
            return pos * (self.cm_per_mb * 1e-6)
        bp, cm = points
        rate = (cm[-1] - cm[0]) / (bp[-1] - bp[0])
        before = np.minimum(pos - bp[0], 0) * rate
        beyond = np.maximum(pos - bp[-1], 0) * rate
        return np.interp(pos, bp, cm) + before + beyond


def _canonical(contig: str) -> str:
    """Contig name without ``chr``: maps and files disagree on the prefix, and ``chr20`` and ``20`` are one contig."""
    return contig.removeprefix("chr")


def _read_points(path: Path, lines: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    columns = (0, 3, 2)
    bps: dict[str, list[float]] = {}
    cms: dict[str, list[float]] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        if number == 1 and not _is_number(fields[-1]):
            columns = _header_columns(path, fields)
            continue
        try:
            contig, bp, cm = (
                _canonical(fields[columns[0]]),
                float(fields[columns[1]]),
                float(fields[columns[2]]),
            )
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{path}: line {number}: cannot find numbers for bp and cM in {line.strip()[:60]!r}; correct the line"
            ) from error
        if not np.isfinite(bp) or not np.isfinite(cm):
            raise UserError(f"{path}: line {number}: bp and cM must be finite; correct the line")
        known_bp, known_cm = bps.setdefault(contig, []), cms.setdefault(contig, [])
        if known_bp and bp <= known_bp[-1]:
            raise UserError(
                f"{path}: line {number}: position {bp:.0f} of contig {contig} follows {known_bp[-1]:.0f}; "
                "sort the map by bp and keep one line a position"
            )
        if known_cm and cm < known_cm[-1]:
            raise UserError(
                f"{path}: line {number}: {cm:g} cM on contig {contig} follows {known_cm[-1]:g} cM; "
                "correct the map: cM cannot decrease"
            )
        known_bp.append(bp)
        known_cm.append(cm)
    return {contig: (np.array(bps[contig]), np.array(cms[contig])) for contig in bps}


def _header_columns(path: Path, fields: list[str]) -> tuple[int, int, int]:
    """Column numbers of contig, bp and cM."""
    names = [field.lower().lstrip("#").partition("(")[0] for field in fields]
    found = []
    for wanted, what in ((_CONTIG_NAMES, "contig"), (_POS_NAMES, "bp"), (_CM_NAMES, "cM")):
        matching = [i for i, name in enumerate(names) if name in wanted]
        if not matching:
            raise UserError(
                f"{path}: line 1: no {what} column among {', '.join(fields)}; "
                f"name one of them {' or '.join(sorted(wanted))}"
            )
        found.append(matching[0])
    return found[0], found[1], found[2]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
