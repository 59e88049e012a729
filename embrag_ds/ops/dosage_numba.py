"""CPU loops of the copied dosage (:mod:`embrag_ds.ops.dosage`) and of haplotypes' distances, compiled by numba.

Every loop runs in parallel over query haplotypes, sites or blocks of sites, and fills arrays allocated by its caller.
Shapes: B query haplotypes, K neighbours, L sites of the core, H reference haplotypes. M: typed sites in or next to the
core. G: blocks of sites. Indices in inner loops are unsigned, because numba checks signed ones for negative values,
which takes as long as the access itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numba
import numpy as np

from embrag_ds.ops.threads import ParallelLoop

_WORD_BITS = 64
_PACKED_BYTES = 1 << 23


@ParallelLoop
def list_carriers(alleles, start, who):
    """List the ALT carriers of each site: ``who[start[l] : start[l + 1]]`` receives the columns that are 1.

    ``alleles`` uint8 [L, H]; ``start`` int64 [L + 1]; ``who`` int32. A site with no room in ``who`` is skipped.
    """
    for site in numba.prange(len(alleles)):
        place = start[site]
        if place < start[site + 1]:
            for haplotype in range(alleles.shape[1]):
                if alleles[site, haplotype]:
                    who[place] = haplotype
                    place += 1


@ParallelLoop
def list_neighbours(alleles, listed, start, who, ids, offset, members):
    """List the neighbours that carry ALT at each site, as :class:`embrag_ds.ops.dosage.Carriers` holds them.

    ``alleles`` uint8 [L, H]; ``ids`` int64 [B, K]. At sites ``listed`` bool [L], the carriers among all haplotypes are
    ``who[start[l] : start[l + 1]]``. Fills ``offset`` int32 [B, L + 1] and ``members`` int32 [B, n]. One discarded
    value may follow the last carrier of a row.
    """
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
    """Copied dosage from lists of carriers: fill ``dosage`` float32 [B, L].

    A site's dosage is the sum of the posterior float32 [B, M, K] over its ``members``. It is interpolated between the
    typed sites ``left`` and ``right`` [B, L], the right one weighted by ``share`` [B, L].
    """
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
    """Adjoint of :func:`mix`: add the gradient of the posterior to ``posterior_gradient`` float32 [B, M, K].

    ``gradient`` float32 [B, L] is that of the dosage.
    """
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
def number_sequences(rows, haplotypes, bounds, sequence, words, count, carrying):
    """Number the distinct allele sequences of every block, as :class:`embrag_ds.ops.dosage.Blocks` holds them.

    ``rows`` uint64 [L, ceil(H / 64)] are the sites' alleles, one bit for each of H ``haplotypes``. ``bounds`` int64
    [G + 1] are at most 64 sites apart. Fills ``sequence`` uint32 [G, H], ``words`` uint64 [G, H] and ``count`` int64
    [G]. ``carrying`` uint64 [L] becomes the number of sequences with ALT at each site.

    Bits of 64 sites and 64 haplotypes are transposed at once (Warren, Hacker's Delight, section 7-3).
    """
    for g in numba.prange(len(count)):
        padded = np.empty(64 * rows.shape[1], dtype=np.uint64)
        sites = bounds[g + 1] - bounds[g]
        for group in range(rows.shape[1]):
            square = padded[64 * group : 64 * group + 64]
            for site in range(sites):
                square[site] = rows[bounds[g] + site, group]
            for site in range(sites, 64):
                square[site] = np.uint64(0)
            half, kept = 32, np.uint64(0xFFFFFFFF)
            while half:
                shift = np.uint64(half)
                for first in range(0, 64, 2 * half):
                    for row in range(first, first + half):
                        other = row + half
                        swapped = ((square[row] >> shift) ^ square[other]) & kept
                        square[row] ^= swapped << shift
                        square[other] ^= swapped
                half >>= 1
                kept ^= kept << np.uint64(half)
        spelt = padded[:haplotypes]
        # A hash table, because sequences are few and sorting all haplotypes takes ten times as long.
        bits = 1
        while 1 << bits < 2 * len(spelt):
            bits += 1
        table, distinct = np.full(1 << bits, -1, dtype=np.int32), np.empty(len(spelt), dtype=np.uint64)
        number, mask, shift = 0, (1 << bits) - 1, np.uint64(64 - bits)
        for haplotype in range(len(spelt)):
            slot = np.int64((spelt[haplotype] * np.uint64(0x9E3779B97F4A7C15)) >> shift)
            while table[slot] >= 0 and distinct[table[slot]] != spelt[haplotype]:
                slot = (slot + 1) & mask
            if table[slot] < 0:
                table[slot] = number
                distinct[number] = spelt[haplotype]
                number += 1
            sequence[g, haplotype] = table[slot]
        count[g] = number
        rank = np.empty(number, dtype=np.uint32)
        for order, found in enumerate(np.argsort(distinct[:number])):
            words[g, order] = distinct[found]
            rank[found] = order
        for haplotype in range(len(spelt)):
            sequence[g, haplotype] = rank[sequence[g, haplotype]]
        for site in range(bounds[g], bounds[g + 1]):
            place = np.uint64(site - bounds[g])
            carrying[site] = np.uint64(0)
            for word in words[g, : count[g]]:
                carrying[site] += (word >> place) & np.uint64(1)


@ParallelLoop
def list_sequences(words, count, bounds, start, who):
    """List the sequences with ALT at each site: ``who[start[l] : start[l + 1]]`` receives their numbers.

    ``words`` uint64 [G, H]; ``count`` int64 [G]; ``bounds`` int64 [G + 1]; ``start`` uint64 [L + 1]; ``who`` uint32.
    """
    for g in numba.prange(len(count)):
        for site in range(bounds[g], bounds[g + 1]):
            bit, place = np.uint64(site - bounds[g]), start[site]
            for number in range(count[g]):
                if (words[g, number] >> bit) & np.uint64(1):
                    who[place] = number
                    place += np.uint64(1)


@ParallelLoop
def count_different(words, known, others, least):
    """Fill ``least`` int64 [B] with the number of sites at which a haplotype differs from the nearest of others.

    ``words`` uint64 [B] and ``others`` uint64 [H] are the alleles of 64 sites, one in each bit. Sites count where
    ``known`` uint64 [B] is set.
    """
    for b in numba.prange(len(words)):
        own, mask, fewest = words[b], known[b], np.uint64(64)
        for k in range(len(others)):
            bits = (own ^ others[k]) & mask  # then how many are set (Warren, Hacker's Delight, section 5-1)
            bits -= bits >> np.uint64(1) & np.uint64(0x5555555555555555)
            bits = (bits & np.uint64(0x3333333333333333)) + (bits >> np.uint64(2) & np.uint64(0x3333333333333333))
            bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
            fewest = min(fewest, (bits * np.uint64(0x0101010101010101)) >> np.uint64(56))
        least[b] = fewest


@numba.njit  # kept on the disk as a part of the loops that call it
def run_end(left, right, begin, stop):
    """End, at most ``stop``, of the run of sites that have the same flanking typed sites as site ``begin``.

    ``left`` and ``right`` int64 [L] are the flanking typed sites of one query haplotype.
    """
    end = begin + 1
    while end < stop and left[end] == left[begin] and right[end] == right[begin]:
        end += 1
    return end


@ParallelLoop
def mix_sequences(posterior, ids, sequence, count, bounds, start, who, left, right, share, dosage):
    """Copied dosage from distinct sequences: fill ``dosage`` float32 [B, L] as :func:`mix` does.

    In every run of sites with the same flanking typed sites, the posterior float32 [B, M, K] is summed per sequence. A
    site's dosage is then the sum over the sequences that carry ALT there. ``ids`` int64 [B, K]; for the other arguments
    see :class:`embrag_ds.ops.dosage.Blocks` and :class:`embrag_ds.ops.dosage.FlankingSites`.
    """
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
    """Adjoint of :func:`mix_sequences`: add the gradient of the posterior to ``posterior_gradient`` float32 [B, M, K].

    ``gradient`` float32 [B, L] is that of the dosage.
    """
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


@dataclass(frozen=True)
class Numbered:
    """The first four fields of :class:`embrag_ds.ops.dosage.Blocks`, and more.

    ``carrying`` uint64 [L] are the sequences with ALT at each site.
    """

    bounds: np.ndarray
    sequence: np.ndarray
    words: np.ndarray
    count: np.ndarray
    carrying: np.ndarray

    @classmethod
    def made(cls, packed: Callable[[slice], np.ndarray], sites: int, haplotypes: int, cuts: np.ndarray) -> Numbered:
        """Cut ``sites`` at the sites ``cuts``, as :meth:`embrag_ds.ops.dosage.Blocks.made` does.

        ``packed`` gives the alleles of some consecutive sites, uint8 [n, ceil(H / 8)] with the first haplotype lowest,
        at most 8 MiB or one block at a time.
        """
        runs = np.unique(np.concatenate([[0], cuts, [sites]]))
        bounds = np.concatenate([*(np.arange(*run, _WORD_BITS) for run in pairwise(runs)), [sites]])
        number = len(bounds) - 1
        sequence = np.empty((number, haplotypes), dtype=np.uint32)
        words = np.empty((number, haplotypes), dtype=np.uint64)
        count, carrying = np.empty(number, dtype=np.int64), np.empty(sites, dtype=np.uint64)
        step = max(1, _PACKED_BYTES // (8 * haplotypes))
        for first in range(0, number, step):
            here = slice(first, min(first + step, number))
            span = slice(int(bounds[here.start]), int(bounds[here.stop]))
            within = bounds[here.start : here.stop + 1] - span.start
            given = packed(span)
            rows = np.zeros((len(given), -(-haplotypes // 64), 8), dtype=np.uint8)
            rows.reshape(len(given), -1)[:, : given.shape[1]] = given
            number_sequences(
                rows.view("<u8")[..., 0], haplotypes, within, sequence[here], words[here], count[here], carrying[span]
            )
        return cls(bounds, sequence, words, count, carrying)
