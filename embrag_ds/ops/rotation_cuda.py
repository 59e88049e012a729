"""CUDA kernels that rotate queries and keys, and gather their gradients rotated back; see the transformer's blocks.

torch has no fused rotation of bf16: it would copy queries and keys to fp32 and back. Here they are read and written
once. In the backward pass the three gradients of attention are put into one tensor anyway, and are rotated on the way.
The source is plain C++, so that a test can compile it for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embrag_ds.ops import cuda

_COMMON = r"""
typedef unsigned short bfloat16;  // the upper half of a float

union Bits { float value; unsigned int bits; };

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(bfloat16 x) { Bits to; to.bits = (unsigned int)x << 16; return to.value; }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, bfloat16& to) {
    Bits from; from.value = x;
    // Round to the nearest, ties to even; not a number stays so.
    to = x == x ? (from.bits + 0x7fffu + (from.bits >> 16 & 1u)) >> 16 : 0x7fffu;
}

template <typename Number> struct alignas(2 * sizeof(Number)) Pair { Number a, b; };

// A pair times cos + i sin.
template <typename Number>
__device__ inline Pair<Number> turned(Pair<Number> given, float cosine, float sine) {
    const float a = wide(given.a), b = wide(given.b);
    narrow(a * cosine - b * sine, given.a);
    narrow(a * sine + b * cosine, given.b);
    return given;
}

const int AHEAD = 8;  // pairs read before the first is written

// A thread serves one pair at one site: in all heads of queries and keys, which follow each other.
template <typename Number>
__device__ inline void rotate(Pair<Number>* qkv, const float* angles, const int tiles, const int L, const int heads,
                              const int pairs) {
    const long long b = blockIdx.x / tiles;
    const int i = blockIdx.x % tiles * blockDim.x + threadIdx.x;
    if (i >= L * pairs) return;
    const float cosine = angles[2 * i], sine = angles[2 * i + 1];
    qkv += (b * L + i / pairs) * 3 * heads * pairs + i % pairs;
    for (int first = 0; first < 2 * heads; first += AHEAD) {
        Pair<Number> seen[AHEAD];
        #pragma unroll
        for (int n = 0; n < AHEAD; ++n)
            if (first + n < 2 * heads) seen[n] = qkv[(first + n) * pairs];
        #pragma unroll
        for (int n = 0; n < AHEAD; ++n)
            if (first + n < 2 * heads) qkv[(first + n) * pairs] = turned(seen[n], cosine, sine);
    }
}

template <typename Number>
__device__ inline void gather(Pair<Number>* qkv, const Pair<Number>* query, const Pair<Number>* key,
                              const Pair<Number>* value, const float* angles, const int tiles, const int L,
                              const int heads, const int pairs) {
    const long long b = blockIdx.x / tiles;
    const int i = blockIdx.x % tiles * blockDim.x + threadIdx.x;
    if (i >= L * pairs) return;
    const float cosine = angles[2 * i], sine = -angles[2 * i + 1];
    const long long row = b * L + i / pairs, size = heads * pairs;
    qkv += row * 3 * size + i % pairs;
    query += row * size + i % pairs; key += row * size + i % pairs; value += row * size + i % pairs;
    #pragma unroll 4
    for (int n = 0; n < heads; ++n) {
        const int at = n * pairs;
        const Pair<Number> q = query[at], k = key[at], v = value[at];
        qkv[at] = turned(q, cosine, sine);
        qkv[size + at] = turned(k, cosine, sine);
        qkv[2 * size + at] = v;
    }
}
"""
# For each type of numbers. qkv [B, L, 3, heads, 2 pairs], angles [L, pairs, 2], gradients [B, L, heads, 2 pairs].
_KERNELS = r"""
extern "C" __global__ void rotate_NUMBER(
    NUMBER* qkv, const float* angles, const int tiles, const int L, const int heads, const int pairs)
{
    rotate((Pair<NUMBER>*)qkv, angles, tiles, L, heads, pairs);
}

extern "C" __global__ void gather_NUMBER(
    NUMBER* __restrict__ qkv, const NUMBER* __restrict__ query, const NUMBER* __restrict__ key,
    const NUMBER* __restrict__ value, const float* __restrict__ angles,
    const int tiles, const int L, const int heads, const int pairs)
{
    typedef const Pair<NUMBER>* Given;
    gather((Pair<NUMBER>*)qkv, (Given)query, (Given)key, (Given)value, angles, tiles, L, heads, pairs);
}
"""
_NUMBERS = {torch.float32: "float", torch.bfloat16: "bfloat16"}
SOURCE = _COMMON + "".join(_KERNELS.replace("NUMBER", number) for number in _NUMBERS.values())


def serves(qkv: Tensor) -> bool:
    """Whether the kernels can rotate ``qkv``: float32 or bfloat16 on a GPU, with CuPy."""
    return qkv.is_cuda and qkv.dtype in _NUMBERS and cuda.available()


def rotate(qkv: Tensor, angles: Tensor) -> None:
    """Rotate the queries and keys of ``qkv`` [B, L, 3, heads, head_dims], contiguous, in place.

    ``angles`` float32 [L, head_dims / 2, 2] hold a cosine and a sine for every pair of the last dimension.
    """
    _run("rotate", qkv, [qkv, angles])


def rotated_back(query: Tensor, key: Tensor, value: Tensor, angles: Tensor) -> Tensor:
    """Gradient [B, L, 3, heads, head_dims] of the projection, from those of its parts, [B, L, heads, head_dims] each.

    ``query`` and ``key`` are the gradients of the rotated queries and keys; ``angles`` as for :func:`rotate`.
    """
    rows, sites, heads, width = query.shape
    qkv = query.new_empty(rows, sites, 3, heads, width)
    _run("gather", qkv, [qkv, *(each.contiguous() for each in (query, key, value)), angles])
    return qkv


def _run(name: str, qkv: Tensor, tensors: list[Tensor]) -> None:
    _, sites, _, heads, width = qkv.shape
    pairs = width // 2
    kernel = cuda.kernel(SOURCE, f"{name}_{_NUMBERS[qkv.dtype]}")
    kernel.launch_tiled(sites * pairs, tensors, (sites, heads, pairs))
