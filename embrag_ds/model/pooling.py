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
from embrag_ds.ops.dosage import FlankingSites, alt_share, expected_allele, interpolated
from embrag_ds.ops.li_stephens import copying_posterior, count_true, match_lengths
from embrag_ds.retrieval.batch import Batch, Retrieved

_LEAST = 1e-6
_LEAST_REST = 1e-4
"""A smaller difference from 1 is mostly rounding."""


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
    ALT and REF (0 where hardly any carries it); ``uncertainty``: entropy of the copying probabilities over log K,
    in [0, 1]; ``share``: how many of the neighbours carry ALT; ``nearest`` and ``gap``: cM to the nearest typed site
    and between the flanking ones; ``density``: typed sites per cM; ``disagreement``: log-odds of ALT by the slow
    copying model less those by the fast one (the others are the slow one's).
    """

    alt_length: Tensor
    ref_length: Tensor
    uncertainty: Tensor
    share: Tensor
    nearest: Tensor
    gap: Tensor
    density: Tensor
    disagreement: Tensor


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
        distance = (retrieved.mismatch * site_weight[batch.window.typed][..., None]).sum(1)
        weights = torch.softmax(-self.log_strength.float().exp() * distance, dim=1)
        # The same weights at every site: a posterior at one place, on either side of every site.
        posterior, nowhere = weights[:, None], torch.zeros_like(batch.core.tokens)
        everywhere = FlankingSites(nowhere, nowhere, torch.zeros_like(batch.core.frequency))
        ancestry = posterior @ _membership(batch, retrieved)
        sites = batch.core.tokens.shape[1]
        return Pooled(
            dosage=expected_allele(retrieved.alleles, posterior, everywhere),
            ancestry=ancestry.mT.expand(-1, -1, sites),
            weights=None if retrieved.embeddings is None else posterior.mT.expand(-1, -1, sites),
            evidence=None,
        )


class CopyingPooling(nn.Module):
    """Posterior copying probabilities of the Li and Stephens model over the retrieved haplotypes.

    Recombination: between typed sites d cM apart the model chooses a neighbour anew with probability
    ``1 - exp(-rate d)``. Mismatch: a neighbour that differs at site l loses a factor ``exp(-penalty w_l)``, w_l being
    the embedding's weight. Both rates are learned, each as a power of the density of typed sites: on a sparse array
    few neighbours stand for more than on a dense one. A recombination prefers neighbours that resemble the query over
    the whole window, by a learned factor per percent of typed sites that differ. Between typed sites posteriors are
    interpolated linearly in cM (Browning et al. 2016, Am. J. Hum. Genet. 98:116). See :mod:`embrag_ds.ops.li_stephens`.

    Rare alleles are young: those who share one share a long haplotype, and the best recombination rate for them is
    below that for common alleles. So there are two copying models, a slow one and a fast one; a site's dosage is a mean
    of theirs whose weights are a learned function of its frequency.
    """

    gives_evidence = True
    _INITIAL_RECOMBINATION = (2.0, 5.0)  # per cM; slow, fast
    _INITIAL_MISMATCH = 5.0
    _INITIAL_CLOSENESS = 0.07  # per percent
    _TYPICAL_DENSITY = 100.0  # typed sites per cM
    # These few parameters are stored at a tenth, so that they move ten times as fast as the weights.
    _GAIN = 10.0

    def __init__(self) -> None:
        super().__init__()
        # Of the slow and the fast copying model: logarithms at the typical density, then exponents of the density. One
        # dimension: ZeRO-3 takes gradients of two only from a Linear.
        rates = [math.log(rate) / self._GAIN for rate in self._INITIAL_RECOMBINATION]
        self.rate = nn.Parameter(torch.tensor([*rates, 0.0, 0.0]))
        self.penalty = nn.Parameter(torch.tensor([math.log(self._INITIAL_MISMATCH) / self._GAIN] * 2 + [0.0, 0.0]))
        self.closeness = nn.Parameter(torch.tensor([self._INITIAL_CLOSENESS / self._GAIN]))
        # Log-odds of the slow model: at a frequency of 0.1 %, and how much more for ten times that.
        self.slow = nn.Parameter(torch.tensor([0.0, -2.0]) / self._GAIN)

    def forward(self, batch: Batch, retrieved: Retrieved, site_weight: Tensor) -> Pooled:
        """``site_weight`` [L], mean 1: what disagreement at a site counts."""
        position = batch.window.sites.position[batch.window.typed]
        gap = torch.diff(position, dim=1, prepend=position[:, :1])
        length = (batch.window.sites.position[-1] - batch.window.sites.position[0]).clamp_min(1e-6)
        density = batch.window.typed_count.clamp_min(1) / (length * self._TYPICAL_DENSITY)
        recombination, mismatch = (self._power(each, density) for each in (self.rate, self.penalty))
        typed_weight = site_weight[batch.window.typed]
        prior = self._recombination_prior(batch, retrieved)
        # Both copying models at once: chain c is about haplotype c % B.
        posterior = copying_posterior(
            retrieved.mismatch,
            (mismatch.T[..., None] * typed_weight).flatten(0, 1),
            -torch.expm1(-recombination.T[..., None] * gap).flatten(0, 1),
            prior,
            batch.window.near,
        )
        slow, fast = posterior.unflatten(0, (2, -1))
        between = _flanking(batch)
        by_slow, by_fast = (expected_allele(retrieved.alleles, each, between) for each in (slow, fast))
        share = self._share_of_slow(batch.core.frequency)
        weights = None
        if retrieved.embeddings is not None:
            spread_fast, spread_slow = (interpolated(each, between) for each in (fast, slow))
            weights = torch.lerp(spread_fast, spread_slow, share[:, None])
        return Pooled(
            dosage=torch.lerp(by_fast, by_slow, share),
            ancestry=interpolated(slow @ _membership(batch, retrieved), between),
            weights=weights,
            evidence=_evidence(
                batch, retrieved, position, slow.detach(), by_slow.detach(), by_fast.detach(), between, density
            ),
        )

    def _power(self, parameter: Tensor, density: Tensor) -> Tensor:
        """A constant times a power of ``density`` [B], for each copying model: float32 [B, 2]."""
        logarithm, exponent = (parameter.float() * self._GAIN).unflatten(0, (2, 2))
        return torch.exp(logarithm + exponent * density.log()[:, None])

    def _recombination_prior(self, batch: Batch, retrieved: Retrieved) -> Tensor:
        """Probability of every neighbour at a recombination, float32 [B, K]."""
        differs = count_true(retrieved.mismatch) * (100 / batch.window.typed_count.clamp_min(1))[:, None]
        return torch.softmax(-self.closeness.float() * self._GAIN * differs, dim=-1)

    def _share_of_slow(self, frequency: Tensor) -> Tensor:
        """Weight of the slow copying model, float32 [B, L]."""
        maf = torch.minimum(frequency, 1 - frequency).clamp_min(1e-5)
        level, per_decade = self.slow.float() * self._GAIN
        return torch.sigmoid(level + per_decade * torch.log10(maf / 1e-3))


@torch.no_grad()
def _evidence(
    batch: Batch,
    retrieved: Retrieved,
    position: Tensor,
    posterior: Tensor,
    dosage: Tensor,
    other: Tensor,
    between: FlankingSites,
    density: Tensor,
) -> Evidence:
    lengths = match_lengths(retrieved.mismatch, position, batch.window.typed_count, batch.window.near).mul_(posterior)
    of_alt = expected_allele(retrieved.alleles, lengths, between)
    spread = torch.special.entr(posterior).sum(-1) / math.log(max(2, posterior.shape[-1]))
    overall = interpolated(torch.stack([lengths.sum(-1), spread], dim=-1), between)
    sites = batch.core.sites.position
    before, after = (position[:, batch.window.near].gather(1, place) for place in (between.left, between.right))
    return Evidence(
        alt_length=of_alt / dosage.clamp_min(_LEAST),
        ref_length=torch.where(
            1 - dosage > _LEAST_REST, (overall[:, 0] - of_alt).clamp_min(0) / (1 - dosage).clamp_min(_LEAST_REST), 0.0
        ),
        uncertainty=overall[:, 1],
        share=alt_share(retrieved.alleles),
        nearest=torch.minimum((sites - before).abs(), (after - sites).abs()),
        gap=(after - before).abs(),
        density=density[:, None].expand_as(dosage),
        disagreement=torch.logit(dosage, eps=1e-4) - torch.logit(other, eps=1e-4),
    )


def _membership(batch: Batch, retrieved: Retrieved) -> Tensor:
    """1 where a neighbour belongs to a population, float32 [B, K, P]."""
    # Not one_hot, which looks at the values first.
    populations = torch.arange(batch.core.population_frequency.shape[1], device=retrieved.population.device)
    return (retrieved.population[..., None] == populations).float()


def _flanking(batch: Batch) -> FlankingSites:
    """The typed sites on either side of every site of the core.

    The sites are places in the part ``batch.window.near`` of a row of ``batch.window.typed``; beyond the first and the
    last typed site both sides are the same.
    """
    sites = torch.arange(batch.window.core.start, batch.window.core.stop, device=batch.window.typed.device)
    # The filled-up part of a row repeats the last site, so rows stay sorted.
    right = torch.searchsorted(batch.window.typed, sites.expand(len(batch.window.typed), -1).contiguous())
    last = (batch.window.typed_count - 1).clamp_min(0)[:, None]
    left = (right - 1).clamp_min(0).minimum(last)
    right = right.minimum(last)
    position = batch.window.sites.position
    start = position[batch.window.typed.gather(1, left)]
    between = position[batch.window.typed.gather(1, right)] - start
    share = torch.where(between > 0, (position[sites] - start) / between.clamp_min(1e-12), 0.0)
    return FlankingSites(left - batch.window.near.start, right - batch.window.near.start, share.clamp(0, 1))


def pooled_embedding(pooled: Pooled, retrieved: Retrieved, own: Tensor) -> Tensor:
    """The neighbours' weighted embedding [B, L, D].

    From the generation's codebook, or ``own`` [L, V, D] where it is encoded live: :func:`mixed_embedding`. From
    the dense store's rows: the same sum, written out.
    """
    if retrieved.embeddings is not None:
        assert pooled.weights is not None
        return torch.einsum("bkl,bkld->bld", pooled.weights.to(retrieved.embeddings.dtype), retrieved.embeddings)
    return mixed_embedding(own if retrieved.codebook is None else retrieved.codebook, pooled.dosage)


def mixed_embedding(codebook: Tensor, dosage: Tensor) -> Tensor:
    """``C[REF] + dosage (C[ALT] - C[REF])``: a codebook C [L, 2 or V, D] and ``dosage`` [B, L] give [B, L, D]."""
    reference = codebook[:, REF]
    step = codebook[:, ALT] - reference
    return reference + dosage[..., None].to(step.dtype) * step
