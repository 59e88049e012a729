"""Checks of settings against one another: learning-rate schedule, number of steps, and what is due in a run.

Faults that no run could want are errors. Settings with which a run may go on, as a short trial does, are warnings of
rank 0.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from deepspeed.utils import logger as deepspeed_logger

from embrag_ds.config import EmbragConfig, RunConfig
from embrag_ds.engine.complaints import complaints
from embrag_ds.errors import UserError
from embrag_ds.logs import rank_of_process
from embrag_ds.settings import as_json

logger = logging.getLogger(__name__)

_OWN_RATES = {
    "CyclicLR": "max_lr",
    "LRRangeTest": "lr_range_test_min_lr",
    "OneCycle": "cycle_max_lr",
    "OneCycleLR": "max_lr",
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
}
"""Schedules that set learning rates of their own, and the parameter with the rate that they reach."""
_NOT_STEPPED_SO = {
    "LBFGS": "computes the loss several times a step",
    "SparseAdam": "takes sparse gradients only",
    "ReduceLROnPlateau": "needs a score at every step",
}
"""torch's classes that DeepSpeed's engine cannot step, and why."""
_EXAMPLE_RATE = 0.001


def check_schedule(config: RunConfig, scheduler: type | None, source: str) -> None:
    """Raise :class:`UserError` for a learning-rate schedule that cannot be meant, and warn of one that a run may go on.

    ``scheduler`` is the class of the schedule, None without one; ``source`` names the configuration.
    """
    for section in ("optimizer", "scheduler"):
        kind = config.deepspeed.get(section, {}).get("type")
        if kind in _NOT_STEPPED_SO:
            raise UserError(f"{source}: {section}.type {kind} {_NOT_STEPPED_SO[kind]}; choose another")
    warnings = list(_due_in_a_run(config.embrag))
    if scheduler is not None:
        given = config.deepspeed["scheduler"].get("params") or {}
        params = {**_defaults(scheduler, source, given), **given}
        _check_warm_up(params, given, source)
        _check_rate(config.deepspeed, scheduler, params, given, source)
        schedule = _built(config.deepspeed, scheduler, given, source)
        warnings += _beyond(config.embrag, schedule, params, source)
    if rank_of_process() == 0:
        for warning in warnings:
            logger.warning(f"{source}: {warning}")


def _defaults(scheduler: type, source: str, given: dict[str, Any]) -> dict[str, Any]:
    """Defaults of a schedule's parameters; raises :class:`UserError` if one without a default is not given."""
    parameters = list(inspect.signature(scheduler).parameters.values())[1:]  # the first is the optimiser
    for each in parameters:
        named = each.kind is not inspect.Parameter.VAR_KEYWORD
        if each.default is inspect.Parameter.empty and named and each.name not in given:
            raise UserError(
                f"{source}: scheduler.params.{each.name} is missing, and {scheduler.__name__} needs it; set it, or "
                "leave the scheduler out"
            )
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def _check_warm_up(params: dict[str, Any], given: dict[str, Any], source: str) -> None:
    """Raise :class:`UserError` if the schedule ends before its warm-up does."""
    total, warm_up = params.get("total_num_steps"), params.get("warmup_num_steps")
    if total is not None and warm_up is not None and warm_up >= total:
        shown = f"{warm_up}" if "warmup_num_steps" in given else f"{warm_up}, DeepSpeed's default"
        raise UserError(
            f"{source}: scheduler.params.warmup_num_steps ({shown}) must be less than total_num_steps ({total}): the "
            f"schedule would end before its warm-up; set it to {max(1, total // 20)}, for example"
        )


def _check_rate(
    deepspeed: dict[str, Any], scheduler: type, params: dict[str, Any], given: dict[str, Any], source: str
) -> None:
    """Raise :class:`UserError` if the optimiser's learning rate is set and the schedule puts another in its place."""
    rate = (deepspeed["optimizer"].get("params") or {}).get("lr")
    name = _OWN_RATES.get(scheduler.__name__)
    reached = params.get(name) if name is not None else None
    if rate is None or reached is None or reached == rate:
        return
    shown = as_json(reached) if name in given else f"{as_json(reached)}, DeepSpeed's default"
    raise UserError(
        f"{source}: optimizer.params.lr ({as_json(rate)}) has no effect, because {scheduler.__name__} takes its "
        f"learning rate from scheduler.params.{name} ({shown}); set both alike, or leave optimizer.params.lr out"
    )


