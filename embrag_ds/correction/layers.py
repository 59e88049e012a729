"""Layers of the transformer for one haplotype, parts of the loop over tiles.

They compute what :class:`embrag_ds.model.transformer.Block` does. Keys and values are needed of all sites, so they are
computed for 64 sites at once: states are [D, L'], where compilers find vectors of sites. Queries are needed of fewer
sites, so they and what follows are [L', D'].
"""

from __future__ import annotations

import math

import numpy as np

from embrag_ds.compiled.functions import gelu, power_of_two
from embrag_ds.compiled.instructions import COLUMNS, ROWS, multiply, quotient
from embrag_ds.compiled.parts import compiled_part, product

AT_ONCE = 64
"""Sites whose keys and values are computed together."""
_LEAST_VARIANCE = np.float32(1e-5)
_ONE = np.float32(1)


@compiled_part
def normalise(of, first, into, mean, spread, gain, bias):
    """Normalise ``of`` [D, L'] at the 64 sites from ``first`` on over D, and fill ``into`` [D, 64]."""
    dims = len(gain)
    share = quotient(_ONE, np.float32(dims))
    for c in range(AT_ONCE):
        mean[c] = np.float32(0)
        spread[c] = np.float32(0)
    for d in range(dims):
        row = of[d, first : first + AT_ONCE]
        for c in range(AT_ONCE):
            mean[c] += row[c]
    for c in range(AT_ONCE):
        mean[c] *= share
    for d in range(dims):
        row = of[d, first : first + AT_ONCE]
        for c in range(AT_ONCE):
            off = row[c] - mean[c]
            spread[c] += off * off
    for c in range(AT_ONCE):
        spread[c] = quotient(_ONE, math.sqrt(spread[c] * share + _LEAST_VARIANCE))
    for d in range(dims):
        row, to, factor, summand = of[d, first : first + AT_ONCE], into[d], gain[d], bias[d]
        for c in range(AT_ONCE):
            to[c] = (row[c] - mean[c]) * spread[c] * factor + summand


@compiled_part
def normalise_rows(of, into, count, gain, bias):
    """Normalise ``count`` rows of ``of`` [L', D'] over D, and fill those of ``into`` [L', D']."""
    dims = len(gain)
    share = quotient(_ONE, np.float32(dims))
    for n in range(count):
        row, to = of[n], into[n]
        mean = variance = np.float32(0)
        for d in range(dims):
            mean += row[d]
        mean *= share
        for d in range(dims):
            off = row[d] - mean
            variance += off * off
        factor = quotient(_ONE, math.sqrt(variance * share + _LEAST_VARIANCE))
        for d in range(dims):
            to[d] = (row[d] - mean) * factor * gain[d] + bias[d]


@compiled_part
def _add_rows(into, rows, count, bias):
    """Add ``count`` rows and a ``bias`` to those of ``into``."""
    for n in range(count):
        to, row = into[n], rows[n]
        for d in range(len(bias)):
            to[d] += row[d] + bias[d]


@compiled_part
def make_keys(network, tile, layer, space):
    """Fill ``space.key`` and ``space.value`` from the states."""
    dims, heads = len(network.head), network.heads
    width, padded = dims // heads, space.value.shape[1] // heads
    norm, both, normed, bias = network.norms[layer], space.both, space.normed, network.keys_bias[layer]
    for start in range(0, space.states.shape[1], AT_ONCE):
        normalise(space.states, start, normed, space.mean, space.spread, norm[0], norm[1])
        product(both, network.keys[layer], normed, 2 * dims, AT_ONCE)
        for d in range(0, dims, 2):
            pair = d % width // 2
            cosine, sine = tile.cosine[pair, start : start + AT_ONCE], tile.sine[pair, start : start + AT_ONCE]
            real, imaginary = both[d], both[d + 1]
            to, other = space.key[d, start : start + AT_ONCE], space.key[d + 1, start : start + AT_ONCE]
            of_real, of_imaginary = bias[d], bias[d + 1]
            for c in range(AT_ONCE):
                a, b = real[c] + of_real, imaginary[c] + of_imaginary
                to[c] = a * cosine[c] - b * sine[c]
                other[c] = a * sine[c] + b * cosine[c]
        for c in range(AT_ONCE):
            row = space.value[start + c]
            for head in range(heads):
                for w in range(width):
                    d = dims + head * width + w
                    row[head * padded + w] = both[d, c] + bias[d]


@compiled_part
def _make_queries(network, tile, layer, space, count):
    """Fill ``count`` rows of ``space.query``."""
    dims, query, bias = len(network.head), space.query, network.query_bias[layer]
    width = dims // network.heads
    product(query, space.normal, network.query[layer], count, query.shape[1])
    for n in range(count):
        row, site = query[n], space.wanted[n]
        for d in range(0, dims, 2):
            cosine, sine = tile.cosine[d % width // 2, site], tile.sine[d % width // 2, site]
            a, b = row[d] + bias[d], row[d + 1] + bias[d + 1]
            row[d] = a * cosine - b * sine
            row[d + 1] = a * sine + b * cosine


@compiled_part
def _attend(network, space, count, sites):
    """Attention of ``count`` queries over all ``sites``: fill rows of ``space.mixed``."""
    heads, query, score, mixed = network.heads, space.query, space.score, space.mixed
    width, padded = len(network.head) // heads, mixed.shape[1] // heads
    for head in range(heads):
        of_head, at = head * width, head * padded
        for n in range(0, count, ROWS):
            for c in range(0, sites, COLUMNS):
                multiply(score, query, space.key, (0, c, n, of_head, of_head, c), width)
            for m in range(ROWS):
                row = score[m, :sites]
                highest, total = row[0], np.float32(0)
                for site in range(sites):
                    highest = max(highest, row[site])
                for site in range(sites):
                    row[site] = power_of_two(row[site] - highest)
                    total += row[site]
                space.spread[m] = quotient(_ONE, total)
            for column in range(at, at + padded, COLUMNS):
                multiply(mixed, score, space.value, (n, column, 0, 0, 0, column), sites)
            for m in range(ROWS):
                row, factor = mixed[n + m], space.spread[m]
                for column in range(at, at + padded):
                    row[column] *= factor


@compiled_part
def run_block(network, tile, layer, space, count, sites):
    """One block of the transformer for the first ``count`` sites in ``space.wanted``, whose states are ``space.own``.

    Keys and values are those of all ``sites``.
    """
    norm, own, normal, made = network.norms[layer], space.own, space.normal, space.query
    normalise_rows(own, normal, count, norm[0], norm[1])
    _make_queries(network, tile, layer, space, count)
    _attend(network, space, count, sites)
    product(made, space.mixed, network.out[layer], count, made.shape[1])
    _add_rows(own, made, count, network.out_bias[layer])
    normalise_rows(own, normal, count, norm[2], norm[3])
    wide, bias = space.wide, network.wider_bias[layer]
    product(wide, normal, network.wider[layer], count, wide.shape[1])
    for n in range(count):
        row = wide[n]
        for d in range(len(bias)):
            row[d] = gelu(row[d] + bias[d])
    product(made, wide, network.narrower[layer], count, made.shape[1])
    _add_rows(own, made, count, network.narrower_bias[layer])
