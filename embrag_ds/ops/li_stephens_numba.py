"""The copying model's loops, compiled for CPUs (numba), one haplotype a task.

Shapes: B haplotypes, T typed sites, K neighbours; N typed sites from ``first`` to ``last``, around the core; C chains,
a multiple of B, of which chain c is about haplotype c % B. All fill arrays that the caller made. Places looked up in
inner loops are unsigned: numba wraps signed ones round where they are negative, which takes as long as reading.
"""

from __future__ import annotations

import numba
import numpy as np

from embrag_ds.ops.threads import ParallelLoop


@ParallelLoop
def mismatches(alleles, place, ids, tokens, count, out):
    """out [B, T, K]: where haplotype ``ids`` [B, K] differs from ``tokens`` [B, T] at row ``place`` [B, T] of
    ``alleles`` [T', H]; False from a row's ``count`` [B] on."""
    queries, sites, neighbours = out.shape
    for b in numba.prange(queries):
        own = ids[b].astype(np.uint32)
        for t in range(sites):
            differs = out[b, t]
            if t < count[b]:
                row, token = alleles[place[b, t]], np.uint8(tokens[b, t])
                for k in range(neighbours):
                    differs[k] = row[own[k]] != token
            else:
                differs[:] = False


@ParallelLoop
def add_rows(rows, total):
    """Add rows uint8 [B, R, C] to total int32 [B, C]."""
    for b in numba.prange(len(rows)):
        for r in range(rows.shape[1]):
            for c in range(rows.shape[2]):
                total[b, c] += rows[b, r, c]


@ParallelLoop
def forward_backward(mismatch, mismatch_ratio, recombination, prior, first, last, posterior):
    """Fill posterior [C, N, K]; ``mismatch_ratio`` [C, T] is that of ``mismatch`` [B, T, K], ``prior`` [B, K] sums to 1
    over K.

    Nothing is kept for sites that are not asked for, and what a pass is divided by at a site is
    multiplied into the next.
    """
    queries, sites, neighbours = mismatch.shape
    for c in numba.prange(len(mismatch_ratio)):
        state = np.zeros(neighbours, dtype=np.float32)
        differs, chosen = mismatch[c % queries], prior[c % queries]
        stay, jump = np.float32(0), np.float32(1)
        for t in range(last):
            miss = mismatch_ratio[c, t]
            total = np.float32(0)
            for k in range(neighbours):
                moved = stay * state[k] + jump * chosen[k]
                moved *= miss if differs[t, k] else np.float32(1)
                state[k] = moved
                total += moved
            if t >= first:
                posterior[c, t - first] = state
            if t + 1 < last:
                stay, jump = (np.float32(1) - recombination[c, t + 1]) / total, recombination[c, t + 1]
        state[:] = np.float32(0)
        stay, jump = np.float32(0), np.float32(1)
        for t in range(sites - 1, first - 1, -1):
            miss = mismatch_ratio[c, t]
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
            stay, jump = (np.float32(1) - recombination[c, t]) / total, recombination[c, t]


