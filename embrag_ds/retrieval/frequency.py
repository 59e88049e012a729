"""Allele frequencies without the query's own alleles, so that training queries do not leak their truth.

A training query is a sample of the panel, so the panel's frequencies include its alleles. For a common allele that is
negligible. For an allele with two copies, a carrier has one copy among its possible neighbours, and any other sample
two. A network that learns from this does not generalise to samples outside the panel.

So rare frequencies are counted without the samples that the query must not retrieve, and common ones are kept. The
embedding layer has one input for all queries, in which rare frequencies are clipped to one value
(:meth:`embrag_ds.data.windows.WindowedPanel.features`). No frequency that the network reads then depends on the query's
own allele.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from embrag_ds.data.panel import FEW, RARE


class Frequencies(NamedTuple):
    """ALT frequencies for each query sample: ``overall`` float32 [N, L] and by ``population`` float32 [N, P, L].

    ``minor_allele_count`` float32 [N, L] is that of the haplotypes that are not excluded.
    """

    overall: Tensor
    population: Tensor
    minor_allele_count: Tensor


def frequencies_without(
    excluded: Tensor, alleles: Tensor, population_of: Tensor, counted: Tensor, counts: Tensor, sizes: Tensor
) -> Frequencies:
    """ALT frequencies in the reference set, those of rare alleles without the haplotypes ``excluded`` int64 [N, E].

    ``excluded`` is padded with H. ``alleles`` uint8 [H, L] and ``population_of`` int64 [H] are the reference set's, and
    ``counted`` float32 [H, L] is 1 where a haplotype counts, else 0; ``counts`` float32 [P, L] of ALT and ``sizes``
    float32 [P, L], in haplotypes, are its populations'. ``counted`` and ``sizes`` have one column where all sites are
    alike. A population with no haplotype left gets the overall frequency.
    """
    chosen = excluded.clamp_max(len(alleles) - 1)
    present = counted[chosen] * (excluded < len(alleles))[..., None]
    populations = torch.arange(len(sizes), device=excluded.device)
    belongs = (population_of[chosen][..., None] == populations).float()
    taken = torch.einsum("bep,bel->bpl", belongs, alleles[chosen] * present)
    left = sizes - torch.einsum("bep,bel->bpl", belongs, present)
    total, without, remaining = counts.sum(0), counts.sum(0) - taken.sum(1), left.sum(1)
    overall = _frequency(total, sizes.sum(0), without, remaining)
    each = _frequency(counts, sizes, counts - taken, left)
    return Frequencies(
        overall=overall,
        population=torch.where(left > 0, each, overall[:, None]),
        minor_allele_count=torch.minimum(without, remaining - without),
    )


def good_turing_correction(found: Frequencies, odds: Tensor) -> Tensor:
    """Correction float32 [N, L] of the log-odds of ALT by the panel's allele count spectrum.

    ``odds`` float32 is that of the minor allele by its count
    (:attr:`embrag_ds.data.panel.PanelSubset.good_turing_odds`).
    """
    of_minor = odds[found.minor_allele_count.long().clamp_max(len(odds) - 1)]
    return torch.where(found.overall > 0.5, -of_minor, of_minor)


def _frequency(count: Tensor, size: Tensor, without: Tensor, left: Tensor) -> Tensor:
    """``without / left`` where the minor allele is rare among ``size`` haplotypes, and ``count / size`` elsewhere."""
    rare = torch.minimum(count, size - count) < (RARE * size).clamp_min(FEW)
    return torch.where(rare, without / left.clamp_min(1), count / size.clamp_min(1))
