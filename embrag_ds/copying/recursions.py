"""Forward-backward algorithm of both copying models over all haplotypes, a part of the loop along a stretch.

Both recursions run over all haplotypes, and keep their states where a piece of eight typed sites begins. What happens
between is computed for the haplotypes that can matter there (:mod:`embrag_ds.copying.chosen`).

Haplotypes with equal alleles at a piece's typed sites, a pattern, have equal emissions there. With equal priors, too, a
step changes their states alike, and the sum of their states as well. So the steps of a piece are taken by pattern, as
minimac3 does (Das et al. 2016, Nat. Genet. 48:1284). What they come to for one haplotype is a product and a sum:
state times ``gain`` plus prior times ``added``. That is computed for four targets at once, because all of them have the
panel's patterns.
"""

from __future__ import annotations

import numpy as np

from embrag_ds.compiled.parts import assign, compiled_part
from embrag_ds.copying.instructions import LANES, add_product, add_row, add_to_four, forward_row, return_row

PIECE = 8
"""Typed sites of a piece: those of a row of packed alleles."""
PATTERNS = 1 << PIECE
_LEAST_TOTAL = np.float32(1e-6)
_MOST_FACTOR = np.float32(1e38)


@compiled_part
def note_masks(query, own, known):
    """Fill ``own`` and ``known`` uint8 [ceil(T / 8)]: a target's ALT and its typed alleles, packed as the panel's are.

    ``query`` uint8 [T] are its typed alleles, 2 where missing.
    """
    own[:], known[:] = np.uint8(0), np.uint8(0)
    for t in range(len(query)):
        bit = np.uint8(1 << (t & 7))
        own[t >> 3] |= bit if query[t] == 1 else np.uint8(0)
        known[t >> 3] |= bit if query[t] < 2 else np.uint8(0)


@compiled_part
def _step(state, prior, gain, added, differs, bit, ratio, stay, jump):
    """One step by pattern of one recursion, in place; returns the sum of the new states.

    ``state`` and ``prior`` float32 [n] are summed over the haplotypes of each pattern. ``differs`` uint8 [n] says at
    which sites it differs from the target.
    """
    one, total = np.float32(1), np.float32(0)
    for c in range(len(state)):
        factor = ratio if differs[c] & bit != 0 else one
        kept, new = factor * stay, factor * jump
        value = kept * state[c] + new * prior[c]
        state[c] = value
        gain[c] *= kept
        added[c] = kept * added[c] + new
        total += value
    return total


@compiled_part
def compare_patterns(states, row, patterns, count):
    """Fill ``states.mask``: at which sites each pattern of a row differs from each target."""
    for lane in range(LANES):
        own, known, differs = states.own[lane, row], states.known[lane, row], states.mask[np.uint64(lane)]
        for c in range(count):
            differs[c] = (patterns[c] ^ own) & known


@compiled_part
def _by_pattern(panel, states, sums, row):
    """Collect the sums of the patterns of a row, and where each of them differs; returns how many there are."""
    patterns, count = panel.patterns[row], np.uint64(panel.pattern_count[row])
    by_state, by_prior = sums
    most = np.uint64(PATTERNS)
    for c in range(count):
        pattern = np.uint64(patterns[c])
        for n in range(2 * LANES):
            states.by_state[np.uint64(n), np.uint64(c)] = by_state[pattern, n] + by_state[pattern + most, n]
        for lane in range(LANES):
            states.by_prior[np.uint64(lane), np.uint64(c)] = by_prior[pattern, lane] + by_prior[pattern + most, lane]
    compare_patterns(states, row, patterns, count)
    states.gain[:, :count] = np.float32(1)
    states.added[:, :count] = np.float32(0)
    return count


@compiled_part
def _give_factors(panel, states, row, count):
    """Note by pattern what its haplotypes' states are multiplied by, and what is added.

    Only where all haplotypes of a pattern are excluded, nothing bounds the two. Their states are 0, and infinity times
    that would be no number.
    """
    patterns, factors = panel.patterns[row], states.factors
    for c in range(count):
        pattern = np.uint64(patterns[c])
        for n in range(2 * LANES):
            factors[pattern, n] = min(states.gain[np.uint64(n), np.uint64(c)], _MOST_FACTOR)
            factors[pattern, n + 2 * LANES] = min(states.added[np.uint64(n), np.uint64(c)], _MOST_FACTOR)


