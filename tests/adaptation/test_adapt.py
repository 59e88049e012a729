"""Adaptation as a whole: the scale of the map, the decision of the samples held out, and the cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embrag_ds.adaptation import adapt
from embrag_ds.adaptation import learner as learner_module
from embrag_ds.adaptation.adapt import Adapted, adapt_model
from embrag_ds.adaptation.held_out import MaskScores
from embrag_ds.adaptation.learner import HeldOutScores, Learner, Source
from embrag_ds.adaptation.pairs import Fitted
from embrag_ds.data.ploidy import Ploidy
from embrag_ds.data.windows import Window
from embrag_ds.dependence import INDEPENDENT, Dependence
from embrag_ds.export import MODEL_FILE, PRETRAINED, ExportedModel, read_export, write_export

MakeModel = Callable[..., ExportedModel]
MakeSource = Callable[..., Source]


@pytest.fixture
def source(make_source: MakeSource) -> Source:
    """The source without the transformer, which takes less time."""
    return make_source(transformer=False)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every adaptation takes four steps, and tries each scale on one batch."""
    monkeypatch.setattr(adapt, "steps_within", lambda *given: 4)
    monkeypatch.setattr(learner_module, "_TRIAL_BATCHES", 1)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """Function that gives the log so far."""
    with caplog.at_level(logging.INFO, logger="embrag_ds"):
        yield lambda: "\n".join(each.getMessage() for each in caplog.records)


def same(one: ExportedModel, other: ExportedModel) -> bool:
    """Whether two models are equal to the bit."""
    for first, second in ((one.weights, other.weights), (one.snapshot or {}, other.snapshot or {})):
        if first.keys() != second.keys() or not all(torch.equal(value, second[name]) for name, value in first.items()):
            return False
    return asdict(one.config) == asdict(other.config) and one.dependence == other.dependence


def entries(cache: Path) -> list[str]:
    """Names of the adapted models in a cache."""
    return sorted(path.name for path in cache.iterdir() if path.name.startswith("adapted-"))


def scored(loss: float, r2: float = 0.8) -> HeldOutScores:
    """What a learner says of the samples held out, with this loss and r2 over all sites."""
    values = {name: float("nan") for name in ("<0.1 %", "0.1-0.5 %", "0.5-1 %", "1-5 %", "all <1 %")}
    return HeldOutScores(loss, MaskScores({**values, "5-50 %": r2, "all": r2}, {}, 0.9, float("nan")), [])


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [(0.5, 0.51, False), (0.5, 0.5, False), (0.5, 0.4999, True), (0.5, float("nan"), False)],
)
def test_the_samples_held_out_decide(
    source: Source,
    model: ExportedModel,
    tmp_path: Path,
    few_steps: None,
    monkeypatch: pytest.MonkeyPatch,
    said: Callable[[], str],
    before: float,
    after: float,
    kept: bool,
) -> None:
    left = iter([before, after])
    monkeypatch.setattr(Learner, "scores", lambda self: scored(next(left)))
    fitted = Fitted(Dependence(0.3, 0.1), gain=0.24, error=0.05)
    monkeypatch.setattr(adapt, "fit_dependence", lambda pairs: fitted)
    found = adapt_model(source, model, 5.0, tmp_path)
    assert found.model.dependence == (fitted.dependence if kept else INDEPENDENT)
    assert found.report["dependence"] == asdict(fitted)
    assert ("(opposite 0.30, alike 0.10): genotypes gain 0.24 nats" in said()) is kept
    assert found.report["kept"] is kept and found.report["adapt"] == 5.0 and found.report["steps"] == 4
    assert found.report["samples"] + found.report["held_out_samples"] == 60 and found.report["windows"] == 5
    assert (found.model is model) is not kept and same(found.model, model) is not kept
    words = "the adapted model imputes" if kept else "that is no better, so the model imputes as it was"
    shown = f"loss {before:.5f} -> {after:.5f}, r2 0.8000 -> 0.8000 (below 1 % MAF - -> -)"
    assert f"on the samples held out: {shown}; {words}" in said()
    assert found.report["before"] == found.report["after"] | {"loss": before}
    assert found.report["after"]["loss"] == (None if np.isnan(after) else after)
    assert found.report["after"]["calibration_error"] is None and found.report["after"]["r2"]["0.5-1 %"] is None
    # Another time it is found, and nothing else is decided.
    again = adapt_model(source, model, 5.0, tmp_path)
    assert again.report == found.report and same(again.model, found.model)
    assert "adapted to this panel and these sites before" in said() and len(entries(tmp_path)) == 1
    assert json.loads(json.dumps(again.report, allow_nan=False)) == again.report


