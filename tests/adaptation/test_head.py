"""The fit of the confidence head: rows of panel samples beside a plain reading of the panel, and the fit itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from embrag_ds.adaptation import head as head_module
from embrag_ds.adaptation.head import PanelRows, Rows, Thinning, fit_head, stretch_settings
from embrag_ds.adaptation.learner import Learner, Source
from embrag_ds.copying import stretch
from embrag_ds.copying.along import CopyAlong
from embrag_ds.copying.model import CopyingModel
from embrag_ds.correction.network import network_part
from embrag_ds.correction.tiles import TransformerTiles
from embrag_ds.data.ploidy import Ploidy
from embrag_ds.data.sampler import exclusion_table
from embrag_ds.data.windows import DataConfig, WindowedPanel
from embrag_ds.export import PRETRAINED, ExportedModel, read_export
from embrag_ds.model.confidence import ConfidenceHead
from embrag_ds.model.numbers import CONFIDENCE_FEATURES, CONFIDENCE_LAYERS

MakeModel = Callable[..., ExportedModel]
MakeSource = Callable[..., Source]


@pytest.fixture(scope="module")
def shipped() -> ExportedModel:
    return read_export(PRETRAINED)


@pytest.fixture
def source(make_source: MakeSource) -> Source:
    return make_source(transformer=False)


def head_rows(source: Source, model: ExportedModel) -> PanelRows:
    data = WindowedPanel(source.reference, source.stretches(model), source.inputs.position_cm)
    return PanelRows(model, source.transformer, data, source.typed)


def head_of(model: ExportedModel) -> ConfidenceHead:
    found = ConfidenceHead()
    found.load_state_dict(
        {name.removeprefix("confidence."): value for name, value in model.weights.items() if "confidence." in name}
    )
    return found


def plain_rows(source: Source, model: ExportedModel, sample: int) -> tuple[list[float], list[float]]:
    """Corrected log-odds of the minor allele, and whether it is there, of a sample's rows, stretch by stretch.

    They are read from the probabilities that imputation gives, where these are not those of the prior alone.
    """
    panel, reference = source.inputs.panel, source.reference
    data = WindowedPanel(reference, source.stretches(model), source.inputs.position_cm)
    silent = {**model.arrays}
    for kind in ("weight", "bias"):
        silent[f"{CONFIDENCE_LAYERS[-1]}.{kind}"] = np.zeros_like(silent[f"{CONFIDENCE_LAYERS[-1]}.{kind}"])
    exclusions = exclusion_table(panel.samples, None)
    corrected, prior = (CopyAlong(CopyingModel(each, True), data, exclusions) for each in (model.arrays, silent))
    tiles = TransformerTiles(network_part(*model.parts, model.config.model), model.config.data)
    odds, carries = [], []
    inside = sample in reference.samples
    for window in data.windows:
        typed = source.typed[window.sites]
        sites = np.arange(window.start, window.stop)[typed]
        alleles = np.ascontiguousarray(panel.alleles_at(sites, np.array([2 * sample, 2 * sample + 1])).T)
        number = np.array([sample if inside else -1])
        stretch = corrected.stretch(window.index, typed)
        before = prior.probability(prior.stretch(window.index, typed), alleles, number)
        found = np.empty_like(before)
        copied = corrected.copied(stretch, alleles, number, found)
        if source.transformer:
            tiles.add_along(found, copied, stretch, data, alleles, lambda sites: lambda haplotypes: None)
        for haplotype in range(2):
            for place, site in enumerate(range(window.core_start, window.core_stop)):
                if source.typed[site] or not reference.passes_minimum_count[site]:
                    continue
                of_all = panel.alleles(site, site + 1, reference.haplotypes)[:, 0]
                counted = reference.counted(slice(site, site + 1))[:, 0].astype(bool)
                counted = np.broadcast_to(counted, of_all.shape)
                others = of_all[counted & (reference.sample_of != sample)]
                fewest = min(others.sum(), len(others) - others.sum())
                if fewest < panel.minimum_allele_count:
                    continue
                if panel.ploidy is not None and panel.ploidy.at(np.array([site]))[0, sample] and haplotype == 1:
                    continue
                ref_is_minor = others.mean() > 0.5
                minor = 1 - before[haplotype, place] if ref_is_minor else before[haplotype, place]
                if minor < 1e-3:
                    continue
                own = panel.alleles(site, site + 1, np.array([2 * sample + haplotype]))[0, 0]
                p = float(1 - found[haplotype, place] if ref_is_minor else found[haplotype, place])
                odds.append(np.log(p / (1 - p)))
                carries.append(float(own != ref_is_minor))
    return odds, carries


@pytest.mark.parametrize("ploidy", [False, True])
@pytest.mark.parametrize("transformer", [False, True])
def test_rows_are_what_imputation_computes_and_what_the_panel_holds(
    source: Source, shipped: ExportedModel, ploidy: bool, transformer: bool
) -> None:
    """Of two samples to learn from, who copy only others, and one held out."""
    source = replace(source, transformer=transformer)
    learning, held_out = source.split
    samples = np.array([learning[0], learning[7], held_out[2]])
    if ploidy:
        panel = source.inputs.panel
        haploid = np.zeros((2, len(panel.samples)), dtype=bool)
        haploid[1, samples[1:]] = True
        males = replace(panel, ploidy=Ploidy(np.array([0, len(panel.sites) // 2]), haploid))
        source = replace(source, inputs=replace(source.inputs, panel=males))
    rows, head = head_rows(source, shipped), head_of(shipped)
    number = 0
    for sample in samples.tolist():
        found = rows.of(np.array([sample]))
        odds, carries = plain_rows(source, shipped, sample)
        with torch.no_grad():
            ours = head.minor_odds(torch.from_numpy(found.features)).numpy() + found.residual
        assert found.residual.any() == transformer
        # The loop takes the sites of a haplotype in another order.
        assert len(found) == len(odds)
        expected = sorted(zip(carries, odds, strict=True))
        got = sorted(zip(found.carries.tolist(), ours.tolist(), strict=True))
        np.testing.assert_array_equal([each[0] for each in got], [each[0] for each in expected])
        np.testing.assert_allclose([each[1] for each in got], [each[1] for each in expected], atol=2e-3)
        number += len(odds)
        assert 0 < sum(carries) < len(carries)
    assert number > 300
    together = rows.of(samples)
    assert len(together) == number


def test_few_common_sites_are_enough(source: Source, shipped: ExportedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_MOST_SITES", {0.0: 30, 0.1: 7, 0.3: 2})
    noted = head_rows(source, shipped)._noted
    frequency = source.reference.allele_frequency
    maf = np.minimum(frequency, 1 - frequency)
    eligible = ~source.typed & source.reference.passes_minimum_count
    for low, high, most in ((0.0, 0.1, 30), (0.1, 0.3, 7), (0.3, 1.0, 2)):
        of_class = (maf >= low) & (maf < high)
        assert (noted & of_class).sum() == most < (eligible & of_class).sum()
        places = np.flatnonzero(noted & of_class)
        # They are spread over the panel.
        assert places[0] < len(maf) / 4 and places[-1] > 3 * len(maf) / 4
    assert not (noted & ~eligible).any()


def test_as_many_samples_as_take_little_time(
    source: Source, shipped: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = head_rows(source, shipped)
    typed = sum(int(source.typed[each.sites].sum()) for each in source.stretches(shipped))
    of_sample = 2 * typed * len(source.reference) * 1.3e-9
    assert rows.most_samples == int(10 / of_sample) > 1500
    monkeypatch.setattr(head_module, "_MOST_SECONDS", 1e-9)
    assert rows.most_samples == 64
    # The time of a transformer counts, and a large one is left out.
    sites = sum(each.core_stop - each.core_start for each in source.stretches(shipped))
    of_sample += 2 * sites * 12 * 32**2 * 4e-11
    rows = head_rows(replace(source, transformer=True), shipped)
    for affordable, expected in ((80.5, 80), (63.5, 0)):
        monkeypatch.setattr(head_module, "_MOST_SECONDS", affordable * of_sample)
        assert rows.most_samples == expected


def test_rows_are_thinned_to_so_many_and_unlikely_ones_to_a_quarter_of_that(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = made_up(100_000, 7, lambda features: 0 * features[:, 0])
    unlikely = rows.features[:, 0] * 4 < np.log(0.01 / 0.99)
    assert 500 < unlikely.sum() < 5000
    rows = rows.at(np.concatenate([np.flatnonzero(unlikely).repeat(20), np.flatnonzero(~unlikely)]))
    unlikely = rows.features[:, 0] * 4 < np.log(0.01 / 0.99)
    for most, share in ((10**9, 1.0), (3 * ((~unlikely).sum() + unlikely.sum() / 4) * 0.2, 0.2)):
        monkeypatch.setattr(head_module, "_MOST_ROWS", most)
        thinning = Thinning.to_most(rows, 3.0, np.random.default_rng(1))
        assert thinning.share == pytest.approx(share)
        found = thinning.of(rows)
        of_unlikely = (found.features[:, 0] * 4 < np.log(0.01 / 0.99)).sum()
        assert len(found) - of_unlikely == pytest.approx(share * (~unlikely).sum(), rel=0.02)
        assert of_unlikely == pytest.approx(share * unlikely.sum() / 4, rel=0.05)
    # Rows stay whole.
    whole = np.concatenate([rows.features, rows.residual[:, None], rows.carries[:, None]], axis=1)
    drawn = np.concatenate([found.features, found.residual[:, None], found.carries[:, None]], axis=1)
    assert set(map(bytes, drawn)) <= set(map(bytes, whole))


def test_stretches_are_as_long_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    given = DataConfig(window_sites=768, overlap_sites=96, flank_sites=8192)
    assert stretch_settings(given, 0.05, 5000) == replace(given, window_sites=16384, overlap_sites=0, flank_sites=4096)
    monkeypatch.setattr(stretch, "MOST_STRETCH_BYTES", 12 * 100_000 * (1 / 64 + 0.05) * 3000.5)
    assert stretch_settings(given, 0.05, 100_000).window_sites == 3000
    assert stretch_settings(given, 0.05, 1_000_000).window_sites == 768
    short = DataConfig(flank_sites=64, windows_file="windows")
    assert stretch_settings(short, 0.05, 5000).flank_sites == 64
    assert stretch_settings(short, 0.05, 5000).windows_file is None


def made_up(rows: int, seed: int, truth: Callable[[np.ndarray], np.ndarray]) -> Rows:
    """Rows whose true log-odds are those of the prior plus ``truth`` of the features."""
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 0.5, (rows, CONFIDENCE_FEATURES)).astype(np.float32)
    odds = 4 * features[:, 0] + truth(features)
    residual = rng.normal(0, 1, rows).astype(np.float32)
    carries = rng.random(rows) < 1 / (1 + np.exp(-odds - residual))
    return Rows(features, residual, carries.astype(np.float32))


def cross_entropy(rows: Rows, odds: np.ndarray) -> float:
    return float(np.mean(np.logaddexp(0, odds) - rows.carries * odds))


def test_a_fit_finds_the_correction_that_is_true() -> None:
    def truth(features: np.ndarray) -> np.ndarray:
        found: np.ndarray = 2 * np.tanh(features[:, 3]) - np.maximum(3 * features[:, 10], 0) + 0.5
        return found

    learning, held_out = made_up(60_000, 1, truth), made_up(20_000, 2, truth)
    head = ConfidenceHead()
    found = fit_head(head, learning, held_out, np.random.default_rng(1))
    prior = 4 * held_out.features[:, 0] + held_out.residual
    best = cross_entropy(held_out, prior + truth(held_out.features))
    assert found.rows == 60_000 and found.kept
    assert found.before == pytest.approx(cross_entropy(held_out, prior), abs=1e-5)
    assert best - 1e-3 < found.after < best + 0.05 * (found.before - best)
    with torch.no_grad():
        odds = head.minor_odds(torch.from_numpy(held_out.features)).numpy() + held_out.residual
    assert found.after == pytest.approx(cross_entropy(held_out, odds), abs=1e-5)
    # Another fit gives the same weights, whatever torch drew meanwhile.
    twin = ConfidenceHead()
    start = {name: value.clone() for name, value in twin.state_dict().items()}
    fit_head(twin, learning, held_out, np.random.default_rng(1))
    torch.rand(3)
    other = ConfidenceHead()
    other.load_state_dict(start)
    fit_head(other, learning, held_out, np.random.default_rng(1))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in twin.state_dict().items())


def test_a_head_that_is_worse_for_samples_held_out_stays_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="embrag_ds")
    learning = made_up(5000, 3, lambda features: 3 * features[:, 5])
    held_out = made_up(5000, 4, lambda features: -3 * features[:, 5])
    head = ConfidenceHead()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    found = fit_head(head, learning, held_out, np.random.default_rng(1))
    assert not found.kept and found.after > found.before
    losses = f"{found.before:.5f} -> {found.after:.5f}"
    assert caplog.messages[-1] == (
        f"confidence head fitted to {found.rows:,} genotypes: cross-entropy of the samples held out {losses}; "
        "that is no better, so it stays as it was"
    )
    assert found.rounds == 2 and all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_rounds_follow_as_long_as_the_loss_falls_and_the_best_head_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = made_up(2000, 5, lambda features: features[:, 1])
    learn, seen = head_module._learn, []

    def watched(head: ConfidenceHead, *given: object) -> None:
        learn(head, *given)
        seen.append({name: value.clone() for name, value in head.state_dict().items()})

    monkeypatch.setattr(head_module, "_learn", watched)
    # Whatever comes after the losses that are listed is better, and is not reached.
    for losses, rounds, best in (
        ([0.5, 0.4, 0.3, 0.2, 0.25], 4, 3),
        ([0.5, 0.4, 0.3, 0.2, 0.1999], 4, 4),
        ([0.5, 0.4, 0.3, 0.2, 0.1997, 0.3], 5, 4),
        ([0.5, *np.linspace(0.4, 0.3, 8)], 8, 8),
    ):
        seen.clear()
        ahead = iter([*losses, 0.01])
        monkeypatch.setattr(head_module, "_loss", lambda head, rows, ahead=ahead: next(ahead))
        head = ConfidenceHead()
        found = fit_head(head, rows, rows, np.random.default_rng(1))
        assert (found.rounds, found.before, found.after, found.kept) == (rounds, 0.5, losses[best], True)
        assert len(seen) == rounds
        assert all(torch.equal(value, seen[best - 1][name]) for name, value in head.state_dict().items())
        assert best == rounds or not torch.equal(seen[best - 1]["layers.0.weight"], seen[-1]["layers.0.weight"])


def test_a_probability_of_one_has_finite_odds() -> None:
    """As float32 rounds what a head is certain of; the residual there is 0 then."""
    odds = head_module._logit(np.array([0.0, 1e-9, 0.25, 0.75, 1.0], dtype=np.float32))
    assert np.isfinite(odds).all() and (np.diff(odds) >= 0).all()
    np.testing.assert_allclose(odds[2:4], [-np.log(3), np.log(3)], rtol=1e-6)


def test_only_the_head_of_a_learner_is_fitted(
    source: Source, shipped: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, asked, of = Learner(source, shipped, source.windows(shipped), 1.0), [], PanelRows.of
    monkeypatch.setattr(
        PanelRows, "of", lambda self, samples, *given: asked.append(samples.tolist()) or of(self, samples, *given)
    )
    found = learner.fit_head()
    assert found is not None and found.kept and found.rows > 1000
    assert asked == [each.tolist() for each in reversed(source.split)]
    for name, value in learner.weights().items():
        assert torch.equal(value, shipped.weights[name]) == ("confidence." not in name), name
    # The loss of the samples held out is that of the network as it is now.
    rows = PanelRows(
        ExportedModel.of(shipped.config, learner.weights(), shipped.snapshot),
        False,
        WindowedPanel(source.reference, source.stretches(shipped), source.inputs.position_cm),
        source.typed,
    )
    held_out = rows.of(source.split[1])
    assert learner.network.confidence is not None
    with torch.no_grad():
        odds = learner.network.confidence.minor_odds(torch.from_numpy(held_out.features)).numpy()
    assert found.after == pytest.approx(cross_entropy(held_out, odds), abs=1e-6)


def test_a_head_learns_from_part_of_the_rows_of_as_many_samples_as_take_little_time(
    source: Source, shipped: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning, held_out = source.split
    learner, asked, of = Learner(source, shipped, source.windows(shipped), 1.0), [], PanelRows.of

    def watched(self: PanelRows, samples: np.ndarray, thinning: Thinning | None = None) -> Rows:
        asked.append((samples.tolist(), thinning and thinning.share))
        return of(self, samples, thinning)

    monkeypatch.setattr(PanelRows, "of", watched)
    monkeypatch.setattr(head_module, "_MOST_SECONDS", 1e-9)
    monkeypatch.setattr(head_module, "_LEAST_SAMPLES", 4)
    monkeypatch.setattr(head_module, "_MOST_ROWS", 100)
    found = learner.fit_head()
    assert found is not None and found.rows == pytest.approx(100, rel=0.4)
    chosen = [*map(int, learning[np.linspace(0, len(learning) - 1, 4).round().astype(int)])]
    (first, whole), (second, share) = asked
    assert (first, whole, second) == (held_out.tolist(), None, chosen) and 0 < share < 0.5


def test_no_head_is_fitted_where_haplotypes_are_not_copied_or_the_transformer_takes_long(
    make_source: MakeSource, make_model: MakeModel, shipped: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = make_source(transformer=False), make_model("embrag.model.fusion=rare_variant")
    assert source.stretches(other) == []
    assert Learner(source, other, source.windows(other), 1.0).fit_head() is None
    monkeypatch.setattr(head_module, "_MOST_SECONDS", 1e-3)
    assert Learner(source, shipped, source.windows(shipped), 1.0).fit_head() is not None
    with_transformer = make_source(transformer=True)
    assert Learner(with_transformer, shipped, source.windows(shipped), 1.0).fit_head() is None
