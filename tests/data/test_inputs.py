"""Inputs of a run without files: the default data set, simulated once."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embrag_ds.data import inputs, simulate
from embrag_ds.data.inputs import default_data
from embrag_ds.data.simulate import SimulationSettings
from embrag_ds.data.windows import DataConfig
from embrag_ds.files import folder_written


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


def test_what_a_killed_process_left_of_the_default_data_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "simulate_default", lambda directory, settings: directory.mkdir())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), folder_written(tmp_path / "default") as data:
        patch.setattr(shutil, "rmtree", lambda *given, **options: None)
        (data / "panel.vcf.gz").write_text("half a pan")
        raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == 1
    default_data(DataConfig(cache_dir=str(tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {"default", ".default.lock"}