@compiled_part
def _clear(panel, sums, row):
    """Set the sums of a row's patterns to 0."""
    by_state, by_prior = sums
    for c in range(panel.pattern_count[row]):
        pattern = np.uint64(panel.patterns[row, c])
        for place in (pattern, pattern + np.uint64(PATTERNS)):
            for n in range(2 * LANES):
                by_state[place, n] = np.float32(0)
            for n in range(LANES):
                by_prior[place, n] = np.float32(0)


@compiled_part
def _start_forward(panel, sums, row, state, prior):
    """Sum forward states and priors by the patterns of a row.

    Sums are added to one of two in turn, because an addition waits for the one before; so are all here.
    """
    _clear(panel, sums, row)
    by_state, by_prior = sums
    patterns = panel.packed[row]
    for k in range(len(patterns)):
        place = np.uint64(patterns[k]) + np.uint64((k & 1) * PATTERNS)
        add_row(by_state, place, state, k)
        add_to_four(by_prior, place, prior, k)


@compiled_part
def _start_backward(panel, sums, row, state, prior):
    """Sum products of backward states and priors by the patterns of a row, and priors."""
    _clear(panel, sums, row)
    by_state, by_prior = sums
    patterns = panel.packed[row]
    for k in range(len(patterns)):
        place = np.uint64(patterns[k]) + np.uint64((k & 1) * PATTERNS)
        add_product(by_state, place, state, k, prior)
        add_to_four(by_prior, place, prior, k)


@compiled_part
def _go_forward(panel, factors, sums, row, after, state, into, prior, prior_after):
    """Take all haplotypes over sites of a row, and sum what they come to by the patterns of the row ``after``."""
    _clear(panel, sums, after)
    by_state, by_prior = sums
    patterns, behind = panel.packed[row], panel.packed[after]
    for k in range(len(patterns)):
        forward_row(into, state, k, factors, patterns[k], prior)
        place = np.uint64(behind[k]) + np.uint64((k & 1) * PATTERNS)
        add_row(by_state, place, into, k)
        add_to_four(by_prior, place, prior_after, k)


@compiled_part
def _go_backward(panel, factors, sums, row, before, state, into, prior_before):
    """The same backward, to the row ``before``, with products of states and priors summed."""
    _clear(panel, sums, before)
    by_state, by_prior = sums
    patterns, ahead = panel.packed[row], panel.packed[before]
    for k in range(len(patterns)):
        return_row(into, state, k, factors, patterns[k])
        place = np.uint64(ahead[k]) + np.uint64((k & 1) * PATTERNS)
        add_product(by_state, place, into, k, prior_before)
        add_to_four(by_prior, place, prior_before, k)


@compiled_part
def run_forward(panel, rates, states, runs, begin, stop):
    """Run both forward recursions over runs ``begin`` to ``stop``, the first one at the beginning of a piece.

    A run lies within a piece and a place; ``runs`` int64 [runs + 1] are their first typed sites. Begins with
    ``states.saved[0]``, and fills its other rows and the factors of every step.
    """
    sums, first_row = (states.forward_sums, states.forward_priors), runs[begin] >> 3
    _start_forward(panel, sums, first_row, states.saved[0], states.prior[panel.place[runs[begin]]])
    for r in range(begin, stop):
        start, behind = runs[r], runs[r + 1]
        row = start >> 3
        count = _by_pattern(panel, states, sums, row)
        for n in range(2 * LANES):
            model, of = n // LANES, np.uint64(n)
            state, prior = states.by_state[of, :count], states.by_prior[np.uint64(n % LANES), :count]
            gain, added, differs = states.gain[of, :count], states.added[of, :count], states.mask[of % LANES, :count]
            for t in range(start, behind):
                jump = rates.jump[model, t] if t > 0 else np.float32(1)
                bit, stay, ratio = np.uint8(1 << (t & 7)), states.came[t, n], rates.ratio[model, t]
                total, scale = _step(state, prior, gain, added, differs, bit, ratio, stay, jump), np.float32(1)
                # Where no haplotype has the typed allele, squares of the states would lie below the smallest float32.
                if total < _LEAST_TOTAL:
                    scale = np.float32(1) / total
                    for c in range(count):
                        state[c] *= scale
                        gain[c] *= scale
                        added[c] *= scale
                    total = np.float32(1)
                states.scale[t, n], states.total[t, n] = scale, total
                if t + 1 < len(states.came):
                    states.came[t + 1, n] = (np.float32(1) - rates.jump[model, t + 1]) / total
        _give_factors(panel, states, row, count)
        ends = r + 1 == stop
        after = start if ends else behind
        source = states.saved[row - first_row] if start % PIECE == 0 else states.between
        into = states.saved[row - first_row + 1] if ends or behind % PIECE == 0 else states.between
        prior, prior_after = states.prior[panel.place[start]], states.prior[panel.place[after]]
        _go_forward(panel, states.factors, sums, row, after >> 3, source, into, prior, prior_after)


