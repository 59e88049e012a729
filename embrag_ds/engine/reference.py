"""The reference side of a run: snapshots of the embedding layer, when they are taken, and the collator."""

from __future__ import annotations

import copy
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor

from embrag_ds.data.dataset import WindowedPanel
from embrag_ds.model.embedding import HaplotypeEmbedding
from embrag_ds.retrieval.cache import Encoder, LiveReference, ReferenceCache, refresh_due
from embrag_ds.retrieval.collate import RetrievalCollator, site_tensors
from embrag_ds.retrieval.search import resolve_backend
from embrag_ds.retrieval.settings import RetrievalConfig
from embrag_ds.retrieval.store import DenseStore, FactoredStore, Store


def window_encoder(embedding: HaplotypeEmbedding, data: WindowedPanel, device: torch.device) -> Encoder:
    """``embedding`` as the callable that retrieval knows: (window, tokens) -> embeddings."""

    @torch.no_grad()
    def encode(window: int, tokens: Tensor) -> Tensor:
        return embedding(tokens, site_tensors(data, window, device))

    return encode


class Reference:
    """Encodes the panel with the embedding layer alone and decides when to do it again.

    ``fixed`` keeps the first generation (the document's Strategy A), ``refresh`` re-encodes on a
    schedule (Strategy B), ``live`` encodes inside the graph at every step.
    """

    def __init__(
        self,
        settings: RetrievalConfig,
        data: WindowedPanel,
        embedding: HaplotypeEmbedding,
        device: torch.device,
        exclusions: np.ndarray,
    ):
        self._settings = settings
        self._data = data
        self._live_embedding = embedding
        self._device = device
        self.cache: ReferenceCache | None = None
        self.backend = "none"
        self.store: Store | None = None
        self.snapshot: HaplotypeEmbedding | None = None
        source: ReferenceCache | LiveReference | None = None
        if settings.mode == "embedding":
            self.backend, search = resolve_backend(settings.backend)
            if settings.store == "dense":
                width = embedding.token.embedding_dim
                self.store = DenseStore(data, width, settings.dense_budget_gb, device)
            else:
                self.store = FactoredStore(data, search, device)
            if settings.encoding == "live":
                source = LiveReference(window_encoder(embedding, data, device), data.windows, device)
            else:
                source = self.cache = ReferenceCache(data.windows, device)
        self.collate = RetrievalCollator(
            data,
            device,
            store=self.store,
            source=source,
            k=settings.k,
            exclusions=exclusions,
            live=settings.encoding == "live",
        )

    def age(self, step: int) -> dict[str, int]:
        """Generation in use at ``step`` and its staleness in steps; empty without retrieval."""
        if self.store is None:
            return {}
        if self.cache is None:  # live: a generation a step
            return {"generation": step, "staleness": 0}
        return {"generation": self.cache.generation, "staleness": step - self.cache.step}

    def take_snapshot(self, step: int) -> None:
        """Freeze the embedding layer as it is and encode the next generation from it."""
        if self.cache is None:
            return
        weights = list(self._live_embedding.parameters())
        with deepspeed.zero.GatheredParameters(weights):
            state = {name: value.detach().clone() for name, value in self._live_embedding.state_dict().items()}
        self._encode(state, step)

    def refresh_if_due(self, step: int, steps_per_epoch: int) -> bool:
        """Re-encode before step ``step`` if the schedule says so."""
        if self._settings.encoding != "refresh" or self.cache is None:
            return False
        due = refresh_due(step, self._settings.refresh, steps_per_epoch)
        if due:
            self.take_snapshot(step)
        return due

    def _encode(self, state: dict[str, Tensor], step: int) -> None:
        assert self.cache is not None and self.store is not None
        if self.snapshot is None:
            dims = self._live_embedding.token.embedding_dim
            self.snapshot = HaplotypeEmbedding(dims).to(self._device).requires_grad_(False)
        kind = next(iter(state.values())).dtype
        self.snapshot.to(kind).load_state_dict(state)
        encoder = window_encoder(self.snapshot, self._data, self._device)
        self.cache.refresh(encoder, step)
        self.store.refresh(encoder)

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint needs to restore the current generation."""
        if self.cache is None or self.snapshot is None:
            return None
        weights = {name: value.cpu() for name, value in copy.deepcopy(self.snapshot.state_dict()).items()}
        return {"weights": weights, "generation": self.cache.generation, "step": self.cache.step}

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Encode the panel with an exported snapshot."""
        if self.cache is not None:
            self._encode({name: value.to(self._device) for name, value in weights.items()}, step=0)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore a generation saved by :meth:`state_dict`."""
        if state is None or self.cache is None:
            return
        self.restore(state["weights"])
        self.cache.generation, self.cache.step = state["generation"], state["step"]
