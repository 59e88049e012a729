"""Tensors of the stand-in's device, and the rules of every operation on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda_rules.order import Memory, Span

if TYPE_CHECKING:
    from tests.cuda_rules.machine import Machine

aten = torch.ops.aten
META = torch.device("meta")
"""What C++ takes the stand-in's device for; a CPU-only torch knows no other that is not the CPU."""
WAITS = {
    "aten::_local_scalar_dense": "item()",
    "aten::equal": "equal()",
    "aten::is_nonzero": "is_nonzero()",
    "aten::nonzero": "nonzero()",
    "aten::masked_select": "masked_select()",
    "aten::unique_consecutive": "unique_consecutive()",
    "aten::unique_dim": "unique()",
    "aten::_unique2": "unique()",
    "aten::bincount": "bincount()",
    "aten::repeat_interleave.Tensor": "repeat_interleave() by a tensor",
}
"""Operations for whose result the host waits."""


class DeviceTensor(Tensor):
    """Tensor on the stand-in's device; ``inner`` is the CPU tensor that holds its values."""

    inner: Tensor
    memory: Memory
    machine: Machine

    @staticmethod
    def __new__(cls, inner: Tensor, memory: Memory, machine: Machine) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=META,
        )
        made.inner, made.memory, made.machine = inner, memory, machine
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        machine = next(each.machine for each in leaves((args, kwargs)) if isinstance(each, DeviceTensor))
        return dispatched(machine, function, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.machine.device

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return self.machine.device.index

    def is_pinned(self, *args: Any) -> bool:
        return False

    def pin_memory(self, *args: Any) -> Tensor:
        raise RuntimeError(f"cannot pin '{self.device}': only dense CPU tensors can be pinned")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def record_stream(self, stream: Any) -> None:
        self.machine.bound("record_stream()")
        self.memory.told.add(stream.cuda_stream)

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __dlpack__(self, **given: Any) -> Any:
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        if "stream" not in given:  # numpy, which has none to name
            raise BufferError("Unsupported device in DLTensor.")
        return self.inner.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:  # type: ignore[override]
        return 2, self.device.index  # kDLCUDA

    def __deepcopy__(self, memo: Any) -> Tensor:
        copy = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        return copy

    def __repr__(self, **given: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.inner}, device={self.device})"


class Watching(TorchDispatchMode):
    """Dispatch mode of a thread, which sees operations without a device tensor as well."""

    def __init__(self, machine: Machine):
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(self._machine, function, args, kwargs or {})


def leaves(value: Any) -> Iterator[Any]:
    """Values in nested lists, tuples and dictionaries, of which arguments consist (torch's own function is slow)."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Nested lists, tuples and dictionaries with every value changed."""
    if isinstance(value, list | tuple):
        return type(value)([mapped(change, each) for each in value])
    if isinstance(value, dict):
        return {name: mapped(change, each) for name, each in value.items()}
    return change(value)


