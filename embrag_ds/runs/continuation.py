"""What may change when a run is resumed: settings that decide its results must stay, others are taken and recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embrag_ds.config import PATHS
from embrag_ds.errors import UserError
from embrag_ds.runs.identity import differing_inputs
from embrag_ds.settings import as_json

Changes = dict[str, list[Any]]
"""Settings that a resumed run changes: dotted key -> its value before and now."""

_DECIDING = (
    "embrag.seed",
    "embrag.data",
    "embrag.masking",
    "embrag.augmentation",
    "embrag.retrieval",
    "embrag.model",
    "embrag.loss",
    "embrag.validation",
    "embrag.train.frozen",
    "train_micro_batch_size_per_gpu",
    "optimizer",
    "scheduler.type",
)
"""Settings, and sections of them, without which the run would be another one."""
_FREE = (
    *(f"embrag.{each}" for each in PATHS),  # of inputs, the contents are compared instead
    "embrag.retrieval.prefetch",
    "embrag.retrieval.device_budget_gb",
    "embrag.retrieval.dense_budget_gb",
    "embrag.retrieval.refresh.asynchronous",
    "embrag.retrieval.backend",  # that of the run stays, see `backend_of`
    "optimizer.params.lr",
    "optimizer.params.torch_adam",
    "optimizer.params.fused",
    "optimizer.params.foreach",
)
"""Exceptions from those: settings of speed and of places, and the learning rate."""
_TORCHS_SCHEDULER = "scheduler.params"
"""Settings that a scheduler of torch's takes from the checkpoint whatever the configuration says."""


def refuse_other_inputs(folder: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise :class:`UserError` if the run was trained on other inputs than those given now."""
    if differing := differing_inputs(then, now):
        raise UserError(
            f"{folder}: the run was trained on other inputs; what differs: {'; '.join(differing)}; give those of the "
            "run, or start a new run folder (--init-from takes over its model)"
        )


def changed_settings(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any], own_schedule: bool) -> Changes:
    """Settings that differ between two configurations (trees as in ``config.json``) and may do so.

    ``own_schedule`` says that the scheduler is DeepSpeed's, which follows the settings; torch's restore their own.
    Raises :class:`UserError` for a setting that decides the run's results.
    """
    before, after = dict(_leaves(then)), dict(_leaves(now))
    changes: Changes = {}
    for key in sorted(before.keys() | after.keys()):
        pair = [before.get(key), after.get(key)]
        if json.dumps(pair[0]) == json.dumps(pair[1]):
            continue
        if _decides(key, own_schedule):
            raise UserError(
                f"{folder}: {key} differs from the checkpoint's ({as_json(pair[1])} for {as_json(pair[0])}), so the "
                "run would not continue; restore it, or start a new run folder"
            )
        changes[key] = pair
    return changes


def backend_of(folder: Path, of_run: str, wanted: str) -> str:
    """The search backend that a resumed run goes on with; raises :class:`UserError` if another one is ``wanted``."""
    if wanted not in ("auto", of_run):
        raise UserError(
            f"{folder}: embrag.retrieval.backend differs from what the run has searched with ({wanted} for {of_run}), "
            'and backends differ in ties; set it to that or to "auto", or start a new run folder'
        )
    return of_run


def _decides(key: str, own_schedule: bool) -> bool:
    if _within(key, _FREE):
        return False
    return _within(key, _DECIDING) or (not own_schedule and _within(key, (_TORCHS_SCHEDULER,)))


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a tree with their values; lists and empty sections are values."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
