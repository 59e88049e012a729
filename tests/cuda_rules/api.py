"""Replacements of what a CPU-only torch lacks: ``torch.cuda``, and factories and copies that take its devices."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._device import _device_constructors

from tests.cuda_rules.tensors import META

if TYPE_CHECKING:
    from tests.cuda_rules.machine import Machine

_METHODS = ("to", "new_empty", "new_full", "new_ones", "new_zeros", "new_tensor", "new_empty_strided")
_FACTORIES = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")


def replacements(machine: Machine) -> Iterator[tuple[Any, str, Any]]:
    """Attributes to replace: object, name and value."""
    Stream, Event = _stream_class(machine), _event_class(machine)

    def index_of(device: Any) -> int:
        if device is None:
            return machine.thread.device
        return device if isinstance(device, int) else (torch.device(device).index or 0)

    class Device:
        def __init__(self, device: Any):
            self.index = index_of(device)

        def __enter__(self) -> None:
            self.before, machine.thread.device = machine.thread.device, self.index

        def __exit__(self, *failure: object) -> None:
            machine.thread.device = self.before

    class StreamContext:
        def __init__(self, stream: Any):
            self.stream = stream

        def __enter__(self) -> None:
            if self.stream is not None:
                machine.bound("torch.cuda.stream()")
                self.before, machine.thread.stream = machine.thread.stream, self.stream

        def __exit__(self, *failure: object) -> None:
            if self.stream is not None:
                machine.thread.stream = self.before

    def set_stream(stream: Any) -> None:
        machine.bound("set_stream()")
        machine.thread.stream = stream

    def set_device(device: Any) -> None:
        index = index_of(device)
        if index != machine.device.index:
            raise machine.order.broken(f"set_device({index}), but the run is on {machine.device}")
        machine.thread.device = index

    def current_stream(device: Any = None) -> Any:
        machine.own(device, "current_stream()")
        return machine.current_stream()

    def default_stream(device: Any = None) -> Any:
        machine.own(device, "default_stream()")
        return machine.default_stream

    def synchronize(device: Any = None) -> None:
        machine.own(device, "synchronize()")
        for stream in list(machine.order.names):
            machine.order.host_waits(machine.order.state(stream))
        machine.wait("torch.cuda.synchronize()")

    def stats(device: Any = None) -> dict[str, Any]:
        machine.own(device, "memory_stats()")
        each = {"current": machine.order.held_bytes, "peak": machine.order.peak_bytes}
        return {"allocated_bytes": {"all": each}, "reserved_bytes": {"all": each}}

    properties = SimpleNamespace(
        name="NVIDIA stand-in", major=9, minor=0, multi_processor_count=132, total_memory=1 << 36
    )

    def property_of(device: Any = None) -> Any:
        return SimpleNamespace(**vars(properties), uuid=f"stand-in-{index_of(device)}")

    cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: machine.count,
        "current_device": lambda: machine.thread.device,
        "set_device": set_device,
        "device": Device,
        "Stream": Stream,
        "Event": Event,
        "stream": StreamContext,
        "StreamContext": StreamContext,
        "set_stream": set_stream,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "synchronize": synchronize,
        "memory_stats_as_nested_dict": stats,
        "memory_allocated": lambda device=None: machine.order.held_bytes,
        "max_memory_allocated": lambda device=None: machine.order.peak_bytes,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": property_of,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda address, size, flags: machine.register(address, size),
            cudaHostUnregister=machine.unregister,
        ),
    }
    yield from ((torch.cuda, name, value) for name, value in cuda.items())
    for factory in sorted(_device_constructors(), key=lambda each: each.__name__):
        if getattr(torch, factory.__name__, None) is factory:
            yield torch, factory.__name__, _made(machine, factory)
    yield from ((torch, name, _translated(machine, getattr(torch, name))) for name in _FACTORIES)
    yield from ((torch.Tensor, name, _translated(machine, getattr(torch.Tensor, name))) for name in _METHODS)
    yield (
        torch.Tensor,
        "cuda",
        lambda tensor, device=None, non_blocking=False: tensor.to(
            machine.device if device is None else device, non_blocking=non_blocking
        ),
    )
    yield torch.Tensor, "pin_memory", lambda tensor, device=None: machine.pinned_by_torch(tensor.clone())
    yield torch.Tensor, "is_pinned", lambda tensor, device=None: machine.pinned_span(tensor) is not None


def _translated(machine: Machine, function: Any) -> Any:
    """``function`` with the stand-in's device called as C++ knows it."""

    def translate(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("cuda"):
            value = torch.device(value)
        if isinstance(value, torch.device) and value.type == "cuda":
            machine.own(value, f"{function.__name__}()")
            return META
        return value

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*map(translate, args), **{name: translate(value) for name, value in kwargs.items()})

    return called


