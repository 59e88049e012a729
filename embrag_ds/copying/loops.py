"""CPU loop of the copying model along a stretch, from targets' typed alleles to dosages at every site of its core.

One call does what training does in many: recombination prior by place, forward-backward algorithm of both copying
models, probabilities summed by distinct sequence, dosages, and the evidence behind them. A worker takes four target
haplotypes at a time, each in a lane of the states. No lane depends on another, so the numbers are the same for any
number of threads. Letters beside those of :mod:`embrag_ds.data.tokens`: G places, W workers.
"""

from __future__ import annotations

import math

import numpy as np

from embrag_ds.compiled.instructions import fetch, quotient, take
from embrag_ds.compiled.parts import compiled_part, making_part
from embrag_ds.copying.chosen import copy_piece, flag_piece, start_haplotypes
from embrag_ds.copying.head import AT_ONCE, add_site, correct
from embrag_ds.copying.instructions import LANES, add_row
from embrag_ds.copying.kept import enter_piece, keep, leave_piece
from embrag_ds.copying.priors import fill_priors
from embrag_ds.copying.records import Found, Frequencies, Head, PanelPart, Rates
from embrag_ds.copying.recursions import PIECE, copy_rows, note_masks, run_backward, run_forward, start_backward
from embrag_ds.copying.workspace import (
    found_of,
    kept_of,
    new_chosen,
    new_kept,
    new_scratch,
    new_states,
    new_waiting,
    waiting_of,
)
from embrag_ds.ops.threads import WorkerLoop

PARTS = "b5acfb1a0bbc"
"""Digest of the loop's other files: numba looks for a change in this file alone, and would use what it has kept of the
loop. A test compares it.
"""
_LANES = 8
_LINE = 32  # numbers of sequences in a line of the processor's caches
_LEAST = np.float32(1e-5)
# Of a sequence or a site: probability by the slow and by the fast model, and by the slow one length times probability
# and the probability's square root, at the typed site on the left, and the same four at that on the right.


@compiled_part
def _add_by_sequence(kept, scratch, number, count):
    """Add what is kept of every haplotype to its sequence's sums; returns how many sequences have one."""
    either, both, sums, marked, touched = kept.either, kept.both, scratch.sums, scratch.marked, scratch.touched
    several, most = np.uint64(0), np.uint64(len(marked))
    for n in range(count):
        sequence = np.uint64(number[np.uint64(either[n])])
        touched[several] = sequence
        several += np.uint64(marked[sequence] == 0)
        marked[sequence] = np.uint8(1)
        # To either of two sums in turn, because an addition waits for the one before.
        add_row(sums, sequence + (most if n & 1 else np.uint64(0)), both, n)
    return np.int64(several)


@compiled_part
def _without_carriers(
    rates, right, minor_is_ref, frequency, turing, flipped, ancestry, ancestry_after, expected, pending, probability
):
    """Fill ``probability`` float32 [n] at the sites of a block as if no haplotype with the minor allele were kept.

    That is so at most sites, and the same for all of them, which compilers turn into vector instructions. Fills
    ``expected`` float32 [64], the minor allele's expected frequency. Marks in ``pending`` uint8 [64] the sites where
    it is likely enough for the confidence head. ``frequency`` float32 [P, n] is that of the minor allele.
    """
    sites = len(right)
    expected[:] = np.float32(0)
    for p in range(len(frequency)):
        of, share, change = frequency[p], ancestry[p], ancestry_after[p] - ancestry[p]
        for n in range(sites):
            expected[n] += (share + change * right[n]) * of[n]
    for n in range(sites):
        minor = min(max(rates.background * expected[n], _LEAST), np.float32(1) - _LEAST)
        turned = turing[n] * minor
        minor = quotient(turned, np.float32(1) - minor + turned)
        likely = (np.float32(1) - minor if flipped[n] else minor) >= rates.least
        pending[n] |= np.uint8(likely)
        probability[n] = np.float32(1) - minor if minor_is_ref[n] else minor


