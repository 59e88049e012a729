"""Gradients added up, measured and clipped as one flat tensor.

DeepSpeed's optimiser for bf16 weights with fp32 gradients keeps them in one flat buffer per group of parameters, and
handles them one parameter at a time: four operations for each of the 174 parameters of ``v18.json``, most of them
smaller than the time of their launch. The same sums and products over the whole buffer take a handful of operations.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.checkpoint.constants import ZERO_STAGE
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import Tensor


class FlatGradients(BF16_Optimizer):
    """DeepSpeed's optimiser with its gradients handled as a whole, for networks without experts or tensor parallelism.

    Weights and moments are those of the parent. The norm differs by rounding, because its terms are added in another
    order.
    """

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """Add the gradients of a micro-batch, in bf16, to the fp32 ones, and free them."""
        if self.immediate_grad_update:  # hooks have done it, parameter by parameter
            return
        for number, weights in enumerate(self.bf16_groups):
            found = self.fp32_groups_has_gradients[number]
            if all(weight.grad is not None for weight in weights):
                flat = torch.cat([weight.grad.flatten() for weight in weights])
                self.fp32_groups_actual_gradients_flat[number].add_(flat)
            else:
                for weight, gradient in zip(weights, self.fp32_groups_gradients[number], strict=True):
                    if weight.grad is not None:
                        gradient.add_(weight.grad.flatten())
            for place, weight in enumerate(weights):
                found[place] = found[place] or weight.grad is not None
                weight._hp_grad = self.fp32_groups_gradients[number][place]
                weight.grad = None

    @torch.no_grad()
    def get_grads_for_norm(self, for_clipping: bool = False) -> list[Tensor] | tuple[list[Tensor], dict[str, Tensor]]:
        """The flat gradients in place of those of each parameter; parameters without a gradient have zeros in them."""
        flat = self.fp32_groups_actual_gradients_flat
        return flat if for_clipping else (flat, {})

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, with the stage that DeepSpeed's own converters look for."""
        return {**super().state_dict(), ZERO_STAGE: ZeroStageEnum.optimizer_states}


def handle_gradients_as_a_whole(optimizer: Any) -> None:
    """Turn DeepSpeed's ``optimizer`` into :class:`FlatGradients` in place, if it is one with fp32 gradients."""
    if type(optimizer) is BF16_Optimizer and not optimizer.has_moe_layers and optimizer.mpu is None:
        optimizer.__class__ = FlatGradients
