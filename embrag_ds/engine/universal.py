"""Checkpoints for another number of ranks, ZeRO stage or precision, through DeepSpeed's universal layout.

DeepSpeed's own files hold one flat part of the optimiser's state for each rank. The universal layout holds the weights
and both moments of every parameter in fp32 (``zero/<parameter>/fp32.pt``, ``exp_avg.pt``, ``exp_avg_sq.pt``,
``step.pt``), so any number of ranks can take its parts of it. DeepSpeed's converter and its loaders leave gaps between
stage 3 and the others, and lose frozen weights; :func:`convert` and :func:`load_universal` fill them.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import (
    CLIP_GRAD,
    DS_VERSION,
    FP32_FLAT_GROUPS,
    FROZEN_PARAM_FRAGMENTS,
    FROZEN_PARAM_SHAPES,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
)
from deepspeed.checkpoint.ds_to_universal import natural_keys

from embrag_ds.engine.deepspeed_log import prints_logged
from embrag_ds.engine.unpickling import DAMAGED, tensors_only
from embrag_ds.errors import UserError
from embrag_ds.files import folder_written, make_folder

_ADAM = ("adam", "adamw")
_UNCAST = ("fp32", "torch_autocast")
"""Precisions in which the network's own weights are fp32, so that stage 0 saves the same for both."""
_STATES = "model_states.pt"
_TIMES_AS_LARGE = 2
"""The converter writes every part of the state, and then the whole, before it removes the parts."""
_SHOWN = 200


@dataclass(frozen=True)
class Layout:
    """How a run's state is spread over ranks and kept; a checkpoint's manifest holds it as ``dataclasses.asdict``.

    ``precision`` is ``fp32``, ``torch_autocast``, ``bf16``, ``bf16 with fp32 gradients`` or ``fp16``. ``optimizer`` is
    the setting ``optimizer.type`` in lower case, and ``nvme`` says whether its state is offloaded to NVMe.
    """

    ranks: int
    micro_batch: int
    accumulation: int
    stage: int
    precision: str
    optimizer: str
    nvme: bool

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimiser step, over all ranks."""
        return self.ranks * self.accumulation

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, zero_optimization.stage {self.stage}, {self.precision}"


def layout_of(settings: dict[str, Any], ranks: int) -> Layout:
    """Layout of a run with DeepSpeed's ``settings``, as this machine runs them, on ``ranks`` ranks."""
    zero = settings.get("zero_optimization", {})
    enabled = [name for name in ("bf16", "fp16", "torch_autocast") if settings.get(name, {}).get("enabled")]
    precision = enabled[0] if enabled else "fp32"
    if precision == "bf16" and settings.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        precision = "bf16 with fp32 gradients"
    return Layout(
        ranks=ranks,
        micro_batch=settings["train_micro_batch_size_per_gpu"],
        accumulation=settings.get("gradient_accumulation_steps", 1),
        stage=zero.get("stage", 0),
        precision=precision,
        optimizer=str(settings.get("optimizer", {}).get("type", "")).lower(),
        nvme=(zero.get("offload_optimizer") or {}).get("device") == "nvme",
    )


def needs_conversion(then: Layout, now: Layout) -> bool:
    """Whether a checkpoint with the layout ``then`` has to be converted before a run with ``now`` can load it."""
    if then.stage == now.stage == 0 and (
        then.precision == now.precision or {then.precision, now.precision} <= {*_UNCAST}
    ):
        return False  # every rank has all of it
    return (then.ranks, then.stage, then.precision) != (now.ranks, now.stage, now.precision)


