"""CUDA kernels compiled and launched through CuPy, on torch's tensors and current stream."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

TILE_THREADS = 128


def launch_tiled(kernel: Any, over: int, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Run a kernel with a thread for each of the numbers below ``over``, for each row of the first tensor.

    The kernel is told how many blocks a row has, and then ``sizes``.
    """
    tiles = -(-over // TILE_THREADS)
    launch(kernel, (len(tensors[0]) * tiles,), (TILE_THREADS,), tensors, (tiles, *sizes))


def available() -> bool:
    """Whether CuPy, which compiles and launches kernels, is installed."""
    return importlib.util.find_spec("cupy") is not None


def launch(
    kernel: Any, blocks: tuple[int, ...], threads: tuple[int, ...], tensors: Sequence[Tensor], sizes: Sequence[int]
) -> None:
    """Run a CuPy kernel on contiguous CUDA tensors, by reference, and 32-bit numbers, on torch's current stream."""
    import cupy

    device = tensors[0].device
    stream = torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream), kept_locale():
        arrays = [cupy.from_dlpack(each) for each in tensors]
        kernel(blocks, threads, (*arrays, *map(np.int32, sizes)))


_libc = ctypes.CDLL(None)
_libc.uselocale.argtypes = (ctypes.c_void_p,)
_libc.uselocale.restype = ctypes.c_void_p


@contextmanager
def kept_locale() -> Iterator[None]:
    """NVIDIA's compiler before CUDA 12.6.2 leaves its thread in the C locale, and Python then takes files for ASCII.

    See NVIDIA/cuda-python issue 29. A kernel is compiled when it is first launched on a device.
    """
    kept = _libc.uselocale(None)
    try:
        yield
    finally:
        _libc.uselocale(kept)
