"""The reference side of a run: snapshots of the embedding layer, when they are taken, and the collators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from embrag_ds.data.windows import WindowedPanel
from embrag_ds.retrieval.batch import SiteTensors
from embrag_ds.retrieval.codebooks import (
    CodebookSource,
    Encoder,
    EqualWeights,
    LiveCodebooks,
    ReferenceCache,
    SnapshotCodebooks,
)
from embrag_ds.retrieval.collate import RetrievalCollator, site_tensors
from embrag_ds.retrieval.dense import DenseStore
from embrag_ds.retrieval.device_panel import GIB, DevicePanel
from embrag_ds.retrieval.schedule import Generation, RefreshSchedule
from embrag_ds.retrieval.search import Search, make_search
from embrag_ds.retrieval.settings import RetrievalConfig
from embrag_ds.retrieval.store import FactoredStore, Store
from embrag_ds.runtime.timeline import NO_TIMELINE, Timeline

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""A context in which these parameters are whole: a sharded run gathers them (collective)."""


class EmbeddingLayer(Protocol):
    """The network's embedding layer, a :class:`torch.nn.Module`, as retrieval knows it."""

    dims: int

    def __call__(self, tokens: Tensor, sites: SiteTensors) -> Tensor:
        """Embeddings [R, L, D] of ``tokens`` int64 [R, L]."""
        ...

    def twin(self) -> EmbeddingLayer:
        """A layer of the same shape with weights of its own."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> EmbeddingLayer: ...

    def requires_grad_(self, requires_grad: bool) -> EmbeddingLayer: ...

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> Any: ...


def window_encoder(embedding: EmbeddingLayer, data: WindowedPanel, device: torch.device) -> Encoder:
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
        embedding: EmbeddingLayer,
        device: torch.device,
        exclusions: np.ndarray,
        steps_per_epoch: int = 1,
        timeline: Timeline = NO_TIMELINE,
        gather: Gather = lambda parameters: nullcontext(),
        snapshot: dict[str, Tensor] | None = None,
    ):
        """``gather`` makes the layer's parameters whole while a snapshot of them is taken. With a ``snapshot`` (of an
        exported model) the panel is encoded by that alone, window by window as they are used, and never again."""
        self._settings = settings
        self._data = data
        self._live_embedding = embedding
        self._gather = gather
        self._device = device
        self._exclusions = exclusions
        encodes = settings.mode == "embedding"
        self._live = encodes and settings.encoding == "live"
        refreshes = encodes and settings.encoding == "refresh"
        self._timeline = timeline
        self.schedule = RefreshSchedule(settings.refresh if refreshes else None, steps_per_epoch)
        self.prefetch = 0 if self._live else settings.prefetch
        self.cache: ReferenceCache | None = None
        self._snapshots: dict[int, EmbeddingLayer] = {}
        self._panel = DevicePanel(data, device, settings.device_budget_gb)
        self._dense: DenseStore | None = None
        self._source: CodebookSource | None = None
        if settings.mode == "token":
            self._source = EqualWeights(data.windows, device)
        if not encodes:
            return
        if settings.store == "dense":
            self._dense = DenseStore(data, embedding.dims, settings.dense_budget_gb, device, 2 if refreshes else 1)
        if snapshot is not None:
            encoder = self._encoder({name: value.to(device) for name, value in snapshot.items()})[1]
            self._source = SnapshotCodebooks(encoder, data.windows, device)
            if self._dense is not None:
                self._dense.refresh(Generation(0, 0, 0), encoder)
        elif self._live:
            self._source = LiveCodebooks(window_encoder(embedding, data, device), data.windows, device)
        else:
            dtype = next(iter(embedding.parameters())).dtype
            asynchronous = refreshes and settings.refresh.asynchronous
            self._source = self.cache = ReferenceCache(
                data.windows, embedding.dims, dtype, device, self.schedule, asynchronous, timeline
            )

    def __str__(self) -> str:
        settings = self._settings
        return f"{settings.mode}, {settings.encoding}" if settings.mode == "embedding" else settings.mode

    def collator(self, samples: int, slots: int = 1, search: Search | None = None) -> RetrievalCollator:
        """A collator for one thread's use and batches of at most ``samples``; ``search`` in place of the backend's."""
        store: Store | None = self._dense
        if self._source is not None and store is None:
            search = search or make_search(self._settings.backend, self._device)
            store = FactoredStore(search, self._settings.local)
        return RetrievalCollator(
            self._data,
            self._device,
            panel=self._panel,
            store=store,
            source=self._source,
            k=self._settings.k,
            exclusions=self._exclusions,
            samples=samples,
            slots=slots,
            live=self._live,
            token_k=self._settings.token_k if self._settings.mode == "token" else 0,
            timeline=self._timeline,
        )

    def begin_refresh(self, step: int) -> None:
        """Take a snapshot of the embedding layer and start encoding it, if that is due before ``step``.

        Raises what went wrong in an encoding begun earlier.
        """
        if self.cache is None:
            return
        self.cache.raise_failure()
        generation = self.schedule.taken_at(step)
        if generation is None or generation.number in self._snapshots:
            return
        weights = list(self._live_embedding.parameters())
        with self._gather(weights):
            state = {name: value.detach().clone() for name, value in self._live_embedding.state_dict().items()}
        self._encode(state, generation)

    def _encode(self, state: dict[str, Tensor], generation: Generation) -> None:
        assert self.cache is not None
        snapshot, encoder = self._encoder(state)
        self._snapshots.pop(generation.number - 2, None)
        self._snapshots[generation.number] = snapshot
        store = self._dense
        finished = partial(store.refresh, generation, encoder) if store is not None else lambda: None
        self.cache.begin(generation, encoder, finished)

    def _encoder(self, state: dict[str, Tensor]) -> tuple[EmbeddingLayer, Encoder]:
        """A snapshot from its weights, and what encodes with it."""
        kind = next(iter(state.values())).dtype
        snapshot = self._live_embedding.twin().to(self._device, kind).requires_grad_(False)
        snapshot.load_state_dict(state)
        return snapshot, window_encoder(snapshot, self._data, self._device)

    def age(self, step: int) -> dict[str, int]:
        """What the log says of the generation used at ``step``; empty where nothing is encoded."""
        if self._live:  # a generation a step
            return {"generation": step, "staleness": 0, "refreshes_skipped": 0}
        if self.cache is None:
            return {}
        used = self.schedule.in_use(step)
        return {
            "generation": used.number,
            "staleness": step - used.snapshot_step,
            "refreshes_skipped": self.schedule.skipped_until(step),
        }

    def memory(self, collators: list[RetrievalCollator]) -> str:
        """What retrieval holds, in one line; all of it is allocated at the start."""
        cache = 0 if self.cache is None else self.cache.host_bytes
        staging = sum(each.staging.host_bytes for each in collators)
        where = "on the device" if self._panel.device_bytes else "memory-mapped"
        pinned = "pinned " if self._device.type == "cuda" else ""
        return (
            f"reference cache {cache / GIB:.3f} GiB, staging {staging / GIB:.3f} GiB of {pinned}host memory; "
            f"packed panel {self._panel.packed_bytes / GIB:.3f} GiB {where}"
        )

    def snapshot_weights(self, steps: int) -> dict[str, Tensor] | None:
        """The embedding layer that encodes references after ``steps`` steps; None where no snapshot is taken."""
        if self.cache is None:
            return None
        return _on_cpu(self._snapshots[self.schedule.needed_after(steps)[0].number])

    def state_dict(self, steps: int) -> list[dict[str, Any]]:
        """What a checkpoint after ``steps`` steps needs: generations and the weights of their snapshots."""
        if self.cache is None:
            return []
        return [
            {"generation": asdict(each), "weights": _on_cpu(self._snapshots[each.number])}
            for each in self.schedule.needed_after(steps)
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Encode again the generations saved by :meth:`state_dict`."""
        for each in state:
            weights = {name: value.to(self._device) for name, value in each["weights"].items()}
            self._encode(weights, Generation(**each["generation"]))

    def close(self) -> None:
        """Stop encoding."""
        if self.cache is not None:
            self.cache.close()


def _on_cpu(snapshot: EmbeddingLayer) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in copy.deepcopy(snapshot.state_dict()).items()}
