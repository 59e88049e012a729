"""How K retrieved haplotypes become one reference signal per site.

Each neighbour gets a weight at every site; the weighted allele is a dosage, and because an embedding
takes one of V values per site the weighted embedding is the same mixture of codebook rows. So K
neighbours cost the transformer no more than one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embrag_ds.data.tokens import ALT, REF
from embrag_ds.retrieval.collate import Batch, Retrieved


@dataclass(frozen=True)
class Pooled:
    """What the neighbours say in the core.

    ``dosage`` float32 [B, L] is their weighted share of ALT, ``weights`` float32 [B, K, L] sum to 1 over
    K, and ``ancestry`` float32 [B, P, L] is the weight on each population.
    """

    dosage: Tensor
    weights: Tensor
    ancestry: Tensor


def pool(weights: Tensor, retrieved: Retrieved, populations: int) -> Pooled:
    """Apply ``weights`` [B, K, L] to the neighbours' alleles and populations."""
    member = nn.functional.one_hot(retrieved.population, populations).to(weights.dtype)
    return Pooled((weights * retrieved.alleles).sum(1), weights, member.transpose(1, 2) @ weights)


class DistancePooling(nn.Module):
    """One weight per neighbour over the whole window: a softmax of its distance to the query.

    The distance counts mismatches at the typed sites, each with the embedding's weight (mean 1).
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_strength = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch, retrieved: Retrieved, site_weight: Tensor) -> Tensor:
        """Weights of the neighbours, [B, K, L]."""
        distance = (_mismatch(batch, retrieved) * site_weight[batch.typed][:, None]).sum(-1)
        weights = torch.softmax(-self.log_strength.float().exp() * distance, dim=1)
        return weights[..., None].expand(*weights.shape, retrieved.alleles.shape[-1])


class CopyingPooling(nn.Module):
    """Posterior copying probabilities of the Li and Stephens model over the retrieved haplotypes.

    A query haplotype is a mosaic of its K neighbours (Li & Stephens 2003, Genetics 165:2213). Between
    typed sites d cM apart it switches with probability ``1 - exp(-rate d)``, to any neighbour alike; a
    mismatch at site l costs a factor ``exp(-penalty w_l)``, w_l being the embedding's weight. Rate and
    penalty are learned. Posteriors at the typed sites come from forward-backward, those between them by
    linear interpolation in cM (Browning et al. 2016, Am. J. Hum. Genet. 98:116).
    """

    _INITIAL_RATE = 4.0  # per cM
    _INITIAL_PENALTY = 5.0

    def __init__(self) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor([self._INITIAL_RATE]).log())
        self.log_penalty = nn.Parameter(torch.tensor([self._INITIAL_PENALTY]).log())

    def forward(self, batch: Batch, retrieved: Retrieved, site_weight: Tensor) -> Tensor:
        """Weights of the neighbours, [B, K, L]."""
        position = batch.sites.position[batch.typed]
        gap = torch.diff(position, dim=1, prepend=position[:, :1])
        switch = -torch.expm1(-self.log_rate.float().exp() * gap)
        cost = self.log_penalty.float().exp() * site_weight[batch.typed]
        emission = torch.exp(-cost[:, None] * _mismatch(batch, retrieved))
        posterior = copying_posterior(emission.permute(2, 0, 1), switch.T[..., None])
        return _interpolate(posterior.permute(1, 2, 0), batch)


def copying_posterior(emission: Tensor, switch: Tensor) -> Tensor:
    """Forward-backward of the Li and Stephens model, [T, B, K], summing to 1 over K.

    ``emission`` [T, B, K] is the probability of what is observed given the copied haplotype, ``switch``
    [T, B, 1] that of a new choice before each site (ignored at the first). Every pass is normalised at
    every site, so nothing underflows.
    """
    stay = (1 - switch).unbind(0)
    jump = (switch / emission.shape[-1]).unbind(0)
    likelihood = emission.unbind(0)
    forward = [likelihood[0] / likelihood[0].sum(-1, keepdim=True)]
    for site in range(1, len(likelihood)):
        moved = torch.addcmul(jump[site], stay[site], forward[-1]) * likelihood[site]
        forward.append(moved / moved.sum(-1, keepdim=True))
    backward = [torch.ones_like(likelihood[0])]
    for site in range(len(likelihood) - 1, 0, -1):
        seen = backward[-1] * likelihood[site]
        backward.append(torch.addcmul(jump[site], stay[site], seen / seen.sum(-1, keepdim=True)))
    both = torch.stack(forward) * torch.stack(backward[::-1])
    return both / both.sum(-1, keepdim=True)


def _mismatch(batch: Batch, retrieved: Retrieved) -> Tensor:
    """1 where a neighbour differs from a site its query shows, float32 [B, K, T]; 0 in the filled-up part."""
    place = torch.arange(batch.typed.shape[1], device=batch.typed.device)
    valid = place < batch.typed_count[:, None]
    return (retrieved.mismatch & valid[:, None]).float()


def _interpolate(posterior: Tensor, batch: Batch) -> Tensor:
    """Posteriors [B, K, T] at the typed sites -> [B, K, L] in the core, linear in cM between them."""
    core = batch.core
    sites = torch.arange(core.start, core.stop, device=posterior.device)
    # The filled-up part of a row repeats the last site, so rows stay sorted.
    right = torch.searchsorted(batch.typed, sites.expand(len(posterior), -1).contiguous())
    last = (batch.typed_count - 1).clamp_min(0)[:, None]
    left = (right - 1).clamp_min(0).minimum(last)
    right = right.minimum(last)
    position = batch.sites.position
    from_left = position[sites] - position[batch.typed.gather(1, left)]
    between = position[batch.typed.gather(1, right)] - position[batch.typed.gather(1, left)]
    share = torch.where(between > 0, from_left / between.clamp_min(1e-12), 0.0).clamp(0, 1)[:, None]
    neighbours = posterior.shape[1]
    at_left = posterior.gather(2, left[:, None].expand(-1, neighbours, -1))
    at_right = posterior.gather(2, right[:, None].expand(-1, neighbours, -1))
    return torch.lerp(at_left, at_right, share.expand_as(at_left))


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
