"""Loops over the neighbours' alleles, compiled for CPUs (numba), one haplotype or stretch of sites a task.

Shapes: B haplotypes, K neighbours, L sites, H reference haplotypes; N typed sites around the core; G blocks of
sites. All fill arrays that the caller made. Places looked up in inner loops are unsigned: numba wraps signed ones
round where they are negative, which takes as long as reading.
"""

from __future__ import annotations

import numba
import numpy as np

from embrag_ds.ops.threads import ParallelLoop


@ParallelLoop
def list_carriers(alleles, start, who):
    """Fill ``who`` from ``start`` [L + 1] on with the columns of alleles [L, H] that are 1, where there is room."""
    for site in numba.prange(len(alleles)):
        place = start[site]
        if place < start[site + 1]:
            for haplotype in range(alleles.shape[1]):
                if alleles[site, haplotype]:
                    who[place] = haplotype
                    place += 1


@ParallelLoop
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


@ParallelLoop
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


@ParallelLoop
def mix_adjoint(gradient, offset, members, left, right, share, posterior_gradient):
    """Add to posterior_gradient [B, N, K] what :func:`mix` hands back of ``gradient`` [B, L]."""
    for b in numba.prange(len(gradient)):
        carriers = members[b]
        for site in range(gradient.shape[1]):
            before, after = posterior_gradient[b, left[b, site]], posterior_gradient[b, right[b, site]]
            at_right = share[b, site] * gradient[b, site]
            at_left = gradient[b, site] - at_right
            for number in range(offset[b, site], offset[b, site + 1]):
                k = carriers[number]
                before[k] += at_left
                after[k] += at_right


@ParallelLoop
def number_sequences(alleles, bounds, sequence, words, count, carrying):
    """Number what haplotypes carry in block g of alleles [L, H], the sites from bounds[g] to bounds[g + 1] (64 at
    most): sequence [G, H]; words [G, H] spell the first ``count`` [G], site by site from the lowest bit on, and
    ``carrying`` [L] of them have ALT at a site."""
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
        for site in range(bounds[g], bounds[g + 1]):
            place = np.uint64(site - bounds[g])
            carrying[site] = np.uint64(0)
            for word in words[g, : count[g]]:
                carrying[site] += (word >> place) & np.uint64(1)


@ParallelLoop
def list_sequences(words, count, bounds, start, who):
    """Fill ``who`` from ``start`` [L + 1] on with the numbers of the sequences that have ALT at a site."""
    for g in numba.prange(len(count)):
        for site in range(bounds[g], bounds[g + 1]):
            bit, place = np.uint64(site - bounds[g]), start[site]
            for number in range(count[g]):
                if (words[g, number] >> bit) & np.uint64(1):
                    who[place] = number
                    place += np.uint64(1)


@numba.njit(cache=True)
def run_end(left, right, begin, stop):
    """Where the sites end, ``stop`` at the latest, that lie between the same typed sites as site ``begin``."""
    end = begin + 1
    while end < stop and left[end] == left[begin] and right[end] == right[begin]:
        end += 1
    return end


@ParallelLoop
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
                end = run_end(left[b], right[b], begin, bounds[g + 1])
                before[: count[g]] = np.float32(0)
                after[: count[g]] = np.float32(0)
                first, second = posterior[b, left[b, begin]], posterior[b, right[b, begin]]
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


@ParallelLoop
def mix_sequences_adjoint(gradient, ids, sequence, count, bounds, start, who, left, right, share, posterior_gradient):
    """Add to posterior_gradient [B, N, K] what :func:`mix_sequences` hands back of ``gradient`` [B, L]."""
    for b in numba.prange(len(gradient)):
        own = ids[b].astype(np.uint32)
        before = np.empty(count.max(), dtype=np.float32)
        after = np.empty_like(before)
        for g in range(len(count)):
            number = sequence[g]
            begin = bounds[g]
            while begin < bounds[g + 1]:
                end = run_end(left[b], right[b], begin, bounds[g + 1])
                before[: count[g]] = np.float32(0)
                after[: count[g]] = np.float32(0)
                for site in range(begin, end):
                    at_right = share[b, site] * gradient[b, site]
                    at_left = gradient[b, site] - at_right
                    for place in range(start[site], start[site + 1]):
                        before[who[place]] += at_left
                        after[who[place]] += at_right
                first, second = posterior_gradient[b, left[b, begin]], posterior_gradient[b, right[b, begin]]
                for k in range(len(own)):
                    n = number[own[k]]
                    first[k] += before[n]
                    second[k] += after[n]
                begin = end
