"""CUDA kernels on torch tensors: compiled and launched by CuPy, on torch's current stream."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embrag_ds.errors import UserError

TILE_THREADS = 128
"""Threads of a block of a tiled kernel."""
_KIND = "cuda"
_TYPES = {
    "unsigned char*": torch.uint8,
    "short*": torch.int16,
    "long long*": torch.int64,
    "float*": torch.float32,
    "bfloat16*": torch.bfloat16,
    "int": None,
}
"""Tensors that a kernel takes as parameters of these types, and None for a plain number."""


@cache
def import_fault() -> str | None:
    """What goes wrong when CuPy, which compiles and launches the kernels, is imported; None if nothing does."""
    try:
        import cupy  # noqa: F401
    except Exception as fault:  # a CuPy for another CUDA raises more than ImportError
        return f"{type(fault).__name__}: {fault}".splitlines()[0]
    return None


def available() -> bool:
    """Whether CuPy, which compiles and launches the kernels, can be imported."""
    return import_fault() is None


def require_kernels(device: torch.device) -> None:
    """Raise UserError if ``device`` is a CUDA device and CuPy cannot be imported.

    Without the kernels, the copying model would launch some operations per typed site, and take up to a second a batch.
    """
    fault = import_fault() if device.type == _KIND else None
    if fault is not None:
        raise UserError(
            f"{device}: the CUDA kernels need CuPy, which cannot be imported ({fault}); "
            "install the extra 'gpu' or 'gpu-cu12', or run on the CPU (DS_ACCELERATOR=cpu in training, --device cpu in "
            "imputation)"
        )


class Kernel:
    """A CUDA kernel, which CuPy compiles at its first launch on a device.

    Its parameters are pointers to the elements of tensors, and after them 32-bit integers.
    """

    def __init__(self, source: str, name: str, options: tuple[str, ...] = ()):
        """``source`` is in CUDA C++ and defines the kernel ``name``; ``options`` are the compiler's."""
        import cupy

        self._name = name
        self._parameters = [each for each in _parameters(source, name) if each[1] is not None]
        self._compiled = cupy.RawKernel(source, name, options=options)

    def launch(self, blocks: int, threads: int, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """Launch the kernel asynchronously on the current torch stream of the tensors' device.

        The grid has ``blocks`` blocks of ``threads`` threads; without a block nothing is launched. The kernel gets the
        addresses of ``tensors``, then ``sizes``. Raises ValueError for a tensor that is not contiguous, of another
        type than the kernel's parameter, or not on the CUDA device of the first one.
        """
        import cupy

        device = tensors[0].device
        for (name, dtype), each in zip(self._parameters, tensors, strict=True):
            if each.dtype != dtype or each.device != device or device.type != _KIND or not each.is_contiguous():
                layout = "contiguous" if each.is_contiguous() else "not contiguous"
                raise ValueError(
                    f"{self._name}: {name} is {each.dtype} on {each.device} and {layout}; "
                    f"the kernel takes {dtype}, contiguous, on one {_KIND} device"
                )
        if not blocks:
            return
        address = torch.cuda.current_stream(device).cuda_stream
        with cupy.cuda.Device(device.index), _stream(address, device.index), kept_locale():
            addresses = [np.uintp(each.data_ptr()) for each in tensors]
            self._compiled((blocks,), (threads,), (*addresses, *map(np.int32, sizes)))

    def launch_tiled(self, over: int, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """Launch the kernel with one thread for every row of ``tensors[0]`` and every index below ``over``.

        Blocks have :data:`TILE_THREADS` threads and serve one row. After the tensors, the kernel receives the number
        of blocks per row and then ``sizes``.
        """
        tiles = -(-over // TILE_THREADS)
        self.launch(len(tensors[0]) * tiles, TILE_THREADS, tensors, (tiles, *sizes))


@cache
def kernel(source: str, name: str, options: tuple[str, ...] = ()) -> Kernel:
    """The :class:`Kernel` of these arguments, made once."""
    return Kernel(source, name, options)


def _parameters(source: str, name: str) -> list[tuple[str, torch.dtype | None]]:
    """Name of every parameter of the kernel ``name``, and type of its tensor or None for a number."""
    bare = re.sub(r"//[^\n]*", "", source)
    found = re.search(rf"__global__[^;{{]*\b{name}\(([^)]*)\)", bare)
    assert found is not None, name
    declared = (re.sub(r"\bconst\b|\b__restrict__\b", " ", each).split() for each in found[1].split(","))
    return [(words[-1], _TYPES[" ".join(words[:-1])]) for words in declared]


class _Pointer:
    """A stream of torch's by its address, with the CUDA stream protocol, which older classes of torch's lack."""

    def __init__(self, address: int):
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


@cache
def _stream(address: int, device: int) -> Any:
    """CuPy's view of the torch stream at ``address`` of the current ``device``; torch keeps its streams for ever."""
    import cupy

    return cupy.cuda.Stream.from_external(_Pointer(address))


_libc = ctypes.CDLL(None)
_libc.uselocale.argtypes = (ctypes.c_void_p,)
_libc.uselocale.restype = ctypes.c_void_p


@contextmanager
def kept_locale() -> Iterator[None]:
    """Context that restores the calling thread's locale of the C library when it ends.

    NVIDIA's run-time compiler before CUDA 12.6.2 leaves that thread in the locale ``C``, and Python then opens text
    files as ASCII (NVIDIA/cuda-python issue 29). CuPy compiles a kernel at its first launch on a device.
    """
    kept = _libc.uselocale(None)
    try:
        yield
    finally:
        _libc.uselocale(kept)
