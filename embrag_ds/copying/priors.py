"""Recombination priors of one target haplotype over all reference haplotypes, a part of the loop along a stretch.

Their form is that of :class:`embrag_ds.model.poolings.copying.CopyingPooling`.
"""

from __future__ import annotations

import numpy as np

from embrag_ds.compiled.parts import making_part
from embrag_ds.ops.li_stephens_numba import MOST_PRIOR_NATS


@making_part
def fill_priors(packed, place, rates, excluded, states, lane):
    """Fill a ``lane`` of ``states.prior`` with the probability of every haplotype after a recombination at each place.

    Its logarithm falls by ``strength[j]`` per percent of typed sites that differ, weighed by ``exp(-d / s_j)`` at a
    distance of d. ``reach[j]`` is that weight from one place to the next, and ``typed_at[j]`` the weight of all typed
    sites.
    """
    prior, running, bits = np.zeros(states.prior.shape[:2], dtype=np.float32), states.running, states.bits
    reach, strength, typed_at = rates.reach, rates.strength, rates.typed_at
    places, haplotypes = prior.shape
    differing = np.zeros((places, haplotypes), dtype=np.float32)
    first = 0
    while first < len(place):
        stop = first + 1
        while stop < len(place) and stop & 7 and place[stop] == place[first]:
            stop += 1
        row, here, own = packed[first >> 3], differing[place[first]], states.own[lane, first >> 3]
        mask = np.uint8(((1 << (stop - first)) - 1) << (first & 7) & 0xFF) & states.known[lane, first >> 3]
        for k in range(haplotypes):  # adds how many bits are set
            bits_set = np.uint8((row[k] ^ own) & mask)
            bits_set = np.uint8(bits_set - (bits_set >> np.uint8(1) & np.uint8(0x55)))
            bits_set = np.uint8((bits_set & np.uint8(0x33)) + (bits_set >> np.uint8(2) & np.uint8(0x33)))
            here[k] += np.float32(np.uint8((bits_set + (bits_set >> np.uint8(4))) & np.uint8(0x0F)))
        first = stop
    for j in range(len(strength)):
        decay = reach[j]
        running[:] = np.float32(0)
        for g in range(places):
            here, into, factor = differing[g], prior[g], strength[j] / typed_at[j, g]
            for k in range(haplotypes):
                running[k] = decay * running[k] + here[k]
                into[k] += factor * running[k]
        running[:] = np.float32(0)
        for g in range(places - 2, -1, -1):
            after, into, factor = differing[g + 1], prior[g], strength[j] / typed_at[j, g]
            for k in range(haplotypes):
                running[k] = decay * (running[k] + after[k])
                into[k] += factor * running[k]
    floats, farthest = bits.view(np.float32), np.float32(-MOST_PRIOR_NATS)
    for g in range(places):
        row = prior[g]
        for n in range(len(excluded)):
            if excluded[n] < haplotypes:
                row[excluded[n]] = np.float32(np.inf)
        least = _least(row)
        total = np.float32(0)
        # exp(-x) = 2^n 2^f, with n an integer and f in [-1/2, 1/2]: a polynomial (relative error below 3e-7), which
        # compilers turn into vector instructions, unlike the library's function.
        for k in range(haplotypes):
            power = max(least - row[k], farthest) * np.float32(1.4426950408889634)
            whole = np.floor(power + np.float32(0.5))
            bits[k] = (np.int32(whole) + np.int32(127)) << np.int32(23)
            f = power - whole
            value = np.float32(1.5403530e-4)
            value = value * f + np.float32(1.3333558e-3)
            value = value * f + np.float32(9.6181291e-3)
            value = value * f + np.float32(5.5504109e-2)
            value = value * f + np.float32(2.4022651e-1)
            value = value * f + np.float32(6.9314718e-1)
            running[k] = value * f + np.float32(1)
        for k in range(haplotypes):
            row[k] = running[k] * floats[k]
        for n in range(len(excluded)):
            if excluded[n] < haplotypes:
                row[excluded[n]] = np.float32(0)
        for k in range(haplotypes):
            total += row[k]
        scale = np.float32(1) / total
        for k in range(haplotypes):
            states.prior[g, k, lane] = row[k] * scale
    return


@making_part
def _least(values):
    """The least of float32 ``values``, by 16 at a time, which compilers turn into vector instructions."""
    least = np.full(16, np.float32(np.inf), dtype=np.float32)
    whole = len(values) - len(values) % 16
    for first in range(0, whole, 16):
        for n in range(16):
            value = values[first + n]
            least[n] = value if value < least[n] else least[n]
    found = least.min()
    for k in range(whole, len(values)):
        found = min(found, values[k])
    return found
