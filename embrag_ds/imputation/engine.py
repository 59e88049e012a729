"""Imputation: from targets typed at some sites to dosages at every site of the panel.

Windows are computed one after another, and blended (:mod:`embrag_ds.imputation.blending`). Memory therefore holds two
windows of the targets, whatever the chromosome. Their typed alleles stay packed on disk.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import embrag_ds
from embrag_ds.config import EmbragConfig
from embrag_ds.copying.along import CopyAlong
from embrag_ds.data.inputs import PanelInputs, windowed
from embrag_ds.data.sampler import QueryBatch, exclusion_table
from embrag_ds.data.targets import Targets
from embrag_ds.data.tokens import MASK
from embrag_ds.data.windows import DataConfig, Window, WindowedPanel, uncovered
from embrag_ds.errors import UserError
from embrag_ds.export import ExportedModel
from embrag_ds.imputation.blending import write_blended
from embrag_ds.imputation.extent import Extent
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.row_blocks import RowBlocks
from embrag_ds.model.site_tiles import SiteTiles
from embrag_ds.ops.li_stephens import copying_backend
from embrag_ds.ops.li_stephens_cuda import MOST_NEIGHBOURS
from embrag_ds.ops.threads import undivided
from embrag_ds.progress import Progress
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.codebooks import ALLELES
from embrag_ds.retrieval.prefetch import Prefetcher
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.search import present_backend
from embrag_ds.runtime.streams import use_device
from embrag_ds.variants.output import EVERYTHING, ImputedVcfWriter, OutputOptions

logger = logging.getLogger(__name__)

Precision = Literal["bf16", "fp32"]
"""Of the network's matrix products."""

_AHEAD = 1
_WORTH_TIMING = 1000
_MOST_STRETCH_SITES = 1 << 15
_MOST_STRETCH_BYTES = 1 << 28
_BYTES_OF_A_SEQUENCE = 12
_SITES_OF_A_BLOCK = 64
_MOST_TABLE_BYTES = 1 << 31
_TABLES = 4
_BYTES_OF_A_STATE = 64


Way = Literal["windows", "loop", "whole"]
"""How haplotypes are copied: in windows from the nearest, or along stretches from all, by a CPU's loop or on a GPU."""


def _with_stretches(
    settings: DataConfig, haplotypes: int, targets: Targets, way: Way, memory: float = math.inf
) -> DataConfig:
    """Settings with stretches in place of windows, for a ``way`` that copies them whole.

    The copying model runs along the flanks of every window, so fewer and longer ones are faster. Memory limits them.
    On a CPU each of these stays below 256 MiB: sequences of the core, one for each of the panel's ``haplotypes`` and
    block of sites, and the targets' dosages. On a GPU tables of the core's alleles stay below 2 GiB, and the posteriors
    of a sample below half of its ``memory`` in bytes.
    """
    typed = float(targets.typed.mean())
    blocks = 1 / _SITES_OF_A_BLOCK + typed
    of_dosages = 8 * len(targets.samples)
    if way == "loop":
        most = _MOST_STRETCH_BYTES / max(_BYTES_OF_A_SEQUENCE * blocks * haplotypes, of_dosages)
    else:
        of_posteriors = _posterior_bytes(typed, haplotypes)
        with_flanks = memory / 2 / of_posteriors if of_posteriors else math.inf
        tables = _MOST_TABLE_BYTES / (_TABLES * haplotypes)
        most = min(_MOST_STRETCH_BYTES / of_dosages, tables, max(0, with_flanks - 2 * settings.flank_sites))
    return replace(settings, window_sites=max(settings.window_sites, min(_MOST_STRETCH_SITES, int(most))))


def _way(config: EmbragConfig, transformer: bool, device: torch.device, haplotypes: int) -> Way:
    """How an imputation copies: stretches are copied whole if the model copies haplotypes and the device can.

    A CPU would take long for the transformer's tiles. A GPU needs its kernels, which take so many haplotypes.
    """
    if config.model.fusion != "copying" or config.retrieval.mode != "embedding":
        return "windows"
    if device.type == "cpu":
        return "windows" if transformer else "loop"
    able = copying_backend(device) == "cuda kernel" and haplotypes <= MOST_NEIGHBOURS
    return "whole" if able and config.retrieval.store == "factored" else "windows"


