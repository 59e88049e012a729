"""Inference on a CPU by blocks of rows, each computed by one thread: the same numbers whatever the number of threads.

Torch divides an operation among its threads, and what a thread computes at the edge of its part is rounded differently
from the rest. Blocks of a fixed number of rows have no such edges, and several are computed at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor

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
        is_on, chosen = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def computed(block: CoreInputs) -> tuple[Tensor, ...]:
            # Both settings belong to a thread.
            with torch.no_grad(), torch.autocast("cpu", chosen, enabled=is_on):
                return function(block)

        blocks = given.blocks(_ROWS)
        made = map(computed, blocks) if self._pool is None else self._pool.map(computed, blocks)
        return [torch.cat(parts) for parts in zip(*made, strict=True)]


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # the first call in a thread sets the number that is then the last one
