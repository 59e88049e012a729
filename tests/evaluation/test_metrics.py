"""Accuracy measures, compared with numpy's own functions and slow, obvious counts."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.evaluation import metrics
from embrag_ds.evaluation.metrics import BIN_NAMES, MAF_BINS

SEEDS = st.integers(0, 2**32 - 1)


def simulate(seed: int, sites: int = 60, samples: int = 12, missing: float = 0.1):
    """Random truth, dosage and genotype probabilities, with panel frequencies in every bin on both sides of 0.5."""
    rng = np.random.default_rng(seed)
    maf = rng.choice([0.0005, 0.002, 0.007, 0.03, 0.3], size=sites)
    panel_af = np.where(rng.random(sites) < 0.5, maf, 1.0 - maf)
    common = np.clip(panel_af, 0.1, 0.9)  # more carriers than the frequency implies, so that r2 is defined
    truth = rng.binomial(2, common[:, None], size=(sites, samples)).astype(np.float64)
    gp = rng.dirichlet([0.5, 0.5, 0.5], size=(sites, samples))
    gp[np.arange(sites)[:, None], np.arange(samples), truth.astype(int)] += 1.0
    gp /= 2.0
    truth[rng.random(truth.shape) < missing] = np.nan
    return truth, gp[..., 1] + 2.0 * gp[..., 2], gp, panel_af


def expected_bins(af: float) -> set[str]:
    maf = min(af, 1.0 - af)
    names = {each.name for each in MAF_BINS[:5] if each.low <= maf < each.high}
    return names | {"all"} | ({"all <1 %"} if maf < 0.01 else set())


@pytest.mark.parametrize(
    ("copies", "name"),
    [
        (0, "<0.1 %"),
        (4, "<0.1 %"),
        (5, "0.1-0.5 %"),
        (24, "0.1-0.5 %"),
        (25, "0.5-1 %"),
        (50, "1-5 %"),
        (250, "5-50 %"),
    ],
)
def test_lower_edges_belong_to_the_bin_whichever_allele_is_minor(copies: int, name: str) -> None:
    members = metrics.bin_members(np.array([copies / 5000, (5000 - copies) / 5000]))
    assert members[BIN_NAMES.index(name)].all()
    assert (members[:5].sum(axis=0) == 1).all()


def test_frequency_of_one_half_is_in_the_last_bin() -> None:
    assert metrics.bin_members(np.array([0.5]))[BIN_NAMES.index("5-50 %"), 0]


@given(SEEDS, st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_aggregate_r2_is_the_pooled_correlation(seed: int, block: int) -> None:
    truth, dosage, _, af = simulate(seed)
    accumulator = metrics.AggregateR2(truth.shape[1])
    for start in range(0, len(af), block):
        rows = slice(start, start + block)
        accumulator.add(truth[rows], dosage[rows], af[rows])
    result = accumulator.result()
    for name in BIN_NAMES:
        x: list[float] = []
        y: list[float] = []
        sites = 0
        for row, frequency in enumerate(af):
            if name not in expected_bins(frequency):
                continue
            sites += 1
            for sample in range(truth.shape[1]):
                if math.isnan(truth[row, sample]):
                    continue
                flip = frequency > 0.5
                x.append(2 - truth[row, sample] if flip else truth[row, sample])
                y.append(2 - dosage[row, sample] if flip else dosage[row, sample])
        assert accumulator.sites()[name] == sites
        if sites == 0 or np.ptp(x) == 0:
            assert math.isnan(result[name])
        else:
            assert result[name] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-9)


def test_polarity_matters() -> None:
    """Two equally well imputed sites have opposite minor alleles; unpolarised pooling gives less than 1."""
    truth = np.array([[0, 0, 0, 1], [2, 2, 1, 2]], dtype=float)
    dosage = np.array([[0, 0, 0, 0.5], [2, 2, 1.5, 2]])
    accumulator = metrics.AggregateR2(4)
    accumulator.add(truth, dosage, np.array([0.1, 0.9]))
    assert accumulator.result()["5-50 %"] == pytest.approx(1.0)


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.3, 2.0])
def test_no_variance_gives_nan(constant: float) -> None:
    truth = np.random.default_rng(0).integers(0, 3, (50, 20)).astype(float)
    accumulator = metrics.AggregateR2(20)
    accumulator.add(truth, np.full(truth.shape, constant), np.full(50, 0.2))
    assert math.isnan(accumulator.result()["5-50 %"])
    assert math.isnan(accumulator.result()["<0.1 %"])


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_resampling_equals_repeating_samples(seed: int) -> None:
    truth, dosage, _, af = simulate(seed, missing=0.0)
    samples = truth.shape[1]
    accumulator = metrics.AggregateR2(samples)
    accumulator.add(truth, dosage, af)
    weights = metrics.bootstrap_weights(samples, 3, seed)
    assert (weights.sum(axis=1) == samples).all()
    for row, values in zip(weights, accumulator.resample(weights), strict=True):
        drawn = np.repeat(np.arange(samples), row.astype(int))
        repeated = metrics.AggregateR2(samples)
        repeated.add(truth[:, drawn], dosage[:, drawn], af)
        np.testing.assert_allclose(values, list(repeated.result().values()), rtol=1e-9, atol=1e-12)


def test_bootstrap_is_seeded_and_paired_differences_are_tighter() -> None:
    truth, dosage, _, af = simulate(1, sites=400, samples=40, missing=0.0)
    slightly_worse = dosage + np.random.default_rng(2).normal(0, 0.1, dosage.shape)
    a, b = metrics.AggregateR2(40), metrics.AggregateR2(40)
    a.add(truth, dosage, af)
    b.add(truth, slightly_worse, af)
    weights = metrics.bootstrap_weights(40, 300, seed=7)
    np.testing.assert_array_equal(weights, metrics.bootstrap_weights(40, 300, seed=7))
    low, high = metrics.interval(a.resample(weights))["all"]
    assert low < a.result()["all"] < high
    paired_low, paired_high = metrics.interval(a.resample(weights) - b.resample(weights))["all"]
    other = metrics.bootstrap_weights(40, 300, seed=8)
    loose_low, loose_high = metrics.interval(a.resample(weights) - b.resample(other))["all"]
    assert paired_low > 0
    assert paired_high - paired_low < 0.8 * (loose_high - loose_low)


def test_interval_of_an_empty_bin_is_nan() -> None:
    low, high = metrics.interval(np.full((10, len(MAF_BINS)), np.nan))["all"]
    assert math.isnan(low) and math.isnan(high)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_site_r2_matches_corrcoef(seed: int) -> None:
    truth, dosage, _, _ = simulate(seed, sites=20, samples=6)
    for row, value in enumerate(metrics.site_r2(truth, dosage)):
        known = ~np.isnan(truth[row])
        if not known.any() or np.ptp(truth[row][known]) == 0:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(np.corrcoef(truth[row][known], dosage[row][known])[0, 1] ** 2, abs=1e-9)


def test_site_r2_of_a_constant_dosage_is_zero_where_the_truth_varies() -> None:
    values = metrics.site_r2(np.array([[0.0, 1.0], [1.0, 1.0]]), np.full((2, 2), 0.3))
    assert values[0] == 0.0 and math.isnan(values[1])


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_concordance_matches_counting(seed: int) -> None:
    truth, _, gp, af = simulate(seed, sites=20, samples=6)
    called = metrics.best_guess(np.empty(0), gp)
    accumulator = metrics.Concordance()
    accumulator.add(truth[:8], called[:8], af[:8])
    accumulator.add(truth[8:], called[8:], af[8:])
    overall, non_reference = accumulator.result()
    for name in BIN_NAMES:
        agree: list[bool] = []
        agree_carrier: list[bool] = []
        for row, sample in product(range(20), range(6)):
            t, c = truth[row, sample], called[row, sample]
            if name not in expected_bins(af[row]) or math.isnan(t):
                continue
            agree.append(t == c)
            major = 2 if af[row] > 0.5 else 0
            if t != major or c != major:
                agree_carrier.append(t == c)
        assert overall[name] == pytest.approx(np.mean(agree) if agree else math.nan, nan_ok=True)
        assert non_reference[name] == pytest.approx(np.mean(agree_carrier) if agree_carrier else math.nan, nan_ok=True)


def test_best_guess_treats_both_alleles_alike() -> None:
    dosage = np.array([0.0, 0.49, 0.5, 0.51, 1.0, 1.49, 1.5, 1.51, 2.0])
    np.testing.assert_array_equal(metrics.best_guess(dosage), 2 - metrics.best_guess(2 - dosage))
    np.testing.assert_array_equal(metrics.best_guess(dosage), [0, 0, 0, 1, 1, 1, 2, 2, 2])


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_iqs_matches_the_agreement_table_of_lin_2010(seed: int) -> None:
    truth, _, gp, _ = simulate(seed, sites=10, samples=8)
    for row, value in enumerate(metrics.iqs(truth, gp)):
        table = np.zeros((3, 3))  # imputed genotype by true genotype
        for sample in range(8):
            if not math.isnan(truth[row, sample]):
                table[:, int(truth[row, sample])] += gp[row, sample]
        if table.sum() == 0:
            assert math.isnan(value)
            continue
        observed = np.trace(table) / table.sum()
        chance = (table.sum(axis=0) * table.sum(axis=1)).sum() / table.sum() ** 2
        assert value == pytest.approx((observed - chance) / (1 - chance), abs=1e-9)


def test_iqs_extremes() -> None:
    truth = np.array([[0.0, 1.0, 2.0, 0.0]])
    assert metrics.iqs(truth, metrics.one_hot(truth.astype(int)))[0] == pytest.approx(1.0)
    assert metrics.iqs(truth, metrics.one_hot(np.zeros((1, 4), dtype=int)))[0] == pytest.approx(0.0)
    monomorphic = np.zeros((1, 4))
    assert math.isnan(metrics.iqs(monomorphic, metrics.one_hot(monomorphic.astype(int)))[0])


def test_calibration_of_calibrated_and_overconfident_probabilities() -> None:
    rng = np.random.default_rng(0)
    gp = rng.dirichlet([1, 1, 1], size=(400, 100))
    drawn = (rng.random((400, 100, 1)) > gp.cumsum(axis=-1)[..., :2]).sum(axis=-1).astype(float)
    honest = metrics.Calibration()
    honest.add(drawn[:100], gp[:100])
    honest.add(drawn[100:], gp[100:])
    assert honest.result() < 0.01
    certain = metrics.Calibration()
    certain.add(drawn, metrics.one_hot(gp.argmax(axis=-1)))
    wrong = (gp.argmax(axis=-1) != drawn).mean()
    assert certain.result() == pytest.approx(wrong)
    assert math.isnan(metrics.Calibration().result())


def test_calibration_by_hand() -> None:
    accumulator = metrics.Calibration()
    gp = np.array([[[0.8, 0.2, 0.0], [0.8, 0.1, 0.1], [0.4, 0.35, 0.25], [1.0, 0.0, 0.0]]])
    accumulator.add(np.array([[0.0, 1.0, 0.0, np.nan]]), gp)
    assert accumulator.result() == pytest.approx((abs(1 - 1.6) + abs(1 - 0.4)) / 3)
    assert accumulator.curve() == [(pytest.approx(0.4), 1.0, 1), (pytest.approx(0.8), 0.5, 2)]
    some = metrics.Calibration()
    some.add(np.array([[0.0, 1.0, 0.0, np.nan]]), gp, np.array([[True, False, False, True]]))
    assert some.curve() == [(pytest.approx(0.8), 1.0, 1)]


def test_estimate_correlation_leaves_out_undefined_sites() -> None:
    estimated = np.array([0.1, 0.5, 0.9, np.nan, 0.2])
    true = np.array([0.2, 0.4, 0.8, 0.1, np.nan])
    af = np.array([0.3, 0.4, 0.004, 0.004, 0.2])
    found = metrics.estimate_correlation(estimated, true, af)
    assert found["all"] == pytest.approx(np.corrcoef(estimated[:3], true[:3])[0, 1])
    assert found["5-50 %"] == pytest.approx(1.0) and math.isnan(found["all <1 %"])
    assert math.isnan(metrics.estimate_correlation(np.ones(3), true[:3], af[:3])["all"])


def test_by_bin_is_the_mean_over_defined_sites() -> None:
    means = metrics.by_bin(np.array([0.2, 0.4, np.nan, 0.9]), np.array([0.3, 0.7, 0.4, 0.0001]))
    assert means["5-50 %"] == pytest.approx(0.3)
    assert means["<0.1 %"] == pytest.approx(0.9)
    assert means["all"] == pytest.approx(0.5)
    assert math.isnan(means["1-5 %"])
