"""Arrays that a worker of the loop along a stretch makes once for all its target haplotypes."""

from __future__ import annotations

import numpy as np

from embrag_ds.copying.head import AT_ONCE
from embrag_ds.copying.parts import making_part
from embrag_ds.copying.records import Chosen, Kept, Scratch, States, Waiting
from embrag_ds.copying.recursions import PIECE
from embrag_ds.model.numbers import CONFIDENCE_FEATURES

_SITES = 64


@making_part
def new_states(typed, haplotypes, places, several):
    """States for so many typed sites, haplotypes and places; ``several`` pieces make a section."""
    pieces = (typed + PIECE - 1) // PIECE
    return States(
        prior=np.empty((places, haplotypes), dtype=np.float32),
        running=np.empty(haplotypes, dtype=np.float32),
        bits=np.empty(haplotypes, dtype=np.int32),
        joint=np.empty((2, haplotypes), dtype=np.float32),
        sections=np.empty(((pieces + several - 1) // several, 2, haplotypes), dtype=np.float32),
        saved=np.empty((several, 2, haplotypes), dtype=np.float32),
        beta=np.zeros((2, haplotypes), dtype=np.float32),
        other=np.zeros((2, haplotypes), dtype=np.float32),
        differs=np.empty((pieces, haplotypes), dtype=np.uint8),
        before=np.empty((pieces, haplotypes), dtype=np.uint16),
        came=np.zeros((typed, 2), dtype=np.float32),
        scale=np.zeros((typed, 2), dtype=np.float32),
        total=np.zeros((typed, 2), dtype=np.float32),
        went=np.zeros((typed, 2), dtype=np.float32),
        left=np.zeros((typed, 2), dtype=np.float32),
        next=np.ones((typed, 2), dtype=np.float32),
        paths=np.zeros((typed, 2), dtype=np.float32),
        jump=np.empty(2, dtype=np.float32),
    )


@making_part
def new_chosen(haplotypes):
    """Arrays of the haplotypes that can matter in a piece."""
    return Chosen(
        flags=np.zeros((haplotypes + 63) // 64 * 64, dtype=np.uint8),
        who=np.empty(haplotypes + 8, dtype=np.int32),
        least=np.empty(2, dtype=np.float32),
        bound=np.empty((2, 4), dtype=np.float32),
        steps=np.empty((2, PIECE)),
        came=np.empty((2, haplotypes), dtype=np.float32),
        behind=np.empty((2, haplotypes), dtype=np.float32),
        differs=np.empty(haplotypes, dtype=np.uint8),
        prior=np.empty((PIECE, haplotypes), dtype=np.float32),
        row=np.empty(PIECE, dtype=np.int64),
        begin=np.empty((PIECE + 1, haplotypes), dtype=np.float32),
        end=np.empty(haplotypes, dtype=np.float32),
        next=np.empty(haplotypes, dtype=np.uint16),
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
        length=np.zeros(2, dtype=np.float32),
        uncertainty=np.zeros(2, dtype=np.float32),
        ancestry=np.zeros((2, populations), dtype=np.float32),
        some=np.zeros(padded, dtype=np.uint8),
        either=np.empty(haplotypes + 8, dtype=np.int32),
        both=np.zeros((haplotypes, 8), dtype=np.float32),
        moved=np.empty(haplotypes + 8, dtype=np.int32),
        moved_rows=np.zeros((haplotypes, 3), dtype=np.float32),
        where=np.empty(haplotypes, dtype=np.int32),
        number_moved=np.zeros(1, dtype=np.int64),
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
        number=np.zeros(1, dtype=np.int64),
        sites=np.zeros(AT_ONCE, dtype=np.int64),
        to_ref=np.zeros(AT_ONCE, dtype=np.bool_),
        odds=np.ones(AT_ONCE, dtype=np.float32),
        features=np.ones((CONFIDENCE_FEATURES, AT_ONCE), dtype=np.float32),
        first=np.zeros((width, AT_ONCE), dtype=np.float32),
        second=np.ones(AT_ONCE, dtype=np.float32),
        total=np.ones(AT_ONCE, dtype=np.float32),
    )
