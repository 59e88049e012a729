"""What the backward pass computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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
        return computed_again(lambda x: then(first(x)), x)
    between, source = first(x), x.detach()
    with not_kept(between, lambda: first(source)):
        return then(between)


class _Part(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def not_kept(tensor: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """What operations in this context would keep of the memory of ``tensor``, all or parts, their backward passes find
    in ``again()``, a tensor as ``tensor`` was, which is computed once for all of them."""
    place, device = tensor.untyped_storage().data_ptr(), tensor.device.type
    as_now = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    parts = given = 0
    made: Tensor | None = None

    def keep(kept: Tensor) -> Tensor | _Part:
        nonlocal parts
        if kept.untyped_storage().data_ptr() != place:
            return kept
        parts += 1
        return _Part(kept.size(), kept.stride(), int(kept.storage_offset()))

    def give(kept: Tensor | _Part) -> Tensor:
        nonlocal given, made
        if isinstance(kept, Tensor):
            return kept
        if made is None:
            with torch.no_grad(), as_now:
                made = again()
        part = made.as_strided(*kept)
        given += 1
        if given % parts == 0:
            made = None
        return part

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield
