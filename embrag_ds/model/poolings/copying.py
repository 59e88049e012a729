"""Pooling by a copying model: a neighbour's weight at a site is its posterior probability of being copied there."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from embrag_ds.model.numbers import COPYING_GAIN, LEAST_TYPED_NEAR, NEGLIGIBLE, TYPICAL_DENSITY
from embrag_ds.model.pooling import Evidence, Pooled, at_typed, flanking_sites, membership, present_columns
from embrag_ds.ops.dosage import FlankingSites, expected_allele, interpolated
from embrag_ds.ops.li_stephens import copying_posterior, count_by_place, match_lengths, recombination_prior
from embrag_ds.retrieval.batch import Batch, Retrieved


class CopyingPooling(nn.Module):
    """Pooling by posterior copying probabilities of two Li and Stephens models (:mod:`embrag_ds.ops.li_stephens`).

    Recombination: its probability between typed sites d cM apart is ``1 - exp(-r d)``. Mismatch: the emission factor of
    a neighbour that differs at site l is ``exp(-m w_l)``, with the embedding's site weight w_l, whose mean over a
    query's typed sites is made 1. Parameters ``rate`` and
    ``penalty`` give r and m, each a learned constant times a learned power of the density of typed sites. On a sparse
    array, each typed site represents more untyped ones.

    After a recombination, neighbours that resemble the query around that place are more probable. Their
    log-probability falls linearly with the percentage of typed sites that differ. Sites at a distance d have the weight
    ``exp(-d / s)``. There are two such terms, each with a learned strength (``closeness``) and a learned scale s
    (``reach``). Probabilities that are negligible beside the others are left out (:func:`without_negligible`), so a
    posterior hardly depends on how many neighbours there are. Between typed sites posteriors are interpolated linearly
    in cM (Browning et al. 2016, Am. J. Hum. Genet. 98:116).

    Rare alleles are young, so haplotypes that share one match over a long stretch. The best recombination rate for them
    is below that for common alleles. So there is a slow and a fast copying model, and a site's dosage is a mean of
    theirs. Its weights are a learned function of the site's minor allele frequency.
    """

    gives_evidence = True
    _INITIAL_RECOMBINATION = (2.0, 5.0)  # per cM; slow, fast
    _INITIAL_MISMATCH = 5.0
    _INITIAL_CLOSENESS = (0.15, 0.05)  # per percent; far, near
    _INITIAL_REACH = (4.0, 0.5)  # cM; far, near

    def __init__(self) -> None:
        super().__init__()
        # For the slow and the fast copying model: logarithms at the typical density, then exponents of the density.
        # They have one dimension, because ZeRO-3 supports gradients of two dimensions for Linear layers only.
        rates = [math.log(rate) / COPYING_GAIN for rate in self._INITIAL_RECOMBINATION]
        self.rate = nn.Parameter(torch.tensor([*rates, 0.0, 0.0]))
        self.penalty = nn.Parameter(torch.tensor([math.log(self._INITIAL_MISMATCH) / COPYING_GAIN] * 2 + [0.0, 0.0]))
        self.closeness = nn.Parameter(torch.tensor(self._INITIAL_CLOSENESS) / COPYING_GAIN)
        self.reach = nn.Parameter(torch.tensor(self._INITIAL_REACH).log() / COPYING_GAIN)
        # Log-odds of the slow model's weight at a frequency of 0.1 %, and their change per factor of ten.
        self.slow = nn.Parameter(torch.tensor([0.0, -2.0]) / COPYING_GAIN)

    def forward(self, batch: Batch, retrieved: Retrieved, site_weight: Tensor) -> Pooled:
        """Pool the neighbours ``retrieved``; ``site_weight`` float32 [L], of mean 1, is the weight of a mismatch."""
        slow, fast = self.posteriors(batch, retrieved, site_weight)
        flanking = flanking_sites(batch)
        by_slow, by_fast = (expected_allele(retrieved.alleles, each, flanking) for each in (slow, fast))
        share = self.share_of_slow(batch.core.frequency)
        weights = None
        if retrieved.embeddings is not None:
            spread_fast, spread_slow = (interpolated(each, flanking) for each in (fast, slow))
            weights = torch.lerp(spread_fast, spread_slow, share[:, None])
        return Pooled(
            dosage=torch.lerp(by_fast, by_slow, share),
            ancestry=interpolated(slow @ membership(batch, retrieved), flanking),
            weights=weights,
            evidence=_evidence(batch, retrieved, slow.detach(), by_slow.detach(), by_fast.detach(), flanking),
        )

    def posteriors(self, batch: Batch, retrieved: Retrieved, site_weight: Tensor) -> Tensor:
        """Copying probabilities at the typed sites near the core, without negligible ones, float32 [2, B, M, K].

        The first model is the slow one. They sum to 1 over the neighbours ``retrieved``; ``site_weight`` is that of
        :meth:`forward`.
        """
        position = batch.window.sites.position[batch.window.typed]
        gap = torch.diff(position, dim=1, prepend=position[:, :1])
        present = present_columns(batch)
        weight = at_typed(site_weight, batch)
        mean = (weight * present).sum(1, keepdim=True) / batch.window.typed_count.clamp_min(1)[:, None]
        nats, recombination = self.rates(gap, _density(batch), weight / torch.where(mean > 0, mean, 1.0))
        # Both copying models in one call: chain c models haplotype c % B.
        posterior = copying_posterior(
            retrieved.mismatch,
            nats.flatten(0, 1),
            recombination.flatten(0, 1),
            self._recombination_prior(batch, retrieved, present),
            batch.window.near,
            batch.window.place,
        )
        return without_negligible(posterior).unflatten(0, (2, -1))

    def rates(self, gap: Tensor, density: Tensor, typed_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of a mismatch and probability of a recombination at each typed site, both float32 [2, B, T].

        ``gap`` float32 [B, T] is the distance in cM from the typed site before, ``density`` [B] is in units of 100 per
        cM, and ``typed_weight`` float32 [B, T] the weight of a mismatch. The first model is the slow one.
        """
        recombination, mismatch = (self._power(each, density) for each in (self.rate, self.penalty))
        return mismatch.T[..., None] * typed_weight, -torch.expm1(-recombination.T[..., None] * gap)

    def prior_terms(self, place_cm: float) -> tuple[Tensor, Tensor]:
        """Strength per percent, and weight of a place ``place_cm`` away, of each term of the prior: float32 [2]."""
        reach = torch.exp(self.reach.float() * COPYING_GAIN)
        return self.closeness.float() * COPYING_GAIN, torch.exp(-place_cm / reach)

    def _power(self, parameter: Tensor, density: Tensor) -> Tensor:
        """Constant times a power of ``density`` [B], for each copying model, float32 [B, 2]."""
        logarithm, exponent = (parameter.float() * COPYING_GAIN).unflatten(0, (2, 2))
        return torch.exp(logarithm + exponent * density.log()[:, None])

    def _recombination_prior(self, batch: Batch, retrieved: Retrieved, present: Tensor) -> Tensor:
        """Probability of every neighbour after a recombination at each place, float32 [B, G, K], summing to 1."""
        window = batch.window
        differing = count_by_place(retrieved.mismatch, window.place, window.places)
        typed = count_by_place(present[..., None], window.place, window.places)[..., 0]
        strength, decay = self.prior_terms(window.place_cm)
        order = torch.arange(window.places, device=typed.device)
        nearness = decay[:, None, None] ** (order[:, None] - order).abs()
        typed_near = torch.einsum("jgh,bh->bjg", nearness, typed).clamp_min(LEAST_TYPED_NEAR)
        factor = torch.einsum("j,jgh,bjg->bgh", 100 * strength, nearness, 1 / typed_near)
        return recombination_prior(factor @ differing, retrieved.barred)

    def share_of_slow(self, frequency: Tensor) -> Tensor:
        """Weight of the slow copying model at ALT ``frequency`` [B, L], float32 [B, L]."""
        maf = torch.minimum(frequency, 1 - frequency).clamp_min(1e-5)
        level, per_decade = self.slow.float() * COPYING_GAIN
        return torch.sigmoid(level + per_decade * torch.log10(maf / 1e-3))


