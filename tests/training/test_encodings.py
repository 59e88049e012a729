"""Encodings of the reference haplotypes: what a run trains with is of the generation that its log says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embrag_ds.config import load_config
from embrag_ds.data.sampler import QueryBatch
from embrag_ds.retrieval.batch import Batch, SiteTensors
from embrag_ds.retrieval.collate import site_tensors
from embrag_ds.training.trainer import Trainer
from tests.training.runs import ENCODINGS, NO_DROPOUT, STRONG, losses, read_metrics, timeless

Metrics = Callable[..., list[dict[str, Any]]]
MakeTrainer = Callable[..., Trainer]
Trained = Callable[..., Path]


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zero_3_with_every_parameter_partitioned_trains_as_stage_1(
    trained: Trained, make_trainer: MakeTrainer, metrics_of: Metrics, root: Path, encoding: str, offloaded: bool
) -> None:
    overrides = [*ENCODINGS[encoding], STRONG]
    one = read_metrics(trained(*overrides))
    zero3 = ["zero_optimization.stage=3", "zero_optimization.stage3_param_persistence_threshold=0"]
    if offloaded:
        shipped = load_config(root / "ds_configs" / "v18_zero3_offload.json").deepspeed
        keys = ("zero_optimization", "zero_force_ds_cpu_optimizer")
        zero3 = [*(f"{key}={json.dumps(shipped[key])}" for key in keys), zero3[1]]
    make_trainer("three", *overrides, *zero3).run()
    np.testing.assert_allclose(losses(metrics_of("three")), losses(one), rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "generation", "age"),
    [
        (["embrag.retrieval.encoding=fixed"], lambda index: 0, lambda index: index),
        (ENCODINGS["refresh"], lambda index: index // 3, lambda index: index % 3),
        (
            ["embrag.retrieval.encoding=refresh", 'embrag.retrieval.refresh={"every_epochs": 1, "lag_steps": 0}'],
            lambda index: index // 5,
            lambda index: index % 5,
        ),
        (["embrag.retrieval.encoding=live"], lambda index: index, lambda index: 0),
    ],
    ids=["fixed", "every 3 steps", "every epoch", "live"],
)
def test_generation_and_staleness_are_those_of_the_batches(
    make_trainer: MakeTrainer,
    metrics_of: Metrics,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    generation: Callable[[int], int],
    age: Callable[[int], int],
) -> None:
    """Log and batch agree, and the codebook is that of the embedding layer at the snapshot's step."""
    size = "train_micro_batch_size_per_gpu=27"  # 54 samples: 2 groups, 5 windows
    trainer = make_trainer("run", *overrides, size, "gradient_accumulation_steps=2", "embrag.train.max_steps=7", STRONG)
    assert trainer.sampler.steps_per_epoch == 5
    collate, step = trainer.collate, trainer.step
    seen: list[tuple[int, Batch]] = []
    codebooks: dict[tuple[int, int], torch.Tensor] = {}

    def record(samples: QueryBatch, step: int) -> Batch:
        batch = collate(samples, step)
        seen.append((step, batch))
        return batch

    def note(*given: Any) -> None:
        with torch.no_grad():
            for window in range(len(trainer.sampler.data)):
                codebook = trainer.engine.module.embedding.codebook(window_sites(trainer, window))
                codebooks[trainer.state.step, window] = codebook
        step(*given)

    monkeypatch.setattr(trainer, "collate", record)
    monkeypatch.setattr(trainer, "step", note)
    monkeypatch.setattr(trainer, "_validate_if_due", lambda: None)
    trainer.run()
    lines = metrics_of("run")
    assert [line["staleness"] for line in lines] == [age(index) for index in range(7)]
    assert [line["generation"] for line in lines] == [generation(index) for index in range(7)]
    for step, batch in seen:
        assert batch.retrieved is not None
        if batch.retrieved.codebook is None:
            continue  # live: the codebook is the model's own
        assert (batch.retrieved.generation, step - batch.retrieved.snapshot_step) == (generation(step), age(step))
        expected = codebooks[step - age(step), batch.window.number][batch.window.core, :2]
        torch.testing.assert_close(batch.retrieved.codebook, expected, rtol=0, atol=0)
    assert not torch.equal(codebooks[0, 0], codebooks[6, 0])


def window_sites(trainer: Trainer, window: int) -> SiteTensors:
    return site_tensors(trainer.sampler.data, window, trainer.distributed.device)


