"""CPU loop of the copying model along a stretch, from targets' typed alleles to dosages at every site of its core.

One call does what training does in many: recombination prior by place, forward-backward algorithm of both copying
models, probabilities summed by distinct sequence, dosages, and the evidence behind them. A worker takes one target
haplotype at a time, so that its states stay in the processor's caches, and the numbers are the same for any number of
threads. Letters beside those of :mod:`embrag_ds.data.tokens`: G places, W workers.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from embrag_ds.copying.head import AT_ONCE, FEATURES, add_site, correct
from embrag_ds.copying.priors import compiled_part, fill_priors
from embrag_ds.copying.records import Frequencies, Head, PanelPart, Rates, Scratch, States, Waiting
from embrag_ds.ops.threads import ParallelLoop

PARTS = "5a9c8e0c3808"
"""Digest of the loop's other files, head, priors and records: numba looks for a change in this file alone, and would
use what it has kept of the loop. A test compares it.
"""
SLOW, FAST = 0, 1
_LANES = 8
_LEAST = np.float32(1e-5)
_LEAST_TOTAL = np.float32(1e-6)
# Of a sequence or a site: probability by the slow and by the fast model, and length times probability by the slow one,
# at the typed site on the left, and the same three at that on the right.


@compiled_part
def _forward_step(before, now, prior, row, allele, ratio, stay, jump):
    """One step of both forward recursions; returns the sums by which the new states are to be divided."""
    slow_zero, slow_one, fast_zero, fast_one = np.float32(1), np.float32(1), np.float32(1), np.float32(1)
    if allele == 0:
        slow_one, fast_one = ratio[0], ratio[1]
    elif allele == 1:
        slow_zero, fast_zero = ratio[0], ratio[1]
    slow_stay, slow_jump, fast_stay, fast_jump = stay[0], jump[0], stay[1], jump[1]
    slow_before, fast_before, slow_now, fast_now = before[0], before[1], now[0], now[1]
    slow_total, fast_total = np.float32(0), np.float32(0)
    for k in range(len(prior)):
        carries = row[k] != 0
        slow = slow_stay * slow_before[k] + slow_jump * prior[k]
        slow *= slow_one if carries else slow_zero
        fast = fast_stay * fast_before[k] + fast_jump * prior[k]
        fast *= fast_one if carries else fast_zero
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
def _backward_step(state, prior, row, allele, ratio, jump):
    """One step of both backward recursions, in place, from a site to the one before it."""
    slow_zero, slow_one, fast_zero, fast_one = np.float32(1), np.float32(1), np.float32(1), np.float32(1)
    if allele == 0:
        slow_one, fast_one = ratio[0], ratio[1]
    elif allele == 1:
        slow_zero, fast_zero = ratio[0], ratio[1]
    slow_state, fast_state = state[0], state[1]
    slow_total, fast_total = np.float32(0), np.float32(0)
    for k in range(len(prior)):
        carries = row[k] != 0
        slow = slow_state[k] * (slow_one if carries else slow_zero)
        fast = fast_state[k] * (fast_one if carries else fast_zero)
        slow_state[k], fast_state[k] = slow, fast
        slow_total += slow * prior[k]
        fast_total += fast * prior[k]
    slow_jump, fast_jump = jump[0], jump[1]
    slow_stay, fast_stay = (np.float32(1) - slow_jump) / slow_total, (np.float32(1) - fast_jump) / fast_total
    for k in range(len(prior)):
        slow_state[k] = slow_stay * slow_state[k] + slow_jump
        fast_state[k] = fast_stay * fast_state[k] + fast_jump


@compiled_part
def _match_ends(before, now, row, allele, here):
    """Ends of the matches beyond a typed site at ``here`` cM: there where a haplotype differs, else as ``before``."""
    zero, one = allele == 1, allele == 0
    for k in range(len(row)):
        differs = one if row[k] != 0 else zero
        now[k] = here if differs else before[k]


@compiled_part
def _posterior(alpha, beta, keep, flags, who, kept):
    """Copying probabilities at a site, without negligible ones; returns how many haplotypes remain.

    A probability is negligible below ``keep`` times the sum of squares of all, which is their mean as the model draws
    from them. What remains is divided by its sum. ``who`` int32 [H + 1] receives the haplotypes, and ``kept`` float32
    [H, 3] their probabilities by either model, 0 for one that is negligible. ``flags`` uint8 is scratch.
    """
    slow_alpha, fast_alpha, slow_beta, fast_beta = alpha[0], alpha[1], beta[0], beta[1]
    slow_total, fast_total, slow_squares, fast_squares = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for k in range(len(slow_alpha)):
        slow, fast = slow_alpha[k] * slow_beta[k], fast_alpha[k] * fast_beta[k]
        slow_total += slow
        fast_total += fast
        slow_squares += slow * slow
        fast_squares += fast * fast
    least_slow, least_fast = keep * slow_squares / slow_total, keep * fast_squares / fast_total
    for k in range(len(slow_alpha)):
        some = (slow_alpha[k] * slow_beta[k] > least_slow) | (fast_alpha[k] * fast_beta[k] > least_fast)
        flags[k] = np.uint8(some)
    count = np.uint64(0)
    for eight, word in enumerate(flags.view(np.uint64)):
        if word:  # most have none
            for k in range(8 * eight, 8 * eight + 8):  # without a branch, which would be mispredicted
                who[count] = k
                count += np.uint64(flags[k])
    slow_total, fast_total = np.float32(0), np.float32(0)
    for n in range(count):
        k = who[n]
        slow, fast = slow_alpha[k] * slow_beta[k], fast_alpha[k] * fast_beta[k]
        kept[n, SLOW] = slow if slow > least_slow else np.float32(0)
        kept[n, FAST] = fast if fast > least_fast else np.float32(0)
        slow_total += kept[n, SLOW]
        fast_total += kept[n, FAST]
    slow_scale, fast_scale = np.float32(1) / slow_total, np.float32(1) / fast_total
    for n in range(count):
        kept[n, SLOW] *= slow_scale
        kept[n, FAST] *= fast_scale
    return np.int64(count)


@compiled_part
def _add_by_sequence(scratch, half, lane, number, several):
    """Add the numbers of every kept haplotype to its sequence's, from ``lane`` on; returns how many are touched."""
    who, kept, sums = scratch.who[half], scratch.kept[half], scratch.sums
    for n in range(scratch.number[half]):
        sequence = number[who[n]]
        if not scratch.marked[sequence]:
            scratch.marked[sequence] = True
            scratch.touched[several] = sequence
            several += 1
        a, b, c = kept[n, 0], kept[n, 1], kept[n, 2]
        sums[sequence, lane] += a
        sums[sequence, lane + 1] += b
        sums[sequence, lane + 2] += c
    return several


