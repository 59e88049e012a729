"""Training: resumed runs equal uninterrupted ones, logs are right, and the loss falls."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embrag_ds.config import RunConfig, load_config
from embrag_ds.data.inputs import PanelFiles, PanelInputs, open_inputs
from embrag_ds.data.sampler import QueryBatch
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.errors import UserError
from embrag_ds.export import MODEL_FILE, read_export
from embrag_ds.model.losses import imputation_loss
from embrag_ds.retrieval.batch import Batch, SiteTensors
from embrag_ds.retrieval.collate import site_tensors
from embrag_ds.training.trainer import Trainer
from tests.ranks import LAUNCHER, free_port

Metrics = Callable[..., list[dict[str, Any]]]
KeptBytes = Callable[[Callable[[], torch.Tensor]], int]
MakeTrainer = Callable[..., Trainer]
MakeConfig = Callable[..., RunConfig]
TIMES = (
    "retrieval_wait_ms",
    "time",
    "seconds",
    "total_seconds",
    "samples_per_second",
    "step_ms",
    "retrieval_wait_share",
    "flops_per_second",
    "mfu",
    "host_peak_bytes",
    "device_peak_bytes",
)
NO_DROPOUT = "embrag.model.dropout=0"
LEAN = "embrag.train.recompute_projections=true"
STRONG = "optimizer.params.lr=0.02"


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


ENCODINGS = {
    "fixed": ["embrag.retrieval.encoding=fixed"],
    "refresh": ["embrag.retrieval.encoding=refresh", 'embrag.retrieval.refresh={"every_steps": 3, "lag_steps": 0}'],
    "lagging": ["embrag.retrieval.encoding=refresh", 'embrag.retrieval.refresh={"every_steps": 3, "lag_steps": 2}'],
    "live": ["embrag.retrieval.encoding=live"],
    "token": ["embrag.retrieval.mode=token", "embrag.retrieval.token_k=2"],
}


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
    make_trainer: MakeTrainer, metrics_of: Metrics, encoding: str, cut: int
) -> None:
    overrides = [*ENCODINGS[encoding], "gradient_accumulation_steps=2", "embrag.model.dropout=0.1", STRONG]
    overrides.append("embrag.train.eval_every=4")
    make_trainer("whole", *overrides, "embrag.train.max_steps=8").run()
    make_trainer("cut", *overrides, f"embrag.train.max_steps={cut}").run()
    torch.manual_seed(99)  # another process has other random numbers
    np.random.seed(99)
    make_trainer("cut", *overrides, "embrag.train.max_steps=8", resume=True).run()

    whole = timeless(metrics_of("whole"))
    assert [line["step"] for line in whole] == list(range(1, 9))
    assert len(set(losses(whole))) == 8
    assert timeless(metrics_of("cut")) == whole
    assert timeless(metrics_of("cut", "validation"))[-1] == timeless(metrics_of("whole", "validation"))[-1]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_draws_the_same_run_and_goes_on_with_it(
    make_trainer: MakeTrainer, metrics_of: Metrics, workers: int
) -> None:
    overrides = ["gradient_accumulation_steps=2", "embrag.augmentation.typing_error=0.01", STRONG]
    drawing = f"embrag.train.workers={workers}"
    make_trainer("whole", *overrides, "embrag.train.max_steps=5").run()
    make_trainer("cut", *overrides, drawing, "embrag.train.max_steps=3").run()
    assert not active_children()
    make_trainer("cut", *overrides, drawing, "embrag.train.max_steps=5", resume=True).run()
    assert len(set(losses(metrics_of("whole")))) == 5
    assert timeless(metrics_of("cut")) == timeless(metrics_of("whole"))


def test_no_worker_is_left_when_a_run_fails(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("run", "embrag.train.workers=1")
    monkeypatch.setattr(trainer, "step", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert not active_children()


@pytest.mark.gpu
def test_workers_draw_the_same_run_on_a_gpu(make_trainer: MakeTrainer, metrics_of: Metrics) -> None:
    for name, workers in {"none": "0", "chosen": "null", "two": "2"}.items():
        make_trainer(name, NO_DROPOUT, f"embrag.train.workers={workers}", "embrag.train.max_steps=5").run()
    for name in ("chosen", "two"):
        np.testing.assert_allclose(losses(metrics_of(name)), losses(metrics_of("none")), rtol=1e-3)


@pytest.mark.parametrize("seed", [281_469_838, 2**63, 2**64 - 1])
def test_a_run_takes_every_seed_that_the_configuration_does(
    make_trainer: MakeTrainer, metrics_of: Metrics, seed: int
) -> None:
    make_trainer("run", f"embrag.seed={seed}", "embrag.train.max_steps=2").run()
    assert np.isfinite(losses(metrics_of("run"))).all()


def test_initial_weights_depend_on_all_of_the_seed(make_trainer: MakeTrainer) -> None:
    # The last layer of a residual starts at zero; the first ones are drawn.
    drawn = [
        make_trainer(f"run{number}", f"embrag.seed={seed}").engine.module.state_dict()
        for number, seed in enumerate((5, 5, 5 + 2**32))
    ]
    first, again, other = ({name: value.clone() for name, value in each.items()} for each in drawn)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert sum(not torch.equal(value, other[name]) for name, value in first.items()) > 3


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
    make_trainer: MakeTrainer, metrics_of: Metrics, tmp_path: Path
) -> None:
    make_trainer("run", "embrag.train.max_steps=2").run()
    lines, model = metrics_of("run"), (tmp_path / "run" / MODEL_FILE).read_bytes()
    make_trainer("run", "embrag.train.max_steps=2", resume=True).run()
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
def test_a_run_with_other_settings_is_not_a_continuation(make_trainer: MakeTrainer, override: str) -> None:
    make_trainer("run", "embrag.train.max_steps=1").run()
    with pytest.raises(UserError, match=r"checkpoints: .*(differs|set it to that|micro-batches a step)"):
        make_trainer("run", override, resume=True)


def test_another_network_is_not_a_continuation(make_trainer: MakeTrainer) -> None:
    make_trainer("run", "embrag.train.max_steps=1").run()
    with pytest.raises(UserError, match=r"embrag\.model\.layers differs"):
        make_trainer("run", "embrag.model.layers=2", resume=True)


def test_settings_of_the_loop_and_of_speed_may_change_on_resume(make_trainer: MakeTrainer, metrics_of: Metrics) -> None:
    make_trainer("run", "embrag.train.max_steps=1").run()
    overrides = ["embrag.train.eval_every=1", "embrag.retrieval.prefetch=0", "embrag.retrieval.device_budget_gb=1"]
    make_trainer("run", "embrag.train.max_steps=2", *overrides, resume=True).run()
    assert [line["step"] for line in metrics_of("run")] == [1, 2]


def test_without_the_kernels_a_gpu_is_refused(
    make_config: MakeConfig,
    inputs: PanelInputs,
    distributed: DistributedContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("embrag_ds.ops.cuda.import_fault", lambda: "ImportError: no CuPy")
    on_gpu = dataclasses.replace(distributed, device=torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"cuda:0: .* CuPy, .* \(ImportError: no CuPy\); install the extra 'gpu'"):
        Trainer(make_config(), inputs, tmp_path, on_gpu, False)


def test_there_must_be_something_to_resume(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        make_trainer("empty", resume=True)


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zero_3_with_every_parameter_partitioned_trains_as_stage_1(
    make_trainer: MakeTrainer, metrics_of: Metrics, root: Path, encoding: str, offloaded: bool
) -> None:
    overrides = [*ENCODINGS[encoding], STRONG]
    make_trainer("one", *overrides).run()
    zero3 = ["zero_optimization.stage=3", "zero_optimization.stage3_param_persistence_threshold=0"]
    if offloaded:
        shipped = load_config(root / "ds_configs" / "v18_zero3_offload.json").deepspeed
        keys = ("zero_optimization", "zero_force_ds_cpu_optimizer")
        zero3 = [*(f"{key}={json.dumps(shipped[key])}" for key in keys), zero3[1]]
    make_trainer("three", *overrides, *zero3).run()
    np.testing.assert_allclose(losses(metrics_of("three")), losses(metrics_of("one")), rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "generation", "age"),
    [
        (["embrag.retrieval.encoding=fixed"], lambda index: 0, lambda index: index),
        (ENCODINGS["refresh"], lambda index: index // 3, lambda index: index % 3),
        (
            ["embrag.retrieval.encoding=refresh", 'embrag.retrieval.refresh={"every_epochs": 1, "lag_steps": 0}'],
            lambda index: index // 4,
            lambda index: index % 4,
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
    size = "train_micro_batch_size_per_gpu=12"  # 54 samples: 4 groups, 5 windows
    trainer = make_trainer("run", *overrides, size, "gradient_accumulation_steps=5", "embrag.train.max_steps=9", STRONG)
    assert trainer.sampler.steps_per_epoch == 4
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
    assert [line["staleness"] for line in lines] == [age(index) for index in range(9)]
    assert [line["generation"] for line in lines] == [generation(index) for index in range(9)]
    for step, batch in seen:
        assert batch.retrieved is not None
        if batch.retrieved.codebook is None:
            continue  # live: the codebook is the model's own
        assert (batch.retrieved.generation, step - batch.retrieved.snapshot_step) == (generation(step), age(step))
        expected = codebooks[step - age(step), batch.window.number][batch.window.core, :2]
        torch.testing.assert_close(batch.retrieved.codebook, expected, rtol=0, atol=0)
    assert not torch.equal(codebooks[0, 0], codebooks[8, 0])


def window_sites(trainer: Trainer, window: int) -> SiteTensors:
    return site_tensors(trainer.sampler.data, window, trainer.distributed.device)


def test_staleness_matters_to_the_loss(make_trainer: MakeTrainer, metrics_of: Metrics) -> None:
    """Without this, the tests of the encodings above would pass on a cache that is never read."""
    for name, overrides in ENCODINGS.items():
        make_trainer(name, *overrides, STRONG, NO_DROPOUT).run()
    by_encoding = {name: losses(metrics_of(name)) for name in ENCODINGS}
    assert by_encoding["refresh"][:5] != by_encoding["lagging"][:5] == by_encoding["fixed"][:5]
    assert by_encoding["lagging"][5:] != by_encoding["fixed"][5:]
    assert by_encoding["fixed"][:3] == by_encoding["refresh"][:3]
    assert by_encoding["fixed"][3:] != by_encoding["refresh"][3:] != by_encoding["live"][3:]


@pytest.mark.parametrize("lag", [0, 2])
def test_prefetching_and_asynchronous_refreshes_change_no_loss(
    make_trainer: MakeTrainer, metrics_of: Metrics, lag: int
) -> None:
    """Both are off in the first run, with which the others are compared."""
    by_run = []
    for prefetch, asynchronous in ((0, "false"), (4, "false"), (0, "true"), (1, "true"), (4, "true")):
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


def predicted(trainer: Trainer, batch: Batch) -> Any:
    trainer.engine.eval()
    with torch.no_grad():
        return trainer.engine(batch)


def test_without_retrieval_it_trains_from_frequencies(make_trainer: MakeTrainer, metrics_of: Metrics) -> None:
    trainer = make_trainer("none", "embrag.retrieval.mode=none")
    batch = trainer.validation_batch(trainer.sampler.queries(0))
    assert batch.retrieved is None
    expected = torch.logit(batch.core.frequency, eps=1e-5)
    torch.testing.assert_close(predicted(trainer, batch).prior, expected)
    trainer.run()
    assert len(metrics_of("none")) == 6 and np.isfinite(losses(metrics_of("none"))).all()


def test_an_untrained_network_is_its_retrieval(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run")
    prediction = predicted(trainer, trainer.validation_batch(trainer.sampler.queries(0)))
    assert torch.equal(prediction.logits, prediction.prior)


@pytest.mark.parametrize(("mode", "share"), [("none", 0.85), ("embedding", 0.75)])
def test_one_micro_batch_can_be_overfitted(
    make_trainer: MakeTrainer, metrics_of: Metrics, monkeypatch: pytest.MonkeyPatch, mode: str, share: float
) -> None:
    settings = [f"embrag.retrieval.mode={mode}", "optimizer.params.lr=0.01", "embrag.train.max_steps=40"]
    trainer = make_trainer("run", *settings, NO_DROPOUT)
    queries = trainer.sampler.queries(0)
    monkeypatch.setattr(trainer.sampler, "queries", lambda micro_batch: queries)
    trainer.run()
    curve = losses(metrics_of("run"))
    assert curve[-1] < share * curve[0]


def test_training_lowers_the_loss_on_other_masks(make_trainer: MakeTrainer) -> None:
    """Distance pooling starts out far too soft, so there is something to learn in 40 steps."""
    trainer = make_trainer(
        "run", "embrag.model.fusion=rare_variant", NO_DROPOUT, "optimizer.params.lr=0.03", "embrag.train.max_steps=40"
    )

    def loss() -> float:
        total = 0.0
        for micro_batch in range(1000, 1012):
            batch = trainer.validation_batch(trainer.sampler.queries(micro_batch))
            logits = predicted(trainer, batch).logits
            frequency = batch.core.sites.frequency
            total += float(
                imputation_loss(logits, batch.core.alleles, batch.core.scored, frequency, trainer.embrag.loss).total
            )
        return total

    before = loss()
    trainer.run()
    assert loss() < 0.97 * before


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_stops_after_that_many_validations_without_a_better_score(
    make_trainer: MakeTrainer, metrics_of: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    overrides = [f"embrag.train.patience={patience}", "embrag.train.eval_every=1", "embrag.train.max_steps=20"]
    trainer = make_trainer("run", *overrides)
    planned = iter([0.1, 0.3, 0.2, 0.4, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr("embrag_ds.training.trainer.mean_r2", lambda scores: next(planned))
    trainer.run()
    # Patience 1 ends at 0.2, which is below 0.3. Patience 2 goes on to 0.4; an equal score is no better one.
    stopped = {1: 3, 2: 6}[patience]
    assert [line["step"] for line in metrics_of("run", "validation")] == list(range(1, stopped + 1))
    assert (tmp_path / "run" / "checkpoints" / f"step{stopped}").is_dir()
    # Resuming a run that has stopped changes nothing.
    make_trainer("run", *overrides, resume=True).run()
    assert len(metrics_of("run", "validation")) == stopped


def test_the_export_is_the_best_model_not_the_last(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer("run", "embrag.train.eval_every=1", "embrag.train.max_steps=3", STRONG)
    planned = iter([0.1, 0.3, 0.2])
    kept = []

    def score(scores: object) -> float:
        kept.append({name: value.clone() for name, value in trainer.engine.module.state_dict().items()})
        return next(planned)

    monkeypatch.setattr("embrag_ds.training.trainer.mean_r2", score)
    trainer.run()
    weights = read_export(tmp_path / "run" / MODEL_FILE).weights
    assert all(torch.equal(value, kept[1][name]) for name, value in weights.items())
    assert not all(torch.equal(value, kept[2][name]) for name, value in weights.items())


def test_only_the_newest_checkpoints_are_kept(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(
        "run", "embrag.train.checkpoint_every=1", "embrag.train.max_steps=11", "embrag.train.keep_checkpoints=2"
    ).run()
    found = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step*")}
    assert found == {"step10", "step11"}
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step11"


TWO_RANKS = """
import json, sys
from pathlib import Path
from embrag_ds.config import load_config
from embrag_ds.engine.distributed import start_distributed
from embrag_ds.data.inputs import PanelFiles, open_inputs
from embrag_ds.training.trainer import Trainer

