"""Settings of retrieval and of the reference cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from embrag_ds.errors import require


@dataclass(frozen=True)
class RefreshConfig:
    """When the reference cache is re-encoded under ``encoding = "refresh"``; set exactly one."""

    every_steps: int | None = None
    every_epochs: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.every_steps, self.every_epochs) if value is not None]
        require(len(given) == 1, "retrieval.refresh", "set exactly one of every_steps and every_epochs")
        require(given[0] >= 1, "retrieval.refresh", "the interval must be at least 1")


@dataclass(frozen=True)
class RetrievalConfig:
    """Which reference haplotypes are retrieved, and how they are encoded."""

    mode: Literal["embedding", "none"] = "embedding"
    encoding: Literal["fixed", "refresh", "live"] = "refresh"
    refresh: RefreshConfig = field(default_factory=lambda: RefreshConfig(every_epochs=1))
    store: Literal["factored", "dense"] = "factored"
    dense_budget_gb: float = 2.0
    """The dense store refuses to hold more than this."""
    backend: Literal["auto", "torch", "faiss-cpu"] = "auto"
    k: int = 64
    """Neighbours per query haplotype."""
    relatives: str | None = None
    """File of related pairs (two sample ids a line) that never retrieve each other."""

    def __post_init__(self) -> None:
        require(self.dense_budget_gb > 0, "retrieval.dense_budget_gb", "must be positive")
        require(self.k >= 1, "retrieval.k", "must be at least 1")
        require(
            not (self.store == "dense" and self.encoding == "live"),
            "retrieval.store",
            '"dense" holds stored embeddings, so it goes with encoding "fixed" or "refresh", not "live"',
        )
