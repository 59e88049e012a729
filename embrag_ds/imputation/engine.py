"""Imputation: from targets typed at some sites to dosages at every site of the panel.

Windows are computed one after another and blended where they overlap. Sites are written as soon as no later window can
change them. Memory therefore holds two windows of the targets, whatever the chromosome. Their typed alleles stay packed
on disk.
"""

from __future__ import annotations

import logging
import time
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
from embrag_ds.data.windows import DataConfig, Window, WindowedPanel, blend_weights, uncovered
from embrag_ds.errors import UserError
from embrag_ds.export import ExportedModel
from embrag_ds.imputation.extent import Extent
from embrag_ds.model.row_blocks import RowBlocks
from embrag_ds.ops.threads import undivided
from embrag_ds.retrieval.batch import Batch
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


def _with_stretches(settings: DataConfig, haplotypes: int, targets: Targets) -> DataConfig:
    """Settings with stretches in place of windows, for imputation without the transformer.

    The copying model runs along the flanks of every window, so fewer and longer ones are faster. Only the transformer
    is tied to their length. Memory limits it, where each of these stays below 256 MiB: sequences of the core, one for
    each of the panel's ``haplotypes`` and block of sites, and the targets' dosages.
    """
    blocks = 1 / _SITES_OF_A_BLOCK + float(targets.typed.mean())
    of_a_site = max(_BYTES_OF_A_SEQUENCE * blocks * haplotypes, 8 * len(targets.samples))
    most = int(_MOST_STRETCH_BYTES / of_a_site)
    return replace(settings, window_sites=max(settings.window_sites, min(_MOST_STRETCH_SITES, most)))


def _along(config: EmbragConfig, transformer: bool, device: torch.device) -> bool:
    """Whether stretches are copied whole: on a CPU, if the model copies haplotypes and its transformer is left out."""
    copies = config.model.fusion == "copying" and config.retrieval.mode == "embedding"
    return copies and not transformer and device.type == "cpu"


def _worth_timing(batches: int, device: torch.device) -> bool:
    """Whether timing the search backends, some twenty searches and a second, costs less than the fastest may save.

    On a CPU never, because torch is the fastest there (2 to 7 times as fast as FAISS), and outputs repeat exactly.
    """
    return device.type == "cuda" and batches >= _WORTH_TIMING


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

        Without ``transformer`` its residual is left out (:meth:`embrag_ds.model.imputer.Imputer.forward`), and on a CPU
        each stretch of a chromosome is copied once (:mod:`embrag_ds.copying.along`). With ``precision`` bf16 the matrix
        products of the network are in bf16; search, copying model and dosage are always in fp32.
        """
        use_device(device)
        config = model.config
        all_samples = np.arange(len(inputs.panel.samples))
        along = _along(config, transformer, device)
        settings = _with_stretches(config.data, 2 * len(all_samples), targets) if along else config.data
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
        self._copy = CopyAlong(self._network, self.data, exclusions) if along else None
        if self._copy is not None:
            return
        self._network.row_blocks = RowBlocks() if device.type == "cpu" else None
        self._reference = Reference(
            config.retrieval, self.data, self._network.embedding, device, exclusions, snapshot=model.snapshot
        )
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
        if self._reference.backend == "auto" and number and _worth_timing(number, self._device):
            first = self._reference.first_search(queries(0))
            if first is not None:
                self._reference.backend = first.fastest()
                self._collate = self._reference.collator(self._block, slots=_AHEAD + 2)

        def build(block: int) -> Batch:
            return self._collate(queries(block), step=0)

        remaining = iter(computed)
        following = next(remaining, None)
        with closing(Prefetcher(build, 0, number, _AHEAD)) as batches:
            for window in chosen:
                frequency = self.data.reference.allele_frequency[window.core_sites]
                if window is not following:
                    yield window, np.repeat(frequency[None], 2 * len(numbers), axis=0)
                    continue
                following = next(remaining, None)
                found = [self._probability(batches.next()) for _ in starts]
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
        targets, last_logged = self.targets, time.monotonic()
        for place, window in enumerate(chosen, start=1):
            frequency = self.data.reference.allele_frequency[window.core_sites]
            probability = np.empty((2 * len(numbers), len(frequency)), dtype=np.float32)
            typed = targets.typed[window.sites]
            if not typed.any():
                probability[:] = frequency
                yield window, probability
                continue
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
                if time.monotonic() - last_logged > 2:
                    done = (place, len(chosen), block.stop, len(numbers))
                    logger.info("copying stretch %d/%d: %d/%d samples", *done)
                    last_logged = time.monotonic()
            yield window, probability

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
    windows = where.windows(imputation.data.windows)
    weights = blend_weights(imputation.data.windows)
    rows = where.rows()
    wanted = np.zeros(len(sites) + 1, dtype=np.int64)
    wanted[rows + 1] = 1
    wanted = np.cumsum(wanted)  # place of each panel row among those written
    source = f"embrag_ds {embrag_ds.__version__}"
    everyone = slice(0, len(targets.samples))
    pending = np.zeros((2 * len(targets.samples), 0), dtype=np.float32)
    settled = windows[0].core_start
    last_logged = time.monotonic()
    written = sites if len(rows) == len(sites) else sites.take(rows)
    with ImputedVcfWriter(out, written, targets.samples, source, output) as writer:
        for number, (window, probability) in enumerate(imputation.windows(windows)):
            # ``pending`` holds the blended part of the windows so far, from site ``settled`` on.
            shared = np.flatnonzero(weights[window.index] != 1)
            probability[:, shared] *= weights[window.index][shared].astype(np.float32)
            grown = probability
            if pending.shape[1]:
                grown = np.zeros((len(pending), window.core_stop - settled), dtype=np.float32)
                grown[:, : pending.shape[1]] = pending
                grown[:, window.core_start - settled :] += probability
            last = number + 1 == len(windows)
            until = window.core_stop if last else min(window.core_stop, windows[number + 1].core_start)
            # Of these sites, those asked for are consecutive: at most the first or last ones are not.
            inside = np.flatnonzero(np.diff(wanted[settled : until + 1]))
            if len(inside):
                span = slice(settled + int(inside[0]), settled + int(inside[-1]) + 1)
                haploid = targets.haploid(span)
                dosage = grown[:, span.start - settled : span.stop - settled]
                writer.write(
                    int(wanted[span.start]),
                    dosage if haploid is None else _one_haplotype(dosage, haploid),
                    targets.typed[span],
                    targets.alleles(span, everyone),
                    targets.missing_alleles(span, everyone),
                    haploid,
                )
            pending = grown[:, until - settled :]
            settled = until if last or pending.shape[1] else windows[number + 1].core_start
            due = last or time.monotonic() - last_logged > 2
            done = (number + 1, len(windows), wanted[until], len(rows))
            logger.log(logging.INFO if due else logging.DEBUG, "imputed window %d/%d, %d/%d sites", *done)
            if due:
                last_logged = time.monotonic()


def _one_haplotype(dosage: np.ndarray, haploid: np.ndarray) -> np.ndarray:
    """Dosages float32 [2N, L] with the mean of both rows in place of each where a sample is ``haploid``, bool [N, L].

    The rows have the same alleles there, but others beyond the end of a pseudoautosomal region.
    """
    mean = (dosage[0::2] + dosage[1::2]) / 2
    return np.where(np.repeat(haploid, 2, axis=0), np.repeat(mean, 2, axis=0), dosage)