config, panel, out = (Path(each) for each in sys.argv[-3:])
distributed = start_distributed()

def train(name, steps, resume, *overrides):
    run = load_config(config, [f"embrag.train.max_steps={steps}", *overrides])
    trainer = Trainer(run, open_inputs(PanelFiles(panel), run.embrag.data, False), out / name, distributed, resume)
    collate, seen, generations = trainer.collate, [], []
    def record(samples, step):
        batch = collate(samples, step)
        seen.append([samples.window, *samples.samples.tolist()])
        generations.append([step, batch.retrieved.generation])
        return batch
    trainer.collate = record
    trainer.run()
    return seen, generations

zero3 = ["zero_optimization.stage=3", "zero_optimization.stage3_param_persistence_threshold=0"]
seen, generations = train("whole", 4, False)
train("cut", 2, False)
train("cut", 4, True)
train("three", 4, False, *zero3)
(out / f"seen{distributed.rank}.json").write_text(json.dumps([seen, generations]))
distributed.close()
"""


def test_two_ranks_are_one_run(
    make_config: MakeConfig,
    metrics_of: Metrics,
    inputs: PanelInputs,
    distributed: DistributedContext,
    tmp_path: Path,
    root: Path,
) -> None:
    """Two ranks launched by ``deepspeed`` equal one rank with two micro-batches a step, and can be resumed."""
    refresh = 'embrag.retrieval.refresh={"every_steps": 1, "lag_steps": 1}'
    encoding = ["embrag.retrieval.encoding=refresh", refresh]
    config = make_config(*encoding, NO_DROPOUT, STRONG, "embrag.train.eval_every=4")
    (tmp_path / "shared.json").write_text(json.dumps(config.as_dict()))
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    script = [tmp_path / "two_ranks.py", tmp_path / "shared.json", inputs.panel.path, tmp_path]
    launched = run_deepspeed(root, "--num_accelerators", "2", *script)
    assert launched.returncode == 0, launched.stdout + launched.stderr

    recorded = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in (0, 1)]
    seen = [each for each, _ in recorded]
    # Both ranks publish generation 1 at step 2 and generation 2 at step 3, without communication.
    assert [generations for _, generations in recorded] == [[[0, 0], [1, 0], [2, 1], [3, 2]]] * 2
    micro_batches = [tuple(each) for rank in seen for each in rank]
    assert len(set(micro_batches)) == len(micro_batches) == 8
    assert any(a[0] != b[0] for a, b in zip(*seen, strict=True))

    whole = timeless(metrics_of("whole"))
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    assert timeless(metrics_of("cut")) == whole
    np.testing.assert_allclose(losses(metrics_of("three")), losses(whole), rtol=1e-4)
    versions = json.loads((tmp_path / "whole" / "versions.json").read_text())
    assert (versions["ranks"], versions["global_batch_samples"]) == (2, 12)

    # The script gives neither map nor samples.
    plain = open_inputs(PanelFiles(inputs.panel.path), config.embrag.data, progress=False)
    deepspeeds = {**config.deepspeed, "gradient_accumulation_steps": 2}
    train = dataclasses.replace(config.embrag.train, max_steps=4)
    one = RunConfig(dataclasses.replace(config.embrag, train=train), deepspeeds)
    Trainer(one, plain, tmp_path / "single", distributed, resume=False).run()
    single = timeless(metrics_of("single"))
    scores = [metrics_of(name, "validation")[-1]["score"] for name in ("whole", "single")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    for key in ("gradient_norm", "loss"):
        of_both = [[line[key] for line in lines] for lines in (whole, single)]
        np.testing.assert_allclose(*of_both, rtol=1e-3, err_msg=key)


def run_deepspeed(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Call ``deepspeed`` as a user would, on a port of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(Path(sys.executable).with_name("deepspeed")), f"--master_port={free_port()}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )


def test_a_run_may_start_from_an_exported_model(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer("first", STRONG).run()
    path = tmp_path / "first" / MODEL_FILE
    export = read_export(path)
    changed = ["embrag.seed=9", "embrag.retrieval.k=4", "embrag.model.good_turing=true"]
    second = make_trainer("second", *changed, init_from=path)
    for name, value in second.engine.module.state_dict().items():
        assert torch.equal(value, export.weights[name])
    # Generation 0 is encoded from those weights, too.
    used = second.reference.snapshot_weights(0)
    assert used is not None
    assert all(torch.equal(value, export.weights[f"embedding.{name}"]) for name, value in used.items())
    assert json.loads((tmp_path / "second" / "versions.json").read_text())["init_from"] == str(path)
    with pytest.raises(UserError, match=r"--init-from .*dims=16.*set embrag\.model"):
        make_trainer("third", "embrag.model.dims=8", init_from=path)


@pytest.mark.parametrize(("first", "second"), [("embedding", "token"), ("token", "embedding")])
def test_switching_the_mode_goes_on_from_the_others_model(
    make_trainer: MakeTrainer, metrics_of: Metrics, tmp_path: Path, first: str, second: str
) -> None:
    """The mode is one setting, in both directions; the export holds the one that it was trained in."""
    make_trainer("before", STRONG, f"embrag.retrieval.mode={first}").run()
    export = read_export(tmp_path / "before" / MODEL_FILE)
    assert export.config.retrieval.mode == first
    assert (export.snapshot is None) == (first == "token")
    trainer = make_trainer("after", f"embrag.retrieval.mode={second}", init_from=tmp_path / "before" / MODEL_FILE)
    for name, value in trainer.engine.module.state_dict().items():
        assert torch.equal(value, export.weights[name])
    trainer.run()
    assert read_export(tmp_path / "after" / MODEL_FILE).config.retrieval.mode == second
    assert len(metrics_of("after")) == 6
    assert ("generation" in metrics_of("after")[0]) == (second == "embedding")


def test_a_run_does_not_resume_in_the_other_mode(make_trainer: MakeTrainer) -> None:
    make_trainer("run", "embrag.train.max_steps=2").run()
    with pytest.raises(UserError, match=r"embrag\.retrieval\.mode differs"):
        make_trainer("run", "embrag.retrieval.mode=token", resume=True)


@pytest.mark.parametrize("mode", ["embedding", "token"])
def test_recomputed_activations_change_memory_and_nothing_else(
    make_trainer: MakeTrainer, metrics_of: Metrics, kept_bytes: KeptBytes, mode: str
) -> None:
    """This includes dropout: a block is recomputed with the random numbers that it had."""
    curves, saved = {}, {}
    one = 'activation_checkpointing={"number_checkpoints": 1}'
    ways = {"kept": [], "one": [one], "lean": [LEAN], "both": [one, LEAN], "all": ["activation_checkpointing={}"]}
    for name, settings in ways.items():
        trainer = make_trainer(name, f"embrag.retrieval.mode={mode}", "embrag.model.layers=3", STRONG, *settings)
        trainer.run()
        curves[name] = losses(metrics_of(name))
        batch = trainer.validation_batch(trainer.sampler.queries(0))
        saved[name] = kept_bytes(lambda network=trainer.engine.module, given=batch: network(given).logits)
    assert len(set(curves["kept"])) == 6
    for name in ways:
        np.testing.assert_allclose(curves[name], curves["kept"], rtol=1e-5)
    assert saved["all"] < saved["both"] < min(saved["one"], saved["lean"])
    assert max(saved["one"], saved["lean"]) < saved["kept"]


def test_recomputed_projections_gather_their_parameters(make_trainer: MakeTrainer, metrics_of: Metrics) -> None:
    """Under ZeRO-3 every parameter is partitioned when the backward pass needs a projection."""
    zero3 = ["zero_optimization.stage=3", "zero_optimization.stage3_param_persistence_threshold=0"]
    for name, settings in {"one": [], "three": zero3}.items():
        make_trainer(name, NO_DROPOUT, STRONG, LEAN, *settings).run()
    np.testing.assert_allclose(losses(metrics_of("three")), losses(metrics_of("one")), rtol=1e-4)


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits_for_it(make_trainer: MakeTrainer) -> None:
    """Only DeepSpeed's own optimiser step may synchronise; nothing of ours does."""
    trainer = make_trainer("run", "embrag.train.max_steps=12", "embrag.retrieval.encoding=refresh", "bf16.enabled=true")
    batches = trainer.batches()
    interval = trainer.new_interval(batches)
    try:
        for _ in range(4):
            trainer.step(batches, interval)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            for _ in range(4):
                trainer.step(batches, interval)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        batches.close()
        trainer.reference.close()
    ours = [f"{each.filename}:{each.lineno}" for each in caught if f"{os.sep}embrag_ds{os.sep}" in each.filename]
    assert not ours