@compiled_part
def _copy_sites(panel, rates, own, row, interval, before, after, scratch, waiting, head, probability):
    """Copy the sites of an interval between two typed sites, the halves ``before`` and ``after`` of ``scratch``."""
    populations = scratch.ancestry.shape[1]
    for g in range(panel.intervals[interval], panel.intervals[interval + 1]):
        number, base, first = panel.sequence[g], panel.sequences[g], panel.bounds[g]
        several = _add_by_sequence(scratch, before, 0, number, 0)
        several = _add_by_sequence(scratch, after, 4, number, several)
        for n in range(several):
            sequence = scratch.touched[n]
            total = scratch.sums[sequence]
            # Read once, because a compiler cannot know that the two arrays do not overlap.
            a, b, c, d, e, f = total[0], total[1], total[2], total[4], total[5], total[6]
            for place in range(panel.minor_start[base + sequence], panel.minor_start[base + sequence + 1]):
                into_site = scratch.by_site[panel.minor_sites[place]]
                into_site[0] += a
                into_site[1] += b
                into_site[2] += c
                into_site[4] += d
                into_site[5] += e
                into_site[6] += f
            for lane in range(_LANES):
                total[lane] = np.float32(0)
            scratch.marked[sequence] = False
        for site in range(first, panel.bounds[g + 1]):
            of = scratch.by_site[site - first]
            right = panel.share[site]
            slow, fast = of[0] + right * (of[4] - of[0]), of[1] + right * (of[5] - of[1])
            length = of[2] + right * (of[6] - of[2])
            for lane in range(_LANES):
                of[lane] = np.float32(0)
            expected = np.float32(0)
            for p in range(populations):
                share = scratch.ancestry[before, p]
                share += right * (scratch.ancestry[after, p] - share)
                expected += share * own.by_population[row, site, p]
            minor = fast + own.slow[row, site] * (slow - fast)
            minor += rates.background * (expected - minor)
            minor = min(max(minor, _LEAST), np.float32(1) - _LEAST)
            turned = own.turing[row, site] * minor
            minor = turned / (np.float32(1) - minor + turned)
            flipped, to_ref = own.flipped[row, site], panel.minor_is_ref[site]
            if (np.float32(1) - minor if flipped else minor) < rates.least:
                probability[site] = np.float32(1) - minor if to_ref else minor
                continue
            all_lengths = scratch.lengths[before] + right * (scratch.lengths[after] - scratch.lengths[before])
            if flipped:
                minor, slow, fast = np.float32(1) - minor, np.float32(1) - slow, np.float32(1) - fast
                length, to_ref = all_lengths - length, not to_ref
            column = add_site(site, to_ref, minor, slow, fast, length, all_lengths, waiting)
            known = waiting.features
            known[2, column] = own.log_frequency[row, site]
            known[5, column] = scratch.uncertainty[before] + right * (
                scratch.uncertainty[after] - scratch.uncertainty[before]
            )
            known[6, column], known[7, column] = panel.nearest[site], panel.gap[site]
            if waiting.number[0] == AT_ONCE:
                correct(head, waiting, probability)


