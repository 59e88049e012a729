"""Reading of checkpoints without running what is in them.

A file of ``torch.save`` is a pickle, and a pickle may call any function when it is read. DeepSpeed reads its own files
with ``torch.load(weights_only=False)``, which lets it. Here torch's restricted unpickler is forced on those calls, too:
it makes tensors, plain values and the few types of :data:`ALLOWED`, and refuses everything else before it is made.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import PickleError, UnpicklingError
from traceback import walk_tb
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from embrag_ds.errors import UserError

ALLOWED = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)
"""What DeepSpeed's optimisers of ZeRO stages 1 to 3 save besides tensors and plain values; stage 0 saves no more."""
DAMAGED = (
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
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_FORBIDDEN = (
    re.compile(r"GLOBAL (\S+) was not an allowed global"),
    re.compile(r"GLOBAL (\S+) whose module \S+ is blocked"),
    re.compile(r"with (TorchScript archives) passed"),
    re.compile(r"with (files saved in the legacy .tar format)"),
)
"""How torch names a function or type that is not allowed, and the two formats that it reads by other means."""
_REMARKS = ("'torch.load' received a zip file", "Detected pickle protocol")
_GETATTR = "builtins.getattr"
_SHOWN = 200


@contextmanager
def tensors_only(way_out: str = "start a new run folder") -> Iterator[None]:
    """Let every ``torch.load`` inside ``with`` read tensors, plain values and :data:`ALLOWED` only.

    This holds whatever ``weights_only`` its caller gives. Raises :class:`UserError` for a file that holds anything else
    than that; nothing of it has run. The message names the file, what it holds, and ``way_out``. A file that is no
    pickle at all, or one of instructions that ``torch.save`` does not write, raises :class:`UnpicklingError` with its
    name.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    new = [kind for kind in ALLOWED if kind not in torch.serialization.get_safe_globals()]
    try:
        with torch.serialization.safe_globals([*new, (_member, _GETATTR)]), warnings.catch_warnings():
            for remark in _REMARKS:
                warnings.filterwarnings("ignore", message=remark)
            yield
    except (UnpicklingError, RuntimeError) as fault:
        path = _being_loaded(fault)
        if path is None:
            raise
        reason = str(fault.__context__ or fault)  # torch wraps the unpickler's words into many of its own
        found = next(filter(None, (pattern.search(reason) for pattern in _FORBIDDEN)), None)
        if found is not None:
            raise UserError(
                f"{path}: it holds {found.group(1)[:_SHOWN]}, which may run code when it is read, and is no state "
                f"of a training run; nothing of it was run; {way_out}"
            ) from fault
        if isinstance(fault, UnpicklingError):
            raise UnpicklingError(f"{path.name}: {reason[:_SHOWN]}") from fault
        raise
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _member(kind: object, name: str) -> Any:
    """Stand-in for ``getattr``, by which some versions of Python (3.11.2 is one) name the members of an enum."""
    members: dict[str, Any] = {each.name: each for each in ZeroStageEnum}
    if kind is not ZeroStageEnum or name not in members:
        raise UnpicklingError(f"GLOBAL {_GETATTR} was not an allowed global")
    return members[name]


def _being_loaded(fault: Exception) -> Path | None:
    """The file that ``torch.load`` was reading when it raised ``fault``; None if it was something else that did."""
    assert fault.__traceback__ is not None
    for frame, _ in walk_tb(fault.__traceback__):
        if frame.f_code is torch.load.__code__:
            source = frame.f_locals["f"]
            return Path(source if isinstance(source, (str, os.PathLike)) else source.name)
    return None
