"""The confidence head at some sites of one haplotype, a part of the loop along a stretch.

It computes what :class:`embrag_ds.model.confidence.ConfidenceHead` does. Sites wait until there are enough of them that
every product runs over sites, which compilers turn into vector instructions.
"""

from __future__ import annotations

import math

import numpy as np

from embrag_ds.copying.priors import compiled_part

FEATURES = 10
AT_ONCE = 64
"""Sites that are corrected together."""
_LEAST = np.float32(1e-4)
_SHORTEST_CM = np.float32(1e-3)


@compiled_part
def add_site(site, to_ref, minor, slow, fast, length, lengths, waiting):
    """Let a site wait for its correction; returns the column of ``waiting.features`` for those that are left.

    ``minor`` is the minor allele's probability, ``slow`` and ``fast`` are its dosages, and ``length`` is its sum of
    weighed match lengths, where ``lengths`` is that of both alleles. ``to_ref`` says whether it is REF.
    """
    column, one, known = waiting.number[0], np.float32(1), waiting.features
    waiting.number[0] += 1
    odds = np.float32(math.log(minor / (one - minor)))
    waiting.sites[column], waiting.to_ref[column], waiting.odds[column] = site, to_ref, odds
    odds *= np.float32(0.25)
    known[0, column], known[1, column] = odds, odds * odds * np.float32(0.25)
    own = max(length, np.float32(0)) / slow if slow > _LEAST else np.float32(0)
    others = max(lengths - length, np.float32(0)) / (one - slow) if one - slow > _LEAST else np.float32(0)
    known[3, column] = np.float32(math.log(own + _SHORTEST_CM)) / np.float32(3)
    known[4, column] = np.float32(math.log(others + _SHORTEST_CM)) / np.float32(3)
    slow, fast = min(max(slow, _LEAST), one - _LEAST), min(max(fast, _LEAST), one - _LEAST)
    known[9, column] = np.float32(math.log(slow * (one - fast) / (fast * (one - slow)))) * np.float32(0.25)
    return column


@compiled_part
def correct(head, waiting, probability):
    """Fill ``probability`` float32 [L] of ALT at the sites that wait."""
    one, width = np.float32(1), len(head.last)
    known, first, second, total = waiting.features, waiting.first, waiting.second, waiting.total
    for n in range(width):
        row = first[n]
        row[:] = head.first_bias[n]
        for i in range(FEATURES):
            weight, values = head.first[i, n], known[i]
            for c in range(AT_ONCE):
                row[c] += weight * values[c]
        for c in range(AT_ONCE):
            row[c] = row[c] if row[c] > 0 else np.float32(0)
    total[:] = head.last_bias
    for n in range(width):
        second[:] = head.second_bias[n]
        for i in range(width):
            weight, values = head.second[i, n], first[i]
            for c in range(AT_ONCE):
                second[c] += weight * values[c]
        weight = head.last[n]
        for c in range(AT_ONCE):
            total[c] += weight * (second[c] if second[c] > 0 else np.float32(0))
    for c in range(waiting.number[0]):
        minor = one / (one + np.float32(math.exp(-(waiting.odds[c] + total[c]))))
        probability[waiting.sites[c]] = one - minor if waiting.to_ref[c] else minor
    waiting.number[0] = 0