@compiled_part
def _copy_sites(panel, rates, own, row, interval, before, after, count, kept, scratch, waiting, head, found):
    """Copy the sites of an interval between two typed sites, the halves ``before`` and ``after`` of ``kept``.

    ``count`` haplotypes are kept at either.
    """
    by_site, probability, copied = scratch.by_site, found.probability, found.copied
    for g in range(panel.intervals[interval], panel.intervals[interval + 1]):
        base, first = panel.sequences[g], panel.bounds[g]
        several = _add_by_sequence(kept, scratch, panel.sequence[g], count)
        for n in range(several):
            sequence = scratch.touched[n]
            other = sequence + len(scratch.marked)
            add_row(scratch.sums, sequence, scratch.sums, other)
            for place in range(panel.minor_start[base + sequence], panel.minor_start[base + sequence + 1]):
                site = panel.minor_sites[place]
                scratch.pending[site] = np.uint8(1)
                add_row(by_site, site, scratch.sums, sequence)
            for lane in range(_LANES):
                scratch.sums[sequence, lane] = scratch.sums[other, lane] = np.float32(0)
            scratch.marked[sequence] = np.uint8(0)
        stop = panel.bounds[g + 1]
        _without_carriers(
            rates,
            panel.share[first:stop],
            panel.minor_is_ref[first:stop],
            own.by_population[row, :, first:stop],
            own.turing[row, first:stop],
            own.flipped[row, first:stop],
            kept.ancestry[before],
            kept.ancestry[after],
            scratch.expected,
            scratch.pending,
            probability[first:stop],
        )
        if copied.shape[1]:
            for site in range(first, stop):
                to_ref, expected = panel.minor_is_ref[site], scratch.expected[site - first]
                copied[0, site] = np.float32(to_ref)
                copied[1, site] = np.float32(1) - expected if to_ref else expected
        for site in range(first, stop):
            if not scratch.pending[site - first]:
                continue
            scratch.pending[site - first] = np.uint8(0)
            here = np.uint64(site - first)
            right = panel.share[site]
            slow = by_site[here, 0] + right * (by_site[here, 4] - by_site[here, 0])
            fast = by_site[here, 1] + right * (by_site[here, 5] - by_site[here, 1])
            length = by_site[here, 2] + right * (by_site[here, 6] - by_site[here, 2])
            root = by_site[here, 3] + right * (by_site[here, 7] - by_site[here, 3])
            for lane in range(_LANES):
                by_site[here, lane] = np.float32(0)
            minor = fast + own.slow[row, site] * (slow - fast)
            if copied.shape[1]:
                copied[0, site] = np.float32(1) - minor if panel.minor_is_ref[site] else minor
            minor += rates.background * (scratch.expected[site - first] - minor)
            minor = min(max(minor, _LEAST), np.float32(1) - _LEAST)
            turned = own.turing[row, site] * minor
            minor = quotient(turned, np.float32(1) - minor + turned)
            flipped, to_ref = own.flipped[row, site], panel.minor_is_ref[site]
            if (np.float32(1) - minor if flipped else minor) < rates.least:
                probability[site] = np.float32(1) - minor if to_ref else minor
                continue
            all_lengths = kept.length[before] + right * (kept.length[after] - kept.length[before])
            roots = kept.root[before] + right * (kept.root[after] - kept.root[before])
            if flipped:
                minor, slow, fast = np.float32(1) - minor, np.float32(1) - slow, np.float32(1) - fast
                length, root, to_ref = all_lengths - length, roots - root, not to_ref
            column = add_site(site, to_ref, minor, slow, fast, length, all_lengths, root, roots, waiting)
            known = waiting.features
            known[2, column] = own.log_frequency[row, site]
            known[5, column] = kept.uncertainty[before] + right * (kept.uncertainty[after] - kept.uncertainty[before])
            known[6, column], known[7, column] = panel.nearest[site], panel.gap[site]
            if waiting.number[0] == AT_ONCE:
                correct(head, waiting, found)


