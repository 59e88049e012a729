"""Start of a run: the process group, DeepSpeed's settings adapted to the machine, and the engine."""

from __future__ import annotations

import copy
import importlib
import os
import socket
import warnings
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import deepspeed
import torch
import torch.distributed
import torch.utils.deterministic
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime import compiler
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor

from embrag_ds.engine import deepspeed_log
from embrag_ds.engine.complaints import complaints
from embrag_ds.engine.flat_gradients import handle_gradients_as_a_whole
from embrag_ds.engine.masters import clear_padding
from embrag_ds.errors import SaidByMain, UserError
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.recompute import checkpoint_in_graph
from embrag_ds.runtime.driver import unused_gpus
from embrag_ds.runtime.processor import cpu_has_bf16, share_threads

Made = TypeVar("Made")
_WORKSPACES = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS is deterministic."""
_BEYOND_PATIENCE_S = 300.0
_ALIGNED = 128
"""Numbers in a row of memory that any kernel reads at once, at most."""


@dataclass(frozen=True)
class DistributedContext:
    """The process group as one process sees it: its rank, the number of ranks, and its device."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def own_file(self, name: str) -> str:
        """Name of a file that every rank writes: ``run.log`` stays so on rank 0 and is ``run-rank1.log`` on rank 1."""
        stem, dot, suffix = name.rpartition(".")
        return name if self.is_main else f"{stem}-rank{self.rank}{dot}{suffix}"

    def barrier(self) -> None:
        """Wait for all ranks (collective)."""
        torch.distributed.barrier()

    def agree(self, text: str) -> str:
        """Rank 0's text, on every rank (collective)."""
        texts = [text]
        torch.distributed.broadcast_object_list(texts, src=0)
        return texts[0]

    def on_main(self, work: Callable[[], Made]) -> Made:
        """What ``work`` returns on rank 0, on every rank (collective); a :class:`UserError` is raised on every rank."""
        if self.ranks == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except UserError as fault:
                outcome[1] = str(fault)
        torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UserError(outcome[1]) if self.is_main else SaidByMain(outcome[1])
        made: Made = outcome[0]
        return made

    def gather(self, item: Made) -> list[Made]:
        """The ``item`` of every rank, in the order of ranks, on every rank (collective)."""
        items: list[Any] = [item] * self.ranks
        if self.ranks > 1:
            torch.distributed.all_gather_object(items, item)
        return items

    def close(self) -> None:
        """Leave the process group."""
        torch.distributed.destroy_process_group()


def require_device() -> None:
    """Raise :class:`UserError` where DeepSpeed would take the CPU although the driver lists a GPU.

    See :func:`embrag_ds.runtime.driver.unused_gpus`. A step of ``v18.json`` takes 100 s on a CPU, so it must be chosen.
    """
    unused = unused_gpus() if _on_cpu() else None
    if unused is not None:
        raise UserError(f"{unused}; or set DS_ACCELERATOR=cpu to train on the CPU")


