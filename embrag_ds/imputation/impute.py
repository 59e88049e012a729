"""The work of ``embrag impute``: checks, reading of the targets, imputation."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from embrag_ds.adaptation.adapt import adapt_model
from embrag_ds.adaptation.learner import Source
from embrag_ds.adaptation.settings import Adapt, parse_adapt
from embrag_ds.data.cache import require_cache, scratch_folder
from embrag_ds.data.inputs import (
    PanelFiles,
    PanelInputs,
    cache_directory,
    default_data,
    open_inputs,
    settings_for,
    with_default,
)
from embrag_ds.data.packing import TARGET
from embrag_ds.data.panel import Panel, open_panel
from embrag_ds.data.phasing import require_beagle
from embrag_ds.data.targets import Phase, Targets, match_targets, open_targets, phase_targets
from embrag_ds.errors import UserError
from embrag_ds.export import PRETRAINED, read_export, write_export
from embrag_ds.files import require_writable, write_json
from embrag_ds.imputation.engine import Imputation, Precision, impute_to_vcf
from embrag_ds.imputation.extent import UntypedContigs, extent, warn_of_few_typed
from embrag_ds.imputation.report import describe, describe_targets, table, write_left_out
from embrag_ds.imputation.sample_checks import check_samples
from embrag_ds.ops.cuda import require_kernels
from embrag_ds.preflight import require_distinct, require_readable, require_space
from embrag_ds.runtime.driver import unused_gpus
from embrag_ds.runtime.processor import cpu_has_bf16
from embrag_ds.variants.harmonise import Strand
from embrag_ds.variants.output import EVERYTHING, OutputOptions
from embrag_ds.variants.published import check_output
from embrag_ds.variants.records import Duplicates

logger = logging.getLogger(__name__)

_LEAST_BYTES, _LIKELY_BYTES = 0.04, 3.2
"""Bytes of output for a genotype: of 40 bytes of text DEFLATE leaves 0.04 at best (1 of 1032), and 3.2 is what 250
samples of 1000 Genomes take on chromosome 20.
"""


@dataclass(frozen=True)
class TargetOptions:
    """Options of what is read from the targets, and of what is imputed.

    ``duplicates`` is the rule for sites that the file has twice, and ``strand`` that for sites on the other strand
    (:func:`embrag_ds.variants.harmonise.harmonise`). ``phase`` says what phases unphased targets. With
    ``allow_overlap``, targets may also be in the panel. ``region`` limits what is written, and ``untyped_contigs`` says
    what becomes of contigs without typed sites (:func:`embrag_ds.imputation.extent.extent`). ``report`` is a file for
    the numbers as JSON, and ``excluded`` one for the sites that were left out, each with the reason.
    """

    duplicates: Duplicates = "first"
    strand: Strand = "report"
    phase: Phase = "none"
    allow_overlap: bool = False
    region: str | None = None
    untyped_contigs: UntypedContigs = "drop"
    report: Path | None = None
    excluded: Path | None = None


def impute(
    files: PanelFiles,
    target: Path | None,
    out: Path,
    *,
    model: Path = PRETRAINED,
    options: TargetOptions = TargetOptions(),
    samples_per_batch: int = 32,
    transformer: bool | None = None,
    device: str | None = None,
    precision: Precision | None = None,
    adapt: Adapt = "auto",
    save_model: Path | None = None,
    output: OutputOptions = EVERYTHING,
    cache_dir: Path | None = None,
) -> None:
    """Impute every panel site of the samples in ``target`` into ``out``, a bgzipped VCF or a BCF with its index.

    ``model`` is an exported model; ``options`` say how targets are read, and ``output`` what is written. Without panel
    and target, those of the default data set are used. More ``samples_per_batch`` take more memory and less time.
    Without ``transformer`` its residual is left out (:meth:`embrag_ds.model.imputer.Imputer.forward`), which is the
    default on a CPU, where it takes long. ``device`` defaults to CUDA where there is a device; a warning says where
    torch cannot use one that the driver lists.
    ``precision`` of the network's matrix products defaults to bf16 on a GPU and fp32 on a CPU. ``adapt`` says whether,
    or for how many minutes of two cores, the model first adapts to the panel and to the sites the targets are typed at
    (:func:`embrag_ds.adaptation.adapt.adapt_model`). The model that imputes is also written to ``save_model``. The
    packed panel, adapted models and scratch files lie in ``cache_dir`` (default:
    :func:`embrag_ds.data.cache.default_cache_dir`). Beagle's log, if it phases, is ``out`` with ``.beagle.log``.

    Raises :class:`UserError` for faulty files and arguments: before any work where an output is an input, or where
    a file cannot be read or written.
    """
    if samples_per_batch < 1:
        raise UserError("--samples-per-batch must be at least 1")
    adapt = parse_adapt(adapt)
    check_output(out)
    for result in filter(None, (options.report, options.excluded, save_model)):
        require_writable(result)
    where = _device(device)
    require_kernels(where)
    numbers = _checked(precision, where)
    advice = transformer is None and where.type == "cpu"
    if transformer is None:
        transformer = where.type == "cuda"
    began = time.monotonic()
    exported = read_export(model)
    logger.info("model %s", model)
    if (files.panel is None) != (target is None):
        raise UserError("--panel and --target go together")
    settings = settings_for(cache_dir)
    target = target or default_data(settings).target
    files = with_default(files, settings)
    read = {"--target": target, **files.by_option()}
    require_readable(read)
    log = Path(f"{out}.beagle.log")
    outputs = {"--out": out, "--report": options.report, "--excluded": options.excluded, "--save-model": save_model}
    if options.phase == "beagle":
        require_beagle(target, files.panel or target)
        outputs["Beagle's log"] = log
    require_distinct(outputs, {**read, "--model": model})
    require_cache(cache_directory(settings))
    inputs = open_inputs(files, settings)
    panel = inputs.panel
    logger.info("panel %s: %d samples, %d sites", panel.path, len(panel.samples), len(panel.sites))
    if advice:
        logger.info("imputing without the transformer, which takes long on a CPU; --transformer on adds it")
    with scratch_folder(cache_directory(settings), "imputation-") as scratch:
        targets, found, opened = _read_targets(target, inputs, options, scratch, log)
        written = extent(
            panel.sites, targets.typed, options.region, options.untyped_contigs, str(panel.path), str(target)
        )
        if output == EVERYTHING:
            genotypes = len(targets.samples) * len(written.rows())
            require_space(out, int(_LEAST_BYTES * genotypes), int(_LIKELY_BYTES * genotypes))
        write_left_out(options.excluded, panel, opened, targets.match)
        source = Source(inputs, targets.typed, _no_targets(panel, targets), where, transformer, bf16=numbers == "bf16")
        adapted = adapt_model(source, exported, adapt, cache_directory(settings))
        if save_model is not None:
            write_export(save_model, adapted.model.weights, adapted.model.snapshot, adapted.model.config)
        if options.report is not None:
            write_json(options.report, {**found, "adaptation": adapted.report})
        imputation = Imputation(adapted.model, inputs, targets, where, samples_per_batch, transformer, numbers)
        warn_of_few_typed(written.windows(imputation.data.windows), panel.sites, targets.typed)
        impute_to_vcf(imputation, out, written, output)
    logger.info("%s: %d samples in %.0f s", out, len(targets.samples), time.monotonic() - began)


def _read_targets(
    path: Path, inputs: PanelInputs, options: TargetOptions, scratch: Path, log: Path
) -> tuple[Targets, dict[str, Any], Panel]:
    """Read, match, phase and check the targets; returns them, the report of what was done, and the opened file."""
    panel = inputs.panel
    target = open_panel(path, scratch, reading=replace(TARGET, duplicates=options.duplicates))
    match = match_targets(target, panel, options.strand, options.allow_overlap)
    found = describe(panel, target, match, options.strand)
    logger.info("what was read and matched:\n%s", table(found))
    if options.phase == "beagle":
        targets = phase_targets(target, match, panel, inputs.position_cm, scratch, log, torch.get_num_threads())
    else:
        targets = open_targets(target, match, panel)
    found |= describe_targets(targets, check_samples(targets, panel))
    return targets, found, target


def _no_targets(panel: Panel, targets: Targets) -> np.ndarray:
    """Panel samples that are no targets, int64."""
    imputed = set(targets.samples)
    return np.array([number for number, name in enumerate(panel.samples) if name not in imputed], dtype=np.int64)


def _device(name: str | None) -> torch.device:
    unused = unused_gpus() if name is None else None
    if unused is not None:  # no error: unlike training, imputation is of use on a CPU
        logger.warning("%s; imputing on the CPU, as --device cpu would", unused)
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
    except RuntimeError as fault:
        raise UserError(f"--device {name}: no such device; use cpu or cuda") from fault
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: embrag_ds has no kernels for it; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        why = unused_gpus() or f"torch sees {torch.cuda.device_count()} CUDA devices"
        raise UserError(f"--device {name}: {why}; use {_present()}")
    return device


def _present() -> str:
    """The devices of this machine, as ``--device`` takes them."""
    return " or ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])


def _checked(precision: Precision | None, device: torch.device) -> Precision:
    """The precision asked for, or the device's default: bf16 on a GPU, fp32 on a CPU."""
    if precision is None:
        return "bf16" if device.type == "cuda" else "fp32"
    if precision not in get_args(Precision):
        raise UserError(f"--precision {precision}: no such precision; use {' or '.join(get_args(Precision))}")
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        raise UserError("--precision bf16: this processor has no bf16 instructions; use fp32")
    return precision
