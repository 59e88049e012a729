"""CUDA kernels of the copying model: :mod:`embrag_ds.retrieval.compiled` for GPUs, launched through CuPy.

One block per query haplotype; its threads share the K neighbours and walk the typed sites together, so that a
site costs the block's sums and nothing else. The recursions are those of the compiled loops, term by
term. The source is plain C, so that a test can compile it for the host.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from embrag_ds.retrieval.kernels import launch

SOURCE = r"""
#define EACH_NEIGHBOUR for (int k = threadIdx.x; k < K; k += blockDim.x)

// The sum of every thread's value, the same for all; blockDim.x is a power of two.
__device__ float block_sum(float value, float* scratch)
{
    scratch[threadIdx.x] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
        __syncthreads();
    }
    const float total = scratch[0];
    __syncthreads();
    return total;
}

extern "C" __global__ void copying_forward_backward(
    const unsigned char* mismatch,  // [B, T, K]
    const float* likelihood,        // [B, T], of a mismatch
    const float* switching,         // [B, T]
    const float* prior,             // [B, K]
    float* alpha,                   // [B, T, K]
    float* beta,                    // [B, T, K]
    float* posterior,               // [B, N, K]
    const int T, const int K, const int first, const int last)
{
    __shared__ float scratch[1024];
    const long long b = blockIdx.x;
    mismatch += b * T * K; alpha += b * T * K; beta += b * T * K;
    likelihood += b * T; switching += b * T; prior += b * K;
    posterior += b * (last - first) * K;
    for (int t = 0; t < T; ++t) {
        const float stay = t ? 1.f - switching[t] : 0.f, jump = t ? switching[t] : 1.f, miss = likelihood[t];
        const long long row = (long long)t * K;
        float total = 0.f;
        EACH_NEIGHBOUR {
            float moved = jump * prior[k];
            if (t) moved += stay * alpha[row - K + k];
            moved *= mismatch[row + k] ? miss : 1.f;
            alpha[row + k] = moved;
            total += moved;
        }
        const float scale = 1.f / block_sum(total, scratch);
        EACH_NEIGHBOUR alpha[row + k] *= scale;
    }
    EACH_NEIGHBOUR beta[(long long)(T - 1) * K + k] = 1.f;
    for (int t = T - 1; t > 0; --t) {
        const float miss = likelihood[t];
        const long long row = (long long)t * K;
        float total = 0.f;
        EACH_NEIGHBOUR {
            const float seen = beta[row + k] * (mismatch[row + k] ? miss : 1.f);
            beta[row - K + k] = seen;
            total += seen * prior[k];
        }
        const float scale = (1.f - switching[t]) / block_sum(total, scratch);
        EACH_NEIGHBOUR beta[row - K + k] = scale * beta[row - K + k] + switching[t];
    }
    for (int t = first; t < last; ++t) {
        const long long row = (long long)t * K, out = (long long)(t - first) * K;
        float total = 0.f;
        EACH_NEIGHBOUR {
            posterior[out + k] = alpha[row + k] * beta[row + k];
            total += posterior[out + k];
        }
        const float scale = 1.f / block_sum(total, scratch);
        EACH_NEIGHBOUR posterior[out + k] *= scale;
    }
}

