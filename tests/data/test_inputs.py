"""Inputs of a run: the default data set, simulated once, and what stands in for a map."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embrag_ds.cli.main import make_parser
from embrag_ds.data import inputs, simulate
from embrag_ds.data.inputs import PanelFiles, PanelInputs, default_data, open_inputs
from embrag_ds.data.simulate import DefaultData, SimulationSettings
from embrag_ds.data.windows import DataConfig
from embrag_ds.errors import UserError
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


@pytest.mark.parametrize("name", ["panel.vcf.gz", "truth.vcf.gz.tbi", "genetic.map", "samples.tsv", "settings.json"])
@pytest.mark.parametrize("empty", [False, True])
def test_default_data_with_a_file_missing_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, empty: bool
) -> None:
    small = SimulationSettings(length_bp=20_000, panel_samples=10, target_samples=3, typed_spacing_bp=5_000)
    monkeypatch.setattr(inputs, "SimulationSettings", lambda: small)
    settings = DataConfig(cache_dir=str(tmp_path / "cache"))
    folder = default_data(settings).panel.parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / name).unlink()
    if empty:
        (folder / name).touch()
    if name == "settings.json" and not empty:  # without which the folder might be anyone's
        with pytest.raises(UserError, match="which is not simulated data"):
            default_data(settings)
        return
    default_data(settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"genetic_map": Path("m")}, "describe a panel: name it with --panel"),
        ({"samples": Path("m")}, "describe a panel: name it with --panel"),
        ({"cm_per_mb": 1.0}, "describe a panel: name it with --panel"),
        ({"effective_size": 1000.0}, "describe a panel: name it with --panel"),
        ({"panel": Path("p"), "genetic_map": Path("m"), "cm_per_mb": 1.0}, "leave it out, or --map m"),
        ({"panel": Path("p"), "cm_per_mb": 0.0}, "--cm-per-mb 0: give a number from 0.001 to 1000"),
        ({"panel": Path("p"), "cm_per_mb": 1e4}, "--cm-per-mb 10000: give a number from 0.001 to 1000"),
        ({"panel": Path("p"), "cm_per_mb": float("nan")}, "--cm-per-mb nan: give a number"),
        ({"panel": Path("p"), "effective_size": -1.0}, "--effective-size -1: give a number from 10 to 1e+07"),
        ({"panel": Path("p"), "effective_size": float("inf")}, "--effective-size inf: give a number"),
    ],
)
def test_what_describes_a_panel_is_checked_before_any_work(given: dict[str, Path | float], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        PanelFiles(**given)  # type: ignore[arg-type]
    assert expected in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("with_map", "cm_per_mb", "size", "factor"),
    [
        (True, None, 20_000.0, 2.0),
        (True, None, 10_000.0, 1.0),
        (False, None, None, 1.0),
        (False, 3.0, None, 3.0),
        (False, 3.0, 1_000.0, 0.3),
    ],
)
def test_positions_follow_the_rate_and_the_effective_size(
    simulated: DefaultData,
    cache_dir: Path,
    inputs: PanelInputs,
    with_map: bool,
    cm_per_mb: float | None,
    size: float | None,
    factor: float,
) -> None:
    genetic_map = simulated.genetic_map if with_map else None
    files = PanelFiles(simulated.panel, genetic_map, cm_per_mb=cm_per_mb, effective_size=size)
    found = open_inputs(files, DataConfig(cache_dir=str(cache_dir)), progress=False).position_cm
    base = inputs.position_cm if with_map else inputs.panel.sites.pos * 1e-6
    np.testing.assert_allclose(found, base * factor, rtol=1e-12)


@pytest.mark.parametrize("progress", [True, False])
def test_doubts_about_the_map_are_logged_once(
    simulated: DefaultData, cache_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, progress: bool
) -> None:
    """Rank 0 opens the inputs with a progress bar, and then every rank without one."""
    path = tmp_path / "map"
    path.write_text("1 . 0 1000\n1 . 0.05 50000\n")
    with caplog.at_level(logging.WARNING, logger="embrag_ds"):
        open_inputs(PanelFiles(simulated.panel, path), DataConfig(cache_dir=str(cache_dir)), progress=progress)
    assert len(caplog.messages) == progress
    assert all("panel sites lie outside it" in text for text in caplog.messages)


def test_a_faulty_map_is_found_before_the_panel_is_packed(simulated: DefaultData, tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_text("1 . 1000 0.001\n1 . 6000 0.006\n")
    with pytest.raises(UserError, match="is no whole number"):
        open_inputs(PanelFiles(simulated.panel, path), DataConfig(cache_dir=str(tmp_path / "cache")), progress=False)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("command", ["impute", "train"])
def test_both_commands_hand_on_what_stands_in_for_a_map(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if command == "train":
        pytest.importorskip("deepspeed")
    words = {"impute": ["--target", "t", "--out", "o"], "train": ["--deepspeed_config", "v18"]}[command]
    given: list[Any] = []
    room = {"impute": "imputation.impute", "train": "training.run"}[command]
    monkeypatch.setattr(f"embrag_ds.{room}.{command}", lambda *arguments, **options: given.extend(arguments))
    options = make_parser().parse_args([command, "--panel", "p", "--cm-per-mb", "2", "--effective-size", "500", *words])
    options.run(options)
    panels = given[0] if command == "impute" else given  # which takes several
    (files,) = [each for each in panels if isinstance(each, PanelFiles)]
    assert files == PanelFiles(Path("p"), cm_per_mb=2.0, effective_size=500.0)
