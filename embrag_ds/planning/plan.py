"""What a training run would do, without training: ``embrag train --dry-run``.

Settings and files are read as a run reads them. Nothing is written but the cache of packed panels.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embrag_ds.config import EmbragConfig, RunConfig, named_files
from embrag_ds.data.inputs import PanelFiles, PanelInputs, with_default
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.engine.distributed import adapt_to_machine, collective_limit
from embrag_ds.errors import UserError
from embrag_ds.export import MODEL_FILE
from embrag_ds.planning.first_batches import Planned, build_first, planned
from embrag_ds.planning.memory import DEVICE, HOST, Component, on_cpu, on_gpu
from embrag_ds.planning.trace import parameter_count
from embrag_ds.runs.folder import CHECKPOINTS
from embrag_ds.runs.meeting import Meeting, meet
from embrag_ds.runs.record import CONFIG, METRICS, RUN_LOG, VERSIONS
from embrag_ds.runtime.processor import memory_field
from embrag_ds.training.panel_limits import fit_micro_batch, settled_batch, warn_of_fewer_neighbours
from embrag_ds.training.run import folder_of, require_one_start

_MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Memory of a rank by component: on the CPU, as this machine would train, and with a GPU."""

    cpu: list[Component]
    gpu: list[Component]


def plan(
    config: Path | str,
    files: PanelFiles,
    *,
    overrides: Iterable[str] = (),
    run_dir: Path | None = None,
    resume: bool = False,
    init_from: Path | None = None,
) -> list[str]:
    """Lines that say what :func:`embrag_ds.training.run.train` would do with the same arguments (collective).

    They are empty on other ranks than 0. Raises :class:`UserError` as a run would.
    """
    require_one_start(resume, init_from)
    settings = load_training_config(config, overrides)
    with meet(collective_limit(0)) as meeting:
        folder = folder_of(config, files, settings.embrag, run_dir, resume, init_from, meeting)
        before = _resident()
        inputs = meeting.open_inputs(files, settings.embrag.data)
        if not meeting.is_main:
            return []
        return _lines(settings, files, inputs, folder, meeting, before)


def estimate(settings: RunConfig, inputs: PanelInputs, ranks: int, before: int) -> tuple[Planned, Memory]:
    """Sampler of rank 0 and memory of a rank. ``before`` is the resident memory before ``inputs`` were opened."""
    embrag, deepspeed = settings.embrag, settled_batch(settings.deepspeed, ranks)
    accumulation = deepspeed.get("gradient_accumulation_steps", 1)
    micro_batch = deepspeed["train_micro_batch_size_per_gpu"]
    run = planned(embrag, inputs, micro_batch, 0, ranks, accumulation)
    deepspeed = fit_micro_batch(deepspeed, run.sampler.group_size, ranks, is_main=True)
    gc.collect()
    tables = max(0, _resident() - before)
    first = build_first(embrag, inputs, run)
    warn_of_fewer_neighbours(embrag, first.neighbours, is_main=True)
    adapted = _for_cpu(deepspeed)
    return run, Memory(
        on_cpu(embrag, adapted, ranks, run.data, first, tables),
        on_gpu(embrag, deepspeed, ranks, run.data, first, tables),
    )


def total(parts: list[Component], place: str) -> int:
    """Bytes of all components in a place."""
    return sum(each.size for each in parts if each.place == place)


def _for_cpu(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings as a CPU runs them; where it has no such precision, in fp32."""
    try:
        return adapt_to_machine({**deepspeed, "fp16": {"enabled": False}})[0]
    except UserError:
        return deepspeed


def _resident() -> int:
    """Resident memory of this process in bytes without mapped files; 0 where the system does not say."""
    return memory_field("RssAnon") or 0


def _lines(
    settings: RunConfig, files: PanelFiles, inputs: PanelInputs, folder: Path, meeting: Meeting, before: int
) -> list[str]:
    run, memory = estimate(settings, inputs, meeting.ranks, before)
    return [
        *_batch_lines(settings.embrag, run, meeting.ranks),
        *_file_lines(settings.embrag, settings.deepspeed, files, folder, meeting.ranks),
        *_memory_lines(memory, inputs, torch.cuda.is_available()),
    ]


def _batch_lines(config: EmbragConfig, run: Planned, ranks: int) -> list[str]:
    sampler, steps = run.sampler, config.train.max_steps
    size = sampler.group_size * sampler.accumulation * ranks
    epochs = steps / sampler.steps_per_epoch
    return [
        f"batch: {sampler.group_size} samples a micro-batch x {sampler.accumulation} micro-batches x {ranks} ranks = "
        f"{size} samples a step",
        f"panel: {len(sampler.samples)} samples to train on, {run.held_out} held out, {len(run.data)} windows",
        f"steps: {sampler.steps_per_epoch} an epoch, {steps} in all, {epochs:.2f} epochs",
    ]


def _file_lines(
    config: EmbragConfig, deepspeed: dict[str, Any], files: PanelFiles, folder: Path, ranks: int
) -> list[str]:
    given = with_default(files, config.data).by_option()
    read = [f"{path} ({option})" for option, path in {**given, **named_files(config)}.items() if path is not None]
    checkpoint = _checkpoint_bytes(config, deepspeed)
    logs = [RUN_LOG, *(f"run-rank{rank}.log" for rank in range(1, ranks))]
    return [
        f"reads: {', '.join(read)}",
        f"writes in {folder}: {CONFIG}, {VERSIONS}, {METRICS}, {', '.join(logs)}, "
        f"{MODEL_FILE} ({_mib(4 * parameter_count(config))})",
        f"checkpoints: every {config.train.checkpoint_every} steps in {folder / CHECKPOINTS}, {_mib(checkpoint)} each, "
        f"{config.train.keep_checkpoints} kept, and one more while it is written",
    ]


def _checkpoint_bytes(config: EmbragConfig, deepspeed: dict[str, Any]) -> int:
    """Size of a checkpoint: the network's weights, and the optimiser's weights and moments of all ranks."""
    weights, trained = parameter_count(config), parameter_count(config, trained=True)
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    return 4 * weights + 4 * trained * (3 if stage else 2)


def _memory_lines(memory: Memory, inputs: PanelInputs, has_gpu: bool) -> list[str]:
    mapped = int(inputs.panel.packed.nbytes)
    lines = [
        "memory of a rank on a CPU, estimated, above what imports and compiled code take:",
        *_component_lines(memory.cpu, HOST),
        f"  the packed panel, {_mib(mapped)}, is mapped from its file and shared by the ranks of a machine",
        "memory of a rank with a GPU, estimated, not measured, without CUDA's own:",
        *_component_lines(memory.gpu, DEVICE),
        "and on the host of that GPU:",
        *_component_lines(memory.gpu, HOST),
    ]
    if has_gpu:
        free, whole = torch.cuda.mem_get_info()
        lines.append(f"this GPU has {_mib(whole)}, of which {_mib(free)} are free")
    return lines


def _component_lines(parts: list[Component], place: str) -> list[str]:
    here = [each for each in parts if each.place == place and each.size]
    return [f"  {_mib(each.size):>14}  {each.name}" for each in here] + [f"  {_mib(total(parts, place)):>14}  in all"]


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB"
