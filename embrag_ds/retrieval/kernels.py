"""A CUDA kernel for weighted Hamming distances on bit-packed alleles, launched through CuPy.

Alleles stay packed, site by site, as the panel holds them. A thread owns one byte's eight haplotypes and
one query: at every typed site it XORs the byte with the query's allele spread over eight bits, and adds the
site's weight to the distances whose bit is set. Sites the query hides have weight 0 (the AND with its typed mask)
and are skipped. The source is plain C, so that a test can compile it for the host.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

SOURCE = r"""
extern "C" __global__ void mismatch_distances(
    const unsigned char* reference,  // [T, W], bit j of byte w is haplotype 8 w + j
    const unsigned char* query,      // [B, T], alleles
    const float* weight,             // [B, T], 0 where the query hides the site
    float* distance,                 // [B, H]
    const int sites, const int bytes, const int haplotypes)
{
    const int byte = blockIdx.x * blockDim.x + threadIdx.x;
    const int b = blockIdx.y;
    if (byte >= bytes) return;
    float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
    for (int t = 0; t < sites; ++t) {
        const float w = weight[(long long)b * sites + t];
        if (w == 0.f) continue;
        const unsigned spread = query[(long long)b * sites + t] ? 0xFFu : 0u;
        const unsigned differs = reference[(long long)t * bytes + byte] ^ spread;
        #pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += ((differs >> j) & 1u) ? w : 0.f;
    }
    for (int j = 0; j < 8; ++j) {
        const int haplotype = 8 * byte + j;
        if (haplotype < haplotypes) distance[(long long)b * haplotypes + haplotype] = sum[j];
    }
}
"""
_THREADS = 128


@cache
def _kernel() -> Any:
    import cupy

    return cupy.RawKernel(SOURCE, "mismatch_distances")


def mismatch_distances(tokens: Tensor, weights: Tensor, packed: Tensor, haplotypes: int) -> Tensor:
    """Distances float32 [B, H] of queries ``tokens`` int64 [B, T] from ``packed`` uint8 [T, ceil(H / 8)].

    ``weights`` float32 [B, T] are 0 where a query hides the site.
    """
    queries, sites = tokens.shape
    distance = torch.empty(queries, haplotypes, dtype=torch.float32, device=packed.device)
    arguments = [packed.contiguous(), (tokens == 1).to(torch.uint8), weights.contiguous(), distance]
    width = packed.shape[1]
    launch(_kernel(), (-(-width // _THREADS), queries), (_THREADS,), arguments, (sites, width, haplotypes))
    return distance


def launch_tiled(kernel: Any, over: int, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Run a kernel with a thread for each of the numbers below ``over``, for each row of the first tensor.

    The kernel is told how many blocks a row has, and then ``sizes``.
    """
    tiles = -(-over // _THREADS)
    launch(kernel, (len(tensors[0]) * tiles,), (_THREADS,), tensors, (tiles, *sizes))


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
