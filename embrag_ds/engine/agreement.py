"""What any rank wishes, agreed on by all of them at step boundaries, without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

from embrag_ds.engine.distributed import DistributedContext


class Agreement:
    """Exchange of a few numbers at every step boundary: the largest of each over the ranks.

    Ranks reach a boundary at different times, and a GPU's rank should not wait there for the others. So the exchange of
    one boundary runs while the next step is computed, and every rank learns its result at the next boundary. A single
    rank learns it at once.
    """

    def __init__(self, distributed: DistributedContext):
        self._alone = distributed.ranks == 1
        # On the CPU: it must not queue behind a step's work on a GPU. A group of its own keeps it in order.
        self._group: Any = None if self._alone else torch.distributed.new_group(backend="gloo")
        self._pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, wishes: Sequence[int]) -> list[int]:
        """Tell the other ranks ``wishes``, and return what was agreed on at the boundary before (collective)."""
        if self._alone:
            return list(wishes)
        agreed = self._finish() or [0] * len(wishes)
        told = torch.tensor(wishes, dtype=torch.int64)
        work = torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
        self._pending = work, told
        return agreed

    def close(self) -> None:
        """Wait for the last exchange."""
        self._finish()

    def _finish(self) -> list[int] | None:
        if self._pending is None:
            return None
        work, told = self._pending
        self._pending = None
        work.wait()
        return [int(each) for each in told.tolist()]
