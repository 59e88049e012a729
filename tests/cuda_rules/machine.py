"""The stand-in's machine: threads, current devices and streams, pinned memory, and what replaces ``torch.cuda``."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.cuda_rules.api import replacements
from tests.cuda_rules.order import HOST, Memory, Order, RuleBroken, Span, place
from tests.cuda_rules.tensors import DeviceTensor, Watching, extent


@dataclass(frozen=True)
class Wait:
    """A wait of the host for the device: what for, on which thread, and where in the code."""

    what: str
    thread: str
    place: str


class _Thread(threading.local):
    """What CUDA keeps for a thread: its current device, and the current stream of the run's device."""

    device = 0
    stream: Any = None
    forbidden = False


class Machine:
    """Machine with two GPUs; see the package. Used once, as a context."""

    def __init__(self, index: int = 1, set_device: bool = True):
        """``index`` is the run's GPU. ``set_device`` makes it the current device of the calling thread."""
        self.device = torch.device("cuda", index)
        self.count = max(2, index + 1)
        self.order = Order()
        self.waits: list[Wait] = []
        self.pinned: list[tuple[Memory, StorageWeakRef | None]] = []
        self.launched: set[tuple[str, str]] = set()
        self.active = False
        self.thread = _Thread()
        self._set_device = set_device
        self._streams = 0
        self._stack = ExitStack()
        self.default_stream: Any = None

    @property
    def breaches(self) -> list[str]:
        """Breaches found so far."""
        return self.order.breaches

    def __enter__(self) -> Machine:
        for target, name, value in replacements(self):
            self._stack.enter_context(mock.patch.object(target, name, value, create=True))
        kept = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, kept)
        self.default_stream = torch.cuda.Stream._made(self, "the default stream")
        start = threading.Thread.start
        self._stack.enter_context(
            mock.patch.object(threading.Thread, "start", lambda thread: start(self._seen(thread)))
        )
        self._stack.enter_context(Watching(self))
        self.thread.device = self.device.index if self._set_device else 0
        self.active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pinned:  # what the test dropped is unpinned and freed under this machine's rules
            gc.collect()
        self.active = False
        self._stack.close()
        if fault is None and self.breaches:
            raise RuleBroken("\n".join(self.breaches))

    @contextmanager
    def expect(self, text: str) -> Iterator[None]:
        """Context that must break a rule, with ``text`` in the message; the breach is then forgotten."""
        before = len(self.breaches)
        try:
            yield
        except RuleBroken as fault:
            assert text in str(fault), f"another breach: {fault}"
        found = self.breaches[before:]
        assert any(text in each for each in found), f"no breach with {text!r}, but {found}"
        del self.breaches[before:]

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """Context in which a wait of the calling thread's host for the device is a breach."""
        self.thread.forbidden = True
        try:
            yield
        finally:
            self.thread.forbidden = False

    def device_catches_up(self) -> None:
        """Let the device finish all that is queued: ``Event.query()`` is then True. The host knows only if it asks."""
        self.order.catch_up()

    def _seen(self, thread: threading.Thread) -> threading.Thread:
        """Make a thread, which is about to start, report its operations."""
        run = thread.run

        def seen() -> None:
            with Watching(self):
                run()

        thread.run = seen  # type: ignore[method-assign]
        return thread

    # Calls of CUDA

    def bound(self, what: str) -> None:
        """Check that the calling thread has chosen the run's device before it calls CUDA."""
        if self.active and self.thread.device != self.device.index:
            raise self.order.broken(
                f"{what} ({place()}): thread {threading.current_thread().name} has the current device "
                f"{self.thread.device}, so the run on {self.device} opens a context on GPU {self.thread.device}; "
                "call set_device first"
            )

    def own(self, device: Any, what: str) -> None:
        """Check that an explicit ``device`` is the run's, and the thread's too; None is the current device."""
        self.bound(what)
        index = device if isinstance(device, int) or device is None else torch.device(device).index
        if index is not None and index != self.device.index:
            raise self.order.broken(
                f"{what} ({place()}): on GPU {index}, but the run is on {self.device}: it opens a context there"
            )

    def current_stream(self) -> Any:
        """Current stream of the calling thread on the run's device."""
        return self.thread.stream or self.default_stream

    def add_stream(self, name: str) -> int:
        """Number of a new stream."""
        with self.order.lock:
            number = self._streams
            self._streams += 1
            self.order.add_stream(number, name or f"side stream {number}")
        return number

    def launch(self, what: str, reads: list[Span], writes: list[Span]) -> None:
        """Queue an operation on the current stream."""
        if self.active:
            self.bound(what)
            stream = self.current_stream().cuda_stream
            self.launched.add((threading.current_thread().name, self.order.names[stream]))
            self.order.use(stream, what, reads, writes)

    def wait(self, what: str, state: dict[int, int] | None = None) -> None:
        """Let the host wait until ``state`` is reached; by default, for the current stream."""
        if not self.active:
            return
        wait = Wait(what, threading.current_thread().name, place())
        self.waits.append(wait)
        if self.thread.forbidden:
            raise self.order.broken(f"the host waits for the device: {what} ({wait.place})")
        self.order.host_waits(self.order.state(self.current_stream().cuda_stream) if state is None else state)

    # Memory

    def allocated(self, inner: Tensor) -> Memory:
        """Memory of a new device tensor, which belongs to the current stream."""
        if self.active:
            self.bound("an allocation")
        storage = inner.untyped_storage()
        start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        home = self.current_stream().cuda_stream
        memory = Memory(self.order, f"a tensor {list(inner.shape)} of {place()}", start, stop, home)
        self.order.took(memory)
        self.launch("allocation", [], [(memory, start, stop)])
        return memory

    def pinned_by_torch(self, plain: Tensor) -> Tensor:
        """Take a new CPU tensor for one of torch's pinned allocator, and return it."""
        self.bound("a pinned allocation")
        storage = plain.untyped_storage()
        memory = Memory(
            self.order, f"pinned memory of {place()}", storage.data_ptr(), storage.data_ptr() + storage.nbytes(), HOST
        )
        self.pinned.append((memory, StorageWeakRef(storage)))
        return plain

    def register(self, address: int, size: int) -> int:
        """``cudaHostRegister``: the error's number."""
        self.bound("cudaHostRegister()")
        if size <= 0 or any(each.start < address + size and address < each.stop for each, _ in self._pinned_now()):
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        memory = Memory(self.order, f"pinned memory of {place()}", address, address + size, HOST, registered=True)
        self.pinned.append((memory, None))
        return 0

    def unregister(self, address: int) -> int:
        """``cudaHostUnregister``: the error's number."""
        for entry in self._pinned_now():
            if entry[0].registered and entry[0].start == address:
                if self.active:
                    self.order.unregistered(entry[0])
                self.pinned.remove(entry)
                return 0
        return 713  # cudaErrorHostMemoryNotRegistered

    @property
    def registered_bytes(self) -> int:
        """Bytes of host memory that are registered now."""
        return sum(each.stop - each.start for each, _ in self.pinned if each.registered)

    def pinned_span(self, tensor: Tensor) -> Span | None:
        """Bytes of a CPU tensor in pinned memory, or None if it is not pinned."""
        if isinstance(tensor, DeviceTensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            return None
        start, stop = extent(tensor)
        for memory, _ in self._pinned_now():
            if memory.start <= start and stop <= memory.stop and start < stop:
                return memory, start, stop
        return None

    def _pinned_now(self) -> list[tuple[Memory, StorageWeakRef | None]]:
        with self.order.lock:
            if any(each[1] is not None and each[1].expired() for each in self.pinned):
                self.pinned = [each for each in self.pinned if each[1] is None or not each[1].expired()]
            return list(self.pinned)
