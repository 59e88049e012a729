"""Allele frequencies as a query may know them: without the query.

A sample of the panel has a part in the panel's frequencies. For a common allele that is nothing; of an allele
with two copies a carrier would see one copy among its neighbours where anybody else sees two, and what
the network learned from it would not hold for samples who are not in the panel. So where a frequency is rare it
is counted without those whom the query must not retrieve. Where it is common the plain one stays, and the
embedding layer, which serves all queries alike, sees rare ones only as "rare"
(:meth:`embrag_ds.data.windows.WindowedPanel.features`): no two numbers before the network differ by the
query's own allele.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from embrag_ds.data.panel import FEW, RARE


class Frequencies(NamedTuple):
    """ALT frequencies float32 [B, L] ``overall`` and [B, P, L] by ``population``.

    ``minor_allele_count`` [B, L] counts what the query may retrieve.
    """

    overall: Tensor
    population: Tensor
    minor_allele_count: Tensor


def frequencies_without(
    excluded: Tensor, alleles: Tensor, population_of: Tensor, counts: Tensor, sizes: Tensor
) -> Frequencies:
    """Frequencies among the haplotypes that are not ``excluded`` int64 [B, E] (H: nobody).

    ``alleles`` uint8 [H, L], ``population_of`` int64 [H]; ``counts`` float32 [P, L] of ALT and ``sizes`` float32 [P]
    are the populations'. A population without anybody has the overall frequency.
    """
    present = (excluded < len(alleles)).float()
    chosen = excluded.clamp_max(len(alleles) - 1)
    belongs = one_hot(population_of[chosen], len(sizes)).float() * present[..., None]
    taken = torch.einsum("bep,bel->bpl", belongs, alleles[chosen].float())
    left = sizes - belongs.sum(1)
    total, without, remaining = counts.sum(0), counts.sum(0) - taken.sum(1), left.sum(1)[:, None]
    overall = _frequency(total, sizes.sum(), without, remaining)
    each = _frequency(counts, sizes[:, None], counts - taken, left[..., None])
    return Frequencies(
        overall=overall,
        population=torch.where(left[..., None] > 0, each, overall[:, None]),
        minor_allele_count=torch.minimum(without, remaining - without),
    )


def _frequency(count: Tensor, size: Tensor, without: Tensor, left: Tensor) -> Tensor:
    rare = torch.minimum(count, size - count) < (RARE * size).clamp_min(FEW)
    return torch.where(rare, without / left.clamp_min(1), count / size.clamp_min(1))
