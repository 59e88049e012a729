"""Small panels in memory, random embeddings, and slow oracles of the distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from embrag_ds.data.panel import Panel, PanelSubset, Populations
from embrag_ds.data.sampler import QueryBatch, exclusion_table
from embrag_ds.data.tokens import MASK, VOCAB
from embrag_ds.data.windows import WindowedPanel, make_windows
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.codebooks import Encoder, ReferenceCache
from embrag_ds.retrieval.collate import RetrievalCollator
from embrag_ds.retrieval.dense import DenseStore
from embrag_ds.retrieval.device_panel import DevicePanel
from embrag_ds.retrieval.schedule import Generation, RefreshSchedule
from embrag_ds.retrieval.search import make_search
from embrag_ds.retrieval.settings import LocalRetrieval
from embrag_ds.retrieval.store import FactoredStore, Query, Store
from embrag_ds.variants.sites import SiteTable

CPU = torch.device("cpu")
WAYS = (("factored", "torch"), ("factored", "faiss-cpu"), ("dense", "torch"))
"""Store and backend; the dense store searches with FAISS whatever the backend is."""


@dataclass(frozen=True)
class RandomEmbedding:
    """Random embedding, different at every site, with codebooks float32 [L, V, D], one per window."""

    codebooks: list[Tensor]

    def __call__(self, window: int, tokens: Tensor) -> Tensor:
        codebook = self.codebooks[window]
        return codebook[torch.arange(len(codebook)), tokens]

    @property
    def dims(self) -> int:
        return self.codebooks[0].shape[-1]


FIRST = Generation(0, 0, 0)


@dataclass(frozen=True)
class Neighbours:
    """Result of a search: ids int64 [B, K], and their distances by the oracle, float64 [B, K]."""

    ids: Tensor
    distance: Tensor


@dataclass(frozen=True)
class World:
    """Windowed panel and the names of its samples, which may include samples outside the reference set."""

    data: WindowedPanel
    samples: tuple[str, ...]

    def embedding(self, seed: int = 1, dims: int = 3) -> RandomEmbedding:
        maker = torch.Generator().manual_seed(seed)
        return RandomEmbedding([torch.randn(len(w), VOCAB, dims, generator=maker) for w in self.data.windows])

    def dense_store(self, encoder: Encoder, dims: int = 3) -> DenseStore:
        store = DenseStore(self.data, dims, 1.0, CPU)
        store.refresh(FIRST, encoder)
        return store

    def store(self, store: str, backend: str, embedding: RandomEmbedding, local: LocalRetrieval | None = None) -> Store:
        if store == "dense":
            return self.dense_store(embedding, embedding.dims)
        return FactoredStore(make_search(backend, CPU), local)

    def cache(self, encoder: Encoder, dims: int = 3) -> ReferenceCache:
        """Reference cache that holds generation 0 only."""
        cache = ReferenceCache(self.data.windows, dims, torch.float32, CPU, RefreshSchedule(None))
        cache.begin(FIRST, encoder)
        return cache

    def query(self, window: int, tokens: Tensor, observed: np.ndarray, excluded: Tensor) -> Query:
        """Query of a window; ``excluded`` is a mask bool [B, H]."""
        count = len(self.data.reference)
        ids = torch.arange(count).expand_as(excluded).masked_fill(~excluded, count)
        alleles = torch.from_numpy(np.ascontiguousarray(self.data.reference_alleles(window)[:, observed].T))
        typed = float((tokens < MASK).sum(1).float().mean())
        return Query(window, tokens, observed, torch.from_numpy(observed), alleles, ids, typed)

    def collator(
        self,
        embedding: RandomEmbedding,
        store: str,
        backend: str,
        k: int,
        relatives: Path | None = None,
        local: LocalRetrieval | None = None,
    ) -> AtStepZero:
        collate = RetrievalCollator(
            self.data,
            CPU,
            panel=DevicePanel(self.data, CPU, 1.0),
            store=self.store(store, backend, embedding, local),
            source=self.cache(embedding, embedding.dims),
            k=k,
            exclusions=exclusion_table(self.samples, relatives),
            samples=len(self.samples),
        )
        return AtStepZero(collate)

    def batch_of(self, window: int, samples: Sequence[int], masked: np.ndarray) -> QueryBatch:
        """Micro-batch of ``samples``; ``masked`` bool [N, L]."""
        chosen = np.array(samples, dtype=np.int64)
        return QueryBatch(window, chosen, self.data.samples_alleles(window, chosen), masked)

    def masked(self, window: int, samples: int, seed: int, rate: float = 0.5) -> np.ndarray:
        """Random mask bool [N, L] of ``samples`` samples."""
        return np.random.default_rng(seed).random((samples, len(self.data.windows[window]))) < rate


@dataclass(frozen=True)
class AtStepZero:
    """Collator whose batches are all of step 0."""

    collate: RetrievalCollator

    def __call__(self, queries: QueryBatch) -> Batch:
        return self.collate(queries, 0)

    @property
    def k(self) -> int:
        return self.collate.k


class Build:
    """Value of the ``build`` fixture: worlds from alleles, and oracles."""

    ways = WAYS

    def __call__(
        self,
        alleles: np.ndarray,
        *,
        reference: Sequence[int] | None = None,
        populations: Sequence[int] | None = None,
        window_sites: int = 10**6,
        overlap: int = 0,
        flank: int = 0,
    ) -> World:
        """World of ``alleles`` [S, panel haplotypes] on one contig; ``reference`` are the reference set's samples."""
        size, samples = len(alleles), alleles.shape[1] // 2
        sites = SiteTable(
            contigs=("1",),
            contig_lengths=(0,),
            contig=np.zeros(size, dtype=np.int32),
            pos=np.arange(1, size + 1, dtype=np.int64) * 1000,
            ref=["A"] * size,
            alt=["C"] * size,
            id=["."] * size,
        )
        sample_names = tuple(f"p{i}" for i in range(samples))
        panel = Panel(Path("panel.vcf.gz"), sites, sample_names, np.packbits(alleles, axis=1, bitorder="little"), {})
        of = np.zeros(samples, dtype=np.int64) if populations is None else np.array(populations)
        names = tuple(f"pop{code}" for code in range(int(of.max()) + 1))
        chosen = np.arange(samples) if reference is None else np.array(reference)
        windows = make_windows(sites, window_sites, overlap, flank)
        return World(
            WindowedPanel(PanelSubset(panel, Populations(names, of), chosen), windows, sites.pos * 1e-5), sample_names
        )

    @staticmethod
    def random_alleles(seed: int, sites: int, samples: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 2, size=(sites, 2 * samples), dtype=np.uint8)

    @staticmethod
    def distances(query: Query, embedding: RandomEmbedding, data: WindowedPanel) -> np.ndarray:
        """Oracle of distances, float64 [B, H]: squared L2 of flattened embeddings over a query's observed sites."""
        codebook = embedding.codebooks[query.window].double().numpy()
        reference = data.reference_alleles(query.window)
        result = np.zeros((len(query.tokens), len(reference)))
        for row, tokens in enumerate(query.tokens.tolist()):
            observed = [site for site, token in enumerate(tokens) if token < 2]
            for column, haplotype in enumerate(reference.tolist()):
                for site in observed:
                    difference = codebook[site, tokens[site]] - codebook[site, haplotype[site]]
                    result[row, column] += (difference**2).sum()
        return result

    @staticmethod
    def search(world: World, embedding: RandomEmbedding, query: Query, way: tuple[str, str], k: int) -> Neighbours:
        """Search with the store and backend ``way``, and take the oracle's distances."""
        store = world.store(*way, embedding)
        ids = store.search(query, world.cache(embedding, embedding.dims).code(query.window, 0), k)
        return Neighbours(ids, torch.from_numpy(Build.distances(query, embedding, world.data)).gather(1, ids))

    @staticmethod
    def check_nearest(found: Neighbours, oracle: np.ndarray, excluded: np.ndarray, k: int) -> None:
        """Assert that ``found`` are the ``k`` nearest haplotypes that are not excluded, in order, up to ties."""
        for row, (ids, distance) in enumerate(zip(found.ids.tolist(), found.distance.tolist(), strict=True)):
            assert len(set(ids)) == len(ids) == k
            assert not excluded[row, ids].any()
            allowed = np.sort(oracle[row][~excluded[row]])[:k]
            assert np.allclose(distance, allowed, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="session")
def build() -> Build:
    return Build()
