"""The confidence head at some sites of one haplotype, a part of the loop along a stretch.

It computes what :class:`embrag_ds.model.confidence.ConfidenceHead` does. Sites wait until there are enough of them that
every product runs over sites, which compilers turn into vector instructions.
"""

from __future__ import annotations

import math

import numpy as np

from embrag_ds.copying.parts import compiled_part, product
from embrag_ds.model.numbers import SHORTEST_CM

AT_ONCE = 64
"""Sites that are corrected together."""
_LEAST = np.float32(1e-4)
_SHORTEST_CM = np.float32(SHORTEST_CM)


@compiled_part
def add_site(site, to_ref, minor, slow, fast, length, lengths, waiting):
    """Let a site wait for its correction; returns the column of ``waiting.features`` for those that are left.

    ``minor`` is the minor allele's probability, ``slow`` and ``fast`` are its dosages, and ``length`` is its sum of
    weighed match lengths, where ``lengths`` is that of both alleles. ``to_ref`` says whether it is REF.
    """
    column, one, known = waiting.number[0], np.float32(1), waiting.features
    waiting.number[0] += 1
    waiting.sites[column], waiting.to_ref[column], waiting.odds[column] = site, to_ref, minor / (one - minor)
    own = max(length, np.float32(0)) / slow if slow > _LEAST else np.float32(0)
    others = max(lengths - length, np.float32(0)) / (one - slow) if one - slow > _LEAST else np.float32(0)
    known[3, column], known[4, column] = own + _SHORTEST_CM, others + _SHORTEST_CM
    slow, fast = min(max(slow, _LEAST), one - _LEAST), min(max(fast, _LEAST), one - _LEAST)
    known[9, column] = slow * (one - fast) / (fast * (one - slow))
    return column


@compiled_part
def _logarithms(values, factor, powers):
    """Turn ``values`` float32 [64], positive and normal, into ``factor`` times their logarithms.

    A value is m 2^e with m in [.707, 1.414]; then log m = 2 artanh((m - 1) / (m + 1)), of which five terms are enough.
    ``powers`` float32 [64] is scratch.
    """
    bits, one = values.view(np.int32), np.float32(1)
    for c in range(AT_ONCE):
        power = (bits[c] - np.int32(0x3F3504F3)) >> np.int32(23)
        bits[c] -= power << np.int32(23)
        powers[c] = np.float32(power) * np.float32(0.6931471805599453)
    for c in range(AT_ONCE):
        s = (values[c] - one) / (values[c] + one)
        square = s * s
        series = square * np.float32(1 / 9) + np.float32(1 / 7)
        series = series * square + np.float32(1 / 5)
        series = series * square + np.float32(1 / 3)
        series = series * square + one
        values[c] = factor * (powers[c] + np.float32(2) * s * series)


@compiled_part
def correct(head, waiting, probability):
    """Fill ``probability`` float32 [L] of ALT at the sites that wait."""
    one, width = np.float32(1), len(head.last)
    known, first, second, total = waiting.features, waiting.first, waiting.second, waiting.total
    odds = waiting.odds
    # Of all sites at once, because compilers turn that into vector instructions.
    _logarithms(odds, one, total)
    _logarithms(known[3], one / np.float32(3), total)
    _logarithms(known[4], one / np.float32(3), total)
    _logarithms(known[9], np.float32(0.25), total)
    for c in range(AT_ONCE):
        quarter = odds[c] * np.float32(0.25)
        known[0, c], known[1, c] = quarter, quarter * quarter * np.float32(0.25)
    product(first, head.first, known, width, AT_ONCE)
    for n in range(width):
        row, bias = first[n], head.first_bias[n]
        for c in range(AT_ONCE):
            row[c] = max(row[c] + bias, np.float32(0))
    product(second, head.second, first, width, AT_ONCE)
    total[:] = head.last_bias
    for n in range(width):
        row, bias, weight = second[n], head.second_bias[n], head.last[n]
        for c in range(AT_ONCE):
            total[c] += weight * max(row[c] + bias, np.float32(0))
    for c in range(waiting.number[0]):
        minor = one / (one + np.float32(math.exp(-(waiting.odds[c] + total[c]))))
        probability[waiting.sites[c]] = one - minor if waiting.to_ref[c] else minor
    waiting.number[0] = 0
