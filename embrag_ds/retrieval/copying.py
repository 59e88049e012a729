"""Copying probabilities: the Li and Stephens model over retrieved haplotypes.

A query haplotype is a mosaic of its K neighbours (Li & Stephens 2003, Genetics 165:2213). At a typed site
a neighbour that differs from the query costs a factor ``exp(-cost)``; before each site the mosaic chooses a
new neighbour, all alike, with probability ``switch``. Forward-backward gives the posterior probability that
each neighbour is the one being copied.

Every pass is normalised at every site, so nothing underflows. On a CPU forward, backward and their adjoints
are compiled loops (numba), one haplotype a task; elsewhere they are torch operations, differentiated by
autograd. Both compute the same function.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

# Both far enough from the smallest float32 that no sum over neighbours is 0, whatever the evidence: not where
# all of them differ from the query, nor where each differs somewhere and the map says nothing recombined.
_LARGEST_COST = 60.0
_SMALLEST_SWITCH = 1e-8
_MOST_THREADS: int = numba.get_num_threads()


def copying_posterior(mismatch: Tensor, cost: Tensor, switch: Tensor) -> Tensor:
    """Posterior copying probabilities, float32 [B, T, K], summing to 1 over K.

    ``mismatch`` bool [B, T, K]; ``cost`` and ``switch`` float32 [B, T], the switch at the first site being
    ignored. Differentiable in ``cost`` and ``switch``.
    """
    if mismatch.device.type == "cpu":
        return _CompiledPosterior.apply(mismatch, *_bounded(cost, switch))
    return posterior_torch(mismatch, cost, switch)


def posterior_torch(mismatch: Tensor, cost: Tensor, switch: Tensor) -> Tensor:
    """:func:`copying_posterior` in plain torch operations, a step per site."""
    cost, switch = _bounded(cost, switch)
    emission = torch.where(mismatch, torch.exp(-cost)[..., None], 1.0).unbind(1)
    stay = (1 - switch)[..., None].unbind(1)
    jump = (switch / mismatch.shape[-1])[..., None].unbind(1)
    forward = [emission[0] / emission[0].sum(-1, keepdim=True)]
    for site in range(1, len(emission)):
        moved = torch.addcmul(jump[site], stay[site], forward[-1]) * emission[site]
        forward.append(moved / moved.sum(-1, keepdim=True))
    backward = [torch.ones_like(emission[0])]
    for site in range(len(emission) - 1, 0, -1):
        seen = backward[-1] * emission[site]
        backward.append(torch.addcmul(jump[site], stay[site], seen / seen.sum(-1, keepdim=True)))
    both = torch.stack(forward, 1) * torch.stack(backward[::-1], 1)
    return both / both.sum(-1, keepdim=True)


def _bounded(cost: Tensor, switch: Tensor) -> tuple[Tensor, Tensor]:
    return cost.clamp_max(_LARGEST_COST), switch.clamp_min(_SMALLEST_SWITCH)


class _CompiledPosterior(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mismatch: Tensor, cost: Tensor, switch: Tensor) -> Tensor:
        arguments = (
            mismatch.contiguous().numpy(),
            torch.exp(-cost.detach().float()).contiguous().numpy(),
            switch.detach().float().contiguous().numpy(),
        )
        # Compiled loops know nothing of torch's setting; several ranks on a machine rely on it.
        numba.set_num_threads(min(_MOST_THREADS, torch.get_num_threads()))
        alpha = np.empty(mismatch.shape, dtype=np.float32)
        beta = np.empty_like(alpha)
        posterior = np.empty_like(alpha)
        _forward_backward(*arguments, alpha, beta, posterior)
        ctx.arguments = arguments
        ctx.passes = (alpha, beta, posterior)
        ctx.cost = cost.detach()
        return torch.from_numpy(posterior)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        (gradient,) = gradients
        likelihood_slope = np.zeros(ctx.cost.shape, dtype=np.float32)
        switch_slope = np.zeros_like(likelihood_slope)
        _adjoint(*ctx.arguments, *ctx.passes, gradient.float().contiguous().numpy(), likelihood_slope, switch_slope)
        # d exp(-cost) / d cost = -exp(-cost)
        cost_slope = -torch.from_numpy(likelihood_slope) * torch.exp(-ctx.cost)
        return None, cost_slope, torch.from_numpy(switch_slope)


_compiled: Any = numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})


@_compiled
def _forward_backward(mismatch, likelihood, switch, alpha, beta, posterior):
    """Fill alpha, beta and posterior [B, T, K]; ``likelihood`` [B, T] is that of a mismatch."""
    queries, sites, neighbours = mismatch.shape
    for b in numba.prange(queries):
        total = np.float32(0)
        for k in range(neighbours):
            alpha[b, 0, k] = likelihood[b, 0] if mismatch[b, 0, k] else np.float32(1)
            total += alpha[b, 0, k]
        for k in range(neighbours):
            alpha[b, 0, k] /= total
        for t in range(1, sites):
            stay, jump = np.float32(1) - switch[b, t], switch[b, t] / np.float32(neighbours)
            miss = likelihood[b, t]
            total = np.float32(0)
            for k in range(neighbours):
                moved = stay * alpha[b, t - 1, k] + jump
                moved *= miss if mismatch[b, t, k] else np.float32(1)
                alpha[b, t, k] = moved
                total += moved
            scale = np.float32(1) / total
            for k in range(neighbours):
                alpha[b, t, k] *= scale
        for k in range(neighbours):
            beta[b, sites - 1, k] = np.float32(1)
        for t in range(sites - 1, 0, -1):
            stay, jump = np.float32(1) - switch[b, t], switch[b, t] / np.float32(neighbours)
            miss = likelihood[b, t]
            total = np.float32(0)
            for k in range(neighbours):
                seen = beta[b, t, k] * (miss if mismatch[b, t, k] else np.float32(1))
                beta[b, t - 1, k] = seen
                total += seen
            scale = stay / total
            for k in range(neighbours):
                beta[b, t - 1, k] = scale * beta[b, t - 1, k] + jump
        for t in range(sites):
            total = np.float32(0)
            for k in range(neighbours):
                posterior[b, t, k] = alpha[b, t, k] * beta[b, t, k]
                total += posterior[b, t, k]
            scale = np.float32(1) / total
            for k in range(neighbours):
                posterior[b, t, k] *= scale


@_compiled
def _adjoint(mismatch, likelihood, switch, alpha, beta, posterior, gradient, likelihood_slope, switch_slope):
    """Add d L / d likelihood and d L / d switch [B, T], given ``gradient`` = d L / d posterior.

    Reverse-mode differentiation of :func:`_forward_backward`, recursion by recursion: the backward pass ran
    from the last site to the first, so its adjoint runs from the first to the last, and the other way round
    for the forward pass. For x = u / sum(u): du = (dx - sum(dx x)) / sum(u).
    """
    queries, sites, neighbours = mismatch.shape
    for b in numba.prange(queries):
        alpha_slope = np.empty((sites, neighbours), dtype=np.float32)
        beta_slope = np.empty((sites, neighbours), dtype=np.float32)
        for t in range(sites):
            total, mean = np.float32(0), np.float32(0)
            for k in range(neighbours):
                total += alpha[b, t, k] * beta[b, t, k]
                mean += gradient[b, t, k] * posterior[b, t, k]
            scale = np.float32(1) / total
            for k in range(neighbours):
                slope = (gradient[b, t, k] - mean) * scale
                alpha_slope[t, k] = slope * beta[b, t, k]
                beta_slope[t, k] = slope * alpha[b, t, k]
        even = np.float32(1) / np.float32(neighbours)
        for t in range(1, sites):
            stay, miss = np.float32(1) - switch[b, t], likelihood[b, t]
            total, mean, moved = np.float32(0), np.float32(0), np.float32(0)
            for k in range(neighbours):
                seen = beta[b, t, k] * (miss if mismatch[b, t, k] else np.float32(1))
                total += seen
                mean += beta_slope[t - 1, k] * seen
                moved += beta_slope[t - 1, k]
            mean /= total
            switch_slope[b, t] += moved * even - mean
            missed = np.float32(0)
            for k in range(neighbours):
                slope = stay * (beta_slope[t - 1, k] - mean) / total
                beta_slope[t, k] += slope * (miss if mismatch[b, t, k] else np.float32(1))
                missed += slope * beta[b, t, k] if mismatch[b, t, k] else np.float32(0)
            likelihood_slope[b, t] += missed
        for t in range(sites - 1, -1, -1):
            stay, jump = np.float32(1) - switch[b, t], switch[b, t] * even
            miss = likelihood[b, t]
            total, mean = np.float32(0), np.float32(0)
            for k in range(neighbours):
                came = np.float32(1) if t == 0 else stay * alpha[b, t - 1, k] + jump
                total += came * (miss if mismatch[b, t, k] else np.float32(1))
                mean += alpha_slope[t, k] * alpha[b, t, k]
            missed, moved = np.float32(0), np.float32(0)
            for k in range(neighbours):
                came = np.float32(1) if t == 0 else stay * alpha[b, t - 1, k] + jump
                slope = (alpha_slope[t, k] - mean) / total
                missed += slope * came if mismatch[b, t, k] else np.float32(0)
                slope *= miss if mismatch[b, t, k] else np.float32(1)
                if t > 0:
                    moved += slope * (even - alpha[b, t - 1, k])
                    alpha_slope[t - 1, k] += stay * slope
            likelihood_slope[b, t] += missed
            switch_slope[b, t] += moved


def match_lengths(mismatch: Tensor, position: Tensor, count: Tensor) -> Tensor:
    """How far each neighbour matches the query around a typed site, in cM, float32 [B, T, K].

    From the nearest mismatch at or left of the site to the nearest at or right of it, or to the first and the
    last typed site. ``mismatch`` bool [B, T, K], ``position`` [B, T] in cM; ``count`` int64 [B] are a row's
    typed sites, what follows them is filling.
    """
    first = position[:, :1]
    last = position.gather(1, (count - 1).clamp_min(0)[:, None])
    if mismatch.device.type == "cpu":
        lengths = np.empty(mismatch.shape, dtype=np.float32)
        bounds = (each.float().contiguous().numpy() for each in (position, first[:, 0], last[:, 0]))
        _match_lengths(mismatch.contiguous().numpy(), *bounds, lengths)
        return torch.from_numpy(lengths)
    place = position.float()[..., None].expand(mismatch.shape)
    left = torch.where(mismatch, place, first[..., None]).cummax(1).values
    right = torch.where(mismatch, place, last[..., None]).flip(1).cummin(1).values.flip(1)
    return (right - left).clamp_min(0)


@_compiled
def _match_lengths(mismatch, position, first, last, lengths):
    queries, sites, neighbours = mismatch.shape
    for b in numba.prange(queries):
        bound = np.full(neighbours, first[b], dtype=np.float32)
        for t in range(sites):
            here = position[b, t]
            for k in range(neighbours):
                bound[k] = here if mismatch[b, t, k] else bound[k]
                lengths[b, t, k] = bound[k]
        bound[:] = last[b]
        for t in range(sites - 1, -1, -1):
            here = position[b, t]
            for k in range(neighbours):
                bound[k] = here if mismatch[b, t, k] else bound[k]
                lengths[b, t, k] = max(bound[k] - lengths[b, t, k], np.float32(0))


def interpolated_dosage(posterior: Tensor, alleles: Tensor, left: Tensor, right: Tensor, share: Tensor) -> Tensor:
    """Expected allele of the copied haplotype between typed sites, float32 [B, L].

    ``posterior`` [B, T, K]; ``alleles`` uint8 [B, K, L]; ``left`` and ``right`` int64 [B, L] are the flanking
    typed sites' places, ``share`` [B, L] the weight of the right one. Differentiable in ``posterior``.
    """
    if posterior.device.type == "cpu":
        return _CompiledDosage.apply(posterior, alleles, left, right, share)
    return (interpolated_weights(posterior, left, right, share) * alleles).sum(1)


def interpolated_weights(posterior: Tensor, left: Tensor, right: Tensor, share: Tensor) -> Tensor:
    """Posteriors [B, T, K] carried to the sites between, [B, K, L]."""
    rows = torch.arange(len(posterior), device=posterior.device)[:, None]
    return torch.lerp(posterior[rows, left], posterior[rows, right], share[..., None]).transpose(1, 2)


class _CompiledDosage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, posterior: Tensor, alleles: Tensor, left: Tensor, right: Tensor, share: Tensor) -> Tensor:
        ctx.arguments = [each.contiguous().numpy() for each in (alleles, left, right, share.detach())]
        ctx.shape = posterior.shape
        dosage = np.zeros(left.shape, dtype=np.float32)
        _mix(posterior.detach().contiguous().numpy(), *ctx.arguments, dosage)
        return torch.from_numpy(dosage)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        slope = np.zeros(ctx.shape, dtype=np.float32)
        _mix_adjoint(gradients[0].float().contiguous().numpy(), *ctx.arguments, slope)
        return torch.from_numpy(slope), None, None, None, None


@_compiled
def _mix(posterior, alleles, left, right, share, dosage):
    for b in numba.prange(len(dosage)):
        for k in range(alleles.shape[1]):
            for site in range(alleles.shape[2]):
                if alleles[b, k, site]:
                    at_left, at_right = posterior[b, left[b, site], k], posterior[b, right[b, site], k]
                    dosage[b, site] += at_left + share[b, site] * (at_right - at_left)


@_compiled
def _mix_adjoint(gradient, alleles, left, right, share, slope):
    for b in numba.prange(len(gradient)):
        for k in range(alleles.shape[1]):
            for site in range(alleles.shape[2]):
                if alleles[b, k, site]:
                    slope[b, left[b, site], k] += (np.float32(1) - share[b, site]) * gradient[b, site]
                    slope[b, right[b, site], k] += share[b, site] * gradient[b, site]
