"""The literal store of reference haplotypes, all of it: the oracle of the factored one."""

from __future__ import annotations

import importlib.util

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


class DenseStore:
    """The literal form: stored embeddings [H, L, D] and FAISS ``IndexFlatL2`` over flattened L x D rows.

    It is the oracle of :class:`~embrag_ds.retrieval.store.FactoredStore`, for panels small enough to hold. What a
    query hides is set to zero on both sides, so a masked site adds nothing to a distance.
    """

    backend = "faiss IndexFlatL2"

    def __init__(self, data: WindowedPanel, width: int, budget_gb: float, device: torch.device, generations: int = 1):
        """``generations`` are held at once: two where they are refreshed."""
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

    def search(self, query: Query, code: WindowCodebook, k: int) -> Tensor:
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
