"""What an adaptation learns from: its batches and loss are the trainer's, and its windows hold something to learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.adaptation.learner import Learner, Source
from embrag_ds.config import EmbragConfig, RunConfig
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.data.panel import Panel, Populations
from embrag_ds.data.ploidy import Ploidy
from embrag_ds.data.sampler import QueryBatch
from embrag_ds.data.windows import DataConfig, make_windows
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.export import ExportedModel, write_export
from embrag_ds.model.imputer import Imputer
from embrag_ds.training.trainer import Trainer
from embrag_ds.variants.sites import SiteTable

MakeConfig = Callable[..., RunConfig]
MakeModel = Callable[..., ExportedModel]
MakeSource = Callable[..., Source]
CPU = torch.device("cpu")
LOSS = (
    "embrag.loss.kind=brier",
    "embrag.loss.genotype_weight=2",
    "embrag.loss.rarity=0.5",
    "embrag.augmentation.typing_error=0.01",
    "embrag.augmentation.switch_errors_per_cm=3",
)


@pytest.mark.parametrize("settings", [(), ("embrag.retrieval.mode=token",), LOSS])
def test_loss_masks_and_batches_are_the_trainers(
    make_config: MakeConfig,
    make_model: MakeModel,
    source: Source,
    distributed: DistributedContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
) -> None:
    model = make_model(*settings, "embrag.model.dropout=0.0")
    if model.snapshot is not None:  # a training begins with one of its own weights
        own = {f"embedding.{name}": name for name in model.snapshot}
        encoded = {name: model.weights[full].clone() for full, name in own.items()}
        model = ExportedModel.of(model.config, model.weights, encoded)
    learner = Learner(source, model, source.windows(model), 3.0)
    manifest, start = tmp_path / "manifest", tmp_path / "start.safetensors"
    sites = source.inputs.panel.sites
    manifest.write_text("".join(f"1 {pos}\n" for pos in sites.pos[source.typed]))
    write_export(start, model)
    # The trainer holds out as many samples as its settings say, and the adaptation as suits small panels.
    monkeypatch.setattr("embrag_ds.training.trainer.split_samples", lambda *given: source.split)
    config = make_config(
        *settings,
        "embrag.seed=1",
        "embrag.model.dropout=0.0",
        "train_micro_batch_size_per_gpu=16",
        "embrag.data.flank_sites=64",
        "embrag.data.map_scale=3.0",
        'embrag.masking.policies={"array": 1.0}',
        "embrag.masking.scope=window",
        f"embrag.masking.array_manifest={manifest}",
    )
    trainer = Trainer(config, source.inputs, tmp_path / "run", distributed, resume=False, init_from=start)
    assert learner._data.windows == trainer.sampler.data.windows and len(learner._data) > 3
    network = trainer.engine.module.eval()
    for number in (0, 1, 7, 40):
        ours, theirs = learner._sampler.queries(number), trainer.sampler.queries(number)
        assert ours.window == theirs.window
        for name in ("samples", "alleles", "masked"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        span = learner._data.windows[ours.window].sites
        np.testing.assert_array_equal(ours.masked, np.repeat(~source.typed[span][None], 16, axis=0))
        losses = []
        for each, batch, loss in (
            (learner.network, learner._batch(ours), learner._loss),
            (network, trainer.validation_batch(theirs), config.embrag.loss),
        ):
            total = each(batch, loss=loss).total
            weights = {name: weight for name, weight in each.named_parameters() if "embedding" not in name}
            losses.append((total, *torch.autograd.grad(total, list(weights.values()), allow_unused=True)))
        for one, other in zip(*losses, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_the_loss_is_a_mean_over_the_first_batches_and_moves_nothing(source: Source, model: ExportedModel) -> None:
    learner = Learner(source, model, source.windows(model), 1.0)
    found = learner.loss()
    expected = []
    with torch.no_grad():
        for number in range(6):
            batch = learner._batch(learner._sampler.queries(number))
            expected.append(float(learner.network(batch, loss=learner._loss).total))
    assert found == pytest.approx(sum(expected) / 6, rel=1e-5) and found == learner.loss()
    assert all(torch.equal(value, model.weights[name]) for name, value in learner.weights().items())


def test_without_the_transformer_its_residual_is_left_out(make_source: MakeSource, model: ExportedModel) -> None:
    def learner(transformer: bool, given: ExportedModel = model) -> Learner:
        source = make_source(transformer=transformer)
        return Learner(source, given, source.windows(given), 1.0)

    silent = {
        name: torch.zeros_like(each) if name.startswith("head.") else each for name, each in model.weights.items()
    }
    headless = ExportedModel.of(model.config, silent, model.snapshot)
    for measure in (Learner.loss, lambda each: each.scores().loss):
        without = measure(learner(False))
        assert without == measure(learner(True, headless)) == measure(learner(False, headless))
        assert without != measure(learner(True))


def test_targets_are_neither_learnt_from_nor_held_out(make_source: MakeSource, model: ExportedModel) -> None:
    others = np.delete(np.arange(60), [3, 17, 40])
    source = make_source(samples=others)
    learning, held_out = source.split
    assert sorted([*learning, *held_out]) == others.tolist()
    assert set(source.reference.samples) == set(learning) and len(held_out) >= 5
    learner = Learner(source, model, source.windows(model), 1.0)
    copied, learnt = set(), set()
    for number in range(learner._sampler.micro_batches_per_epoch):
        queries = learner._sampler.queries(number)
        learnt |= set(queries.samples)
        retrieved = learner._batch(queries).retrieved
        assert retrieved is not None
        own = np.repeat(queries.samples, 2)[:, None]
        neighbours = learner._data.reference.sample_of[retrieved.ids.numpy()]
        assert not (neighbours == own).any()
        copied |= set(neighbours.ravel())
    assert learnt == copied == set(learning)


def test_scores_are_of_the_samples_held_out_at_the_sites_that_are_not_typed(
    source: Source, model: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(source, model, source.windows(model), 1.0)
    seen: list[Any] = []
    collate = learner._collate
    monkeypatch.setattr(learner, "_collate", lambda queries, step: seen.append(queries) or collate(queries, step))
    learner.scores()
    assert {each.window for each in seen} == set(range(len(learner._data)))
    assert {sample for each in seen for sample in each.samples.tolist()} == set(source.split[1].tolist())
    for each in seen:
        np.testing.assert_array_equal(
            each.masked,
            np.repeat(~source.typed[learner._data.windows[each.window].sites][None], len(each.samples), axis=0),
        )


def drawn_source(lengths: list[int], typed: np.ndarray, seed: int, samples: int = 12) -> Source:
    """Source of a made-up panel with ``lengths[i]`` sites on contig i, some of which do not vary."""
    size = sum(lengths)
    sites = SiteTable(
        contigs=tuple(f"c{number}" for number in range(len(lengths))),
        contig_lengths=(0,) * len(lengths),
        contig=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        pos=np.concatenate([10 * np.arange(1, length + 1) for length in lengths]).astype(np.int64),
        ref=["A"] * size,
        alt=["C"] * size,
        id=["."] * size,
    )
    rng = np.random.default_rng(seed)
    alleles = (rng.random((size, 2 * samples)) < rng.choice([0.0, 0.05, 0.3], size)[:, None]).astype(np.uint8)
    packed = np.packbits(alleles, axis=1, bitorder="little")
    panel = Panel(Path("p.vcf"), sites, tuple(f"s{number}" for number in range(samples)), packed, {})
    inputs = PanelInputs(panel, Populations(("all",), np.zeros(samples, dtype=np.int64)), sites.pos * 1e-6)
    return Source(inputs, typed, np.arange(samples), CPU, False, False)


def model_with(data: DataConfig) -> ExportedModel:
    """A model of which only the windows matter."""
    return ExportedModel(EmbragConfig(data=data), {})


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Source, DataConfig]:
    lengths = draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
    seed = draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    typed = rng.random(sum(lengths)) < np.repeat(rng.choice([0.0, 0.3, 0.9, 1.0], len(lengths)), lengths)
    data = DataConfig(
        window_sites=draw(st.integers(2, 40)), overlap_sites=0, flank_sites=draw(st.integers(0, 40)), cache_dir="none"
    )
    return drawn_source(lengths, typed, seed), data


@given(layouts())
def test_windows_have_ten_typed_sites_and_one_to_predict(layout: tuple[Source, DataConfig]) -> None:
    source, data = layout
    panel = source.inputs.panel
    learning = source.split[0]
    columns = [number for sample in learning for number in (2 * sample, 2 * sample + 1)]
    alleles = panel.alleles(0, len(panel.sites)).T
    copies = alleles.sum(1)
    least = min((min(each, 24 - each) for each in copies.tolist() if 0 < each < 24), default=24)
    expected = []
    for window in make_windows(panel.sites, data.window_sites, 0, data.flank_sites):
        known = sum(bool(source.typed[site]) for site in range(window.start, window.stop))
        among = [int(alleles[site, columns].sum()) for site in range(window.core_start, window.core_stop)]
        predicted = [
            min(each, len(columns) - each) >= least and not source.typed[window.core_start + place]
            for place, each in enumerate(among)
        ]
        if known >= 10 and any(predicted):
            expected.append(window)
    found = source.windows(model_with(data))
    assert found == [replace(each, index=number) for number, each in enumerate(expected)][:128]


def test_at_most_128_windows_spread_over_all_that_serve() -> None:
    lengths = [400, 300, 500]
    typed = np.tile([True, False], 600)
    typed[400:700] = False
    source, data = drawn_source(lengths, typed, 5), DataConfig(window_sites=4, overlap_sites=0, flank_sites=20)
    everything = make_windows(source.inputs.panel.sites, 4, 0, 20)
    found = source.windows(model_with(data))
    assert len(everything) == 300 and len(found) == 128
    assert [each.index for each in found] == list(range(128))
    # The second contig is not typed.
    starts = np.array([each.core_start for each in found])
    assert not ((starts >= 400) & (starts < 700)).any() and set(starts) <= {each.core_start for each in everything}
    assert starts[0] < 20 and starts[-1] >= 1180
    for first, last in ((0, 400), (700, 1200)):
        inside = starts[(starts >= first) & (starts < last)]
        assert np.diff(inside).max() <= 6 * 4 and len(inside) == pytest.approx(128 * (last - first) / 900, abs=8)


def test_a_network_of_another_size_fits_its_own_weights(source: Source, make_model: MakeModel) -> None:
    model = make_model("embrag.model.dims=8", "embrag.model.heads=1")
    learner = Learner(source, model, source.windows(model), 1.0)
    assert isinstance(learner.network, Imputer) and learner.network.embedding.dims == 8
    size = learner.step_size()
    assert size.rows == 32 and size.neighbours == 16
    mean = np.mean([source.typed[each.sites].sum() for each in learner._data.windows])
    assert size.typed == pytest.approx(mean)
    assert size.core == pytest.approx(np.mean([each.core_stop - each.core_start for each in learner._data.windows]))


def test_haploid_samples_held_out_are_no_pairs(make_source: MakeSource, model: ExportedModel) -> None:
    """Two samples are haploid from the middle of the panel on, and a window lies on both sides of it."""
    whole = make_source()
    panel, males = whole.inputs.panel, whole.split[1][[1, 4]]
    haploid, first = np.zeros((2, len(panel.samples)), dtype=bool), len(panel.sites) // 2
    haploid[1, males] = True
    of_males = replace(panel, ploidy=Ploidy(np.array([0, first]), haploid))
    source = make_source(inputs=replace(whole.inputs, panel=of_males))
    learner = Learner(source, model, source.windows(model), 1.0)
    for window, pairs in zip(learner._data.windows, learner.scores().pairs, strict=True):
        scored = np.arange(window.core_start, window.core_stop)[
            learner._held_out.scored(window.index, ~source.typed[window.sites])
        ]
        expected = ~(np.isin(source.split[1], males) & (scored[:, None] >= first))
        np.testing.assert_array_equal(pairs.diploid, expected)


@pytest.mark.parametrize("block", [12, 5])
def test_the_loss_of_samples_held_out_is_the_trainings_whatever_the_block(
    source: Source, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    model = make_model(*LOSS)
    learner = Learner(source, model, source.windows(model), 1.0)
    held_out = source.split[1]
    expected = []
    for number, window in enumerate(learner._data.windows):
        alleles = learner._data.samples_alleles(number, held_out)
        masks = np.repeat(~source.typed[window.sites][None], len(held_out), axis=0)
        with torch.no_grad():
            batch = learner._batch(QueryBatch(number, held_out, alleles, masks))
            expected.append(float(learner.network(batch, loss=learner._loss).total))
    monkeypatch.setattr(learner._held_out, "_block", block)
    found = learner.scores()
    assert found.loss == pytest.approx(np.mean(expected), rel=1e-5)
    for number, window in enumerate(learner._data.windows):
        pairs, of_core = found.pairs[number], learner._held_out.scored(number, ~source.typed[window.sites])
        alleles = learner._data.samples_alleles(number, held_out)
        masks = np.repeat(~source.typed[window.sites][None], len(held_out), axis=0)
        with torch.no_grad():
            logits = learner.network(learner._batch(QueryBatch(number, held_out, alleles, masks))).logits
        assert pairs.diploid.all() and pairs.truth.shape == (of_core.sum(), len(held_out))
        for sample in range(len(held_out)):
            here = slice(2 * sample, 2 * sample + 2)
            np.testing.assert_allclose(pairs.probability[:, sample], logits[here, of_core].sigmoid().T, atol=1e-5)
            np.testing.assert_array_equal(pairs.truth[:, sample], alleles[here, window.core].sum(0)[of_core])
