"""Checkpoints of a run: DeepSpeed's files, with the state of the run, what it trained on and under which settings."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

from embrag_ds.config import RunConfig
from embrag_ds.engine.deepspeed_log import prints_logged
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.engine.saving import save_sealed
from embrag_ds.engine.universal import Layout, convert, layout_of, load_universal, needs_conversion, plain_name, refusal
from embrag_ds.engine.unpickling import DAMAGED, tensors_only
from embrag_ds.errors import UserError
from embrag_ds.retrieval.reference import Reference
from embrag_ds.runs import alive
from embrag_ds.runs.checkpoints import TEMPORARY, Checkpoint, newest_whole, set_aside
from embrag_ds.runs.continuation import Changes, backend_of, changed_settings, refuse_other_inputs
from embrag_ds.seeds import Purpose, torch_seed

logger = logging.getLogger(__name__)

_SHOWN = 200


@dataclass
class TrainState:
    """Training state to be restored besides weights, optimiser and scheduler.

    Sampler position, masks, curriculum and random numbers are functions of ``step``. ``validated`` is the step of the
    last validation, ``skipped_in_a_row`` counts the last optimiser steps that were skipped, and ``left_out`` are the
    numbers of micro-batches that are passed over.
    """

    step: int = 0
    best_score: float = -math.inf
    validations_since_best: int = 0
    validated: int = 0
    skipped_in_a_row: int = 0
    left_out: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The state for a manifest; JSON has no infinity."""
        return {**asdict(self), "best_score": self.best_score if math.isfinite(self.best_score) else None}

    @staticmethod
    def from_json(values: dict[str, Any]) -> TrainState:
        """The state that :meth:`as_json` wrote."""
        best = -math.inf if values["best_score"] is None else values["best_score"]
        return TrainState(**{**values, "best_score": best, "left_out": tuple(values["left_out"])})


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from, after all checks that need no network."""

    checkpoint: Checkpoint
    state: TrainState
    changes: Changes
    """Settings that the resumed run changes."""
    backend: str
    """Search backend of the run."""
    converted: bool
    """Whether it must be converted, because the run goes on with other ranks, another ZeRO stage or precision."""


class Checkpoints:
    """The checkpoints of a run in ``directory``.

    ``config`` are its effective settings, and ``identity`` that of its inputs
    (:func:`embrag_ds.runs.identity.identity_of`).
    """

    def __init__(
        self,
        directory: Path,
        config: RunConfig,
        identity: dict[str, str],
        distributed: DistributedContext,
    ):
        self._directory = directory
        self._config = config
        self._identity = identity
        self._layout = layout_of(config.deepspeed, distributed.ranks)
        self._distributed = distributed
        self.saved: int | None = None
        """Step of the newest checkpoint."""

    def find(self) -> Found:
        """The newest whole checkpoint, if this run may go on from it (collective).

        Raises :class:`UserError` if there is none, if the run was trained on other inputs, or if settings that decide
        its results differ.
        """
        found = self._distributed.on_main(self._find)
        self.saved = found.checkpoint.step
        return found

    def _find(self) -> Found:
        checkpoint = newest_whole(self._directory)
        set_aside(self._directory, checkpoint.step)
        facts = checkpoint.facts
        try:
            then = Layout(**facts["layout"])
            refuse_other_inputs(self._directory, facts["identity"], self._identity)
            if reason := refusal(then, self._layout):
                raise UserError(f"{self._directory}: {reason}, or start a new run folder")
            kind = self._config.deepspeed.get("scheduler", {}).get("type")
            own = kind is None or kind in VALID_LR_SCHEDULES
            changes = changed_settings(self._directory, facts["config"], self._config.as_dict(), own)
            backend = backend_of(self._directory, facts["backend"], self._config.embrag.retrieval.backend)
            converted = needs_conversion(then, self._layout)
            found = Found(checkpoint, TrainState.from_json(facts["state"]), changes, backend, converted)
        except (KeyError, TypeError, AttributeError) as fault:
            raise UserError(
                f"{checkpoint.folder}: written by another version of embrag_ds; start a new run folder"
            ) from fault
        if then.ranks != self._layout.ranks:
            found.changes["ranks"] = [then.ranks, self._layout.ranks]
        for key, (before, value) in found.changes.items():
            logger.info("--resume: %s is now %s (was %s)", key, value, before)
        return found

    def load(self, found: Found, engine: deepspeed.DeepSpeedEngine, reference: Reference) -> TrainState:
        """Restore weights, optimiser, scheduler and the reference's generations (collective)."""
        folder = found.checkpoint.folder
        try:
            if found.converted:
                client = self._load_converted(folder, engine)
            else:
                with plain_name(folder) as plain, prints_logged(), tensors_only(_way_out(folder)):
                    _, client = engine.load_checkpoint(str(plain.parent), tag=plain.name)
            reference.load_state_dict(client["reference"])
        except torch.cuda.OutOfMemoryError:
            raise
        except DAMAGED as fault:
            reason = " ".join(str(fault).split())[:_SHOWN] or type(fault).__name__
            raise UserError(f"{folder}: cannot read the checkpoint ({reason}); {_way_out(folder)}") from fault
        _follow_settings(engine, self._config.deepspeed, found.changes)
        return found.state

    def _load_converted(self, folder: Path, engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
        """Convert a checkpoint, load it, and remove what was made for that (collective); returns the client state."""
        made = folder.with_name(f"{TEMPORARY}universal-{folder.name}")
        logger.info("--resume: converting %s for %s", folder.name, self._layout)
        with alive.busy("converting the checkpoint"):
            self._distributed.on_main(lambda: convert(folder, made))
            client = load_universal(engine, made)
        self._distributed.barrier()
        self._distributed.on_main(lambda: shutil.rmtree(made, ignore_errors=True))
        return client

    def save(self, engine: deepspeed.DeepSpeedEngine, state: TrainState, reference: Reference) -> None:
        """Save a checkpoint, and delete those beyond ``train.keep_checkpoints`` (collective).

        Raises as :func:`embrag_ds.engine.saving.save_sealed` does.
        """
        facts = {
            "state": state.as_json(),
            "layout": asdict(self._layout),
            "identity": self._identity,
            "backend": reference.backend,
            "config": self._config.as_dict(),
        }
        client = {"reference": reference.state_dict(state.step)}
        keep = self._config.embrag.train.keep_checkpoints
        save_sealed(self._directory, state.step, engine, client, facts, keep, self._distributed)
        self.saved = state.step


def _way_out(folder: Path) -> str:
    return f"move {folder} away to go on from an earlier checkpoint, or start a new run folder"


def _follow_settings(engine: deepspeed.DeepSpeedEngine, settings: dict[str, Any], changes: Changes) -> None:
    """Put a changed learning rate, or schedule, in force: loading has restored that of the checkpoint."""
    if not any(key.startswith(("optimizer.", "scheduler.")) for key in changes):
        return
    rate = settings["optimizer"].get("params", {}).get("lr")
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)
    elif rate is not None:
        for group in engine.optimizer.param_groups:
            group["lr"] = rate


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's random numbers (dropout) of a step by (seed, step, rank)."""
    torch.manual_seed(torch_seed(Purpose.DROPOUT, seed, step, rank))
