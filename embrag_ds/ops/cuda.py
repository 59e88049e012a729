"""Launching CUDA kernels through CuPy on torch tensors, on torch's current stream."""

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
"""Threads of a block of a tiled kernel."""


def launch_tiled(kernel: Any, over: int, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Launch a kernel with one thread for every row of ``tensors[0]`` and every index below ``over``.

    Blocks have :data:`TILE_THREADS` threads and serve one row. After the tensors, the kernel receives the number of
    blocks per row and then ``sizes``, as 32-bit integers.
    """
    tiles = -(-over // TILE_THREADS)
    launch(kernel, (len(tensors[0]) * tiles,), (TILE_THREADS,), tensors, (tiles, *sizes))


def available() -> bool:
    """Whether CuPy, which compiles and launches the kernels, is installed."""
    return importlib.util.find_spec("cupy") is not None


def launch(
    kernel: Any, blocks: tuple[int, ...], threads: tuple[int, ...], tensors: Sequence[Tensor], sizes: Sequence[int]
) -> None:
    """Launch a CuPy kernel asynchronously on the current torch stream of the tensors' device.

    ``blocks`` and ``threads`` are the shape of the grid and of a block. ``tensors``, contiguous and on one CUDA device,
    are passed without a copy, then ``sizes`` as 32-bit integers.
    """
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
    """Context that restores the calling thread's locale of the C library when it ends.

    NVIDIA's run-time compiler before CUDA 12.6.2 leaves that thread in the locale ``C``, and Python then opens text
    files as ASCII (NVIDIA/cuda-python issue 29). CuPy compiles a kernel at its first launch on a device.
    """
    kept = _libc.uselocale(None)
    try:
        yield
    finally:
        _libc.uselocale(kept)
