"""Copying probabilities of haplotypes that can matter in a piece of typed sites, a part of the loop along a stretch.

Most haplotypes are negligible in a piece, and their states at its ends show it. With forward state a before the piece,
backward state b behind it and prior p, a probability inside is (a A + p P) (b C + D) / Z. A, P, C and D follow from the
steps' factors, and are the same for all haplotypes of a pattern; Z is the sum over all haplotypes. Of each of the four
products, the greatest at any typed site of the piece counts, so the sum is a bound.
"""

from __future__ import annotations

import numpy as np

from embrag_ds.compiled.instructions import zeros_above, zeros_below
from embrag_ds.compiled.parts import compiled_part
from embrag_ds.copying.instructions import LANES, flag_row
from embrag_ds.copying.kept import list_flagged
from embrag_ds.copying.recursions import PIECE, compare_patterns, copy_rows

_FIRST_GUESS = np.float32(0.02)
_SAFETY = np.float32(0.5)


@compiled_part
def start_haplotypes(panel, chosen):
    """Begin target haplotypes: nothing is known of their sums of squares, and of their mismatches."""
    chosen.least[:] = _FIRST_GUESS
    chosen.before[:] = np.uint16(0xFFFF)
    chosen.after[:] = np.uint16(len(panel.position) - 1)
    chosen.seen[:] = np.uint16(len(panel.position) - 1)


