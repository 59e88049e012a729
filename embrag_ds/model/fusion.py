"""Fusion of the query with what was retrieved, before the transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embrag_ds.model.embedding import FREQUENCY_FEATURES, frequency_features


class GatedFusion(nn.Module):
    """Query, reference, overall and population frequency, mixed per site by learned gates.

    The document's ``EnhancedRareVariantFusion``. The population frequency is the one expected for this
    haplotype: the frequency in each population, weighted by the populations of its neighbours. A gate
    decides per site and channel how much of the reference to take, and may depend on how rare the
    allele is.
    """

    def __init__(self, dims: int):
        super().__init__()
        self.frequency = nn.Linear(2 * FREQUENCY_FEATURES, dims)
        self.gate = nn.Linear(3 * dims, dims)
        self.mix = nn.Linear(3 * dims, dims)
        self.norm = nn.LayerNorm(dims)

    def forward(self, query: Tensor, reference: Tensor, frequency: Tensor, expected: Tensor) -> Tensor:
        """``query`` and ``reference`` [B, L, D], ``frequency`` and ``expected`` [B, L] -> [B, L, D].

        What lies between would take more memory than half a block of the transformer, and takes little time:
        :func:`~embrag_ds.model.recompute.computed_again`.
        """
        features = torch.cat([frequency_features(frequency), frequency_features(expected)], dim=-1)
        rarity = self.frequency(features.to(query.dtype))
        together = torch.cat([query, reference, rarity], dim=-1)
        gate, mixed = torch.sigmoid(self.gate(together)), self.mix(together)
        # Under autocast the products are of another type than what came in.
        return self.norm(query + torch.lerp(mixed, reference.to(mixed.dtype), gate.to(mixed.dtype)))
