"""Imputation: from targets typed at some sites to dosages at every site of the panel.

Windows are computed one after another, and blended (:mod:`embrag_ds.imputation.computing.blending`). Memory therefore
holds two windows of the targets, whatever the chromosome. Their typed alleles stay packed on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import embrag_ds
from embrag_ds.config import EmbragConfig
from embrag_ds.correction.network import network_part
from embrag_ds.correction.tiles import TransformerTiles
from embrag_ds.data.inputs import PanelInputs, windowed
from embrag_ds.data.targets import Targets
from embrag_ds.data.windows import Window, WindowedPanel, uncovered
from embrag_ds.errors import UserError
from embrag_ds.export import ExportedModel
from embrag_ds.imputation.computing.blending import write_blended
from embrag_ds.imputation.computing.stretches import Precision, Stretches, Way, with_stretches
from embrag_ds.imputation.extent import Extent
from embrag_ds.variants.output import EVERYTHING, ImputedVcfWriter, OutputOptions

if TYPE_CHECKING:
    from embrag_ds.imputation.computing.windows import Windows


class Imputation:
    """An exported model applied to a panel, one window and one block of samples at a time.

    Raises :class:`UserError` if sites of the panel lie in no window.
    """

    def __init__(
        self,
        model: ExportedModel,
        inputs: PanelInputs,
        targets: Targets,
        device: str,
        block: int | None = None,
        transformer: bool = True,
        precision: Precision = "fp32",
    ):
        """``block`` samples of the ``targets`` are computed at a time, by default all of them by a CPU's loop and 32
        otherwise, on a ``device`` that torch knows by this name.

        Without ``transformer`` its residual is left out (:meth:`embrag_ds.model.imputer.Imputer.forward`). With
        ``precision`` bf16 the matrix products of the network are in bf16, except in a CPU's loops.
        """
        config, samples = model.config, inputs.panel.samples
        haplotypes = 2 * len(samples)
        way, settings = _way(config, device, haplotypes), config.data
        if way != "windows":
            settings = with_stretches(settings, haplotypes, targets, way, _memory(device))
        self.data: WindowedPanel = windowed(inputs, settings, np.arange(len(samples)))
        left_out = uncovered(self.data.windows, len(inputs.panel.sites))
        if left_out:
            raise UserError(
                f"{config.data.windows_file}: {left_out} panel sites lie in no window; imputation needs all"
            )
        self.targets = targets
        self.dependence = model.dependence
        code_of = {sample: code for code, sample in enumerate(samples)}
        numbers = np.array([code_of.get(sample, -1) for sample in targets.samples], dtype=np.int64)
        given = model, self.data, targets, numbers, block
        if way == "loop":
            tiles = None
            if transformer:
                tiles = TransformerTiles(network_part(*model.parts, config.model), config.data)
            self._computing: Stretches | Windows = Stretches(*given, tiles)
            return
        from embrag_ds.imputation.computing.windows import Windows

        memory = _memory(device) if way == "whole" else None
        self._computing = Windows(*given, device=device, memory=memory, transformer=transformer, precision=precision)

    def windows(self, chosen: list[Window] | None = None) -> Iterator[tuple[Window, np.ndarray]]:
        """Iterate over (window, ALT probabilities float32 [2N, L] of the target haplotypes in its core), in order.

        ``chosen`` are some of the windows, increasing, or all. Where a haplotype has no typed site in a window, its
        probabilities are the panel's allele frequencies.
        """
        return self._computing.windows(self.data.windows if chosen is None else chosen)


def does_without_torch(config: EmbragConfig, device: str) -> bool:
    """Whether a model with this ``config`` imputes by a CPU's loops alone."""
    return device == "cpu" and config.copies


def _way(config: EmbragConfig, device: str, haplotypes: int) -> Way:
    """How an imputation copies: stretches are copied whole if the model copies haplotypes and the device can.

    A GPU needs its kernels, which take so many haplotypes.
    """
    if not config.copies:
        return "windows"
    if device == "cpu":
        return "loop"
    import torch

    from embrag_ds.ops.li_stephens import copying_backend
    from embrag_ds.ops.li_stephens_cuda import MOST_NEIGHBOURS

    able = copying_backend(torch.device(device)) == "cuda kernel" and haplotypes <= MOST_NEIGHBOURS
    return "whole" if able and config.retrieval.store == "factored" else "windows"


def _memory(device: str) -> float:
    """Memory of a GPU in bytes: all of it, so that a batch does not depend on what else runs there."""
    if device == "cpu":
        return math.inf
    import torch

    return float(torch.cuda.get_device_properties(torch.device(device)).total_memory)


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
    given = out, where.table(sites), targets.samples, source, output
    with ImputedVcfWriter(*given, dependence=imputation.dependence) as writer:
        write_blended(imputation, writer, where)
