"""CPU loops that list where distinct allele sequences carry the minor allele."""

from __future__ import annotations

import numba
import numpy as np

from embrag_ds.ops.threads import ParallelLoop


@ParallelLoop
def count_minor(words, count, flip, base, size):
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
def list_minor(words, count, flip, bounds, base, start, sites):
    """List those sites, counted from the block's first: fill ``sites`` uint8 from ``start`` int64 on."""
    for g in numba.prange(len(count)):
        for n in range(count[g]):
            word, place = words[g, n] ^ flip[g], start[base[g] + n]
            for site in range(bounds[g + 1] - bounds[g]):
                if (word >> np.uint64(site)) & np.uint64(1):
                    sites[place] = site
                    place += 1
