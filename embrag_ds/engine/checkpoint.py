"""What survives a run: DeepSpeed checkpoints with the full state, and the exported model.

An *export* is one safetensors file: the network's weights in fp32, the snapshot of the embedding layer that
encodes reference panels (encodings ``fixed`` and ``refresh``, in training's precision), and our half of the
configuration. It is all that imputation needs.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from embrag_ds.config import EmbragConfig, parse_embrag
from embrag_ds.engine.initialize import World
from embrag_ds.engine.masters import gathered_state
from embrag_ds.engine.reference import Reference
from embrag_ds.errors import UserError
from embrag_ds.model.imputer import ModelConfig

EXPORT_FORMAT = 2
PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained" / "model.safetensors"
"""The model that comes with the package; how it was trained is in docs/results.md."""
_HEADER = "embrag_ds"
_SNAPSHOT = "snapshot."
_AGREED = "agreed.json"
_WEIGHTLESS: dict[str, Any] = {"dropout": 0.0, "good_turing": False}
_SPEED_ONLY = ("backend", "prefetch", "device_budget_gb", "dense_budget_gb")


@dataclass
class TrainState:
    """All that must survive a restart beside weights, optimiser and scheduler.

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
    world: World,
) -> None:
    """Save under ``directory/step<N>`` (collective) and drop all but the newest ``keep``."""
    client = {
        "state": asdict(state),
        "reference": reference.state_dict(state.step),
        "config": asdict(config),
        "batches": _batches(engine, world),
    }
    if world.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        agreed = {"config": client["config"], "batches": client["batches"]}
        (directory / _AGREED).write_text(json.dumps(agreed), encoding="utf-8")
    engine.save_checkpoint(str(directory), tag=f"step{state.step}", client_state=client)
    if world.is_main:
        steps = sorted(int(path.name[4:]) for path in directory.glob("step*") if path.name[4:].isdigit())
        for step in steps[:-keep]:
            shutil.rmtree(directory / f"step{step}")
    world.barrier()


def load_checkpoint(
    directory: Path,
    engine: deepspeed.DeepSpeedEngine,
    reference: Reference,
    config: EmbragConfig,
    world: World,
) -> TrainState:
    """Restore the newest checkpoint (collective); settings that change the sequence of batches must agree."""
    if not (directory / "latest").exists():
        raise UserError(f"{directory}: no checkpoint to resume from; start without --resume")
    # Before the weights: they would not fit another network.
    agreed = json.loads((directory / _AGREED).read_text(encoding="utf-8"))
    _check_compatible(agreed, config, _batches(engine, world), directory)
    _, client = engine.load_checkpoint(str(directory))
    reference.load_state_dict(client["reference"])
    return TrainState(**client["state"])


def _batches(engine: deepspeed.DeepSpeedEngine, world: World) -> dict[str, int]:
    return {
        "ranks": world.ranks,
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
    now, then = (_deciding(each) for each in (asdict(config), client["config"]))
    for section in ("seed", "data", "masking", "retrieval", "model", "loss"):
        if json.dumps(now[section]) != json.dumps(then[section]):
            raise UserError(
                f"{directory}: embrag.{section} differs from the checkpoint's, so the run would not continue; "
                "restore it, or start a new run folder"
            )


def _deciding(config: dict[str, Any]) -> dict[str, Any]:
    """The settings without those of retrieval that say how fast something is done, not what."""
    retrieval = {name: value for name, value in config["retrieval"].items() if name not in _SPEED_ONLY}
    refresh = {name: value for name, value in retrieval["refresh"].items() if name != "asynchronous"}
    return {**config, "retrieval": {**retrieval, "refresh": refresh}}


def export_model(
    path: Path,
    engine: deepspeed.DeepSpeedEngine,
    snapshot: dict[str, Tensor] | None,
    config: EmbragConfig,
    world: World,
) -> None:
    """Write the export (collective); it appears complete or not at all."""
    tensors = gathered_state(engine)
    if snapshot is not None:
        tensors |= {_SNAPSHOT + name: value.contiguous() for name, value in snapshot.items()}
    if world.is_main:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.touch()  # with the user's usual permissions, which save_file would not give
        mode = temporary.stat().st_mode
        # One entry: safetensors writes several in random order, and equal models should be equal files.
        header = {"format": EXPORT_FORMAT, "embrag": asdict(config)}
        save_file(tensors, temporary, {_HEADER: json.dumps(header)})
        temporary.chmod(mode)
        temporary.replace(path)


@dataclass(frozen=True)
class ExportedModel:
    """An export read back: weights in fp32; ``snapshot`` is None when the model encodes references live."""

    config: EmbragConfig
    weights: dict[str, Tensor]
    snapshot: dict[str, Tensor] | None


def read_export(path: Path) -> ExportedModel:
    """Read what :func:`export_model` wrote."""
    try:
        with safe_open(path, framework="pt") as stored:
            header = json.loads((stored.metadata() or {}).get(_HEADER, "{}"))
            tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{path}: cannot read the model: {fault}; name a model.safetensors of a run folder") from fault
    if header.get("format") != EXPORT_FORMAT:
        raise UserError(f"{path}: not a model written by launch/train.py (or by another version of it)")
    config = parse_embrag(header["embrag"], str(path))
    snapshot = {name.removeprefix(_SNAPSHOT): value for name, value in tensors.items() if name.startswith(_SNAPSHOT)}
    weights = {name: value for name, value in tensors.items() if not name.startswith(_SNAPSHOT)}
    return ExportedModel(config, weights, snapshot or None)


def start_from(model: nn.Module, settings: ModelConfig, export: ExportedModel, path: Path) -> None:
    """Give ``model`` an export's weights; its network must be the same, but for what has no weights."""
    if replace(export.config.model, **_WEIGHTLESS) != replace(settings, **_WEIGHTLESS):
        raise UserError(f"--init-from {path}: its network is {export.config.model}; set embrag.model to that")
    model.load_state_dict(export.weights)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the step's random numbers (dropout) a function of (seed, step, rank)."""
    mixed = np.random.SeedSequence(seed, spawn_key=(step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))