@pytest.mark.parametrize(("r2", "kept"), [(0.7999, False), (0.8, True), (0.9, True), (float("nan"), True)])
def test_a_lower_loss_does_not_make_up_for_a_lower_r2(
    source: Source,
    model: ExportedModel,
    tmp_path: Path,
    few_steps: None,
    monkeypatch: pytest.MonkeyPatch,
    r2: float,
    kept: bool,
) -> None:
    left = iter([scored(0.5), scored(0.4, r2)])
    monkeypatch.setattr(Learner, "scores", lambda self: next(left))
    assert adapt_model(source, model, 5.0, tmp_path).report["kept"] is kept


def test_off_does_nothing(source: Source, model: ExportedModel, tmp_path: Path) -> None:
    assert adapt_model(source, model, "off", tmp_path / "cache") == Adapted(model, {"adapt": "off"})
    assert not (tmp_path / "cache").exists()


def test_too_little_time_leaves_the_model_alone(
    source: Source, model: ExportedModel, tmp_path: Path, said: Callable[[], str]
) -> None:
    found = adapt_model(source, model, 0.01, tmp_path)
    assert found.model is model and found.report["kept"] is False
    assert found.report["left_alone"] == "a step would take about 0.0 s; --adapt 1 gives enough time"
    assert f"the model is not adapted to the panel: {found.report['left_alone']}" in said() and not entries(tmp_path)


def test_only_the_copying_model_and_the_residual_change(
    make_source: MakeSource, model: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt, "steps_within", lambda *given: 20)
    found = adapt_model(make_source(), model, 5.0, tmp_path)
    assert found.report["kept"] and found.report["after"]["loss"] < found.report["before"]["loss"]
    for name, value in found.model.weights.items():
        # Most haplotypes are no neighbours, so that the recombination prior stays.
        unchanged = name.startswith(("embedding.", "pooling.closeness", "pooling.reach"))
        assert torch.equal(value, model.weights[name]) == unchanged, name
        assert value.dtype == torch.float32 and torch.isfinite(value).all()
    assert found.model.snapshot is not None and model.snapshot is not None
    assert all(torch.equal(value, model.snapshot[name]) for name, value in found.model.snapshot.items())
    written = asdict(found.model.config)
    assert written | {"data": None} == asdict(model.config) | {"data": None}


def test_a_map_thirty_times_too_long_comes_to_the_distances_of_a_right_one(
    make_source: MakeSource, tmp_path: Path, said: Callable[[], str]
) -> None:
    """The shipped model, whose copying model was learnt on right maps of larger panels.

    In a panel of 48 samples, haplotypes are shared over shorter distances, so a right map may be a step too short.
    """
    model, right = read_export(PRETRAINED), make_source(transformer=False)
    wrong = replace(right, inputs=replace(right.inputs, position_cm=30 * right.inputs.position_cm))
    found = []
    for source in (right, wrong):
        learner = Learner(source, model, source.windows(model), 1.0)
        found.append(adapt._scaled(source, model, learner, source.windows(model)))
    (right_scale, _), (wrong_scale, _) = found
    assert right_scale in (1.0, pytest.approx(10**0.5))
    # Scales lie a factor of 3.16 apart, and the loss is nearly the same at a panel's best two.
    assert right_scale / 3.2 < 30 * wrong_scale < 3.2 * right_scale
    assert found[1][1].loss() < 1.001 * found[0][1].loss()
    assert f"genetic distances x {wrong_scale:.3g} fit better: loss " in said()
    # The learner that goes on has that scale, and weights as they were.
    np.testing.assert_allclose(found[1][1]._data.position_cm, 30 * found[1][0] * right.inputs.position_cm)
    assert all(torch.equal(value, model.weights[name]) for name, value in found[1][1].weights().items())
    # A model that has adapted before keeps its scale, and starts from it.
    scaled = replace(model, config=replace(model.config, data=replace(model.config.data, map_scale=found[1][0])))
    learner = Learner(wrong, scaled, wrong.windows(scaled), found[1][0])
    assert adapt._scaled(wrong, scaled, learner, wrong.windows(scaled)) == (found[1][0], learner)


def trials(monkeypatch: pytest.MonkeyPatch, losses: dict[float, float]) -> list[float]:
    """The scales tried, in turn, where these are the losses by scale (2 at any other)."""
    tried: list[float] = []

    class Trial:
        def __init__(self, source: Any, model: ExportedModel, windows: list[Window], scale: float):
            self.scale = scale
            tried.append(scale)

        def loss(self) -> float:
            return next((loss for scale, loss in losses.items() if abs(self.scale / scale - 1) < 1e-6), 2.0)

    monkeypatch.setattr(adapt, "Learner", Trial)
    return tried