def without_negligible(posterior: Tensor) -> Tensor:
    """Copying probabilities float32 [..., K] without the negligible ones; they sum to 1 again.

    Negligible is what lies below :data:`NEGLIGIBLE` times the sum of squares, the mean probability of what is copied.
    Of thousands of haplotypes, most have such probabilities, and together they blur the dosage (docs/log.md).
    """
    least = NEGLIGIBLE * posterior.detach().square().sum(-1, keepdim=True)
    kept = torch.where(posterior > least, posterior, 0.0)
    return kept / kept.sum(-1, keepdim=True)


@torch.no_grad()
def _evidence(
    batch: Batch,
    retrieved: Retrieved,
    posterior: Tensor,
    dosage: Tensor,
    fast_dosage: Tensor,
    flanking: FlankingSites,
) -> Evidence:
    """Evidence of the slow copying model, from its ``posterior`` [B, M, K] and ``dosage`` [B, L].

    ``fast_dosage`` [B, L] is that of the fast model.
    """
    position = batch.window.sites.position[batch.window.typed]
    weighed = match_lengths(retrieved.mismatch, position, batch.window.typed_count, batch.window.near).mul_(posterior)
    length, of_alt = weighed.sum(-1), expected_allele(retrieved.alleles, weighed, flanking)
    roots = torch.sqrt(posterior, out=weighed)  # in the same memory, which is as much as that of the posterior
    root, of_alt_root = roots.sum(-1), expected_allele(retrieved.alleles, roots, flanking)
    spread = -posterior.square().sum(-1).log()
    overall = interpolated(torch.stack([length, root, spread], dim=-1), flanking)
    sites = batch.core.sites.position
    start = batch.window.near.first[:, None]
    before, after = (position.gather(1, start + place) for place in (flanking.left, flanking.right))
    return Evidence.of(
        dosage,
        fast_dosage,
        of_alt,
        overall[:, 0],
        of_alt_root,
        overall[:, 1],
        uncertainty=overall[:, 2],
        nearest=torch.minimum((sites - before).abs(), (after - sites).abs()),
        gap=(after - before).abs(),
        density=_density(batch)[:, None].expand_as(dosage),
    )


def _density(batch: Batch) -> Tensor:
    """Typed sites per cM over the whole window, float32 [B], in units of the typical density."""
    position = batch.window.sites.position
    length = (position[-1] - position[0]).clamp_min(1e-6)
    return batch.window.typed_count.clamp_min(1) / (length * TYPICAL_DENSITY)
