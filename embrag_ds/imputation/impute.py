"""The work of ``embrag impute``: checks, reading of the targets, imputation."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from embrag_ds.adaptation.settings import Adapt, parse_adapt
from embrag_ds.data.cache import require_cache, scratch_folder
from embrag_ds.data.inputs import (
    PanelFiles,
    cache_directory,
    default_data,
    open_inputs,
    settings_for,
    with_default,
)
from embrag_ds.data.phasing import require_beagle
from embrag_ds.errors import UserError
from embrag_ds.export import PRETRAINED, read_export
from embrag_ds.files import require_writable
from embrag_ds.imputation.computing.stretches import Precision
from embrag_ds.imputation.division import impute_by_ranks, impute_files
from embrag_ds.imputation.engine import Imputation, does_without_torch, impute_to_vcf
from embrag_ds.imputation.extent import warn_of_few_typed
from embrag_ds.imputation.genome import require_files
from embrag_ds.imputation.preparation import AS_IT_IS, Job, TargetOptions, prepare_one
from embrag_ds.imputation.ranks import Ranks, ranks_met
from embrag_ds.ops.threads import load_numba
from embrag_ds.preflight import require_distinct, require_readable
from embrag_ds.runtime.driver import may_have_gpus, unused_gpus
from embrag_ds.runtime.imports import uncollected
from embrag_ds.runtime.processor import cpu_has_bf16
from embrag_ds.variants.output import EVERYTHING, OutputOptions
from embrag_ds.variants.published import check_output

logger = logging.getLogger(__name__)


def impute(
    files: PanelFiles | Sequence[PanelFiles],
    target: Path | Sequence[Path] | None,
    out: Path,
    *,
    model: Path = PRETRAINED,
    options: TargetOptions = AS_IT_IS,
    samples_per_batch: int | None = None,
    transformer: bool | None = None,
    device: str | None = None,
    precision: Precision | None = None,
    adapt: Adapt = "auto",
    save_model: Path | None = None,
    output: OutputOptions = EVERYTHING,
    cache_dir: Path | None = None,
) -> None:
    """Impute every panel site of the samples in ``target`` into ``out``, a bgzipped VCF or a BCF with its index.

    A genome may be several panel files and several files of targets. Each contig is in one of either kind at most
    (:mod:`embrag_ds.imputation.genome`). ``out`` has all contigs, in the order of the panel files. Each panel file is
    imputed as it would be alone, by one model, which adapts to the file with the most typed sites.

    Where a launcher started several ranks, all call this with the same arguments, and each imputes a share. ``out`` is
    then the same, byte for byte, as that of one rank. A rank takes the GPU with its number on its machine.

    ``model`` is an exported model; ``options`` say how targets are read, and ``output`` what is written. Without panel
    and target, those of the default data set are used. More ``samples_per_batch`` take more memory and less time;
    by default they are all on a CPU where the model copies haplotypes and no target is in the panel (512 with the
    transformer), and 32 otherwise.
    Without ``transformer`` its residual is left out (:meth:`embrag_ds.model.imputer.Imputer.forward`), which is the
    default, because it has not made imputation more accurate (docs/results.md). ``device`` defaults to CUDA where there
    is a device; a warning says where torch cannot use one that the driver lists.
    ``precision`` of the network's matrix products defaults to bf16 on a GPU and fp32 on a CPU, whose loops are in fp32
    either way. ``adapt`` says whether,
    or for how many minutes of two cores, the model first adapts to the panel and to the sites the targets are typed at
    (:func:`embrag_ds.adaptation.adapt.adapt_model`). The model that imputes is also written to ``save_model``. The
    packed panel, adapted models and scratch files lie in ``cache_dir`` (default:
    :func:`embrag_ds.data.cache.default_cache_dir`). Beagle's log, if it phases, is ``out`` with ``.beagle.log``.

    Raises :class:`UserError` for faulty files and arguments: before any work where an output is an input, or where
    a file cannot be read or written.
    """
    with ranks_met() as ranks:
        began = time.monotonic()
        panels = [files] if isinstance(files, PanelFiles) else list(files)
        targets = [target] if isinstance(target, Path) else list(target or ())
        settings = settings_for(cache_dir)
        if samples_per_batch is not None and samples_per_batch < 1:
            raise UserError("--samples-per-batch must be at least 1")
        adapt = parse_adapt(adapt)
        check_output(out)
        for result in filter(None, (options.report, options.excluded, save_model)):
            require_writable(result)
        where = _of_rank(_device(device), ranks)
        numbers = _checked(precision, where)
        exported = read_export(model)
        if adapt != "off" or not does_without_torch(exported.config, where):
            # Before any loop runs, or torch would use as many threads as numba has started.
            with uncollected():
                import torch  # noqa: F401
        logger.info("model %s", model)
        if (panels[0].panel is None) != (not targets):
            other = "--panel" if panels[0].panel is None else "--target"
            raise UserError(f"--panel and --target go together: add {other}, or give neither for the simulated data")
        targets = targets or [default_data(settings).target]
        panels = [with_default(each, settings) for each in panels]
        log = Path(f"{out}.beagle.log")
        job = Job(
            panels,
            targets,
            out,
            options,
            exported,
            where,
            bool(transformer),
            numbers,
            samples_per_batch,
            adapt,
            save_model,
            output,
            settings,
            log,
        )
        _check_files(job, model, ranks)
        if transformer is None:
            logger.info("imputing without the transformer, which adds no accuracy so far; --transformer on runs it")
        load_numba()  # the command has another process pack the panel meanwhile
        with scratch_folder(cache_directory(settings), "imputation-") as scratch:
            if ranks.ranks > 1:
                samples = impute_by_ranks(job, ranks, scratch)
            elif job.is_single:
                samples = _impute_one(job, scratch)
            else:
                samples = impute_files(job, scratch)
        logger.info("%s: %d samples in %.0f s", out, samples, time.monotonic() - began)


def _check_files(job: Job, model: Path, ranks: Ranks) -> None:
    """Raise :class:`UserError` for files that cannot be read or written, and for outputs that are inputs."""
    read: dict[str, list[Path]] = {"--target": job.targets}
    for each in job.panels:
        for option, path in each.by_option().items():
            if path is not None and path not in read.setdefault(option, []):
                read[option].append(path)
    require_readable(read)
    if ranks.ranks > 1 or not job.is_single:
        several = "several ranks read it" if ranks.ranks > 1 else "of several files each is read more than once"
        require_files(several, [path for paths in read.values() for path in paths])
    options = job.options
    outputs = {"--out": job.out, "--report": options.report, "--excluded": options.excluded}
    outputs["--save-model"] = job.save_model
    if options.phase == "beagle":
        require_beagle(job.targets[0], job.panels[0].panel or job.targets[0])
        outputs["Beagle's log"] = job.log
    require_distinct(outputs, {**read, "--model": model})
    require_cache(cache_directory(job.settings))


def _impute_one(job: Job, scratch: Path) -> int:
    """Impute one file of targets by one panel file and one rank; returns the number of samples."""
    inputs = open_inputs(job.panels[0], job.settings)
    targets, written, model = prepare_one(job, inputs, scratch)
    imputation = Imputation(model, inputs, targets, job.device, job.block, job.transformer, job.precision)
    warn_of_few_typed(written.windows(imputation.data.windows), inputs.panel.sites, targets.typed)
    impute_to_vcf(imputation, job.out, written, job.output)
    return len(targets.samples)


def _device(name: str | None) -> str:
    """The device to impute on, as torch names it. Where there is none but the CPU, torch is not asked."""
    if name == "cpu" or (name is None and not may_have_gpus()):
        return "cpu"
    import torch

    from embrag_ds.ops.cuda import require_kernels

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
        present = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise UserError(f"--device {name}: {why}; use {' or '.join(present)}")
    require_kernels(device)
    return "cpu" if device.type == "cpu" else str(device)


def _of_rank(device: str, ranks: Ranks) -> str:
    """A rank's own GPU, where none is named."""
    if ranks.ranks == 1 or device == "cpu" or ":" in device:
        return device
    import torch

    # A launcher may let each rank see one GPU only, which is number 0 then.
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def _checked(precision: Precision | None, device: str) -> Precision:
    """The precision asked for, or the device's default: bf16 on a GPU, fp32 on a CPU."""
    if precision is None:
        return "fp32" if device == "cpu" else "bf16"
    if precision not in get_args(Precision):
        raise UserError(f"--precision {precision}: no such precision; use {' or '.join(get_args(Precision))}")
    if precision == "bf16" and device == "cpu" and not cpu_has_bf16():
        raise UserError("--precision bf16: this processor has no bf16 instructions; use fp32")
    return precision