@compiled_part
def _fetch_sequences(panel, interval, either, count):
    """Ask for the sequences of the haplotypes kept now in the next interval, which are far from the processor."""
    for g in range(panel.intervals[interval], panel.intervals[interval + 1]):
        row = panel.sequence[g]
        if count * _LINE < len(row):
            for n in range(count):
                fetch(row, either[n])
        else:
            for k in range(0, len(row), _LINE):
                fetch(row, k)


@compiled_part
def _run_pieces(panel, rates, states, runs, run_of, section, begin, stop):
    """Run both forward recursions over pieces ``begin`` to ``stop``, from what was noted of their ``section``."""
    copy_rows(states.saved[0], states.sections[section])
    run_forward(panel, rates, states, runs, run_of[begin], run_of[stop])


@compiled_part
def _copy_haplotypes(
    panel,
    rates,
    own,
    query,
    row,
    excluded,
    runs,
    run_of,
    states,
    chosen,
    kept,
    scratch,
    waiting,
    head,
    found,
    first_target,
):
    """Copy at most four target haplotypes, the ``first_target`` and those after it."""
    typed, intervals, lanes, several = len(panel.position), panel.intervals, len(query), len(states.saved) - 1
    first, last = core_of(intervals, typed)
    states.known[:] = np.uint8(0)  # a lane without a target differs from no haplotype
    for lane in range(lanes):
        note_masks(query[lane], states.own[lane], states.known[lane])
        fill_priors(panel.packed, panel.place, rates, excluded[lane], states, lane)
    pieces = last // PIECE + 1
    states.came[0] = np.float32(0)
    states.sections[0, :] = np.float32(0)
    for begin in range(0, pieces, several):
        stop = min(begin + several, pieces)
        _run_pieces(panel, rates, states, runs, run_of, begin // several, begin, stop)
        copy_rows(states.joint if stop == pieces else states.sections[stop // several], states.saved[stop - begin])
    start_backward(panel, states, runs)
    now, other = states.behind[0], states.behind[1]
    if run_of[pieces] < len(runs) - 1:
        run_backward(panel, rates, states, excluded, runs, run_of[pieces], len(runs) - 1, last, now, now)
    start_haplotypes(panel, chosen)
    kept.number_moved[:] = 0
    half, begin = 0, (pieces - 1) // several * several
    for piece in range(pieces - 1, first // PIECE - 1, -1):
        start, stop = PIECE * piece, min(PIECE * piece + PIECE, last + 1)
        if piece < begin:
            begin -= several
            _run_pieces(panel, rates, states, runs, run_of, begin // several, begin, begin + several)
        run_backward(panel, rates, states, excluded, runs, run_of[piece], run_of[piece + 1], last, now, other)
        saved = states.saved[piece - begin]
        flag_piece(panel, rates, states, chosen, start, stop, saved, now)
        after = half
        for lane in range(lanes):
            half, ours, waits = after, kept_of(kept, lane), waiting_of(waiting, lane)
            theirs = found_of(found, first_target + lane)
            count = copy_piece(panel, rates, states, chosen, ours, start, stop, saved, now, lane)
            enter_piece(ours, chosen, count, half)
            for t in range(stop - 1, max(start, first) - 1, -1):
                half = 1 - half
                either = keep(panel, rates, t, start, count, chosen, ours, half)
                beyond = half if t == typed - 1 else 1 - half
                if t > first:
                    _fetch_sequences(panel, t, ours.either, either)
                for interval in range(t + 1, t if t > 0 else -1, -1):
                    _copy_sites(
                        panel,
                        rates,
                        own,
                        row[lane],
                        interval,
                        half,
                        beyond if interval > 0 else half,
                        either,
                        ours,
                        scratch,
                        waits,
                        head,
                        theirs,
                    )
            leave_piece(ours, chosen, count, half)
        now, other = other, now
    for lane in range(lanes):
        correct(head, waiting_of(waiting, lane), found_of(found, first_target + lane))


@compiled_part
def core_of(intervals, typed):
    """The outermost typed sites next to a site of the core.

    Nothing is asked of forward states behind them, or of backward states before them.
    """
    first, last = 0, typed - 1
    while first < typed - 1 and intervals[first + 2] == intervals[first]:
        first += 1
    while last > first and intervals[last + 2] == intervals[last]:
        last -= 1
    return first, last


@making_part
def _list_runs(panel):
    """First typed sites of runs, which lie within a piece and a place, and the first run of every piece.

    They are int64 [runs + 1] and [pieces + 2]: behind its last typed site next to the core, a piece begins anew.
    """
    typed, place = len(panel.position), panel.place
    _, last = core_of(panel.intervals, typed)
    runs, run_of = np.empty(typed + 1, dtype=np.int64), np.empty(typed // PIECE + 3, dtype=np.int64)
    count = pieces = 0
    for t in range(typed):
        begins = t == last + 1 or (t % PIECE == 0 and t <= last)
        if begins:
            run_of[pieces] = count
            pieces += 1
        if begins or t % PIECE == 0 or place[t] != place[t - 1]:
            runs[count] = t
            count += 1
    runs[count] = typed
    run_of[pieces:] = count
    return runs[: count + 1], run_of


@WorkerLoop
def copy_along(workers, taken, of_panel, of_model, of_rows, of_head, query, row_of, excluded, most_saved, of_targets):
    """Copy target haplotypes along a stretch, and fill the arrays of :class:`Found`, ``of_targets``.

    A worker copies some haplotypes after others, four at once where there are enough for all workers: the next ones of
    those that none has ``taken`` int64 [1], which counts them.
    ``of_panel``, ``of_model``, ``of_rows`` and ``of_head`` have the fields of :class:`PanelPart`, :class:`Rates`,
    :class:`Frequencies` and :class:`Head`. All are plain tuples, because numba's index of what it keeps on the disk
    names the classes of arguments, and could not be read after one is renamed. ``query`` uint8 [B, T] are typed
    alleles, 2 where missing; ``row_of`` int64 [B] are rows of ``of_rows``; ``excluded`` int64 [B, E] haplotypes not to
    copy, padded with H. Each worker saves the forward states of all pieces where they take at most ``most_saved``
    bytes, and those of fewer otherwise.
    """
    panel, rates, own, head = PanelPart(*of_panel), Rates(*of_model), Frequencies(*of_rows), Head(*of_head)
    found = Found(*of_targets)
    typed, haplotypes = len(panel.position), panel.packed.shape[1]
    places, populations = rates.typed_at.shape[1], own.by_population.shape[1]
    pieces = (typed + PIECE - 1) // PIECE
    # Of long stretches and large panels, forward states are kept twice, of few pieces and of few sections.
    several = pieces if 8 * LANES * haplotypes * pieces <= most_saved else int(math.sqrt(pieces)) + 1
    states = new_states(typed, haplotypes, places, several)
    chosen = new_chosen(haplotypes)
    kept = new_kept(haplotypes, populations)
    scratch = new_scratch(panel.most_sequences)
    waiting = new_waiting(len(head.last))
    waiting.features[:, 8] = head.density
    runs, run_of = _list_runs(panel)
    lanes = min(LANES, (len(query) + workers - 1) // workers)
    b = take(taken, lanes)
    while b < len(query):
        _copy_haplotypes(
            panel,
            rates,
            own,
            query[b : b + lanes],
            row_of[b : b + lanes],
            excluded[b : b + lanes],
            runs,
            run_of,
            states,
            chosen,
            kept,
            scratch,
            waiting,
            head,
            found,
            b,
        )
        b = take(taken, lanes)
