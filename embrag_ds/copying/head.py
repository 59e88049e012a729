"""The confidence head at some sites of one haplotype, a part of the loop along a stretch.

It computes what :class:`embrag_ds.model.confidence.ConfidenceHead` does. Sites wait until there are enough of them that
every product runs over sites, which compilers turn into vector instructions.
"""

from __future__ import annotations

import numpy as np

from embrag_ds.compiled.functions import logarithm, sigmoid
from embrag_ds.compiled.instructions import quotient
from embrag_ds.compiled.parts import compiled_part, product
from embrag_ds.model.numbers import SHORTEST_CM

AT_ONCE = 64
"""Sites that are corrected together."""
_LEAST, _THIRD, _QUARTER = np.float32(1e-4), np.float32(1 / 3), np.float32(0.25)
_SHORTEST_CM = np.float32(SHORTEST_CM)


@compiled_part
def add_site(site, to_ref, minor, slow, fast, length, lengths, root, roots, waiting):
    """Let a site wait for its correction; returns the column of ``waiting.features`` for those that are left.

    ``minor`` is the minor allele's probability, ``slow`` and ``fast`` are its dosages, and ``length`` is its sum of
    weighed match lengths, where ``lengths`` is that of both alleles, and ``root`` that of the probabilities' square
    roots, where ``roots`` is that of both. ``to_ref`` says whether it is REF.
    """
    column, one, known = waiting.number[0], np.float32(1), waiting.features
    waiting.number[0] += 1
    waiting.sites[column], waiting.to_ref[column], waiting.odds[column] = site, to_ref, quotient(minor, one - minor)
    length_others, root_others = max(lengths - length, np.float32(0)), roots - root
    known[3, column] = _over(max(length, np.float32(0)), slow) + _SHORTEST_CM
    known[4, column] = _over(length_others, one - slow) + _SHORTEST_CM
    known[10, column] = _over(root * root, slow) + one
    known[11, column] = _over(root_others * root_others, one - slow) + one
    slow, fast = min(max(slow, _LEAST), one - _LEAST), min(max(fast, _LEAST), one - _LEAST)
    known[9, column] = quotient(slow * (one - fast), fast * (one - slow))
    return column


@compiled_part
def _over(total, weight):
    """A sum over that of probabilities, ``weight``; 0 where there is hardly any of these."""
    return quotient(total, weight) if weight > _LEAST else np.float32(0)


@compiled_part
def _take_logarithms(values, factor):
    """Turn ``values`` float32 [64], positive and normal, into ``factor`` times their logarithms."""
    for c in range(AT_ONCE):
        values[c] = factor * logarithm(values[c])


@compiled_part
def _note(waiting, found):
    """Note the features of the sites that wait, as far as they are wanted."""
    number = found.number[0]
    for c in range(waiting.number[0]):
        site = waiting.sites[c]
        if found.noted[site]:
            found.sites[number], found.to_ref[number] = site, waiting.to_ref[c]
            for n in range(len(waiting.features)):
                found.features[number, n] = waiting.features[n, c]
            number += 1
    found.number[0] = number


@compiled_part
def correct(head, waiting, found):
    """Fill ``found.probability`` float32 [L] of ALT at the sites that wait."""
    one, width = np.float32(1), len(head.last)
    known, first, second, total = waiting.features, waiting.first, waiting.second, waiting.total
    odds = waiting.odds
    # Of all sites at once, because compilers turn that into vector instructions.
    _take_logarithms(odds, one)
    _take_logarithms(known[3], _THIRD)
    _take_logarithms(known[4], _THIRD)
    _take_logarithms(known[9], _QUARTER)
    _take_logarithms(known[10], _THIRD)
    _take_logarithms(known[11], _THIRD)
    for c in range(AT_ONCE):
        quarter = odds[c] * _QUARTER
        known[0, c], known[1, c] = quarter, quarter * quarter * _QUARTER
    if len(found.noted):
        _note(waiting, found)
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
    for c in range(AT_ONCE):
        total[c] = sigmoid(odds[c] + total[c])
    for c in range(waiting.number[0]):
        minor = total[c]
        found.probability[waiting.sites[c]] = one - minor if waiting.to_ref[c] else minor
    waiting.number[0] = 0
