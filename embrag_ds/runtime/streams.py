"""CUDA side streams and pinned staging buffers: asynchronous on a CUDA device, without effect on a CPU."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embrag_ds.errors import UserError
from embrag_ds.runtime.timeline import NO_TIMELINE, Timeline

_ALIGNMENT = 256
"""Bytes to which an array in a staging slot is aligned."""


def use_device(device: torch.device) -> None:
    """Make a CUDA device the calling thread's current one; ``cuda`` without a number already is."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def thread_start() -> Callable[[], None]:
    """Function that a new thread must call first: it makes the current CUDA device of this thread that of the new one.

    CUDA starts a thread with device 0, on which every rank would open a context of half a gigabyte. Without CUDA the
    function does nothing.
    """
    if not torch.cuda.is_initialized():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


class SideStream:
    """CUDA stream for copies, searches or encoding beside the training step; ``with`` makes it the current stream.

    ``urgent`` gives it a higher priority than the default stream has. A lower one does not exist in CUDA. On a CPU
    nothing changes.
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
        """Make later work on this stream wait for the event ``main``; None on a CPU. The host does not wait."""
        if self._stream is not None and main is not None:
            self._stream.wait_event(main)

    def event(self) -> Any:
        """CUDA event after the work queued on this stream so far; None on a CPU, where that work is done."""
        return None if self._stream is None else self._stream.record_event()


def mark_current(device: torch.device) -> Any:
    """CUDA event after the work queued on the current stream so far; None on a CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def hand_over(tensors: Iterable[Tensor], event: Any) -> None:
    """Make the current stream wait for ``event``, and the allocator keep the tensors' memory until it has used them.

    Does nothing where ``event`` is None, on a CPU.
    """
    if event is None:
        return
    current = torch.cuda.current_stream(event.device)
    current.wait_event(event)
    for tensor in tensors:
        tensor.record_stream(current)


class StreamReads:
    """Latest read of host memory by each CUDA stream, which must finish before the memory is written again."""

    def __init__(self, device: torch.device):
        self._device = device
        self._events: dict[int, Any] = {}

    def mark(self) -> None:
        """Note that the current stream reads the memory in the work queued so far."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            self._events[stream.cuda_stream] = stream.record_event()

    def wait(self) -> None:
        """Make the host wait until all reads have finished."""
        for event in list(self._events.values()):
            event.synchronize()


def host_buffer(size: int, device: torch.device) -> Tensor:
    """Host buffer uint8 [n], uninitialised, with n >= ``size`` bytes.

    For a CUDA device it is pinned, and n is ``size`` rounded up to whole pages. Torch's own pinned memory would be
    rounded up to a power of two. It stays pinned until the tensor and its views are gone. Raises
    :class:`~embrag_ds.errors.UserError` if the memory cannot be pinned.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # After a fork, a write of this process would move the page away from the memory that the GPU reads.
    pages.madvise(mmap.MADV_DONTFORK)
    array = np.frombuffer(pages, dtype=np.uint8)
    with torch.cuda.device(device):
        fault = int(torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0))
    if fault:
        raise UserError(
            f"{array.nbytes / (1 << 30):.2f} GiB of host memory could not be pinned for {device} (CUDA error {fault}): "
            "free host memory, lower embrag.retrieval.prefetch, or set embrag.retrieval.encoding to fixed"
        )
    # Torch's storage holds ``array``, whose finaliser runs before the pages are unmapped.
    weakref.finalize(array, _unpin, array.ctypes.data, device, os.getpid())
    return torch.from_numpy(array)


def _unpin(address: int, device: torch.device, process: int) -> None:
    """Unpin a buffer after the copies out of it; not in a forked process, which has none of its memory."""
    if os.getpid() != process:
        return
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):  # the run may have ended by a fault of CUDA
        torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaHostUnregister(address)


class Staging:
    """Pinned staging buffers for copying a batch's arrays to the device; ``slots`` preallocated ones are used in turn.

    A batch calls :meth:`begin`, :meth:`put` for each array, and :meth:`end`. A slot is written again only after the
    copies out of it have finished. On a CPU nothing is staged: :meth:`put` returns a tensor on the array's memory.
    """

    def __init__(self, device: torch.device, slots: int, slot_bytes: int, timeline: Timeline = NO_TIMELINE):
        """``slot_bytes`` must hold all arrays of a batch, each aligned to 256 bytes."""
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
        """Memory held by all slots, in bytes; 0 on a CPU."""
        return sum(slot.numel() for slot in self._slots)

    def begin(self) -> None:
        """Start a batch on the next slot, after waiting for the last copies out of it if they have not finished."""
        if not self._slots:
            return
        self._turn = (self._turn + 1) % len(self._slots)
        self._used = 0
        copied = self._copied[self._turn]
        if copied is not None and not copied.query():
            copied.synchronize()

    def put(self, array: np.ndarray) -> Tensor:
        """Copy ``array`` to a tensor on the device, asynchronously on the current stream.

        Raises RuntimeError if the slot is too small for the batch's arrays.
        """
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
        """Finish a batch: record an event on the current stream after the copies out of its slot."""
        if self._slots:
            self._copied[self._turn] = mark_current(self.device)
