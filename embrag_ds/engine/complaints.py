"""Conversion of DeepSpeed's exceptions about settings into :class:`UserError`; bugs keep their exceptions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

from deepspeed.runtime.config import DeepSpeedConfigError
from pydantic import ValidationError

from embrag_ds.errors import UserError

# Functions of DeepSpeed's engine that only read settings. They refuse values that its parser accepts.
_READERS = {
    ("deepspeed.runtime.engine", "_do_sanity_check"),
    ("deepspeed.runtime.engine", "_configure_basic_optimizer"),
    ("deepspeed.runtime.engine", "_do_optimizer_sanity_check"),
    ("deepspeed.runtime.engine", "_scheduler_from_config"),
    ("deepspeed.runtime.engine", "get_data_types"),
    ("deepspeed.runtime.zero.partition_parameters", "_validate_remote_device"),
    ("deepspeed.runtime.zero.stage3", "_configure_tensor_swapping"),
    ("deepspeed.utils.logging", "set_log_level_from_string"),
}
# Their constructors first refuse settings that do not go together, and then partition the parameters.
_OPTIMIZERS = (
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.bf16_optimizer",
)
_THEIRS = {"deepspeed", "torch", *sys.stdlib_module_names}


@contextmanager
def complaints(everything: bool) -> Iterator[None]:
    """Raise DeepSpeed's exceptions about settings inside ``with`` as a one-line :class:`UserError`; others pass.

    ``everything`` means that the block only reads settings, so that every exception is about them. Otherwise
    :func:`about_settings` decides. DeepSpeed's exception is the cause of the :class:`UserError`.
    """
    try:
        yield
    except (DeepSpeedConfigError, ValidationError, AssertionError, NotImplementedError, ValueError, TypeError) as fault:
        if not everything and not about_settings(fault):
            raise
        raise UserError(f"DeepSpeed refuses its settings: {' '.join(str(fault).split())}") from fault


def about_settings(fault: Exception) -> bool:
    """Whether an exception that was raised while DeepSpeed built its engine is about settings.

    Type and message do not tell: an assertion may be about a setting or about a parameter. So the place decides.
    Settings are at fault

    - anywhere below a function that reads settings, unless code other than DeepSpeed's, torch's or Python's was called;
    - in the constructor of one of DeepSpeed's optimizers itself, with a message. Those without are about its own state.
    """
    if isinstance(fault, (DeepSpeedConfigError, ValidationError)):
        return True
    frames = [frame for frame, _ in walk_tb(fault.__traceback__)]
    places = [(str(frame.f_globals.get("__name__")), frame.f_code.co_name) for frame in frames]
    for number, place in enumerate(places):
        if place in _READERS:
            return all(module.partition(".")[0] in _THEIRS for module, _ in places[number:])
    module, function = places[-1]
    return module in _OPTIMIZERS and function == "__init__" and bool(str(fault))