def dispatched(machine: Machine, function: Any, args: Any, kwargs: Any) -> Any:
    """Compute one operation, on the inner tensors, after checking it."""
    wanted = kwargs.get("device")
    on_device = wanted is not None and wanted.type in ("meta", "cuda")
    given = [each for each in leaves((args, kwargs)) if isinstance(each, Tensor)]
    if function is aten.detach.default and isinstance(args[0], DeviceTensor):
        return DeviceTensor(args[0].inner.detach(), args[0].memory, machine)
    if not on_device and not any(isinstance(each, DeviceTensor) for each in given):
        return _on_host(machine, function, args, kwargs)
    if not machine.active:
        return _computed(machine, function, args, kwargs)
    name = function._schema.name.removeprefix("aten::")
    if function is aten.copy_.default:
        _copy(machine, args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return args[0]
    if function is aten._to_copy.default:
        return _to_copy(machine, args[0], kwargs)
    machine.bound(name)
    full = f"{function._schema.name}.{function._schema.overload_name}".removesuffix(".")
    _refuse_mixed(machine, function, given, name)
    reads, writes = _spans(function, args, kwargs)
    if full in WAITS or function._schema.name in WAITS:
        machine.launch(name, reads, writes)
        machine.wait(WAITS.get(full) or WAITS[function._schema.name])
        return _computed(machine, function, args, kwargs)
    if name.startswith("index") and any(each.dtype in (torch.bool, torch.uint8) for each in _indices(args)):
        machine.wait("indexing by a mask")
    result = _computed(machine, function, args, kwargs)
    fresh = [_span(each) for each in leaves(result) if isinstance(each, DeviceTensor) and each.numel()]
    known = {id(each[0]) for each in reads + writes} | {
        id(each.memory) for each in given if isinstance(each, DeviceTensor)
    }
    filled = [] if name.startswith(("empty", "new_empty")) else [each for each in fresh if id(each[0]) not in known]
    if reads or writes or filled:
        machine.launch(name, reads, writes + filled)
    return result


def _computed(machine: Machine, function: Any, args: Any, kwargs: Any) -> Any:
    """Result of an operation on the inner tensors, wrapped; an output that is an argument stays that argument."""
    wrapped: dict[int, Tensor] = {}
    memories: dict[int, Memory] = {}

    def inner(value: Any) -> Any:
        if isinstance(value, DeviceTensor):
            wrapped[id(value.inner)] = value
            memories[_storage(value.inner)] = value.memory
            return value.inner
        return torch.device("cpu") if isinstance(value, torch.device) else value

    plain_args, plain_kwargs = mapped(inner, (args, kwargs))
    on_host = {id(each) for each in leaves((args, kwargs)) if isinstance(each, Tensor)}

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in on_host:
            return value
        if id(value) in wrapped:
            return wrapped[id(value)]
        if value.is_conj():  # a mark on the tensor, which operations down here would not see
            value = value.resolve_conj()
        memory = memories.get(_storage(value)) or machine.allocated(value)
        memories[_storage(value)] = memory
        return DeviceTensor(value, memory, machine)

    return mapped(outer, function(*plain_args, **plain_kwargs))


def _on_host(machine: Machine, function: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operation on host memory, after checking its accesses to pinned memory."""
    if machine.active and machine.pinned:
        for argument, value in _arguments(function, args, kwargs):
            info = argument.alias_info
            if info is not None and not info.is_write:
                continue  # a view
            for each in leaves(value):
                span = machine.pinned_span(each) if isinstance(each, Tensor) else None
                if span is not None:
                    machine.order.use_by_host(function._schema.name, span, info is not None)
    return function(*args, **kwargs)


def _arguments(function: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    declared = function._schema.arguments
    named = {each.name: each for each in declared}
    return list(zip(declared, args, strict=False)) + [(named[name], value) for name, value in kwargs.items()]


def _indices(args: Any) -> list[Tensor]:
    return [each for each in leaves(args[1:2]) if isinstance(each, Tensor)]


def _spans(function: Any, args: Any, kwargs: Any) -> tuple[list[Span], list[Span]]:
    """Bytes of device memory that an operation reads, and those that it writes; a view does neither."""
    reads, writes = [], []
    only_shape = function._schema.name.removeprefix("aten::").startswith("new_") or function._schema.name.endswith(
        "_like"
    )
    for argument, value in _arguments(function, args, kwargs):
        info = argument.alias_info
        for each in leaves(value):
            if not isinstance(each, DeviceTensor) or not each.numel():
                continue
            if info is not None and info.is_write:
                writes.append(_span(each))
            elif info is None and not only_shape:
                reads.append(_span(each))
    return reads, writes


def _span(tensor: DeviceTensor) -> Span:
    return tensor.memory, *extent(tensor.inner)


def extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a CPU tensor and of the first after its last."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _refuse_mixed(machine: Machine, function: Any, given: list[Tensor], name: str) -> None:
    """Refuse tensors on both devices, as torch does; an index on the CPU is copied, and the host waits."""
    hosts = [each for each in given if not isinstance(each, DeviceTensor) and each.dim()]
    if not hosts:
        return
    if name.startswith("index"):
        machine.wait("indexing by a tensor on the CPU")
        return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {machine.device} and cpu! "
        f"(in {function})"
    )


def _to_copy(machine: Machine, source: Tensor, kwargs: Any) -> Tensor:
    """``to()`` where it copies: within the device, to it, or from it."""
    wanted = kwargs.get("device")
    there = isinstance(source, DeviceTensor) if wanted is None else wanted.type in ("meta", "cuda")
    shape_of = source.inner if isinstance(source, DeviceTensor) else source
    kind = kwargs.get("dtype") or source.dtype
    format_ = kwargs.get("memory_format") or torch.preserve_format
    plain = torch.empty_like(shape_of, dtype=kind, memory_format=format_)
    non_blocking = kwargs.get("non_blocking", False)
    if there:
        machine.bound("to()")
        target: Tensor = DeviceTensor(plain, machine.allocated(plain), machine)
    else:
        target = machine.pinned_by_torch(plain) if non_blocking else plain
    _copy(machine, target, source, non_blocking)
    return target


def _copy(machine: Machine, target: Tensor, source: Tensor, non_blocking: bool) -> None:
    """``copy_``: asynchronous within the device, and to and from pinned memory where ``non_blocking``."""
    machine.bound("a copy")
    reads, writes = [], []
    kind = "copy"
    blocks = False
    if isinstance(source, DeviceTensor):
        reads.append(_span(source))
    else:
        kind, pinned = "copy to the device", machine.pinned_span(source)
        blocks = not non_blocking
        if pinned is not None:
            reads.append(pinned)
    if isinstance(target, DeviceTensor):
        writes.append(_span(target))
    else:
        kind, pinned = "copy to the host", machine.pinned_span(target)
        blocks = not non_blocking or pinned is None
        if pinned is not None:
            writes.append(pinned)
    machine.launch(kind, reads, writes)
    if blocks:
        machine.wait(f"a blocking {kind}")
    plain = [each.inner if isinstance(each, DeviceTensor) else each for each in (target, source)]
    plain[0].copy_(plain[1])
