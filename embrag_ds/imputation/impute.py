"""Imputation: from phased targets typed at some sites to dosages at every site of the panel.

Windows are computed one after another and blended where they overlap. Sites are written as soon as no later window can
change them. Memory therefore holds two windows of the targets, whatever the chromosome. Their typed alleles stay packed
on disk.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

import embrag_ds
from embrag_ds.data.inputs import (
    PanelFiles,
    PanelInputs,
    cache_directory,
    default_data,
    open_inputs,
    windowed,
)
from embrag_ds.data.panel import open_panel
from embrag_ds.data.sampler import QueryBatch, exclusion_table
from embrag_ds.data.targets import Targets, harmonise_targets
from embrag_ds.data.windows import DataConfig, WindowedPanel, blend_weights, uncovered
from embrag_ds.errors import UserError
from embrag_ds.export import PRETRAINED, ExportedModel, read_export
from embrag_ds.model.imputer import Imputer
from embrag_ds.ops.cuda import require_kernels
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.prefetch import Prefetcher
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.search import backends_on
from embrag_ds.runtime.driver import unused_gpus
from embrag_ds.runtime.processor import cpu_has_bf16
from embrag_ds.runtime.streams import use_device
from embrag_ds.variants.output import ImputedVcfWriter

logger = logging.getLogger(__name__)

Precision = Literal["bf16", "fp32"]
"""Of the network's matrix products."""

_AHEAD = 1
_WORTH_TIMING = 1000
_TIMES_AS_LONG = 4
_MOST_CORE_BYTES = 1 << 28


def _with_longer_windows(settings: DataConfig, haplotypes: int) -> DataConfig:
    """Settings with longer cores, for imputation without the transformer.

    Retrieval and copying run along the flanks of every window, so fewer and longer cores are faster. Only the
    transformer is tied to the core's length. The alleles of all ``haplotypes`` of the panel in a core are held in
    memory, which limits its length.
    """
    most = max(settings.window_sites, _MOST_CORE_BYTES // haplotypes)
    return replace(settings, window_sites=min(_TIMES_AS_LONG * settings.window_sites, most))


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
        device: torch.device,
        block: int,
        transformer: bool = True,
        precision: Precision = "fp32",
    ):
        """``block`` samples are computed at a time. Without ``transformer`` its residual is left out
        (:meth:`embrag_ds.model.imputer.Imputer.forward`), and windows are longer. With ``precision`` bf16 the matrix
        products of the network are in bf16; search, copying model and dosage are always in fp32.
        """
        use_device(device)
        config = model.config
        all_samples = np.arange(len(inputs.panel.samples))
        settings = config.data if transformer else _with_longer_windows(config.data, 2 * len(all_samples))
        self.data: WindowedPanel = windowed(inputs, settings, all_samples)
        left_out = uncovered(self.data.windows, len(inputs.panel.sites))
        if left_out:
            raise UserError(
                f"{config.data.windows_file}: {left_out} panel sites lie in no window; imputation needs all"
            )
        self._device = device
        self._block = block
        self._transformer = transformer
        self._precision = precision
        self._samples = inputs.panel.samples
        self._network = Imputer(config.model)
        self._network.load_state_dict(model.weights)
        self._network.to(device).eval()
        exclusions = exclusion_table(inputs.panel.samples, None)
        self._reference = Reference(
            config.retrieval, self.data, self._network.embedding, device, exclusions, snapshot=model.snapshot
        )
        if self._reference.backend not in ("auto", *backends_on(device)):
            logger.info("the model names search %s, which this machine lacks; torch searches", self._reference.backend)
            self._reference.backend = "torch"
        self._collate = self._reference.collator(block, slots=_AHEAD + 2)

    def windows(self, targets: Targets) -> Iterator[tuple[int, np.ndarray]]:
        """Iterate over (window number, ALT probabilities float32 [2N, L] of the target haplotypes in its core), in
        order.

        While the network computes one block of samples, retrieval works on the next.
        """
        code_of = {sample: code for code, sample in enumerate(self._samples)}
        numbers = np.array([code_of.get(sample, -1) for sample in targets.samples], dtype=np.int64)
        starts = range(0, len(numbers), self._block)

        def queries(block: int) -> QueryBatch:
            index, place = divmod(block, len(starts))
            window = self.data.windows[index]
            span = slice(window.start, window.stop)
            group = numbers[starts[place] :][: self._block]
            return QueryBatch(
                window=window.index,
                samples=group,
                alleles=targets.alleles(span, slice(starts[place], starts[place] + len(group))),
                masked=np.repeat(~targets.typed[span][None], len(group), axis=0),
            )

        number = len(self.data.windows) * len(starts)
        if self._reference.backend == "auto" and _worth_timing(number, self._device):
            first = self._reference.first_search(queries(0))
            if first is not None:
                self._reference.backend = first.fastest()
                self._collate = self._reference.collator(self._block, slots=_AHEAD + 2)

        def build(block: int) -> Batch:
            return self._collate(queries(block), step=0)

        with closing(Prefetcher(build, 0, number, _AHEAD)) as batches:
            for window in self.data.windows:
                yield window.index, np.concatenate([self._probability(batches.next()) for _ in starts])

    @torch.no_grad()
    def _probability(self, batch: Batch) -> np.ndarray:
        # TF32 stays off, torch's default: it would round the weights of the exact search, and bf16 is faster.
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            logits = self._network(batch, self._transformer).logits
        return logits.sigmoid().cpu().numpy()


