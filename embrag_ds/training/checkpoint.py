"""Checkpoints: DeepSpeed's, with the full state of a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import PickleError
from typing import Any

import deepspeed
import torch

from embrag_ds.config import EmbragConfig
from embrag_ds.errors import UserError
from embrag_ds.files import make_folder, write_json
from embrag_ds.retrieval.reference import Reference
from embrag_ds.seeds import Purpose, torch_seed
from embrag_ds.training.deepspeed_log import prints_logged
from embrag_ds.training.distributed import DistributedContext

_AGREED = "agreed.json"
_DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    PickleError,
    AssertionError,
)
"""What torch, DeepSpeed and pickle raise for a file that is not what they wrote."""
_SHOWN = 200
_SPEED_ONLY = ("prefetch", "device_budget_gb", "dense_budget_gb")


@dataclass
class TrainState:
    """Training state to be restored besides weights, optimiser and scheduler.

    Sampler position, masks, curriculum and random numbers are functions of ``step``.
    """

    step: int = 0
    best_score: float = float("-inf")
    validations_since_best: int = 0


def save_checkpoint(
    directory: Path,
    engine: deepspeed.DeepSpeedEngine,
    state: TrainState,
    reference: Reference,
    config: EmbragConfig,
    keep: int,
    distributed: DistributedContext,
) -> None:
    """Save a checkpoint in ``directory/step<N>`` and delete all but the newest ``keep`` (collective)."""
    client = {
        "state": asdict(state),
        "reference": reference.state_dict(state.step),
        "config": asdict(config),
        "batches": _batches(engine, distributed),
        "backend": reference.backend,
    }
    if distributed.is_main:
        make_folder(directory)
        write_json(directory / _AGREED, {name: client[name] for name in ("config", "batches", "backend")})
    engine.save_checkpoint(str(directory), tag=f"step{state.step}", client_state=client)
    if distributed.is_main:
        steps = sorted(int(path.name[4:]) for path in directory.glob("step*") if path.name[4:].isdigit())
        for step in steps[:-keep]:
            shutil.rmtree(directory / f"step{step}")
    distributed.barrier()


def load_checkpoint(
    directory: Path,
    engine: deepspeed.DeepSpeedEngine,
    reference: Reference,
    config: EmbragConfig,
    distributed: DistributedContext,
) -> TrainState:
    """Restore the newest checkpoint, and the search backend that was chosen at the run's start (collective).

    Raises :class:`UserError` if there is none, or if settings that decide the run's results differ from the
    checkpoint's.
    """
    tag = _newest(directory)
    # Before the weights: they would not fit another network.
    try:
        agreed = json.loads((directory / _AGREED).read_text(encoding="utf-8"))
        _check_compatible(agreed, config, _batches(engine, distributed), directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise UserError(
            f"{directory / _AGREED}: damaged, or written by another version of embrag_ds; start a new run folder"
        ) from fault
    reference.backend = agreed["backend"]
    try:
        with prints_logged():
            _, client = engine.load_checkpoint(str(directory), tag=tag)
        reference.load_state_dict(client["reference"])
        return TrainState(**client["state"])
    except torch.cuda.OutOfMemoryError:
        raise
    except _DAMAGED as fault:
        reason = " ".join(str(fault).split())[:_SHOWN] or type(fault).__name__
        message = f"{directory / tag}: cannot read the checkpoint ({reason}); {_way_out(directory, tag)}"
        raise UserError(message) from fault


def _newest(directory: Path) -> str:
    """Name of the newest checkpoint, which the file ``latest`` holds; raises :class:`UserError` if it is not there."""
    latest = directory / "latest"
    if not latest.exists():
        raise UserError(f"{directory}: no checkpoint to resume from; start without --resume")
    try:
        tag = latest.read_text(encoding="utf-8").strip()
        if tag in ("", "..") or Path(tag).name != tag or not (directory / tag).is_dir():
            raise ValueError(f"it names {tag[:_SHOWN]!r}, which is not there")
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or fault  # not the name that the file holds, which may be long
        raise UserError(f"{latest}: cannot find the newest checkpoint ({reason}); {_way_out(directory, '')}") from fault
    return tag


def _way_out(directory: Path, damaged: str) -> str:
    """Advice for a checkpoint that cannot be read: the newest of the others, or a new run."""
    others = sorted((_step(path) for path in directory.glob("step*")), reverse=True)
    names = [f"step{step}" for step in others if step >= 0 and f"step{step}" != damaged]
    again = f"write {names[0]} into {directory / 'latest'} to go on from that, or " if names else ""
    return f"{again}start a new run folder"


def _step(path: Path) -> int:
    return int(path.name[4:]) if path.name[4:].isascii() and path.name[4:].isdigit() else -1


def _batches(engine: deepspeed.DeepSpeedEngine, distributed: DistributedContext) -> dict[str, int]:
    return {
        "ranks": distributed.ranks,
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
    }


def _check_compatible(client: dict[str, Any], config: EmbragConfig, batches: dict[str, int], directory: Path) -> None:
    for name, now_is in batches.items():
        if client["batches"][name] != now_is:
            raise UserError(
                f"{directory}: {name} differs from the checkpoint's ({now_is} for {client['batches'][name]}), so the "
                "run would not continue; restore it, or start a new run folder"
            )
    if "backend" not in client:
        raise UserError(f"{directory}: written by another version of embrag_ds; start a new run folder")
    backend = config.retrieval.backend
    if backend not in ("auto", client["backend"]):
        raise UserError(
            f"{directory}: embrag.retrieval.backend differs from what the run has searched with ({backend} for "
            f'{client["backend"]}), and backends differ in ties; set it to that or to "auto", or start a new run folder'
        )
    now, then = (_deciding(each) for each in (asdict(config), client["config"]))
    for section in ("seed", "data", "masking", "retrieval", "model", "loss"):
        if json.dumps(now[section]) != json.dumps(then[section]):
            raise UserError(
                f"{directory}: embrag.{section} differs from the checkpoint's, so the run would not continue; "
                "restore it, or start a new run folder"
            )


def _deciding(config: dict[str, Any]) -> dict[str, Any]:
    """Settings that decide a run's results: those of retrieval that only affect speed, and the cache, are left out.

    So is the setting of the search backend, because ``auto`` may have chosen the one that is named now.
    """
    left_out = (*_SPEED_ONLY, "backend")
    retrieval = {name: value for name, value in config["retrieval"].items() if name not in left_out}
    refresh = {name: value for name, value in retrieval["refresh"].items() if name != "asynchronous"}
    data = {name: value for name, value in config["data"].items() if name != "cache_dir"}
    return {**config, "data": data, "retrieval": {**retrieval, "refresh": refresh}}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's random numbers (dropout) of a step by (seed, step, rank)."""
    torch.manual_seed(torch_seed(Purpose.DROPOUT, seed, step, rank))
