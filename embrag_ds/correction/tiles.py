"""The correction of dosages that were copied along a stretch, tile by tile."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from embrag_ds.copying.along import Copied, Stretch
from embrag_ds.copying.model import frequency_features
from embrag_ds.correction import loops
from embrag_ds.correction.layers import AT_ONCE
from embrag_ds.correction.network import position_features, rotary_angles, site_features, widened
from embrag_ds.correction.records import NetworkPart, TilePart
from embrag_ds.data.windows import DataConfig, WindowedPanel, cut_tiles
from embrag_ds.ops.threads import thread_count


class TransformerTiles:
    """The correction by a model's transformer, added to dosages that were copied without it.

    Tiles are the windows that the model was trained on, by its settings ``data``.
    """

    def __init__(self, network: NetworkPart, data: DataConfig):
        self._network = network
        self._sites, self._overlap = data.window_sites, data.overlap_sites
        self._workers = thread_count()

    def add_along(
        self,
        probability: np.ndarray,
        copied: Copied,
        stretch: Stretch,
        data: WindowedPanel,
        alleles: np.ndarray,
        watch: Callable[[int], Callable[[int], None]],
    ) -> None:
        """Correct ``probability`` float32 [2N, L] in the core of a ``stretch`` of ``data``, as :meth:`add` does.

        ``alleles`` uint8 [2N, T] are those of the targets at the stretch's typed sites.
        """
        features, window = data.features(stretch.number), data.windows[stretch.number]
        rows = stretch.rows - (window.core_start - window.start)
        inside = (rows >= 0) & (rows < probability.shape[1])
        position, frequency = features.position[window.core], features.frequency[window.core]
        self.add(probability, copied, position, frequency, rows[inside], alleles[:, inside], watch)

    def add(
        self,
        probability: np.ndarray,
        copied: Copied,
        position: np.ndarray,
        site_frequency: np.ndarray,
        typed: np.ndarray,
        alleles: np.ndarray,
        watch: Callable[[int], Callable[[int], None]],
    ) -> None:
        """Correct ``probability`` float32 [2N, L] of ALT in place, in a core with sites of these features float32 [L].

        ``alleles`` uint8 [2N, t] are those at the core's sites ``typed`` int64 [t], MASK where missing. For the number
        of sites that a tile is for, ``watch`` gives a function that is told several times a second how many haplotypes
        are begun there.
        """
        width = len(self._network.head) // self._network.heads
        for start, stop, first, last in cut_tiles(len(position), self._sites, self._overlap):
            sites, inside = slice(start, stop), slice(*np.searchsorted(typed, [start, stop]))
            places = position[sites] - (position[start] + position[stop - 1]) / 2
            angles = rotary_angles(places, width)
            features = np.concatenate([site_features(site_frequency[sites]), position_features(places)])
            frequency, typed_here = copied.frequency[:, sites], typed[inside] - start
            tile = TilePart(
                features=widened(features, AT_ONCE),
                of_typed=widened(features[:, typed_here]),
                of_rows=widened(np.stack([frequency_features(each).T for each in frequency]), AT_ONCE),
                cosine=widened(np.cos(angles), AT_ONCE),
                sine=widened(np.sin(angles), AT_ONCE),
                frequency=np.ascontiguousarray(frequency),
                turing=np.exp(np.ascontiguousarray(copied.good_turing[:, sites])),
                typed=typed_here,
                start=start,
                first=first - start,
                last=last - start,
            )
            tokens = np.ascontiguousarray(alleles[:, inside])
            given = tuple(self._network), tuple(tile), tokens, copied.row_of, copied.values, probability
            count = watch(last - first)
            loops.correct_tile(min(self._workers, len(tokens)), *given, watch=count)
            count(len(tokens))
