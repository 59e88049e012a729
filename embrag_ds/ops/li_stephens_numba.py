"""CPU loops of the Li and Stephens copying model and its adjoint, compiled by numba.

Every loop runs in parallel over query haplotypes or chains, and fills arrays allocated by its caller. Shapes: B query
haplotypes, T typed sites, K neighbours, G places; M typed sites from ``first[b]`` on, in or next to the core. C are
chains, a multiple of B; chain c models haplotype ``c % B``. Indices in inner loops are unsigned, because numba checks
signed ones for negative values, which takes as long as the access itself.
"""

from __future__ import annotations

import numba
import numpy as np

from embrag_ds.ops.threads import ParallelLoop

MOST_MISMATCH_NATS = 30.0
LEAST_RECOMBINATION = 1e-8
MOST_PRIOR_NATS = 24.0
"""Bounds that keep every state above the smallest float32, and its inverse below the largest.

The last one says how far a neighbour's prior lies below the greatest at most. A state, of those that sum to 1, is at
least the product of the least emission factor, the least recombination and the least prior: 3.5e-32 over the number of
neighbours. Without bounds all states could be 0 where the genetic map is flat and each neighbour differs somewhere.
"""


@ParallelLoop
def mismatches(alleles, place, ids, tokens, count, out):
    """Mismatch indicators: fill ``out`` bool [B, T, K]; see :func:`embrag_ds.ops.li_stephens.mismatches`.

    ``alleles`` uint8 [sites, H]; ``place`` and ``tokens`` int64 [B, T]; ``ids`` int64 [B, K]; ``count`` int64 [B].
    """
    queries, sites, neighbours = out.shape
    for b in numba.prange(queries):
        own = ids[b].astype(np.uint32)
        for t in range(sites):
            differs = out[b, t]
            # A token that is no allele, MASK, differs from none.
            if t < count[b] and tokens[b, t] < 2:
                row, token = alleles[place[b, t]], np.uint8(tokens[b, t])
                for k in range(neighbours):
                    differs[k] = row[own[k]] != token
            else:
                differs[:] = False


@ParallelLoop
def add_by_place(rows, place, total):
    """Add ``rows`` uint8 [B, T, K] to ``total`` float32 [B, G, K], each at its ``place`` int64 [B, T]."""
    for b in numba.prange(len(rows)):
        for r in range(rows.shape[1]):
            here = total[b, place[b, r]]
            for c in range(rows.shape[2]):
                here[c] += np.float32(rows[b, r, c])


