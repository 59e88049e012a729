"""The copying model's loops, compiled for CPUs (numba), one haplotype a task.

Shapes: B haplotypes, T typed sites, K neighbours, L sites; N typed sites from ``first`` to ``last``, around the core; C
chains, a multiple of B, of which chain c is about haplotype c % B. All fill arrays that the caller made.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

_MOST_THREADS: int = numba.get_num_threads()
_compiled: Any = numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})


def use_torch_threads() -> None:
    """Compiled loops know nothing of torch's setting; several ranks on a machine rely on it."""
    numba.set_num_threads(min(_MOST_THREADS, torch.get_num_threads()))


@_compiled
def mismatches(alleles, place, ids, tokens, count, out):
    """out [B, T, K]: where haplotype ``ids`` [B, K] differs from ``tokens`` [B, T] at row ``place`` [B, T] of
    ``alleles`` [T', H]; False from a row's ``count`` [B] on."""
    queries, sites, neighbours = out.shape
    for b in numba.prange(queries):
        for t in range(sites):
            if t < count[b]:
                row = alleles[place[b, t]]
                for k in range(neighbours):
                    out[b, t, k] = row[ids[b, k]] != tokens[b, t]
            else:
                out[b, t] = False


@_compiled
def add_rows(rows, total):
    """Add rows uint8 [B, R, C] to total int32 [B, C]."""
    for b in numba.prange(len(rows)):
        for r in range(rows.shape[1]):
            for c in range(rows.shape[2]):
                total[b, c] += rows[b, r, c]


@_compiled
def posterior_alone(mismatch, likelihood, switch, prior, first, last, posterior):
    """Fill posterior [C, N, K]; ``likelihood`` [C, T] is that of ``mismatch`` [B, T, K], ``prior`` [B, K] sums to 1
    over K.

    Nothing is kept for sites that are not asked for, and what a pass is divided by at a site is
    multiplied into the next.
    """
    queries, sites, neighbours = mismatch.shape
    for c in numba.prange(len(likelihood)):
        state = np.zeros(neighbours, dtype=np.float32)
        differs, chosen = mismatch[c % queries], prior[c % queries]
        stay, jump = np.float32(0), np.float32(1)
        for t in range(last):
            miss = likelihood[c, t]
            total = np.float32(0)
            for k in range(neighbours):
                moved = stay * state[k] + jump * chosen[k]
                moved *= miss if differs[t, k] else np.float32(1)
                state[k] = moved
                total += moved
            if t >= first:
                posterior[c, t - first] = state
            if t + 1 < last:
                stay, jump = (np.float32(1) - switch[c, t + 1]) / total, switch[c, t + 1]
        state[:] = np.float32(0)
        stay, jump = np.float32(0), np.float32(1)
        for t in range(sites - 1, first - 1, -1):
            miss = likelihood[c, t]
            total = np.float32(0)
            if t < last:
                mass = np.float32(0)
                for k in range(neighbours):
                    after = stay * state[k] + jump
                    both = posterior[c, t - first, k] * after
                    posterior[c, t - first, k] = both
                    mass += both
                    seen = after * (miss if differs[t, k] else np.float32(1))
                    state[k] = seen
                    total += seen * chosen[k]
                scale = np.float32(1) / mass
                for k in range(neighbours):
                    posterior[c, t - first, k] *= scale
            else:
                for k in range(neighbours):
                    seen = stay * state[k] + jump
                    seen *= miss if differs[t, k] else np.float32(1)
                    state[k] = seen
                    total += seen * chosen[k]
            stay, jump = (np.float32(1) - switch[c, t]) / total, switch[c, t]


