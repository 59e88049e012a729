"""What the backward pass computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Step = Callable[[Tensor], Tensor]


def computed_again(function: Callable[..., Tensor], *given: Any) -> Tensor:
    """``function(*given)``, of which only ``given`` is kept; nothing in it may be random."""
    if not torch.is_grad_enabled():  # the first call of checkpoint imports for a second
        return function(*given)
    return checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)


def through(first: Step, then: Step, x: Tensor) -> Tensor:
    """``then(first(x))``; for the backward pass of ``then``, ``first(x)`` is computed again instead of kept.

    For a ``first`` that keeps ``x`` anyway and takes little time beside ``then``: a norm or an activation before a
    projection.
    """
    if torch.compiler.is_compiling():  # it has no hooks
        return checkpoint(lambda x: then(first(x)), x, use_reentrant=False)
    between = first(x)
    source, place, count = x.detach(), between.data_ptr(), between.numel()

    def keep(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if kept.data_ptr() == place and kept.numel() == count else kept

    def give(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return first(source).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        return then(between)
