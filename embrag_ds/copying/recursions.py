"""Forward-backward algorithm of both copying models over all haplotypes, a part of the loop along a stretch."""

from __future__ import annotations

import numpy as np

from embrag_ds.copying.priors import compiled_part

_LEAST_TOTAL = np.float32(1e-6)


@compiled_part
def _forward_step(before, now, prior, differs, bit, ratio, stay, jump):
    """One step of both forward recursions, in place without ``now``; returns the sums to divide the new states by.

    A haplotype differs from the target where the ``bit`` of ``differs`` uint8 [H] is set.
    """
    one, slow_ratio, fast_ratio = np.float32(1), ratio[0], ratio[1]
    slow_stay, slow_jump, fast_stay, fast_jump = stay[0], jump[0], stay[1], jump[1]
    if now is None:  # one array, which compilers know to be one
        slow_before, fast_before, slow_now, fast_now = before[0], before[1], before[0], before[1]
    else:
        slow_before, fast_before, slow_now, fast_now = before[0], before[1], now[0], now[1]
    slow_total, fast_total = np.float32(0), np.float32(0)
    for k in range(len(prior)):
        mismatch = differs[k] & bit != 0
        slow = slow_stay * slow_before[k] + slow_jump * prior[k]
        slow *= slow_ratio if mismatch else one
        fast = fast_stay * fast_before[k] + fast_jump * prior[k]
        fast *= fast_ratio if mismatch else one
        slow_now[k], fast_now[k] = slow, fast
        slow_total += slow
        fast_total += fast
    # Where no haplotype has the typed allele, squares of the states would lie below the smallest float32.
    if slow_total < _LEAST_TOTAL:
        slow_scale, slow_total = np.float32(1) / slow_total, np.float32(1)
        for k in range(len(prior)):
            slow_now[k] *= slow_scale
    if fast_total < _LEAST_TOTAL:
        fast_scale, fast_total = np.float32(1) / fast_total, np.float32(1)
        for k in range(len(prior)):
            fast_now[k] *= fast_scale
    return slow_total, fast_total


@compiled_part
def backward_step(beta, alpha, prior, differs, ratio, t, stay, jump, sums):
    """One step of both backward recursions, in place, to typed site ``t``.

    Fills ``sums`` float32 [2, 3] for each model: probability of all haplotypes, with the forward states ``alpha``, its
    squares, and the sum by which the states of the site before are to be divided. All in one pass, because reading the
    states takes longer than computing.
    """
    one, after = np.float32(1), min(t + 1, ratio.shape[1] - 1)
    here, bit = differs[t >> 3], np.uint8(1 << (t & 7))
    behind, bit_behind = differs[after >> 3], np.uint8(1 << (after & 7))
    slow_ratio, fast_ratio, slow_stay, fast_stay = ratio[0, t], ratio[1, t], stay[0], stay[1]
    slow_change, fast_change = slow_stay * ratio[0, after], fast_stay * ratio[1, after]
    slow_jump, fast_jump = jump[0], jump[1]
    slow_alpha, fast_alpha, slow_beta, fast_beta = alpha[0], alpha[1], beta[0], beta[1]
    slow_total, fast_total, slow_squares, fast_squares = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    slow_next, fast_next = np.float32(0), np.float32(0)
    for k in range(len(prior)):
        differed = np.uint8(behind[k] & bit_behind) != 0
        slow = slow_beta[k] * (slow_change if differed else slow_stay) + slow_jump
        fast = fast_beta[k] * (fast_change if differed else fast_stay) + fast_jump
        slow_beta[k], fast_beta[k] = slow, fast
        mismatch = np.uint8(here[k] & bit) != 0
        slow_next += slow * prior[k] * (slow_ratio if mismatch else one)
        fast_next += fast * prior[k] * (fast_ratio if mismatch else one)
        slow *= slow_alpha[k]
        fast *= fast_alpha[k]
        slow_total += slow
        fast_total += fast
        slow_squares += slow * slow
        fast_squares += fast * fast
    sums[0, 0], sums[0, 1], sums[0, 2] = slow_total, slow_squares, slow_next
    sums[1, 0], sums[1, 1], sums[1, 2] = fast_total, fast_squares, fast_next


@compiled_part
def save_forward(panel, rates, states, span, last):
    """Run forward over the typed sites up to ``last``; the state before the first site of every piece is saved."""
    stay, jump = np.zeros(2, dtype=np.float32), np.ones(2, dtype=np.float32)
    state = states.joint
    state[:] = np.float32(0)
    for t in range(last + 1):
        if t % span == 0:
            states.factor[t // span] = stay
            states.saved[t // span] = state
        prior, differs, bit = states.prior[panel.place[t]], states.differs[t >> 3], np.uint8(1 << (t & 7))
        totals = _forward_step(state, None, prior, differs, bit, rates.ratio[:, t], stay, jump)
        _next_rates(rates, t, totals, stay, jump)


@compiled_part
def restore_forward(panel, rates, states, piece, start, stop):
    """Run forward over the typed sites of a piece, from its saved state; all states are stored."""
    stay, jump = states.factor[piece].copy(), np.ones(2, dtype=np.float32)
    if start > 0:
        jump[:] = rates.jump[:, start]
    came = states.saved[piece]
    for t in range(start, stop):
        went, prior = states.alpha[t - start], states.prior[panel.place[t]]
        differs, bit = states.differs[t >> 3], np.uint8(1 << (t & 7))
        totals = _forward_step(came, went, prior, differs, bit, rates.ratio[:, t], stay, jump)
        came = went
        _next_rates(rates, t, totals, stay, jump)


@compiled_part
def _next_rates(rates, t, totals, stay, jump):
    """Set the factors of the step that follows typed site ``t``, whose states sum to ``totals``."""
    if t + 1 < rates.jump.shape[1]:
        for model in range(2):
            jump[model] = rates.jump[model, t + 1]
            stay[model] = (np.float32(1) - jump[model]) / totals[model]
