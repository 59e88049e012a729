"""Reference side of a run: snapshots of the embedding layer, their encoding of the panel, and the collators."""

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

from embrag_ds.data.sampler import QueryBatch
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
from embrag_ds.retrieval.collate import RetrievalCollator, receive, site_tensors
from embrag_ds.retrieval.dense import DenseStore
from embrag_ds.retrieval.device_panel import GIB, DevicePanel
from embrag_ds.retrieval.fastest import FirstSearch, FirstSearchStore
from embrag_ds.retrieval.schedule import Generation, RefreshSchedule
from embrag_ds.retrieval.search import Search, make_search
from embrag_ds.retrieval.settings import RetrievalConfig
from embrag_ds.retrieval.store import EveryHaplotype, FactoredStore, Store
from embrag_ds.runtime.timeline import NO_TIMELINE, Timeline
from embrag_ds.runtime.weightless import WithoutMemory

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""Function of parameters to a context in which a sharded run (ZeRO-3) has gathered them whole, a collective call."""


class EmbeddingLayer(Protocol):
    """Interface of the network's embedding layer, a :class:`torch.nn.Module`, of width ``dims``."""

    dims: int

    def __call__(self, tokens: Tensor, sites: SiteTensors) -> Tensor:
        """Embeddings [R, L, D] of ``tokens`` int64 [R, L] of a window with these sites."""
        ...

    def twin(self) -> EmbeddingLayer:
        """New layer of the same shape, with freshly initialised weights."""
        ...

    def requires_grad_(self, requires_grad: bool) -> EmbeddingLayer: ...

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any: ...


def window_encoder(embedding: EmbeddingLayer, data: WindowedPanel, device: torch.device) -> Encoder:
    """Wrap ``embedding`` as an :data:`~embrag_ds.retrieval.codebooks.Encoder` of the windows of ``data``."""

    @torch.no_grad()
    def encode(window: int, tokens: Tensor) -> Tensor:
        return embedding(tokens, site_tensors(data, window, device))

    return encode


class Reference:
    """Encoding of the reference panel by the embedding layer, and its refreshes during training.

    Encoding ``fixed`` keeps the first generation, ``refresh`` re-encodes on a schedule, and ``live`` encodes each batch
    with the current weights. ``schedule`` and ``prefetch`` (batches to build ahead) follow from the settings; ``cache``
    is None where no generations are held. ``backend`` is the search backend of the collators made from now on: that of
    the settings, which a choice among the backends may replace.
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
        """``embedding`` is the layer in training; ``exclusions`` int64 [panel samples, E] as the collator takes them.

        ``gather`` makes the layer's parameters whole while a snapshot of them is taken. With ``snapshot``, the state
        dict of an exported model, the panel is encoded with that alone, window by window on demand. Raises UserError if
        the dense store exceeds its budget.
        """
        self._settings = settings
        self.backend: str = settings.backend
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
            generations = 2 if refreshes and snapshot is None else 1
            self._dense = DenseStore(data, embedding.dims, settings.dense_budget_gb, device, generations)
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

    def collator(
        self, samples: int, slots: int = 1, search: Search | None = None, whole: bool = False
    ) -> RetrievalCollator:
        """Create a collator for one thread, for batches of at most ``samples`` samples.

        ``slots`` is the number of staging slots, and ``search`` replaces the search of the settings. With ``whole`` all
        haplotypes are neighbours, of queries that are typed at the same sites. Raises UserError if the backend is not
        available or the reference set too small.
        """
        store: Store | None = EveryHaplotype() if whole else self._dense
        if self._source is not None and store is None:
            search = search or make_search(self.backend, self._device)
            store = FactoredStore(search, self._settings.local)
        return self._collator(samples, slots, store, self._timeline, whole)

    def first_search(self, queries: QueryBatch) -> FirstSearch | None:
        """The search for ``queries`` at step 0, to time the backends on; None where no backend searches.

        Collective in a sharded run with encoding ``live``.
        """
        if self._source is None or self._dense is not None:
            return None
        store = FirstSearchStore(self._settings.local, self._device)
        receive(self._collator(len(queries.samples), 1, store, NO_TIMELINE)(queries, 0))
        return store.first

    def _collator(
        self, samples: int, slots: int, store: Store | None, timeline: Timeline, whole: bool = False
    ) -> RetrievalCollator:
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
            whole=whole,
            timeline=timeline,
        )

    def begin_refresh(self, step: int) -> None:
        """Take a snapshot of the embedding layer and start encoding it, if one is due before training step ``step``.

        Collective in a sharded run. Raises the exception that ended an encoding begun earlier.
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
        """Frozen embedding layer with the weights ``state``, which it keeps, and the encoder that uses it."""
        with WithoutMemory():  # a twin with weights of its own would be copied to the device, and the host wait
            snapshot = self._live_embedding.twin().requires_grad_(False)
        snapshot.load_state_dict(state, assign=True)
        return snapshot, window_encoder(snapshot, self._data, self._device)

    def age(self, step: int) -> dict[str, int]:
        """Log entries about the generation used at ``step``: its number, age in steps, and refreshes skipped so far.

        Empty where nothing is encoded.
        """
        if self._live:  # every step is a generation
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
        """Describe in one line the memory of reference cache, staging, dense store and packed panel."""
        cache = 0 if self.cache is None else self.cache.host_bytes
        staging = sum(each.staging.host_bytes for each in collators)
        where = "on the device" if self._panel.device_bytes else "memory-mapped"
        pinned = "pinned " if self._device.type == "cuda" else ""
        dense = "" if self._dense is None else f"dense store up to {self._dense.bytes / GIB:.3f} GiB; "
        return (
            f"reference cache {cache / GIB:.3f} GiB, staging {staging / GIB:.3f} GiB of {pinned}host memory; {dense}"
            f"packed panel {self._panel.packed_bytes / GIB:.3f} GiB {where}"
        )

    def snapshot_weights(self, steps: int) -> dict[str, Tensor] | None:
        """State dict on the CPU of the snapshot in use after ``steps`` steps; None where no snapshots are taken."""
        if self.cache is None:
            return None
        return _on_cpu(self._snapshots[self.schedule.needed_after(steps)[0].number])

    def state_dict(self, steps: int) -> list[dict[str, Any]]:
        """State for a checkpoint after ``steps`` steps: generations, and the weights of their snapshots on the CPU."""
        if self.cache is None:
            return []
        return [
            {"generation": asdict(each), "weights": _on_cpu(self._snapshots[each.number])}
            for each in self.schedule.needed_after(steps)
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restore the generations saved by :meth:`state_dict`, encoding the panel again with their weights."""
        for each in state:
            weights = {name: value.to(self._device) for name, value in each["weights"].items()}
            self._encode(weights, Generation(**each["generation"]))

    def close(self) -> None:
        """Stop the refresh thread."""
        if self.cache is not None:
            self.cache.close()


def _on_cpu(snapshot: EmbeddingLayer) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in copy.deepcopy(snapshot.state_dict()).items()}
