"""CPU loop over the haplotypes of a tile: what a network adds to copied dosages behind the copying model.

It computes what :class:`embrag_ds.model.imputer.Imputer` does from its embedding to its head. No haplotype depends on
another, so the numbers are the same for any number of threads and whatever is computed beside them. Shapes and letters:
:mod:`embrag_ds.correction.records`.
"""

from __future__ import annotations

import math

import numpy as np

from embrag_ds.compiled.functions import arcsine, cosine, logarithm, sigmoid, sine
from embrag_ds.compiled.instructions import quotient, take
from embrag_ds.compiled.parts import assign, compiled_part, making_part, product
from embrag_ds.correction.layers import AT_ONCE, make_keys, normalise, normalise_rows, run_block
from embrag_ds.correction.records import NetworkPart, Space, TilePart
from embrag_ds.data.tokens import MASK
from embrag_ds.model.numbers import FREQUENCY_FEATURES, FREQUENCY_OCTAVES, LEAST_FREQUENCY
from embrag_ds.ops.threads import WorkerLoop

PARTS = "ac3ae92f5314"
"""Digest of the loop's other files: numba looks for a change in this file alone, and would use what it has kept of the
loop. A test compares it.
"""
_LEAST_FREQUENCY = np.float32(LEAST_FREQUENCY)
_LEAST_PRIOR = np.float32(1e-5)
_ONE, _TWO, _HALF = np.float32(1), np.float32(2), np.float32(0.5)
_TO_UNIT = np.float32(2 / math.pi)
_PER_LOGARITHM = np.float32(-1 / (6 * math.log(10)))
_PI = np.float32(math.pi)


@compiled_part
def _frequency_features(expected, features):
    """Fill ``features`` [26, 64] of expected frequencies [64].

    They are those of :func:`embrag_ds.model.embedding.frequency_features`. Sines and cosines of an octave follow from
    those of the one below.
    """
    octaves = FREQUENCY_OCTAVES
    arcsines, sines, cosines = features[4 * octaves], features[0], features[2 * octaves]
    for c in range(AT_ONCE):
        frequency = min(max(expected[c], _LEAST_FREQUENCY), _ONE - _LEAST_FREQUENCY)
        root = math.sqrt(frequency)
        arcsines[c] = arcsine(root) * _TO_UNIT
        # Half a turn times the arcsine is twice the angle whose sine is the root.
        sines[c] = _TWO * root * math.sqrt(_ONE - frequency)
        cosines[c] = _ONE - _TWO * frequency
    logarithms, sines, cosines = features[4 * octaves + 1], features[octaves], features[3 * octaves]
    for c in range(AT_ONCE):
        frequency = min(max(expected[c], _LEAST_FREQUENCY), _ONE - _LEAST_FREQUENCY)
        logarithms[c] = logarithm(min(frequency, _ONE - frequency)) * _PER_LOGARITHM
        angle = _PI * (logarithms[c] - _HALF)  # a quarter turn back
        sines[c] = cosine(angle)
        cosines[c] = -sine(angle)
    for first in range(0, 2 * octaves, octaves):
        for octave in range(first + 1, first + octaves):
            sines, cosines = features[octave - 1], features[2 * octaves + octave - 1]
            next_sines, next_cosines = features[octave], features[2 * octaves + octave]
            for c in range(AT_ONCE):
                next_sines[c] = _TWO * sines[c] * cosines[c]
                next_cosines[c] = _ONE - _TWO * sines[c] * sines[c]


@compiled_part
def _fuse(network, tile, row, tokens, dosage, expected, space):
    """Fill ``space.states`` with what fusion makes of the query and of the panel at all sites."""
    dims, sites, typed = len(network.head), len(dosage), space.typed
    if space.row[0] != row:
        product(space.of_frequency, network.overall, tile.of_rows[row], 2 * dims, space.of_frequency.shape[1])
        space.row[0] = row
    both, states, share, last = space.both, space.states, space.share, network.norms[len(network.norms) - 1]
    end = 0
    for start in range(0, states.shape[1], AT_ONCE):
        here, stop = min(AT_ONCE, sites - start), start + AT_ONCE
        assign(share, expected[start : start + here])
        _frequency_features(share, space.features)
        product(both, network.expected, space.features, 2 * dims, AT_ONCE)
        assign(share, dosage[start : start + here])
        for d in range(2 * dims):
            to, known = both[d], space.sites[3 * dims + d, start:stop]
            step, more = space.sites[5 * dims + d, start:stop], space.of_frequency[d, start:stop]
            for c in range(AT_ONCE):
                to[c] += known[c] + share[c] * step[c] + more[c]
        begin = end
        while end < len(tile.typed) and tile.typed[end] < stop:
            end += 1
        for t in range(begin, end):
            if tokens[t] != MASK:
                first = 3 * dims * tokens[t] + dims
                for d in range(2 * dims):
                    both[d, tile.typed[t] - start] += typed[first + d, t]
        for d in range(dims):
            gate, mixed, to, own = both[d], both[dims + d], states[d, start:stop], space.sites[d, start:stop]
            reference, step = space.sites[dims + d, start:stop], space.sites[2 * dims + d, start:stop]
            for c in range(AT_ONCE):
                panel = reference[c] + share[c] * step[c]
                to[c] = own[c] + mixed[c] + sigmoid(gate[c]) * (panel - mixed[c])
        for t in range(begin, end):
            if tokens[t] != MASK:
                first = 3 * dims * tokens[t]
                for d in range(dims):
                    states[d, tile.typed[t]] += typed[first + d, t]
        normalise(states, start, space.normed, space.mean, space.spread, last[0], last[1])
        for d in range(dims):
            assign(states[d, start:stop], space.normed[d])


