"""Inputs of a run: a panel with its genetic map and sample table, or else the simulated default data set."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.data.cache import default_cache_dir, locked
from embrag_ds.data.packing.reading import PANEL, Reading
from embrag_ds.data.panel import (
    Panel,
    PanelSubset,
    Populations,
    open_panel,
    read_populations,
)
from embrag_ds.data.sampler import read_manifest
from embrag_ds.data.simulate import DefaultData, SimulationSettings, simulate_default
from embrag_ds.data.windows import DataConfig, WindowedPanel
from embrag_ds.errors import UserError
from embrag_ds.files import remove_leftovers
from embrag_ds.maps.formats import LEAST_RATE, MOST_RATE
from embrag_ds.maps.genetic_map import GeneticMap

logger = logging.getLogger(__name__)

HUMAN_SIZE = 10_000
"""Effective population size for which genetic distances are taken as they are."""
_SIZES = (10.0, 1e7)


@dataclass(frozen=True)
class PanelFiles:
    """Paths of a panel, its genetic map and its sample table; without a panel, the default data set is used.

    ``cm_per_mb`` is the recombination rate everywhere, in place of a map. ``effective_size`` N, of the population,
    scales genetic distances by N / 10,000 (:data:`HUMAN_SIZE`). ``reading`` holds the rules by which the panel is read.
    Raises :class:`UserError` if one of the two numbers is out of bounds, or has no panel or a map beside it.
    """

    panel: Path | None = None
    genetic_map: Path | None = None
    samples: Path | None = None
    cm_per_mb: float | None = None
    effective_size: float | None = None
    reading: Reading = PANEL

    def __post_init__(self) -> None:
        described = (self.genetic_map, self.samples, self.cm_per_mb, self.effective_size)
        if self.panel is None and any(each is not None for each in described):
            raise UserError("--map, --samples, --cm-per-mb and --effective-size describe a panel: name it with --panel")
        if self.genetic_map is not None and self.cm_per_mb is not None:
            raise UserError(f"--cm-per-mb is for panels without a map: leave it out, or --map {self.genetic_map}")
        _require_within("--cm-per-mb", self.cm_per_mb, (LEAST_RATE, MOST_RATE), "humans have about 1 cM/Mb")
        _require_within("--effective-size", self.effective_size, _SIZES, f"humans have about {HUMAN_SIZE}")

    def by_option(self) -> dict[str, Path | None]:
        """The paths by the options that name them."""
        return {"--panel": self.panel, "--map": self.genetic_map, "--samples": self.samples}


def _require_within(option: str, value: float | None, bounds: tuple[float, float], what: str) -> None:
    if value is not None and not bounds[0] <= value <= bounds[1]:
        raise UserError(f"{option} {value:g}: give a number from {bounds[0]:g} to {bounds[1]:g}; {what}")


@dataclass(frozen=True)
class PanelInputs:
    """Opened panel, the population of each sample, and the position of every site in cM, float64 [S]."""

    panel: Panel
    populations: Populations
    position_cm: np.ndarray


def settings_for(cache_dir: Path | None) -> DataConfig:
    """The settings that a command without a configuration reads data by."""
    return DataConfig(cache_dir=None if cache_dir is None else str(cache_dir))


def cache_directory(settings: DataConfig) -> Path:
    """Folder of packed panels and of the default data set."""
    return Path(settings.cache_dir) if settings.cache_dir else default_cache_dir()


def default_data(settings: DataConfig) -> DefaultData:
    """The default data set, simulated on first use; concurrent processes wait for the one that simulates."""
    directory = cache_directory(settings) / "default"
    with locked(directory):
        remove_leftovers(directory)
        return simulate_default(directory, SimulationSettings())


def with_default(files: PanelFiles, settings: DataConfig) -> PanelFiles:
    """The files, or those of the default data set where no panel is named."""
    if files.panel is not None:
        return files
    default = default_data(settings)
    return PanelFiles(default.panel, default.genetic_map, default.samples)


def open_inputs(files: PanelFiles, settings: DataConfig, progress: bool = True) -> PanelInputs:
    """Open a panel through the cache, with its populations and genetic positions.

    Without a map, positions follow ``files.cm_per_mb``, or else 1 cM per Mb. They are scaled by the effective size: the
    copying model's recombination between sites d cM apart has the probability ``1 - exp(-r d)`` with a learned r, and
    in Li and Stephens (2003, Genetics 165:2213) its exponent is proportional to the product of the effective size and
    d. Without a sample table, all samples form one population. ``progress`` displays a progress bar while a panel is
    packed, and logs what is doubtful about the map. Raises :class:`UserError` for faulty files.
    """
    files = with_default(files, settings)
    assert files.panel is not None
    # The map first: packing may take minutes, and its faults should not wait for that.
    genetic_map = (
        GeneticMap.read(files.genetic_map) if files.genetic_map else GeneticMap.uniform(files.cm_per_mb or 1.0)
    )
    panel = open_panel(files.panel, cache_directory(settings), progress, files.reading)
    position_cm = genetic_map.positions(panel.sites)
    if progress:
        if panel.monomorphic.all():
            logger.warning("panel %s: none of its %d sites varies among its samples", panel.path, len(panel.sites))
        if files.genetic_map is None:
            logger.info("no genetic map: %g cM/Mb everywhere", genetic_map.cm_per_mb)
        genetic_map.log_doubts(panel.sites)
    if files.effective_size is not None:
        position_cm *= files.effective_size / HUMAN_SIZE
    return PanelInputs(panel, read_populations(files.samples, panel.samples), position_cm)


def windowed(
    inputs: PanelInputs, settings: DataConfig, samples: np.ndarray, manifest: str | None = None
) -> WindowedPanel:
    """Cut the panel into windows; ``samples``, panel indices int64, become the reference set.

    ``manifest`` is a file that lists the sites of an array (:func:`read_manifest`). Raises :class:`UserError` if it, or
    the file of windows, is faulty.
    """
    reference = PanelSubset(inputs.panel, inputs.populations, samples)
    typed = None if manifest is None else read_manifest(Path(manifest), inputs.panel)
    return WindowedPanel(reference, settings.windows(inputs.panel), inputs.position_cm * settings.map_scale, typed)
