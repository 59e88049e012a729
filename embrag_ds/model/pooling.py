"""Pooling of K retrieved haplotypes into one reference signal per site: dosage, ancestry and embedding.

Each neighbour has a weight at every site, and the weighted mean of alleles is a dosage. A haplotype's embedding takes
one of V values per site. So the weighted mean of embeddings is a mixture of codebook rows, with the same weights. The
transformer's work therefore does not depend on K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embrag_ds.data.tokens import ALT, REF
from embrag_ds.ops.dosage import FlankingSites
from embrag_ds.retrieval.batch import Batch, Retrieved

_LEAST = 1e-4
"""Least weight of an allele, as a difference of others, that is not mostly rounding error."""


@dataclass(frozen=True)
class Pooled:
    """Pooled reference signal over the core's sites.

    * ``dosage`` float32 [B, L]: weighted share of the neighbours that carry ALT.
    * ``ancestry`` float32 [B, P, L]: weight of the neighbours of each population, summing to 1 over P.
    * ``weights`` float32 [B, K, L]: weights of the neighbours, summing to 1 over K; None except with the dense store.
    * ``evidence``: evidence behind the dosage; None from a pooling without ``gives_evidence``.
    """

    dosage: Tensor
    ancestry: Tensor
    weights: Tensor | None
    evidence: Evidence | None


@dataclass(frozen=True)
class Evidence:
    """Evidence behind a copied dosage, each float32 [B, L] and without gradients; that of the slow copying model.

    * ``alt_length``, ``ref_length``: mean match length in cM of the copied haplotypes with ALT and with REF, 0 where
      hardly any has it.
    * ``alt_number``, ``ref_number``: effective number of those haplotypes, 0 where hardly any has it. It is the Hill
      number of order 1/2 (Hill 1973, Ecology 54:427): the squared sum of square roots of their probabilities, over the
      sum of these.
    * ``uncertainty``: logarithm of the number of haplotypes that are copied, which is the inverse of the sum of
      squares of their probabilities.
    * ``nearest``, ``gap``: distance in cM to the nearest typed site, and between the flanking ones.
    * ``density``: typed sites per cM over the whole window, in units of 100 per cM.
    * ``disagreement``: log-odds of ALT by the slow copying model minus those by the fast one.
    """

    alt_length: Tensor
    ref_length: Tensor
    alt_number: Tensor
    ref_number: Tensor
    uncertainty: Tensor
    nearest: Tensor
    gap: Tensor
    density: Tensor
    disagreement: Tensor

    @classmethod
    def of(
        cls,
        dosage: Tensor,
        fast_dosage: Tensor,
        alt_length: Tensor,
        length: Tensor,
        alt_root: Tensor,
        root: Tensor,
        *,
        uncertainty: Tensor,
        nearest: Tensor,
        gap: Tensor,
        density: Tensor,
    ) -> Evidence:
        """Evidence from the two models' dosages and from sums over the copied haplotypes, all of one shape.

        ``alt_length`` is the sum of match lengths, weighed by probabilities, over the haplotypes with ALT, and
        ``length`` that over all, in cM. ``alt_root`` and ``root`` are such sums of the probabilities' square roots.
        """
        return cls(
            alt_length=_mean(alt_length, dosage),
            ref_length=_mean(length - alt_length, 1 - dosage),
            alt_number=_mean(alt_root.square(), dosage),
            ref_number=_mean((root - alt_root).square(), 1 - dosage),
            uncertainty=uncertainty,
            nearest=nearest,
            gap=gap,
            density=density,
            disagreement=torch.logit(dosage, eps=1e-4) - torch.logit(fast_dosage, eps=1e-4),
        )


def _mean(total: Tensor, weight: Tensor) -> Tensor:
    """A sum ``total`` over that of probabilities, ``weight``; 0 where there is hardly any of these."""
    return torch.where(weight > _LEAST, total.clamp_min(0) / weight.clamp_min(_LEAST), 0.0)


def at_typed(values: Tensor, batch: Batch) -> Tensor:
    """Values [L] of a window's sites at each query's typed sites, [B, T]."""
    typed = batch.window.typed
    # A gather by row, whose gradient adds up rows. That of ``values[typed]`` sorts all indices and adds up one by one,
    # which took a tenth of a step on a GPU.
    return values.expand(len(typed), -1).gather(1, typed)


def present_columns(batch: Batch) -> Tensor:
    """Which columns of ``batch.window.typed`` are no padding, bool [B, T]."""
    columns = torch.arange(batch.window.typed.shape[1], device=batch.window.typed.device)
    return columns < batch.window.typed_count[:, None]


def membership(batch: Batch, retrieved: Retrieved) -> Tensor:
    """Indicators of the neighbours' populations, float32 [B, K, P]."""
    # one_hot would read the values first, which synchronises a GPU.
    populations = torch.arange(batch.core.population_frequency.shape[1], device=retrieved.population.device)
    return (retrieved.population[..., None] == populations).float()


def flanking_sites(batch: Batch) -> FlankingSites:
    """Flanking typed sites of every site of the core, and interpolation weights by distance in cM.

    Their indices count from the first of a row's sites ``batch.window.near``. Before the first and after the last typed
    site, left and right are the same.
    """
    sites = torch.arange(batch.window.core.start, batch.window.core.stop, device=batch.window.typed.device)
    # The padding of a row repeats the last site, so rows are sorted.
    right = torch.searchsorted(batch.window.typed, sites.expand(len(batch.window.typed), -1).contiguous())
    last = (batch.window.typed_count - 1).clamp_min(0)[:, None]
    left = (right - 1).clamp_min(0).minimum(last)
    right = right.minimum(last)
    position = batch.window.sites.position
    start = position[batch.window.typed.gather(1, left)]
    length = position[batch.window.typed.gather(1, right)] - start
    share = torch.where(length > 0, (position[sites] - start) / length.clamp_min(1e-12), 0.0)
    first = batch.window.near.first[:, None]
    return FlankingSites(left - first, right - first, share.clamp(0, 1))


def pooled_embedding(dosage: Tensor, codebook: Tensor, weights: Tensor | None, embeddings: Tensor | None) -> Tensor:
    """Weighted mean [B, L, D] of the neighbours' embeddings.

    It is the :func:`mixed_embedding` of the ``codebook``. With ``embeddings`` [B, K, L, D] from a dense store and their
    ``weights`` [B, K, L] it is the sum over neighbours itself.
    """
    if embeddings is not None and weights is not None:
        return torch.einsum("bkl,bkld->bld", weights.to(embeddings.dtype), embeddings)
    return mixed_embedding(codebook, dosage)


def mixed_embedding(codebook: Tensor, dosage: Tensor) -> Tensor:
    """Mean embedding at a dosage, [B, L, D], ``C[REF] + dosage (C[ALT] - C[REF])``.

    C is the ``codebook`` [L, 2 or V, D], and ``dosage`` is [B, L].
    """
    reference = codebook[:, REF]
    step = codebook[:, ALT] - reference
    return reference + dosage[..., None].to(step.dtype) * step
