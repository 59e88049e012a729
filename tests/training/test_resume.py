"""Checkpoints that are damaged, of other inputs, or resumed under other settings."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.data.panel import Populations
from embrag_ds.engine import saving
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.errors import UserError
from embrag_ds.runs.checkpoints import write_manifest
from embrag_ds.runs.stop import Stopped, StopSignals
from embrag_ds.training.trainer import Trainer
from tests.conftest import TINY

MakeConfig = Callable[..., RunConfig]
MakeTrainer = Callable[..., Trainer]
Metrics = Callable[..., list[dict[str, Any]]]
EVERY_STEP = ["embrag.train.checkpoint_every=1", "embrag.train.max_steps=3", "embrag.train.keep_checkpoints=3"]


def kept(folder: Path) -> set[str]:
    """Names in a folder of checkpoints, but those of DeepSpeed's scripts."""
    return {each.name for each in folder.iterdir() if each.suffix != ".py"}


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def finished(make_module_trainer: MakeTrainer, module_folder: Path) -> Path:
    """A run of three steps with three checkpoints."""
    make_module_trainer("finished", *EVERY_STEP).run()
    return module_folder / "finished"


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [half, flipped, emptied, Path.unlink])
@pytest.mark.parametrize("pattern", ["*model_states.pt", "*optim_states.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_taken(
    finished: Path,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    metrics_of: Metrics,
    caplog: pytest.LogCaptureFixture,
    pattern: str,
    spoil: Callable[[Path], None],
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (path,) = (folder / "step3").glob(pattern)
    spoil(path)
    trainer = make_trainer("run", *EVERY_STEP, resume=True)
    warned = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert trainer.state.step == 2
    assert warned[0].startswith(f"{folder / 'step3'}: this checkpoint is not whole (") and path.name in warned[0]
    assert warned[1] == f"{folder}: going on from the newest checkpoint that is whole, step2"
    trainer.run()
    assert kept(folder) == {"latest", "step1", "step2", "step3", "step3.damaged"}
    shutil.copytree(finished, tmp_path / "whole")
    assert losses(metrics_of("run")) == losses(metrics_of("whole"))


def test_a_resumed_run_says_from_which_step(
    finished: Path, make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    caplog.set_level("INFO", logger="embrag_ds")
    make_trainer("run", *EVERY_STEP, "embrag.train.max_steps=7", resume=True)
    assert "going on from step 3 of 7" in caplog.messages
    caplog.clear()
    make_trainer("new", *EVERY_STEP, "embrag.model.fusion=rare_variant")
    assert not [each for each in caplog.messages if "going on from" in each or "copying model" in each]
    assert [each for each in caplog.messages if each.startswith("retrieval: ")]


def test_two_damaged_ones_and_one_without_end_are_passed_over(
    finished: Path, make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step3" / "manifest.json").unlink()
    half(next((folder / "step2").glob("*optim_states.pt")))
    (folder / "step1" / "more").write_text("")
    with pytest.raises(UserError, match=r"step3: .*step2: .*step1: .*; no checkpoint is whole: start") as raised:
        make_trainer("run", *EVERY_STEP, resume=True)
    assert "\n" not in str(raised.value)
    (folder / "step1" / "more").unlink()
    assert make_trainer("run", *EVERY_STEP, resume=True).state.step == 1
    assert kept(folder) == {"latest", "step1", "step2.damaged", "step3.damaged"}


@pytest.mark.parametrize("latest", ["", "step9", "..", "a" * 5000, None])
def test_the_newest_checkpoint_is_found_whatever_latest_says(
    finished: Path, make_trainer: MakeTrainer, tmp_path: Path, latest: str | None
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "latest"
    path.unlink() if latest is None else path.write_text(latest)
    assert make_trainer("run", *EVERY_STEP, resume=True).state.step == 3


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"format": 1}', '{"format": 2}', "1e999", '{"format": 1, "files": []}']
)
def test_a_manifest_of_another_version_is_no_checkpoint(
    finished: Path, make_trainer: MakeTrainer, tmp_path: Path, content: str
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step3" / "manifest.json").write_text(content)
    assert make_trainer("run", *EVERY_STEP, resume=True).state.step == 2


def test_a_manifest_without_facts_is_refused(finished: Path, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step3" / "manifest.json"
    facts = json.loads(path.read_text())["facts"]
    for name in ("backend", "state", "layout", "identity", "config"):
        write_manifest(path.parent, {key: value for key, value in facts.items() if key != name})
        with pytest.raises(UserError, match=r"step3: written by another version of embrag_ds; start a new run folder"):
            make_trainer("run", *EVERY_STEP, resume=True)


def test_a_run_goes_on_with_another_cache_folder(finished: Path, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    other = make_trainer("run", *EVERY_STEP, f"embrag.data.cache_dir={tmp_path / 'elsewhere'}", resume=True)
    assert other.state.step == 3


def test_a_run_goes_on_in_a_folder_whose_name_is_a_pattern(
    finished: Path, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run [1]*")
    assert make_trainer("run [1]*", *EVERY_STEP, resume=True).state.step == 3


def flipped_allele(inputs: PanelInputs) -> PanelInputs:
    packed = np.array(inputs.panel.packed)
    packed[5, 0] ^= 1
    return dataclasses.replace(inputs, panel=dataclasses.replace(inputs.panel, packed=packed, recorded_sha256=None))


def other_site(inputs: PanelInputs) -> PanelInputs:
    sites = dataclasses.replace(inputs.panel.sites, ref=["T", *inputs.panel.sites.ref[1:]])
    return dataclasses.replace(inputs, panel=dataclasses.replace(inputs.panel, sites=sites))


def other_sample(inputs: PanelInputs) -> PanelInputs:
    samples = ("other", *inputs.panel.samples[1:])
    return dataclasses.replace(inputs, panel=dataclasses.replace(inputs.panel, samples=samples))


def other_map(inputs: PanelInputs) -> PanelInputs:
    return dataclasses.replace(inputs, position_cm=inputs.position_cm * 1.01)


def other_populations(inputs: PanelInputs) -> PanelInputs:
    one = Populations(("all",), np.zeros_like(inputs.populations.of))
    return dataclasses.replace(inputs, populations=one)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (flipped_allele, "the panel's alleles (--panel)"),
        (other_site, "the panel's sites (--panel)"),
        (other_sample, "the panel's samples (--panel)"),
        (other_map, "genetic positions (--map"),
        (other_populations, "the sample table (--samples)"),
    ],
)
def test_other_inputs_are_refused_by_name(
    finished: Path,
    make_config: MakeConfig,
    inputs: PanelInputs,
    distributed: DistributedContext,
    change: Callable[[PanelInputs], PanelInputs],
    named: str,
) -> None:
    with pytest.raises(UserError) as raised:
        Trainer(make_config(*EVERY_STEP), change(inputs), finished, distributed, resume=True)
    said = str(raised.value)
    assert f"trained on other inputs; what differs: {named}" in said and said.count("(--") <= 2 and "\n" not in said


@pytest.mark.parametrize(
    ("setting", "content", "named"),
    [
        ("embrag.retrieval.relatives", "{0} {1}\n", "the relatives (embrag.retrieval.relatives)"),
        ("embrag.masking.array_manifest", "{2} {3}\n", "the array's sites (embrag.masking.array_manifest)"),
        ("embrag.data.windows_file", "{2} {3} 99999999\n", "the windows (embrag.data)"),
    ],
)
def test_files_that_settings_name_are_compared_by_content(
    make_trainer: MakeTrainer, inputs: PanelInputs, tmp_path: Path, setting: str, content: str, named: str
) -> None:
    one, two = inputs.panel.samples[:2]
    sites = inputs.panel.sites
    file, moved = tmp_path / "file.txt", tmp_path / "moved.txt"
    file.write_text(content.format(one, two, sites.contigs[0], sites.pos[0]))
    make_trainer("run", f"{setting}={file}", "embrag.train.max_steps=1").run()
    file.rename(moved)
    assert make_trainer("run", f"{setting}={moved}", resume=True).state.step == 1
    moved.write_text(content.format(two, inputs.panel.samples[2], sites.contigs[0], sites.pos[1]))
    with pytest.raises(UserError, match="what differs: ") as raised:
        make_trainer("run", f"{setting}={moved}", resume=True)
    assert named in str(raised.value)


@pytest.mark.parametrize("scheduler", [[], ["scheduler=null"]], ids=["scheduled", "constant"])
def test_another_learning_rate_is_taken_at_once_and_recorded(
    make_trainer: MakeTrainer,
    metrics_of: Metrics,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    scheduler: list[str],
) -> None:
    caplog.set_level("INFO")
    make_trainer("run", *scheduler, "embrag.train.max_steps=4").run()
    before = metrics_of("run")[-1]["learning_rate"]
    settings = [*scheduler, "optimizer.params.lr=0.006", "embrag.train.max_steps=5"]
    resumed = make_trainer("run", *settings, resume=True)
    assert resumed.engine.optimizer.param_groups[0]["lr"] == pytest.approx(2 * before)
    assert "--resume: optimizer.params.lr is now 0.006 (was 0.003)" in caplog.messages
    resumed.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["kind"] == "resume"]
    assert line["changes"] == {"embrag.train.max_steps": [4, 5], "optimizer.params.lr": [0.003, 0.006]}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optimizer"]["params"]["lr"] == 0.006


def test_a_scheduler_of_torchs_keeps_its_own_settings(make_trainer: MakeTrainer) -> None:
    none = [f"scheduler.params.{name}=null" for name in TINY["scheduler"]["params"]]
    torchs = ["zero_optimization.stage=0", "scheduler.type=ExponentialLR", *none, "scheduler.params.gamma=0.9"]
    torchs.append("embrag.train.max_steps=1")
    make_trainer("run", *torchs).run()
    with pytest.raises(UserError, match=r"scheduler\.params\.gamma differs from the checkpoint's \(0\.8 for 0\.9\)"):
        make_trainer("run", *torchs, "scheduler.params.gamma=0.8", resume=True)


def test_a_step_with_another_number_of_micro_batches_is_refused_with_the_fitting_one(
    finished: Path, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(
        UserError, match=r"1 x 2 micro-batches .* has 1 x 1; set gradient_accumulation_steps to 1, or start"
    ):
        make_trainer("run", *EVERY_STEP, "gradient_accumulation_steps=2", resume=True)


def test_a_save_that_fails_leaves_the_checkpoints_before(
    finished: Path,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    more = [*EVERY_STEP[::2], "embrag.train.max_steps=5", "embrag.train.keep_checkpoints=1"]

    def full(state: object, stream: Any, **given: Any) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving.torch, "save", full)
        with pytest.raises(
            UserError, match=r"step4: rank 0 cannot write it \(No space left.*newest checkpoint is step3"
        ):
            make_trainer("run", *more, resume=True).run()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    make_trainer("run", *more, resume=True).run()
    assert kept(folder) == {"latest", "step5"}


def test_what_a_killed_save_left_is_removed(finished: Path, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step3", folder / ".tmp-step4")
    make_trainer("run", *EVERY_STEP, "embrag.train.max_steps=4", resume=True).run()
    assert kept(folder) == {"latest", "step2", "step3", "step4"}


@pytest.mark.parametrize("at", [2, 4], ids=["between", "at a validation"])
def test_a_signal_saves_before_a_validation_and_the_run_goes_on_as_if_nothing_had_been(
    make_trainer: MakeTrainer, metrics_of: Metrics, at: int, tmp_path: Path
) -> None:
    overrides = ["embrag.train.max_steps=6", "embrag.train.eval_every=2"]
    make_trainer("whole", *overrides).run()
    trainer = make_trainer("cut", *overrides)
    step = trainer.step

    def signalled(*given: Any) -> None:
        step(*given)
        if trainer.state.step == at:
            trainer.signals.received = 15

    trainer.step = signalled  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="SIGTERM"):
        trainer.run()
    assert [line["step"] for line in metrics_of("cut", "validation")] == list(range(2, at, 2))
    assert (tmp_path / "cut" / "checkpoints" / f"step{at}" / "manifest.json").exists()
    make_trainer("cut", *overrides, resume=True).run()
    assert losses(metrics_of("cut")) == losses(metrics_of("whole"))
    scores = [[line["score"] for line in metrics_of(name, "validation")] for name in ("cut", "whole")]
    assert scores[0] == scores[1] and len(scores[0]) == 3


def test_a_signal_during_a_validation_ends_it(make_trainer: MakeTrainer, metrics_of: Metrics, tmp_path: Path) -> None:
    overrides = ["embrag.train.max_steps=2", "embrag.train.eval_every=1"]
    signals = StopSignals()
    trainer = make_trainer("run", *overrides)
    trainer.signals = signals
    collate, calls = trainer._validation_collate, []

    def signalled(*given: Any) -> Any:
        calls.append(given)
        signals.received = 10
        return collate(*given)

    trainer._validation_collate = signalled  # type: ignore[assignment]
    with pytest.raises(Stopped, match="SIGUSR1"):
        trainer.run()
    assert len(calls) == 1 and metrics_of("run", "validation") == []
    assert (tmp_path / "run" / "checkpoints" / "step1" / "manifest.json").exists()


def test_checkpoints_by_the_clock(make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("embrag_ds.training.trainer.time.monotonic", lambda: now[0])
    trainer = make_trainer("run", "embrag.train.checkpoint_every=2min", "embrag.train.max_steps=7")
    step = trainer.step

    def slow(*given: Any) -> None:
        now[0] += 50
        step(*given)

    trainer.step = slow  # type: ignore[method-assign]
    saved: list[int] = []
    save = trainer.checkpoints.save
    monkeypatch.setattr(trainer.checkpoints, "save", lambda *given: (saved.append(trainer.state.step), save(*given)))
    trainer.run()
    assert saved == [3, 6, 7]
