"""CUDA kernels of the copied dosage and its adjoint, over all K alleles; see :mod:`embrag_ds.ops.dosage`.

torch operations would write the interpolated posterior [B, K, L] and sort indices in the backward pass. Here a thread
computes one site, or in the adjoint one neighbour, and only the result is written. No two threads add to the same
number, so results are deterministic. The source is plain C, so that a test can compile it for the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embrag_ds.ops.cuda import kernel

SOURCE = r"""
extern "C" __global__ void copied_dosage(
    const unsigned char* alleles,  // [B, K, L]
    const float* posterior,        // [B, M, K]
    const long long* left,         // [B, L], flanking typed sites: indices below M, not decreasing along L
    const long long* right,        // [B, L], likewise
    const float* share,            // [B, L], weight of the right one
    float* dosage,                 // [B, L]
    const int tiles, const int M, const int K, const int L)
{
    const long long b = blockIdx.x / tiles;
    const int site = blockIdx.x % tiles * blockDim.x + threadIdx.x;
    if (site >= L) return;
    const float* before = posterior + (b * M + left[b * L + site]) * K;
    const float* after = posterior + (b * M + right[b * L + site]) * K;
    const unsigned char* allele = alleles + b * K * L + site;
    float at_left = 0.f, at_right = 0.f;
    for (int k = 0; k < K; ++k) {
        const float carries = allele[(long long)k * L];
        at_left += carries * before[k];
        at_right += carries * after[k];
    }
    dosage[b * L + site] = at_left + share[b * L + site] * (at_right - at_left);
}

extern "C" __global__ void copied_dosage_adjoint(
    const unsigned char* alleles, const float* gradient, const long long* left, const long long* right,
    const float* share,
    float* posterior_gradient,  // [B, M, K], zero at the start
    const int tiles, const int M, const int K, const int L)
{
    const long long b = blockIdx.x / tiles;
    const int k = blockIdx.x % tiles * blockDim.x + threadIdx.x;
    if (k >= K) return;
    alleles += (b * K + k) * L; gradient += b * L; left += b * L; right += b * L; share += b * L;
    posterior_gradient += b * M * K + k;
    float at_left = 0.f, at_right = 0.f;
    for (int site = 0; site < L; ++site) {
        const float given = alleles[site] ? gradient[site] : 0.f;
        at_left += (1.f - share[site]) * given;
        at_right += share[site] * given;
        if (site + 1 == L || left[site + 1] != left[site]) {
            posterior_gradient[left[site] * K] += at_left;
            at_left = 0.f;
        }
        if (site + 1 == L || right[site + 1] != right[site]) {
            posterior_gradient[right[site] * K] += at_right;
            at_right = 0.f;
        }
    }
}
"""


class CudaDosage(torch.autograd.Function):
    """Copied dosage float32 [B, L] on a GPU, differentiable in the posterior.

    Arguments: posterior float32 [B, M, K]; alleles uint8 [B, K, L]; left, right and share [B, L] as
    :class:`embrag_ds.ops.dosage.FlankingSites` holds them, left and right not decreasing along L. CuPy must be
    installed.
    """

    @staticmethod
    def forward(ctx: Any, posterior: Tensor, alleles: Tensor, left: Tensor, right: Tensor, share: Tensor) -> Tensor:
        flanking = [each.detach().contiguous() for each in (left, right, share)]
        given = [alleles.contiguous(), posterior.detach().float().contiguous(), *flanking]
        ctx.sizes = (posterior.shape[1], *alleles.shape[1:])
        dosage = torch.empty_like(flanking[2])
        kernel(SOURCE, "copied_dosage").launch_tiled(dosage.shape[1], [*given, dosage], ctx.sizes)
        ctx.save_for_backward(given[0], *flanking)
        return dosage

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        alleles, *flanking = ctx.saved_tensors
        typed, neighbours, _ = ctx.sizes
        posterior_gradient = torch.zeros(len(alleles), typed, neighbours, device=alleles.device)
        given = [alleles, gradients[0].float().contiguous(), *flanking, posterior_gradient]
        kernel(SOURCE, "copied_dosage_adjoint").launch_tiled(neighbours, given, ctx.sizes)
        return posterior_gradient, None, None, None, None
