"""Gated fusion of query embeddings with the pooled embeddings of retrieved haplotypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embrag_ds.model.embedding import frequency_features
from embrag_ds.model.numbers import FREQUENCY_FEATURES


class GatedFusion(nn.Module):
    """Gated mixture of query, reference and allele frequency features, per site and channel.

    A learned gate, which may depend on how rare the allele is, sets the share of the reference embedding. The
    frequencies are the overall one and the one expected for this haplotype: that in each population, weighted by the
    populations of its neighbours.
    """

    def __init__(self, dims: int):
        super().__init__()
        self.frequency = nn.Linear(2 * FREQUENCY_FEATURES, dims)
        self.gate = nn.Linear(3 * dims, dims)
        self.mix = nn.Linear(3 * dims, dims)
        self.norm = nn.LayerNorm(dims)

    def forward(self, query: Tensor, reference: Tensor, frequency: Tensor, expected: Tensor) -> Tensor:
        """Fused embeddings [B, L, D] of ``query`` and ``reference`` [B, L, D].

        ``frequency`` [B, L] is the overall ALT frequency and ``expected`` [B, L] that expected from the ancestry. The
        activations take more memory than half a transformer block and little time to compute. So callers recompute them
        in the backward pass (:func:`~embrag_ds.model.recompute.computed_again`).
        """
        features = frequency_features(torch.stack([frequency, expected], dim=-1))  # half the launches of two calls
        rarity = self.frequency(features.flatten(-2).to(query.dtype))
        together = torch.cat([query, reference, rarity], dim=-1)
        gate, mixed = torch.sigmoid(self.gate(together)), self.mix(together)
        # Under autocast the products have another type than the inputs.
        return self.norm(query + torch.lerp(mixed, reference.to(mixed.dtype), gate.to(mixed.dtype)))