def test_staleness_matters_to_the_loss(trained: Trained) -> None:
    """Without this, the tests of the encodings above would pass on a cache that is never read."""
    by_encoding = {name: losses(read_metrics(trained(*ENCODINGS[name], STRONG))) for name in ENCODINGS}
    assert by_encoding["refresh"][:5] != by_encoding["lagging"][:5] == by_encoding["fixed"][:5]
    assert by_encoding["lagging"][5:] != by_encoding["fixed"][5:]
    assert by_encoding["fixed"][:3] == by_encoding["refresh"][:3]
    assert by_encoding["fixed"][3:] != by_encoding["refresh"][3:] != by_encoding["live"][3:]


@pytest.mark.parametrize(
    ("lag", "others"), [(0, [(4, "false"), (1, "true")]), (2, [(4, "false"), (0, "true"), (4, "true")])], ids=str
)
def test_prefetching_and_asynchronous_refreshes_change_no_loss(
    make_trainer: MakeTrainer, metrics_of: Metrics, lag: int, others: list[tuple[int, str]]
) -> None:
    """Both are off in the first run, with which the others are compared."""
    by_run = []
    for prefetch, asynchronous in ((0, "false"), *others):
        name = f"{prefetch}-{asynchronous}"
        refresh = f'{{"every_steps": 1, "lag_steps": {lag}, "asynchronous": {asynchronous}}}'
        overrides = [f"embrag.retrieval.refresh={refresh}", f"embrag.retrieval.prefetch={prefetch}"]
        accumulation = "gradient_accumulation_steps=2"
        make_trainer(name, "embrag.retrieval.encoding=refresh", *overrides, accumulation, STRONG).run()
        by_run.append(timeless(metrics_of(name)))
    assert len(set(losses(by_run[0]))) == len(by_run[0]) == 6
    assert all(each == by_run[0] for each in by_run)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_refresh_that_dies_ends_training_within_a_step(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    refresh = 'embrag.retrieval.refresh={"every_steps": 3, "lag_steps": 3}'
    trainer = make_trainer("run", "embrag.retrieval.encoding=refresh", refresh, f"embrag.retrieval.prefetch={prefetch}")
    cache = trainer.reference.cache
    assert cache is not None
    cache.code(0, 0)
    died = threading.Event()

    def dies(*given: Any) -> None:
        died.set()
        raise MemoryError("no room for the codebooks")

    monkeypatch.setattr(cache, "_encode", dies)
    step = trainer.step

    def waits(*given: Any) -> None:
        step(*given)
        assert trainer.state.step < 4 or died.wait(10)

    monkeypatch.setattr(trainer, "step", waits)
    with pytest.raises(MemoryError, match="no room for the codebooks"):
        trainer.run()
    assert trainer.state.step in (3, 4)
    assert not [each.name for each in threading.enumerate() if each.name.startswith(("retrieval", "reference"))]


def test_the_log_has_the_cost_of_retrieval(make_trainer: MakeTrainer, metrics_of: Metrics) -> None:
    refresh = 'embrag.retrieval.refresh={"every_steps": 1, "lag_steps": 2}'
    make_trainer("run", "embrag.retrieval.encoding=refresh", refresh).run()
    lines = metrics_of("run")
    # Snapshots before steps 0, 1, 3 and 5; those due at 2 and 4 were skipped.
    assert [line["generation"] for line in lines] == [0, 0, 0, 1, 1, 2]
    assert [line["staleness"] for line in lines] == [0, 1, 2, 2, 3, 2]
    assert [line["refreshes_skipped"] for line in lines] == [0, 0, 1, 1, 2, 2]
    for line in lines:
        assert 0 <= line["retrieval_wait_share"] <= 1 and line["retrieval_wait_ms"] <= line["step_ms"]
        assert line["bytes_moved"] > 1000


def test_the_dense_store_trains_as_the_factored_one(make_trainer: MakeTrainer, metrics_of: Metrics) -> None:
    """Both find the same neighbours and embeddings: by FAISS over [H, L x D] rows, and by weighted alleles."""
    all_haplotypes = "embrag.retrieval.k=106"  # all that every sample may retrieve: ties change nothing
    for store in ("factored", "dense"):
        overrides = [*ENCODINGS["refresh"], all_haplotypes, NO_DROPOUT, STRONG, f"embrag.retrieval.store={store}"]
        trainer = make_trainer(store, *overrides)
        retrieved = trainer.validation_batch(trainer.sampler.queries(0)).retrieved
        assert retrieved is not None and (retrieved.embeddings is None) == (store == "factored")
        trainer.run()
    np.testing.assert_allclose(losses(metrics_of("dense")), losses(metrics_of("factored")), rtol=1e-3)
