"""Compiled loops of the writer of imputed files: dosages to rows of a table of texts, and those texts joined.

n sites of N samples, whose haplotype dosages (HDS) are 2N. W: greatest length of a text, a multiple of 16.
"""

from __future__ import annotations

import math

import numpy as np

from embrag_ds.ops.threads import WorkerLoop

VALUES = 1001
"""Number of values of HDS in thousandths."""
DIPLOID = VALUES * VALUES
"""Number of pairs of them."""
_TILE = 16  # sites: their values of a haplotype are a line of the processor's caches
_CHUNK = 16


@WorkerLoop
def note_rows(workers, taken, hds, haploid, row_of, known, new, count, rows, sums, squares):
    """Find the row of each sample in a table of texts, and sum up each site.

    ``hds`` float32 [2N, n]. A pair's number is 1001 a + b for a diploid sample whose HDS are a/1000 and b/1000, and
    1001 * 1001 + a for one that is ``haploid``, bool [n, N], or [0, 0] if there is none. ``row_of`` int32 [pairs] is
    the table's row of a pair, -1 where it has none yet. Those get the rows from ``known`` on, and are listed in ``new``
    int32; ``count`` int64 [1] says how many, and is -1 where HDS lie outside [0, 1]. Fills ``rows`` int32 [n, N], and
    ``sums`` and ``squares`` float64 [n], the sums of HDS and of its square, where a haploid sample counts once.
    """
    sites, samples = rows.shape
    tile = np.empty((_TILE, 2 * samples), dtype=np.float32)
    least, most, is_number = hds[0, 0], hds[0, 0], True
    for first in range(0, sites, _TILE):
        several = min(_TILE, sites - first)
        for h in range(2 * samples):
            for j in range(several):
                tile[np.uint64(j), np.uint64(h)] = hds[np.uint64(h), np.uint64(first + j)]
        for j in range(several):
            values, into = tile[np.uint64(j)], rows[np.uint64(first + j)]
            total = square = 0.0
            for h in range(2 * samples):
                value = np.float64(values[h])
                total += value
                square += value * value
                least, most = min(least, values[h]), max(most, values[h])
            for s in range(samples):
                a = np.int32(np.rint(np.float64(values[2 * s]) * 1000.0))
                b = np.int32(np.rint(np.float64(values[2 * s + 1]) * 1000.0))
                into[s] = np.int32(VALUES) * a + b
            if len(haploid):
                one = haploid[first + j]
                for s in range(samples):
                    if one[s]:
                        value = np.float64(values[2 * s + 1])
                        total -= value
                        square -= value * value
                        into[s] = np.int32(DIPLOID) + np.int32(np.rint(value * 1000.0))
            sums[first + j], squares[first + j] = total, square
            is_number &= not math.isnan(total)
    number = 0 if is_number and least >= 0 and most <= 1 else -1
    for site in range(sites if number == 0 else 0):
        of_site = rows[np.uint64(site)]
        for s in range(samples):
            pair = np.uint64(of_site[s])
            row = row_of[pair]
            if row < 0:
                row = np.int32(known + number)
                row_of[pair] = row
                new[number] = of_site[s]
                number += 1
            of_site[s] = row
    count[0] = number


@WorkerLoop
def join_texts(workers, taken, rows, table, length, out, ends):
    """Join the texts of all samples, and end each site's with a newline.

    ``rows`` int32 [n, N] are those of ``table`` uint8 [rows, W], whose texts have the ``length`` uint8 [rows] and end
    in a tab. Fills ``out`` uint8, which has W bytes more than are needed, and ``ends`` int64 [n], where each site's
    text ends.
    """
    place = np.uint64(0)
    for site in range(len(rows)):
        for s in range(rows.shape[1]):
            row = np.uint64(rows[site, s])
            size, text = np.uint64(length[row]), table[row]
            # A fixed number of bytes at a time, as vectors; what is too much is overwritten by the next text.
            for first in range(np.uint64(0), size, np.uint64(_CHUNK)):
                for n in range(_CHUNK):
                    out[place + first + np.uint64(n)] = text[first + np.uint64(n)]
            place += size
        out[place - np.uint64(1)] = np.uint8(10)
        ends[site] = place
