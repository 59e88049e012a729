"""Stores of reference haplotypes: their interface, and the factored store; for the dense one see :mod:`.dense`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from embrag_ds.data.tokens import MASK
from embrag_ds.ops.bits import pack
from embrag_ds.retrieval.codebooks import WindowCodebook
from embrag_ds.retrieval.schedule import Generation
from embrag_ds.retrieval.search import Search
from embrag_ds.retrieval.settings import LocalRetrieval

_TABLE_BYTES = 64 << 20


@dataclass(frozen=True)
class Query:
    """Query haplotypes of one window, for a search in a store.

    * ``tokens`` int64 [B, L]: their alleles, MASK at masked sites.
    * ``observed`` int64 [T]: sites observed in at least one of them, on the CPU; ``observed_on_device``: the same
      there.
    * ``alleles`` uint8 [T, H]: reference haplotypes at those sites.
    * ``excluded`` int64 [B, E]: haplotypes that each must not retrieve, padded with H.
    * ``typed_per_haplotype``: mean number of observed sites of a query haplotype.
    """

    window: int
    tokens: Tensor
    observed: np.ndarray
    observed_on_device: Tensor
    alleles: Tensor
    excluded: Tensor
    typed_per_haplotype: float


class Store(Protocol):
    """Interface of a store; ``backend`` is the name of its search."""

    backend: str

    def search(self, query: Query, code: WindowCodebook, k: int) -> Tensor:
        """Ids int64 [B, k] of distinct reference haplotypes near each query haplotype, nearest first."""
        ...

    def embeddings(self, window: int, ids: Tensor, generation: Generation) -> Tensor | None:
        """Stored embeddings [B, K, L, D] of ``ids`` int64 [B, K] in the core; None if they follow from the codebook."""
        ...


class FactoredStore:
    """Store that searches alleles with site weights, exactly, and holds no embeddings of size [H, L, D].

    With ``local`` retrieval, the ``per_chunk`` nearest of every chunk of typed sites come first, rank by rank. The
    nearest over the whole window fill the rest. This finds haplotypes that share only a stretch with the query.
    """

    def __init__(self, search: Search, local: LocalRetrieval | None = None):
        self.backend = search.name
        self._search = search
        self._local = local

    def search(self, query: Query, code: WindowCodebook, k: int) -> Tensor:
        """Ids int64 [B, k] of distinct reference haplotypes: the local ones by rank, then the nearest."""
        tokens = query.tokens.index_select(1, query.observed_on_device)
        weights = code.weights[query.observed_on_device] * (tokens < MASK)
        count = query.alleles.shape[1]
        reference = _packed(query.alleles) if self._search.packed else query.alleles

        def nearest(sites: slice, number: int) -> Tensor:
            found = self._search.nearest(
                tokens[:, sites], weights[:, sites].contiguous(), reference[sites], count, query.excluded, number
            )
            return found[1]

        everywhere = nearest(slice(None), k)
        if self._local is None:
            return everywhere
        chunks = self._local.chunks(len(query.observed), query.typed_per_haplotype)
        by_chunk = torch.stack([nearest(chunk, min(k, self._local.per_chunk)) for chunk in chunks], dim=2)
        return first_distinct(torch.cat([by_chunk.flatten(1), everywhere], dim=1), k, count)

    def embeddings(self, window: int, ids: Tensor, generation: Generation) -> None:
        """None: embeddings follow from the codebook."""
        return None


class EveryHaplotype:
    """Store that searches nothing: all reference haplotypes are neighbours of every query."""

    backend = "none"

    def search(self, query: Query, code: WindowCodebook, k: int) -> Tensor:
        """Ids int64 [B, H] of all, in their order."""
        return torch.arange(query.alleles.shape[1], device=query.tokens.device).expand(len(query.tokens), -1)

    def embeddings(self, window: int, ids: Tensor, generation: Generation) -> None:
        """None: embeddings follow from the codebook."""
        return None


def first_distinct(candidates: Tensor, k: int, count: int) -> Tensor:
    """First ``k`` distinct ids of each row of ``candidates``, in order, int64 [B, k].

    ``candidates`` int64 [B, n] are below ``count``, and a row must hold at least ``k`` distinct ones. Rows are taken a
    few at a time, so that the table of first places, 4 ``count`` bytes a row, stays within 64 MiB.
    """
    width = candidates.shape[1]
    place = torch.arange(width, dtype=torch.int32, device=candidates.device)
    found = []
    for rows in candidates.split(max(1, _TABLE_BYTES // (4 * count))):
        first = torch.full((len(rows), count), width, dtype=torch.int32, device=candidates.device)
        first.scatter_reduce_(1, rows, place.expand_as(rows), "amin")
        found.append(torch.topk(first, k, dim=1, largest=False, sorted=True).indices)
    return torch.cat(found)


def _packed(alleles: Tensor) -> Tensor:
    """Bit-packed alleles uint8 [T, ceil(H / 8)] of ``alleles`` uint8 [T, H].

    Packing takes three times the memory of the alleles, so they are taken a few sites at a time.
    """
    return torch.cat([pack(rows) for rows in alleles.split(max(1, _TABLE_BYTES // alleles.shape[1]))])