def _posterior_bytes(typed: float, haplotypes: int) -> float:
    """Bytes that a sample's posteriors at so many typed sites take on a GPU, with what they are made from."""
    return 2 * _BYTES_OF_A_STATE * typed * haplotypes


def _memory(device: torch.device) -> float:
    """Memory of a GPU in bytes: all of it, so that a batch does not depend on what else runs there."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def _samples_at_once(block: int, windows: list[Window], typed: np.ndarray, haplotypes: int, memory: float) -> int:
    """Samples of a batch, at most ``block``, whose posteriors take half of a GPU's ``memory`` in bytes.

    ``typed`` bool [S] marks the panel's typed sites.
    """
    before = np.concatenate([[0], np.cumsum(typed)])
    most = max(int(before[each.stop] - before[each.start]) for each in windows)
    return int(max(1, min(block, memory // 2 // _posterior_bytes(max(1, most), haplotypes))))


def _worth_timing(batches: int, device: torch.device) -> bool:
    """Whether timing the search backends, some twenty searches and a second, costs less than the fastest may save.

    On a CPU never, because torch is the fastest there (2 to 7 times as fast as FAISS), and outputs repeat exactly.
    """
    return device.type == "cuda" and batches >= _WORTH_TIMING


def _tiles(model: ExportedModel, network: Imputer, device: torch.device) -> SiteTiles:
    """The windows that a model was trained on, as tiles of a stretch."""
    layer = network.embedding
    if model.snapshot is not None:
        layer = layer.twin().requires_grad_(False).to(device)
        layer.load_state_dict(model.snapshot)
    settings = model.config.data
    return SiteTiles(settings.window_sites, settings.overlap_sites, lambda sites: layer.codebook(sites)[:, :ALLELES])


def _progress(windows: list[Window], samples: int) -> Progress:
    """Progress of computing these windows' cores for so many samples."""
    sites = sum(each.core_stop - each.core_start for each in windows)
    return Progress("imputing", sites * samples)