def _built(deepspeed: dict[str, Any], scheduler: type, given: dict[str, Any], source: str) -> Any:
    """The schedule, on an optimiser of one number; raises :class:`UserError` for parameters that its class refuses."""
    rate = (deepspeed["optimizer"].get("params") or {}).get("lr", _EXAMPLE_RATE)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=rate)
    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.CRITICAL)  # the engine builds the schedule again, and its remarks count
    try:
        with complaints(everything=True):
            return scheduler(optimizer, **given)
    except UserError as fault:
        raise UserError(f"{source}: scheduler.params: {fault}") from fault
    finally:
        deepspeed_logger.setLevel(level)


def _due_in_a_run(config: EmbragConfig) -> Iterator[str]:
    """Warnings of what falls due after the run's last step."""
    steps = config.train.max_steps
    if config.train.eval_every > steps:
        yield (
            f"embrag.train.eval_every ({config.train.eval_every}) exceeds embrag.train.max_steps ({steps}), so the run "
            "is never validated, and exports the weights of its last step; lower it to be validated"
        )
    masking = config.masking
    low, high = masking.random_rate
    random = any(masking.policies.get(name) for name in ("random", "frequency_guided"))
    if random and low < high and masking.curriculum_steps > steps:
        reached = low + (high - low) * steps / masking.curriculum_steps
        yield (
            f"embrag.masking.curriculum_steps ({masking.curriculum_steps}) exceeds embrag.train.max_steps ({steps}): "
            f"masks end at a rate of {reached:.2f} instead of {high:g}; lower it to reach that"
        )


def _beyond(config: EmbragConfig, schedule: Any, params: dict[str, Any], source: str) -> Iterator[str]:
    """Warnings of a schedule that is longer or shorter than the run; raises :class:`UserError` if it ends the run."""
    steps = config.train.max_steps
    warm_up = params.get("warmup_num_steps")
    if warm_up is not None and warm_up >= steps:
        share = _ratio(schedule, max(0, steps - 2))  # the rate of a step is set after the one before
        yield (
            f"scheduler.params.warmup_num_steps ({warm_up}) is not below embrag.train.max_steps ({steps}): the "
            f"learning rate rises through the whole run, to {share:.1%} of its highest; lower it to reach that"
        )
    total = params.get("total_num_steps")
    if total is not None and steps > total:
        yield (
            f"embrag.train.max_steps ({steps}) lies beyond scheduler.params.total_num_steps ({total}): the last "
            f"{steps - total} steps have {_ratio(schedule, total):.2%} of the highest learning rate; set both alike"
        )
    if isinstance(schedule, torch.optim.lr_scheduler.OneCycleLR) and steps > schedule.total_steps:
        raise UserError(
            f"{source}: embrag.train.max_steps ({steps}) exceeds the {schedule.total_steps} steps of the scheduler "
            "OneCycleLR, which stops there with an error; set scheduler.params.total_steps to it"
        )
    if isinstance(schedule, torch.optim.lr_scheduler.CosineAnnealingLR) and steps > schedule.T_max:
        yield (
            f"embrag.train.max_steps ({steps}) lies beyond scheduler.params.T_max ({schedule.T_max}): the learning "
            "rate of CosineAnnealingLR rises again from there; set both alike"
        )


def _ratio(schedule: Any, step: int) -> float:
    """Learning rate of one of DeepSpeed's schedules at its ``step``, from 0 on, as a share of its highest."""
    schedule.last_batch_iteration = step
    if isinstance(schedule, lr_schedules.WarmupCosineLR):
        return float(schedule.get_lr_ratio())
    highest = max(*schedule.max_lrs, 1e-300)
    return float(schedule.get_lr()[0]) / highest
