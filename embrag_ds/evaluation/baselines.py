"""Baselines: two cheap imputation methods that any model must beat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from embrag_ds.data.panel import Panel
from embrag_ds.data.tokens import ALT, REF

_SCORES = 1 << 24


def allele_frequency_dosage(panel_af: np.ndarray, samples: int) -> np.ndarray:
    """Baseline that ignores the samples: twice the panel's ALT frequency [n] as dosage of each, float32 [n, N]."""
    return np.repeat(2.0 * np.asarray(panel_af, dtype=np.float32)[:, None], samples, axis=1)


class NearestHaplotype:
    """Baseline that copies the nearest panel haplotype, stretch by stretch along a contig.

    A block of ``block`` consecutive typed sites has a stretch of sites around it. Stretches of neighbouring blocks meet
    half way, by site index, between the last typed site of one and the first of the next. At all sites of a stretch,
    each target haplotype copies the panel haplotype with the least Hamming distance. The distance counts the typed
    sites of the block and ``context`` more on either side; the lowest index wins ties.

    ``typed_index`` int64 [T] are the typed rows of the panel, increasing. ``typed_alleles`` returns the target's
    alleles at a slice of the T typed sites, uint8 [T, 2N]; missing alleles are ignored.

    Memory: at most 64 MB of distances, the panel at one block's typed sites, and the dosages that are returned.
    """

    def __init__(
        self,
        panel: Panel,
        typed_index: np.ndarray,
        typed_alleles: Callable[[slice], np.ndarray],
        block: int = 32,
        context: int = 16,
    ) -> None:
        self._panel = panel
        self._typed_index = typed_index
        self._typed_alleles = typed_alleles
        self._begin: list[int] = []
        self._compared: list[slice] = []
        for start, stop in panel.sites.contig_runs():
            low, high = np.searchsorted(typed_index, [start, stop]).tolist()
            # A contig without a typed site is one stretch, where all haplotypes are equally near.
            for first in range(low, max(high, low + 1), block):
                before = first > low
                self._begin.append(int(typed_index[first - 1] + typed_index[first] + 1) // 2 if before else start)
                self._compared.append(slice(max(first - context, low), min(first + block + context, high)))
        self._samples = typed_alleles(slice(0, 0)).shape[1] // 2
        self._latest = (-1, np.empty(0, dtype=np.int64))

    def dosage(self, rows: np.ndarray) -> np.ndarray:
        """ALT dosage at panel rows int64 [n], float32 [n, N]; fastest if rows increase from call to call."""
        stretch_of = np.searchsorted(self._begin, rows, side="right") - 1
        dosage = np.empty((len(rows), self._samples), dtype=np.float32)
        for stretch in np.unique(stretch_of).tolist():
            here = stretch_of == stretch
            copied = self._panel.alleles_at(rows[here], self._nearest(stretch))
            dosage[here] = copied[:, 0::2].astype(np.float32) + copied[:, 1::2]
        return dosage

    def _nearest(self, stretch: int) -> np.ndarray:
        """Nearest panel haplotype of every target haplotype in a stretch, int64 [2N]."""
        if self._latest[0] != stretch:
            compared = self._compared[stretch]
            panel_signs = _signs(self._panel.alleles_at(self._typed_index[compared]))
            target_signs = _signs(self._typed_alleles(compared)).T
            at_once = max(1, _SCORES // panel_signs.shape[1])
            # A sum of +-1 over the compared sites: exact in float32, larger where fewer alleles differ.
            nearest = [
                (target_signs[first : first + at_once] @ panel_signs).argmax(axis=1)
                for first in range(0, len(target_signs), at_once)
            ]
            self._latest = stretch, np.concatenate(nearest)
        return self._latest[1]


def _signs(alleles: np.ndarray) -> np.ndarray:
    """Alleles as float32: REF is -1, ALT is 1 and anything else is 0."""
    return (alleles == ALT).astype(np.float32) - (alleles == REF).astype(np.float32)