extern "C" __global__ void copying_adjoint(
    const unsigned char* mismatch, const float* likelihood, const float* switching, const float* prior,
    const float* alpha, const float* beta, const float* posterior,
    const float* gradient,    // [B, N, K]
    float* alpha_slope,       // [B, T, K], zero
    float* beta_slope,        // [B, T, K], zero
    float* likelihood_slope,  // [B, T], zero, as are the next two
    float* switch_slope,      // [B, T]
    float* prior_slope,       // [B, K]
    const int T, const int K, const int first, const int last)
{
    __shared__ float scratch[1024];
    const long long b = blockIdx.x;
    mismatch += b * T * K; alpha += b * T * K; beta += b * T * K; alpha_slope += b * T * K; beta_slope += b * T * K;
    likelihood += b * T; switching += b * T; likelihood_slope += b * T; switch_slope += b * T;
    prior += b * K; prior_slope += b * K;
    posterior += b * (last - first) * K; gradient += b * (last - first) * K;
    for (int t = first; t < last; ++t) {
        const long long row = (long long)t * K, out = (long long)(t - first) * K;
        float total = 0.f, mean = 0.f;
        EACH_NEIGHBOUR {
            total += alpha[row + k] * beta[row + k];
            mean += gradient[out + k] * posterior[out + k];
        }
        const float scale = 1.f / block_sum(total, scratch);
        mean = block_sum(mean, scratch);
        EACH_NEIGHBOUR {
            const float slope = (gradient[out + k] - mean) * scale;
            alpha_slope[row + k] = slope * beta[row + k];
            beta_slope[row + k] = slope * alpha[row + k];
        }
    }
    for (int t = first + 1; t < T; ++t) {
        const float stay = 1.f - switching[t], miss = likelihood[t];
        const long long row = (long long)t * K;
        float total = 0.f, weighed = 0.f, moved = 0.f;
        EACH_NEIGHBOUR {
            const float seen = beta[row + k] * (mismatch[row + k] ? miss : 1.f);
            total += seen * prior[k];
            weighed += beta_slope[row - K + k] * seen;
            moved += beta_slope[row - K + k];
        }
        total = block_sum(total, scratch);
        weighed = block_sum(weighed, scratch) / total;
        moved = block_sum(moved, scratch);
        float missed = 0.f;
        EACH_NEIGHBOUR {
            const float slope = stay * (beta_slope[row - K + k] - weighed * prior[k]) / total;
            const float seen = beta[row + k] * (mismatch[row + k] ? miss : 1.f);
            beta_slope[row + k] += slope * (mismatch[row + k] ? miss : 1.f);
            if (mismatch[row + k]) missed += slope * beta[row + k];
            prior_slope[k] -= stay * weighed * seen / total;
        }
        missed = block_sum(missed, scratch);
        if (threadIdx.x == 0) {
            switch_slope[t] += moved - weighed;
            likelihood_slope[t] += missed;
        }
    }
    for (int t = last - 1; t >= 0; --t) {
        const float stay = t ? 1.f - switching[t] : 0.f, jump = t ? switching[t] : 1.f, miss = likelihood[t];
        const long long row = (long long)t * K;
        float total = 0.f, mean = 0.f;
        EACH_NEIGHBOUR {
            float came = jump * prior[k];
            if (t) came += stay * alpha[row - K + k];
            total += came * (mismatch[row + k] ? miss : 1.f);
            mean += alpha_slope[row + k] * alpha[row + k];
        }
        total = block_sum(total, scratch);
        mean = block_sum(mean, scratch);
        float missed = 0.f, moved = 0.f;
        EACH_NEIGHBOUR {
            float came = jump * prior[k];
            if (t) came += stay * alpha[row - K + k];
            float slope = (alpha_slope[row + k] - mean) / total;
            if (mismatch[row + k]) missed += slope * came;
            slope *= mismatch[row + k] ? miss : 1.f;
            prior_slope[k] += jump * slope;
            if (t) {
                moved += slope * (prior[k] - alpha[row - K + k]);
                alpha_slope[row - K + k] += stay * slope;
            }
        }
        missed = block_sum(missed, scratch);
        moved = block_sum(moved, scratch);
        if (threadIdx.x == 0) {
            likelihood_slope[t] += missed;
            switch_slope[t] += moved;
        }
    }
}
"""
_MOST_THREADS = 1024


def available() -> bool:
    """Whether CuPy, which compiles and launches the kernels, is installed."""
    return importlib.util.find_spec("cupy") is not None


@cache
def _kernel(name: str) -> Any:
    import cupy

    return cupy.RawKernel(SOURCE, name)


def _run(name: str, tensors: list[Tensor], first: int, last: int) -> None:
    queries, sites, neighbours = tensors[0].shape
    threads = min(_MOST_THREADS, 1 << max(5, (neighbours - 1).bit_length()))
    launch(_kernel(name), (queries,), (threads,), tensors, (sites, neighbours, first, last))


class CudaPosterior(torch.autograd.Function):
    """Posterior [B, N, K] of mismatch bool [B, T, K], likelihood and switch [B, T] and prior [B, K], float32."""

    @staticmethod
    def forward(
        ctx: Any, mismatch: Tensor, likelihood: Tensor, switch: Tensor, prior: Tensor, first: int, last: int
    ) -> Tensor:
        numbers = [each.detach().float().contiguous() for each in (likelihood, switch, prior)]
        given = [mismatch.contiguous().view(torch.uint8), *numbers]
        alpha = torch.empty(mismatch.shape, device=mismatch.device)
        beta = torch.empty_like(alpha)
        posterior = alpha.new_empty(len(mismatch), last - first, mismatch.shape[2])
        _run("copying_forward_backward", [*given, alpha, beta, posterior], first, last)
        ctx.save_for_backward(*given, alpha, beta, posterior)
        ctx.bounds = (first, last)
        return posterior

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None, None]:
        saved = list(ctx.saved_tensors)
        alpha, likelihood, prior = saved[4], saved[1], saved[3]
        scratch = [torch.zeros_like(alpha), torch.zeros_like(alpha)]
        slopes = [torch.zeros_like(likelihood), torch.zeros_like(likelihood), torch.zeros_like(prior)]
        _run("copying_adjoint", [*saved, gradients[0].float().contiguous(), *scratch, *slopes], *ctx.bounds)
        return None, slopes[0], slopes[1], slopes[2], None, None
