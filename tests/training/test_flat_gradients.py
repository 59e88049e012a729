"""Gradients handled as one tensor: the same weights, norm and skipped steps as parameter by parameter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from embrag_ds.config import load_config
from embrag_ds.engine import distributed
from embrag_ds.engine.flat_gradients import FlatGradients
from embrag_ds.engine.masters import gathered_state
from embrag_ds.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]
Metrics = Callable[..., list[dict[str, Any]]]
IN_FP32 = ["bf16.enabled=true", "data_types.grad_accum_dtype=fp32", "optimizer.params.lr=0.02"]
NO_CLIPPING, CLIPPED = "gradient_clipping=0.0", "gradient_clipping=0.001"


@pytest.fixture(autouse=True)
def _bf16_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "cpu_has_bf16", lambda: True)


@pytest.fixture
def both_ways(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict]]:
    """Function that trains with some settings by DeepSpeed's own optimiser and by ours; returns both final weights."""

    def train(*settings: str) -> list[dict]:
        found = []
        for name, kind in {"theirs": BF16_Optimizer, "ours": FlatGradients}.items():
            with monkeypatch.context() as patch:
                if kind is BF16_Optimizer:
                    patch.setattr(distributed, "handle_gradients_as_a_whole", lambda optimizer: None)
                trainer = make_trainer(name, *IN_FP32, *settings)
            assert type(trainer.engine.optimizer) is kind
            trainer.run()
            found.append(gathered_state(trainer.engine))
        return found

    return train


@pytest.mark.parametrize(
    ("at_once", "accumulation", "mode"),
    [
        ("", 1, "embedding"),
        ("", 3, "none"),  # without retrieval some parameters have no gradient
        ("bf16.immediate_grad_update=true", 3, "embedding"),
    ],
)
def test_without_clipping_weights_are_the_same(
    both_ways: Callable[..., list[dict]], mode: str, accumulation: int, at_once: str
) -> None:
    settings = [f"embrag.retrieval.mode={mode}", f"gradient_accumulation_steps={accumulation}", NO_CLIPPING]
    theirs, ours = both_ways(*settings, *filter(None, [at_once]))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_clipping_and_the_norm_differ_by_rounding_only(
    both_ways: Callable[..., list[dict]], metrics_of: Metrics
) -> None:
    both_ways(CLIPPED)
    for key in ("loss", "gradient_norm"):
        theirs, ours = ([line[key] for line in metrics_of(name)] for name in ("theirs", "ours"))
        assert ours == pytest.approx(theirs, rel=1e-5) and all(map(math.isfinite, ours))
    assert min(line["gradient_norm"] for line in metrics_of("ours")) > 0.001


def test_a_step_without_a_finite_gradient_is_skipped(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run", *IN_FP32, "embrag.train.max_steps=12")
    batches = trainer.batches()
    interval = trainer.new_interval(batches)
    head = trainer.engine.module.head.weight
    for _ in range(4):
        trainer.step(batches, interval)
    before = gathered_state(trainer.engine)
    hook = head.register_hook(lambda gradient: gradient * math.nan)
    trainer.step(batches, interval)
    hook.remove()
    after = gathered_state(trainer.engine)
    assert trainer.engine.skipped_steps == 1 and all(torch.equal(after[name], before[name]) for name in before)
    trainer.step(batches, interval)
    batches.close()
    trainer.reference.close()
    after = gathered_state(trainer.engine)
    assert trainer.engine.skipped_steps == 1 and not torch.equal(after["head.weight"], before["head.weight"])
    assert all(value.isfinite().all() for value in after.values())


def test_the_large_batch_adds_up_in_fp32(
    make_trainer: MakeTrainer, metrics_of: Metrics, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """Of 64 equal micro-batches each has a 64th of the gradient, exactly; bf16 sums of them would be rounded."""
    shipped = load_config(root / "ds_configs" / "v18_large_batch.json").deepspeed
    settings = [f"{key}={json.dumps(shipped[key])}" for key in ("zero_optimization", "data_types", "bf16")]
    settings += ["train_micro_batch_size_per_gpu=1", "embrag.retrieval.mode=none", "embrag.model.dims=8"]
    count = shipped["gradient_accumulation_steps"]
    norms = {}
    for name, micro_batches, more in (("one", 1, []), ("many", count, []), ("in bf16", count, ["data_types=null"])):
        settings_of_run = [*settings, *more, f"gradient_accumulation_steps={micro_batches}", "embrag.model.dropout=0"]
        trainer = make_trainer(name, *settings_of_run, "embrag.train.max_steps=1")
        queries = trainer.sampler.queries(0)
        monkeypatch.setattr(trainer.sampler, "queries", lambda micro_batch, queries=queries: queries)
        trainer.run()
        norms[name] = metrics_of(name)[0]["gradient_norm"]
    assert norms["many"] == pytest.approx(norms["one"], rel=1e-6)
    assert norms["in bf16"] != pytest.approx(norms["one"], rel=1e-4)
