"""Forward-backward algorithm of both copying models over all haplotypes, a part of the loop along a stretch.

Both recursions run over all haplotypes, and keep their states where a piece of eight typed sites begins. What happens
between is computed for the haplotypes that can matter there (:mod:`embrag_ds.copying.chosen`).
"""

from __future__ import annotations

import numpy as np

from embrag_ds.copying.parts import assign, compiled_part

PIECE = 8
"""Typed sites of a piece: those of a row of packed alleles."""
_LEAST_TOTAL = np.float32(1e-6)


@compiled_part
def _forward_step(state, prior, differs, bit, ratio, stay, jump):
    """One step of both forward recursions, in place; returns the sums to divide the new states by.

    A haplotype differs from the target where the ``bit`` of ``differs`` uint8 [H] is set.
    """
    one, slow_ratio, fast_ratio = np.float32(1), ratio[0], ratio[1]
    slow_stay, slow_jump, fast_stay, fast_jump = stay[0], jump[0], stay[1], jump[1]
    slow_state, fast_state = state[0], state[1]
    slow_total, fast_total = np.float32(0), np.float32(0)
    for k in range(len(prior)):
        mismatch = differs[k] & bit != 0
        slow = slow_stay * slow_state[k] + slow_jump * prior[k]
        slow *= slow_ratio if mismatch else one
        fast = fast_stay * fast_state[k] + fast_jump * prior[k]
        fast *= fast_ratio if mismatch else one
        slow_state[k], fast_state[k] = slow, fast
        slow_total += slow
        fast_total += fast
    return slow_total, fast_total


@compiled_part
def run_forward(panel, rates, states, start, stop):
    """Run both forward recursions over typed sites, ``start`` a multiple of eight, from ``states.joint``, in place.

    Fills ``states.saved`` and the factors of every step.
    """
    state, jump = states.joint, states.jump
    jump[:] = np.float32(1)
    for t in range(start, stop):
        if t % PIECE == 0:
            for model in range(2):
                assign(states.saved[(t - start) // PIECE, model], state[model])
        if t > 0:
            jump[0], jump[1] = rates.jump[0, t], rates.jump[1, t]
        prior, differs, bit = states.prior[panel.place[t]], states.differs[t >> 3], np.uint8(1 << (t & 7))
        totals = _forward_step(state, prior, differs, bit, rates.ratio[:, t], states.came[t], jump)
        for model in range(2):
            total, states.scale[t, model] = totals[model], np.float32(1)
            # Where no haplotype has the typed allele, squares of the states would lie below the smallest float32.
            if total < _LEAST_TOTAL:
                states.scale[t, model] = np.float32(1) / total
                row = state[model]
                for k in range(len(row)):
                    row[k] *= states.scale[t, model]
                total = np.float32(1)
            states.total[t, model] = total
            if t + 1 < len(states.came):
                states.came[t + 1, model] = (np.float32(1) - rates.jump[model, t + 1]) / total


@compiled_part
def _backward_step(beta, into, prior, differs, t, ratio, after, stay, jump):
    """One step of both backward recursions, to typed site ``t``, in place without ``into``.

    Returns for each model the sum that the states of the site before are to be divided by.
    """
    one, here, bit = np.float32(1), differs[t >> 3], np.uint8(1 << (t & 7))
    behind, bit_behind = differs[after >> 3], np.uint8(1 << (after & 7))
    slow_ratio, fast_ratio, slow_stay, fast_stay = ratio[0, t], ratio[1, t], stay[0], stay[1]
    slow_change, fast_change = slow_stay * ratio[0, after], fast_stay * ratio[1, after]
    slow_jump, fast_jump, slow_beta, fast_beta = jump[0], jump[1], beta[0], beta[1]
    if into is None:  # one array, which compilers know to be one
        slow_into, fast_into = beta[0], beta[1]
    else:
        slow_into, fast_into = into[0], into[1]
    slow_next, fast_next = np.float32(0), np.float32(0)
    for k in range(len(prior)):
        differed = np.uint8(behind[k] & bit_behind) != 0
        slow = slow_beta[k] * (slow_change if differed else slow_stay) + slow_jump
        fast = fast_beta[k] * (fast_change if differed else fast_stay) + fast_jump
        slow_into[k], fast_into[k] = slow, fast
        mismatch = np.uint8(here[k] & bit) != 0
        slow_next += slow * prior[k] * (slow_ratio if mismatch else one)
        fast_next += fast * prior[k] * (fast_ratio if mismatch else one)
    return slow_next, fast_next


@compiled_part
def run_backward(panel, rates, states, excluded, start, stop, last, beta, into):
    """Run both backward recursions over typed sites, from ``beta`` float32 [2, H] of the site behind to ``into``.

    Fills the factors of every step, and up to typed site ``last`` what the products of both states sum to: with
    ``states.joint`` at that site, and from there on by the factors, as their sum stays that of all paths.
    """
    typed = len(panel.position)
    for t in range(stop - 1, start - 1, -1):
        after = min(t + 1, typed - 1)
        for model in range(2):
            end = t + 1 == typed
            states.went[t, model] = (
                np.float32(0) if end else (np.float32(1) - rates.jump[model, after]) / states.next[after, model]
            )
            states.left[t, model] = np.float32(1) if end else rates.jump[model, after]
        prior, went, left = states.prior[panel.place[t]], states.went[t], states.left[t]
        if t == stop - 1:
            totals = _backward_step(beta, into, prior, states.differs, t, rates.ratio, after, went, left)
        else:
            totals = _backward_step(into, None, prior, states.differs, t, rates.ratio, after, went, left)
        for n in range(len(excluded)):  # without a prior, nothing would bound what their matches add up to
            if excluded[n] < into.shape[1]:
                into[:, excluded[n]] = np.float32(0)
        for model in range(2):
            states.next[t, model] = totals[model]
            if t == last:
                states.paths[t, model] = _product(states.joint[model], into[model])
            elif t < last:
                behind = states.scale[after, model] * states.next[after, model]
                states.paths[t, model] = states.paths[after, model] * states.total[t, model] / behind


@compiled_part
def _product(left, right):
    """Inner product of two float32 arrays."""
    total = np.float32(0)
    for k in range(len(left)):
        total += left[k] * right[k]
    return total
