"""What a run reads: panel, map and samples named by the user, or the embedded default data set."""

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


@dataclass(frozen=True)
class PanelFiles:
    """Paths of a panel and what goes with it; no panel means the embedded default."""

    panel: Path | None = None
    genetic_map: Path | None = None
    samples: Path | None = None


@dataclass(frozen=True)
class PanelInputs:
    """An opened panel, its populations and the position of every site in cM, float64 [S]."""

    panel: Panel
    populations: Populations
    position_cm: np.ndarray


def cache_directory(settings: DataConfig) -> Path:
    """Where packed panels and the default data set are kept."""
    return Path(settings.cache_dir) if settings.cache_dir else default_cache_dir()


def default_data(settings: DataConfig) -> DefaultData:
    """The embedded default data set, simulated on first use, by one of those who ask at once."""
    directory = cache_directory(settings) / "default"
    with locked(directory):
        return simulate_default(directory, SimulationSettings())


def open_inputs(files: PanelFiles, settings: DataConfig, progress: bool = True) -> PanelInputs:
    """Open the panel through its cache; without a map positions are 1 cM per Mb."""
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
    """The panel's windows with ``samples`` as the reference set."""
    reference = PanelSubset(inputs.panel, inputs.populations, samples)
    typed = None if manifest is None else read_manifest(Path(manifest), inputs.panel)
    return WindowedPanel(reference, settings.windows(inputs.panel), inputs.position_cm, typed)
