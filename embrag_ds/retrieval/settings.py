"""Settings of retrieval: the section ``embrag.retrieval`` of a configuration."""

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
    """Local retrieval: the ``per_chunk`` nearest neighbours in every chunk of typed sites.

    A chunk has about ``chunk_sites`` typed sites, and its search uses ``context_sites`` more on either side.
    """

    chunk_sites: int
    context_sites: int
    per_chunk: int

    def chunks(self, observed: int, typed: float) -> list[slice]:
        """Cut the ``observed`` sites of a batch into chunks, with their context, as slices of those sites.

        ``typed`` is the mean number of observed sites per haplotype, fewer than ``observed`` if masks differ.
        """
        spread = observed / max(typed, 1.0)
        context = round(self.context_sites * spread)
        number = max(1, round(observed / (self.chunk_sites * spread)))
        bounds = np.linspace(0, observed, number + 1).round().astype(int).tolist()
        return [slice(max(0, first - context), min(observed, last + context)) for first, last in pairwise(bounds)]


@strict_settings
class RetrievalConfig:
    """Settings of retrieval: which reference haplotypes are found, and how they are encoded.

    Raises UserError for values that break a rule.
    """

    mode: Literal["embedding", "token", "none"] = "embedding"
    """``embedding`` (V18): nearest by the embedding layer, fused before the transformer. ``token`` (V17, the baseline):
    nearest by Hamming distance, passed through the transformer too and fused after it. ``none``: no retrieval.
    """
    token_k: int = 1
    """[neighbours] Mode ``token``: the nearest so many pass through the transformer, and their outputs are averaged."""
    encoding: Literal["fixed", "refresh", "live"] = "refresh"
    """Encode the panel once (``fixed``), again on a schedule (``refresh``), or for every batch with the current weights
    (``live``).
    """
    refresh: RefreshConfig = field(default_factory=lambda: RefreshConfig(every_epochs=1))
    """Schedule of encoding ``refresh``."""
    store: Literal["factored", "dense"] = "factored"
    """``factored``: packed alleles and codebooks. ``dense``: all embeddings, a check for small panels, not with
    ``live``, ``token`` or ``per_chunk``.
    """
    dense_budget_gb: float = 2.0
    """[GiB] The dense store refuses to hold more."""
    backend: Literal["auto", "torch", "faiss-cpu", "faiss-gpu", "cupy"] = "auto"
    """Search backend of the factored store: ``torch``, ``faiss-cpu``, ``faiss-gpu``, ``cupy`` or ``auto``. The last
    times those that are there on the first window of a run and keeps the fastest, also when the run is resumed.
    Backends differ in which of equally near haplotypes they find, so a run that is to repeat exactly names one.
    """
    k: int = 64
    """[neighbours] Of each query haplotype."""
    per_chunk: int = 0
    """[neighbours] Of every chunk of typed sites, taken before those over the whole window; 0: none."""
    chunk_sites: int = 32
    """[typed sites] In a chunk."""
    context_sites: int = 32
    """[typed sites] On either side of a chunk that its search sees, too."""
    prefetch: int = 2
    """[batches] Built ahead on a thread of their own; 0: each is built when needed, with the same losses. ``live``
    always does that.
    """
    device_budget_gb: float = 8.0
    """[GiB] A packed panel up to this size is kept on a CUDA device; a larger one is streamed."""
    relatives: str | None = None
    """File of related pairs, two sample ids a line, that never retrieve each other."""

    def __post_init__(self) -> None:
        require(self.dense_budget_gb > 0, "retrieval.dense_budget_gb", "must be positive")
        require(self.device_budget_gb >= 0, "retrieval.device_budget_gb", "must not be negative")
        require(self.k >= 1, "retrieval.k", "must be at least 1")
        require(1 <= self.token_k <= self.k, "retrieval.token_k", "must lie between 1 and retrieval.k")
        require(self.per_chunk >= 0, "retrieval.per_chunk", "must not be negative")
        require(self.chunk_sites >= 1, "retrieval.chunk_sites", "must be at least 1")
        require(self.context_sites >= 0, "retrieval.context_sites", "must not be negative")
        require(self.prefetch >= 0, "retrieval.prefetch", "must not be negative")
        require(self.prefetch <= 1_024, "retrieval.prefetch", "must not exceed 1024")
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
        """Settings of local retrieval, or None without it."""
        return LocalRetrieval(self.chunk_sites, self.context_sites, self.per_chunk) if self.per_chunk else None
