"""The two stores of reference haplotypes: the factored one, and the literal one it replaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from embrag_ds.data.dataset import WindowedPanel
from embrag_ds.data.tokens import MASK
from embrag_ds.errors import UserError
from embrag_ds.ops.bits import pack
from embrag_ds.retrieval.cache import Encoder, WindowCode
from embrag_ds.retrieval.packed import GIB
from embrag_ds.retrieval.schedule import Generation
from embrag_ds.retrieval.search import Search, barred
from embrag_ds.retrieval.settings import LocalRetrieval


@dataclass(frozen=True)
class Query:
    """Whom to find neighbours for.

    ``tokens`` int64 [B, L] of a window; ``shown`` int64 [T], the sites that at least one of them shows, on
    the CPU (``shown_on_device``: the same there); ``alleles`` uint8 [T, H], the reference haplotypes at those
    sites; ``excluded`` int64 [B, E], haplotypes that each must not find, filled up with H;
    ``typed_per_haplotype``, the mean number of sites that one of them shows.
    """

    window: int
    tokens: Tensor
    shown: np.ndarray
    shown_on_device: Tensor
    alleles: Tensor
    excluded: Tensor
    typed_per_haplotype: float


class Store(Protocol):
    """What the collator asks of a store; ``backend`` is the name of what searches."""

    backend: str

    def search(self, query: Query, code: WindowCode, k: int) -> Tensor:
        """Ids int64 [B, k] of reference haplotypes near each query haplotype, nearest first."""
        ...

    def embeddings(self, window: int, ids: Tensor, generation: Generation) -> Tensor | None:
        """Stored embeddings [B, K, L, D] of ``ids`` [B, K] in the core, or None: gather from the codebook."""
        ...


class FactoredStore:
    """Packed alleles and a codebook: exact search on L-wide rows, nothing of size [H, L, D].

    With ``local`` retrieval the ``per_chunk`` nearest of every chunk of typed sites come first, rank by rank, and
    the nearest over the whole window fill up the rest: a haplotype that is shared over a stretch only is
    found there, whatever it looks like elsewhere.
    """

    def __init__(self, search: Search, local: LocalRetrieval | None = None):
        self.backend = search.name
        self._search = search
        self._local = local

    def search(self, query: Query, code: WindowCode, k: int) -> Tensor:
        tokens = query.tokens.index_select(1, query.shown_on_device)
        weights = code.weights[query.shown_on_device] * (tokens < MASK)
        count = query.alleles.shape[1]
        reference = pack(query.alleles) if self._search.packed else query.alleles

        def nearest(sites: slice, number: int) -> Tensor:
            found = self._search.nearest(
                tokens[:, sites], weights[:, sites].contiguous(), reference[sites], count, query.excluded, number
            )
            return found[1]

        everywhere = nearest(slice(None), k)
        if self._local is None:
            return everywhere
        chunks = self._local.chunks(len(query.shown), query.typed_per_haplotype)
        near = torch.stack([nearest(chunk, min(k, self._local.per_chunk)) for chunk in chunks], dim=2)
        return first_distinct(torch.cat([near.flatten(1), everywhere], dim=1), k, count)

    def embeddings(self, window: int, ids: Tensor, generation: Generation) -> None:
        return None


def first_distinct(candidates: Tensor, k: int, count: int) -> Tensor:
    """The first ``k`` distinct ids of each row of ``candidates`` int64 [B, C] (all below ``count``), in order: [B, k].

    A row must hold at least ``k`` distinct ones.
    """
    width = candidates.shape[1]
    place = torch.arange(width, dtype=torch.int32, device=candidates.device).expand(len(candidates), -1)
    first = torch.full((len(candidates), count), width, dtype=torch.int32, device=candidates.device)
    first.scatter_reduce_(1, candidates, place, "amin")
    return torch.topk(first, k, dim=1, largest=False, sorted=True).indices


class DenseStore:
    """The literal form: stored embeddings [H, L, D] and FAISS ``IndexFlatL2`` over flattened L x D rows.

    It is the oracle of :class:`FactoredStore`, for panels small enough to hold. What a query hides is
    set to zero on both sides, so a hidden site adds nothing to a distance.
    """

    backend = "faiss IndexFlatL2"

    def __init__(self, data: WindowedPanel, width: int, budget_gb: float, device: torch.device, generations: int = 1):
        """``generations`` are held at once: two where they are refreshed."""
        needed = generations * sum(map(len, data.windows)) * len(data.reference) * width * 4
        if needed > budget_gb * GIB:
            raise UserError(
                f"embrag.retrieval.store=dense: {len(data)} windows of {len(data.reference)} haplotypes x {width} dims "
                f"need {needed / GIB:.1f} GiB, above embrag.retrieval.dense_budget_gb={budget_gb:g}; use store=factored"
            )
        self._data = data
        self._device = device
        self._generations = generations
        self._stored: dict[int, list[Tensor]] = {}
        self._encoders: dict[int, Encoder] = {}

    def refresh(self, generation: Generation, encoder: Encoder) -> None:
        """Encode every reference haplotype in every window."""
        number = generation.number
        for old in [each for each in self._stored if each <= number - self._generations]:
            del self._stored[old], self._encoders[old]
        self._encoders[number] = encoder
        with torch.no_grad():
            self._stored[number] = [
                encoder(window, torch.from_numpy(self._data.reference_alleles(window)).to(self._device).long())
                for window in range(len(self._data))
            ]

    def search(self, query: Query, code: WindowCode, k: int) -> Tensor:
        import faiss

        tokens, number = query.tokens, code.generation.number
        stored = self._stored[number][query.window].float().numpy(force=True)
        with torch.no_grad():
            queries = self._encoders[number](query.window, tokens).float().numpy(force=True)
        observed = (tokens < MASK).numpy(force=True)
        count = len(stored)
        excluded = barred(query.excluded, count).numpy(force=True)
        ids = np.empty((len(queries), k), dtype=np.int64)
        # Queries that hide the same sites share an index.
        patterns, pattern_of = np.unique(observed, axis=0, return_inverse=True)
        for kind, pattern in enumerate(patterns):
            index = faiss.IndexFlatL2(stored.shape[1] * stored.shape[2])
            index.add((stored * pattern[:, None]).reshape(count, -1))
            for row in np.flatnonzero(pattern_of.reshape(-1) == kind):
                flat = (queries[row] * pattern[:, None]).reshape(1, -1)
                surplus = int(excluded[row].sum())
                found = index.search(flat, min(k + surplus, count))[1][0]
                ids[row] = found[~excluded[row][found]][:k]
        return torch.from_numpy(ids).to(tokens.device)

    def embeddings(self, window: int, ids: Tensor, generation: Generation) -> Tensor:
        return self._stored[generation.number][window][ids][:, :, self._data.windows[window].core]
