"""The copying model's loops, compiled for CPUs (numba), one haplotype a task.

Shapes: B haplotypes, T typed sites, K neighbours, L sites; N typed sites from ``first`` to ``last``, around the core; C
chains, a multiple of B, of which chain c is about haplotype c % B. All fill arrays that the caller made. Places looked
up in inner loops are unsigned: numba wraps signed ones round where they are negative, which takes as long as reading.
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
        own = ids[b].astype(np.uint32)
        for t in range(sites):
            differs = out[b, t]
            if t < count[b]:
                row, token = alleles[place[b, t]], np.uint8(tokens[b, t])
                for k in range(neighbours):
                    differs[k] = row[own[k]] != token
            else:
                differs[:] = False


@_compiled
def add_rows(rows, total):
    """Add rows uint8 [B, R, C] to total int32 [B, C]."""
    for b in numba.prange(len(rows)):
        for r in range(rows.shape[1]):
            for c in range(rows.shape[2]):
                total[b, c] += rows[b, r, c]


@_compiled
def forward_backward(mismatch, likelihood, switch, prior, first, last, posterior):
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
def adjoint(
    mismatch,
    likelihood,
    switch,
    prior,
    first,
    last,
    posterior,
    gradient,
    likelihood_slope,
    switch_slope,
    prior_slope,
):
    """Add d L / d likelihood, d L / d switch [C, T] and d L / d prior [C, K], given ``gradient`` = d L / d posterior
    [C, N, K].

    Reverse-mode differentiation of :func:`forward_backward`, whose passes are computed again here, a chain at a time:
    kept for all chains they would take more memory than the rest of a small network. Recursion by recursion: the
    backward pass ran from the last site to the first, so its adjoint runs from the first to the last, and the other
    way round for the forward pass. For x = u / sum(u): du = (dx - sum(dx x)) / sum(u).
    """
    queries, sites, neighbours = mismatch.shape
    one, zero = np.float32(1), np.float32(0)
    for c in numba.prange(len(likelihood)):
        differs, chosen = mismatch[c % queries], prior[c % queries]
        # alpha sums to 1, beta to 1 when weighed by the prior and what is seen; what either was divided by.
        alpha = np.empty((last, neighbours), dtype=np.float32)
        beta = np.empty((sites - first, neighbours), dtype=np.float32)
        alpha_total, beta_total = np.empty(last, dtype=np.float32), np.empty(sites - first, dtype=np.float32)
        for t in range(last):
            stay, jump = (one - switch[c, t], switch[c, t]) if t > 0 else (zero, one)
            miss, total = likelihood[c, t], zero
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
            miss, total = likelihood[c, t], zero
            for k in range(neighbours):
                seen = beta[t - first, k] * (miss if differs[t, k] else one)
                beta[t - 1 - first, k] = seen
                total += seen * chosen[k]
            scale = (one - switch[c, t]) / total
            for k in range(neighbours):
                beta[t - 1 - first, k] = scale * beta[t - 1 - first, k] + switch[c, t]
            beta_total[t - first] = total
        # d L / d (alpha beta) at a site of N is (gradient - mean) / mass.
        mean, scale_of = np.empty(last - first, dtype=np.float32), np.empty(last - first, dtype=np.float32)
        for n in range(last - first):
            mass, weighed = zero, zero
            for k in range(neighbours):
                mass += alpha[first + n, k] * beta[n, k]
                weighed += gradient[c, n, k] * posterior[c, n, k]
            mean[n], scale_of[n] = weighed, one / mass
        # The slope of beta, from site to site.
        chain = (gradient[c, 0] - mean[0]) * scale_of[0] * alpha[first]
        for t in range(first + 1, sites):
            stay, miss = one - switch[c, t], likelihood[c, t]
            here = beta[t - first]
            weighed, moved = zero, zero
            for k in range(neighbours):
                weighed += chain[k] * here[k] * (miss if differs[t, k] else one)
                moved += chain[k]
            scale = one / beta_total[t - first]
            weighed *= scale
            switch_slope[c, t] += moved - weighed
            missed = zero
            for k in range(neighbours):
                slope = stay * scale * (chain[k] - weighed * chosen[k])
                missed += slope * here[k] if differs[t, k] else zero
                factor = miss if differs[t, k] else one
                prior_slope[c, k] -= stay * scale * weighed * here[k] * factor
                chain[k] = slope * factor
            likelihood_slope[c, t] += missed
            if t < last:
                n = t - first
                for k in range(neighbours):
                    chain[k] += (gradient[c, n, k] - mean[n]) * scale_of[n] * alpha[t, k]
        # The slope of alpha, the other way.
        chain[:] = zero
        for t in range(last - 1, -1, -1):
            if t >= first:
                n = t - first
                for k in range(neighbours):
                    chain[k] += (gradient[c, n, k] - mean[n]) * scale_of[n] * beta[n, k]
            stay, jump = (one - switch[c, t], switch[c, t]) if t > 0 else (zero, one)
            miss, weighed = likelihood[c, t], zero
            for k in range(neighbours):
                weighed += chain[k] * alpha[t, k]
            scale = one / alpha_total[t]
            before = alpha[max(t - 1, 0)]
            missed, moved = zero, zero
            for k in range(neighbours):
                came = jump * chosen[k] + stay * before[k]
                slope = (chain[k] - weighed) * scale
                missed += slope * came if differs[t, k] else zero
                slope *= miss if differs[t, k] else one
                prior_slope[c, k] += jump * slope
                moved += slope * (chosen[k] - before[k])
                chain[k] = stay * slope
            likelihood_slope[c, t] += missed
            switch_slope[c, t] += moved if t > 0 else zero


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
        own, found = ids[b].astype(np.uint32), members[b]
        for k in range(len(own)):
            place[own[k]] = k
        count = np.uint64(0)
        for site in range(len(alleles)):
            offset[b, site] = count
            if listed[site]:
                for number in range(start[site], start[site + 1]):
                    k = place[who[number]]
                    found[count] = k
                    count += np.uint64(k >= 0)
            else:
                row = alleles[site]
                for k in range(len(own)):
                    found[count] = k
                    count += np.uint64(row[own[k]])
        offset[b, len(alleles)] = count


@_compiled
def mix(posterior, offset, members, left, right, share, dosage):
    """Fill dosage [B, L] with the interpolated posterior [B, N, K] of a site's ``members``."""
    for b in numba.prange(len(dosage)):
        carriers = members[b]
        for site in range(dosage.shape[1]):
            before, after = posterior[b, left[b, site]], posterior[b, right[b, site]]
            at_left, at_right = np.float32(0), np.float32(0)
            for number in range(offset[b, site], offset[b, site + 1]):
                k = carriers[number]
                at_left += before[k]
                at_right += after[k]
            dosage[b, site] = at_left + share[b, site] * (at_right - at_left)


