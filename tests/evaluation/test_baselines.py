"""The cheap methods against loops over haplotypes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.data.tokens import MISSING
from embrag_ds.evaluation.baselines import allele_frequency_dosage, nearest_haplotype_dosage


def slow_nearest(panel, target, typed_index, block: int, context: int) -> np.ndarray:
    sites, people = len(panel), target.shape[1] // 2
    typed = len(typed_index)
    dosage = np.zeros((sites, people))
    for site in range(sites):
        number = 0
        while (number + 1) * block < typed:
            left, right = typed_index[(number + 1) * block - 1], typed_index[(number + 1) * block]
            if site < (left + right) / 2:
                break
            number += 1
        compared = [t for t in range(number * block - context, (number + 1) * block + context) if 0 <= t < typed]
        for haplotype in range(2 * people):
            best, best_distance = 0, None
            for reference in range(panel.shape[1]):
                distance = sum(
                    target[t, haplotype] != MISSING and target[t, haplotype] != panel[typed_index[t], reference]
                    for t in compared
                )
                if best_distance is None or distance < best_distance:
                    best, best_distance = reference, distance
            dosage[site, haplotype // 2] += panel[site, best]
    return dosage


@given(st.integers(0, 2**32 - 1), st.integers(0, 14), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_nearest_haplotype_matches_the_slow_loop(seed: int, typed: int, block: int, context: int) -> None:
    rng = np.random.default_rng(seed)
    panel = rng.integers(0, 2, (25, 9), dtype=np.uint8)
    typed_index = np.sort(rng.choice(25, typed, replace=False))
    target = rng.choice(np.array([0, 1, MISSING], dtype=np.uint8), size=(typed, 4), p=[0.45, 0.45, 0.1])
    fast = nearest_haplotype_dosage(panel, target, typed_index, block=block, context=context)
    np.testing.assert_array_equal(fast, slow_nearest(panel, target, typed_index, block, context))


def test_nearest_haplotype_copies_a_mosaic_exactly() -> None:
    rng = np.random.default_rng(0)
    panel = rng.integers(0, 2, (640, 50), dtype=np.uint8)
    typed_index = np.arange(5, 640, 10)
    truth = panel[:, [3, 8]].copy()
    truth[320:, 0] = panel[320:, 30]  # a switch where the two blocks of 32 meet
    dosage = nearest_haplotype_dosage(panel, truth[typed_index], typed_index, block=32, context=4)
    np.testing.assert_array_equal(dosage[:, 0], truth.sum(axis=1))


def test_ties_go_to_the_lowest_index() -> None:
    panel = np.array([[0, 0, 0], [1, 0, 1]], dtype=np.uint8)
    dosage = nearest_haplotype_dosage(panel, np.zeros((1, 2), dtype=np.uint8), np.array([0]))
    np.testing.assert_array_equal(dosage, [[0.0], [2.0]])


def test_allele_frequency_dosage() -> None:
    np.testing.assert_allclose(allele_frequency_dosage(np.array([0.25, 1.0]), 3), [[0.5] * 3, [2.0] * 3])
