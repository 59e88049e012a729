"""How far to trust the copied dosage: a correction of its log-odds from what it rests on.

A copying model is too sure of rare alleles: that a haplotype is copied here does not say that the allele, which
may be younger than their common ancestor, was copied with it. How long the match is, how many haplotypes
share it, and how far the next typed site lies tell how likely that is. The correction is a small network
per site, the same at every site of every panel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embrag_ds.model.pooling import Evidence
from embrag_ds.model.recompute import computed_again

_FEATURES = 11
_SHORTEST_CM = 1e-3
_RAREST = 1e-5
_SITES_AT_ONCE = 8192


class ConfidenceHead(nn.Module):
    """Adds a learned correction, which starts at zero, to the prior's log-odds.

    It speaks of the panel's minor allele: turning REF and ALT round turns its answer round.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(_FEATURES, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, prior: Tensor, evidence: Evidence, frequency: Tensor) -> Tensor:
        """Correction float32 [B, L] of the log-odds of ALT, ``prior`` [B, L]; ``frequency`` [B, L] is ALT's."""
        sign = torch.where(frequency > 0.5, -1.0, 1.0)
        features = confidence_features(sign * prior.detach(), sign, evidence, frequency)
        features = features.to(next(self.parameters()).dtype)
        if torch.is_grad_enabled() or features.device.type != "cpu":
            correction = computed_again(self.layers, features)
        else:  # what is between the layers stays in the processor's caches
            pieces = features.flatten(0, 1).split(_SITES_AT_ONCE)
            correction = torch.cat([self.layers(each) for each in pieces]).view(*sign.shape, 1)
        return sign * correction[..., 0].float()


def confidence_features(minor_odds: Tensor, sign: Tensor, evidence: Evidence, frequency: Tensor) -> Tensor:
    """What the head sees, float32 [B, L, 11], each of the order of 1."""
    turned = sign < 0
    own = torch.where(turned, evidence.ref_length, evidence.alt_length)
    others = torch.where(turned, evidence.alt_length, evidence.ref_length)
    share = torch.where(turned, 1 - evidence.share, evidence.share)
    maf = torch.minimum(frequency, 1 - frequency).clamp_min(_RAREST)
    features = [
        minor_odds / 4,
        (minor_odds / 4).square() / 4,
        maf.log() / 4,
        _log_cm(own),
        _log_cm(others),
        evidence.uncertainty,
        (share.clamp_min(1e-4).log() - maf.log()) / 4,
        _log_cm(evidence.nearest),
        _log_cm(evidence.gap),
        evidence.density.log() / 2,
        torch.where(turned, -evidence.disagreement, evidence.disagreement) / 4,
    ]
    return torch.stack(features, dim=-1)


def _log_cm(length: Tensor) -> Tensor:
    return (length + _SHORTEST_CM).log() / 3
