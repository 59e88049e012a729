"""Errors added to queries: switch errors keep genotypes, and typing errors keep the truth of masked sites."""

from __future__ import annotations

import numpy as np
import pytest

from embrag_ds.data.sampler import AugmentationConfig, augmented
from embrag_ds.errors import UserError


def case(samples: int = 40, sites: int = 500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    alleles = rng.integers(0, 2, (2 * samples, sites), dtype=np.uint8)
    return alleles, rng.random((samples, sites)) < 0.7, np.cumsum(rng.random(sites)) * 0.01


def applied(settings: AugmentationConfig, epoch: int = 0, samples: np.ndarray | None = None) -> np.ndarray:
    alleles, masked, position = case()
    chosen = np.arange(40) if samples is None else samples
    rows = (2 * chosen[:, None] + np.arange(2)).reshape(-1)
    return augmented(settings, alleles[rows], masked[chosen], position, 5, epoch, 3, chosen)


def test_without_errors_nothing_changes() -> None:
    assert np.array_equal(applied(AugmentationConfig()), case()[0])


def test_switch_errors_keep_genotypes_and_have_the_given_rate() -> None:
    alleles, _, position = case()
    changed = applied(AugmentationConfig(switch_errors_per_cm=2.0))
    assert np.array_equal(changed[0::2] + changed[1::2], alleles[0::2] + alleles[1::2])
    # A switch error changes the side of the ALT allele between two heterozygous sites.
    changes = expected = 0.0
    for sample in range(40):
        het = np.flatnonzero(alleles[2 * sample] != alleles[2 * sample + 1])
        side = changed[2 * sample, het] == alleles[2 * sample, het]
        changes += np.abs(np.diff(side.astype(int))).sum()
        expected += (-np.expm1(-4.0 * np.diff(position[het])) / 2).sum()
    assert abs(changes - expected) < 4 * np.sqrt(expected) and expected > 100


def test_typing_errors_are_at_observed_sites_only_and_have_the_given_rate() -> None:
    alleles, masked, _ = case()
    wrong = applied(AugmentationConfig(typing_error=0.05)) != alleles
    observed = ~np.repeat(masked, 2, axis=0)
    assert not (wrong & ~observed).any()
    assert wrong[observed].mean() == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / observed.sum()))


def test_a_samples_errors_depend_on_the_epoch_and_not_on_its_batch() -> None:
    settings = AugmentationConfig(0.05, 2.0)
    together = applied(settings)
    assert np.array_equal(applied(settings, samples=np.array([7]))[:2], together[14:16])
    assert not np.array_equal(applied(settings, epoch=1), together)


@pytest.mark.parametrize("settings", [{"typing_error": 0.5}, {"typing_error": -0.1}, {"switch_errors_per_cm": -1.0}])
def test_bad_settings_are_user_errors(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"embrag\.augmentation"):
        AugmentationConfig(**settings)
