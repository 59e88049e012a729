"""Haplotypes that are kept at a typed site, and what is known of them, a part of the loop along a stretch."""

from __future__ import annotations

import math

import numpy as np

from embrag_ds.compiled.parts import compiled_part

SLOW, FAST = 0, 1
# Of each byte, how many ones it has, and their places, the lowest first.
_ONES = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)
_PLACES = np.array([sorted(range(8), key=lambda bit: ~value >> bit & 1) for value in range(256)], dtype=np.int32)


@compiled_part
def list_flagged(flags, lane, who):
    """List the places where bit ``lane`` of ``flags`` uint8 [a multiple of 64] is set in ``who``; returns how many.

    Without a branch for each, which would be mispredicted: the bits of eight flags name a row of a table.
    """
    count, words = np.uint64(0), flags.view(np.uint64)
    lane, ones = np.uint64(lane), np.uint64(0x0101010101010101)
    for first in range(0, len(words), 8):
        some = np.uint64(0)
        for n in range(8):
            some |= words[first + n]
        some = some >> lane & ones
        if some:
            for n in range(first, first + 8):
                bits = ((words[n] >> lane & ones) * np.uint64(0x0102040810204080)) >> np.uint64(56)
                base = np.int32(8 * n)
                for i in range(8):
                    who[count + np.uint64(i)] = base + _PLACES[bits, i]
                count += np.uint64(_ONES[bits])
    return np.int64(count)


@compiled_part
def leave_piece(kept, chosen, count, half):
    """Note by haplotype what is kept at the first typed site of a piece, in ``half``."""
    half, moved, rows, who = np.uint64(half), kept.moved, kept.moved_rows, chosen.who
    shares, fasts, lengths = kept.shares[half], kept.fasts[half], kept.lengths[half]
    number = list_flagged(kept.flags[half, : (count + 63) // 64 * 64], 0, moved)
    for n in range(number):
        place = np.uint64(moved[n])
        moved[n], rows[n, 0], rows[n, 1], rows[n, 2] = who[place], shares[place], fasts[place], lengths[place]
    kept.number_moved[0] = number


@compiled_part
def enter_piece(kept, chosen, count, half):
    """Restore to ``half`` what was noted; all those haplotypes are among the ``count`` chosen."""
    half, moved, rows, who, where = np.uint64(half), kept.moved, kept.moved_rows, chosen.who, kept.where
    flags, shares, fasts, lengths = kept.flags[half], kept.shares[half], kept.fasts[half], kept.lengths[half]
    padded, nothing = (count + 63) // 64 * 64, np.float32(0)
    _fill(flags, np.uint8(0), padded)
    for values in (shares, fasts, lengths):
        _fill(values, nothing, count)
    for n in range(count):
        where[np.uint64(who[n])] = n
    for n in range(kept.number_moved[0]):
        place = np.uint64(where[np.uint64(moved[n])])
        flags[place], shares[place], fasts[place], lengths[place] = np.uint8(1), rows[n, 0], rows[n, 1], rows[n, 2]


@compiled_part
def _fill(into, value, count):
    """Set the first ``count`` of an array to a value."""
    for n in range(count):
        into[n] = value


@compiled_part
def _flag(slow, fast, least_slow, least_fast, flags, count):
    """Set ``flags`` uint8 where one of two values is above its least one.

    This is a function because compilers do not turn it into vector instructions beside other loops; so are the next.
    """
    for n in range(count):
        flags[n] = np.uint8((slow[n] > least_slow) | (fast[n] > least_fast))


@compiled_part
def _merge(flags, other, into, count):
    """Set ``into`` uint8 where one of two flags is set."""
    for n in range(count):
        into[n] = flags[n] | other[n]


@compiled_part
def _end(ends, differs, bit, here, count):
    """Set ``ends`` to ``here`` where the ``bit`` of ``differs`` is set."""
    for n in range(count):
        ends[n] = here if np.uint8(differs[n] & bit) != 0 else ends[n]


@compiled_part
def keep(panel, rates, t, start, count, chosen, kept, half):
    """Keep in ``half`` what is not negligible at typed site ``t`` of the piece that begins at ``start``.

    Kept are probabilities of the ``count`` chosen haplotypes by both models, divided by the sum of those that are not
    negligible, and the first times the match's length. A match reaches from a mismatch to the next. Of the uncertainty
    a seventh is kept, which is what the confidence head takes. Also lists the haplotypes that are kept in one half or
    the other; returns how many they are, with what is kept of both.
    """
    joint, squares, differs, ends = chosen.joint[t - start], chosen.squares[t - start], chosen.differs, chosen.end
    slow_joint, fast_joint = joint[SLOW], joint[FAST]
    # An unsigned number of a row is not counted from the end, which would hide from compilers where the row lies.
    half, behind = np.uint64(half), np.uint64(1 - half)
    flags, other, shares, fasts = kept.flags[half], kept.flags[behind], kept.shares[half], kept.fasts[half]
    lengths, begins, padded = kept.lengths[half], chosen.begin[np.uint64(t - start)], (count + 63) // 64 * 64
    bit, here, zero = np.uint8(1 << (t & 7)), panel.position[t], np.float32(0)
    least_slow, least_fast = rates.keep * squares[SLOW], rates.keep * squares[FAST]
    slow_total = fast_total = length = squares = zero
    # Loops of few arrays each, which compilers turn into vector instructions.
    for n in range(count):
        slow, fast = slow_joint[n], fast_joint[n]
        slow_total += slow if slow > least_slow else zero
        fast_total += fast if fast > least_fast else zero
    flags[count:padded] = np.uint8(0)
    _flag(slow_joint, fast_joint, least_slow, least_fast, flags, count)
    _end(ends, differs, bit, here, count)
    slow_scale, fast_scale = np.float32(1) / slow_total, np.float32(1) / fast_total
    for n in range(count):
        slow = slow_joint[n]
        share = slow_scale * slow if slow > least_slow else zero
        weighed = share * (ends[n] - begins[n])
        shares[n], lengths[n] = share, weighed
        length += weighed
        squares += share * share
    for n in range(count):
        fast = fast_joint[n]
        fasts[n] = fast_scale * fast if fast > least_fast else zero
    kept.length[half], kept.uncertainty[half] = length, -np.float32(math.log(squares)) / np.float32(7)
    some, either, who = kept.some, kept.either, chosen.who
    _merge(flags, other, some, padded)
    number = list_flagged(some[:padded], 0, either)
    shares_behind, fasts_behind, lengths_behind = kept.shares[behind], kept.fasts[behind], kept.lengths[behind]
    both, roots = kept.both, zero
    for n in range(number):
        place = np.uint64(either[n])
        share, share_behind = shares[place], shares_behind[place]
        root = np.sqrt(share)
        roots += root
        both[n, 0], both[n, 1], both[n, 2], both[n, 3] = share, fasts[place], lengths[place], root
        both[n, 4], both[n, 5], both[n, 6] = share_behind, fasts_behind[place], lengths_behind[place]
        both[n, 7] = np.sqrt(share_behind)
        either[n] = who[place]
    kept.root[half] = roots
    ancestry, population = kept.ancestry[half], panel.population
    ancestry[:] = zero
    if len(ancestry) == 1:
        ancestry[0] = np.float32(1)
    else:
        for n in range(number):
            ancestry[population[np.uint64(either[n])]] += both[n, 0]
    return number
