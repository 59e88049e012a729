"""The copying model of Li and Stephens over retrieved haplotypes: posterior copying probabilities, match lengths.

A query haplotype is an imperfect copy of its K neighbours, one at a time (Li & Stephens 2003, Genetics 165:2213).
Mismatch: at a typed site the probability that a neighbour which differs from the query is the one copied is multiplied
by ``exp(-mismatch_nats)``. Recombination: before each site the model chooses anew with probability
``recombination``, neighbour k with probability ``prior[k]``. Forward-backward gives the posterior probability that
each neighbour is the one being copied.

Every pass is normalised at every site, so nothing underflows. On a CPU forward, backward and their adjoints
are compiled loops (:mod:`embrag_ds.ops.li_stephens_numba`), on a GPU CUDA kernels
(:mod:`embrag_ds.ops.li_stephens_cuda`), and where there is no CuPy torch operations, differentiated by autograd.
All compute the same function.

Evidence comes from all T typed sites of a window; posteriors are wanted around the core only, at the N typed sites of
``near``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from embrag_ds.ops import cuda, li_stephens_numba
from embrag_ds.ops.li_stephens_cuda import CudaPosterior, cuda_match_lengths

# Both far enough from the smallest float32 that no sum over neighbours is 0, whatever the evidence: not where
# all of them differ from the query, nor where each differs somewhere and the map says nothing recombined.
_MOST_MISMATCH_NATS = 60.0
_LEAST_RECOMBINATION = 1e-8


def mismatches(alleles: Tensor, place: Tensor, ids: Tensor, tokens: Tensor, count: Tensor) -> Tensor:
    """Where neighbours differ from what a query shows, bool [B, T, K]; False from a row's ``count`` int64 [B] on.

    ``alleles`` uint8 [T', H]; ``place`` int64 [B, T], rows of it; ``ids`` int64 [B, K]; ``tokens`` int64 [B, T].
    """
    if alleles.device.type == "cpu":
        out = np.empty((*place.shape, ids.shape[1]), dtype=np.bool_)
        li_stephens_numba.mismatches(*(each.contiguous().numpy() for each in (alleles, place, ids, tokens, count)), out)
        return torch.from_numpy(out)
    valid = torch.arange(place.shape[1], device=ids.device) < count[:, None]
    return (alleles[place[:, :, None], ids[:, None, :]] != tokens[:, :, None]) & valid[:, :, None]


def count_true(rows: Tensor) -> Tensor:
    """Sum over R of bool or 0/1 uint8 [B, R, C], int32 [B, C]. On a CPU torch would copy all of it as integers."""
    if rows.device.type != "cpu":
        return rows.sum(1, dtype=torch.int32)
    total = np.zeros((rows.shape[0], rows.shape[2]), dtype=np.int32)
    li_stephens_numba.add_rows(rows.contiguous().view(torch.uint8).numpy(), total)
    return torch.from_numpy(total)


def copying_backend(device: torch.device) -> str:
    """What computes :func:`copying_posterior` there: compiled loops, the CUDA kernel (with CuPy), or torch."""
    if device.type == "cpu":
        return "compiled"
    return "cuda kernel" if device.type == "cuda" and cuda.available() else "torch"


def copying_posterior(
    mismatch: Tensor, mismatch_nats: Tensor, recombination: Tensor, prior: Tensor, near: slice = slice(None)
) -> Tensor:
    """Posterior copying probabilities at the sites ``near``, float32 [C, N, K], summing to 1 over K.

    ``mismatch`` bool [B, T, K]; ``mismatch_nats`` and ``recombination`` float32 [C, T], the recombination before the
    first site being ignored; ``prior`` float32 [B, K], positive, summing to 1 over K. C is B, or a multiple of it:
    several chains with mismatch and recombination of their own, of which chain c is about query c % B. Differentiable
    in all but ``mismatch``.
    """
    way = copying_backend(mismatch.device)
    if way == "torch":
        return posterior_torch(mismatch, mismatch_nats, recombination, prior, near)
    mismatch_nats, recombination = _bounded(mismatch_nats, recombination)
    first, last, _ = near.indices(mismatch.shape[1])
    if way == "cuda kernel":
        return CudaPosterior.apply(mismatch, torch.exp(-mismatch_nats), recombination, prior, first, last)
    return _CompiledPosterior.apply(mismatch, mismatch_nats, recombination, prior, first, last)


def posterior_torch(
    mismatch: Tensor, mismatch_nats: Tensor, recombination: Tensor, prior: Tensor, near: slice = slice(None)
) -> Tensor:
    """:func:`copying_posterior` in plain torch operations, a step per site."""
    mismatch_nats, recombination = _bounded(mismatch_nats, recombination)
    chains = len(mismatch_nats) // len(mismatch)
    mismatch, prior = mismatch.repeat(chains, 1, 1), prior.repeat(chains, 1)
    emission = torch.where(mismatch, torch.exp(-mismatch_nats)[..., None], 1.0).unbind(1)
    stay = (1 - recombination)[..., None].unbind(1)
    jump = recombination[..., None].unbind(1)
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


def _bounded(mismatch_nats: Tensor, recombination: Tensor) -> tuple[Tensor, Tensor]:
    return mismatch_nats.clamp_max(_MOST_MISMATCH_NATS), recombination.clamp_min(_LEAST_RECOMBINATION)


def _arguments(mismatch: Tensor, mismatch_nats: Tensor, recombination: Tensor, prior: Tensor) -> list[np.ndarray]:
    """As the compiled loops take them: the ratio exp(-nats) in place of the nats."""
    numbers = (torch.exp(-mismatch_nats.detach()), recombination.detach(), prior.detach())
    return [mismatch.contiguous().numpy(), *(each.float().contiguous().numpy() for each in numbers)]


class _CompiledPosterior(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mismatch: Tensor, mismatch_nats: Tensor, recombination: Tensor, prior: Tensor, first: int, last: int
    ) -> Tensor:
        posterior = torch.empty(len(mismatch_nats), last - first, mismatch.shape[2], dtype=torch.float32)
        given = _arguments(mismatch, mismatch_nats, recombination, prior)
        li_stephens_numba.forward_backward(*given, first, last, posterior.numpy())
        # Not as arrays: whoever writes to one of them before the backward pass gets autograd's error.
        ctx.save_for_backward(mismatch, mismatch_nats, recombination, prior, posterior)
        ctx.bounds = (first, last)
        return posterior

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None, None]:
        (gradient,) = gradients
        mismatch, mismatch_nats, recombination, prior, posterior = (each.detach() for each in ctx.saved_tensors)
        ratio_gradient = np.zeros(mismatch_nats.shape, dtype=np.float32)
        prior_gradient = np.zeros((len(mismatch_nats), prior.shape[1]), dtype=np.float32)
        found = ratio_gradient, np.zeros_like(ratio_gradient), prior_gradient
        given = (*_arguments(mismatch, mismatch_nats, recombination, prior), *ctx.bounds, posterior.numpy())
        li_stephens_numba.adjoint(*given, gradient.float().contiguous().numpy(), *found)
        # d exp(-mismatch_nats) / d mismatch_nats = -exp(-mismatch_nats)
        nats_gradient = -torch.from_numpy(ratio_gradient) * torch.exp(-mismatch_nats)
        of_queries = torch.from_numpy(prior_gradient).unflatten(0, (-1, len(prior))).sum(0)
        return None, nats_gradient, torch.from_numpy(found[1]), of_queries, None, None


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
        li_stephens_numba.match_lengths(mismatch.contiguous().numpy(), *places, first, last, lengths)
        return torch.from_numpy(lengths)
    place = position.float()[..., None].expand(mismatch.shape)
    left = torch.where(mismatch, place, ends[:, :1, None]).cummax(1).values[:, near]
    right = torch.where(mismatch, place, ends[:, 1:, None]).flip(1).cummin(1).values.flip(1)[:, near]
    return (right - left).clamp_min(0)
