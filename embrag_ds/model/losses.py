"""Imputation losses on the log-odds of ALT, as weighted means over masked sites.

The network's output is ``z = log P(ALT) / P(REF)`` for each haplotype and site. The binary cross-entropy of z equals
the two-class cross-entropy of the logits (0, z).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from embrag_ds.model.settings import LossConfig


class Losses(NamedTuple):
    """Losses of a batch, scalars. ``total`` is minimised; ``haplotype`` and ``genotype`` are its unweighted parts.

    The parts are means over the scored sites, in nats (without a unit for ``brier``), and have no gradient. It is a
    tuple, because DeepSpeed looks for a network's results in tuples.
    """

    total: Tensor
    haplotype: Tensor
    genotype: Tensor


def allele_log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities of REF and ALT, [..., 2], from the log-odds of ALT, [...]."""
    return torch.stack([logsigmoid(-logits), logsigmoid(logits)], dim=-1)


def genotype_log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities of 0, 1 and 2 copies of ALT, [N, ..., 3], from the haplotypes' log-odds of ALT, [B, ...].

    Given their log-odds the two alleles are independent. So genotypes need no parameters, and genotype and haplotype
    calls cannot contradict each other.
    """
    pair = allele_log_probabilities(logits).unflatten(0, (-1, 2))
    one, other = pair[:, 0], pair[:, 1]
    het = torch.logaddexp(one[..., 0] + other[..., 1], one[..., 1] + other[..., 0])
    return torch.stack([one[..., 0] + other[..., 0], het, one[..., 1] + other[..., 1]], dim=-1)


def imputation_loss(logits: Tensor, alleles: Tensor, scored: Tensor, frequency: Tensor, settings: LossConfig) -> Losses:
    """Training loss of a batch, over alleles and genotypes at the scored sites.

    ``logits`` float [B, L] are log-odds of ALT, and ``alleles`` int64 [B, L] the truth. ``scored`` bool [B, L] is the
    same for both haplotypes of a sample. ``frequency`` float32 [L] of ALT determines the weights of sites.
    """
    logits = logits.float()
    weight = scored * torch.minimum(frequency, 1 - frequency).clamp_min(1e-6) ** -settings.rarity
    haplotype = _weighted_mean(allele_log_probabilities(logits), alleles, weight, settings)
    genotypes = alleles.unflatten(0, (-1, 2)).sum(1)
    genotype = _weighted_mean(genotype_log_probabilities(logits), genotypes, weight[::2], settings)
    total = settings.haplotype_weight * haplotype + settings.genotype_weight * genotype
    return Losses(total, haplotype.detach(), genotype.detach())


def _weighted_mean(log_probabilities: Tensor, truth: Tensor, weight: Tensor, settings: LossConfig) -> Tensor:
    """Weighted mean over haplotypes or samples and sites of the loss of one prediction.

    Focal loss ``-(1 - p)^gamma log p`` (Lin et al. 2017), of which cross-entropy is the case gamma = 0; or Brier score
    (Brier 1950), the squared error summed over classes. ``log_probabilities`` [..., L, classes], ``truth`` int64
    [..., L], ``weight`` [..., L].
    """
    if settings.kind == "brier":
        loss = (log_probabilities.exp() - one_hot(truth, log_probabilities.shape[-1])).square().sum(-1)
    else:
        chosen = log_probabilities.gather(-1, truth[..., None])[..., 0]
        loss = -chosen
        if settings.kind == "focal":
            # The floor keeps the gradient of a fractional power finite where p is 1.
            loss = loss * (-torch.expm1(chosen)).clamp_min(1e-8) ** settings.focal_gamma
    return (loss * weight).sum() / weight.sum().clamp_min(1e-6)
