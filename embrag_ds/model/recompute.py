"""Recomputation of activations in the backward pass, in place of storing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Step = Callable[[Tensor], Tensor]


def computed_again(function: Callable[..., Tensor], *given: Any) -> Tensor:
    """Return ``function(*given)``, and compute it again in the backward pass; only ``given`` is stored.

    ``function`` must not use random numbers. In compiled code the compiler chooses instead
    (:class:`embrag_ds.model.compiled.Compiled`).
    """
    # Without gradients there is nothing to store, and the first call of checkpoint takes a second for imports.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*given)
    return checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)


def checkpoint_in_graph(function: Callable[..., Tensor], *given: Any) -> Tensor:
    """Return ``function(*given)``, and compute it again with the same random numbers; in compiled code, too."""
    return checkpoint(function, *given, use_reentrant=False)


def through(first: Step, then: Step, x: Tensor) -> Tensor:
    """Return ``then(first(x))``, and compute ``first(x)`` again for the backward pass of ``then``.

    It suits a ``first`` that stores ``x`` anyway and takes little time beside ``then``, such as a norm or an activation
    before a projection. In compiled code the compiler chooses what to compute again.
    """
    if torch.compiler.is_compiling():
        return then(first(x))
    between, source = first(x), x.detach()
    with not_kept(between, lambda: first(source)):
        return then(between)


class _Part(NamedTuple):
    """View of the recomputed tensor, in place of a saved one."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def not_kept(tensor: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Context in which autograd does not store ``tensor``, nor views of it, for the backward pass.

    Backward passes use the same views of ``again()`` instead, which must compute a tensor with the size, strides and
    values of ``tensor``. It is called once for all of them, without gradients and under the present autocast.
    """
    # The storage itself, not its address: a traced tensor has none.
    place, device = tensor.untyped_storage()._cdata, tensor.device.type
    as_now = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    parts = given = 0
    made: Tensor | None = None

    def keep(kept: Tensor) -> Tensor | _Part:
        nonlocal parts
        if kept.untyped_storage()._cdata != place:
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