def impute_to_vcf(imputation: Imputation, targets: Targets, out: Path) -> None:
    """Impute every window, blend the overlaps, and write a bgzipped, indexed VCF.

    Raises :class:`UserError` if ``out`` cannot be written.
    """
    windows = imputation.data.windows
    sites = imputation.data.reference.panel.sites
    weights = blend_weights(windows)
    source = f"embrag_ds {embrag_ds.__version__}"
    pending = np.zeros((2 * len(targets.samples), 0), dtype=np.float32)
    written = 0
    last_logged = time.monotonic()
    with ImputedVcfWriter(out, sites, targets.samples, source) as writer:
        for number, probability in imputation.windows(targets):
            window = windows[number]
            # ``pending`` holds the blended part of the windows so far, from site ``written`` on.
            grown = np.zeros((len(pending), window.core_stop - written), dtype=np.float32)
            grown[:, : pending.shape[1]] = pending
            grown[:, window.core_start - written :] += probability * weights[number].astype(np.float32)
            last = number + 1 == len(windows)
            settled = window.core_stop if last else windows[number + 1].core_start
            span = slice(written, settled)
            samples = slice(0, len(targets.samples))
            writer.write(written, grown[:, : settled - written], targets.typed[span], targets.alleles(span, samples))
            pending = grown[:, settled - written :]
            written = settled
            due = last or time.monotonic() - last_logged > 2
            done = (number + 1, len(windows), written, len(sites))
            logger.log(logging.INFO if due else logging.DEBUG, "imputed window %d/%d, %d/%d sites", *done)
            if due:
                last_logged = time.monotonic()


def impute(
    files: PanelFiles,
    target: Path | None,
    out: Path,
    *,
    model: Path = PRETRAINED,
    samples_per_batch: int = 32,
    transformer: bool = True,
    allow_overlap: bool = False,
    device: str | None = None,
    precision: Precision | None = None,
) -> None:
    """Impute every panel site of the samples in ``target`` into ``out``, a bgzipped VCF with its index.

    ``model`` is an exported model. Without panel and target, those of the default data set are used. More
    ``samples_per_batch`` take more memory and less time. Without ``transformer`` its residual is left out
    (:meth:`embrag_ds.model.imputer.Imputer.forward`). With ``allow_overlap``, targets may also be in the panel.
    ``device`` defaults to CUDA where there is a device; a warning says where torch cannot use one that the driver
    lists. ``precision`` of the network's matrix products defaults to bf16 on a GPU and fp32 on a CPU. Raises
    :class:`UserError` for faulty files and arguments.
    """
    if samples_per_batch < 1:
        raise UserError("--samples-per-batch must be at least 1")
    where = _device(device)
    require_kernels(where)
    numbers = _checked(precision, where)
    began = time.monotonic()
    exported = read_export(model)
    logger.info("model %s", model)
    if (files.panel is None) != (target is None):
        raise UserError("--panel and --target go together")
    target = target or default_data(exported.config.data).target
    inputs = open_inputs(files, exported.config.data)
    panel = inputs.panel
    logger.info("panel %s: %d samples, %d sites", panel.path, len(panel.samples), len(panel.sites))
    with tempfile.TemporaryDirectory(dir=cache_directory(exported.config.data)) as scratch:
        targets = harmonise_targets(open_panel(target, Path(scratch)), panel, allow_overlap)
        imputation = Imputation(exported, inputs, where, samples_per_batch, transformer, numbers)
        impute_to_vcf(imputation, targets, out)
    logger.info("%s: %d samples in %.0f s", out, len(targets.samples), time.monotonic() - began)


def _device(name: str | None) -> torch.device:
    unused = unused_gpus() if name is None else None
    if unused is not None:  # no error: unlike training, imputation is of use on a CPU
        logger.warning("%s; imputing on the CPU, as --device cpu would", unused)
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as fault:
        raise UserError(f"--device {name}: no such device; use cpu or cuda") from fault


def _checked(precision: Precision | None, device: torch.device) -> Precision:
    """The precision asked for, or the device's default: bf16 on a GPU, fp32 on a CPU."""
    if precision is None:
        return "bf16" if device.type == "cuda" else "fp32"
    if precision not in get_args(Precision):
        raise UserError(f"--precision {precision}: no such precision; use {' or '.join(get_args(Precision))}")
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        raise UserError("--precision bf16: this processor has no bf16 instructions; use fp32")
    return precision
