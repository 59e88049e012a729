"""Copying probabilities: the Li and Stephens model over retrieved haplotypes.

A query haplotype is a mosaic of its K neighbours (Li & Stephens 2003, Genetics 165:2213). At a typed site
a neighbour that differs from the query costs a factor ``exp(-cost)``; before each site the mosaic chooses anew
with probability ``switch``, neighbour k with probability ``prior[k]``. Forward-backward gives the posterior
probability that each neighbour is the one being copied.

Every pass is normalised at every site, so nothing underflows. On a CPU forward, backward and their adjoints
are compiled loops (:mod:`embrag_ds.retrieval.compiled`), on a GPU CUDA kernels
(:mod:`embrag_ds.retrieval.copying_kernels`), and where there is no CuPy torch operations, differentiated by autograd.
All compute the same function.

Evidence comes from all T typed sites of a window; what it says is wanted around the core only: at the N typed
sites of ``near``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from embrag_ds.retrieval import compiled, kernels
from embrag_ds.retrieval.copying_kernels import CudaPosterior, cuda_match_lengths

# Both far enough from the smallest float32 that no sum over neighbours is 0, whatever the evidence: not where
# all of them differ from the query, nor where each differs somewhere and the map says nothing recombined.
_LARGEST_COST = 60.0
_SMALLEST_SWITCH = 1e-8


def mismatches(alleles: Tensor, place: Tensor, ids: Tensor, tokens: Tensor, count: Tensor) -> Tensor:
    """Where neighbours differ from what a query shows, bool [B, T, K]; False from a row's ``count`` int64 [B] on.

    ``alleles`` uint8 [T', H]; ``place`` int64 [B, T], rows of it; ``ids`` int64 [B, K]; ``tokens`` int64 [B, T].
    """
    if alleles.device.type == "cpu":
        out = np.empty((*place.shape, ids.shape[1]), dtype=np.bool_)
        compiled.use_torch_threads()
        compiled.mismatches(*(each.contiguous().numpy() for each in (alleles, place, ids, tokens, count)), out)
        return torch.from_numpy(out)
    valid = torch.arange(place.shape[1], device=ids.device) < count[:, None]
    return (alleles[place[:, :, None], ids[:, None, :]] != tokens[:, :, None]) & valid[:, :, None]


def count_true(rows: Tensor) -> Tensor:
    """Sum over R of bool or 0/1 uint8 [B, R, C], int32 [B, C]. On a CPU torch would copy all of it as integers."""
    if rows.device.type != "cpu":
        return rows.sum(1, dtype=torch.int32)
    total = np.zeros((rows.shape[0], rows.shape[2]), dtype=np.int32)
    compiled.use_torch_threads()
    compiled.add_rows(rows.contiguous().view(torch.uint8).numpy(), total)
    return torch.from_numpy(total)


def copying_backend(device: torch.device) -> str:
    """What computes :func:`copying_posterior` there: compiled loops, the CUDA kernel (with CuPy), or torch."""
    if device.type == "cpu":
        return "compiled"
    return "cuda kernel" if device.type == "cuda" and kernels.available() else "torch"


def copying_posterior(
    mismatch: Tensor, cost: Tensor, switch: Tensor, prior: Tensor, near: slice = slice(None)
) -> Tensor:
    """Posterior copying probabilities at the sites ``near``, float32 [C, N, K], summing to 1 over K.

    ``mismatch`` bool [B, T, K]; ``cost`` and ``switch`` float32 [C, T], the switch at the first site being
    ignored; ``prior`` float32 [B, K], positive, summing to 1 over K. C is B, or a multiple of it: several chains with
    costs and switches of their own, of which chain c is about query c % B. Differentiable in all but ``mismatch``.
    """
    way = copying_backend(mismatch.device)
    if way == "torch":
        return posterior_torch(mismatch, cost, switch, prior, near)
    cost, switch = _bounded(cost, switch)
    first, last, _ = near.indices(mismatch.shape[1])
    if way == "cuda kernel":
        return CudaPosterior.apply(mismatch, torch.exp(-cost), switch, prior, first, last)
    return _CompiledPosterior.apply(mismatch, cost, switch, prior, first, last)


def posterior_torch(mismatch: Tensor, cost: Tensor, switch: Tensor, prior: Tensor, near: slice = slice(None)) -> Tensor:
    """:func:`copying_posterior` in plain torch operations, a step per site."""
    cost, switch = _bounded(cost, switch)
    chains = len(cost) // len(mismatch)
    mismatch, prior = mismatch.repeat(chains, 1, 1), prior.repeat(chains, 1)
    emission = torch.where(mismatch, torch.exp(-cost)[..., None], 1.0).unbind(1)
    stay = (1 - switch)[..., None].unbind(1)
    jump = switch[..., None].unbind(1)
    first = prior * emission[0]
    forward = [first / first.sum(-1, keepdim=True)]
    for site in range(1, len(emission)):
        moved = (jump[site] * prior + stay[site] * forward[-1]) * emission[site]
        forward.append(moved / moved.sum(-1, keepdim=True))
    backward = [torch.ones_like(emission[0])]
    for site in range(len(emission) - 1, 0, -1):
        seen = backward[-1] * emission[site]
        backward.append(jump[site] + stay[site] * seen / (prior * seen).sum(-1, keepdim=True))
    both = torch.stack(forward[near], 1) * torch.stack(backward[::-1][near], 1)
    return both / both.sum(-1, keepdim=True)


def _bounded(cost: Tensor, switch: Tensor) -> tuple[Tensor, Tensor]:
    return cost.clamp_max(_LARGEST_COST), switch.clamp_min(_SMALLEST_SWITCH)


def _arguments(mismatch: Tensor, cost: Tensor, switch: Tensor, prior: Tensor) -> list[np.ndarray]:
    """As the compiled loops take them: the likelihood of a mismatch in place of its cost."""
    numbers = (torch.exp(-cost.detach()), switch.detach(), prior.detach())
    return [mismatch.contiguous().numpy(), *(each.float().contiguous().numpy() for each in numbers)]


class _CompiledPosterior(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mismatch: Tensor, cost: Tensor, switch: Tensor, prior: Tensor, first: int, last: int
    ) -> Tensor:
        compiled.use_torch_threads()
        posterior = torch.empty(len(cost), last - first, mismatch.shape[2], dtype=torch.float32)
        compiled.forward_backward(*_arguments(mismatch, cost, switch, prior), first, last, posterior.numpy())
        # Not as arrays: whoever writes to one of them before the backward pass gets autograd's error.
        ctx.save_for_backward(mismatch, cost, switch, prior, posterior)
        ctx.bounds = (first, last)
        return posterior

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None, None]:
        (gradient,) = gradients
        mismatch, cost, switch, prior, posterior = (each.detach() for each in ctx.saved_tensors)
        likelihood_slope = np.zeros(cost.shape, dtype=np.float32)
        prior_slope = np.zeros((len(cost), prior.shape[1]), dtype=np.float32)
        slopes = likelihood_slope, np.zeros_like(likelihood_slope), prior_slope
        compiled.use_torch_threads()
        given = (*_arguments(mismatch, cost, switch, prior), *ctx.bounds, posterior.numpy())
        compiled.adjoint(*given, gradient.float().contiguous().numpy(), *slopes)
        # d exp(-cost) / d cost = -exp(-cost)
        cost_slope = -torch.from_numpy(likelihood_slope) * torch.exp(-cost)
        of_queries = torch.from_numpy(prior_slope).unflatten(0, (-1, len(prior))).sum(0)
        return None, cost_slope, torch.from_numpy(slopes[1]), of_queries, None, None


def match_lengths(mismatch: Tensor, position: Tensor, count: Tensor, near: slice = slice(None)) -> Tensor:
    """How far each neighbour matches the query around a typed site of ``near``, in cM, float32 [B, N, K].

    From the nearest mismatch at or left of the site to the nearest at or right of it, or to the first and the
    last typed site. ``mismatch`` bool [B, T, K], ``position`` [B, T] in cM; ``count`` int64 [B] are a row's
    typed sites, what follows them is filling.
    """
    ends = torch.cat([position[:, :1], position.gather(1, (count - 1).clamp_min(0)[:, None])], dim=1)
    way = copying_backend(mismatch.device)
    first, last, _ = near.indices(mismatch.shape[1])
    if way == "cuda kernel":
        return cuda_match_lengths(mismatch, position, ends, first, last)
    if way == "compiled":
        lengths = np.empty((len(mismatch), last - first, mismatch.shape[2]), dtype=np.float32)
        places = (each.float().contiguous().numpy() for each in (position, ends))
        compiled.use_torch_threads()
        compiled.match_lengths(mismatch.contiguous().numpy(), *places, first, last, lengths)
        return torch.from_numpy(lengths)
    place = position.float()[..., None].expand(mismatch.shape)
    left = torch.where(mismatch, place, ends[:, :1, None]).cummax(1).values[:, near]
    right = torch.where(mismatch, place, ends[:, 1:, None]).flip(1).cummin(1).values.flip(1)[:, near]
    return (right - left).clamp_min(0)
