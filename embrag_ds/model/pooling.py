"""How K retrieved haplotypes become one reference signal per site.

Each neighbour gets a weight at every site; the weighted allele is a dosage, and because an embedding
takes one of V values per site the weighted embedding is the same mixture of codebook rows. So K
neighbours cost the transformer no more than one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embrag_ds.data.tokens import ALT, REF
from embrag_ds.retrieval.collate import Batch, Retrieved
from embrag_ds.retrieval.copying import (
    copying_posterior,
    interpolated_dosage,
    interpolated_weights,
    match_lengths,
)

_LEAST = 1e-6


@dataclass(frozen=True)
class Pooled:
    """What the neighbours say in the core.

    ``dosage`` float32 [B, L] is their weighted share of ALT, ``ancestry`` float32 [B, P, L] the weight on
    each population. ``weights`` float32 [B, K, L], summing to 1 over K, are written out only for the dense
    store. ``evidence`` is what stands behind the dosage, where the pooling knows.
    """

    dosage: Tensor
    ancestry: Tensor
    weights: Tensor | None
    evidence: Evidence | None


@dataclass(frozen=True)
class Evidence:
    """What a dosage rests on, float32 [B, L] each, without gradients.

    ``alt_length`` and ``ref_length``: mean length in cM of the match of the copied haplotypes that carry
    ALT and REF; ``uncertainty``: entropy of the copying probabilities over log K, in [0, 1]; ``share``: how
    many of the neighbours carry ALT; ``nearest`` and ``gap``: cM to the nearest typed site and between the
    flanking ones; ``density``: typed sites per cM.
    """

    alt_length: Tensor
    ref_length: Tensor
    uncertainty: Tensor
    share: Tensor
    nearest: Tensor
    gap: Tensor
    density: Tensor


class DistancePooling(nn.Module):
    """One weight per neighbour over the whole window: a softmax of its distance to the query.

    The distance counts mismatches at the typed sites, each with the embedding's weight (mean 1).
    """

    gives_evidence = False

    def __init__(self) -> None:
        super().__init__()
        self.log_strength = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch, retrieved: Retrieved, site_weight: Tensor) -> Pooled:
        """``site_weight`` [L], mean 1: what disagreement at a site counts."""
        distance = (retrieved.mismatch * site_weight[batch.typed][..., None]).sum(1)
        weights = torch.softmax(-self.log_strength.float().exp() * distance, dim=1)
        sites = retrieved.alleles.shape[-1]
        ancestry = (_membership(batch, retrieved) * weights[..., None]).sum(1)
        return Pooled(
            dosage=(weights[..., None] * retrieved.alleles).sum(1),
            ancestry=ancestry[..., None].expand(-1, -1, sites),
            weights=None if retrieved.embeddings is None else weights[..., None].expand(-1, -1, sites),
            evidence=None,
        )


class CopyingPooling(nn.Module):
    """Posterior copying probabilities of the Li and Stephens model over the retrieved haplotypes.

    Between typed sites d cM apart the mosaic switches with probability ``1 - exp(-rate d)``; a mismatch at
    site l costs a factor ``exp(-penalty w_l)``, w_l being the embedding's weight. Rate and penalty are
    learned, each as a power of the density of typed sites: on a sparse array a mosaic of few neighbours
    stands for more than on a dense one. Between typed sites posteriors are interpolated linearly in cM
    (Browning et al. 2016, Am. J. Hum. Genet. 98:116). See :mod:`embrag_ds.retrieval.copying`.
    """

    gives_evidence = True
    _INITIAL_RATE = 2.0  # per cM
    _INITIAL_PENALTY = 5.0
    _TYPICAL_DENSITY = 100.0  # typed sites per cM
    # These few parameters are stored at a tenth, so that they move ten times as fast as the weights.
    _GAIN = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([math.log(self._INITIAL_RATE) / self._GAIN, 0.0]))
        self.penalty = nn.Parameter(torch.tensor([math.log(self._INITIAL_PENALTY) / self._GAIN, 0.0]))

    def forward(self, batch: Batch, retrieved: Retrieved, site_weight: Tensor) -> Pooled:
        """``site_weight`` [L], mean 1: what disagreement at a site counts."""
        position = batch.sites.position[batch.typed]
        gap = torch.diff(position, dim=1, prepend=position[:, :1])
        length = (batch.sites.position[-1] - batch.sites.position[0]).clamp_min(1e-6)
        density = batch.typed_count.clamp_min(1) / (length * self._TYPICAL_DENSITY)
        features = torch.stack([torch.ones_like(density), density.log()], dim=1)
        rate = torch.exp(features @ self.rate.float() * self._GAIN)[:, None]
        penalty = torch.exp(features @ self.penalty.float() * self._GAIN)[:, None]
        switch = -torch.expm1(-rate * gap)
        cost = penalty * site_weight[batch.typed]
        posterior = copying_posterior(retrieved.mismatch, cost, switch, batch.near)
        between = _flanking(batch)
        ancestry = posterior @ _membership(batch, retrieved)
        written_out = retrieved.embeddings is not None
        dosage = interpolated_dosage(posterior, retrieved.alleles, *between)
        return Pooled(
            dosage=dosage,
            ancestry=interpolated_weights(ancestry, *between),
            weights=interpolated_weights(posterior, *between) if written_out else None,
            evidence=_evidence(batch, retrieved, position, posterior.detach(), dosage.detach(), between, density),
        )


@torch.no_grad()
def _evidence(
    batch: Batch,
    retrieved: Retrieved,
    position: Tensor,
    posterior: Tensor,
    dosage: Tensor,
    between: tuple[Tensor, Tensor, Tensor],
    density: Tensor,
) -> Evidence:
    lengths = match_lengths(retrieved.mismatch, position, batch.typed_count, batch.near).mul_(posterior)
    of_alt = interpolated_dosage(lengths, retrieved.alleles, *between)
    spread = torch.special.entr(posterior).sum(-1) / math.log(max(2, posterior.shape[-1]))
    overall = interpolated_weights(torch.stack([lengths.sum(-1), spread], dim=-1), *between)
    left, right, _ = between
    sites = batch.sites.position[batch.core]
    before, after = (position[:, batch.near].gather(1, place) for place in (left, right))
    return Evidence(
        alt_length=of_alt / dosage.clamp_min(_LEAST),
        ref_length=(overall[:, 0] - of_alt).clamp_min(0) / (1 - dosage).clamp_min(_LEAST),
        uncertainty=overall[:, 1],
        share=retrieved.alleles.sum(1, dtype=torch.int32) / retrieved.alleles.shape[1],
        nearest=torch.minimum((sites - before).abs(), (after - sites).abs()),
        gap=(after - before).abs(),
        density=density[:, None].expand_as(dosage),
    )


def _membership(batch: Batch, retrieved: Retrieved) -> Tensor:
    """1 where a neighbour belongs to a population, float32 [B, K, P]."""
    populations = batch.population_frequency.shape[1]
    return nn.functional.one_hot(retrieved.population, populations).float()


def _flanking(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The typed sites on either side of every site of the core, and the right one's share, each [B, L].

    The sites are places in the part ``batch.near`` of a row of ``batch.typed``; beyond the first and the last
    typed site both sides are the same.
    """
    sites = torch.arange(batch.core.start, batch.core.stop, device=batch.typed.device)
    # The filled-up part of a row repeats the last site, so rows stay sorted.
    right = torch.searchsorted(batch.typed, sites.expand(len(batch.typed), -1).contiguous())
    last = (batch.typed_count - 1).clamp_min(0)[:, None]
    left = (right - 1).clamp_min(0).minimum(last)
    right = right.minimum(last)
    position = batch.sites.position
    start = position[batch.typed.gather(1, left)]
    between = position[batch.typed.gather(1, right)] - start
    share = torch.where(between > 0, (position[sites] - start) / between.clamp_min(1e-12), 0.0)
    return left - batch.near.start, right - batch.near.start, share.clamp(0, 1)


def pooled_embedding(pooled: Pooled, retrieved: Retrieved, codebook: Tensor) -> Tensor:
    """The neighbours' weighted embedding [B, L, D].

    From the codebook: ``C[REF] + dosage (C[ALT] - C[REF])``. From the dense store's rows: the same sum,
    written out.
    """
    if retrieved.embeddings is not None:
        assert pooled.weights is not None
        return torch.einsum("bkl,bkld->bld", pooled.weights.to(retrieved.embeddings.dtype), retrieved.embeddings)
    reference = codebook[:, REF]
    step = codebook[:, ALT] - reference
    return reference + pooled.dosage[..., None].to(step.dtype) * step
