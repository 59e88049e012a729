"""Imputation by the network: windows with their nearest haplotypes, or on a GPU stretches that are copied whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch

from embrag_ds.data.sampler import QueryBatch, exclusion_table
from embrag_ds.data.targets import Targets
from embrag_ds.data.windows import Window, WindowedPanel
from embrag_ds.export import ExportedModel
from embrag_ds.imputation.computing.stretches import Precision, posterior_bytes, progress_of
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.row_blocks import RowBlocks
from embrag_ds.model.site_tiles import SiteTiles
from embrag_ds.ops.threads import undivided
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.codebooks import ALLELES
from embrag_ds.retrieval.prefetch import Prefetcher
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.search import present_backend
from embrag_ds.runtime.streams import use_device

logger = logging.getLogger(__name__)

_AHEAD = 1
_SAMPLES_AT_ONCE = 32
_WORTH_TIMING = 1000


def _samples_at_once(block: int, windows: list[Window], typed: np.ndarray, haplotypes: int, memory: float) -> int:
    """Samples of a batch, at most ``block``, whose posteriors take half of a GPU's ``memory`` in bytes.

    ``typed`` bool [S] marks the panel's typed sites.
    """
    before = np.concatenate([[0], np.cumsum(typed)])
    most = max(int(before[each.stop] - before[each.start]) for each in windows)
    return int(max(1, min(block, memory // 2 // posterior_bytes(max(1, most), haplotypes))))


def _tiles_of(model: ExportedModel, network: Imputer, device: torch.device) -> SiteTiles:
    """The windows that a model was trained on, as tiles of a stretch."""
    layer = network.embedding
    if model.snapshot is not None:
        layer = layer.twin().requires_grad_(False).to(device)
        layer.load_state_dict(model.snapshot)
    settings = model.config.data
    return SiteTiles(settings.window_sites, settings.overlap_sites, lambda sites: layer.codebook(sites)[:, :ALLELES])


def _worth_timing(batches: int, device: torch.device) -> bool:
    """Whether timing the search backends, some twenty searches and a second, costs less than the fastest may save.

    On a CPU never, because torch is the fastest there (2 to 7 times as fast as FAISS), and outputs repeat exactly.
    """
    return device.type == "cuda" and batches >= _WORTH_TIMING


class Windows:
    """A network's dosages, one window of ``data`` and ``block`` samples of the ``targets`` at a time.

    ``numbers`` int64 [N] are those of the targets in the panel, -1 for those outside. Without ``transformer`` its
    residual is left out. Windows are copied whole from all haplotypes on a device with so much ``memory`` in bytes, or,
    where it is None, from the nearest. With ``precision`` bf16 the matrix products of the network are in bf16; search,
    copying model and dosage are always in fp32.
    """

    def __init__(
        self,
        model: ExportedModel,
        data: WindowedPanel,
        targets: Targets,
        numbers: np.ndarray,
        block: int | None,
        *,
        memory: float | None,
        device: str,
        transformer: bool,
        precision: Precision,
    ):
        self._device = torch.device(device)
        use_device(self._device)
        self._data = data
        self._targets = targets
        self._numbers = numbers
        self._block = block = block or _SAMPLES_AT_ONCE
        self._transformer = transformer
        self._precision = precision
        self._network = model.network().to(self._device)
        self._network.row_blocks = RowBlocks() if device == "cpu" else None
        config, exclusions = model.config, exclusion_table(data.reference.panel.samples, None)
        self._reference = Reference(
            config.retrieval, data, self._network.embedding, self._device, exclusions, snapshot=model.snapshot
        )
        if memory is not None:
            self._block = _samples_at_once(block, data.windows, targets.typed, len(data.reference), memory)
            self._network.site_tiles = _tiles_of(model, self._network, self._device)
            self._collate = self._reference.collator(self._block, slots=_AHEAD + 2, whole=True)
            return
        named, self._reference.backend = self._reference.backend, present_backend(self._reference.backend, self._device)
        if self._reference.backend != named:
            logger.info("the model names search %s, which this machine lacks; torch searches", named)
        self._collate = self._reference.collator(block, slots=_AHEAD + 2)

    def windows(self, chosen: list[Window]) -> Iterator[tuple[Window, np.ndarray]]:
        """Iterate over ``chosen`` windows and the ALT probabilities float32 [2N, L] in their cores.

        While the network computes one block of samples, retrieval works on the next.
        """
        targets, numbers = self._targets, self._numbers
        starts = range(0, len(numbers), self._block)
        computed = [each for each in chosen if targets.typed[each.sites].any()]

        def queries(block: int) -> QueryBatch:
            index, place = divmod(block, len(starts))
            window = computed[index]
            group = numbers[starts[place] :][: self._block]
            samples = slice(starts[place], starts[place] + len(group))
            return QueryBatch(
                window=window.index,
                samples=group,
                alleles=targets.alleles(window.sites, samples),
                masked=np.repeat(~targets.typed[window.sites][None], len(group), axis=0),
                missing=targets.missing_alleles(window.sites, samples),
            )

        number = len(computed) * len(starts)
        searches = self._network.site_tiles is None
        if searches and self._reference.backend == "auto" and number and _worth_timing(number, self._device):
            first = self._reference.first_search(queries(0))
            if first is not None:
                self._reference.backend = first.fastest()
                self._collate = self._reference.collator(self._block, slots=_AHEAD + 2)

        def build(block: int) -> Batch:
            return self._collate(queries(block), step=0)

        remaining = iter(computed)
        following = next(remaining, None)
        progress = progress_of(computed, len(numbers))
        with closing(Prefetcher(build, 0, number, _AHEAD)) as batches, progress:
            for window in chosen:
                frequency = self._data.reference.allele_frequency[window.core_sites]
                if window is not following:
                    yield window, np.repeat(frequency[None], 2 * len(numbers), axis=0)
                    continue
                following = next(remaining, None)
                found = []
                for start in starts:
                    found.append(self._probability(batches.next()))
                    progress.advance(len(frequency) * len(numbers[start:][: self._block]))
                probability = np.concatenate(found)
                missing = targets.missing_alleles(window.sites, slice(0, len(numbers)))
                if missing is not None:
                    nothing = (missing | ~targets.typed[window.sites]).all(axis=1)
                    probability[nothing] = frequency
                yield window, probability

    @torch.no_grad()
    def _probability(self, batch: Batch) -> np.ndarray:
        # TF32 stays off, torch's default: it would round the weights of the exact search, and bf16 is faster.
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16")
        with undivided(), autocast:
            logits = self._network(batch, self._transformer).logits
            return logits.sigmoid().cpu().numpy()
