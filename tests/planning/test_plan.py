"""What a run would do and take: the plan's numbers are those of the run, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from embrag_ds.config import RunConfig
from embrag_ds.config_files import shipped_configurations
from embrag_ds.data.inputs import PanelFiles, PanelInputs
from embrag_ds.data.simulate import DefaultData
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.errors import UserError
from embrag_ds.model.imputer import Imputer
from embrag_ds.planning.first_batches import batch_bytes, build_first, planned
from embrag_ds.planning.memory import cache_bytes, states
from embrag_ds.planning.plan import estimate, plan
from embrag_ds.planning.trace import Allocations, parameter_count, tensors_of, trace_step
from embrag_ds.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
SHAPE = "embrag.model.dims=64", "embrag.model.layers=3"


def first_of(config: RunConfig, inputs: PanelInputs) -> Any:
    run = planned(config.embrag, inputs, config.deepspeed["train_micro_batch_size_per_gpu"], 0, 1, 1)
    return run, build_first(config.embrag, inputs, run)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train_micro_batch_size_per_gpu=12",),
        ("embrag.train.recompute_projections=true",),
        ("embrag.model.fusion=rare_variant",),
        ("embrag.retrieval.mode=token",),
        ("embrag.retrieval.mode=none",),
        ("embrag.retrieval.encoding=live",),
        ('embrag.masking.policies={"array": 1.0}', "embrag.masking.scope=window"),
    ],
    ids=lambda overrides: ",".join(overrides) or "plain",
)
def test_fake_tensors_take_what_real_ones_do(
    make_config: MakeConfig, inputs: PanelInputs, overrides: tuple[str, ...]
) -> None:
    config = make_config(*SHAPE, "embrag.retrieval.encoding=fixed", *overrides)
    _, first = first_of(config, inputs)
    traced = trace_step(config.embrag, config.deepspeed, first.largest, on_gpu=False)
    model, batch = Imputer(config.embrag.model), first.largest
    model.transformer.recompute_projections = config.embrag.train.recompute_projections
    if batch.retrieved is not None and config.embrag.retrieval.mode == "embedding":
        sites = batch.core.tokens.shape[1]
        codebook = None if config.embrag.retrieval.encoding == "live" else torch.zeros(sites, 2, 64)
        batch = replace(batch, retrieved=replace(batch.retrieved, codebook=codebook))
    followed = Allocations([*model.parameters(), *tensors_of(batch)])
    with followed:
        losses = model(batch, loss=config.embrag.loss)
        kept = followed.in_use
        losses.total.backward()
    real = followed.traced(kept)
    # Of the numba loops' arrays, only fake ones are followed.
    assert traced.kept == pytest.approx(real.kept, rel=0.06) and traced.peak == pytest.approx(real.peak, rel=0.06)
    assert real.peak > real.kept > 0


def test_the_plan_is_the_runs(
    make_config: MakeConfig, inputs: PanelInputs, distributed: DistributedContext, tmp_path: Path
) -> None:
    refresh = "embrag.retrieval.encoding=refresh"
    config = make_config(refresh, 'embrag.retrieval.refresh={"every_steps": 3}', "gradient_accumulation_steps=2")
    trainer = Trainer(config, inputs, tmp_path / "run", distributed, False)
    run, memory = estimate(config, inputs, 1, 0)
    assert run.sampler.steps_per_epoch == trainer.sampler.steps_per_epoch
    assert parameter_count(config.embrag) == sum(each.numel() for each in trainer.engine.module.parameters())
    assert trainer.reference.cache is not None
    assert cache_bytes(config.embrag, run.data, 4) == trainer.reference.cache.host_bytes
    trainer.reference.close()
    assert {each.place for each in memory.gpu} == {"host", "device"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages_divide_the_optimiser_among_ranks(make_config: MakeConfig, stage: int) -> None:
    config = make_config(f"zero_optimization.stage={stage}")
    one, four = (states(config.embrag, config.deepspeed, ranks, on_gpu=False) for ranks in (1, 4))
    count = parameter_count(config.embrag)
    assert one["optimiser"] == 8 * count
    assert four["optimiser"] == (8 * count if stage == 0 else 8 * -(-count // 4))
    assert (one["master weights"] > 0) == (stage > 0)


def test_a_batch_counts_what_it_keeps(make_config: MakeConfig, inputs: PanelInputs) -> None:
    config = make_config()
    _, first = first_of(config, inputs)
    mismatch = first.largest.retrieved.mismatch.nbytes
    assert mismatch < batch_bytes(first.largest) == max(first.each)
    assert first.in_flight(2) <= 4 * max(first.each) and first.in_flight(0) == max(first.each)


def test_a_dry_run_says_all_and_writes_nothing(
    simulated: DefaultData, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = PanelFiles(simulated.panel, simulated.genetic_map, simulated.samples)
    lines = plan("v18_large_batch", files, overrides=[f"embrag.data.cache_dir={cache_dir}"], run_dir=Path("mine"))
    text = "\n".join(lines)
    assert "54 samples a micro-batch x 64 micro-batches x 1 ranks = 3456 samples a step" in text
    assert "54 samples to train on, 6 held out" in text and f"{simulated.panel} (--panel)" in text
    assert "writes in mine: config.json" in text and "MiB each, 2 kept" in text
    assert "activations, forward and backward" in text and "estimated, not measured" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_the_run_would(simulated: DefaultData, tmp_path: Path) -> None:
    files = PanelFiles(simulated.panel, simulated.genetic_map, simulated.samples)
    quickstart = shipped_configurations()["quickstart"]
    with pytest.raises(UserError, match=r"optimizer\.params\.lr must be"):
        plan(quickstart, files, overrides=["optimizer.params.lr=abc"])
    with pytest.raises(UserError, match="give one of them"):
        plan(quickstart, files, resume=True, init_from=tmp_path / "model")
    with pytest.raises(UserError, match="no-such"):
        plan(quickstart, PanelFiles(tmp_path / "no-such.vcf"), run_dir=tmp_path / "run")
