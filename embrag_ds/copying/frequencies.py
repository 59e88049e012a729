"""Allele frequencies without a target's own alleles, for targets that are in the panel too.

The same as :mod:`embrag_ds.retrieval.frequency`, which says why, on arrays.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from embrag_ds.data.panel import FEW, RARE


class FrequenciesWithout(NamedTuple):
    """ALT frequencies for each target: ``overall`` float32 [N, L] and by ``population`` float32 [N, P, L].

    ``minor_allele_count`` float32 [N, L] is that of the haplotypes that are not excluded.
    """

    overall: np.ndarray
    population: np.ndarray
    minor_allele_count: np.ndarray


def frequencies_without(
    excluded: np.ndarray,
    alleles: np.ndarray,
    population_of: np.ndarray,
    counted: np.ndarray,
    counts: np.ndarray,
    sizes: np.ndarray,
) -> FrequenciesWithout:
    """ALT frequencies in the reference set, those of rare alleles without the haplotypes ``excluded`` int64 [N, E].

    ``excluded`` are rows of ``alleles`` uint8 [n, L], padded with n. ``population_of`` int64 [n] is theirs, and
    ``counted`` float32 [n, L] is 1 where one counts, else 0; ``counts`` float32 [P, L] of ALT and ``sizes`` float32
    [P, L], in haplotypes, are those of the reference set's populations. ``counted`` and ``sizes`` have one column where
    all sites are alike. A population with no haplotype left gets the overall frequency.
    """
    taken = np.zeros((len(excluded), *counts.shape), dtype=np.float32)
    left = np.repeat(sizes[None], len(excluded), axis=0)
    for row, barred in enumerate(excluded):
        for each in barred[barred < len(alleles)]:
            taken[row, population_of[each]] += alleles[each] * counted[each]
            left[row, population_of[each]] -= counted[each]
    total, without, remaining = counts.sum(0), counts.sum(0) - taken.sum(1), left.sum(1)
    overall = _frequency(total, sizes.sum(0), without, remaining)
    each_population = _frequency(counts, sizes, counts - taken, left)
    return FrequenciesWithout(
        overall=overall,
        population=np.where(left > 0, each_population, overall[:, None]),
        minor_allele_count=np.minimum(without, remaining - without),
    )


def good_turing_correction(found: FrequenciesWithout, odds: np.ndarray) -> np.ndarray:
    """Correction float32 [N, L] of the log-odds of ALT by the panel's allele count spectrum.

    ``odds`` float32 is that of the minor allele by its count
    (:attr:`embrag_ds.data.panel.PanelSubset.good_turing_odds`).
    """
    of_minor = odds[np.minimum(found.minor_allele_count.astype(np.int64), len(odds) - 1)]
    return np.where(found.overall > 0.5, -of_minor, of_minor)


def _frequency(count: np.ndarray, size: np.ndarray, without: np.ndarray, left: np.ndarray) -> np.ndarray:
    """``without / left`` where the minor allele is rare among ``size`` haplotypes, and ``count / size`` elsewhere."""
    rare = np.minimum(count, size - count) < np.maximum(np.float32(RARE) * size, np.float32(FEW))
    one = np.float32(1)
    return np.where(rare, without / np.maximum(left, one), count / np.maximum(size, one))