def refusal(then: Layout, now: Layout) -> str | None:
    """Why a run with the layout ``now`` cannot go on from a checkpoint with ``then``, and a remedy; None if it can."""
    if then.optimizer != now.optimizer:
        return (
            f"optimizer.type is {now.optimizer}, and the checkpoint holds the state of {then.optimizer}; set it to that"
        )
    if then.micro_batch != now.micro_batch:
        return (
            f"train_micro_batch_size_per_gpu is {now.micro_batch}, and the checkpoint's run draws {then.micro_batch} "
            f"samples at a time; set it to that"
        )
    if then.micro_batches != now.micro_batches:
        accumulation, rest = divmod(then.micro_batches, now.ranks)
        remedy = (
            f"start as many ranks as divide {then.micro_batches}"
            if rest
            else f"set gradient_accumulation_steps to {accumulation}"
        )
        return (
            f"{now.ranks} x {now.accumulation} micro-batches a step (ranks x gradient_accumulation_steps), and the "
            f"checkpoint's run has {then.ranks} x {then.accumulation}; {remedy}"
        )
    if not needs_conversion(then, now):
        return None
    back = f"go on with {then}"
    if 0 in (then.stage, now.stage):
        return f"no conversion from {then} to {now}, because stage 0 keeps the optimiser's state otherwise; {back}"
    if then.optimizer not in _ADAM:
        return f"no conversion from {then} to {now} for optimizer.type {then.optimizer}, but for Adam and AdamW; {back}"
    if "fp16" in (then.precision, now.precision):
        return f"no conversion from {then} to {now}, because fp16 keeps its loss scale in the optimiser; {back}"
    if then.nvme or now.nvme:
        return f"no conversion from {then} to {now} with offload_optimizer.device nvme; {back}"
    return None


def convert(source: Path, target: Path) -> None:
    """Convert the checkpoint in the folder ``source`` (``checkpoints/step6``) to the universal layout in ``target``.

    One process does it, in steps of one rank's file, and needs twice the checkpoint's size on the disk for a while.
    The folder ``target`` appears only when complete. Raises :class:`UserError` for files that cannot be read or are
    not of DeepSpeed's stages 1 to 3, for tampered ones, and where there is no room.
    """
    way_out = f"move {source} away to go on from an older checkpoint, or go on as the run was started"
    make_folder(target.parent)
    _require_room(source, target)
    try:
        with (
            folder_written(target) as temporary,
            _alias(source) as origin,
            _alias(temporary) as made,
            prints_logged(),
            redirect_stderr(StringIO()),  # progress bars
            tensors_only(way_out),
        ):
            states = _checked(source)
            arguments = {"input_folder": str(origin), "output_folder": str(made)}
            workers = {"num_extract_workers": 1, "num_merge_workers": 1}
            flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
            ds_to_universal.main(Namespace(**arguments, **workers, **flags))
            _complete(states, temporary)
    except DAMAGED as fault:
        raise UserError(f"{source}: cannot convert the checkpoint ({_said(fault)}); {way_out}") from fault


def load_universal(engine: deepspeed.DeepSpeedEngine, folder: Path) -> dict[str, Any]:
    """Load the checkpoint that :func:`convert` wrote into ``folder``, and return its client state (collective).

    The engine gets weights, moments, steps, the scheduler's state and its counts of steps; its ranks, ZeRO stage (1 to
    3) and precision may be others than those that saved it. Raises what DeepSpeed raises for damaged files, and
    :class:`UserError` for tampered ones.
    """
    engine._config.load_universal_checkpoint = True  # the setting checkpoint.load_universal; only loading looks at it
    try:
        with _alias(folder) as plain, prints_logged(), tensors_only(f"remove {folder} to have it converted again"):
            _, client = engine.load_checkpoint(str(plain.parent), tag=plain.name)
            _load_frozen(engine, folder)
    finally:
        engine._config.load_universal_checkpoint = False
    optimizer = engine.optimizer.optimizer
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for weight, state in optimizer.state.items():
        # DeepSpeed gives all groups of stage 3 one tensor, which each of them would count up, and leaves it on the host
        # where fused optimisers need it beside the weights.
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone().to(weight.device if beside else "cpu")
    return dict(client)


def _checked(source: Path) -> list[dict[str, Any]]:
    """States of all ranks' files besides the optimiser's, in order, without reading their tensors yet.

    Raises ValueError if a rank's file of the optimiser is not there, since DeepSpeed takes the number of files for that
    of ranks, and for names of parameters that would lead out of a folder, since it makes files by these names.
    """
    found = {path: _opened(path) for path in sorted(source.glob("*.pt"), key=lambda path: natural_keys(path.name))}
    for path, content in found.items():
        mappings = content.get(OPTIMIZER_STATE_DICT, {}).get(PARAM_SLICE_MAPPINGS) or []
        named = [*(content.get(PARAM_SHAPES) or []), *mappings, content.get("module") or {}]
        for name in chain(*named, content.get(FROZEN_PARAM_SHAPES) or {}):
            if Path(name).name != name:
                raise ValueError(f"{path.name} has a parameter of the name {name!r}")
    states = [content for path, content in found.items() if path.name.endswith(_STATES)]
    parts, ranks = len(found) - len(states), states[0]["dp_world_size"]
    if parts != ranks:
        raise ValueError(f"it holds the optimiser's state of {parts} of {ranks} ranks")
    return states


