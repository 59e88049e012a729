"""Side streams and pinned staging: asynchronous on a CUDA device, and without effect on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embrag_ds.runtime.timeline import NO_TIMELINE, Timeline

_ALIGNMENT = 256


class SideStream:
    """A stream of its own for copies, searches or encoding; ``with`` runs operations on it.

    ``urgent`` work goes ahead of the training step's; CUDA knows no priority below the default one.
    """

    def __init__(self, device: torch.device, urgent: bool = False):
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1 if urgent else 0)
        self._context: Any = contextlib.nullcontext()

    def __enter__(self) -> SideStream:
        if self._stream is not None:
            self._context = torch.cuda.stream(self._stream)
        self._context.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._context.__exit__(*failure)

    def wait_for_main(self, main: Any) -> None:
        """Let what follows here see what was queued so far on ``main`` (None on a CPU)."""
        if self._stream is not None and main is not None:
            self._stream.wait_event(main)

    def event(self) -> Any:
        """A mark of what was queued so far; None on a CPU, where it is done already."""
        return None if self._stream is None else self._stream.record_event()


def mark_current(device: torch.device) -> Any:
    """A mark of what was queued so far on the current stream; None on a CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def hand_over(tensors: Iterable[Tensor], event: Any) -> None:
    """Make the current stream wait for ``event`` and keep the tensors' memory until it has used them."""
    if event is None:
        return
    current = torch.cuda.current_stream(event.device)
    current.wait_event(event)
    for tensor in tensors:
        tensor.record_stream(current)


def host_buffer(size: int, device: torch.device) -> Tensor:
    """``size`` bytes of host memory, pinned where the device is a CUDA one."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


class Staging:
    """Preallocated pinned slots through which a batch's arrays reach the device, used in turn.

    A slot is written again only when the copies out of it are done. On a CPU nothing is staged: an array
    becomes a tensor as it is.
    """

    def __init__(self, device: torch.device, slots: int, slot_bytes: int, timeline: Timeline = NO_TIMELINE):
        self.device = device
        self._timeline = timeline
        self.bytes_moved = 0
        on_gpu = device.type == "cuda"
        self._slots = [host_buffer(slot_bytes, device) for _ in range(slots)] if on_gpu else []
        self._copied: list[Any] = [None] * slots
        self._turn = -1
        self._used = 0

    @property
    def host_bytes(self) -> int:
        """Pinned memory held."""
        return sum(slot.numel() for slot in self._slots)

    def begin(self) -> None:
        """Turn to the next slot, once nobody reads it any more."""
        if not self._slots:
            return
        self._turn = (self._turn + 1) % len(self._slots)
        self._used = 0
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()

    def put(self, array: np.ndarray) -> Tensor:
        """``array`` as a tensor on the device, copied on the current stream."""
        self.bytes_moved += array.nbytes
        source = torch.from_numpy(np.ascontiguousarray(array))
        if not self._slots:
            return source
        slot = self._slots[self._turn]
        end = self._used + array.nbytes
        if end > slot.numel():
            raise RuntimeError(f"staging slot of {slot.numel()} bytes is too small for a batch")
        pinned = slot[self._used : end].view(source.dtype).view(source.shape)
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        pinned.copy_(source)
        with self._timeline.phase("h2d"):
            return pinned.to(self.device, non_blocking=True)

    def end(self) -> None:
        """All of the slot's copies are queued on the current stream."""
        if self._slots:
            self._copied[self._turn] = mark_current(self.device)