def _made(machine: Machine, factory: Any) -> Any:
    """``factory`` with the stand-in's device and pinned memory."""
    on_device = _translated(machine, factory)
    data = factory.__name__ in ("tensor", "as_tensor", "asarray")

    @functools.wraps(factory)
    def called(*args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("pin_memory", False):
            return machine.pinned_by_torch(factory(*args, **kwargs))
        device = kwargs.get("device")
        if data and device is not None and torch.device(device).type == "cuda":
            return factory(*args, **{**kwargs, "device": "cpu"}).to(device)  # a blocking copy, as in torch
        return on_device(*args, **kwargs)

    return called


def _stream_class(machine: Machine) -> Any:
    class Stream:
        def __init__(self, device: Any = None, priority: int = 0):
            machine.own(device, "Stream()")
            self._open("", priority)

        @classmethod
        def _made(cls, owner: Machine, name: str) -> Stream:
            made = cls.__new__(cls)
            made._open(name, 0)
            return made

        def _open(self, name: str, priority: int) -> None:
            self.cuda_stream = machine.add_stream(name)
            self.device, self.device_index, self.priority = machine.device, machine.device.index, priority

        def wait_event(self, event: Any) -> None:
            event.wait(self)

        def wait_stream(self, stream: Any) -> None:
            self.wait_event(stream.record_event())

        def record_event(self, event: Any = None) -> Any:
            event = torch.cuda.Event() if event is None else event
            event.record(self)
            return event

        def query(self) -> bool:
            return machine.order.asks(machine.order.state(self.cuda_stream))

        def synchronize(self) -> None:
            machine.bound("Stream.synchronize()")
            machine.wait("Stream.synchronize()", machine.order.state(self.cuda_stream))

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream) and self.cuda_stream == other.cuda_stream

        def __hash__(self) -> int:
            return hash(self.cuda_stream)

    return Stream


def _event_class(machine: Machine) -> Any:
    class Event:
        def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
            self.device: torch.device | None = None
            self._state: dict[int, int] | None = None
            self._seconds = 0.0

        def record(self, stream: Any = None) -> None:
            machine.bound("Event.record()")
            stream = machine.current_stream() if stream is None else stream
            self.device, self._seconds = machine.device, time.perf_counter()
            self._state = machine.order.state(stream.cuda_stream)

        def wait(self, stream: Any = None) -> None:
            machine.bound("Event.wait()")
            stream = machine.current_stream() if stream is None else stream
            machine.order.wait(stream.cuda_stream, self._reached())

        def query(self) -> bool:
            return self._state is not None and machine.order.asks(self._state)

        def synchronize(self) -> None:
            machine.bound("Event.synchronize()")
            machine.wait("Event.synchronize()", self._reached())

        def elapsed_time(self, other: Any) -> float:
            return 1000 * (other._seconds - self._seconds)

        def _reached(self) -> dict[int, int]:
            if self._state is None:
                raise machine.order.broken("a wait for an event that was never recorded")
            return self._state

    return Event