@pytest.mark.parametrize(
    ("losses", "expected", "steps"),
    [
        ({1: 1.0, 10: 0.5}, 1.0, [0.5, -0.5]),  # over a hill it does not see
        ({1: 1.0, 10**0.5: 0.996}, 1.0, [0.5, -0.5]),  # too little
        ({1: 1.0, 10**0.5: 0.994, 10: 0.993}, 10.0, [0.5, 1, 1.5]),
        ({1: 1.0, 10**-0.5: 0.9, 0.1: 0.8, 10**-1.5: 0.81}, 0.1, [0.5, -0.5, -1, -1.5]),
        ({10 ** (place / 2): 1 - place / 10 for place in range(9)}, 1000.0, [0.5, 1, 1.5, 2, 2.5, 3]),
        ({1: float("nan"), 10**0.5: 0.5}, 1.0, [0.5, -0.5]),
    ],
)
def test_scales_are_tried_as_long_as_the_loss_falls(
    source: Source,
    model: ExportedModel,
    monkeypatch: pytest.MonkeyPatch,
    losses: dict[float, float],
    expected: float,
    steps: list[float],
) -> None:
    tried = trials(monkeypatch, losses)
    scale, learner = adapt._scaled(source, model, adapt.Learner(source, model, [], 1.0), [])
    assert scale == pytest.approx(expected, rel=1e-9) and learner.scale == scale
    np.testing.assert_allclose(np.log10(tried), [0, *steps], atol=1e-12)


