"""CUDA kernels of the Li and Stephens copying model and its adjoint, launched through CuPy.

One block computes one chain. Its threads share the K neighbours, keep their states in registers and proceed over the
typed sites in step. Synchronisation takes longer than arithmetic, so all sums of a site are reduced together, by
shuffles and one barrier. Sums that no later term of the site uses are reduced with those of the next site. The
recursions are those of :mod:`embrag_ds.ops.li_stephens_numba`, term by term. The source also compiles for the host, and
the tests run it there without a GPU. For the letters see :mod:`embrag_ds.ops.li_stephens`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embrag_ds.ops.cuda import kernel

SOURCE = r"""
#ifndef WARP
#define WARP 32
#endif
#define MOST_SUMS 4
#define SCRATCH (2 * MOST_SUMS * 32)  // two rows, used in turns, of MOST_SUMS sums of at most 32 warps
// A block has THREADS threads, which limits the registers of each. A thread has PER neighbours, numbered by i.
#define EACH_NEIGHBOUR \
    _Pragma("unroll") for (int i = 0, k = threadIdx.x; i < PER; ++i, k += blockDim.x) if (k < K)

// Sums over the block of every thread's values, returned to all threads. A row of scratch is written again two calls
// later, after a barrier that no thread passes before all have read it.
template <int N>
__device__ void block_sums(float (&sum)[N], float* scratch, int& turn)
{
    const int warps = blockDim.x / WARP;
    turn ^= 1;
    float* row = scratch + turn * MOST_SUMS * 32;
    _Pragma("unroll")
    for (int n = 0; n < N; ++n) {
        for (int distance = WARP / 2; distance > 0; distance /= 2)
            sum[n] += __shfl_xor_sync(0xffffffffu, sum[n], distance);
        if (threadIdx.x % WARP == 0) row[n * warps + threadIdx.x / WARP] = sum[n];
    }
    __syncthreads();
    _Pragma("unroll")
    for (int n = 0; n < N; ++n) {
        sum[n] = 0.f;
        for (int warp = 0; warp < warps; ++warp) sum[n] += row[n * warps + warp];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) copying_forward_backward(
    const unsigned char* mismatch,  // [B, T, K]
    const float* mismatch_ratio,    // [C, T], emission factor of a mismatch
    const float* recombination,     // [C, T]
    const float* prior,             // [B, K]
    float* alpha,                   // [C, last, K]: the posterior does not depend on later ones
    float* beta,                    // [C, T - first, K], from site first on
    float* posterior,               // [C, M, K]
    const int B, const int T, const int K, const int first, const int last)
{
    __shared__ float scratch[SCRATCH];
    const long long c = blockIdx.x, b = c % B;
    mismatch += b * T * K; prior += b * K;
    alpha += c * last * K; beta += c * (T - first) * K; mismatch_ratio += c * T; recombination += c * T;
    posterior += c * (last - first) * K;
    float weight[PER], state[PER], scale = 0.f;
    int turn = 0;
    EACH_NEIGHBOUR {
        weight[i] = prior[k];
        state[i] = 0.f;
    }
    for (int t = 0; t < last; ++t) {
        const float stay = t ? (1.f - recombination[t]) * scale : 0.f, jump = t ? recombination[t] : 1.f;
        const float miss = mismatch_ratio[t];
        const long long row = (long long)t * K;
        float sum[1] = {0.f};
        EACH_NEIGHBOUR {
            state[i] = (stay * state[i] + jump * weight[i]) * (mismatch[row + k] ? miss : 1.f);
            sum[0] += state[i];
        }
        block_sums(sum, scratch, turn);
        scale = 1.f / sum[0];
        EACH_NEIGHBOUR alpha[row + k] = state[i] * scale;
    }
    EACH_NEIGHBOUR state[i] = 1.f;
    for (int t = T - 1; t >= first; --t) {
        const float miss = mismatch_ratio[t];
        const long long row = (long long)t * K, out = (long long)(t - first) * K;
        const bool wanted = t < last;
        float sum[2] = {0.f, 0.f}, both[PER];
        EACH_NEIGHBOUR {
            beta[out + k] = state[i];
            both[i] = wanted ? alpha[row + k] * state[i] : 0.f;
            state[i] *= mismatch[row + k] ? miss : 1.f;
            sum[0] += state[i] * weight[i];
            sum[1] += both[i];
        }
        block_sums(sum, scratch, turn);
        if (wanted) {
            EACH_NEIGHBOUR posterior[out + k] = both[i] / sum[1];
        }
        const float stay = (1.f - recombination[t]) / sum[0], jump = recombination[t];
        EACH_NEIGHBOUR state[i] = stay * state[i] + jump;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) copying_adjoint(
    const unsigned char* mismatch, const float* mismatch_ratio, const float* recombination, const float* prior,
    const float* alpha, const float* beta, const float* posterior,
    const float* gradient,          // [C, M, K]
    float* moments,                 // [C, M, 2], scratch
    float* ratio_gradient,          // [C, T], zero at the start
    float* recombination_gradient,  // [C, T], zero at the start
    float* prior_gradient,          // [C, K]
    const int B, const int T, const int K, const int first, const int last)
{
    __shared__ float scratch[SCRATCH];
    const long long c = blockIdx.x, b = c % B;
    mismatch += b * T * K; prior += b * K;
    alpha += c * last * K; beta += c * (T - first) * K; mismatch_ratio += c * T; recombination += c * T;
    ratio_gradient += c * T; recombination_gradient += c * T; prior_gradient += c * K;
    posterior += c * (last - first) * K; gradient += c * (last - first) * K; moments += c * (last - first) * 2;
    float weight[PER], weight_gradient[PER], chain[PER], seen[PER];
    int turn = 0;
    EACH_NEIGHBOUR {
        weight[i] = prior[k];
        weight_gradient[i] = 0.f;
    }
    // d loss / d (alpha beta) at one of the M sites is (gradient - mean) / total.
    for (int t = first; t < last; ++t) {
        const long long row = (long long)t * K, out = (long long)(t - first) * K;
        float sum[2] = {0.f, 0.f};
        EACH_NEIGHBOUR {
            sum[0] += alpha[row + k] * beta[out + k];
            sum[1] += gradient[out + k] * posterior[out + k];
        }
        block_sums(sum, scratch, turn);
        if (threadIdx.x == 0) {
            moments[2 * (t - first)] = 1.f / sum[0];
            moments[2 * (t - first) + 1] = sum[1];
        }
    }
    __syncthreads();
#define DIRECT(t, other) ((gradient[(long long)((t) - first) * K + k] - moments[2 * ((t) - first) + 1]) \
                          * moments[2 * ((t) - first)] * (other))
    // The recursion of beta ran down from T - 1, so its adjoint runs up; chain is the gradient of beta at t - 1.
    EACH_NEIGHBOUR chain[i] = DIRECT(first, alpha[(long long)first * K + k]);
    float missed = 0.f, moved = 0.f;
    for (int t = first + 1; t < T; ++t) {
        const float stay = 1.f - recombination[t], miss = mismatch_ratio[t];
        const long long row = (long long)t * K, after = (long long)(t - first) * K;
        float sum[4] = {0.f, 0.f, 0.f, missed};
        EACH_NEIGHBOUR {
            seen[i] = beta[after + k] * (mismatch[row + k] ? miss : 1.f);
            sum[0] += seen[i] * weight[i];
            sum[1] += chain[i] * seen[i];
            sum[2] += chain[i];
        }
        block_sums(sum, scratch, turn);
        const float scale = stay / sum[0], weighed = sum[1] / sum[0];
        if (threadIdx.x == 0) {
            recombination_gradient[t] += sum[2] - weighed;
            ratio_gradient[t - 1] += sum[3];
        }
        missed = 0.f;
        EACH_NEIGHBOUR {
            const float state_gradient = scale * (chain[i] - weighed * weight[i]);
            weight_gradient[i] -= scale * weighed * seen[i];
            if (mismatch[row + k]) missed += state_gradient * beta[after + k];
            chain[i] = state_gradient * (mismatch[row + k] ? miss : 1.f);
            if (t < last) chain[i] += DIRECT(t, alpha[row + k]);
        }
    }
    {
        float sum[1] = {missed};
        block_sums(sum, scratch, turn);
        if (threadIdx.x == 0) ratio_gradient[T - 1] += sum[0];
    }
    // The recursion of alpha ran up from 0, so its adjoint runs down; chain is the gradient of alpha at t.
    EACH_NEIGHBOUR chain[i] = DIRECT(last - 1, beta[(long long)(last - 1 - first) * K + k]);
    missed = 0.f;
    for (int t = last - 1; t >= 0; --t) {
        const float stay = t ? 1.f - recombination[t] : 0.f, jump = t ? recombination[t] : 1.f;
        const float miss = mismatch_ratio[t];
        const long long row = (long long)t * K;
        float sum[4] = {0.f, 0.f, missed, moved};
        EACH_NEIGHBOUR {
            seen[i] = jump * weight[i] + (t ? stay * alpha[row - K + k] : 0.f);
            sum[0] += seen[i] * (mismatch[row + k] ? miss : 1.f);
            sum[1] += chain[i] * alpha[row + k];
        }
        block_sums(sum, scratch, turn);
        const float scale = 1.f / sum[0], mean = sum[1];
        if (threadIdx.x == 0 && t + 1 < last) {
            ratio_gradient[t + 1] += sum[2];
            recombination_gradient[t + 1] += sum[3];
        }
        missed = moved = 0.f;
        EACH_NEIGHBOUR {
            float state_gradient = (chain[i] - mean) * scale;
            if (mismatch[row + k]) missed += state_gradient * seen[i];
            state_gradient *= mismatch[row + k] ? miss : 1.f;
            weight_gradient[i] += jump * state_gradient;
            if (t) {
                moved += state_gradient * (weight[i] - alpha[row - K + k]);
                chain[i] = stay * state_gradient;
                if (t > first) chain[i] += DIRECT(t - 1, beta[(long long)(t - 1 - first) * K + k]);
            }
        }
    }
    float sum[1] = {missed};
    block_sums(sum, scratch, turn);
    if (threadIdx.x == 0) ratio_gradient[0] += sum[0];
    EACH_NEIGHBOUR prior_gradient[k] = weight_gradient[i];
}

// One thread per neighbour and query haplotype; the threads are independent.
extern "C" __global__ void match_lengths(
    const unsigned char* mismatch,  // [B, T, K]
    const float* position,          // [B, T]
    const float* bounds,            // [B, 2], positions of a row's first and last typed site
    float* lengths,                 // [B, M, K]
    const int tiles, const int T, const int K, const int first, const int last)
{
    const long long b = blockIdx.x / tiles;
    const int k = blockIdx.x % tiles * blockDim.x + threadIdx.x;
    if (k >= K) return;
    mismatch += b * T * K + k; position += b * T; lengths += b * (last - first) * K + k;
    float bound = bounds[2 * b];
    for (int t = 0; t < last; ++t) {
        if (mismatch[(long long)t * K]) bound = position[t];
        if (t >= first) lengths[(long long)(t - first) * K] = bound;
    }
    bound = bounds[2 * b + 1];
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


def block_shape(neighbours: int) -> tuple[int, int]:
    """Number of threads of a block and of neighbours per thread, for K ``neighbours``.

    Where K is large a thread has several neighbours, because fewer threads synchronise faster.
    """
    per = 1 if neighbours <= 256 else max(4, -(-neighbours // _MOST_THREADS))
    return _WARP * -(-neighbours // (_WARP * per)), per


def compile_options(neighbours: int) -> tuple[str, ...]:
    """Compiler options of the kernels for K ``neighbours``."""
    threads, per = block_shape(neighbours)
    return (f"-DTHREADS={threads}", f"-DPER={per}")


def _run(name: str, tensors: list[Tensor], first: int, last: int) -> None:
    queries, sites, neighbours = tensors[0].shape
    threads, _ = block_shape(neighbours)
    sizes = (queries, sites, neighbours, first, last)
    kernel(SOURCE, name, compile_options(neighbours)).launch(len(tensors[1]), threads, tensors, sizes)


class CudaPosterior(torch.autograd.Function):
    """Posterior copying probabilities float32 [C, M, K] on a GPU, differentiable in all but ``mismatch``.

    Arguments: mismatch bool [B, T, K]; mismatch_ratio ``exp(-mismatch_nats)`` and recombination float32 [C, T]; prior
    float32 [B, K]; the M sites from ``first`` to ``last`` (exclusive). CuPy must be installed.
    """

    @staticmethod
    def forward(
        ctx: Any, mismatch: Tensor, mismatch_ratio: Tensor, recombination: Tensor, prior: Tensor, first: int, last: int
    ) -> Tensor:
        numbers = [each.detach().float().contiguous() for each in (mismatch_ratio, recombination, prior)]
        given = [mismatch.contiguous().view(torch.uint8), *numbers]
        _, sites, neighbours = mismatch.shape
        alpha, beta, posterior = (
            torch.empty(len(mismatch_ratio), length, neighbours, device=mismatch.device)
            for length in (last, sites - first, last - first)
        )
        _run("copying_forward_backward", [*given, alpha, beta, posterior], first, last)
        ctx.save_for_backward(*given, alpha, beta, posterior)
        ctx.bounds = (first, last)
        return posterior

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None, None]:
        saved = list(ctx.saved_tensors)
        mismatch_ratio, prior, posterior = saved[1], saved[3], saved[6]
        moments = torch.empty(*posterior.shape[:2], 2, device=posterior.device)
        found_gradients = [torch.zeros_like(mismatch_ratio), torch.zeros_like(mismatch_ratio)]
        found_gradients.append(prior.new_empty(len(mismatch_ratio), prior.shape[1]))
        _run("copying_adjoint", [*saved, gradients[0].float().contiguous(), moments, *found_gradients], *ctx.bounds)
        return (
            None,
            found_gradients[0],
            found_gradients[1],
            found_gradients[2].unflatten(0, (-1, len(prior))).sum(0),
            None,
            None,
        )


def cuda_match_lengths(mismatch: Tensor, position: Tensor, bounds: Tensor, first: int, last: int) -> Tensor:
    """Match lengths in cM, float32 [B, M, K], on a GPU; see :func:`embrag_ds.ops.li_stephens.match_lengths`.

    ``mismatch`` bool [B, T, K]; ``position`` [B, T] in cM; ``bounds`` [B, 2], the positions of a row's first and last
    typed site. The M sites are those from ``first`` to ``last`` (exclusive).
    """
    queries, sites, neighbours = mismatch.shape
    lengths = torch.empty(queries, last - first, neighbours, device=mismatch.device)
    given = [mismatch.contiguous().view(torch.uint8), position.float().contiguous(), bounds.float().contiguous()]
    compiled = kernel(SOURCE, "match_lengths", compile_options(neighbours))
    compiled.launch_tiled(neighbours, [*given, lengths], (sites, neighbours, first, last))
    return lengths
