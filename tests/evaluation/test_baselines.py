"""Baselines, compared with loops over haplotypes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.data.panel import Panel
from embrag_ds.data.tokens import MISSING
from embrag_ds.evaluation import baselines
from embrag_ds.evaluation.baselines import NearestHaplotype, allele_frequency_dosage
from embrag_ds.variants.sites import SiteTable


def nearest(
    panel: np.ndarray, target: np.ndarray, typed_index: np.ndarray, *sizes: int, contigs=()
) -> NearestHaplotype:
    """The baseline over a panel [S, H] in memory; ``contigs`` are the numbers of sites of several contigs."""
    contig = np.repeat(np.arange(len(contigs)), contigs) if contigs else np.zeros(len(panel), dtype=np.int64)
    names = [str(code + 1) for code in range(int(contig[-1]) + 1)]
    letters = ["A"] * len(panel)
    sites = SiteTable(tuple(names), (0,) * len(names), contig, np.arange(len(panel)), letters, letters, letters)
    samples = tuple(f"P{number}" for number in range(panel.shape[1] // 2))
    packed = Panel(Path("panel.vcf.gz"), sites, samples, np.packbits(panel, axis=1, bitorder="little"), {})
    return NearestHaplotype(packed, typed_index, lambda typed: target[typed], *sizes)


def nearest_haplotype_dosage(panel: np.ndarray, target: np.ndarray, typed_index: np.ndarray, *sizes: int) -> np.ndarray:
    """Dosage of the baseline at every site of the panel."""
    return nearest(panel, target, typed_index, *sizes).dosage(np.arange(len(panel)))


def slow_nearest(panel, target, typed_index, block: int, context: int) -> np.ndarray:
    sites, samples = len(panel), target.shape[1] // 2
    typed = len(typed_index)
    dosage = np.zeros((sites, samples))
    for site in range(sites):
        number = 0
        while (number + 1) * block < typed:
            left, right = typed_index[(number + 1) * block - 1], typed_index[(number + 1) * block]
            if site < (left + right) / 2:
                break
            number += 1
        compared = [t for t in range(number * block - context, (number + 1) * block + context) if 0 <= t < typed]
        for haplotype in range(2 * samples):
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
    panel = rng.integers(0, 2, (25, 10), dtype=np.uint8)
    typed_index = np.sort(rng.choice(25, typed, replace=False))
    target = rng.choice(np.array([0, 1, MISSING], dtype=np.uint8), size=(typed, 4), p=[0.45, 0.45, 0.1])
    fast = nearest_haplotype_dosage(panel, target, typed_index, block, context)
    np.testing.assert_array_equal(fast, slow_nearest(panel, target, typed_index, block, context))


def test_nearest_haplotype_copies_recombined_haplotypes_exactly() -> None:
    rng = np.random.default_rng(0)
    panel = rng.integers(0, 2, (640, 50), dtype=np.uint8)
    typed_index = np.arange(5, 640, 10)
    truth = panel[:, [3, 8]].copy()
    truth[320:, 0] = panel[320:, 30]  # a recombination where the two blocks of 32 meet
    dosage = nearest_haplotype_dosage(panel, truth[typed_index], typed_index, 32, 4)
    np.testing.assert_array_equal(dosage[:, 0], truth.sum(axis=1))


def test_ties_go_to_the_lowest_index() -> None:
    panel = np.array([[0, 0, 0, 1], [1, 0, 1, 0]], dtype=np.uint8)
    dosage = nearest_haplotype_dosage(panel, np.zeros((1, 2), dtype=np.uint8), np.array([0]))
    np.testing.assert_array_equal(dosage, [[0.0], [2.0]])


def test_allele_frequency_dosage() -> None:
    np.testing.assert_allclose(allele_frequency_dosage(np.array([0.25, 1.0]), 3), [[0.5] * 3, [2.0] * 3])


@given(st.integers(0, 2**32 - 1), st.integers(0, 14), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_contigs_are_apart_and_rows_come_in_any_blocks(seed: int, typed: int, block: int, context: int) -> None:
    rng = np.random.default_rng(seed)
    panel = rng.integers(0, 2, (25, 10), dtype=np.uint8)
    typed_index = np.sort(rng.choice(25, typed, replace=False))
    target = rng.integers(0, 2, (typed, 4), dtype=np.uint8)
    cut = int(rng.integers(1, 25))
    split = int(np.searchsorted(typed_index, cut))
    apart = [
        slow_nearest(panel[:cut], target[:split], typed_index[:split], block, context),
        slow_nearest(panel[cut:], target[split:], typed_index[split:] - cut, block, context),
    ]
    method = nearest(panel, target, typed_index, block, context, contigs=(cut, 25 - cut))
    expected = np.concatenate(apart)
    for rows in np.split(rng.permutation(25)[:20], [3, 9]):
        np.testing.assert_array_equal(method.dosage(rows), expected[rows])


def test_target_haplotypes_are_compared_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    panel, typed_index = rng.integers(0, 2, (40, 6), dtype=np.uint8), np.arange(0, 40, 3)
    target = rng.integers(0, 2, (len(typed_index), 14), dtype=np.uint8)
    whole = nearest_haplotype_dosage(panel, target, typed_index, 4, 2)
    monkeypatch.setattr(baselines, "_SCORES", 20)
    np.testing.assert_array_equal(nearest_haplotype_dosage(panel, target, typed_index, 4, 2), whole)
