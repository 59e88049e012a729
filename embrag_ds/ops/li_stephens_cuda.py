"""CUDA kernels of the Li and Stephens copying model and its adjoint, launched through CuPy.

A chain's sites follow one another, so the time of a site counts, and most of it is the sum over neighbours: five
shuffles among the 32 lanes of a warp, each of which waits for the one before. Therefore:

* The two recursions of a chain, and the two of its adjoint, run at once, each as a block of its own.
* A warp holds the K neighbours in registers, several a lane. Only above 512 a block has more warps, and a barrier.
* Rows are read several sites before their use, into registers.
* Two sums proceed together. The sum S over neighbours k of the unnormalised state u at site t follows from that of the
  site before, ``S[t] = stay sum(e[k] u[k]) + jump S[t-1] sum(e[k] w[k])``, with emission factors e and prior w. The
  first sum needs u at the site before, but not S there. So it starts while S is still being added up: a sum's second
  half runs beside the first half of the next. The adjoint's recursions are linear as well, and have the same form.
* The prior stays in registers, and is read again only where the place changes. Its gradient is written there, too.

Sums over neighbours that do not depend on the recursion, and all that is local to a site, are left to light kernels
with a warp for every row. They also pack mismatches into bits and pad rows, so that recursions read whole vectors. The
source also compiles for the host, and the tests run it there without a GPU. For the letters see
:mod:`embrag_ds.ops.li_stephens`; the recursions are those of :mod:`embrag_ds.ops.li_stephens_numba`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from embrag_ds.errors import UserError
from embrag_ds.ops.cuda import Kernel, kernel
from embrag_ds.ops.sources import li_stephens_recursions, li_stephens_rows

SOURCE = li_stephens_rows.SOURCE + li_stephens_recursions.SOURCE
LENGTHS_SOURCE = r"""
// One thread per neighbour and query haplotype; the threads are independent.
extern "C" __global__ void match_lengths(
    const unsigned char* __restrict__ mismatch,  // [B, T, K]
    const float* __restrict__ position,          // [B, T]
    const float* __restrict__ bounds,            // [B, 2], positions of a row's first and last typed site
    const long long* __restrict__ firsts,        // [B], first of a row's M sites
    float* __restrict__ lengths,                 // [B, M, K]
    const int tiles, const int T, const int K, const int M)
{
    const long long b = blockIdx.x / tiles;
    const int k = blockIdx.x % tiles * blockDim.x + threadIdx.x;
    if (k >= K) return;
    const int first = firsts[b], last = first + M;
    mismatch += b * T * K + k; position += b * T; lengths += b * M * K + k;
    float bound = bounds[2 * b];
    _Pragma("unroll 16")  // so that many loads are under way at once
    for (int t = 0; t < last; ++t) {
        if (mismatch[(long long)t * K]) bound = position[t];
        if (t >= first) lengths[(long long)(t - first) * K] = bound;
    }
    bound = bounds[2 * b + 1];
    _Pragma("unroll 16")
    for (int t = T - 1; t >= first; --t) {
        if (mismatch[(long long)t * K]) bound = position[t];
        if (t < last) {
            float* length = lengths + (long long)(t - first) * K;
            *length = bound > *length ? bound - *length : 0.f;
        }
    }
}
"""
_WARP = 32
_MOST_THREADS = 1024
_MOST_PER_THREAD = 16
_ROWS_OF_BLOCK = 4
MOST_NEIGHBOURS = _MOST_THREADS * _MOST_PER_THREAD
"""Most neighbours that a block of the recursions holds in its registers."""


def block_shape(neighbours: int) -> tuple[int, int]:
    """Number of threads of a chain's block and of neighbours per thread, for K ``neighbours``.

    A thread has at most 16. Raises UserError if the largest block has no place for all.
    """
    warps = -(-neighbours // (_WARP * _MOST_PER_THREAD))
    if warps * _WARP > _MOST_THREADS:
        raise UserError(
            f"embrag.retrieval.k={neighbours}: on a GPU the copying model takes at most {MOST_NEIGHBOURS} neighbours"
        )
    per = -(-neighbours // (_WARP * warps))
    return _WARP * warps, per if per <= 2 else 4 * -(-per // 4)


def compile_options(neighbours: int) -> tuple[str, ...]:
    """Compiler options of the kernels for K ``neighbours``."""
    threads, per = block_shape(neighbours)
    ahead = 1 if threads > 96 else 8 if per <= 4 else 32 // per
    return (f"-DTHREADS={threads}", f"-DPER={per}", f"-DAHEAD={ahead}")


class CudaPosterior(torch.autograd.Function):
    """Posterior copying probabilities float32 [C, M, K] on a GPU, differentiable in all but ``mismatch``.

    Arguments: mismatch bool [B, T, K]; mismatch_ratio ``exp(-mismatch_nats)`` and recombination float32 [C, T]; prior
    float32 [B, G, K]; place int64 [B, T]; first (int64 [B]), count, start and stop of
    :class:`embrag_ds.ops.li_stephens.Near`. CuPy must be installed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mismatch: Tensor,
        mismatch_ratio: Tensor,
        recombination: Tensor,
        prior: Tensor,
        place: Tensor,
        first: Tensor,
        count: int,
        start: int,
        stop: int,
    ) -> Tensor:
        numbers = [each.detach().float().contiguous() for each in (mismatch_ratio, recombination, prior)]
        (queries, sites, neighbours), chains, places = mismatch.shape, len(mismatch_ratio), prior.shape[1]
        place = place.contiguous()
        threads, per = block_shape(neighbours)
        device, row = mismatch.device, threads * per
        differs = torch.empty(queries, sites, threads, dtype=torch.int16, device=device)
        weight = torch.empty(queries, sites, 2, device=device)
        packed = [mismatch.contiguous().view(torch.uint8), numbers[2], place, differs, weight]
        _launch_rows("copying_pack", neighbours, queries * sites, packed, (queries, sites, neighbours, places))
        alpha, beta, posterior, alpha_factors, beta_factors = (
            torch.empty(chains, *shape, device=device)
            for shape in (
                (stop, row),
                (sites - start, row),
                (count, neighbours),
                (stop, 2),
                (sites - start, 2),
            )
        )
        passes = [alpha, beta, alpha_factors, beta_factors]
        sizes = (queries, sites, neighbours, count, start, stop)
        given = [differs, weight, *numbers, place, first, *passes]
        _kernel("copying_passes", neighbours).launch(2 * chains, threads, given, (*sizes, places))
        product = [alpha, beta, first, posterior]
        _launch_rows("copying_posterior", neighbours, chains * count, product, (chains, *sizes))
        ctx.save_for_backward(differs, *numbers, place, first, *passes, posterior)
        ctx.sizes, ctx.places = sizes, places
        return posterior

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *given, posterior = ctx.saved_tensors
        first, alpha, beta = given[5:8]
        queries, sites, neighbours, count, *_ = ctx.sizes
        chains, device = len(alpha), alpha.device
        direct = [torch.empty(chains, count, alpha.shape[2], device=device) for _ in range(2)]
        read = [alpha, beta, first, posterior, gradients[0].float().contiguous()]
        _launch_rows("copying_direct", neighbours, chains * count, [*read, *direct], (chains, *ctx.sizes))
        shapes = (sites,), (sites,), (ctx.places, neighbours)  # of either recursion, filled with zeros at once
        zeros = torch.zeros(2 * chains * sum(map(math.prod, shapes)), device=device)
        parts = zeros.split([2 * chains * math.prod(shape) for shape in shapes])
        found = [part.view(chains, 2, *shape) for part, shape in zip(parts, shapes, strict=True)]
        threads, _ = block_shape(neighbours)
        sizes = (*ctx.sizes, ctx.places)
        _kernel("copying_adjoint", neighbours).launch(2 * chains, threads, [*given, *direct, *found], sizes)
        of_ratio, of_recombination, of_prior = found
        of_queries = of_prior.unflatten(0, (-1, queries)).sum((0, 2))
        return None, of_ratio.sum(1), of_recombination.sum(1), of_queries, None, None, None, None, None


