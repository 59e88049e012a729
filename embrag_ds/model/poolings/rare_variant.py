"""Pooling by distance: a neighbour has one weight for all sites."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embrag_ds.model.pooling import Pooled, at_typed, membership
from embrag_ds.ops.dosage import FlankingSites, expected_allele
from embrag_ds.retrieval.batch import Batch, Retrieved


class DistancePooling(nn.Module):
    """Pooling with one weight per neighbour for all sites: a softmax of its negative distance to the query.

    The distance is the sum over mismatches at typed sites of the embedding's site weights (mean 1), times a learned
    strength.
    """

    gives_evidence = False

    def __init__(self) -> None:
        super().__init__()
        self.log_strength = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch, retrieved: Retrieved, site_weight: Tensor) -> Pooled:
        """Pool the neighbours ``retrieved``; ``site_weight`` float32 [L], of mean 1, is the weight of a mismatch."""
        distance = (retrieved.mismatch * at_typed(site_weight, batch)[..., None]).sum(1)
        weights = torch.softmax(-self.log_strength.float().exp() * distance, dim=1)
        # The same weights at all sites: a posterior at one typed site, which flanks every site on both sides.
        posterior, origin = weights[:, None], torch.zeros_like(batch.core.tokens)
        flanking = FlankingSites(origin, origin, torch.zeros_like(batch.core.frequency))
        ancestry = posterior @ membership(batch, retrieved)
        sites = batch.core.tokens.shape[1]
        return Pooled(
            dosage=expected_allele(retrieved.alleles, posterior, flanking),
            ancestry=ancestry.mT.expand(-1, -1, sites),
            weights=None if retrieved.embeddings is None else posterior.mT.expand(-1, -1, sites),
            evidence=None,
        )
