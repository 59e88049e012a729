"""Stretches: what a panel and the targets' typed sites give to the loop along a chromosome, made once for all."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numba
import numpy as np

from embrag_ds.copying.model import log_cm
from embrag_ds.copying.records import PanelPart
from embrag_ds.copying.recursions import PATTERNS
from embrag_ds.data.windows import most_places, places
from embrag_ds.ops.dosage_numba import Numbered
from embrag_ds.ops.threads import ParallelLoop

MOST_STRETCH_BYTES = 1 << 28
"""Memory of the sequences of a stretch's core, and of the targets' dosages in it."""
_BYTES_OF_A_SEQUENCE = 12
_SITES_OF_A_BLOCK = 64


def most_stretch_sites(typed: float, haplotypes: int) -> int:
    """Sites of a core whose sequences take :data:`MOST_STRETCH_BYTES`.

    There is one for each of the ``haplotypes`` and block of sites. ``typed`` is the share of typed sites, each of which
    begins a block.
    """
    blocks = 1 / _SITES_OF_A_BLOCK + typed
    return int(MOST_STRETCH_BYTES / (_BYTES_OF_A_SEQUENCE * blocks * haplotypes))


def panel_part(
    core: Callable[[slice], np.ndarray],
    typed: np.ndarray,
    rows: np.ndarray,
    position: np.ndarray,
    first: int,
    common: np.ndarray,
    population: np.ndarray,
) -> PanelPart:
    """A panel's part of a stretch.

    ``core`` gives packed alleles uint8 [n, ceil(H / 8)] of some sites of the core, which begins at the stretch's site
    ``first``. ``typed`` uint8 [T, H] are those of the typed sites ``rows`` int64 [T] of the stretch. ``position``
    float32 [sites] is in cM, ``common`` bool [L] marks sites whose ALT has a frequency above a half, and ``population``
    is int64 [H].
    """
    sites, haplotypes = len(common), typed.shape[1]
    cuts = rows[(rows >= first) & (rows < first + sites - 1)] + 1 - first
    blocks = Numbered.made(core, sites, haplotypes, cuts)
    intervals = np.searchsorted(np.searchsorted(rows, first + blocks.bounds[:-1]), np.arange(len(rows) + 2))
    turned = np.array(
        [
            (common[start:stop].astype(np.uint64) << np.arange(stop - start, dtype=np.uint64)).sum(dtype=np.uint64)
            for start, stop in pairwise(blocks.bounds)
        ],
        dtype=np.uint64,
    )
    sequences = np.concatenate([[0], np.cumsum(blocks.count)])
    start = np.zeros(sequences[-1] + 1, dtype=np.int64)
    _count_minor(blocks.words, blocks.count, turned, sequences, start[1:])
    start = start.cumsum()
    minor = np.empty(start[-1], dtype=np.uint8)
    _list_minor(blocks.words, blocks.count, turned, blocks.bounds, sequences, start, minor)
    packed = np.ascontiguousarray(np.packbits(typed, axis=0, bitorder="little"))  # or the loop is compiled twice
    patterns = np.zeros((len(packed), PATTERNS), dtype=np.uint8)
    pattern_count = np.zeros(len(packed), dtype=np.int64)
    for row, alleles in enumerate(packed):
        present = np.flatnonzero(np.bincount(alleles, minlength=PATTERNS))
        patterns[row, : len(present)], pattern_count[row] = present, len(present)
    left, right = flanking(rows, first, sites)
    here, before = position[first : first + sites], position[rows[left]]
    after = position[rows[right]]
    gap = after - before
    nearest = np.minimum(np.abs(here - before), np.abs(after - here))
    share = np.where(gap > 0, (here - before) / np.maximum(gap, 1e-12), 0).clip(0, 1).astype(np.float32)
    return PanelPart(
        packed=packed,
        turned=turned_words(packed),
        patterns=patterns,
        pattern_count=pattern_count,
        position=position[rows],
        place=places(position, most_places(haplotypes))[0][rows],
        population=population,
        intervals=intervals,
        bounds=blocks.bounds,
        # Half the memory to read where it is enough, which it nearly always is.
        sequence=blocks.sequence.astype(np.uint16) if blocks.count.max() <= 1 << 16 else blocks.sequence,
        sequences=sequences,
        most_sequences=int(blocks.count.max()),
        minor_start=start,
        minor_sites=minor,
        share=share,
        minor_is_ref=common,
        nearest=log_cm(nearest),
        gap=log_cm(np.abs(gap)),
    )


def turned_words(packed: np.ndarray) -> np.ndarray:
    """Typed alleles by haplotype, uint64 [H, ceil(T / 64)], from ``packed`` uint8 [ceil(T / 8), H].

    That of site t is bit t % 64 of word t // 64.
    """
    padded = np.zeros((packed.shape[1], (len(packed) + 7) // 8 * 8), dtype=np.uint8)
    padded[:, : len(packed)] = packed.T
    return padded.view(np.uint64)


def flanking(rows: np.ndarray, first: int, sites: int) -> tuple[np.ndarray, np.ndarray]:
    """Typed sites that flank each site of a core, both int64 [L]; beyond the outermost, both are that one."""
    right = np.searchsorted(rows, np.arange(first, first + sites))
    last = len(rows) - 1
    return np.minimum(np.maximum(right - 1, 0), last), np.minimum(right, last)


@ParallelLoop
def _count_minor(words, count, flip, base, size):
    """Number of sites where each sequence carries the minor allele: fill ``size`` int64 [all sequences].

    ``words`` uint64 [G, H] and ``count`` int64 [G] are those of :class:`embrag_ds.ops.dosage.Numbered`; ``flip``
    uint64 [G] marks the sites whose minor allele is REF, and ``base`` int64 [G + 1] counts the sequences of the blocks
    before.
    """
    for g in numba.prange(len(count)):
        for n in range(count[g]):
            word = words[g, n] ^ flip[g]
            ones = 0
            while word:
                word &= word - np.uint64(1)
                ones += 1
            size[base[g] + n] = ones


@ParallelLoop
def _list_minor(words, count, flip, bounds, base, start, sites):
    """List those sites, counted from the block's first: fill ``sites`` uint8 from ``start`` int64 on."""
    for g in numba.prange(len(count)):
        for n in range(count[g]):
            word, place = words[g, n] ^ flip[g], start[base[g] + n]
            for site in range(bounds[g + 1] - bounds[g]):
                if (word >> np.uint64(site)) & np.uint64(1):
                    sites[place] = site
                    place += 1
