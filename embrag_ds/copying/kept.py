"""Haplotypes that are kept at a typed site, and what is known of them, a part of the loop along a stretch."""

from __future__ import annotations

import math

import numpy as np

from embrag_ds.copying.priors import compiled_part

SLOW, FAST = 0, 1
# Of each byte, its highest and its lowest one, how many ones it has, and their places, the lowest first.
_HIGHEST = np.array([value.bit_length() - 1 for value in range(256)], dtype=np.int8)
_LOWEST = np.array([(value & -value).bit_length() - 1 for value in range(256)], dtype=np.int8)
_ONES = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)
_PLACES = np.array([sorted(range(8), key=lambda bit: ~value >> bit & 1) for value in range(256)], dtype=np.int32)


@compiled_part
def compare(packed, query, differs):
    """Fill ``differs`` uint8 [ceil(T / 8), H]: where haplotypes differ from the target, packed as they are."""
    for block in range(len(packed)):
        own, known = np.uint8(0), np.uint8(0)
        for t in range(8 * block, min(8 * block + 8, len(query))):
            bit = np.uint8(1 << (t & 7))
            own |= bit if query[t] == 1 else np.uint8(0)
            known |= bit if query[t] < 2 else np.uint8(0)
        of_panel, into = packed[block], differs[block]
        for k in range(len(into)):
            into[k] = (of_panel[k] ^ own) & known


@compiled_part
def posterior(alpha, beta, keep, sums, scratch, half):
    """Copying probabilities at a site, without negligible ones.

    A probability is negligible below ``keep`` times the sum of squares of all, which is their mean as the model draws
    from them. ``sums`` are those of :func:`~embrag_ds.copying.recursions.backward_step`. Returns by what the remaining
    ones are to be multiplied.
    """
    slow_alpha, fast_alpha, slow_beta, fast_beta = alpha[0], alpha[1], beta[0], beta[1]
    flags, who, kept = scratch.flags[half], scratch.who[half], scratch.kept[half]
    least_slow, least_fast = keep * sums[SLOW, 1] / sums[SLOW, 0], keep * sums[FAST, 1] / sums[FAST, 0]
    for k in range(len(slow_alpha)):
        some = (slow_alpha[k] * slow_beta[k] > least_slow) | (fast_alpha[k] * fast_beta[k] > least_fast)
        flags[k] = np.uint8(some)
    count = _list_flagged(flags, who)
    slow_total, fast_total = np.float32(0), np.float32(0)
    for n in range(count):
        k = who[n]
        slow, fast = slow_alpha[k] * slow_beta[k], fast_alpha[k] * fast_beta[k]
        slow, fast = slow if slow > least_slow else np.float32(0), fast if fast > least_fast else np.float32(0)
        kept[n, SLOW], kept[n, FAST] = slow, fast
        slow_total += slow
        fast_total += fast
    scratch.number[half] = np.int64(count)
    return np.float32(1) / slow_total, np.float32(1) / fast_total


@compiled_part
def _list_flagged(flags, who):
    """List the haplotypes whose ``flags`` uint8 [a multiple of 64] are 1 in ``who``; returns how many.

    Without a branch for each, which would be mispredicted: the bits of eight flags name a row of a table.
    """
    count, words = np.uint64(0), flags.view(np.uint64)
    for first in range(0, len(words), 8):
        some = np.uint64(0)
        for n in range(8):
            some |= words[first + n]
        if some:
            for n in range(first, first + 8):
                bits = (words[n] * np.uint64(0x0102040810204080)) >> np.uint64(56)
                base = np.int32(8 * n)
                for i in range(8):
                    who[count + np.uint64(i)] = base + _PLACES[bits, i]
                count += np.uint64(_ONES[bits])
    return count