@_compiled
def mix_adjoint(gradient, offset, members, left, right, share, slope):
    """Add to slope [B, N, K] what :func:`mix` hands back of ``gradient`` [B, L]."""
    for b in numba.prange(len(gradient)):
        carriers = members[b]
        for site in range(gradient.shape[1]):
            before, after = slope[b, left[b, site]], slope[b, right[b, site]]
            at_right = share[b, site] * gradient[b, site]
            at_left = gradient[b, site] - at_right
            for number in range(offset[b, site], offset[b, site + 1]):
                k = carriers[number]
                before[k] += at_left
                after[k] += at_right


@_compiled
def number_sequences(alleles, bounds, sequence, words, count):
    """Number what haplotypes carry in block g of alleles [L, H], the sites from bounds[g] to bounds[g + 1] (64 at
    most): sequence [G, H]; words [G, H] spell the first ``count`` [G], site by site from the lowest bit on."""
    for g in numba.prange(len(count)):
        spelt = np.zeros(alleles.shape[1], dtype=np.uint64)
        for site in range(bounds[g], bounds[g + 1]):
            place = np.uint64(site - bounds[g])
            for haplotype in range(len(spelt)):
                spelt[haplotype] |= np.uint64(alleles[site, haplotype]) << place
        number = -1
        for haplotype in np.argsort(spelt):
            if number < 0 or words[g, number] != spelt[haplotype]:
                number += 1
                words[g, number] = spelt[haplotype]
            sequence[g, haplotype] = number
        count[g] = number + 1


@_compiled
def list_sequences(words, count, bounds, start, who):
    """Of every site the numbers of the sequences with ALT: who[start[site] : start[site + 1]]. Without room in ``who``
    only their number, start[site + 1]."""
    for g in numba.prange(len(count)):
        for site in range(bounds[g], bounds[g + 1]):
            place, found = np.uint64(site - bounds[g]), np.uint64(0)
            for number in range(count[g]):
                carries = (words[g, number] >> place) & np.uint64(1)
                if len(who) and carries:
                    who[start[site] + found] = number
                found += carries
            if len(who) == 0:
                start[site + 1] = found


@_compiled
def mix_sequences(posterior, ids, sequence, count, bounds, start, who, left, right, share, dosage):
    """:func:`mix` by sequences: a neighbour's weight goes to what it carries between two typed sites, and from there
    to every site."""
    for b in numba.prange(len(dosage)):
        own = ids[b].astype(np.uint32)
        before = np.empty(count.max(), dtype=np.float32)
        after = np.empty_like(before)
        for g in range(len(count)):
            number = sequence[g]
            begin = bounds[g]
            while begin < bounds[g + 1]:
                at_left, at_right = left[b, begin], right[b, begin]
                end = begin + 1
                while end < bounds[g + 1] and left[b, end] == at_left and right[b, end] == at_right:
                    end += 1
                before[: count[g]] = np.float32(0)
                after[: count[g]] = np.float32(0)
                first, second = posterior[b, at_left], posterior[b, at_right]
                for k in range(len(own)):
                    n = number[own[k]]
                    before[n] += first[k]
                    after[n] += second[k]
                for site in range(begin, end):
                    one, other = np.float32(0), np.float32(0)
                    for place in range(start[site], start[site + 1]):
                        one += before[who[place]]
                        other += after[who[place]]
                    dosage[b, site] = one + share[b, site] * (other - one)
                begin = end


@_compiled
def mix_sequences_adjoint(gradient, ids, sequence, count, bounds, start, who, left, right, share, slope):
    """Add to slope [B, N, K] what :func:`mix_sequences` hands back of ``gradient`` [B, L]."""
    for b in numba.prange(len(gradient)):
        own = ids[b].astype(np.uint32)
        before = np.empty(count.max(), dtype=np.float32)
        after = np.empty_like(before)
        for g in range(len(count)):
            number = sequence[g]
            begin = bounds[g]
            while begin < bounds[g + 1]:
                at_left, at_right = left[b, begin], right[b, begin]
                before[: count[g]] = np.float32(0)
                after[: count[g]] = np.float32(0)
                end = begin
                while end < bounds[g + 1] and left[b, end] == at_left and right[b, end] == at_right:
                    of_right = share[b, end] * gradient[b, end]
                    of_left = gradient[b, end] - of_right
                    for place in range(start[end], start[end + 1]):
                        before[who[place]] += of_left
                        after[who[place]] += of_right
                    end += 1
                first, second = slope[b, at_left], slope[b, at_right]
                for k in range(len(own)):
                    n = number[own[k]]
                    first[k] += before[n]
                    second[k] += after[n]
                begin = end
