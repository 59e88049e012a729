"""Arrays that a worker of the loop along a stretch makes once for all its target haplotypes."""

from __future__ import annotations

import numpy as np

from embrag_ds.compiled.parts import compiled_part, making_part
from embrag_ds.copying.head import AT_ONCE
from embrag_ds.copying.instructions import LANES
from embrag_ds.copying.records import Chosen, Found, Kept, Scratch, States, Waiting
from embrag_ds.copying.recursions import PATTERNS, PIECE
from embrag_ds.model.numbers import CONFIDENCE_FEATURES

_SITES = 64


@making_part
def new_states(typed, haplotypes, places, several):
    """States for so many typed sites, haplotypes and places; ``several`` pieces make a section."""
    pieces = (typed + PIECE - 1) // PIECE
    return States(
        prior=np.full((places, haplotypes, LANES), np.float32(1 / haplotypes)),
        highest=np.empty((haplotypes, LANES), dtype=np.float32),
        running=np.empty(haplotypes, dtype=np.float32),
        bits=np.empty(haplotypes, dtype=np.int32),
        sections=np.empty(((pieces + several - 1) // several, haplotypes, 2 * LANES), dtype=np.float32),
        saved=np.empty((several + 1, haplotypes, 2 * LANES), dtype=np.float32),
        between=np.empty((haplotypes, 2 * LANES), dtype=np.float32),
        joint=np.empty((haplotypes, 2 * LANES), dtype=np.float32),
        behind=np.empty((2, haplotypes, 2 * LANES), dtype=np.float32),
        own=np.zeros((LANES, (pieces + 7) // 8 * 8), dtype=np.uint8),  # whole words
        known=np.zeros((LANES, (pieces + 7) // 8 * 8), dtype=np.uint8),  # whole words
        came=np.zeros((typed, 2 * LANES), dtype=np.float32),
        scale=np.zeros((typed, 2 * LANES), dtype=np.float32),
        total=np.zeros((typed, 2 * LANES), dtype=np.float32),
        went=np.zeros((typed, 2 * LANES), dtype=np.float32),
        left=np.zeros((typed, 2 * LANES), dtype=np.float32),
        next=np.ones((typed, 2 * LANES), dtype=np.float32),
        paths=np.zeros((typed, 2 * LANES), dtype=np.float32),
        forward_sums=np.zeros((2 * PATTERNS, 2 * LANES), dtype=np.float32),
        forward_priors=np.zeros((2 * PATTERNS, LANES), dtype=np.float32),
        backward_sums=np.zeros((2 * PATTERNS, 2 * LANES), dtype=np.float32),
        backward_priors=np.zeros((2 * PATTERNS, LANES), dtype=np.float32),
        factors=np.zeros((PATTERNS, 4 * LANES), dtype=np.float32),
        by_state=np.zeros((2 * LANES, PATTERNS), dtype=np.float32),
        by_prior=np.zeros((LANES, PATTERNS), dtype=np.float32),
        gain=np.zeros((2 * LANES, PATTERNS), dtype=np.float32),
        added=np.zeros((2 * LANES, PATTERNS), dtype=np.float32),
        mask=np.zeros((LANES, PATTERNS), dtype=np.uint8),
    )


@making_part
def new_chosen(haplotypes):
    """Arrays of the haplotypes that can matter in a piece."""
    return Chosen(
        flags=np.zeros((haplotypes + 63) // 64 * 64, dtype=np.uint8),
        who=np.empty(haplotypes + 8, dtype=np.int32),
        least=np.empty((LANES, 2), dtype=np.float32),
        limit=np.empty((1, 2 * LANES), dtype=np.float32),
        bounds=np.zeros((PATTERNS, 4 * 2 * LANES), dtype=np.float32),
        steps=np.zeros((2, PIECE, PATTERNS), dtype=np.float32),
        ends=np.zeros((2, PATTERNS), dtype=np.float32),
        most=np.zeros((4, PATTERNS), dtype=np.float32),
        came=np.empty((2, haplotypes), dtype=np.float32),
        behind=np.empty((2, haplotypes), dtype=np.float32),
        differs=np.empty(haplotypes, dtype=np.uint8),
        prior=np.empty((PIECE, haplotypes), dtype=np.float32),
        row=np.empty(PIECE, dtype=np.int64),
        begin=np.empty((PIECE + 1, haplotypes), dtype=np.float32),
        end=np.empty(haplotypes, dtype=np.float32),
        before=np.empty((LANES, haplotypes), dtype=np.uint16),
        after=np.empty((LANES, haplotypes), dtype=np.uint16),
        seen=np.empty((LANES, haplotypes), dtype=np.uint16),
        joint=np.empty((PIECE, 2, haplotypes), dtype=np.float32),
        squares=np.empty((PIECE, 2), dtype=np.float32),
    )


@making_part
def new_kept(haplotypes, populations):
    """Arrays of what is kept at two typed sites; nothing is at first."""
    padded = (haplotypes + 63) // 64 * 64
    return Kept(
        flags=np.zeros((2, padded), dtype=np.uint8),
        shares=np.zeros((2, haplotypes), dtype=np.float32),
        fasts=np.zeros((2, haplotypes), dtype=np.float32),
        lengths=np.zeros((2, haplotypes), dtype=np.float32),
        length=np.zeros((LANES, 2), dtype=np.float32),
        root=np.zeros((LANES, 2), dtype=np.float32),
        uncertainty=np.zeros((LANES, 2), dtype=np.float32),
        ancestry=np.zeros((LANES, 2, populations), dtype=np.float32),
        some=np.zeros(padded, dtype=np.uint8),
        either=np.empty(haplotypes + 8, dtype=np.int32),
        both=np.zeros((haplotypes, 8), dtype=np.float32),
        moved=np.empty((LANES, haplotypes + 8), dtype=np.int32),
        moved_rows=np.zeros((LANES, haplotypes, 3), dtype=np.float32),
        where=np.empty(haplotypes, dtype=np.int32),
        number_moved=np.zeros((LANES, 1), dtype=np.int64),
    )


@compiled_part
def kept_of(kept, lane):
    """What is kept of one target: the arrays with lanes are its own, and scratch is shared."""
    return Kept(
        flags=kept.flags,
        shares=kept.shares,
        fasts=kept.fasts,
        lengths=kept.lengths,
        length=kept.length[lane],
        root=kept.root[lane],
        uncertainty=kept.uncertainty[lane],
        ancestry=kept.ancestry[lane],
        some=kept.some,
        either=kept.either,
        both=kept.both,
        moved=kept.moved[lane],
        moved_rows=kept.moved_rows[lane],
        where=kept.where,
        number_moved=kept.number_moved[lane],
    )


@making_part
def new_scratch(sequences):
    """Arrays for the sites of a block with at most so many sequences."""
    return Scratch(
        sums=np.zeros((2 * sequences, 8), dtype=np.float32),
        marked=np.zeros(sequences, dtype=np.uint8),
        touched=np.zeros(sequences + 1, dtype=np.int64),
        by_site=np.zeros((_SITES, 8), dtype=np.float32),
        pending=np.zeros(_SITES, dtype=np.uint8),
        expected=np.zeros(_SITES, dtype=np.float32),
    )


@making_part
def new_waiting(width):
    """Arrays of the sites that wait for a confidence head of this width."""
    return Waiting(
        number=np.zeros((LANES, 1), dtype=np.int64),
        sites=np.zeros((LANES, AT_ONCE), dtype=np.int64),
        to_ref=np.zeros((LANES, AT_ONCE), dtype=np.bool_),
        odds=np.ones((LANES, AT_ONCE), dtype=np.float32),
        features=np.ones((LANES, CONFIDENCE_FEATURES, AT_ONCE), dtype=np.float32),
        first=np.zeros((width, AT_ONCE), dtype=np.float32),
        second=np.zeros((width, AT_ONCE), dtype=np.float32),
        total=np.ones(AT_ONCE, dtype=np.float32),
    )


@compiled_part
def waiting_of(waiting, lane):
    """Sites of one target that wait: the arrays with lanes are its own, and scratch is shared."""
    return Waiting(
        number=waiting.number[lane],
        sites=waiting.sites[lane],
        to_ref=waiting.to_ref[lane],
        odds=waiting.odds[lane],
        features=waiting.features[lane],
        first=waiting.first,
        second=waiting.second,
        total=waiting.total,
    )


@compiled_part
def found_of(found, target):
    """What is found of one target haplotype."""
    return Found(
        probability=found.probability[target],
        copied=found.copied[target],
        noted=found.noted,
        number=found.number[target],
        sites=found.sites[target],
        to_ref=found.to_ref[target],
        features=found.features[target],
    )
