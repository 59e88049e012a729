"""Dense store: embeddings of all reference haplotypes in memory, as a test oracle of the factored store."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embrag_ds.data.tokens import MASK
from embrag_ds.data.windows import WindowedPanel
from embrag_ds.errors import UserError
from embrag_ds.retrieval.codebooks import Encoder, WindowCodebook
from embrag_ds.retrieval.device_panel import GIB
from embrag_ds.retrieval.schedule import Generation
from embrag_ds.retrieval.search import barred
from embrag_ds.retrieval.store import Query
from embrag_ds.runtime.streams import hand_over, mark_current


class DenseStore:
    """Store of embeddings [H, L, D] of every window, searched with FAISS ``IndexFlatL2`` over rows of length L D.

    It computes distances by their definition, for panels small enough to hold, and so serves as the oracle of
    :class:`~embrag_ds.retrieval.store.FactoredStore`. Embeddings at a query's masked sites are set to zero on both
    sides, so those sites add nothing to a distance.
    """

    backend = "faiss IndexFlatL2"

    def __init__(self, data: WindowedPanel, width: int, budget_gb: float, device: torch.device, generations: int = 1):
        """Check that FAISS is installed and the embeddings fit into ``budget_gb`` GiB; raises UserError otherwise.

        ``width`` is D. ``generations`` is the number held at once: two with encoding ``refresh``. Memory is allocated
        by :meth:`refresh`.
        """
        if importlib.util.find_spec("faiss") is None:
            raise UserError(
                "embrag.retrieval.store=dense: FAISS is not installed; install the 'cpu' extra or use store=factored"
            )
        needed = generations * sum(map(len, data.windows)) * len(data.reference) * width * 4
        if needed > budget_gb * GIB:
            raise UserError(
                f"embrag.retrieval.store=dense: {len(data)} windows of {len(data.reference)} haplotypes x {width} dims "
                f"need {needed / GIB:.1f} GiB, above embrag.retrieval.dense_budget_gb={budget_gb:g}; use store=factored"
            )
        self._data = data
        self._device = device
        self._generations = generations
        self._stored: dict[int, _Stored] = {}
        self.bytes = needed
        """Memory of all embeddings in float32; half as much in bf16."""

    def refresh(self, generation: Generation, encoder: Encoder) -> None:
        """Encode every reference haplotype in every window, and drop generations that are too old."""
        number = generation.number
        for old in [each for each in self._stored if each <= number - self._generations]:
            del self._stored[old]
        with torch.no_grad():
            windows = [
                encoder(window, torch.from_numpy(self._data.reference_alleles(window)).to(self._device).long())
                for window in range(len(self._data))
            ]
        self._stored[number] = _Stored(encoder, windows, mark_current(self._device))

    def search(self, query: Query, code: WindowCodebook, k: int) -> Tensor:
        """Ids int64 [B, k] of the nearest reference haplotypes, nearest first, in the generation of ``code``."""
        import faiss

        tokens, generation = query.tokens, self._stored[code.generation.number]
        stored = generation.window(query.window).float().numpy(force=True)
        with torch.no_grad():
            queries = generation.encoder(query.window, tokens).float().numpy(force=True)
        observed = (tokens < MASK).numpy(force=True)
        count = len(stored)
        excluded = barred(query.excluded, count).numpy(force=True)
        ids = np.empty((len(queries), k), dtype=np.int64)
        # Queries with the same masked sites share an index.
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
        """Stored embeddings [B, K, L, D] of ``ids`` int64 [B, K] in the window's core."""
        stored = self._stored[generation.number].window(window)
        return stored[ids][:, :, self._data.windows[window].core]


@dataclass(frozen=True)
class _Stored:
    """One generation: its encoder, the embeddings [H, L, D] of every window, and a CUDA event after their encoding."""

    encoder: Encoder
    windows: list[Tensor]
    encoded: Any

    def window(self, number: int) -> Tensor:
        """Embeddings of a window, usable on the current stream."""
        hand_over([self.windows[number]], self.encoded)
        return self.windows[number]
