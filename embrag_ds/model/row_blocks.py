"""Computation on a CPU by blocks of rows, each by one thread: the same numbers whatever the number of threads.

Torch divides an operation among its threads, and what a thread computes at the edge of its part is rounded differently
from the rest. Blocks of a fixed number of rows have no such edges, and several are computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch import Tensor, nn

from embrag_ds.model.compiled import CoreInputs

_ROWS = 16


class RowBlocks:
    """Threads, as many as torch uses when this is made, that compute blocks of rows."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        if threads == 1:
            return
        self._pool = ThreadPoolExecutor(threads, "rows", initializer=_use_one_thread)
        all_started = Barrier(threads)
        for _ in range(threads):
            self._pool.submit(all_started.wait)
        self._pool.submit(int).result()
        # A thread's number is its own once it has started, but torch gives the last one set to those that start later.
        torch.set_num_threads(threads)

    def __call__(self, function: Callable[[CoreInputs], tuple[Tensor, ...]], given: CoreInputs) -> list[Tensor]:
        """``function(given)``, without gradients; its tensors have B rows as those of ``given`` do."""

        def computed(block: CoreInputs) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(block)

        made = self.each(computed, given.blocks(_ROWS))
        return [torch.cat(parts) for parts in zip(*made, strict=True)]

    def differentiable(
        self, function: Callable[[CoreInputs], Tensor], given: CoreInputs, weights: Iterable[nn.Parameter]
    ) -> Tensor:
        """``function(given)``, a tensor of B rows, with gradients for the ``weights`` and for ``given``.

        Of ``given``, only tensors with rows may require gradients. ``function`` must not draw random numbers: threads
        would share them in any order.
        """
        trained = [weight for weight in weights if weight.requires_grad]
        fields = zip(given._fields, given, strict=True)
        names = [name for name, each in fields if isinstance(each, Tensor) and each.requires_grad]
        rows = [getattr(given, name) for name in names]
        made: Tensor = _Blocks.apply(self, function, given, names, trained, *rows, *trained)
        return made

    def each(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """``function`` of each item, several at once, under the autocast of the calling thread."""
        is_on, chosen = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def computed(item: Any) -> Any:
            with torch.autocast("cpu", chosen, enabled=is_on):
                return function(item)

        return list(map(computed, items) if self._pool is None else self._pool.map(computed, items))


class _Blocks(torch.autograd.Function):
    """A function of rows in blocks: each has a graph of its own, which one thread makes and goes back through."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: RowBlocks,
        function: Callable[[CoreInputs], Tensor],
        given: CoreInputs,
        names: list[str],
        trained: list[nn.Parameter],
        *tensors: Tensor,
    ) -> Tensor:
        cut = []
        for block in given.blocks(_ROWS):
            leaves = {name: getattr(block, name).detach().requires_grad_() for name in names}
            cut.append((block._replace(**leaves), list(leaves.values())))

        def made(part: tuple[CoreInputs, list[Tensor]]) -> Tensor:
            with torch.enable_grad():
                return function(part[0])

        results = blocks.each(made, cut)
        ctx.blocks, ctx.trained = blocks, trained
        ctx.parts = [(result, leaves) for result, (_, leaves) in zip(results, cut, strict=True)]
        return torch.cat([result.detach() for result in results])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        parts, trained = ctx.parts, ctx.trained
        ctx.parts = None

        def back(part: tuple[tuple[Tensor, list[Tensor]], Tensor]) -> tuple[Tensor | None, ...]:
            (result, leaves), gradient = part
            return torch.autograd.grad(result, [*leaves, *trained], gradient, allow_unused=True)

        pieces = gradients[0].split([len(result) for result, _ in parts])
        found = ctx.blocks.each(back, list(zip(parts, pieces, strict=True)))
        first = len(parts[0][1])
        joined: list[Tensor | None] = []
        for place, each in enumerate(zip(*found, strict=True)):
            if each[0] is None:  # no block uses it
                joined.append(None)
            else:  # sums in the order of the blocks
                joined.append(torch.cat(each) if place < first else torch.stack(each).sum(0))
        return (*[None] * 5, *joined)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # the first call in a thread sets the number that is then the last one