@ParallelLoop
def adjoint(
    mismatch,
    mismatch_ratio,
    recombination,
    prior,
    first,
    last,
    posterior,
    gradient,
    ratio_gradient,
    recombination_gradient,
    prior_gradient,
):
    """Add the gradients of mismatch_ratio and recombination [C, T] and prior [C, K], given that of posterior [C, N, K].

    Reverse-mode differentiation of :func:`forward_backward`, whose passes are computed again here, a chain at a time:
    kept for all chains they would take more memory than the rest of a small network. Recursion by recursion: the
    backward pass ran from the last site to the first, so its adjoint runs from the first to the last, and the other
    way round for the forward pass. For x = u / sum(u): du = (dx - sum(dx x)) / sum(u).
    """
    queries, sites, neighbours = mismatch.shape
    one, zero = np.float32(1), np.float32(0)
    for c in numba.prange(len(mismatch_ratio)):
        differs, chosen = mismatch[c % queries], prior[c % queries]
        # alpha sums to 1, beta to 1 when weighed by the prior and what is seen; what either was divided by.
        alpha = np.empty((last, neighbours), dtype=np.float32)
        beta = np.empty((sites - first, neighbours), dtype=np.float32)
        alpha_total, beta_total = np.empty(last, dtype=np.float32), np.empty(sites - first, dtype=np.float32)
        for t in range(last):
            stay, jump = (one - recombination[c, t], recombination[c, t]) if t > 0 else (zero, one)
            miss, total = mismatch_ratio[c, t], zero
            before = alpha[max(t - 1, 0)]
            for k in range(neighbours):
                moved = jump * chosen[k] + (stay * before[k] if t > 0 else zero)
                moved *= miss if differs[t, k] else one
                alpha[t, k] = moved
                total += moved
            scale = one / total
            for k in range(neighbours):
                alpha[t, k] *= scale
            alpha_total[t] = total
        beta[sites - 1 - first] = one
        for t in range(sites - 1, first, -1):
            miss, total = mismatch_ratio[c, t], zero
            for k in range(neighbours):
                seen = beta[t - first, k] * (miss if differs[t, k] else one)
                beta[t - 1 - first, k] = seen
                total += seen * chosen[k]
            scale = (one - recombination[c, t]) / total
            for k in range(neighbours):
                beta[t - 1 - first, k] = scale * beta[t - 1 - first, k] + recombination[c, t]
            beta_total[t - first] = total
        # d L / d (alpha beta) at a site of N is (gradient - mean) / mass.
        mean, scale_of = np.empty(last - first, dtype=np.float32), np.empty(last - first, dtype=np.float32)
        for n in range(last - first):
            mass, weighed = zero, zero
            for k in range(neighbours):
                mass += alpha[first + n, k] * beta[n, k]
                weighed += gradient[c, n, k] * posterior[c, n, k]
            mean[n], scale_of[n] = weighed, one / mass
        # The gradient of beta, from site to site.
        chain = (gradient[c, 0] - mean[0]) * scale_of[0] * alpha[first]
        for t in range(first + 1, sites):
            stay, miss = one - recombination[c, t], mismatch_ratio[c, t]
            here = beta[t - first]
            weighed, moved = zero, zero
            for k in range(neighbours):
                weighed += chain[k] * here[k] * (miss if differs[t, k] else one)
                moved += chain[k]
            scale = one / beta_total[t - first]
            weighed *= scale
            recombination_gradient[c, t] += moved - weighed
            missed = zero
            for k in range(neighbours):
                state_gradient = stay * scale * (chain[k] - weighed * chosen[k])
                missed += state_gradient * here[k] if differs[t, k] else zero
                factor = miss if differs[t, k] else one
                prior_gradient[c, k] -= stay * scale * weighed * here[k] * factor
                chain[k] = state_gradient * factor
            ratio_gradient[c, t] += missed
            if t < last:
                n = t - first
                for k in range(neighbours):
                    chain[k] += (gradient[c, n, k] - mean[n]) * scale_of[n] * alpha[t, k]
        # The gradient of alpha, the other way.
        chain[:] = zero
        for t in range(last - 1, -1, -1):
            if t >= first:
                n = t - first
                for k in range(neighbours):
                    chain[k] += (gradient[c, n, k] - mean[n]) * scale_of[n] * beta[n, k]
            stay, jump = (one - recombination[c, t], recombination[c, t]) if t > 0 else (zero, one)
            miss, weighed = mismatch_ratio[c, t], zero
            for k in range(neighbours):
                weighed += chain[k] * alpha[t, k]
            scale = one / alpha_total[t]
            before = alpha[max(t - 1, 0)]
            missed, moved = zero, zero
            for k in range(neighbours):
                came = jump * chosen[k] + stay * before[k]
                state_gradient = (chain[k] - weighed) * scale
                missed += state_gradient * came if differs[t, k] else zero
                state_gradient *= miss if differs[t, k] else one
                prior_gradient[c, k] += jump * state_gradient
                moved += state_gradient * (chosen[k] - before[k])
                chain[k] = stay * state_gradient
            ratio_gradient[c, t] += missed
            recombination_gradient[c, t] += moved if t > 0 else zero


@ParallelLoop
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