@_compiled
def forward_backward(mismatch, likelihood, switch, prior, first, last, alpha, beta, posterior):
    """The same, and alpha and beta [C, T, K], for :func:`adjoint`: alpha sums to 1, beta to 1 when weighed by the prior
    and what is seen."""
    queries, sites, neighbours = mismatch.shape
    for c in numba.prange(len(likelihood)):
        differs, chosen = mismatch[c % queries], prior[c % queries]
        for t in range(sites):
            stay = np.float32(0) if t == 0 else np.float32(1) - switch[c, t]
            jump = np.float32(1) if t == 0 else switch[c, t]
            miss = likelihood[c, t]
            total = np.float32(0)
            for k in range(neighbours):
                moved = jump * chosen[k]
                if t > 0:
                    moved += stay * alpha[c, t - 1, k]
                moved *= miss if differs[t, k] else np.float32(1)
                alpha[c, t, k] = moved
                total += moved
            scale = np.float32(1) / total
            for k in range(neighbours):
                alpha[c, t, k] *= scale
        beta[c, sites - 1] = np.float32(1)
        for t in range(sites - 1, 0, -1):
            miss = likelihood[c, t]
            total = np.float32(0)
            for k in range(neighbours):
                seen = beta[c, t, k] * (miss if differs[t, k] else np.float32(1))
                beta[c, t - 1, k] = seen
                total += seen * chosen[k]
            scale = (np.float32(1) - switch[c, t]) / total
            for k in range(neighbours):
                beta[c, t - 1, k] = scale * beta[c, t - 1, k] + switch[c, t]
        for t in range(first, last):
            total = np.float32(0)
            for k in range(neighbours):
                posterior[c, t - first, k] = alpha[c, t, k] * beta[c, t, k]
                total += posterior[c, t - first, k]
            scale = np.float32(1) / total
            for k in range(neighbours):
                posterior[c, t - first, k] *= scale


@_compiled
def adjoint(
    mismatch,
    likelihood,
    switch,
    prior,
    first,
    last,
    alpha,
    beta,
    posterior,
    gradient,
    likelihood_slope,
    switch_slope,
    prior_slope,
):
    """Add d L / d likelihood, d L / d switch [C, T] and d L / d prior [C, K], given ``gradient`` = d L / d posterior
    [C, N, K].

    Reverse-mode differentiation of :func:`forward_backward`, recursion by recursion: the backward pass ran
    from the last site to the first, so its adjoint runs from the first to the last, and the other way round
    for the forward pass. For x = u / sum(u): du = (dx - sum(dx x)) / sum(u).
    """
    queries, sites, neighbours = mismatch.shape
    for c in numba.prange(len(likelihood)):
        differs, chosen = mismatch[c % queries], prior[c % queries]
        alpha_slope = np.zeros((sites, neighbours), dtype=np.float32)
        beta_slope = np.zeros((sites, neighbours), dtype=np.float32)
        for t in range(first, last):
            total, mean = np.float32(0), np.float32(0)
            for k in range(neighbours):
                total += alpha[c, t, k] * beta[c, t, k]
                mean += gradient[c, t - first, k] * posterior[c, t - first, k]
            scale = np.float32(1) / total
            for k in range(neighbours):
                slope = (gradient[c, t - first, k] - mean) * scale
                alpha_slope[t, k] = slope * beta[c, t, k]
                beta_slope[t, k] = slope * alpha[c, t, k]
        for t in range(first + 1, sites):
            stay, miss = np.float32(1) - switch[c, t], likelihood[c, t]
            total, weighed, moved = np.float32(0), np.float32(0), np.float32(0)
            for k in range(neighbours):
                seen = beta[c, t, k] * (miss if differs[t, k] else np.float32(1))
                total += seen * chosen[k]
                weighed += beta_slope[t - 1, k] * seen
                moved += beta_slope[t - 1, k]
            weighed /= total
            switch_slope[c, t] += moved - weighed
            missed = np.float32(0)
            for k in range(neighbours):
                slope = stay * (beta_slope[t - 1, k] - weighed * chosen[k]) / total
                beta_slope[t, k] += slope * (miss if differs[t, k] else np.float32(1))
                missed += slope * beta[c, t, k] if differs[t, k] else np.float32(0)
                seen = beta[c, t, k] * (miss if differs[t, k] else np.float32(1))
                prior_slope[c, k] -= stay * weighed * seen / total
            likelihood_slope[c, t] += missed
        for t in range(last - 1, -1, -1):
            stay = np.float32(0) if t == 0 else np.float32(1) - switch[c, t]
            jump = np.float32(1) if t == 0 else switch[c, t]
            miss = likelihood[c, t]
            total, mean = np.float32(0), np.float32(0)
            for k in range(neighbours):
                came = jump * chosen[k]
                if t > 0:
                    came += stay * alpha[c, t - 1, k]
                total += came * (miss if differs[t, k] else np.float32(1))
                mean += alpha_slope[t, k] * alpha[c, t, k]
            missed, moved = np.float32(0), np.float32(0)
            for k in range(neighbours):
                came = jump * chosen[k]
                if t > 0:
                    came += stay * alpha[c, t - 1, k]
                slope = (alpha_slope[t, k] - mean) / total
                missed += slope * came if differs[t, k] else np.float32(0)
                slope *= miss if differs[t, k] else np.float32(1)
                prior_slope[c, k] += jump * slope
                if t > 0:
                    moved += slope * (chosen[k] - alpha[c, t - 1, k])
                    alpha_slope[t - 1, k] += stay * slope
            likelihood_slope[c, t] += missed
            switch_slope[c, t] += moved


