"""Resumed runs equal uninterrupted ones, and what is no continuation is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embrag_ds.errors import UserError
from embrag_ds.export import MODEL_FILE
from embrag_ds.training.trainer import Trainer
from tests.training.runs import ENCODINGS, NO_DROPOUT, STRONG, losses, read_metrics, timeless

Metrics = Callable[..., list[dict[str, Any]]]
MakeTrainer = Callable[..., Trainer]
Trained = Callable[..., Path]
ONE_STEP = ("embrag.train.max_steps=1",)


@pytest.mark.parametrize(
    ("encoding", "cut"),
    # Snapshots are taken before steps 3 and 6. The cut lies between two of them, or at one. With "lagging" it lies
    # between snapshot and publication, at publication, and at the next snapshot.
    [
        ("fixed", 4),
        ("refresh", 4),
        ("refresh", 6),
        ("live", 4),
        ("token", 4),
        ("lagging", 4),
        ("lagging", 5),
        ("lagging", 6),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    trained: Trained, make_trainer: MakeTrainer, metrics_of: Metrics, tmp_path: Path, encoding: str, cut: int
) -> None:
    overrides = [*ENCODINGS[encoding], "gradient_accumulation_steps=2", "embrag.model.dropout=0.1", STRONG]
    overrides += ["embrag.train.eval_every=4", "embrag.train.max_steps=8"]
    saves = {"refresh": 2, "lagging": 1}.get(encoding, 4)  # a checkpoint at each of its cuts
    overrides += [f"embrag.train.checkpoint_every={saves}", "embrag.train.keep_checkpoints=8"]
    uninterrupted = trained(*overrides)
    shutil.copytree(uninterrupted, tmp_path / "cut")
    for step in range(cut + saves, 9, saves):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step{step}")
    torch.manual_seed(99)  # another process has other random numbers
    np.random.seed(99)
    trainer = make_trainer("cut", *overrides, resume=True)
    assert trainer.state.step == cut
    trainer.run()

    whole = timeless(read_metrics(uninterrupted))
    assert [line["step"] for line in whole] == list(range(1, 9))
    assert len(set(losses(whole))) == 8
    assert timeless(metrics_of("cut")) == whole
    validations = timeless(metrics_of("cut", "validation")), timeless(read_metrics(uninterrupted, "validation"))
    assert validations[0][-1] == validations[1][-1] and validations[0][-1]["step"] == 8


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_draws_the_same_run_and_goes_on_with_it(
    trained: Trained, make_trainer: MakeTrainer, metrics_of: Metrics, workers: int
) -> None:
    overrides = ["gradient_accumulation_steps=2", "embrag.augmentation.typing_error=0.01", STRONG]
    drawing = f"embrag.train.workers={workers}"
    whole = read_metrics(trained(*overrides, "embrag.train.max_steps=5"))
    make_trainer("cut", *overrides, drawing, "embrag.train.max_steps=3").run()
    assert not active_children()
    make_trainer("cut", *overrides, drawing, "embrag.train.max_steps=5", resume=True).run()
    assert len(set(losses(whole))) == 5
    assert timeless(metrics_of("cut")) == timeless(whole)


@pytest.mark.gpu
def test_workers_draw_the_same_run_on_a_gpu(make_trainer: MakeTrainer, metrics_of: Metrics) -> None:
    for name, workers in {"none": "0", "chosen": "null", "two": "2"}.items():
        make_trainer(name, NO_DROPOUT, f"embrag.train.workers={workers}", "embrag.train.max_steps=5").run()
    for name in ("chosen", "two"):
        np.testing.assert_allclose(losses(metrics_of(name)), losses(metrics_of("none")), rtol=1e-3)


def test_a_run_killed_between_checkpoints_logs_every_step_once(
    make_trainer: MakeTrainer, metrics_of: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["embrag.train.checkpoint_every=2", "embrag.train.max_steps=6"]
    make_trainer("whole", *overrides).run()
    trainer = make_trainer("killed", *overrides)
    step = trainer.step

    def dies(*given: Any) -> None:
        if trainer.state.step == 5:
            raise KeyboardInterrupt
        step(*given)

    monkeypatch.setattr(trainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    make_trainer("killed", *overrides, resume=True).run()
    assert timeless(metrics_of("killed")) == timeless(metrics_of("whole"))


def test_resuming_a_finished_run_changes_nothing(
    trained: Trained, make_trainer: MakeTrainer, metrics_of: Metrics, tmp_path: Path
) -> None:
    shutil.copytree(trained(*ONE_STEP), tmp_path / "run")
    lines, model = metrics_of("run"), (tmp_path / "run" / MODEL_FILE).read_bytes()
    make_trainer("run", *ONE_STEP, resume=True).run()
    assert metrics_of("run") == lines and (tmp_path / "run" / MODEL_FILE).read_bytes() == model


@pytest.mark.parametrize(
    "override",
    [
        "embrag.seed=6",
        "embrag.data.window_sites=60",
        "embrag.masking.scope=window",
        "embrag.retrieval.k=8",
        "embrag.loss.genotype_weight=0",
        "embrag.augmentation.typing_error=0.01",
        "embrag.validation.samples=3",
        'embrag.train.frozen=["embedding"]',
        "optimizer.type=Adam",
        "optimizer.params.weight_decay=0.5",
        "scheduler.type=WarmupLR",
        "train_micro_batch_size_per_gpu=3",
        "gradient_accumulation_steps=2",
    ],
)
def test_a_run_with_other_settings_is_not_a_continuation(
    trained: Trained, make_trainer: MakeTrainer, tmp_path: Path, override: str
) -> None:
    shutil.copytree(trained(*ONE_STEP), tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoints: .*(differs|set it to that|micro-batches a step)"):
        make_trainer("run", override, resume=True)


def test_another_network_is_not_a_continuation(trained: Trained, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    shutil.copytree(trained(*ONE_STEP), tmp_path / "run")
    with pytest.raises(UserError, match=r"embrag\.model\.layers differs"):
        make_trainer("run", "embrag.model.layers=2", resume=True)


def test_settings_of_the_loop_and_of_speed_may_change_on_resume(
    trained: Trained, make_trainer: MakeTrainer, metrics_of: Metrics, tmp_path: Path
) -> None:
    shutil.copytree(trained(*ONE_STEP), tmp_path / "run")
    overrides = ["embrag.train.eval_every=1", "embrag.retrieval.prefetch=0", "embrag.retrieval.device_budget_gb=1"]
    make_trainer("run", "embrag.train.max_steps=2", *overrides, resume=True).run()
    assert [line["step"] for line in metrics_of("run")] == [1, 2]


def test_there_must_be_something_to_resume(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        make_trainer("empty", resume=True)


def test_a_run_does_not_resume_in_the_other_mode(trained: Trained, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    shutil.copytree(trained(*ONE_STEP), tmp_path / "run")
    with pytest.raises(UserError, match=r"embrag\.retrieval\.mode differs"):
        make_trainer("run", "embrag.retrieval.mode=token", resume=True)