COMPILED = "embrag.train.compile=true"


@pytest.mark.parametrize(
    "settings",
    [
        ["gradient_accumulation_steps=2", "zero_optimization.stage=2"],
        ["embrag.model.layers=2", LEAN, 'activation_checkpointing={"number_checkpoints": 1}'],
        ["embrag.retrieval.mode=token", "zero_optimization.stage=0"],
    ],
    ids=["accumulated", "recomputed", "token"],
)
def test_a_compiled_network_trains_the_same(
    make_trainer: MakeTrainer, metrics_of: Metrics, compiler: Callable[[str], None], settings: list[str]
) -> None:
    compiler("aot_eager_decomp_partition")
    # Cores of 54 and 55 sites, of which the first begins where its window does.
    settings = [NO_DROPOUT, STRONG, "embrag.train.max_steps=3", "embrag.data.window_sites=60", *settings]
    for name, given in {"eager": settings, "compiled": [*settings, COMPILED]}.items():
        make_trainer(name, *given).run()
    np.testing.assert_allclose(losses(metrics_of("compiled")), losses(metrics_of("eager")), rtol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (["zero_optimization.stage=3"], r"use zero_optimization\.stage 1 or 2"),
        (['activation_checkpointing={"cpu_checkpointing": true}'], r"activation_checkpointing\.cpu_checkpointing"),
    ],
)
def test_what_cannot_be_compiled_is_a_user_error(make_trainer: MakeTrainer, settings: list[str], remedy: str) -> None:
    with pytest.raises(UserError, match=rf"^embrag\.train\.compile: .*{remedy}"):
        make_trainer("run", COMPILED, *settings)


def test_frozen_parts_stay_and_the_others_move(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run", 'embrag.train.frozen=["pooling"]')
    before = {name: value.clone() for name, value in trainer.engine.module.state_dict().items()}
    trainer.run()
    moved = {name for name, value in trainer.engine.module.state_dict().items() if not torch.equal(value, before[name])}
    assert "head.weight" in moved and not any(name.startswith("pooling.") for name in moved)
    with pytest.raises(UserError, match=r"no part 'rates'; it has embedding, pooling, "):
        make_trainer("other", 'embrag.train.frozen=["rates"]')