class Imputation:
    """An exported model applied to a panel, one window and one block of samples at a time.

    Raises :class:`UserError` if sites of the panel lie in no window.
    """

    def __init__(
        self,
        model: ExportedModel,
        inputs: PanelInputs,
        targets: Targets,
        device: torch.device,
        block: int,
        transformer: bool = True,
        precision: Precision = "fp32",
    ):
        """``block`` samples of the ``targets`` are computed at a time.

        Without ``transformer`` its residual is left out (:meth:`embrag_ds.model.imputer.Imputer.forward`). Then each
        stretch of a chromosome is copied once, on a CPU by :mod:`embrag_ds.copying.along`; on a GPU also with it. With
        ``precision`` bf16 the matrix products of the network are in bf16; search, copying model and dosage are always
        in fp32.
        """
        use_device(device)
        config = model.config
        all_samples = np.arange(len(inputs.panel.samples))
        haplotypes = 2 * len(all_samples)
        way = _way(config, transformer, device, haplotypes)
        memory, settings = _memory(device), config.data
        if way != "windows":
            settings = _with_stretches(settings, haplotypes, targets, way, memory)
        self.data: WindowedPanel = windowed(inputs, settings, all_samples)
        left_out = uncovered(self.data.windows, len(inputs.panel.sites))
        if left_out:
            raise UserError(
                f"{config.data.windows_file}: {left_out} panel sites lie in no window; imputation needs all"
            )
        self.targets = targets
        self._device = device
        self._block = block
        self._transformer = transformer
        self._precision = precision
        self._samples = inputs.panel.samples
        self._network = model.network().to(device)
        exclusions = exclusion_table(inputs.panel.samples, None)
        self._copy = CopyAlong(self._network, self.data, exclusions) if way == "loop" else None
        if self._copy is not None:
            return
        self._network.row_blocks = RowBlocks() if device.type == "cpu" else None
        self._reference = Reference(
            config.retrieval, self.data, self._network.embedding, device, exclusions, snapshot=model.snapshot
        )
        if way == "whole":
            self._block = _samples_at_once(block, self.data.windows, targets.typed, haplotypes, memory)
            self._network.site_tiles = _tiles(model, self._network, device)
            self._collate = self._reference.collator(self._block, slots=_AHEAD + 2, whole=True)
            return
        named, self._reference.backend = self._reference.backend, present_backend(self._reference.backend, device)
        if self._reference.backend != named:
            logger.info("the model names search %s, which this machine lacks; torch searches", named)
        self._collate = self._reference.collator(block, slots=_AHEAD + 2)

    def windows(self, chosen: list[Window] | None = None) -> Iterator[tuple[Window, np.ndarray]]:
        """Iterate over (window, ALT probabilities float32 [2N, L] of the target haplotypes in its core), in order.

        ``chosen`` are some of the windows, increasing, or all. Where a haplotype has no typed site in a window, its
        probabilities are the panel's allele frequencies. While the network computes one block of samples, retrieval
        works on the next.
        """
        chosen = self.data.windows if chosen is None else chosen
        targets = self.targets
        code_of = {sample: code for code, sample in enumerate(self._samples)}
        numbers = np.array([code_of.get(sample, -1) for sample in targets.samples], dtype=np.int64)
        starts = range(0, len(numbers), self._block)
        if self._copy is not None:
            yield from self._stretches(self._copy, chosen, numbers)
            return
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
        progress = _progress(computed, len(numbers))
        with closing(Prefetcher(build, 0, number, _AHEAD)) as batches, progress:
            for window in chosen:
                frequency = self.data.reference.allele_frequency[window.core_sites]
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

    def _stretches(
        self, copy: CopyAlong, chosen: list[Window], numbers: np.ndarray
    ) -> Iterator[tuple[Window, np.ndarray]]:
        """:meth:`windows`, each a stretch that is copied whole; ``numbers`` int64 [N] are the targets' in the panel."""
        with _progress([each for each in chosen if self.targets.typed[each.sites].any()], len(numbers)) as progress:
            for window in chosen:
                yield window, self._stretch(copy, window, numbers, progress)

    def _stretch(self, copy: CopyAlong, window: Window, numbers: np.ndarray, progress: Progress) -> np.ndarray:
        """ALT probabilities float32 [2N, L] in the core of a stretch."""
        targets = self.targets
        frequency = self.data.reference.allele_frequency[window.core_sites]
        probability = np.empty((2 * len(numbers), len(frequency)), dtype=np.float32)
        typed = targets.typed[window.sites]
        if not typed.any():
            probability[:] = frequency
            return probability
        stretch = copy.stretch(window.index, typed)
        typed_sites = slice(*np.searchsorted(targets.sites, [window.start, window.stop]))
        for start in range(0, len(numbers), self._block):
            block = slice(start, min(start + self._block, len(numbers)))
            rows = slice(2 * block.start, 2 * block.stop)
            alleles = np.ascontiguousarray(targets.typed_alleles(typed_sites, block).T)
            missing = targets.missing_alleles(window.sites, block)
            if missing is not None:
                alleles[missing[:, typed]] = MASK
            with undivided():
                probability[rows] = copy.probability(stretch, alleles, numbers[block])
            if missing is not None:
                probability[rows][missing[:, typed].all(axis=1)] = frequency
            progress.advance(len(frequency) * (block.stop - block.start))
        return probability

    @torch.no_grad()
    def _probability(self, batch: Batch) -> np.ndarray:
        # TF32 stays off, torch's default: it would round the weights of the exact search, and bf16 is faster.
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16")
        with undivided(), autocast:
            logits = self._network(batch, self._transformer).logits
            return logits.sigmoid().cpu().numpy()


def impute_to_vcf(
    imputation: Imputation,
    out: Path,
    where: Extent | None = None,
    output: OutputOptions = EVERYTHING,
) -> None:
    """Impute, blend the windows where they overlap, and write an indexed VCF or BCF of the panel's sites ``where``.

    Raises :class:`UserError` if ``out`` cannot be written.
    """
    sites, targets = imputation.data.reference.panel.sites, imputation.targets
    where = Extent(sites.contig_runs()) if where is None else where
    source = f"embrag_ds {embrag_ds.__version__}"
    with ImputedVcfWriter(out, where.table(sites), targets.samples, source, output) as writer:
        write_blended(imputation, writer, where)
