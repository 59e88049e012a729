"""Settings of retrieval and of the reference cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

from embrag_ds.errors import require
from embrag_ds.retrieval.schedule import RefreshConfig
from embrag_ds.settings import strict_settings


@dataclass(frozen=True)
class LocalRetrieval:
    """Search in chunks of ``chunk_sites`` typed sites with ``context_sites`` on either side, the
    ``per_chunk`` nearest of each."""

    chunk_sites: int
    context_sites: int
    per_chunk: int

    def chunks(self, observed: int, typed: float) -> list[slice]:
        """Chunks, context included, of ``observed`` sites of which a haplotype shows ``typed`` on average."""
        spread = observed / max(typed, 1.0)
        context = round(self.context_sites * spread)
        number = max(1, round(observed / (self.chunk_sites * spread)))
        bounds = np.linspace(0, observed, number + 1).round().astype(int).tolist()
        return [slice(max(0, first - context), min(observed, last + context)) for first, last in pairwise(bounds)]


@strict_settings
class RetrievalConfig:
    """Which reference haplotypes are retrieved, and how they are encoded."""

    mode: Literal["embedding", "token", "none"] = "embedding"
    """``embedding`` (V18): nearest by the embedding layer, fused before the transformer. ``token`` (V17, baseline and
    rollback): nearest by plain Hamming distance, sent through the transformer too, and fused after it."""
    token_k: int = 1
    """Mode ``token``: so many of the nearest go through the transformer; their outputs are averaged."""
    encoding: Literal["fixed", "refresh", "live"] = "refresh"
    refresh: RefreshConfig = field(default_factory=lambda: RefreshConfig(every_epochs=1))
    store: Literal["factored", "dense"] = "factored"
    dense_budget_gb: float = 2.0
    """The dense store refuses to hold more than this."""
    backend: Literal["auto", "torch", "faiss-cpu", "faiss-gpu", "cupy"] = "auto"
    k: int = 64
    """Neighbours per query haplotype."""
    per_chunk: int = 0
    """Of these, so many from every chunk of typed sites, before those over the whole window; 0: none."""
    chunk_sites: int = 32
    """Typed sites in a chunk."""
    context_sites: int = 32
    """Typed sites on either side of a chunk that its search looks at, too."""
    prefetch: int = 2
    """Batches built ahead of the training step, on a thread of their own; 0: built when asked for."""
    device_budget_gb: float = 8.0
    """The packed panel lives on a CUDA device up to this size; a larger one is streamed."""
    relatives: str | None = None
    """File of related pairs (two sample ids a line) that never retrieve each other."""

    def __post_init__(self) -> None:
        require(self.dense_budget_gb > 0, "retrieval.dense_budget_gb", "must be positive")
        require(self.device_budget_gb >= 0, "retrieval.device_budget_gb", "must not be negative")
        require(self.k >= 1, "retrieval.k", "must be at least 1")
        require(1 <= self.token_k <= self.k, "retrieval.token_k", "must lie between 1 and retrieval.k")
        require(self.per_chunk >= 0, "retrieval.per_chunk", "must not be negative")
        require(self.chunk_sites >= 1, "retrieval.chunk_sites", "must be at least 1")
        require(self.context_sites >= 0, "retrieval.context_sites", "must not be negative")
        require(self.prefetch >= 0, "retrieval.prefetch", "must not be negative")
        require(
            not (self.store == "dense" and self.encoding == "live"),
            "retrieval.store",
            '"dense" holds stored embeddings, so it goes with encoding "fixed" or "refresh", not "live"',
        )
        require(
            not (self.store == "dense" and self.mode == "token"),
            "retrieval.store",
            '"dense" holds stored embeddings, which mode "token" does not use; set it to "factored"',
        )
        require(
            not (self.store == "dense" and self.per_chunk),
            "retrieval.per_chunk",
            'store "dense" searches whole windows; set it to 0',
        )

    @property
    def local(self) -> LocalRetrieval | None:
        """How to search in chunks, if at all."""
        return LocalRetrieval(self.chunk_sites, self.context_sites, self.per_chunk) if self.per_chunk else None