def _kernel(name: str, neighbours: int) -> Kernel:
    return kernel(SOURCE, name, compile_options(neighbours))


def _launch_rows(name: str, neighbours: int, rows: int, tensors: list[Tensor], sizes: tuple[int, ...]) -> None:
    """Launch a kernel with a warp for each of ``rows``."""
    _kernel(name, neighbours).launch(-(-rows // _ROWS_OF_BLOCK), _ROWS_OF_BLOCK * _WARP, tensors, sizes)


def cuda_match_lengths(mismatch: Tensor, position: Tensor, bounds: Tensor, first: Tensor, count: int) -> Tensor:
    """Match lengths in cM, float32 [B, M, K], on a GPU; see :func:`embrag_ds.ops.li_stephens.match_lengths`.

    ``mismatch`` bool [B, T, K]; ``position`` [B, T] in cM; ``bounds`` [B, 2], the positions of a row's first and last
    typed site. A row's M sites are ``count`` from ``first`` on, int64 [B].
    """
    queries, sites, neighbours = mismatch.shape
    lengths = torch.empty(queries, count, neighbours, device=mismatch.device)
    given = [mismatch.contiguous().view(torch.uint8), position.float().contiguous(), bounds.float().contiguous()]
    sizes = (sites, neighbours, count)
    kernel(LENGTHS_SOURCE, "match_lengths").launch_tiled(neighbours, [*given, first, lengths], sizes)
    return lengths
