"""Types and ranges of the values of DeepSpeed's half that DeepSpeed takes as they are.

DeepSpeed checks the sections that have a pydantic model. It hands ``optimizer.params`` and ``scheduler.params`` on to
their classes, which notice a wrong value after minutes, when the engine is built, or never.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from embrag_ds.errors import UserError
from embrag_ds.settings import as_json


class _Rule(NamedTuple):
    """A condition on a value, and the condition in words."""

    holds: Callable[[Any], bool]
    words: str


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_rates(value: Any, positive: bool) -> bool:
    """Whether a value is a learning rate, or a list with one for each group of parameters."""
    each = value if isinstance(value, list) else [value]
    return bool(each) and all(_is_number(rate) and (rate > 0 or (rate == 0 and not positive)) for rate in each)


_FLAG = _Rule(lambda value: isinstance(value, bool), "true or false")
_STEPS = _Rule(lambda value: _is_count(value, 1), "a whole number of steps, at least 1")
_NOT_NEGATIVE = _Rule(lambda value: _is_number(value) and value >= 0, "a number of at least 0")
_POSITIVE = _Rule(lambda value: _is_number(value) and value > 0, "a number above 0")
_SHARE = _Rule(lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
_BELOW_1 = _Rule(lambda value: _is_number(value) and 0 <= value < 1, "a number of at least 0 and below 1")
_RATE = _Rule(lambda value: _are_rates(value, positive=True), "a learning rate above 0, such as 0.001")
_LOW_RATE = _Rule(lambda value: _are_rates(value, positive=False), "a learning rate of at least 0, such as 0.0001")
_BETAS = _Rule(
    lambda value: isinstance(value, list) and len(value) == 2 and all(_BELOW_1.holds(each) for each in value),
    "two numbers of at least 0 and below 1, such as [0.9, 0.95]",
)
_GROUP_RATE = _Rule(_POSITIVE.holds, "a learning rate above 0, such as 0.001")

_OPTIMIZER = {
    **dict.fromkeys(("lr", "muon_lr", "adam_lr"), _GROUP_RATE),
    **dict.fromkeys(("weight_decay", "lr_decay", "max_coeff", "min_coeff"), _NOT_NEGATIVE),
    "betas": _BETAS,
    "eps": _POSITIVE,
    "momentum": _BELOW_1,
    **dict.fromkeys(
        (
            "adam_w_mode",
            "amsgrad",
            "bias_correction",
            "capturable",
            "decoupled_weight_decay",
            "differentiable",
            "foreach",
            "fp32_optimizer_states",
            "fused",
            "maximize",
            "nesterov",
            "torch_adam",
        ),
        _FLAG,
    ),
}
_SCHEDULER = {
    **dict.fromkeys(("total_num_steps", "warmup_num_steps", "cycle_first_step_size", "cycle_second_step_size"), _STEPS),
    **dict.fromkeys(("lr_range_test_step_size", "step_size", "T_max", "T_0", "total_steps", "total_iters"), _STEPS),
    **dict.fromkeys(("cos_min_ratio", "warmup_min_ratio"), _SHARE),
    **dict.fromkeys(("warmup_max_lr", "cycle_max_lr", "max_lr"), _RATE),
    **dict.fromkeys(("warmup_min_lr", "cycle_min_lr", "lr_range_test_min_lr", "base_lr", "eta_min"), _LOW_RATE),
    **dict.fromkeys(("decay_lr_rate", "gamma", "lr_range_test_step_rate"), _NOT_NEGATIVE),
    **dict.fromkeys(("lr_range_test_staircase", "cycle_momentum"), _FLAG),
    "warmup_type": _Rule(lambda value: value in ("linear", "log"), '"linear" or "log"'),
}
_TOP_LEVEL = {
    "gradient_clipping": _NOT_NEGATIVE,
    "gradient_predivide_factor": _POSITIVE,
    "steps_per_print": _Rule(lambda value: _is_count(value, 1), "a whole number of at least 1"),
    "train_batch_size": _Rule(lambda value: _is_count(value, 1), "a whole number of samples, at least 1"),
    **dict.fromkeys(
        (
            "disable_python_gc",
            "dump_state",
            "memory_breakdown",
            "prescale_gradients",
            "wall_clock_breakdown",
            "zero_allow_untested_optimizer",
            "zero_force_ds_cpu_optimizer",
        ),
        _FLAG,
    ),
}
_CHECKPOINTING = {
    "number_checkpoints": _Rule(lambda value: _is_count(value, 1), "a whole number of blocks, at least 1"),
    **dict.fromkeys(
        (
            "contiguous_memory_optimization",
            "cpu_checkpointing",
            "partition_activations",
            "profile",
            "synchronize_checkpoint_boundary",
        ),
        _FLAG,
    ),
}
_RULES = {
    "": _TOP_LEVEL,
    "activation_checkpointing": _CHECKPOINTING,
    "flops_profiler": {"enabled": _FLAG, "detailed": _FLAG, "profile_step": _STEPS},
    "optimizer.params": _OPTIMIZER,
    "scheduler.params": _SCHEDULER,
    "torch_autocast": {"enabled": _FLAG},
}
"""Section -> key -> rule. A key that is not listed is left to its class."""
_NULL_IS_DEFAULT = frozenset({"number_checkpoints", "foreach", "fused", "warmup_max_lr", "cycle_second_step_size"})


def check_values(tree: dict[str, Any], source: str) -> None:
    """Raise :class:`UserError` for a value of ``tree``, DeepSpeed's half, with a wrong type or out of range.

    ``source`` names the file. The tree's keys and sections have been checked before.
    """
    for section, rules in _RULES.items():
        node: Any = tree
        for name in filter(None, section.split(".")):
            node = node.get(name) or {}
        for key, rule in rules.items():
            if key not in node or (node[key] is None and key in _NULL_IS_DEFAULT) or rule.holds(node[key]):
                continue
            where = f"{section}.{key}" if section else key
            raise UserError(f"{source}: {where} must be {rule.words}, not {as_json(node[key])}")
