"""Small panels in memory, networks, and batches from the collator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from embrag_ds.data.panel import Panel, PanelSubset, Populations
from embrag_ds.data.sampler import QueryBatch, exclusion_table
from embrag_ds.data.windows import WindowedPanel, make_windows
from embrag_ds.model.embedding import HaplotypeEmbedding
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.settings import ModelConfig
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.settings import RetrievalConfig
from embrag_ds.variants.sites import SiteTable

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class World:
    """Windowed panel and the names of its samples, of which the first may be outside the reference set."""

    data: WindowedPanel
    samples: tuple[str, ...]

    def collator(
        self,
        embedding: HaplotypeEmbedding,
        k: int = 6,
        mode: str = "factored",
        backend: str = "torch",
        whole: bool = False,
    ) -> Callable[[QueryBatch], Batch]:
        """Collator at step 0; ``mode`` is ``none``, ``token``, ``factored``, ``dense`` or ``live``.

        With ``whole`` all haplotypes are neighbours.
        """
        settings = RetrievalConfig(
            mode=mode if mode in ("none", "token") else "embedding",
            encoding="live" if mode == "live" else "fixed",
            store="dense" if mode == "dense" else "factored",
            backend=backend,
            k=k,
        )
        reference = Reference(settings, self.data, embedding, CPU, exclusion_table(self.samples, None))
        reference.begin_refresh(0)
        return partial(reference.collator(len(self.samples), whole=whole), step=0)

    def batch_of(self, window: int, samples: Sequence[int], masked: np.ndarray) -> QueryBatch:
        """Micro-batch of ``samples``; ``masked`` bool [N, L]."""
        chosen = np.array(samples, dtype=np.int64)
        return QueryBatch(window, chosen, self.data.samples_alleles(window, chosen), masked)

    def masked(self, window: int, samples: int, seed: int, rate: float = 0.5) -> np.ndarray:
        """Random mask bool [N, L] of ``samples`` samples."""
        return np.random.default_rng(seed).random((samples, len(self.data.windows[window]))) < rate


class Build:
    """Value of the ``build`` fixture: worlds and networks."""

    def __call__(
        self,
        seed: int = 1,
        sites: int = 60,
        samples: int = 14,
        *,
        outside: int = 0,
        populations: int = 2,
        window_sites: int = 24,
        overlap: int = 5,
        flank: int = 8,
        cm_per_site: float = 0.02,
    ) -> World:
        rng = np.random.default_rng(seed)
        frequency = rng.uniform(0.1, 0.9, size=(sites, 1))
        alleles = (rng.random((sites, 2 * samples)) < frequency).astype(np.uint8)
        table = SiteTable(
            contigs=("1",),
            contig_lengths=(0,),
            contig=np.zeros(sites, dtype=np.int32),
            pos=np.arange(1, sites + 1, dtype=np.int64) * 1000,
            ref=["A"] * sites,
            alt=["C"] * sites,
            id=["."] * sites,
        )
        names = tuple(f"p{i}" for i in range(samples))
        panel = Panel(Path("panel.vcf.gz"), table, names, np.packbits(alleles, axis=1, bitorder="little"), {})
        of = Populations(tuple(f"pop{i}" for i in range(populations)), np.arange(samples) % populations)
        position = np.cumsum(rng.uniform(0.2, 1.8, sites) * cm_per_site)
        reference = PanelSubset(panel, of, np.arange(outside, samples))
        windows = make_windows(table, window_sites, overlap, flank)
        return World(WindowedPanel(reference, windows, position), names)

    @staticmethod
    def imputer(seed: int = 1, trained: bool = True, **settings) -> Imputer:
        """Small network; ``trained`` gives it heads that are not zero."""
        torch.manual_seed(seed)
        network = Imputer(ModelConfig(**{"dims": 16, "layers": 1, "heads": 2, **settings})).eval()
        if trained:
            torch.nn.init.normal_(network.head.weight, std=0.5)
            torch.nn.init.normal_(network.head.bias, std=0.5)
            if network.confidence is not None:
                torch.nn.init.normal_(network.confidence.layers[-1].weight, std=0.5)
        return network


@pytest.fixture(scope="session")
def build() -> Build:
    return Build()
