"""Confidence head: a learned correction of the log-odds of a copied dosage, from the evidence behind it.

A copying model is overconfident about rare alleles. A copied haplotype may carry an allele that arose after its common
ancestor with the query, which then lacks the allele. How likely that is depends on the length of the match, the number
of copied haplotypes with the allele, and the distance to typed sites. The head is a small network per site, the same
for all sites and panels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from embrag_ds.model.numbers import CONFIDENCE_FEATURES, CONFIDENCE_WIDTH, LEAST_PROBABILITY, RAREST, SHORTEST_CM
from embrag_ds.model.pooling import Evidence
from embrag_ds.model.recompute import computed_again

_SITES_AT_ONCE = 8192
"""Sites per call of the layers without gradients, few enough that their activations fit a processor's cache."""

ODDS = 4
"""Log-odds that are one unit of a feature."""


class ConfidenceHead(nn.Module):
    """Per-site network for a correction of the prior's log-odds of ALT, zero before training.

    Its features are those of the panel's minor allele, so exchanging REF and ALT reverses the sign of the correction.
    Where the minor allele is less probable than :data:`LEAST_PROBABILITY`, nothing is corrected: that is most of all
    sites, and a dosage has three decimals.
    """

    def __init__(self, width: int = CONFIDENCE_WIDTH):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(CONFIDENCE_FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, prior: Tensor, evidence: Evidence, frequency: Tensor) -> Tensor:
        """Correction float32 [B, L] of the log-odds of ALT.

        ``prior`` float32 [B, L] are those log-odds, used without gradient, and ``frequency`` float32 [B, L] is that of
        ALT.
        """
        sign = torch.where(frequency > 0.5, -1.0, 1.0)
        features = confidence_features(sign * prior.detach(), sign, evidence, frequency)
        features = features.to(next(self.parameters()).dtype)
        if torch.is_grad_enabled() or features.device.type != "cpu":
            correction = computed_again(self.layers, features)
        else:  # in pieces, so that activations stay in the processor's caches
            pieces = features.flatten(0, 1).split(_SITES_AT_ONCE)
            correction = torch.cat([self.layers(each) for each in pieces]).view(*sign.shape, 1)
        likely = minor_is_likely(prior, frequency, LEAST_PROBABILITY)
        return torch.where(likely, sign * correction[..., 0].float(), 0.0)

    def minor_odds(self, features: Tensor) -> Tensor:
        """Corrected log-odds [n] of the minor allele, from features [n, 12]."""
        corrected: Tensor = ODDS * features[:, 0] + self.layers(features)[:, 0]
        return corrected


def minor_is_likely(prior: Tensor, frequency: Tensor, least: float) -> Tensor:
    """Where the minor allele has a probability of ``least`` or more, bool [B, L], by the log-odds ``prior`` of ALT.

    ``frequency`` [B, L] is that of ALT; at exactly a half, ALT is the minor allele.
    """
    prior = prior.detach()
    return torch.where(frequency > 0.5, -prior, prior) >= math.log(least / (1 - least))


def confidence_features(minor_odds: Tensor, sign: Tensor, evidence: Evidence, frequency: Tensor) -> Tensor:
    """Input features of the head, float32 [B, L, 12], scaled to the order of 1.

    ``minor_odds`` [B, L] are the prior's log-odds of the minor allele; ``sign`` [B, L] is -1 where the minor allele is
    REF, and 1 elsewhere. ``frequency`` [B, L] is that of ALT.
    """
    turned = sign < 0
    own = torch.where(turned, evidence.ref_length, evidence.alt_length)
    others = torch.where(turned, evidence.alt_length, evidence.ref_length)
    own_number = torch.where(turned, evidence.ref_number, evidence.alt_number)
    others_number = torch.where(turned, evidence.alt_number, evidence.ref_number)
    features = [
        minor_odds / ODDS,
        (minor_odds / ODDS).square() / 4,
        log_rarity(frequency),
        log_cm(own),
        log_cm(others),
        evidence.uncertainty / 7,
        log_cm(evidence.nearest),
        log_cm(evidence.gap),
        evidence.density.log() / 2,
        torch.where(turned, -evidence.disagreement, evidence.disagreement) / 4,
        own_number.log1p() / 3,
        others_number.log1p() / 3,
    ]
    return torch.stack(features, dim=-1)


def log_rarity(frequency: Tensor) -> Tensor:
    """Scaled logarithm of the minor allele's frequency, from that of ALT."""
    return torch.minimum(frequency, 1 - frequency).clamp_min(RAREST).log() / 4


def log_cm(length: Tensor) -> Tensor:
    """Scaled logarithm of a length in cM, finite at 0."""
    return (length + SHORTEST_CM).log() / 3