@ParallelLoop
def forward_backward(mismatch, mismatch_ratio, recombination, prior, place, firsts, posterior):
    """Forward-backward algorithm: fill ``posterior`` float32 [C, M, K] with copying probabilities.

    ``mismatch`` bool [B, T, K]; ``mismatch_ratio`` float32 [C, T] is the emission factor of a mismatch;
    ``recombination`` float32 [C, T]; ``prior`` float32 [B, G, K] sums to 1 over K; ``place`` int64 [B, T] says which of
    the G counts at each site; ``firsts`` int64 [B] is the first of the M sites of each haplotype. Only the states of
    those are stored, and the normalisation of a site is multiplied into the step to the next.
    """
    queries, sites, neighbours = mismatch.shape
    for c in numba.prange(len(mismatch_ratio)):
        state = np.zeros(neighbours, dtype=np.float32)
        differs, priors, places = mismatch[c % queries], prior[c % queries], place[c % queries]
        first = firsts[c % queries]
        last = first + posterior.shape[1]
        stay, jump = np.float32(0), np.float32(1)
        for t in range(last):
            miss, chosen = mismatch_ratio[c, t], priors[places[t]]
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
            miss, chosen = mismatch_ratio[c, t], priors[places[t]]
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
    place,
    firsts,
    posterior,
    gradient,
    ratio_gradient,
    recombination_gradient,
    prior_gradient,
):
    """Adjoint of :func:`forward_backward`, by reverse-mode differentiation of its recursions.

    Given ``gradient`` float32 [C, M, K] of ``posterior``, adds to ``ratio_gradient`` and ``recombination_gradient``
    float32 [C, T] and to ``prior_gradient`` float32 [C, G, K]. Forward and backward probabilities are computed again,
    one chain at a time. Stored for all chains, they would take more memory than the rest of a small network.

    The backward recursion ran from the last site to the first, so its adjoint runs from the first to the last. That of
    the forward recursion runs from the last to the first. For ``x = u / sum(u)`` the rule is
    ``du = (dx - sum(dx x)) / sum(u)``.
    """
    queries, sites, neighbours = mismatch.shape
    one, zero = np.float32(1), np.float32(0)
    for c in numba.prange(len(mismatch_ratio)):
        differs, priors, places = mismatch[c % queries], prior[c % queries], place[c % queries]
        first = firsts[c % queries]
        last = first + posterior.shape[1]
        # Normalised forward (alpha) and backward (beta) probabilities, and the sums they were divided by. The
        # normalisation: alpha sums to 1, and beta does when weighted by the prior and the emission.
        alpha = np.empty((last, neighbours), dtype=np.float32)
        beta = np.empty((sites - first, neighbours), dtype=np.float32)
        alpha_total, beta_total = np.empty(last, dtype=np.float32), np.empty(sites - first, dtype=np.float32)
        for t in range(last):
            stay, jump = (one - recombination[c, t], recombination[c, t]) if t > 0 else (zero, one)
            miss, total, chosen = mismatch_ratio[c, t], zero, priors[places[t]]
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
            miss, total, chosen = mismatch_ratio[c, t], zero, priors[places[t]]
            for k in range(neighbours):
                seen = beta[t - first, k] * (miss if differs[t, k] else one)
                beta[t - 1 - first, k] = seen
                total += seen * chosen[k]
            scale = (one - recombination[c, t]) / total
            for k in range(neighbours):
                beta[t - 1 - first, k] = scale * beta[t - 1 - first, k] + recombination[c, t]
            beta_total[t - first] = total
        # d loss / d (alpha beta) at one of the M sites is (gradient - mean) / mass.
        mean, scale_of = np.empty(last - first, dtype=np.float32), np.empty(last - first, dtype=np.float32)
        for n in range(last - first):
            mass, weighed = zero, zero
            for k in range(neighbours):
                mass += alpha[first + n, k] * beta[n, k]
                weighed += gradient[c, n, k] * posterior[c, n, k]
            mean[n], scale_of[n] = weighed, one / mass
        # chain: the gradient of beta, carried from site to site.
        chain = (gradient[c, 0] - mean[0]) * scale_of[0] * alpha[first]
        for t in range(first + 1, sites):
            stay, miss = one - recombination[c, t], mismatch_ratio[c, t]
            here = beta[t - first]
            chosen, chosen_gradient = priors[places[t]], prior_gradient[c, places[t]]
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
                chosen_gradient[k] -= stay * scale * weighed * here[k] * factor
                chain[k] = state_gradient * factor
            ratio_gradient[c, t] += missed
            if t < last:
                n = t - first
                for k in range(neighbours):
                    chain[k] += (gradient[c, n, k] - mean[n]) * scale_of[n] * alpha[t, k]
        # chain: the gradient of alpha, carried from the last site to the first.
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
            chosen, chosen_gradient = priors[places[t]], prior_gradient[c, places[t]]
            missed, moved = zero, zero
            for k in range(neighbours):
                came = jump * chosen[k] + stay * before[k]
                state_gradient = (chain[k] - weighed) * scale
                missed += state_gradient * came if differs[t, k] else zero
                state_gradient *= miss if differs[t, k] else one
                chosen_gradient[k] += jump * state_gradient
                moved += state_gradient * (chosen[k] - before[k])
                chain[k] = stay * state_gradient
            ratio_gradient[c, t] += missed
            recombination_gradient[c, t] += moved if t > 0 else zero


@ParallelLoop
def match_lengths(mismatch, position, bounds, firsts, lengths):
    """Match lengths in cM: fill ``lengths`` float32 [B, M, K]; see :func:`embrag_ds.ops.li_stephens.match_lengths`.

    ``mismatch`` bool [B, T, K]; ``position`` float32 [B, T]; ``bounds`` float32 [B, 2] are the positions of a row's
    first and last typed site; ``firsts`` int64 [B] is the first of its M sites.
    """
    queries, sites, neighbours = mismatch.shape
    for b in numba.prange(queries):
        first = firsts[b]
        last = first + lengths.shape[1]
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
