"""The weights that the optimiser steps: in fp32, whatever precision the network computes in."""

from __future__ import annotations

import deepspeed
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from torch._utils import _unflatten_dense_tensors


def gathered_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """The network's weights on the CPU in fp32, whole under every ZeRO stage (collective).

    With ``bf16`` or ``fp16`` these are the optimiser's master weights, of which the network computes with rounded
    copies. What has no master is taken as it is: frozen parts, and all of a network in fp32 without ZeRO.
    """
    replicated = _replicated_masters(engine.optimizer)
    state = {}
    for name, weight in engine.module.state_dict(keep_vars=True).items():
        master = replicated.get(id(weight))
        if master is None:
            master = safe_get_full_fp32_param(weight)
        if master is None:
            with deepspeed.zero.GatheredParameters([weight]):
                state[name] = _copied(weight)
        else:
            state[name] = _copied(master)
    return state


def _copied(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True).contiguous()


def _replicated_masters(optimizer: object) -> dict[int, Tensor]:
    """Masters by their parameter's id, where there is no ZeRO: DeepSpeed's own look-up does not know those."""
    masters: dict[int, Tensor] = {}
    if isinstance(optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)):
        for number, group in enumerate(optimizer.fp16_groups):
            if isinstance(optimizer, FP16_UnfusedOptimizer):
                of_group = optimizer.fp32_groups[number]
            else:
                of_group = _unflatten_dense_tensors(optimizer.fp32_groups_flat[number], group)
            masters |= {id(weight): master for weight, master in zip(group, of_group, strict=True)}
    return masters
