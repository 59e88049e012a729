"""Dependence of a sample's haplotypes, fitted to genotypes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from embrag_ds.adaptation.pairs import LEAST_SAMPLES, Pairs, fit_dependence
from embrag_ds.dependence import INDEPENDENT, Dependence


def drawn(dependence: Dependence, samples: int = 40, sites: int = 1500, seed: int = 1) -> list[Pairs]:
    """Genotypes drawn from the joint distribution itself, cell by cell, in two windows."""
    rng = np.random.default_rng(seed)
    p, q = rng.beta(0.4, 0.6, (2, sites, samples))
    less = dependence.less(p, q)
    cells = np.stack([(1 - p) * (1 - q) - less, p * (1 - q) + less, q * (1 - p) + less, p * q - less])
    cell = (rng.random(p.shape) > cells.cumsum(axis=0)[:3]).sum(axis=0)
    truth = np.array([0, 1, 1, 2], dtype=np.uint8)[cell]
    probability, diploid = np.stack([p, q], axis=-1).astype(np.float32), np.ones(p.shape, dtype=bool)
    half = sites // 2
    return [Pairs(probability[part], truth[part], diploid[part]) for part in (slice(0, half), slice(half, None))]


@pytest.mark.parametrize(("opposite", "alike"), [(0.5, 0.0), (0.0, 0.9), (0.3, 0.2)])
def test_a_dependence_is_found_again(opposite: float, alike: float) -> None:
    found = fit_dependence(drawn(Dependence(opposite, alike)))
    assert found.dependence.opposite == pytest.approx(opposite, abs=0.05)
    assert found.dependence.alike == pytest.approx(alike, abs=0.05)
    assert found.gain > 2 * found.error > 0


@pytest.mark.parametrize("seed", range(5))
def test_independent_haplotypes_stay_independent(seed: int) -> None:
    found = fit_dependence(drawn(INDEPENDENT, seed=seed))
    assert found.dependence.opposite + found.dependence.alike < 0.03
    assert found.gain < 0.1


def test_a_gain_of_one_sample_alone_is_not_certain() -> None:
    """One sample of forty is inbred: what it gains says nothing of the others."""
    independent, inbred = drawn(INDEPENDENT), drawn(Dependence(alike=1.0))
    mixed = [
        replace(one, truth=np.where(np.arange(40) == 3, other.truth, one.truth))
        for one, other in zip(independent, inbred, strict=True)
    ]
    assert fit_dependence(mixed).dependence == INDEPENDENT


def test_a_gain_within_its_error_is_not_taken() -> None:
    weak = Dependence(opposite=0.1)
    found = [fit_dependence(drawn(weak, samples=12, sites=300, seed=seed)) for seed in range(12)]
    assert all((each.dependence != INDEPENDENT) is (each.gain > 2 * each.error) for each in found)
    assert any(0 < each.gain <= 2 * each.error for each in found) and any(each.gain > 2 * each.error for each in found)


def test_few_samples_say_nothing() -> None:
    dependence = Dependence(alike=0.9)
    assert fit_dependence(drawn(dependence, samples=LEAST_SAMPLES - 1)).dependence == INDEPENDENT
    assert fit_dependence(drawn(dependence, samples=LEAST_SAMPLES)).dependence != INDEPENDENT
    assert fit_dependence([]).dependence == INDEPENDENT


def test_haploid_genotypes_do_not_count() -> None:
    """Both their haplotypes are one, which would look alike."""
    pairs = drawn(INDEPENDENT)
    males = np.arange(40) < 15
    haploid = [
        replace(
            each,
            probability=np.where(males[:, None], each.probability[..., :1], each.probability),
            truth=np.where(males, 2 * (each.probability[..., 0] > 0.5), each.truth).astype(np.uint8),
        )
        for each in pairs
    ]
    assert fit_dependence(haploid).dependence.alike > 0.1
    known = [replace(each, diploid=np.broadcast_to(~males, each.truth.shape)) for each in haploid]
    assert fit_dependence(known).dependence.alike < 0.03
