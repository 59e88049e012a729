"""The first micro-batches of a run, drawn and partly built for real, for what they take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from embrag_ds.config import EmbragConfig
from embrag_ds.data.inputs import PanelInputs, windowed
from embrag_ds.data.sampler import QueryBatch, TrainingSampler, exclusion_table, split_samples
from embrag_ds.data.windows import WindowedPanel
from embrag_ds.ops.dosage import Carriers
from embrag_ds.planning.trace import LARGE, Allocations, tensors_of
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.codebooks import EqualWeights
from embrag_ds.retrieval.collate import RetrievalCollator
from embrag_ds.retrieval.device_panel import DevicePanel
from embrag_ds.retrieval.search import make_search
from embrag_ds.retrieval.store import FactoredStore

_DRAWN = 24
"""Micro-batches that are drawn. The first are the largest, because masks grow during the curriculum."""


@dataclass(frozen=True)
class Planned:
    """Sampler of a run and its panel in windows, with the samples held out."""

    data: WindowedPanel
    sampler: TrainingSampler
    held_out: int


@dataclass(frozen=True)
class FirstBatches:
    """The largest of the first micro-batches, ``largest``, and sizes in bytes.

    ``each`` are the batches' sizes, in order; ``building`` is what their making takes besides. ``neighbours`` is the
    number that every query gets.
    """

    largest: Batch
    each: tuple[int, ...]
    building: int
    neighbours: int

    @property
    def kept_free(self) -> int:
        """Bytes that the heap of the thread which builds batches keeps when one is freed: those of a batch.

        Nothing where the blocks are so large that glibc gives them back.
        """
        largest = max(each.nbytes for each in tensors_of(self.largest.retrieved or self.largest.core))
        return max(self.each) if largest < LARGE else 0

    def in_flight(self, ahead: int) -> int:
        """Most bytes of ``ahead`` + 2 batches in a row: the queue's, the one in use, and one that waits for a place."""
        width = ahead + 2 if ahead else 1
        return max(sum(self.each[first : first + width]) for first in range(len(self.each)))


def planned(config: EmbragConfig, inputs: PanelInputs, micro_batch: int, rank: int, ranks: int, steps: int) -> Planned:
    """Sampler of a rank, for ``steps`` micro-batches an optimiser step; raises UserError as the run would."""
    samples, held_out = split_samples(len(inputs.panel.samples), config.data.validation_samples, config.seed)
    data = windowed(inputs, config.data, samples, config.masking.array_manifest)
    sampler = TrainingSampler(data, config.masking, config.seed, micro_batch, rank, ranks, steps, config.augmentation)
    return Planned(data, sampler, len(held_out))


def build_first(config: EmbragConfig, inputs: PanelInputs, run: Planned) -> FirstBatches:
    """Draw the first micro-batches of a run, and build the one with the most typed sites, with equal site weights."""
    total = min(_DRAWN, config.train.max_steps * run.sampler.accumulation)
    drawn = [run.sampler.queries(number) for number in range(total)]
    typed = [int((~queries.masked).sum(1).max()) for queries in drawn]
    largest = max(range(total), key=typed.__getitem__)
    collate = _collator(config, inputs, run)
    followed = Allocations([])
    with followed:
        batch = collate(drawn[largest], 0)
    size = batch_bytes(batch)
    row = 0 if batch.retrieved is None else batch.retrieved.mismatch.shape[2]
    each = tuple(size - 2 * len(drawn[0].samples) * (row + 8) * (typed[largest] - count) for count in typed)
    building = followed.traced(0).peak - followed.in_use + _unpacked(run.data, drawn[largest])
    return FirstBatches(batch, each, building, collate.k)


def _collator(config: EmbragConfig, inputs: PanelInputs, run: Planned) -> RetrievalCollator:
    settings, device = config.retrieval, torch.device("cpu")
    searched = settings.mode != "none"
    relatives = settings.relatives
    return RetrievalCollator(
        run.data,
        device,
        panel=DevicePanel(run.data, device, settings.device_budget_gb),
        store=FactoredStore(make_search("torch", device), settings.local) if searched else None,
        source=EqualWeights(run.data.windows, device) if searched else None,
        k=settings.k,
        exclusions=exclusion_table(inputs.panel.samples, Path(relatives) if relatives else None),
        samples=run.sampler.group_size,
        token_k=settings.token_k if settings.mode == "token" else 0,
    )


def _unpacked(data: WindowedPanel, queries: QueryBatch) -> int:
    """Bytes of the panel's alleles at a batch's observed sites, one byte each, before they are chosen from."""
    observed = int((~queries.masked.all(0)).sum())
    return observed * 2 * len(data.reference.panel.samples)


def batch_bytes(batch: Batch) -> int:
    """Memory of a batch in bytes; a view counts with all that it keeps."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors_of(batch)}
    alleles = None if batch.retrieved is None else batch.retrieved.alleles
    unused = 0
    if isinstance(alleles, Carriers):  # the system gives pages when they are written
        unused = alleles.members.nbytes - int(alleles.offset[:, -1].sum()) * alleles.members.element_size()
    return sum(storages.values()) - unused
