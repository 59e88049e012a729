"""Losses on logits, mean per masked site.

With two alleles a haplotype's two logits carry one number, their difference ``z = log P(ALT) / P(REF)``;
the two-class cross-entropy of (0, z) is the binary one used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from embrag_ds.errors import require
from embrag_ds.settings import strict_settings


@strict_settings
class LossConfig:
    """Loss on logits, mean per masked site."""

    kind: Literal["cross_entropy", "focal", "brier"] = "cross_entropy"
    """``brier``, the squared error of the probabilities, is what dosage r2 measures; like cross-entropy it is least
    where probabilities are calibrated, but it does not spend itself on alleles that nothing foretells."""
    focal_gamma: float = 2.0
    haplotype_weight: float = 1.0
    genotype_weight: float = 0.5
    rarity: float = 0.0
    """A site counts in proportion to its minor-allele frequency to the power of minus this (all alleles that the
    embedding layer sees as rare alike); 0: all sites alike."""

    def __post_init__(self) -> None:
        require(self.focal_gamma >= 0, "loss.focal_gamma", "must not be negative")
        require(0 <= self.rarity <= 1, "loss.rarity", "must lie between 0 and 1")
        require(
            min(self.haplotype_weight, self.genotype_weight) >= 0 and self.haplotype_weight + self.genotype_weight > 0,
            "loss",
            "weights must not be negative and not all zero",
        )


@dataclass(frozen=True)
class Losses:
    """``total`` is what is minimised; the parts are means per masked site (nats), unweighted."""

    total: Tensor
    haplotype: Tensor
    genotype: Tensor


def allele_log_probabilities(logits: Tensor) -> Tensor:
    """log P(REF), log P(ALT) of log-odds [...]: [..., 2]."""
    return torch.stack([logsigmoid(-logits), logsigmoid(logits)], dim=-1)


def genotype_log_probabilities(logits: Tensor) -> Tensor:
    """log P(0, 1, 2 copies of ALT) of a sample from its two haplotypes' log-odds [B, ...]: [N, ..., 3].

    The genotype head has no parameters of its own: given the haplotypes' logits their alleles are
    independent, so genotype and haplotype calls can never contradict each other.
    """
    pair = allele_log_probabilities(logits).unflatten(0, (-1, 2))
    one, other = pair[:, 0], pair[:, 1]
    het = torch.logaddexp(one[..., 0] + other[..., 1], one[..., 1] + other[..., 0])
    return torch.stack([one[..., 0] + other[..., 0], het, one[..., 1] + other[..., 1]], dim=-1)


def imputation_loss(logits: Tensor, alleles: Tensor, scored: Tensor, frequency: Tensor, settings: LossConfig) -> Losses:
    """The training loss: ``logits`` [B, L] log-odds of ALT, ``alleles`` [B, L], ``scored`` bool [B, L], the same
    for both haplotypes of a sample; ``frequency`` [L] of ALT is the site's, whoever is asked about."""
    logits = logits.float()
    weight = scored * torch.minimum(frequency, 1 - frequency).clamp_min(1e-6) ** -settings.rarity
    haplotype = _weighted_mean(allele_log_probabilities(logits), alleles, weight, settings)
    genotypes = alleles.unflatten(0, (-1, 2)).sum(1)
    genotype = _weighted_mean(genotype_log_probabilities(logits), genotypes, weight[::2], settings)
    total = settings.haplotype_weight * haplotype + settings.genotype_weight * genotype
    return Losses(total, haplotype, genotype)


def _weighted_mean(log_probabilities: Tensor, truth: Tensor, weight: Tensor, settings: LossConfig) -> Tensor:
    """Weighted mean over sites of -(1 - p)^gamma log p (focal, Lin et al. 2017; gamma 0 is cross-entropy), or of the
    Brier score (Brier 1950), the sum over classes of the squared error."""
    if settings.kind == "brier":
        cost = (log_probabilities.exp() - one_hot(truth, log_probabilities.shape[-1])).square().sum(-1)
    else:
        chosen = log_probabilities.gather(-1, truth[..., None])[..., 0]
        cost = -chosen
        if settings.kind == "focal":
            # The floor keeps the slope of a fractional power finite where p is 1.
            cost = cost * (-torch.expm1(chosen)).clamp_min(1e-8) ** settings.focal_gamma
    return (cost * weight).sum() / weight.sum().clamp_min(1e-6)
