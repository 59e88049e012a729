"""Copying probabilities of haplotypes that can matter in a piece of typed sites, a part of the loop along a stretch.

Most haplotypes are negligible in a piece, and their states at its ends show it. Emissions are at most 1. With forward
state a before the piece, backward state b behind it and prior p, a probability inside is therefore at most
(a A + p P) (b C + D) / Z. A, P, C and D follow from the steps' factors, and Z is the sum over all haplotypes.
"""

from __future__ import annotations

import numpy as np

from embrag_ds.copying.instructions import BYTES, note_first
from embrag_ds.copying.kept import list_flagged
from embrag_ds.copying.parts import assign, compiled_part
from embrag_ds.copying.recursions import PIECE

_FIRST_GUESS = np.float32(0.02)
_SAFETY = np.float32(0.5)


@compiled_part
def start_haplotype(panel, states, chosen, last):
    """Begin a target haplotype: nothing is known of its sums of squares, and of its mismatches those after ``last``."""
    chosen.least[:] = _FIRST_GUESS
    chosen.next[:] = np.uint16(len(panel.position) - 1)
    for piece in range(len(states.differs) - 1, last // PIECE, -1):
        pass_piece(states.differs[piece], np.uint8(0xFF), PIECE * piece, chosen)
    beyond = np.uint8(0xFE << last % PIECE & 0xFF)
    pass_piece(states.differs[last // PIECE], beyond, last // PIECE * PIECE, chosen)


@compiled_part
def copy_piece(panel, rates, states, chosen, kept, start, stop, saved, beta):
    """Fill ``chosen.joint`` with the probabilities of all haplotypes that are not negligible in a piece.

    They are listed in ``chosen.who``; returns how many. ``saved`` float32 [2, H] are the forward states before typed
    site ``start``, and ``beta`` the backward states of ``stop``. Fills ``chosen.squares``, the sums of squares of the
    probabilities.

    Negligible is what is below ``rates.keep`` times that sum, which is guessed from the piece behind. If it was less,
    the piece is computed anew with what was found. A sum over fewer haplotypes is no more than that over all, so what
    is left out is negligible.
    """
    haplotypes, count = saved.shape[1], 0
    _bounds(rates, states, chosen, start, stop)
    for _ in range(2):
        count = _choose(panel, rates, states, chosen, kept, start, stop, saved, beta)
        _gather(panel, rates, states, chosen, count, start, stop, saved, beta)
        _forward(panel, rates, states, chosen, count, start, stop)
        _backward(rates, states, chosen, count, start, stop)
        enough = True
        for model in range(2):
            least = np.float32(1)
            for t in range(stop - start):
                least = min(least, chosen.squares[t, model])
            least = max(least, np.float32(1 / haplotypes))  # no sum over all is less
            enough &= least >= chosen.least[model]
            chosen.least[model] = _SAFETY * least
        if enough:
            break
    _match(panel, states, chosen, count, start, stop)
    return count


@compiled_part
def _bounds(rates, states, chosen, start, stop):
    """Fill ``chosen.bound`` with the factors of a b, a, p b and p in a bound on every probability of a piece."""
    found, by_state, by_prior = chosen.bound, chosen.steps[0], chosen.steps[1]
    found[:] = np.float32(0)
    for model in range(2):
        state, prior = 1.0, 0.0
        for t in range(start, stop):
            stay = float(states.came[t, model]) * states.scale[t, model]
            jump = states.scale[t, model] * (float(rates.jump[model, t]) if t > 0 else 1.0)
            state, prior = state * stay, prior * stay + jump
            by_state[t - start], by_prior[t - start] = state, prior
        behind, left = 1.0, 0.0
        for t in range(stop - 1, start - 1, -1):
            stay = float(states.went[t, model])
            behind, left = behind * stay, left * stay + states.left[t, model]
            state, prior = by_state[t - start] / states.paths[t, model], by_prior[t - start] / states.paths[t, model]
            found[model, 0] = max(found[model, 0], np.float32(state * behind))
            found[model, 1] = max(found[model, 1], np.float32(state * left))
            found[model, 2] = max(found[model, 2], np.float32(prior * behind))
            found[model, 3] = max(found[model, 3], np.float32(prior * left))


@compiled_part
def _choose(panel, rates, states, chosen, kept, start, stop, saved, beta):
    """List in ``chosen.who`` the haplotypes whose bound is not negligible; returns how many."""
    bound, flags, highest = chosen.bound, chosen.flags, states.running
    prior = states.prior[np.uint64(panel.place[start])]
    if panel.place[start] != panel.place[stop - 1]:
        assign(highest, prior)
        for t in range(start + 1, stop):
            if panel.place[t] != panel.place[t - 1]:
                row = states.prior[np.uint64(panel.place[t])]
                for k in range(len(row)):
                    highest[k] = max(highest[k], row[k])
        prior = highest
    behind = min(stop, len(panel.position) - 1)
    differs, bit, one = states.differs[np.uint64(behind >> 3)], np.uint8(1 << (behind & 7)), np.float32(1)
    slow_ratio, fast_ratio = rates.ratio[0, behind], rates.ratio[1, behind]
    slow_saved, fast_saved, slow_beta, fast_beta = saved[0], saved[1], beta[0], beta[1]
    least_slow, least_fast = rates.keep * chosen.least[0], rates.keep * chosen.least[1]
    s0, s1, s2, s3 = bound[0, 0], bound[0, 1], bound[0, 2], bound[0, 3]
    f0, f1, f2, f3 = bound[1, 0], bound[1, 1], bound[1, 2], bound[1, 3]
    for k in range(len(prior)):
        differed = np.uint8(differs[k] & bit) != 0
        slow, fast = slow_beta[k] * (slow_ratio if differed else one), fast_beta[k] * (fast_ratio if differed else one)
        slow = slow_saved[k] * (s0 * slow + s1) + prior[k] * (s2 * slow + s3)
        fast = fast_saved[k] * (f0 * fast + f1) + prior[k] * (f2 * fast + f3)
        flags[k] = np.uint8((slow > least_slow) | (fast > least_fast))
    for n in range(kept.number_moved[0]):
        flags[np.uint64(kept.moved[n])] = np.uint8(1)
    return list_flagged(flags, chosen.who)


@compiled_part
def _gather(panel, rates, states, chosen, count, start, stop, saved, beta):
    """Collect what the chosen haplotypes have at the ends of a piece, their priors, and where they differ in it."""
    who, came, behind = chosen.who, chosen.came, chosen.behind
    slow_saved, fast_saved, slow_beta, fast_beta = saved[0], saved[1], beta[0], beta[1]
    after = min(stop, len(panel.position) - 1)
    differs, differs_after, bit = states.differs[start >> 3], states.differs[after >> 3], np.uint8(1 << (after & 7))
    slow_ratio, fast_ratio, one = rates.ratio[0, after], rates.ratio[1, after], np.float32(1)
    for n in range(count):
        k = np.uint64(who[n])
        came[0, n], came[1, n], chosen.differs[n] = slow_saved[k], fast_saved[k], differs[k]
        differed = np.uint8(differs_after[k] & bit) != 0
        behind[0, n] = slow_beta[k] * (slow_ratio if differed else one)
        behind[1, n] = fast_beta[k] * (fast_ratio if differed else one)
    for t in range(start, stop):
        if t == start or panel.place[t] != panel.place[t - 1]:
            row, into = states.prior[np.uint64(panel.place[t])], chosen.prior[t - start]
            for n in range(count):
                into[n] = row[np.uint64(who[n])]
            chosen.row[t - start] = t - start
        else:
            chosen.row[t - start] = chosen.row[t - start - 1]


@compiled_part
def _match(panel, states, chosen, count, start, stop):
    """Fill in where the matches of the chosen haplotypes begin, for each typed site of a piece, and end behind it."""
    before, after, position = states.before[np.uint64(start >> 3)], chosen.next, panel.position
    begin, end, who = chosen.begin[PIECE], chosen.end, chosen.who
    for n in range(count):
        k = np.uint64(who[n])
        begin[n], end[n] = position[np.uint64(before[k])], position[np.uint64(after[k])]
    for t in range(start, stop):
        into = chosen.begin[np.uint64(t - start)]
        _carry(begin, chosen.differs, np.uint8(1 << (t & 7)), position[t], into, count)
        begin = into


@compiled_part
def _carry(before, differs, bit, here, into, count):
    """Fill ``into`` with what was ``before``, or with ``here`` where the ``bit`` of ``differs`` is set.

    This is a function because compilers do not turn it into vector instructions beside other loops.
    """
    for n in range(count):
        into[n] = here if np.uint8(differs[n] & bit) != 0 else before[n]


@compiled_part
def pass_piece(differs, sites, start, chosen):
    """Note in ``chosen.next`` the first mismatch of every haplotype at those ``sites`` of a piece that are set."""
    after, first = chosen.next, np.uint16(start)
    whole = len(after) // BYTES * BYTES
    for k in range(0, whole, BYTES):
        note_first(differs, sites, first, after, k)
    for k in range(whole, len(after)):
        for place in range(PIECE - 1, -1, -1):
            if differs[k] & sites & np.uint8(1 << place) != 0:
                after[k] = first + np.uint16(place)


@compiled_part
def _forward(panel, rates, states, chosen, count, start, stop):
    """Run both forward recursions over a piece, from ``chosen.came`` into ``chosen.joint``."""
    one, differs = np.float32(1), chosen.differs[:count]
    for t in range(start, stop):
        row, bit = np.uint64(t - start), np.uint8(1 << (t & 7))
        prior = chosen.prior[np.uint64(chosen.row[row]), :count]
        for model in range(2):
            of = np.uint64(model)
            before = chosen.joint[row - np.uint64(1), of, :count] if t > start else chosen.came[of, :count]
            now, scale, ratio = chosen.joint[row, of, :count], states.scale[t, model], rates.ratio[model, t]
            stay, jump = scale * states.came[t, model], scale * (rates.jump[model, t] if t > 0 else one)
            for n in range(count):
                state = stay * before[n] + jump * prior[n]
                now[n] = state * (ratio if np.uint8(differs[n] & bit) != 0 else one)


@compiled_part
def _backward(rates, states, chosen, count, start, stop):
    """Run both backward recursions over a piece, from ``chosen.behind``; the probabilities follow."""
    one, differs = np.float32(1), chosen.differs[:count]
    for model in range(2):
        # It includes the emission of the typed site behind the piece.
        beta, ratio = chosen.behind[np.uint64(model), :count], one
        for t in range(stop - 1, start - 1, -1):
            now, bit = chosen.joint[np.uint64(t - start), np.uint64(model), :count], np.uint8(2 << (t & 7) & 0xFF)
            stay, jump, squares = states.went[t, model], states.left[t, model], np.float32(0)
            change, share = stay * ratio, one / states.paths[t, model]
            for n in range(count):
                state = beta[n] * (change if np.uint8(differs[n] & bit) != 0 else stay) + jump
                beta[n] = state
                joint = share * (now[n] * state)
                now[n] = joint
                squares += joint * joint
            ratio = rates.ratio[model, t]
            chosen.squares[t - start, model] = squares