def test_a_scale_is_a_multiple_of_the_models_own(
    source: Source, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("embrag.data.map_scale=0.2")
    tried = trials(monkeypatch, {0.2: 1.0, 0.2 * 10**0.5: 0.9})
    scale, _ = adapt._scaled(source, model, adapt.Learner(source, model, [], 0.2), [])
    assert scale == pytest.approx(0.2 * 10**0.5) and tried[0] == 0.2


def changed_sources(source: Source) -> dict[str, Source]:
    """Sources that lead to other models than ``source`` does."""
    panel = source.inputs.panel
    # Two haplotypes learnt from exchange their alleles: every count stays, as it does with a sample held out.
    alleles = panel.alleles(0, len(panel.sites)).T.copy()
    columns = source.reference.haplotypes[:2]
    site = np.flatnonzero(alleles[:, columns[0]] != alleles[:, columns[1]])[0]
    alleles[site, columns] = alleles[site, columns[::-1]]
    packed = np.packbits(alleles, axis=1, bitorder="little")
    typed = source.typed.copy()
    typed[np.flatnonzero(~typed)[5]] = True
    # Haploid at the first typed site, where no count of an allele is the panel's least.
    haploid = np.zeros((2, 60), dtype=bool)
    haploid[0, source.split[1][0]] = True
    ploidy = Ploidy(np.array([0, 3]), haploid)
    assert replace(panel, ploidy=ploidy).minimum_allele_count == panel.minimum_allele_count
    populations = replace(source.inputs.populations, of=np.roll(source.inputs.populations.of, 1))
    assert not np.array_equal(populations.of, source.inputs.populations.of)
    inputs = {
        "alleles": replace(source.inputs, panel=replace(panel, packed=packed)),
        "ploidy": replace(source.inputs, panel=replace(panel, ploidy=ploidy)),
        "map": replace(source.inputs, position_cm=source.inputs.position_cm * (1 + 1e-12)),
        "populations": replace(source.inputs, populations=populations),
    }
    return {
        **{name: replace(source, inputs=each) for name, each in inputs.items()},
        "typed sites": replace(source, typed=typed),
        "samples": replace(source, samples=np.delete(source.samples, 9)),
        "transformer": replace(source, transformer=True),
        "precision": replace(source, bf16=True),
        "device": replace(source, device=torch.device("meta")),
    }


def test_the_entry_of_the_cache_tells_apart_all_that_matters(
    source: Source, model: ExportedModel, make_model: MakeModel
) -> None:
    windows = source.windows(model)
    name = adapt._identity(source, model, windows, 40)
    assert name == adapt._identity(source, model, source.windows(model), 40) and len(name) == 20
    names = {what: adapt._identity(each, model, windows, 40) for what, each in changed_sources(source).items()}
    weights = {**model.weights, "background": model.weights["background"] + 1e-6}
    assert model.snapshot is not None
    snapshot = {name: value + 1e-6 if name == "token.weight" else value for name, value in model.snapshot.items()}
    models = {
        "weights": ExportedModel.of(model.config, weights, model.snapshot),
        "snapshot": ExportedModel.of(model.config, model.weights, snapshot),
        "settings": replace(model, config=make_model("embrag.loss.kind=brier").config),
        "scale": replace(model, config=make_model("embrag.data.map_scale=2.0").config),
    }
    names |= {what: adapt._identity(source, each, windows, 40) for what, each in models.items()}
    names |= {"steps": adapt._identity(source, model, windows, 41)}
    names |= {"windows": adapt._identity(source, model, windows[1:], 40)}
    assert len({name, *names.values()}) == 1 + len(names), names


def test_the_entry_of_the_cache_is_the_same_for_what_does_not_matter(source: Source, model: ExportedModel) -> None:
    windows = source.windows(model)
    name = adapt._identity(source, model, windows, 40)
    panel = source.inputs.panel
    renamed = replace(panel, path=Path("other.vcf"), samples=tuple(f"X{number}" for number in range(60)))
    mapped = replace(panel, packed=np.array(panel.packed))
    for other in (renamed, mapped):
        assert adapt._identity(replace(source, inputs=replace(source.inputs, panel=other)), model, windows, 40) == name


def test_a_site_that_no_window_holds_decides_nothing(source: Source, model: ExportedModel) -> None:
    """So a panel of one chromosome and one of many may share an entry, but for what depends on all of the sites."""
    windows = source.windows(model)[:2]
    name = adapt._identity(source, model, windows, 40)
    typed, position = source.typed.copy(), source.inputs.position_cm.copy()
    typed[-1], position[-1] = not typed[-1], position[-1] + 1
    assert windows[-1].stop < len(typed)
    moved = replace(source, typed=typed, inputs=replace(source.inputs, position_cm=position))
    assert adapt._identity(moved, model, windows, 40) == name


def test_a_cached_model_is_used_only_if_nothing_of_it_has_changed(
    source: Source, model: ExportedModel, tmp_path: Path, few_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = iter([0.2, 0.1] * 2)
    monkeypatch.setattr(Learner, "scores", lambda self: scored(next(better)))
    first = adapt_model(source, model, 5.0, tmp_path)
    (name,) = entries(tmp_path)
    stored = tmp_path / name / MODEL_FILE
    content = stored.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", lambda self, steps: pytest.fail("it learnt again"))
        assert same(adapt_model(source, model, 5.0, tmp_path).model, first.model)
    stored.unlink()  # the tensors read from it are mapped
    stored.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert same(adapt_model(source, model, 5.0, tmp_path).model, first.model) and stored.read_bytes() == content


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_an_adaptation_cut_off_leaves_no_entry(
    source: Source,
    model: ExportedModel,
    tmp_path: Path,
    few_steps: None,
    monkeypatch: pytest.MonkeyPatch,
    fault: type[BaseException],
) -> None:
    def cut_off(*given: object) -> None:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr("embrag_ds.adaptation.fitting.Fit.step", cut_off)
        with pytest.raises(fault):
            adapt_model(source, model, 5.0, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []
    found = adapt_model(source, model, 5.0, tmp_path / "cache")
    assert found.report["steps"] == 4 and len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    "settings",
    [
        ("embrag.retrieval.mode=token",),
        ("embrag.retrieval.mode=none",),
        ("embrag.model.fusion=rare_variant",),
        ("embrag.retrieval.encoding=live",),
        ("embrag.retrieval.store=dense",),
        ("embrag.retrieval.backend=faiss-gpu",),
        ("embrag.retrieval.per_chunk=2", "embrag.retrieval.chunk_sites=8"),
        ("embrag.model.good_turing=true", "embrag.loss.kind=focal"),
    ],
)
def test_models_of_every_kind_adapt(
    make_source: MakeSource,
    make_model: MakeModel,
    tmp_path: Path,
    few_steps: None,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
) -> None:
    better = iter([0.2, 0.1])
    monkeypatch.setattr(Learner, "scores", lambda self, real=Learner.scores: real(self) and scored(next(better)))
    model = make_model(*settings)
    assert (model.snapshot is None) == any(each.endswith(("token", "none", "live")) for each in settings)
    found = adapt_model(make_source(), model, 5.0, tmp_path / "cache")
    assert found.report["kept"] and not same(found.model, model)
    assert all(torch.isfinite(value).all() for value in found.model.weights.values())
    # It is a model like any other.
    path = tmp_path / "model.safetensors"
    write_export(path, found.model)
    assert same(read_export(path), found.model)


def test_one_small_batch_is_too_little_to_learn_from(
    make_source: MakeSource, make_model: MakeModel, tmp_path: Path, said: Callable[[], str]
) -> None:
    model, source = make_model("embrag.data.window_sites=4096"), make_source(samples=np.arange(20))
    found = adapt_model(source, model, "auto", tmp_path / "cache")
    why = "too few to learn from (windows: 1, samples: 20)"
    assert found == Adapted(model, {"adapt": "auto", "kept": False, "left_alone": why}) and why in said()
    assert not (tmp_path / "cache").exists()
