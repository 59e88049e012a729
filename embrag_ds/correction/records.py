"""Records that the loop over tiles reads (:mod:`embrag_ds.correction.loops`).

Letters beside those of :mod:`embrag_ds.data.tokens`: D dims, E layers, F width of the feed-forward layer, M heads, W
width of a head, R rows of frequencies. A letter with a stroke is rounded up, to a multiple of 16 and L' to one of 64,
by zeros. T typed sites are those of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class NetworkPart(NamedTuple):
    """A network's weights from the embedding on, float32. Products with a state on the left have transposed weights.

    * ``sites`` [7 D, 77]: from a site's features to the embedding of a masked query (D rows), that of REF in the panel
      and what ALT adds to it (2 D), gate and mixture of those two (2 D), and what ALT adds to them (2 D).
    * ``typed`` [6 D, 77]: from a site's features to what REF (3 D) and ALT (3 D) of the query add to its embedding (D)
      and to gate and mixture (2 D).
    * ``overall``, ``expected`` [2 D, 26]: from features of the overall and the expected frequency to gate and mixture.
    * ``norms`` [E + 1, 4, D]: gain and bias of two norms: that of the fusion and the last one in the last row, those
      before attention and feed-forward layer in the others.
    * ``keys`` [E, 2 D, D], ``keys_bias`` [E, 2 D]: to keys and values. ``query`` [E, D, D'], ``query_bias`` [E, D']:
      to queries, such that 2 to the power of their products with keys is the attention.
    * ``out`` [E, M W', D'], ``out_bias`` [E, D]: behind attention. ``wider`` [E, D, F'], ``wider_bias`` [E, F'],
      ``narrower`` [E, F', D'], ``narrower_bias`` [E, D]: the feed-forward layer.
    * ``head`` [D], ``head_bias``: to the correction.
    * ``heads``: M. ``background``: weight of the expected frequency in the prior. ``least``: odds of the minor allele
      below which nothing is corrected.
    """

    sites: np.ndarray
    typed: np.ndarray
    overall: np.ndarray
    expected: np.ndarray
    norms: np.ndarray
    keys: np.ndarray
    keys_bias: np.ndarray
    query: np.ndarray
    query_bias: np.ndarray
    out: np.ndarray
    out_bias: np.ndarray
    wider: np.ndarray
    wider_bias: np.ndarray
    narrower: np.ndarray
    narrower_bias: np.ndarray
    head: np.ndarray
    head_bias: np.float32
    heads: int
    background: np.float32
    least: np.float32


class TilePart(NamedTuple):
    """What all haplotypes share in a tile, float32.

    * ``features`` [77, L']: of its sites: 1, those of the panel's frequency (26), of the minor allele's (26), and of
      the position (24). ``of_typed`` [77, T']: the same of typed sites.
    * ``of_rows`` [R, 26, L']: features of the overall frequencies.
    * ``cosine``, ``sine`` [W / 2, L']: of the rotary positions.
    * ``frequency``, ``turing`` [R, L]: overall frequency of ALT, and the factor of its prior odds.
    * ``typed`` int64 [T]: typed sites, counted from the tile's first.
    * ``start``: the tile's first site in the core. ``first``, ``last``: sites that it is for, counted from there.
    """

    features: np.ndarray
    of_typed: np.ndarray
    of_rows: np.ndarray
    cosine: np.ndarray
    sine: np.ndarray
    frequency: np.ndarray
    turing: np.ndarray
    typed: np.ndarray
    start: int
    first: int
    last: int


class Space(NamedTuple):
    """A worker's arrays for a tile, float32 as far as not said.

    * Products of features: ``sites`` [7 D, L'], ``typed`` [6 D, T'], and ``of_frequency`` [2 D, L'], that of the row of
      overall frequencies ``row`` int64 [1].
    * Of 64 sites of a haplotype: ``features`` [26, 64], ``both`` [2 D, 64], ``normed`` [D, 64], ``mean``, ``spread``
      and ``share`` [64].
    * Of all: ``states`` [D, L'], ``key`` [D, L'], ``value`` [L', M W'].
    * Of n sites that are wanted, int64 [L'] ``wanted``: ``own``, ``normal``, ``query`` [L', D'], ``mixed`` [L', M W'],
      ``wide`` [L', F'].
    * Of four queries: ``score`` [4, L'].
    """

    sites: np.ndarray
    typed: np.ndarray
    of_frequency: np.ndarray
    row: np.ndarray
    features: np.ndarray
    both: np.ndarray
    normed: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    share: np.ndarray
    states: np.ndarray
    key: np.ndarray
    value: np.ndarray
    wanted: np.ndarray
    own: np.ndarray
    normal: np.ndarray
    query: np.ndarray
    mixed: np.ndarray
    wide: np.ndarray
    score: np.ndarray