def start_distributed(patience_s: float = 0.0) -> DistributedContext:
    """Join the process group that a launcher set up, or a group of one without a launcher.

    On a CPU this rank takes its share of the cores. ``patience_s`` is the setting ``train.patience_s``. Collective
    operations have DeepSpeed's time limit, 10 minutes or ``DEEPSPEED_TIMEOUT``, but one beyond that patience: what the
    ranks then say of each other is the better message. Raises as :func:`require_device` does.
    """
    require_device()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    if _on_cpu():
        # An optional shared-memory all-reduce that takes minutes and a compiler to build.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        share_threads()
    # DeepSpeed calls what newer versions of torch have renamed, and every rank would say so.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # DeepSpeed's barriers name no device; the current one, which they take, is this rank's.
    warnings.filterwarnings(
        "ignore", message=r"barrier\(\): using the device under current context", category=UserWarning
    )
    deepspeed.init_distributed(verbose=False, timeout=collective_limit(patience_s))
    device = torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return DistributedContext(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def compute_deterministically() -> None:
    """Restrict torch to deterministic operations from now on (setting ``train.deterministic``).

    Attention then takes flash attention's deterministic backward pass and never cuDNN, and gathers are differentiated
    by sorting. An operation that has no deterministic way raises RuntimeError. Raises :class:`UserError` for a
    workspace of cuBLAS that is not deterministic.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACES[0])  # read when cuBLAS is first used
    if workspace not in _WORKSPACES:
        raise UserError(
            f"embrag.train.deterministic: CUBLAS_WORKSPACE_CONFIG is {workspace}; unset it, or set {_WORKSPACES[0]}"
        )
    torch.use_deterministic_algorithms(True)
    # Every kernel of ours writes all of its outputs, so memory need not be filled first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def collective_limit(patience_s: float) -> timedelta:
    """Time limit of a collective operation where ``train.patience_s`` is ``patience_s``."""
    return max(default_pg_timeout, timedelta(seconds=patience_s + _BEYOND_PATIENCE_S))


def adapt_to_machine(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeed's settings as this machine can run them, and a text for each change.

    Only CPU runs change: torch's AdamW replaces DeepSpeed's, and bf16 is off without the instructions for it, with the
    type that its gradients are added up in. Raises :class:`UserError` for fp16 on a CPU.
    """
    if not _on_cpu():
        return settings, []
    settings = copy.deepcopy(settings)
    notes: list[str] = []
    kind = settings.get("optimizer", {}).get("type", "")
    parameters = settings.setdefault("optimizer", {}).setdefault("params", {})
    if kind.lower() in ("adam", "adamw") and not parameters.get("torch_adam"):
        parameters["torch_adam"] = True
        notes.append("CPU: torch's AdamW instead of DeepSpeed's")
    if settings.get("fp16", {}).get("enabled"):
        raise UserError("fp16.enabled: DeepSpeed has no fp16 on a CPU; use bf16 or a GPU")
    for section in ("bf16", "torch_autocast"):
        if settings.get(section, {}).get("enabled") and not cpu_has_bf16():
            settings[section]["enabled"] = False
            # With fp32 weights DeepSpeed adds up in fp32 anyway, and refuses any other type.
            dropped = section == "bf16" and settings.get("data_types", {}).pop("grad_accum_dtype", None)
            also = " and data_types.grad_accum_dtype is left out" if dropped else ""
            notes.append(f"CPU without bf16 instructions: {section} is off, computing in fp32{also}")
    return settings, notes


def compute_type(settings: dict[str, Any]) -> torch.dtype:
    """Type of the transformer's products under DeepSpeed's settings."""
    autocast = settings.get("torch_autocast", {})
    if autocast.get("enabled"):
        kind: torch.dtype = getattr(torch, autocast.get("dtype", "bfloat16"))
        return kind
    named = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((kind for name, kind in named.items() if settings.get(name, {}).get("enabled")), torch.float32)


def initialize_engine(
    model: Imputer,
    settings: dict[str, Any],
    compiled: bool | Literal["max"] = False,
    recompute_projections: bool = False,
    core_lengths: Collection[int] = (),
) -> deepspeed.DeepSpeedEngine:
    """Build DeepSpeed's engine for the model (``deepspeed.initialize``); raises :class:`UserError` for faulty settings.

    With the section ``activation_checkpointing``, the first ``number_checkpoints`` transformer blocks (null: all) keep
    only their input and are recomputed in the backward pass. With ``recompute_projections`` the others recompute their
    projections. ``compiled`` is the setting ``train.compile``, and ``core_lengths`` are those of the run's windows.
    """
    model.transformer.recompute_projections = recompute_projections
    trainable = in_aligned_order(parameter for parameter in model.parameters() if parameter.requires_grad)
    with complaints(everything=True):
        DeepSpeedConfig(copy.deepcopy(settings))
        if "activation_checkpointing" in settings:
            deepspeed.checkpointing.configure(None, deepspeed_config=settings)
    if "activation_checkpointing" in settings:
        model.transformer.recompute = checkpoint_in_graph if compiled else deepspeed.checkpointing.checkpoint
        model.transformer.recomputed = settings["activation_checkpointing"].get("number_checkpoints")
    if compiled:
        _check_compilable(settings)
        model.compile_losses(compiled == "max", core_lengths)
    _leave_muon_uncompiled(settings)
    with complaints(everything=False), deepspeed_log.prints_logged():
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=settings)
    handle_gradients_as_a_whole(engine.optimizer)
    clear_padding(engine)
    return engine


def in_aligned_order(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Parameters in an order in which every one is aligned where DeepSpeed puts them one after another.

    Under ZeRO-1 and ZeRO-2 they are parts of one buffer. Behind one of 1 or 2 numbers the others would lie at odd
    addresses. Matrix products and layer norms have slow kernels for those: a step took twice as long (docs/log.md).
    """
    # The more often 2 divides a length, the earlier: each offset is then a multiple of what divides the next length.
    return sorted(parameters, key=lambda each: -min(each.numel() & -each.numel(), _ALIGNED))


def _leave_muon_uncompiled(settings: dict[str, Any]) -> None:
    """Import DeepSpeed's Muon without torch's compiler, if this run has another optimiser.

    Every engine under ZeRO imports Muon, to see whether its optimiser is that one. Functions in it are compiled, for
    which torch loads its compiler: more than a second of the start.
    """
    if settings.get("optimizer", {}).get("type", "").lower() == "muon":
        return
    compile_of_deepspeed = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        with suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_of_deepspeed


def _check_compilable(settings: dict[str, Any]) -> None:
    """Raise :class:`UserError` for settings of DeepSpeed that compiled code cannot follow."""
    if settings.get("zero_optimization", {}).get("stage", 0) == 3:
        raise UserError(
            "embrag.train.compile: ZeRO stage 3 fetches parameters while layers run, which cannot be compiled; "
            "use zero_optimization.stage 1 or 2, or set embrag.train.compile to false"
        )
    chosen = settings.get("activation_checkpointing", {})
    for key in ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization"):
        if chosen.get(key):
            raise UserError(
                f"embrag.train.compile: activation_checkpointing.{key} cannot be compiled; "
                f"set it, or embrag.train.compile, to false"
            )


def _on_cpu() -> bool:
    return get_accelerator().device_name() == "cpu"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
