"""How K retrieved haplotypes become one reference signal per site.

Each neighbour gets a weight at every site; the weighted allele is a dosage, and because an embedding
takes one of V values per site the weighted embedding is the same mixture of codebook rows. So K
neighbours cost the transformer no more than one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embrag_ds.data.tokens import ALT, MASK, REF
from embrag_ds.retrieval.collate import Batch, Retrieved


@dataclass(frozen=True)
class Pooled:
    """``dosage`` float32 [B, L]: weighted ALT share of the neighbours; ``weights`` float32 [B, K, L] sum
    to 1 over K; ``ancestry`` float32 [B, P, L]: weight on each population."""

    dosage: Tensor
    weights: Tensor
    ancestry: Tensor


class LocalMatchPooling(nn.Module):
    """Weights by local match: a softmax over neighbours of their mismatches near the site.

    The score of neighbour k at site l is ``- sum over observed l' of w_l' mismatch[k, l'] kernel(l, l')``
    with a mixture of exponential kernels in genetic distance, whose lengths and strengths are learned.
    """

    _INITIAL_CM = (0.03, 0.3, 3.0)
    _INITIAL_STRENGTH = (1.0, 1.0, 0.3)

    def __init__(self) -> None:
        super().__init__()
        self.log_length = nn.Parameter(torch.tensor(self._INITIAL_CM).log())
        self.log_strength = nn.Parameter(torch.tensor(self._INITIAL_STRENGTH).log())

    def forward(
        self, batch: Batch, retrieved: Retrieved, site_weight: Tensor
    ) -> Pooled:
        """``site_weight`` [L], mean 1: the learned weight of disagreement at a site."""
        shown, position = batch.shown, batch.sites.position
        query = batch.tokens[:, None, shown]
        differs = (retrieved.alleles[:, :, shown] != query) & (query < MASK)
        mismatch = differs.float() * site_weight[shown]
        distance = (position[shown, None] - position).abs()
        length = self.log_length.float().exp()[:, None, None]
        strength = self.log_strength.float().exp()[:, None, None]
        kernel = (strength * torch.exp(-distance / length)).sum(0)
        weights = torch.softmax(-(mismatch @ kernel), dim=1)
        dosage = (weights * retrieved.alleles).sum(1)
        populations = len(batch.sites.population_frequency)
        member = nn.functional.one_hot(retrieved.population, populations).float()
        return Pooled(dosage, weights, member.transpose(1, 2) @ weights)


def pooled_embedding(pooled: Pooled, retrieved: Retrieved, codebook: Tensor) -> Tensor:
    """The neighbours' weighted embedding [B, L, D].

    From the codebook: ``C[REF] + dosage (C[ALT] - C[REF])``. From the dense store's rows: the same sum,
    written out.
    """
    if retrieved.embeddings is not None:
        return torch.einsum("bkl,bkld->bld", pooled.weights.to(retrieved.embeddings.dtype), retrieved.embeddings)
    reference = codebook[:, REF]
    step = codebook[:, ALT] - reference
    return reference + pooled.dosage[..., None].to(step.dtype) * step
