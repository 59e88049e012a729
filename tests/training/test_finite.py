"""Losses and gradients that are not finite: skipped or traced, left out, named, and never saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.engine.saving import NotFinite, first_not_finite
from embrag_ds.errors import UserError
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.losses import Losses
from embrag_ds.training.finite import Attempt
from embrag_ds.training.run import _longest_row, train_in_attempts
from embrag_ds.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
MakeTrainer = Callable[..., Trainer]
Metrics = Callable[..., list[dict[str, Any]]]
Poison = Callable[[Losses], Losses]
Attempts = Callable[..., None]
UNSKIPPED = ["zero_optimization.stage=0", "gradient_clipping=0"]
"""Without ZeRO, DeepSpeed takes a step whatever its gradients are."""
SKIPPED = {
    "1": ["zero_optimization.stage=1", "gradient_clipping=0"],
    "2": ["zero_optimization.stage=2"],
    "3": ["zero_optimization.stage=3", "zero_optimization.stage3_param_persistence_threshold=0"],
    "1, fp32 gradients": [
        "zero_optimization.stage=1",
        "bf16.enabled=true",
        'data_types={"grad_accum_dtype": "fp32"}',
    ],
}
"""ZeRO stages in which it skips a step without finite gradients."""
SHORT = ["embrag.train.max_steps=8", "embrag.train.log_every=2", "embrag.train.checkpoint_every=2"]


class _SpoiltGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, total: Tensor) -> Tensor:
        return total.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * math.nan


def loss(losses: Losses) -> Losses:
    return Losses(*(each * math.nan for each in losses))


def gradient(losses: Losses) -> Losses:
    return losses._replace(total=_SpoiltGradient.apply(losses.total))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trainer, list[int], Poison], None]:
    """Function that spoils the micro-batches with these numbers wherever they come up, for ``trainer`` and others."""

    def spoil(trainer: Trainer, numbers: list[int], how: Poison) -> None:
        targets = []
        for number in numbers:
            queries = trainer.sampler.queries(number)
            targets.append((queries.window, trainer.validation_batch(queries).core.alleles))
        real = Imputer.forward

        def forward(self: Imputer, batch: Any, *given: Any, **named: Any) -> Any:
            losses = real(self, batch, *given, **named)
            hit = any(
                window == batch.window.number and torch.equal(alleles, batch.core.alleles)
                for window, alleles in targets
            )
            return how(losses) if hit and isinstance(losses, Losses) else losses

        monkeypatch.setattr(Imputer, "forward", forward)

    return spoil


@pytest.fixture
def attempts(make_config: MakeConfig, inputs: PanelInputs, distributed: DistributedContext, tmp_path: Path) -> Attempts:
    """Function that trains a run as the command does, with as many attempts as it takes."""

    def train(name: str, *overrides: str, resume: bool = False) -> None:
        config = make_config(*overrides)

        def make(**given: Any) -> Trainer:
            return Trainer(config, inputs, tmp_path / name, distributed, **given)

        train_in_attempts(make, config, tmp_path / name, distributed, resume)

    return train


@pytest.mark.parametrize("how", [loss, gradient])
def test_a_micro_batch_that_spoils_the_weights_is_named_and_left_out(
    make_trainer: MakeTrainer,
    make_config: MakeConfig,
    inputs: PanelInputs,
    distributed: DistributedContext,
    attempts: Attempts,
    metrics_of: Metrics,
    poison: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    how: Poison,
) -> None:
    settings = [*SHORT, *UNSKIPPED]
    spared = make_config(*settings)
    Trainer(spared, inputs, tmp_path / "spared", distributed, False, attempt=Attempt(left_out=(4,))).run()
    trainer = make_trainer("other", *settings)
    queries = trainer.sampler.queries(4)
    poison(trainer, [4], how)
    attempts("run", *settings)
    assert [line["loss"] for line in metrics_of("run")] == [line["loss"] for line in metrics_of("spared")]
    warned = [each.getMessage() for each in caplog.records if each.levelname == "WARNING" and "embrag" in each.name]
    assert "every micro-batch up to there will be looked at; going on from the newest whole checkpoint" in warned[0]
    sample = inputs.panel.samples[queries.samples[0]]
    assert f"step 5: the loss or a gradient is not finite for window {queries.window} (" in warned[1]
    assert sample in warned[1] and "rank 0: left out from now on; going on from" in warned[1]
    for manifest in (tmp_path / "run" / "checkpoints").glob("step*/manifest.json"):
        assert json.loads(manifest.read_text())["facts"]["state"]["left_out"] == [4]


def test_a_run_that_is_spoilt_before_its_first_checkpoint_begins_again(
    make_trainer: MakeTrainer, attempts: Attempts, metrics_of: Metrics, poison: Callable[..., None], tmp_path: Path
) -> None:
    settings = [*UNSKIPPED, "embrag.train.max_steps=4"]
    poison(make_trainer("other", *settings), [1], loss)
    attempts("run", *settings)
    assert [line["step"] for line in metrics_of("run")] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) for line in metrics_of("run"))


@pytest.mark.parametrize("how", [loss, gradient])
@pytest.mark.parametrize("stage", SKIPPED)
def test_where_deepspeed_skips_the_step_it_is_counted_and_named(
    make_trainer: MakeTrainer,
    attempts: Attempts,
    metrics_of: Metrics,
    poison: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    stage: str,
    how: Poison,
) -> None:
    settings = [*SHORT, *SKIPPED[stage]]
    trainer = make_trainer("other", *settings)
    window = trainer.sampler.queries(4).window
    poison(trainer, [4], how)
    attempts("run", *settings)
    lines = metrics_of("run")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 0]
    assert all(math.isfinite(line["loss"]) for line in lines)
    if how is gradient:
        return
    (warning,) = [each.getMessage() for each in caplog.records if "whose loss was not finite" in each.getMessage()]
    assert "loss was not finite: 1; steps skipped: 1; the first: " in warning and f"window {window} (" in warning


def test_too_many_skipped_steps_in_a_row_end_the_run(
    make_trainer: MakeTrainer, attempts: Attempts, poison: Callable[..., None]
) -> None:
    settings = [*SHORT, "embrag.train.most_skipped_steps=2"]
    poison(make_trainer("other", *settings), [2, 3, 4], gradient)
    with pytest.raises(
        UserError, match=r"step 5: no gradient was finite for 3 steps, .*most_skipped_steps is 2; lower"
    ):
        attempts("run", *settings)


def test_weights_that_run_away_end_the_run_with_the_remedy(
    make_trainer: MakeTrainer, attempts: Attempts, poison: Callable[..., None]
) -> None:
    settings = [*SHORT, *UNSKIPPED]
    poison(make_trainer("other", *settings), [4, 5, 6, 7], gradient)
    with pytest.raises(UserError, match=r"3 micro-batches of this run were not finite, 3 of them in a row: lower the"):
        attempts("run", *settings)


def test_nothing_that_is_not_finite_is_saved(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for name, stage in ({"0": UNSKIPPED} | SKIPPED).items():
        trainer = make_trainer(name, *stage, "embrag.train.max_steps=1")
        trainer.run()
        before = sorted((tmp_path / name / "checkpoints").rglob("*"))
        trainer.state.step = 2
        for state in trainer.engine.optimizer.state.values():
            state["exp_avg"].fill_(math.inf)
        with pytest.raises(NotFinite, match="exp_avg on rank 0"):
            trainer.checkpoints.save(trainer.engine, trainer.state, trainer.reference)
        assert sorted((tmp_path / name / "checkpoints").rglob("*")) == before


def test_the_first_tensor_that_is_not_finite() -> None:
    tree = {"a": [torch.ones(2), {"b": torch.tensor([1.0, math.inf])}], "c": torch.tensor(math.nan), "d": math.nan}
    assert first_not_finite(tree) == "a.1.b"
    assert first_not_finite({"a": torch.ones(2, dtype=torch.int64), "b": (torch.full((3,), 3e38),), "c": "x"}) is None


@pytest.mark.parametrize(("numbers", "longest"), [((), 0), ((3,), 1), ((3, 5, 6, 9), 2), ((1, 2, 3), 3)])
def test_the_longest_row(numbers: tuple[int, ...], longest: int) -> None:
    assert _longest_row(numbers) == longest
