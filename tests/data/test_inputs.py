"""Inputs of a run without files: the default data set, simulated once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embrag_ds.data import inputs, simulate
from embrag_ds.data.inputs import default_data
from embrag_ds.data.simulate import SimulationSettings
from embrag_ds.data.windows import DataConfig


def test_runs_that_start_at_once_make_the_default_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for processes: each opens the lock file by itself, so file locks exclude them as well."""
    small = SimulationSettings(length_bp=50_000, panel_samples=10, target_samples=3, typed_spacing_bp=5_000)
    monkeypatch.setattr(inputs, "SimulationSettings", lambda: small)
    built: list[Path] = []
    build = simulate._build

    def counted(directory: Path, settings: SimulationSettings) -> None:
        built.append(directory)
        build(directory, settings)

    monkeypatch.setattr(simulate, "_build", counted)
    with ThreadPoolExecutor(4) as starts:
        made = list(starts.map(default_data, [DataConfig(cache_dir=str(tmp_path / "cache"))] * 4))
    assert len(built) == 1 and made == [made[0]] * 4
    assert made[0].panel.is_file() and made[0].panel.parent.parent == tmp_path / "cache"
