"""Layers without memory, made only to be given the weights of others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_INITIALISERS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


class WithoutMemory(TorchFunctionMode):
    """Context in which new layers have weights on the meta device: without memory and values.

    ``torch.device("meta")`` would do the same for every operation. For most of them, random numbers too, torch then
    imports its compiler, which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **kwargs | {"device": "meta"})
        return kwargs["tensor"] if func in _INITIALISERS else func(*args, **kwargs)
