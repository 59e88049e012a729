"""Inputs of a run: a panel with its genetic map and sample table, or else the simulated default data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.data.genetic_map import GeneticMap
from embrag_ds.data.panel import (
    Panel,
    PanelSubset,
    Populations,
    default_cache_dir,
    locked,
    open_panel,
    read_populations,
)
from embrag_ds.data.sampler import read_manifest
from embrag_ds.data.simulate import DefaultData, SimulationSettings, simulate_default
from embrag_ds.data.windows import DataConfig, WindowedPanel
from embrag_ds.errors import UserError
from embrag_ds.files import remove_leftovers


@dataclass(frozen=True)
class PanelFiles:
    """Paths of a panel, its genetic map and its sample table; without a panel, the default data set is used."""

    panel: Path | None = None
    genetic_map: Path | None = None
    samples: Path | None = None


@dataclass(frozen=True)
class PanelInputs:
    """Opened panel, the population of each sample, and the position of every site in cM, float64 [S]."""

    panel: Panel
    populations: Populations
    position_cm: np.ndarray


def cache_directory(settings: DataConfig) -> Path:
    """Folder of packed panels and of the default data set."""
    return Path(settings.cache_dir) if settings.cache_dir else default_cache_dir()


def default_data(settings: DataConfig) -> DefaultData:
    """The default data set, simulated on first use; concurrent processes wait for the one that simulates."""
    directory = cache_directory(settings) / "default"
    with locked(directory):
        remove_leftovers(directory)
        return simulate_default(directory, SimulationSettings())


def open_inputs(files: PanelFiles, settings: DataConfig, progress: bool = True) -> PanelInputs:
    """Open a panel through the cache, with its populations and genetic positions.

    Without a map, positions follow 1 cM per Mb; without a sample table, all samples form one population. ``progress``
    displays a progress bar while a panel is packed. Raises :class:`UserError` for a map or sample table without a
    panel, and for faulty files.
    """
    if files.panel is None:
        if files.genetic_map is not None or files.samples is not None:
            raise UserError("--map and --samples describe a panel: name it with --panel")
        default = default_data(settings)
        files = PanelFiles(default.panel, default.genetic_map, default.samples)
    assert files.panel is not None
    panel = open_panel(files.panel, cache_directory(settings), progress)
    genetic_map = GeneticMap.read(files.genetic_map) if files.genetic_map else GeneticMap.uniform()
    return PanelInputs(panel, read_populations(files.samples, panel.samples), genetic_map.positions(panel.sites))


def windowed(
    inputs: PanelInputs, settings: DataConfig, samples: np.ndarray, manifest: str | None = None
) -> WindowedPanel:
    """Cut the panel into windows; ``samples``, panel indices int64, become the reference set.

    ``manifest`` is a file that lists the sites of an array (:func:`read_manifest`). Raises :class:`UserError` if it, or
    the file of windows, is faulty.
    """
    reference = PanelSubset(inputs.panel, inputs.populations, samples)
    typed = None if manifest is None else read_manifest(Path(manifest), inputs.panel)
    return WindowedPanel(reference, settings.windows(inputs.panel), inputs.position_cm, typed)
