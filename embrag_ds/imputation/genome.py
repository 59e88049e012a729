"""A genome of several files: which targets belong to which panel, and what of both is kept for the work.

A *unit* is one panel file, or some contigs of it, with one file of targets. Units are imputed one after another, so
memory holds one panel file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from embrag_ds.data.inputs import PanelFiles, PanelInputs, open_inputs
from embrag_ds.data.packing.reading import TARGET
from embrag_ds.data.panel import Panel, map_packed, open_panel
from embrag_ds.data.ploidy import Ploidy
from embrag_ds.data.targets import Targets
from embrag_ds.data.windows import DataConfig
from embrag_ds.errors import UserError
from embrag_ds.files import source_of
from embrag_ds.imputation.extent import contig_of_region
from embrag_ds.variants.contigs import listed, reconcile
from embrag_ds.variants.harmonise import NO_CONTIG, Harmonised
from embrag_ds.variants.records import Duplicates, Excluded

logger = logging.getLogger(__name__)

_SITES_AT_ONCE = 2048
_NONE = np.zeros(0, dtype=np.int64)
NO_MATCH = Harmonised(_NONE, _NONE, _NONE.astype(bool), {}, {}, 0, [], _NONE, {})
"""Match of targets that are read again, or not typed."""


@dataclass(frozen=True)
class Unit:
    """A panel file, by its place in the command, a file of targets likewise, and the panel's contigs that it types.

    ``target`` is None where no file types them.
    """

    panel: int
    target: int | None
    contigs: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """What is left of a unit to be imputed: its panel file, and the ``spans`` of rows that are written.

    ``number`` is that of its folder of targets (:func:`keep_targets`).
    """

    number: int
    panel: int
    spans: list[tuple[int, int]]

    @property
    def sites(self) -> int:
        """Number of sites that are written."""
        return sum(stop - start for start, stop in self.spans)


class OpenPanels:
    """Panel files, of which the newest stays open."""

    def __init__(self, panels: Sequence[PanelFiles], settings: DataConfig):
        self._panels, self._settings = panels, settings
        self._open: tuple[int, PanelInputs] | None = None

    def __len__(self) -> int:
        return len(self._panels)

    def path(self, number: int) -> Path:
        """Path of a panel file."""
        path = self._panels[number].panel
        assert path is not None
        return path

    def inputs(self, number: int, progress: bool = False) -> PanelInputs:
        """A panel file, opened; what is doubtful about it is logged if ``progress``."""
        if self._open is None or self._open[0] != number:
            self._open = None  # before the next one takes memory
            self._open = number, open_inputs(self._panels[number], self._settings, progress)
        return self._open[1]


class Genome:
    """Panel files and files of targets, of which at least one kind are several, opened to see what belongs together.

    Raises :class:`UserError` for contigs that two files have, for other samples in another file of targets, and for a
    file of targets without a panel.
    """

    def __init__(
        self,
        panels: OpenPanels,
        targets: Sequence[Path],
        scratch: Path,
        duplicates: Duplicates,
    ):
        self.panels, self.targets = panels, targets
        self._scratch = scratch
        self._reading = replace(TARGET, duplicates=duplicates)
        self._target: tuple[int, Panel] | None = None
        self.panel_of: dict[str, int] = {}
        """Panel file of each contig that has sites, in the order of the output."""
        self.excluded: list[tuple[str, Path]] = []
        """Lists of what was left out of the files when they were packed, each with what the file is."""
        self.contigs: dict[str, int] = {}
        """Contigs of all headers, with their lengths."""
        for number in range(len(panels)):
            self._add_panel(number, panels.inputs(number, progress=True).panel)
        self._names: list[dict[str, str]] = []
        self._target_of: dict[str, int] = {}
        self.samples: tuple[str, ...] = ()
        for number, path in enumerate(targets):
            self._add_target(number, path)

    def _add_panel(self, number: int, panel: Panel) -> None:
        logger.info("panel %s: %d samples, %d sites", panel.path, len(panel.samples), len(panel.sites))
        if panel.excluded is not None:
            self.excluded.append(("panel", panel.excluded))
        known = {_bare(name): name for name in self.panel_of}
        for name in panel.sites.used_contigs():
            if _bare(name) in known:
                other = known[_bare(name)]
                raise UserError(
                    f"{panel.path}: its contig {name} is in {self.panels.path(self.panel_of[other])}, too; give each "
                    "contig once, and join files of parts of one (bcftools concat)"
                )
            self.panel_of[name] = number
        for name, length in zip(panel.sites.contigs, panel.sites.contig_lengths, strict=True):
            if length and self.contigs.get(name) not in (None, 0, length):
                raise UserError(
                    f"{panel.path}: its header has contig {name} with {length} bp, and another panel file with "
                    f"{self.contigs[name]}; give panels of one build, or correct the headers (bcftools reheader -f)"
                )
            self.contigs[name] = length or self.contigs.get(name, 0)

    def _add_target(self, number: int, path: Path) -> None:
        target = self._open_target(number)
        if number and target.samples != self.samples:
            raise UserError(
                f"{path}: its samples are not those of {self.targets[0]} in the same order, as one output needs them; "
                "choose and order them (bcftools view -S)"
            )
        self.samples = target.samples
        names = reconcile(target.sites.used_contigs(), self.panel_of)
        if not names:
            raise UserError(
                f"{path}: no panel file has a contig of it: its contigs are {listed(target.sites.used_contigs())} and "
                f"the panels' {listed(list(self.panel_of))}; rename them (bcftools annotate --rename-chrs), add the "
                "panel file, or leave this file out"
            )
        for name, contig in names.items():
            if self._target_of.setdefault(contig, number) != number:
                raise UserError(
                    f"{path}: its contig {name} is in {self.targets[self._target_of[contig]]}, too; give each contig "
                    "once (other samples need a run of their own)"
                )
        self._names.append(names)
        if target.excluded is not None:
            self.excluded.append(("target", target.excluded))
        if without := [name for name in target.sites.used_contigs() if name not in names]:
            rows = self._rows(target, without)
            logger.warning("%s: %d sites on %s, which no panel has, are left out", path, len(rows), listed(without))

    def without_panel(self, number: int) -> list[Excluded]:
        """Sites of a file of targets on contigs that no panel file has."""
        target, names = self._open_target(number), self._names[number]
        sites = target.sites
        rows = self._rows(target, [name for name in sites.used_contigs() if name not in names])
        return [Excluded.at(sites, row, NO_CONTIG) for row in rows.tolist()]

    def units(self, region: str | None) -> list[Unit]:
        """The units in the order of the output: all, or that of a region; raises :class:`UserError` for no region.

        A contig without targets joins the one before it in its file, or else the one behind.
        """
        chosen = None
        if region is not None:
            names = ", ".join(str(self.panels.path(number)) for number in range(len(self.panels)))
            chosen = contig_of_region(region, list(self.panel_of), names)
        units = []
        for number in range(len(self.panels)):
            contigs = [name for name, panel in self.panel_of.items() if panel == number]
            typed = [self._target_of.get(name) for name in contigs]
            for place in range(1, len(typed)):
                typed[place] = typed[place - 1] if typed[place] is None else typed[place]
            typed = [next((each for each in typed if each is not None), None) if one is None else one for one in typed]
            for target, group in groupby(zip(typed, contigs, strict=True), key=lambda pair: pair[0]):
                unit = Unit(number, target, tuple(contig for _, contig in group))
                if chosen is None or chosen in unit.contigs:
                    units.append(unit)
        return units

    def target(self, unit: Unit) -> Panel:
        """The part of a unit's file of targets that lies on its contigs."""
        assert unit.target is not None
        target, names = self._open_target(unit.target), self._names[unit.target]
        rows = self._rows(target, [name for name in target.sites.used_contigs() if names.get(name) in unit.contigs])
        return target if len(rows) == len(target.sites) else some_sites(target, rows)

    def _open_target(self, number: int) -> Panel:
        if self._target is None or self._target[0] != number:
            first = self._target is None or self._target[0] < number
            self._target = number, open_panel(self.targets[number], self._scratch, first, self._reading)
        return self._target[1]

    @staticmethod
    def _rows(target: Panel, contigs: list[str]) -> np.ndarray:
        codes = [code for code, name in enumerate(target.sites.contigs) if name in contigs]
        return np.flatnonzero(np.isin(target.sites.contig, codes))

    def untyped(self, size: int) -> Targets:
        """Targets at a panel's ``size`` sites, none of which any file types."""
        nothing = np.zeros((0, (2 * len(self.samples) + 7) // 8), dtype=np.uint8)
        typed, swapped = np.zeros(size, dtype=bool), np.zeros(0, dtype=bool)
        return Targets(self.samples, typed, _NONE, nothing, _NONE, swapped, None, None, NO_MATCH)


def _bare(name: str) -> str:
    return name.lower().removeprefix("chr")


def some_sites(panel: Panel, rows: np.ndarray) -> Panel:
    """A panel, or targets, at some of its sites, int64 [n], increasing; without a copy if they are consecutive."""
    consecutive = len(rows) > 0 and int(rows[-1] - rows[0]) == len(rows) - 1
    chosen = slice(int(rows[0]), int(rows[-1]) + 1) if consecutive else rows
    ploidy = panel.ploidy
    if ploidy is not None:
        ranges = np.searchsorted(ploidy.start, rows, side="right") - 1
        starts = np.concatenate([[0], np.flatnonzero(np.diff(ranges)) + 1]).astype(np.int64)
        haploid = ploidy.haploid[ranges[starts]]
        ploidy = Ploidy(starts, haploid) if haploid.any() else None
    return replace(
        panel,
        sites=panel.sites.take(rows),
        packed=panel.packed[chosen],
        missing=None if panel.missing is None else panel.missing[chosen],
        unphased=None if panel.unphased is None else panel.unphased[chosen],
        ploidy=ploidy,
        recorded_sha256=None,
    )


def keep_targets(targets: Targets, folder: Path) -> None:
    """Write targets at a panel's sites into a new folder."""
    folder.mkdir()
    np.savez(folder / "sites.npz", sites=targets.sites, swapped=targets.swapped)
    if targets.ploidy is not None:
        targets.ploidy.save(folder / "ploidy.npz")
    for name, bits in (("alleles.bits", targets.packed), ("missing.bits", targets.missing)):
        if bits is not None:
            with (folder / name).open("wb") as out:
                for start in range(0, len(targets.rows), _SITES_AT_ONCE):
                    out.write(np.ascontiguousarray(bits[targets.rows[start : start + _SITES_AT_ONCE]]).data)


def kept_targets(folder: Path, samples: tuple[str, ...], size: int) -> Targets:
    """Targets that :func:`keep_targets` wrote, at the ``size`` sites of their panel, without what was matched."""
    with np.load(folder / "sites.npz") as stored:
        sites, swapped = stored["sites"], stored["swapped"]
    typed = np.zeros(size, dtype=bool)
    typed[sites] = True
    shape = (len(sites), (2 * len(samples) + 7) // 8)
    empty = np.zeros(shape, dtype=np.uint8)
    packed = map_packed(folder / "alleles.bits", shape) if len(sites) else empty
    lacking, ploidy = folder / "missing.bits", folder / "ploidy.npz"
    return Targets(
        samples,
        typed,
        sites,
        packed,
        np.arange(len(sites)),
        swapped,
        map_packed(lacking, shape) if lacking.exists() else None,
        Ploidy.load(ploidy, len(samples)) if ploidy.exists() else None,
        NO_MATCH,
    )


def require_files(several: str, paths: Sequence[Path]) -> None:
    """Raise :class:`UserError` for a pipe, which ``several`` (a clause that says why) would read more than once."""
    for path in paths:
        if str(path) == "-" or (source_of(path).exists() and not source_of(path).is_file()):
            raise UserError(f"{path}: {several}, so this must be a file and no pipe; write it to one first")


def report_of(reports: list[dict[str, Any]], genome: Genome) -> dict[str, Any]:
    """Report of several files, for JSON: one entry for each unit, and what no panel file has."""
    lost = [
        {"file": str(path), "sites_without_panel": len(genome.without_panel(number))}
        for number, path in enumerate(genome.targets)
    ]
    return {"files": reports, "targets": lost}
