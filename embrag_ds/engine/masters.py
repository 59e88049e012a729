"""Master weights: the fp32 weights that the optimiser steps, whatever precision the network computes in."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from torch._utils import _unflatten_dense_tensors


def gathered_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """The network's weights in fp32 on the CPU, whole under every ZeRO stage (collective).

    With ``bf16`` or ``fp16`` these are the optimiser's master weights; the network computes with rounded copies of
    them. Weights without a master are taken as they are: those of frozen parts, and all weights of an fp32 network
    without ZeRO.
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


def parameters_of(engine: deepspeed.DeepSpeedEngine) -> int:
    """Number of a network's parameters, whole under every ZeRO stage."""
    return sum(getattr(each, "ds_numel", each.numel()) for each in engine.module.parameters())


def set_masters(engine: deepspeed.DeepSpeedEngine, weights: dict[str, Tensor]) -> None:
    """Give the optimiser's master weights all digits of ``weights``, fp32 by name, as the network was loaded with them.

    DeepSpeed makes the masters from weights that it has rounded to bf16 or fp16 already. Every rank sets its own part.
    """
    replicated = _replicated_masters(engine.optimizer)
    for name, weight in engine.module.named_parameters():
        if not weight.requires_grad:
            continue
        if id(weight) in replicated:
            replicated[id(weight)].data.copy_(weights[name])
        elif hasattr(weight, "ds_id"):
            _set_partition(engine.optimizer, weight, weights[name].flatten())
        elif hasattr(weight, "_hp_mapping"):
            weight.set_full_hp_param(weights[name])


def clear_padding(engine: deepspeed.DeepSpeedEngine) -> None:
    """Set to zero what DeepSpeed leaves as it lay in memory under ZeRO-3: the end of the last rank's part of a weight.

    No weight is there, but checkpoints hold it, and it may happen to be no finite number. Offloading to NVMe keeps it.
    """
    if engine.zero_optimization_stage() < ZeroStageEnum.weights or engine.zero_nvme_offload_optimizer():
        return
    for weight in engine.module.parameters():
        parts = [weight.ds_tensor]
        if weight.requires_grad:
            parts.append(engine.optimizer._get_fp32_opt_state_partition(weight, release_swap_buffers=True)[0])
        for part in parts:
            used = weight.ds_numel - torch.distributed.get_rank() * weight.ds_tensor.ds_numel
            part.data[max(0, used) :] = 0


def _set_partition(optimizer: Any, weight: Tensor, value: Tensor) -> None:
    """Set this rank's part of a master under ZeRO-3; DeepSpeed's own setter fails for a last part that is padded."""
    part, _ = optimizer._get_fp32_opt_state_partition(weight, release_swap_buffers=True)
    start = part.numel() * optimizer._get_param_partition_rank(weight)
    own = value[start : start + part.numel()]
    part.data[: own.numel()].copy_(own)


def _copied(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True).contiguous()


def _replicated_masters(optimizer: object) -> dict[int, Tensor]:
    """Master weights without ZeRO, by the id of their parameter; DeepSpeed's own look-up lacks these."""
    masters: dict[int, Tensor] = {}
    if isinstance(optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)):
        for number, group in enumerate(optimizer.fp16_groups):
            if isinstance(optimizer, FP16_UnfusedOptimizer):
                of_group = optimizer.fp32_groups[number]
            else:
                of_group = _unflatten_dense_tensors(optimizer.fp32_groups_flat[number], group)
            masters |= {id(weight): master for weight, master in zip(group, of_group, strict=True)}
    return masters