@_compiled
def match_lengths(mismatch, position, bounds, first, last, lengths):
    """Fill lengths [B, N, K]; ``bounds`` [B, 2] are the positions of a row's first and last typed site."""
    queries, sites, neighbours = mismatch.shape
    for b in numba.prange(queries):
        bound = np.full(neighbours, bounds[b, 0], dtype=np.float32)
        for t in range(last):
            here = position[b, t]
            for k in range(neighbours):
                bound[k] = here if mismatch[b, t, k] else bound[k]
            if t >= first:
                lengths[b, t - first] = bound
        bound[:] = bounds[b, 1]
        for t in range(sites - 1, first - 1, -1):
            here = position[b, t]
            for k in range(neighbours):
                bound[k] = here if mismatch[b, t, k] else bound[k]
            if t < last:
                for k in range(neighbours):
                    lengths[b, t - first, k] = max(bound[k] - lengths[b, t - first, k], np.float32(0))


@_compiled
def list_carriers(alleles, start, who):
    """Fill ``who`` from ``start`` [L + 1] on with the columns of alleles [L, H] that are 1, where there is room."""
    for site in numba.prange(len(alleles)):
        place = start[site]
        if place < start[site + 1]:
            for haplotype in range(alleles.shape[1]):
                if alleles[site, haplotype]:
                    who[place] = haplotype
                    place += 1


@_compiled
def list_neighbours(alleles, listed, start, who, ids, offset, members):
    """Fill members [B, n], and offset [B, L + 1] where each site's begin, with the places in a row of ids [B, K] whose
    alleles [L, H] are 1; where ``listed`` [L], those are in ``who`` from ``start`` [L + 1] on."""
    for b in numba.prange(len(ids)):
        place = np.full(alleles.shape[1], -1, dtype=np.int32)
        for k in range(ids.shape[1]):
            place[ids[b, k]] = k
        count = 0
        for site in range(len(alleles)):
            offset[b, site] = count
            if listed[site]:
                for number in range(start[site], start[site + 1]):
                    k = place[who[number]]
                    members[b, count] = k
                    count += k >= 0
            else:
                for k in range(ids.shape[1]):
                    members[b, count] = k
                    count += alleles[site, ids[b, k]]
        offset[b, len(alleles)] = count


@_compiled
def mix(posterior, offset, members, left, right, share, dosage):
    """Fill dosage [B, L] with the interpolated posterior [B, N, K] of a site's ``members``."""
    for b in numba.prange(len(dosage)):
        for site in range(dosage.shape[1]):
            before, after = posterior[b, left[b, site]], posterior[b, right[b, site]]
            at_left, at_right = np.float32(0), np.float32(0)
            for number in range(offset[b, site], offset[b, site + 1]):
                at_left += before[members[b, number]]
                at_right += after[members[b, number]]
            dosage[b, site] = at_left + share[b, site] * (at_right - at_left)


@_compiled
def mix_adjoint(gradient, offset, members, left, right, share, slope):
    """Add to slope [B, N, K] what :func:`mix` hands back of ``gradient`` [B, L]."""
    for b in numba.prange(len(gradient)):
        for site in range(gradient.shape[1]):
            before, after = slope[b, left[b, site]], slope[b, right[b, site]]
            at_right = share[b, site] * gradient[b, site]
            at_left = gradient[b, site] - at_right
            for number in range(offset[b, site], offset[b, site + 1]):
                before[members[b, number]] += at_left
                after[members[b, number]] += at_right
