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
from embrag_ds.retrieval.cache import Encoder, WindowCode
from embrag_ds.retrieval.search import Search

GIB = 1 << 30


@dataclass(frozen=True)
class Neighbours:
    """Retrieved reference haplotypes: ``ids`` int64 [B, K], nearest first, and ``distance`` [B, K]."""

    ids: Tensor
    distance: Tensor


@dataclass(frozen=True)
class Query:
    """Whom to find neighbours for: ``tokens`` int64 [B, L] of a window, the sites ``shown`` int64 [T] by at
    least one of them, and the reference haplotypes ``excluded`` bool [B, H] for each."""

    window: int
    tokens: Tensor
    shown: Tensor
    excluded: Tensor


class Store(Protocol):
    """What the collator asks of a store."""

    def search(self, query: Query, code: WindowCode, k: int) -> Neighbours:
        """The ``k`` nearest reference haplotypes of every query haplotype."""
        ...

    def refresh(self, encoder: Encoder) -> None:
        """Take over a new generation of the embedding layer."""
        ...

    def embeddings(self, window: int, ids: Tensor) -> Tensor | None:
        """Stored embeddings [B, K, L, D] of ``ids`` [B, K] in the core, or None: gather from the codebook."""
        ...


class FactoredStore:
    """Packed alleles and a codebook: exact search on L-wide rows, nothing of size [H, L, D]."""

    def __init__(self, data: WindowedPanel, search: Search, device: torch.device):
        self._data = data
        self._search = search
        self._device = device

    def refresh(self, encoder: Encoder) -> None:
        """Nothing to do: alleles are static, and only the weights of a query change."""

    def search(self, query: Query, code: WindowCode, k: int) -> Neighbours:
        tokens = query.tokens[:, query.shown]
        weights = code.weights[query.shown] * (tokens < MASK)
        queries = weights * (2 * tokens - 1)
        alleles = torch.from_numpy(self._data.reference_alleles(query.window)).to(self._device)
        references = alleles[:, query.shown].float().mul_(2).sub_(1)
        similarity, ids = self._search(queries, references, query.excluded, k)
        return Neighbours(ids, (weights.sum(1, keepdim=True) - similarity) / 2)

    def embeddings(self, window: int, ids: Tensor) -> None:
        return None


class DenseStore:
    """The literal form: stored embeddings [H, L, D] and FAISS ``IndexFlatL2`` over flattened L x D rows.

    It is the oracle of :class:`FactoredStore`, for panels small enough to hold. What a query hides is
    set to zero on both sides, so a hidden site adds nothing to a distance.
    """

    def __init__(self, data: WindowedPanel, width: int, budget_gb: float, device: torch.device):
        needed = sum(map(len, data.windows)) * len(data.reference) * width * 4
        if needed > budget_gb * GIB:
            raise UserError(
                f"embrag.retrieval.store=dense: {len(data)} windows of {len(data.reference)} haplotypes x {width} dims "
                f"need {needed / GIB:.1f} GiB, above embrag.retrieval.dense_budget_gb={budget_gb:g}; use store=factored"
            )
        self._data = data
        self._device = device
        self._stored: list[Tensor] = []
        self._encoder: Encoder | None = None

    def refresh(self, encoder: Encoder) -> None:
        """Encode every reference haplotype in every window."""
        self._encoder = encoder
        with torch.no_grad():
            self._stored = [
                encoder(window, torch.from_numpy(self._data.reference_alleles(window)).to(self._device).long())
                for window in range(len(self._data))
            ]

    def search(self, query: Query, code: WindowCode, k: int) -> Neighbours:
        import faiss

        tokens = query.tokens
        stored = self._stored[query.window].float().numpy(force=True)
        assert self._encoder is not None
        with torch.no_grad():
            queries = self._encoder(query.window, tokens).float().numpy(force=True)
        observed = (tokens < MASK).numpy(force=True)
        barred = query.excluded.numpy(force=True)
        count = len(stored)
        ids = np.empty((len(queries), k), dtype=np.int64)
        distance = np.empty((len(queries), k), dtype=np.float32)
        # Queries that hide the same sites share an index.
        patterns, pattern_of = np.unique(observed, axis=0, return_inverse=True)
        for number, pattern in enumerate(patterns):
            index = faiss.IndexFlatL2(stored.shape[1] * stored.shape[2])
            index.add((stored * pattern[:, None]).reshape(count, -1))
            for row in np.flatnonzero(pattern_of.reshape(-1) == number):
                flat = (queries[row] * pattern[:, None]).reshape(1, -1)
                surplus = int(barred[row].sum())
                squared, found = index.search(flat, min(k + surplus, count))
                kept = np.flatnonzero(~barred[row][found[0]])[:k]
                ids[row], distance[row] = found[0][kept], squared[0][kept]
        return Neighbours(torch.from_numpy(ids).to(tokens.device), torch.from_numpy(distance).to(tokens.device))

    def embeddings(self, window: int, ids: Tensor) -> Tensor:
        return self._stored[window][ids][:, :, self._data.windows[window].core]
