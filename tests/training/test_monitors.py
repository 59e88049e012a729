"""DeepSpeed's monitors: curves with every step once, also over a kill; missing packages and taken folders in a line."""

from __future__ import annotations

import csv
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embrag_ds.data.inputs import PanelFiles
from embrag_ds.data.simulate import DefaultData
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.errors import UserError
from embrag_ds.runs.folder import read_outcome
from embrag_ds.runs.record import read_metrics, scalars
from embrag_ds.training import run
from embrag_ds.training.monitors import PACKAGES, placed, require_packages
from embrag_ds.training.trainer import Trainer
from tests.ranks import environment_of_rank, free_port

MakeConfig = Callable[..., Any]
MakeTrainer = Callable[..., Trainer]
Curves = dict[str, list[tuple[int, float]]]
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed: pip install -e '.[dev]'"
)
TABLES = 'csv_monitor={"enabled": true}'
BOARD = 'tensorboard={"enabled": true}'
PACE = ["embrag.train.max_steps=8", "embrag.train.eval_every=2", "embrag.train.checkpoint_every=4"]


def curves_of_tables(folder: Path) -> Curves:
    """CSV files as they are: a header, and rows of step and value."""
    found: Curves = {}
    for path in folder.glob("*.csv"):
        with path.open(newline="") as stream:
            header, *rows = csv.reader(stream)
        assert header[0] == "step"
        found[path.stem] = [(int(step), float(value)) for step, value in rows]
    return found


def curves_of_board(folder: Path) -> Curves:
    """TensorBoard's files as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def expected_curves(run_dir: Path) -> Curves:
    """Curves of the numbers that hold in ``metrics.jsonl``."""
    found: Curves = {}
    for line in read_metrics(run_dir / "metrics.jsonl"):
        added = ("step", "time", "seconds", "total_seconds")
        for name, value in scalars({key: each for key, each in line.items() if key not in added}):
            found.setdefault(f"{line['kind']}/{name}", []).append((line["step"], value))
    return found


def assert_same(found: Curves, expected: Curves, rename: Callable[[str], str] = str) -> None:
    assert set(found) == {rename(name) for name in expected}
    for name, points in expected.items():
        assert [step for step, _ in found[rename(name)]] == [step for step, _ in points], name
        assert [value for _, value in found[rename(name)]] == pytest.approx([value for _, value in points], rel=1e-6)


def assert_curves(run_dir: Path, *, board: bool) -> None:
    expected = expected_curves(run_dir)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 9))
    assert [step for step, _ in expected["validation/score"]] == [2, 4, 6, 8]
    assert_same(
        curves_of_tables(run_dir / "csv_monitor"), expected, lambda name: name.replace("/", "_").replace(" ", "_")
    )
    if board:
        assert_same(curves_of_board(run_dir / "tensorboard"), expected)


KILLED = """
import os, signal, sys
from pathlib import Path
from embrag_ds.data.inputs import PanelFiles
from embrag_ds.training.run import train
from embrag_ds.training import run
from embrag_ds.training.monitors import PACKAGES, placed, require_packages
from embrag_ds.training.trainer import Trainer

real = Trainer.step
def step(self, *given):
    if self.state.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, *given)
config, panel, genetic_map, samples, run_dir, *overrides = sys.argv[1:]
files, again = PanelFiles(Path(panel), Path(genetic_map), Path(samples)), Path(run_dir).exists()
if not again:
    Trainer.step = step