@compiled_part
def start_backward(panel, states, runs):
    """Begin both backward recursions behind the last typed site, in ``states.behind[0]``."""
    behind = states.behind[0]
    for k in range(len(behind)):
        for n in range(2 * LANES):
            behind[k, n] = np.float32(0)
    last = runs[len(runs) - 2]
    sums = (states.backward_sums, states.backward_priors)
    _start_backward(panel, sums, last >> 3, behind, states.prior[panel.place[last]])


@compiled_part
def run_backward(panel, rates, states, excluded, runs, begin, stop, last, beta, into):
    """Run both backward recursions over runs ``stop - 1`` back to ``begin``, from ``beta`` float32 [H, 8] to ``into``.

    States are multiplied by the emission of their own typed site. Fills the factors of every step, and up to typed site
    ``last`` what the products of both states sum to: with the forward states behind it, ``states.joint``, at that site,
    and from there on by the factors, as their sum stays that of all paths. ``excluded`` int64 [targets, E].
    """
    typed, sums = len(panel.position), (states.backward_sums, states.backward_priors)
    for r in range(stop - 1, begin - 1, -1):
        start, behind = runs[r], runs[r + 1]
        row = start >> 3
        source = beta if r == stop - 1 else into
        if behind == last + 1:
            _sum_paths(rates, states, last, typed, source)
        count = _by_pattern(panel, states, sums, row)
        for n in range(2 * LANES):
            model, of = n // LANES, np.uint64(n)
            state, prior = states.by_state[of, :count], states.by_prior[np.uint64(n % LANES), :count]
            gain, added, differs = states.gain[of, :count], states.added[of, :count], states.mask[of % LANES, :count]
            for t in range(behind - 1, start - 1, -1):
                stay, jump = _went(rates, states, t, n, typed)
                bit, ratio = np.uint8(1 << (t & 7)), rates.ratio[model, t]
                states.went[t, n], states.left[t, n] = stay, jump
                states.next[t, n] = _step(state, prior, gain, added, differs, bit, ratio, stay, jump)
                if t < last:
                    left = states.scale[t + 1, n] * states.next[t + 1, n]
                    states.paths[t, n] = states.paths[t + 1, n] * states.total[t, n] / left
        _give_factors(panel, states, row, count)
        before = runs[r - 1] if r > 0 else start
        _go_backward(panel, states.factors, sums, row, before >> 3, source, into, states.prior[panel.place[before]])
        for lane in range(len(excluded)):  # without a prior, nothing would bound what their matches add up to
            for k in excluded[lane]:
                if k < len(into):
                    into[k, lane] = into[k, lane + LANES] = np.float32(0)


@compiled_part
def _went(rates, states, t, n, typed):
    """Factor and summand of a backward step to typed site ``t``."""
    if t + 1 == typed:
        return np.float32(0), np.float32(1)
    jump = rates.jump[n // LANES, t + 1]
    return (np.float32(1) - jump) / states.next[t + 1, n], jump


@compiled_part
def _sum_paths(rates, states, last, typed, beta):
    """Sum the products of both states at typed site ``last``."""
    joint = states.joint
    for n in range(2 * LANES):
        stay, jump = _went(rates, states, last, n, typed)
        total = np.float32(0)
        for k in range(len(beta)):
            total += joint[k, n] * (stay * beta[k, n] + jump)
        states.paths[last, n] = total


@compiled_part
def copy_rows(into, values):
    """Copy rows of states float32 [H, 8], or of priors [H, 4]."""
    for k in range(len(values)):
        assign(into[k], values[k])