@compiled_part
def flag_piece(panel, rates, states, chosen, start, stop, saved, beta):
    """Flag in ``chosen.flags`` the haplotypes that are not negligible in a piece for some target, whose bit is set.

    ``saved`` float32 [H, 8] are the forward states before typed site ``start``, and ``beta`` the backward states of
    ``stop``. Negligible is what is below ``rates.keep`` times the sum of squares of all probabilities, which is guessed
    from the piece behind.
    """
    _bound_patterns(panel, rates, states, chosen, start, stop)
    if panel.place[start] != panel.place[stop - 1]:
        highest = states.highest
        copy_rows(highest, states.prior[panel.place[start]])
        for t in range(start + 1, stop):
            if panel.place[t] != panel.place[t - 1]:
                row = states.prior[np.uint64(panel.place[t])]
                for k in range(len(highest)):
                    for lane in range(LANES):
                        highest[k, lane] = max(highest[k, lane], row[k, lane])
    for n in range(2 * LANES):
        chosen.limit[0, n] = rates.keep * chosen.least[n % LANES, n // LANES]
    _flag_haplotypes(panel, states, chosen, start, stop, saved, beta)


@compiled_part
def _flag_haplotypes(panel, states, chosen, start, stop, saved, beta):
    """Flag the haplotypes whose bound is not negligible, by the highest of their priors in the piece."""
    flags, bounds, limit, patterns = chosen.flags, chosen.bounds, chosen.limit, panel.packed[start >> 3]
    prior = states.prior[panel.place[start]] if panel.place[start] == panel.place[stop - 1] else states.highest
    for k in range(len(prior)):
        flag_row(flags, k, saved, beta, prior, bounds, patterns[k], limit)


@compiled_part
def copy_piece(panel, rates, states, chosen, kept, start, stop, saved, beta, lane):
    """Fill ``chosen.joint`` with a target's probabilities of all haplotypes that are not negligible in a piece.

    They are listed in ``chosen.who``; returns how many. ``saved``, ``beta`` and what is flagged are those of
    :func:`flag_piece`. Fills ``chosen.squares``, the sums of squares of the probabilities.

    If that sum was less than it was guessed to be, the piece is computed anew with what was found. A sum over fewer
    haplotypes is no more than that over all, so what is left out is negligible.
    """
    haplotypes, count, flags, bit = len(saved), 0, chosen.flags, np.uint8(1 << lane)
    for _ in range(2):
        for n in range(kept.number_moved[0]):
            flags[np.uint64(kept.moved[n])] |= bit
        count = list_flagged(flags, lane, chosen.who)
        _gather(panel, states, chosen, count, start, stop, saved, beta, lane)
        _forward(panel, rates, states, chosen, count, start, stop, lane)
        _backward(rates, states, chosen, count, start, stop, lane)
        enough = True
        for model in range(2):
            least = np.float32(1)
            for t in range(stop - start):
                least = min(least, chosen.squares[t, model])
            least = max(least, np.float32(1 / haplotypes))  # no sum over all is less
            enough &= least >= chosen.least[lane, model]
            chosen.least[lane, model] = _SAFETY * least
        if enough:
            break
        for model in range(2):
            chosen.limit[0, lane + LANES * model] = rates.keep * chosen.least[lane, model]
        _flag_haplotypes(panel, states, chosen, start, stop, saved, beta)
    _match(panel, states, chosen, count, start, stop, lane)
    return count


@compiled_part
def _bound_patterns(panel, rates, states, chosen, start, stop):
    """Fill ``chosen.bounds``: by pattern, the factors of a b, a, p b and p in a bound on a piece's probabilities."""
    row, one, steps, most, ends = start >> 3, np.float32(1), chosen.steps, chosen.most, chosen.ends
    patterns, count = panel.patterns[row], np.uint64(panel.pattern_count[row])
    compare_patterns(states, row, patterns, count)
    for of in range(2 * LANES):
        model, differs = of // LANES, states.mask[np.uint64(of % LANES), :count]
        state, prior = ends[0, :count], ends[1, :count]
        state[:], prior[:], most[:] = one, np.float32(0), np.float32(0)
        for t in range(start, stop):
            here, scale = np.uint64(t - start), states.scale[t, of]
            stay, jump = scale * states.came[t, of], scale * (rates.jump[model, t] if t > 0 else one)
            new_state, new_prior = steps[0, here, :count], steps[1, here, :count]
            bit = np.uint8(1 << (t & 7))
            _bound_forward(state, prior, new_state, new_prior, differs, bit, rates.ratio[model, t], stay, jump)
            state, prior = new_state, new_prior
        behind, left, ratio = ends[0, :count], ends[1, :count], one  # the state behind has the emission of its own site
        behind[:], left[:] = one, np.float32(0)
        for t in range(stop - 1, start - 1, -1):
            here, bit = np.uint64(t - start), np.uint8(2 << (t & 7) & 0xFF)
            stay, jump, share = states.went[t, of], states.left[t, of], one / states.paths[t, of]
            state, prior = steps[0, here, :count], steps[1, here, :count]
            _bound_backward(behind, left, state, prior, most, differs, bit, ratio, stay, jump, share)
            ratio = rates.ratio[model, t]
        for c in range(count):
            into = chosen.bounds[np.uint64(patterns[c])]
            for n in range(4):
                into[np.uint64(2 * LANES * n + of)] = most[np.uint64(n), c]


@compiled_part
def _bound_forward(state, prior, new_state, new_prior, differs, bit, ratio, stay, jump):
    """Factors of a haplotype's state before a piece and of its prior in a forward state, one step on, by pattern."""
    one = np.float32(1)
    for c in range(len(differs)):
        emission = ratio if np.uint8(differs[c] & bit) != 0 else one
        kept = emission * stay
        new_state[c] = kept * state[c]
        new_prior[c] = kept * prior[c] + emission * jump


@compiled_part
def _bound_backward(behind, left, state, prior, most, differs, bit, ratio, stay, jump, share):
    """The same of the state behind a piece, one step back; their products with forward ones raise ``most``."""
    one = np.float32(1)
    both, came, went, new = most[0], most[1], most[2], most[3]
    for c in range(len(differs)):
        change = stay * (ratio if np.uint8(differs[c] & bit) != 0 else one)
        b, d = behind[c] * change, left[c] * change + jump
        a, p = share * state[c], share * prior[c]
        behind[c], left[c] = b, d
        both[c], came[c] = max(both[c], a * b), max(came[c], a * d)
        went[c], new[c] = max(went[c], p * b), max(new[c], p * d)


@compiled_part
def _gather(panel, states, chosen, count, start, stop, saved, beta, lane):
    """Collect what the chosen haplotypes have at the ends of a piece, their priors, and where they differ in it."""
    who, came, behind, fast = chosen.who, chosen.came, chosen.behind, lane + LANES
    patterns, own, known = panel.packed[start >> 3], states.own[lane, start >> 3], states.known[lane, start >> 3]
    for n in range(count):
        k = np.uint64(who[n])
        came[0, n], came[1, n] = saved[k, lane], saved[k, fast]
        behind[0, n], behind[1, n] = beta[k, lane], beta[k, fast]
        chosen.differs[n] = (patterns[k] ^ own) & known
    for t in range(start, stop):
        if t == start or panel.place[t] != panel.place[t - 1]:
            row, into = states.prior[np.uint64(panel.place[t])], chosen.prior[t - start]
            for n in range(count):
                into[n] = row[np.uint64(who[n]), lane]
            chosen.row[t - start] = t - start
        else:
            chosen.row[t - start] = chosen.row[t - start - 1]


@compiled_part
def _match(panel, states, chosen, count, start, stop, lane):
    """Fill in where the matches of the chosen haplotypes begin, for each typed site of a piece, and end behind it."""
    find_mismatches(panel, states, chosen, count, start, stop, lane)
    before, after, position = chosen.before[lane], chosen.after[lane], panel.position
    begin, end, who = chosen.begin[PIECE], chosen.end, chosen.who
    for n in range(count):
        k = np.uint64(who[n])
        begin[n], end[n] = position[np.uint64(before[k])], position[np.uint64(after[k])]
    for t in range(start, stop):
        into = chosen.begin[np.uint64(t - start)]
        _carry(begin, chosen.differs, np.uint8(1 << (t & 7)), position[t], into, count)
        begin = into


@compiled_part
def find_mismatches(panel, states, chosen, count, start, stop, lane):
    """Find the mismatches of the chosen haplotypes with a target that are nearest to a piece, on either side.

    Fills ``chosen.before`` with the last typed site before ``start``, 0 if there is none, and ``chosen.after`` with the
    first one from ``stop`` on, the last typed site if there is none. Pieces are asked for from the last to the first.
    So what was found for a haplotype then, behind typed site ``chosen.seen``, holds on, and only what lies before it is
    searched, 64 typed sites at once.
    """
    before, after, seen, who = chosen.before[lane], chosen.after[lane], chosen.seen[lane], chosen.who
    own, known, all_bits = states.own[lane].view(np.uint64), states.known[lane].view(np.uint64), ~np.uint64(0)
    first, last = (start - 1) >> 6, stop >> 6
    up_to, from_on = all_bits >> np.uint64(-start & 63), all_bits << np.uint64(stop & 63)
    for n in range(count):
        k = np.uint64(who[n])
        alleles = panel.turned[k]
        if before[k] >= start:
            found, mask = np.uint16(0), up_to
            for word in range(first, -1, -1):
                differs = (alleles[word] ^ own[word]) & known[word] & mask
                mask = all_bits
                if differs:
                    found = np.uint16((word << 6) + 63 - zeros_above(differs))
                    break
            before[k] = found
        if seen[k] > stop:
            mask = from_on
            for word in range(last, (np.int64(seen[k]) + 63) >> 6):
                differs = (alleles[word] ^ own[word]) & known[word] & mask
                mask = all_bits
                if differs:
                    after[k] = np.uint16((word << 6) + zeros_below(differs))
                    break
            seen[k] = np.uint16(stop)


@compiled_part
def _carry(before, differs, bit, here, into, count):
    """Fill ``into`` with what was ``before``, or with ``here`` where the ``bit`` of ``differs`` is set.

    This is a function because compilers do not turn it into vector instructions beside other loops.
    """
    for n in range(count):
        into[n] = here if np.uint8(differs[n] & bit) != 0 else before[n]


@compiled_part
def _forward(panel, rates, states, chosen, count, start, stop, lane):
    """Run both forward recursions over a piece, from ``chosen.came`` into ``chosen.joint``."""
    one, differs = np.float32(1), chosen.differs[:count]
    for t in range(start, stop):
        row, bit = np.uint64(t - start), np.uint8(1 << (t & 7))
        prior = chosen.prior[np.uint64(chosen.row[row]), :count]
        for model in range(2):
            of, n_of = np.uint64(model), lane + LANES * model
            before = chosen.joint[row - np.uint64(1), of, :count] if t > start else chosen.came[of, :count]
            now, scale, ratio = chosen.joint[row, of, :count], states.scale[t, n_of], rates.ratio[model, t]
            stay, jump = scale * states.came[t, n_of], scale * (rates.jump[model, t] if t > 0 else one)
            for n in range(count):
                state = stay * before[n] + jump * prior[n]
                now[n] = state * (ratio if np.uint8(differs[n] & bit) != 0 else one)


@compiled_part
def _backward(rates, states, chosen, count, start, stop, lane):
    """Run both backward recursions over a piece, from ``chosen.behind``; the probabilities follow."""
    one, differs = np.float32(1), chosen.differs[:count]
    for model in range(2):
        # It includes the emission of the typed site behind the piece.
        beta, ratio, of = chosen.behind[np.uint64(model), :count], one, lane + LANES * model
        for t in range(stop - 1, start - 1, -1):
            now, bit = chosen.joint[np.uint64(t - start), np.uint64(model), :count], np.uint8(2 << (t & 7) & 0xFF)
            stay, jump, squares = states.went[t, of], states.left[t, of], np.float32(0)
            change, share = stay * ratio, one / states.paths[t, of]
            for n in range(count):
                state = beta[n] * (change if np.uint8(differs[n] & bit) != 0 else stay) + jump
                beta[n] = state
                joint = share * (now[n] * state)
                now[n] = joint
                squares += joint * joint
            ratio = rates.ratio[model, t]
            chosen.squares[t - start, model] = squares