def _opened(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=zipfile.is_zipfile(path))
    return content


def _complete(states: list[dict[str, Any]], made: Path) -> None:
    """Add to a converted checkpoint what the loaders of other stages than its own look for.

    ``states`` are those that :func:`_checked` returned.
    """
    first = states[0]
    for name, shape in (first.get(FROZEN_PARAM_SHAPES) or {}).items():
        _save_frozen(made / "zero" / name, shape, [each[FROZEN_PARAM_FRAGMENTS][name] for each in states])
    for path in made.glob(f"*{_STATES}"):
        path.unlink()
    # Weights come from the folder zero, so the file of counts and our own state needs none.
    first["module"] = {}
    for name in (f"mp_rank_00_{_STATES}", f"zero_pp_rank_0_mp_rank_00_{_STATES}"):
        torch.save(first, made / name)

    shared = made / "zero" / "optimizer_state.pt"
    state = torch.load(shared, map_location="cpu", weights_only=False)
    if OPTIMIZER_STATE_DICT in state:  # of stage 3
        step = state[OPTIMIZER_STATE_DICT]["state"][0]["step"]
        for name, shape in (pair for group in first[PARAM_SHAPES] for pair in group.items()):
            for path in (made / "zero" / name).iterdir():
                flat = torch.load(path, map_location="cpu", weights_only=False)
                torch.save({PARAM: flat.view(shape)}, path)
            torch.save(step, made / "zero" / name / "step.pt")
    else:
        step = torch.load(next((made / "zero").glob("*/step.pt")), weights_only=False)
    for name in (CLIP_GRAD, FP32_FLAT_GROUPS):  # the settings have the one, the parameters' folders the other
        state.pop(name, None)
    state[OPTIMIZER_STATE_DICT] = {"state": {0: {"step": step}}, PARAM_GROUPS: state[PARAM_GROUPS]}
    state[DS_VERSION] = first[DS_VERSION]
    torch.save(state, shared)


def _save_frozen(folder: Path, shape: torch.Size, parts: list[torch.Tensor]) -> None:
    """Save a weight that the optimiser does not have, from all ranks' parts of it (stage 3) or from copies of it."""
    folder.mkdir(exist_ok=True)
    whole = parts[0] if parts[0].shape == shape else torch.cat([part.flatten() for part in parts])
    torch.save({PARAM: whole.flatten()[: prod(shape)].view(shape).float()}, folder / "fp32.pt")


def _load_frozen(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Set the weights that the optimiser does not have, which DeepSpeed leaves as they were made (collective)."""
    for name, weight in engine.module.named_parameters():
        if not weight.requires_grad:
            saved = torch.load(folder / "zero" / name / "fp32.pt", map_location="cpu", weights_only=False)[PARAM]
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0), torch.no_grad():
                if weight.shape == saved.shape:  # under stage 3 only rank 0 has the whole to change
                    weight.copy_(saved)


def plain_name(folder: Path) -> AbstractContextManager[Path]:
    """Context of a name for ``folder`` without characters that mean something in a pattern.

    DeepSpeed makes a pattern of the name of a checkpoint that it loads.
    """
    return _alias(folder) if glob.has_magic(str(folder)) else nullcontext(folder)


@contextmanager
def _alias(folder: Path) -> Iterator[Path]:
    """Another name for ``folder``, in a temporary folder, which takes what DeepSpeed writes beside checkpoints."""
    with tempfile.TemporaryDirectory() as place:
        alias = Path(place) / "checkpoint"
        alias.symlink_to(folder.resolve())
        yield alias


def _require_room(source: Path, target: Path) -> None:
    needed = _TIMES_AS_LARGE * sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(
            f"{target}: converting {source.name} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            f"free some space in {target.parent}"
        )


def _said(fault: Exception) -> str:
    return " ".join(str(fault).split())[:_SHOWN] or type(fault).__name__