train(config, files, overrides=overrides, run_dir=Path(run_dir), resume=again)
"""


@pytest.mark.long
@needs_tensorboard
@pytest.mark.parametrize("every", [4, 100])
def test_a_run_that_was_killed_and_resumed_has_every_step_once(
    make_config: MakeConfig,
    every: int,
    simulated: DefaultData,
    cache_dir: Path,
    root: Path,
    tmp_path: Path,
) -> None:
    """With a checkpoint every 100 steps it has none when it is killed, and begins again."""
    overrides = [BOARD, TABLES, *PACE, f"embrag.train.checkpoint_every={every}"]
    make_config(*overrides)  # writes tiny.json
    files = [simulated.panel, simulated.genetic_map, simulated.samples]
    given = [tmp_path / "tiny.json", *files, tmp_path / "run", f"embrag.data.cache_dir={cache_dir}", *overrides]
    environment = environment_of_rank(root, 0, 1, free_port())
    command = [sys.executable, "-c", KILLED, *map(str, given)]
    killed = subprocess.run(command, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = curves_of_tables(tmp_path / "run" / "csv_monitor")
    assert [step for step, _ in before["train_loss"]] == list(range(1, 7))
    with (tmp_path / "run" / "csv_monitor" / "train_loss.csv").open("a") as stream:
        stream.write("7,0.1")  # as a kill may leave it

    resumed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert read_outcome(tmp_path / "run")["state"] == "finished"
    assert_curves(tmp_path / "run", board=True)


def test_tables_of_a_resumed_run_have_every_step_once(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer("run", TABLES, *PACE, "embrag.train.max_steps=6").run()
    (tmp_path / "run" / "checkpoints" / "step6").rename(tmp_path / "lost")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step4")
    make_trainer("run", TABLES, *PACE, resume=True).run()
    assert_curves(tmp_path / "run", board=False)


@needs_tensorboard
def test_a_run_that_went_on_from_its_last_step_loses_none(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer("run", TABLES, BOARD, *PACE, "embrag.train.max_steps=4").run()
    make_trainer("run", TABLES, BOARD, *PACE, resume=True).run()
    assert_curves(tmp_path / "run", board=True)


def test_a_new_run_does_not_continue_the_curves_of_another(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    shared = json.dumps({"enabled": True, "output_path": str(tmp_path), "job_name": "mine"})
    make_trainer("one", f"csv_monitor={shared}", "embrag.train.max_steps=1").run()
    with pytest.raises(UserError, match=r"mine: holds the curves of another run; give csv_monitor\.job_name another"):
        make_trainer("two", f"csv_monitor={shared}")
    make_trainer("two", f"csv_monitor={shared.replace('mine', 'yours')}")


@needs_tensorboard
def test_a_new_run_does_not_continue_the_board_of_another(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    shared = json.dumps({"enabled": True, "output_path": str(tmp_path), "job_name": "mine"})
    make_trainer("one", f"tensorboard={shared}", "embrag.train.max_steps=1").run()
    with pytest.raises(UserError, match=r"mine: holds the curves of another run; give tensorboard\.job_name another"):
        make_trainer("two", f"tensorboard={shared}")


def test_a_full_disk_ends_the_curves_and_not_the_run(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer("run", TABLES, "embrag.train.max_steps=3")
    table = Path(trainer.engine.monitor.csv_monitor.log_dir) / "train_loss.csv"
    table.symlink_to("/dev/full")
    trainer.run()
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
    said = [each.message for each in caplog.records if "curves" in each.message]
    assert said == ["the monitors' curves end at step 1: cannot write them (No space left on device)"]


def test_a_folder_that_cannot_be_written_is_named(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monitor = json.dumps({"enabled": True, "output_path": str(tmp_path / "file")})
    with pytest.raises(UserError, match=r"csv_monitor\.enabled: the monitor does not start \(.*file") as caught:
        make_trainer("run", f"csv_monitor={monitor}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", PACKAGES)
def test_a_missing_package_is_said_before_anything_else(monkeypatch: pytest.MonkeyPatch, section: str) -> None:
    package, wanted = PACKAGES[section]
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else real(name, *more))
    with pytest.raises(UserError) as caught:
        require_packages({section: {"enabled": True}}, "a.json")
    assert str(caught.value) == (
        f"a.json: {section}.enabled: the package {package} is not installed; pip install '{wanted}', "
        f"or set {section}.enabled to false"
    )
    for given in (
        {},
        {section: {}},
        {section: {"enabled": False}},
        {section: None},
        {"csv_monitor": {"enabled": True}},
    ):
        require_packages(given, "a.json")


def test_a_run_with_a_missing_package_does_not_begin(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_config()  # writes tiny.json
    monkeypatch.setitem(PACKAGES, "comet", ("no_such_package", "it"))
    monkeypatch.setattr(run, "choose", lambda *given: pytest.fail("it has begun"))
    with pytest.raises(UserError, match=r"tiny\.json.*: comet\.enabled: the package no_such_package is not installed"):
        run.train(tmp_path / "tiny.json", PanelFiles(), overrides=['comet={"enabled": true}'], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_curves_lie_in_the_run_folder_unless_they_are_placed() -> None:
    settings = {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True, "job_name": "mine"}, "wandb": {}}
    assert placed(settings, Path("runs/a")) == {
        "tensorboard": {"enabled": True, "job_name": "tensorboard", "output_path": "runs/a"},
        "csv_monitor": {"enabled": True, "job_name": "mine", "output_path": "runs/a"},
        "wandb": {},
    }
    elsewhere = {"tensorboard": {"enabled": True, "output_path": "out"}, "csv_monitor": {"enabled": False}}
    assert placed(elsewhere, Path("runs/a")) == elsewhere


def test_wandb_starts_offline(
    make_trainer: MakeTrainer, distributed: DistributedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install -e '.[wandb]'")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    trainer = make_trainer("run", 'wandb={"enabled": true, "project": "tiny"}', "embrag.train.max_steps=2")
    trainer.run()
    assert wandb.run is not None and wandb.run.project == "tiny"
    # Its summary is that of the last step that is complete: the second one may still be added to.
    first, second = (line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert wandb.run.summary["train/loss"] in (pytest.approx(first), pytest.approx(second))
    wandb.finish()
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert kept.stat().st_size > 0