@compiled_part
def _last_mismatch(differs, k, t):
    """The last typed site, at most ``t``, where haplotype ``k`` differs from the target, or -1."""
    block = t >> 3
    differ = differs[block, k] & np.uint8((2 << (t & 7)) - 1)
    while differ == 0 and block > 0:
        block -= 1
        differ = differs[block, k]
    return 8 * block + np.int64(_HIGHEST[differ]) if differ else np.int64(-1)


@compiled_part
def _next_mismatch(differs, k, t, typed):
    """The first typed site from ``t`` on where haplotype ``k`` differs from the target; if none, the last of all."""
    block = t >> 3
    differ = differs[block, k] & np.uint8(0xFF << (t & 7) & 0xFF)
    while differ == 0 and block + 1 < len(differs):
        block += 1
        differ = differs[block, k]
    return 8 * block + np.int64(_LOWEST[differ]) if differ else np.int64(typed - 1)


@compiled_part
def describe(panel, t, scales, states, scratch, half):
    """Match lengths, uncertainty and ancestry of the haplotypes kept in ``half`` at a typed site.

    Their probabilities are multiplied by ``scales``. Of the uncertainty a seventh is kept, which is what the confidence
    head takes. Also lists the haplotypes kept here or at the typed site behind, the other half, with what is kept of
    both; returns how many they are.

    A match reaches from a mismatch to the next. Those of a haplotype that was kept at the site behind are known from
    there, unless one of the two sites is a mismatch.
    """
    lengths = squares = np.float32(0)
    who, kept, match, position = scratch.who[half], scratch.kept[half], scratch.match[half], panel.position
    flags, flags_behind = scratch.flags[half], scratch.flags[1 - half]
    who_behind, kept_behind, match_behind = scratch.who[1 - half], scratch.kept[1 - half], scratch.match[1 - half]
    differs, where, typed = states.differs, scratch.where, len(position)
    here, bit = differs[t >> 3], np.uint8(1 << (t & 7))
    slow_scale, fast_scale, either, both = scales[SLOW], scales[FAST], scratch.either, scratch.both
    ancestry, population = scratch.ancestry[half], panel.population
    ancestry[:] = np.float32(0)
    number = np.uint64(scratch.number[half])
    for n in range(number):
        k = np.uint64(who[n])
        slow_behind = fast_behind = length_behind = np.float32(0)
        if flags_behind[k]:
            m = np.uint64(where[k])
            begin, end = match_behind[m, 0], match_behind[m, 1]
            slow_behind, fast_behind, length_behind = kept_behind[m, 0], kept_behind[m, 1], kept_behind[m, 2]
            if begin > t:
                begin = np.int32(_last_mismatch(differs, k, t))
            if here[k] & bit:
                end = np.int32(t)
        else:
            begin = np.int32(_last_mismatch(differs, k, t))
            end = np.int32(_next_mismatch(differs, k, t, typed))
        match[n, 0], match[n, 1], where[k] = begin, end, n
        share, fast = slow_scale * kept[n, SLOW], fast_scale * kept[n, FAST]
        weighed = share * (position[end] - position[max(begin, 0)])
        kept[n, 0], kept[n, 1], kept[n, 2] = share, fast, weighed
        either[n] = k
        both[n, 0], both[n, 1], both[n, 2], both[n, 3] = share, fast, weighed, np.float32(0)
        both[n, 4], both[n, 5], both[n, 6], both[n, 7] = slow_behind, fast_behind, length_behind, np.float32(0)
        lengths += weighed
        squares += share * share
        ancestry[population[k]] += share
    scratch.lengths[half], scratch.uncertainty[half] = lengths, -np.float32(math.log(squares)) / np.float32(7)
    for place in range(scratch.number[1 - half]):
        other = np.uint64(who_behind[place])
        either[number] = other
        both[number, 0] = both[number, 1] = both[number, 2] = both[number, 3] = np.float32(0)
        for lane in range(4):
            both[number, 4 + lane] = kept_behind[place, lane]
        number += np.uint64(flags[other] == 0)
    return np.int64(number)
