"""Training: the loss falls, the best model is exported, and memory is saved without another result."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.errors import UserError
from embrag_ds.export import MODEL_FILE, read_export
from embrag_ds.model.losses import imputation_loss
from embrag_ds.retrieval.batch import Batch
from embrag_ds.training.trainer import Trainer
from tests.training.runs import NO_DROPOUT, STRONG, losses

Metrics = Callable[..., list[dict[str, Any]]]
MakeTrainer = Callable[..., Trainer]
MakeConfig = Callable[..., RunConfig]
KeptBytes = Callable[[Callable[[], torch.Tensor]], int]

LEAN = "embrag.train.recompute_projections=true"


def test_no_worker_is_left_when_a_run_fails(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("run", "embrag.train.workers=1")
    monkeypatch.setattr(trainer, "step", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert not active_children()


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


@pytest.mark.long
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
    trainer = make_trainer("run", 'embrag.train.frozen=["pooling", "background"]')
    before = {name: value.clone() for name, value in trainer.engine.module.state_dict().items()}
    trainer.run()
    moved = {name for name, value in trainer.engine.module.state_dict().items() if not torch.equal(value, before[name])}
    assert "head.weight" in moved
    assert not any(name.startswith(("pooling.", "background")) for name in moved)
    with pytest.raises(UserError, match=r"no part 'rates'; it has embedding, pooling, "):
        make_trainer("other", 'embrag.train.frozen=["rates"]')