@compiled_part
def _list_likely(network, tile, row, dosage, expected, wanted):
    """List in ``wanted`` the tile's own sites where the minor allele is likely enough; returns their number."""
    count = 0
    for site in range(tile.first, tile.last):
        prior = dosage[site] + network.background * (expected[site] - dosage[site])
        prior = min(max(prior, _LEAST_PRIOR), _ONE - _LEAST_PRIOR)
        alt, ref = prior * tile.turing[row, site], _ONE - prior
        if tile.frequency[row, site] > _HALF:
            alt, ref = ref, alt
        wanted[count] = site
        count += alt >= network.least * ref
    return count


@compiled_part
def _gather(space, dims, count):
    """Copy the states of the wanted sites to rows of ``space.own``."""
    for n in range(count):
        row, site = space.own[n], space.wanted[n]
        for d in range(dims):
            row[d] = space.states[d, site]


@compiled_part
def _run_on_all(network, tile, layer, space, sites):
    """One block of the transformer for all sites, from and to the states."""
    dims = len(network.head)
    for site in range(sites):
        space.wanted[site] = site
    _gather(space, dims, sites)
    run_block(network, tile, layer, space, sites, sites)
    for d in range(dims):
        for site in range(sites):
            space.states[d, site] = space.own[site, d]


@compiled_part
def _correct_haplotype(network, tile, row, tokens, dosage, expected, space, probability):
    """Correct the ``probability`` [L] of ALT of one haplotype at the tile's own sites."""
    dims, sites, end = len(network.head), len(dosage), len(network.keys) - 1
    if not _list_likely(network, tile, row, dosage, expected, space.wanted):
        return
    _fuse(network, tile, row, tokens, dosage, expected, space)
    for layer in range(end):
        make_keys(network, tile, layer, space)
        _run_on_all(network, tile, layer, space, sites)
    make_keys(network, tile, end, space)
    likely = _list_likely(network, tile, row, dosage, expected, space.wanted)
    _gather(space, dims, likely)
    run_block(network, tile, end, space, likely, sites)
    last = network.norms[end + 1]
    normalise_rows(space.own, space.normal, likely, last[2], last[3])
    for n in range(likely):
        site, correction, normal = space.wanted[n], network.head_bias, space.normal[n]
        for d in range(dims):
            correction += normal[d] * network.head[d]
        alt = probability[site]
        if correction != 0 and 0 < alt < 1:
            # Log-odds, because the exponential of a large correction would overflow.
            probability[site] = sigmoid(logarithm(quotient(alt, _ONE - alt)) + correction)


@making_part
def _new_space(network, tile):
    """A worker's arrays for a tile, with what all haplotypes share; what is never written to is 0."""
    dims, width, of_heads = len(network.head), network.query.shape[2], network.out.shape[1]
    sites, typed = tile.features.shape[1], tile.of_typed.shape[1]
    space = Space(
        sites=np.empty((len(network.sites), sites), dtype=np.float32),
        typed=np.empty((len(network.typed), typed), dtype=np.float32),
        of_frequency=np.empty((2 * dims, sites), dtype=np.float32),
        row=np.full(1, -1, dtype=np.int64),
        features=np.zeros((FREQUENCY_FEATURES, AT_ONCE), dtype=np.float32),
        both=np.zeros((2 * dims, AT_ONCE), dtype=np.float32),
        normed=np.zeros((dims, AT_ONCE), dtype=np.float32),
        mean=np.zeros(AT_ONCE, dtype=np.float32),
        spread=np.zeros(AT_ONCE, dtype=np.float32),
        share=np.zeros(AT_ONCE, dtype=np.float32),
        states=np.zeros((dims, sites), dtype=np.float32),
        key=np.zeros((dims, sites), dtype=np.float32),
        value=np.zeros((sites, of_heads), dtype=np.float32),
        wanted=np.zeros(sites + 1, dtype=np.int64),
        own=np.zeros((sites, width), dtype=np.float32),
        normal=np.zeros((sites, width), dtype=np.float32),
        query=np.zeros((sites, width), dtype=np.float32),
        mixed=np.zeros((sites, of_heads), dtype=np.float32),
        wide=np.zeros((sites, network.wider.shape[2]), dtype=np.float32),
        score=np.zeros((4, sites), dtype=np.float32),
    )
    product(space.sites, network.sites, tile.features, len(network.sites), sites)
    product(space.typed, network.typed, tile.of_typed, len(network.typed), typed)
    return space


@WorkerLoop
def correct_tile(workers, taken, of_network, of_tile, tokens, row_of, copied, probability):
    """Correct ``probability`` float32 [B, C] of ALT at a tile's own sites, for B haplotypes in a core of C sites.

    ``of_network`` and ``of_tile`` have the fields of :class:`NetworkPart` and :class:`TilePart`. They are plain tuples,
    because numba's index of what it keeps names the classes of arguments. ``tokens`` uint8 [B, T] are alleles at the
    tile's typed sites, MASK where missing; ``row_of`` int64 [B] are rows of frequencies. ``copied`` float32 [B, 2, C]
    has the dosage and the expected frequency (:class:`~embrag_ds.copying.along.Copied`).
    """
    network, tile = NetworkPart(*of_network), TilePart(*of_tile)
    start, stop = tile.start, tile.start + tile.frequency.shape[1]
    space = _new_space(network, tile)
    b = take(taken, 1)
    while b < len(tokens):
        dosage, expected = copied[b, 0, start:stop], copied[b, 1, start:stop]
        _correct_haplotype(network, tile, row_of[b], tokens[b], dosage, expected, space, probability[b, start:stop])
        b = take(taken, 1)