@compiled_part
def _save_forward(panel, rates, query, states, span):
    """Run forward over all typed sites; the state before the first site of every piece is saved."""
    stay, jump = np.zeros(2, dtype=np.float32), np.ones(2, dtype=np.float32)
    came, went = states.beta, states.joint
    came[:] = np.float32(0)
    ends, next_ends = states.right[0], states.right[1]
    ends[:] = panel.position[0]
    for t in range(len(query)):
        if t % span == 0:
            states.factor[t // span] = stay
            states.saved[t // span] = came
            states.reached[t // span] = ends
        prior, row = states.prior[panel.place[t]], panel.alleles[t]
        totals = _forward_step(came, went, prior, row, query[t], rates.ratio[:, t], stay, jump)
        came, went = went, came
        _match_ends(ends, next_ends, row, query[t], panel.position[t])
        ends, next_ends = next_ends, ends
        _next_rates(rates, t, totals, stay, jump)


@compiled_part
def _restore_forward(panel, rates, query, states, piece, start, stop):
    """Run forward over the typed sites of a piece, from its saved state; all states are stored."""
    stay, jump = states.factor[piece].copy(), np.ones(2, dtype=np.float32)
    if start > 0:
        jump[:] = rates.jump[:, start]
    came, ends = states.saved[piece], states.reached[piece]
    for t in range(start, stop):
        went, prior, row = states.alpha[t - start], states.prior[panel.place[t]], panel.alleles[t]
        totals = _forward_step(came, went, prior, row, query[t], rates.ratio[:, t], stay, jump)
        came = went
        _match_ends(ends, states.left[t - start], row, query[t], panel.position[t])
        ends = states.left[t - start]
        _next_rates(rates, t, totals, stay, jump)


@compiled_part
def _next_rates(rates, t, totals, stay, jump):
    """Set the factors of the step that follows typed site ``t``, whose states sum to ``totals``."""
    if t + 1 < rates.jump.shape[1]:
        for model in range(2):
            jump[model] = rates.jump[model, t + 1]
            stay[model] = (np.float32(1) - jump[model]) / totals[model]


@compiled_part
def _describe(panel, t, left, right, scratch, half):
    """Match lengths, uncertainty and ancestry of the haplotypes kept in ``half`` at a typed site.

    ``left`` and ``right`` float32 [H] are the ends of each haplotype's match, in cM. Of the uncertainty a seventh is
    kept, which is what the confidence head takes.
    """
    lengths = squares = np.float32(0)
    who, kept = scratch.who[half], scratch.kept[half]
    scratch.ancestry[half] = np.float32(0)
    for n in range(scratch.number[half]):
        k, share = who[n], kept[n, SLOW]
        weighed = share * max(right[k] - left[k], np.float32(0))
        kept[n, 2] = weighed
        lengths += weighed
        squares += share * share
        scratch.ancestry[half, panel.population[k]] += share
    scratch.lengths[half], scratch.uncertainty[half] = lengths, -np.float32(math.log(squares)) / np.float32(7)


@compiled_part
def _copy_haplotype(panel, rates, own, query, row, excluded, states, scratch, waiting, head, probability, span):
    """Copy one target haplotype."""
    typed = len(query)
    fill_priors(panel.alleles, query, panel.place, rates, excluded, states)
    _save_forward(panel, rates, query, states, span)
    beta, jump = states.beta, np.empty(2, dtype=np.float32)
    beta[:] = np.float32(1)
    right, next_right = states.right[0], states.right[1]
    right[:] = panel.position[typed - 1]
    half = 0
    for piece in range(len(states.saved) - 1, -1, -1):
        start, stop = piece * span, min((piece + 1) * span, typed)
        _restore_forward(panel, rates, query, states, piece, start, stop)
        for t in range(stop - 1, start - 1, -1):
            _match_ends(right, next_right, panel.alleles[t], query[t], panel.position[t])
            right, next_right = next_right, right
            if panel.intervals[t + 2] > panel.intervals[t]:  # a site of the core lies next to this one
                half = 1 - half
                scratch.number[half] = _posterior(
                    states.alpha[t - start], beta, rates.keep, states.flags, scratch.who[half], scratch.kept[half]
                )
                _describe(panel, t, states.left[t - start], right, scratch, half)
                beyond = half if t == typed - 1 else 1 - half
                _copy_sites(panel, rates, own, row, t + 1, half, beyond, scratch, waiting, head, probability)
                if t == 0:
                    _copy_sites(panel, rates, own, row, 0, half, half, scratch, waiting, head, probability)
            if t > 0:
                jump[:] = rates.jump[:, t]
                _backward_step(beta, states.prior[panel.place[t]], panel.alleles[t], query[t], rates.ratio[:, t], jump)
                for n in range(len(excluded)):  # without a prior, nothing would bound what their matches add up to
                    if excluded[n] < beta.shape[1]:
                        beta[:, excluded[n]] = np.float32(0)
    correct(head, waiting, probability)


@compiled_part
def _copy_every(step, first, of_panel, of_model, of_rows, of_head, query, row_of, excluded, probability):
    """Copy every target haplotype of a worker, each ``step``-th from the ``first`` on."""
    panel, rates, own, head = PanelPart(*of_panel), Rates(*of_model), Frequencies(*of_rows), Head(*of_head)
    typed, haplotypes = panel.alleles.shape
    places, populations = rates.typed_at.shape[1], own.by_population.shape[2]
    # States of so many sites are stored at a time, so that they stay in the processor's second cache.
    span = max(int(math.sqrt(typed)) + 1, min(64, (1 << 20) // (8 * haplotypes)))
    pieces = (typed + span - 1) // span
    states = States(
        np.empty((places, haplotypes), dtype=np.float32),
        np.empty(haplotypes, dtype=np.float32),
        np.empty(haplotypes, dtype=np.int32),
        np.empty((pieces, 2, haplotypes), dtype=np.float32),
        np.empty((pieces, 2), dtype=np.float32),
        np.empty((span, 2, haplotypes), dtype=np.float32),
        np.empty((2, haplotypes), dtype=np.float32),
        np.empty((2, haplotypes), dtype=np.float32),
        np.empty((span, haplotypes), dtype=np.float32),
        np.empty((2, haplotypes), dtype=np.float32),
        np.empty((pieces, haplotypes), dtype=np.float32),
        np.zeros((haplotypes + 7) // 8 * 8, dtype=np.uint8),
    )
    scratch = Scratch(
        np.empty((2, haplotypes + 1), dtype=np.int32),
        np.empty((2, haplotypes, 3), dtype=np.float32),
        np.zeros(2, dtype=np.int64),
        np.zeros(2, dtype=np.float32),
        np.zeros(2, dtype=np.float32),
        np.zeros((2, populations), dtype=np.float32),
        np.zeros((panel.most_sequences, _LANES), dtype=np.float32),
        np.zeros(panel.most_sequences, dtype=np.bool_),
        np.zeros(panel.most_sequences, dtype=np.int64),
        np.zeros((64, _LANES), dtype=np.float32),
    )
    waiting = Waiting(
        np.zeros(1, dtype=np.int64),
        np.zeros(AT_ONCE, dtype=np.int64),
        np.zeros(AT_ONCE, dtype=np.bool_),
        np.zeros(AT_ONCE, dtype=np.float32),
        np.zeros((FEATURES, AT_ONCE), dtype=np.float32),
        np.zeros((len(head.last), AT_ONCE), dtype=np.float32),
        np.zeros(AT_ONCE, dtype=np.float32),
        np.zeros(AT_ONCE, dtype=np.float32),
    )
    waiting.features[8] = head.density
    for b in range(first, len(query), step):
        _copy_haplotype(
            panel, rates, own, query[b], row_of[b], excluded[b], states, scratch, waiting, head, probability[b], span
        )


@ParallelLoop
def copy_along(of_panel, of_model, of_rows, of_head, query, row_of, excluded, workers, probability):
    """Copy target haplotypes along a stretch: fill ``probability`` float32 [B, L] with that of ALT in its core.

    ``of_panel``, ``of_model``, ``of_rows`` and ``of_head`` have the fields of :class:`PanelPart`, :class:`Rates`,
    :class:`Frequencies` and :class:`Head`. They are plain tuples, because numba's index of what it keeps on the disk
    names the classes of arguments, and could not be read after one is renamed. ``query`` uint8 [B, T] are typed
    alleles, 2 where missing; ``row_of`` int64 [B] are rows of ``of_rows``; ``excluded`` int64 [B, E] haplotypes not to
    copy, padded with H.
    """
    for worker in numba.prange(workers):
        _copy_every(workers, worker, of_panel, of_model, of_rows, of_head, query, row_of, excluded, probability)
