"""Losses against explicit loops over sites."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.errors import UserError
from embrag_ds.model.losses import (
    allele_log_probabilities,
    genotype_log_probabilities,
    imputation_loss,
)
from embrag_ds.model.settings import LossConfig


def random_case(seed: int, samples: int, sites: int, rate: float = 0.5):
    maker = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2 * samples, sites, generator=maker, dtype=torch.float64)
    alleles = torch.randint(0, 2, (2 * samples, sites), generator=maker)
    masked = (torch.rand(samples, sites, generator=maker) < rate).repeat_interleave(2, 0)
    return logits.float(), alleles, masked


def loss_of(chances: list[float], truth: int, gamma: float | None) -> float:
    """Focal loss of one prediction, or its Brier score if ``gamma`` is None."""
    if gamma is None:
        return sum((share - (place == truth)) ** 2 for place, share in enumerate(chances))
    return -((1 - chances[truth]) ** gamma) * math.log(chances[truth])


def alt_probability(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


EVEN = torch.tensor([0.5])


def slow_losses(logits, alleles, masked, gamma: float | None, weights: list[float]) -> tuple[float, float]:
    """Haplotype and genotype loss by explicit loops, with ``weights`` of the sites."""
    samples, sites = len(logits) // 2, logits.shape[1]
    haplotype: list[float] = []
    genotype: list[float] = []
    total = 0.0
    for sample in range(samples):
        for site in range(sites):
            if not masked[2 * sample, site]:
                continue
            total += weights[site]
            one, two = (alt_probability(float(logits[2 * sample + i, site])) for i in range(2))
            for i, share in enumerate((one, two)):
                loss = loss_of([1 - share, share], int(alleles[2 * sample + i, site]), gamma)
                haplotype.append(weights[site] * loss)
            # Both phases of a heterozygote count as one genotype.
            chances = [(1 - one) * (1 - two), one * (1 - two) + (1 - one) * two, one * two]
            count = int(alleles[2 * sample, site]) + int(alleles[2 * sample + 1, site])
            genotype.append(weights[site] * loss_of(chances, count, gamma))
    return sum(haplotype) / max(2 * total, 1e-9), sum(genotype) / max(total, 1e-9)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    samples=st.integers(1, 3),
    sites=st.integers(1, 8),
    rate=st.sampled_from([0.1, 0.5, 1.1]),
    gamma=st.sampled_from(["brier", None, 0.0, 0.5, 1.0, 2.0, 3.7]),
    weights=st.sampled_from([(1.0, 0.5), (0.0, 2.0), (3.0, 0.0)]),
    rarity=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_losses_equal_plain_loops(seed, samples, sites, rate, gamma, weights, rarity) -> None:
    logits, alleles, masked = random_case(seed, samples, sites, rate)
    kind = {"brier": "brier", None: "cross_entropy"}.get(gamma, "focal")
    config = LossConfig(kind, gamma if kind == "focal" else 2.0, *weights, rarity)
    frequency = torch.rand(sites, generator=torch.Generator().manual_seed(seed)).clamp(0.01, 0.99)
    found = imputation_loss(logits, alleles, masked, frequency, config)
    by_site = [min(f, 1 - f) ** -rarity for f in frequency.tolist()]
    haplotype, genotype = slow_losses(logits, alleles, masked, None if kind == "brier" else gamma or 0.0, by_site)
    assert float(found.haplotype) == pytest.approx(haplotype, rel=1e-4, abs=1e-6)
    assert float(found.genotype) == pytest.approx(genotype, rel=1e-4, abs=1e-6)
    assert float(found.total) == pytest.approx(weights[0] * haplotype + weights[1] * genotype, rel=1e-4, abs=1e-6)


def test_the_mean_is_per_masked_site_whatever_is_observed_beside_them() -> None:
    logits, alleles, masked = random_case(1, 2, 6)
    wide = [torch.cat([part, part], dim=1) for part in (logits, alleles)]
    observed = torch.cat([masked, torch.zeros_like(masked)], dim=1)
    narrow, padded = (
        imputation_loss(logits, alleles, masked, EVEN, LossConfig()),
        imputation_loss(*wide, observed, EVEN, LossConfig()),
    )
    assert float(narrow.total) == pytest.approx(float(padded.total), rel=1e-6)


@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
def test_observed_sites_get_no_gradient(kind: str) -> None:
    logits, alleles, masked = random_case(1, 2, 20)
    logits.requires_grad_()
    imputation_loss(logits, alleles, masked, EVEN, LossConfig(kind)).total.backward()
    assert (logits.grad[~masked] == 0).all() and (logits.grad[masked] != 0).all()


@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
def test_the_loss_of_a_confident_prediction_is_zero_if_right_and_its_logit_if_wrong(kind: str) -> None:
    """With a double softmax the loss of a right prediction would be 0.31 or more."""
    _, alleles, masked = random_case(1, 2, 20)
    right = 40.0 * (2 * alleles.float() - 1)
    assert float(imputation_loss(right, alleles, masked, EVEN, LossConfig(kind)).total) < 1e-6
    wrong = imputation_loss(-right, alleles, masked, EVEN, LossConfig(kind))
    assert float(wrong.haplotype) == pytest.approx(40, rel=1e-3)


def test_the_loss_of_an_even_prediction_is_one_bit() -> None:
    _, alleles, masked = random_case(1, 2, 20)
    even = imputation_loss(torch.zeros(4, 20), alleles, masked, EVEN, LossConfig())
    assert float(even.haplotype) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
def test_the_loss_without_masked_sites_is_zero_with_finite_gradients(kind: str) -> None:
    logits, alleles, masked = random_case(1, 2, 5)
    logits.requires_grad_()
    found = imputation_loss(logits, alleles, torch.zeros_like(masked), EVEN, LossConfig(kind))
    found.total.backward()
    assert [float(part.detach()) for part in (found.total, found.haplotype, found.genotype)] == [0, 0, 0]
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("logit", [30.0, 120.0, 1e4])
def test_saturated_logits_keep_losses_and_gradients_finite(gamma: float, logit: float) -> None:
    alleles = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1]])
    logits = torch.tensor([[logit, -logit, -logit, logit], [logit, -logit, -logit, logit]], requires_grad=True)
    found = imputation_loss(logits, alleles, torch.ones(2, 4, dtype=torch.bool), EVEN, LossConfig("focal", gamma))
    found.total.backward()
    assert torch.isfinite(found.total) and torch.isfinite(logits.grad).all()


@given(seed=st.integers(0, 2**32), samples=st.integers(1, 4), scale=st.sampled_from([0.1, 3.0, 50.0]))
def test_genotype_probabilities_sum_to_one_and_follow_from_the_haplotypes(
    seed: int, samples: int, scale: float
) -> None:
    logits = scale * torch.randn(2 * samples, 7, generator=torch.Generator().manual_seed(seed))
    genotype = genotype_log_probabilities(logits).exp()
    assert genotype.shape == (samples, 7, 3)
    assert torch.allclose(genotype.sum(-1), torch.ones(samples, 7), atol=1e-5)
    alt = torch.sigmoid(logits)
    dosage = genotype[..., 1] + 2 * genotype[..., 2]
    assert torch.allclose(dosage, alt[0::2] + alt[1::2], atol=1e-5)
    assert torch.allclose(genotype[..., 2], alt[0::2] * alt[1::2], atol=1e-5)


def test_genotype_probabilities_do_not_depend_on_the_phase() -> None:
    logits = torch.randn(4, 9)
    assert torch.allclose(
        genotype_log_probabilities(logits), genotype_log_probabilities(logits[[1, 0, 3, 2]]), atol=1e-6
    )


def test_allele_probabilities_sum_to_one() -> None:
    logits = torch.tensor([-100.0, -1.0, 0.0, 2.0, 100.0])
    found = allele_log_probabilities(logits).exp()
    assert torch.allclose(found.sum(-1), torch.ones(5))
    assert torch.allclose(found[:, 1], torch.sigmoid(logits))


@pytest.mark.parametrize(
    "settings",
    [
        {"focal_gamma": -1.0},
        {"haplotype_weight": 0.0, "genotype_weight": 0.0},
        {"haplotype_weight": -1.0, "genotype_weight": 2.0},
        {"rarity": -0.5},
    ],
)
def test_bad_settings_are_user_errors(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"embrag\.loss"):
        LossConfig(**settings)
