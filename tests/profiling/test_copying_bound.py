"""The bound of copying models: its formula beside the sum it comes from, and trees read slowly."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import msprime
import numpy as np
import pytest
import tskit
from copying_bound import CONSTANT, Sums, falsely_imputed, simulated, table


def by_levels(haplotypes: int, count: int) -> Fraction:
    """The sum over the level k at which an allele arises, and the level j at which its branch ends."""
    leaves, found = haplotypes + 1, Fraction(0)
    for k in range(3, leaves - count + 2):
        of_size = Fraction(comb(leaves - count - 1, k - 2), comb(leaves - 1, k - 1))
        for j in range(3, k + 1):
            alone = Fraction(j - 2, leaves * (leaves - count - 1))
            found += Fraction(1, k - 1) * of_size * Fraction(2 * (j - 1), k * (k - 1)) * alone
    return found * count  # of 1 / count alleles


@pytest.mark.parametrize("haplotypes", [4, 9, 24])
def test_the_formula_is_the_sum_over_levels(haplotypes: int) -> None:
    for count in range(1, haplotypes - 1):
        assert falsely_imputed(haplotypes, count) == pytest.approx(float(by_levels(haplotypes, count)))


def trees(leaves: int, number: int) -> list[tskit.Tree]:
    made = msprime.sim_ancestry(leaves, ploidy=1, population_size=1, num_replicates=number, random_seed=3)
    return [each.first() for each in made]


def test_alleles_of_a_lone_sister_are_as_frequent_as_the_formula_says() -> None:
    leaves, found, all_of = 12, np.zeros(12), np.zeros(12)
    for tree in trees(leaves, 4000):
        for node in tree.nodes():
            if node == tree.root:
                continue
            below, length = tree.num_samples(node), tree.branch_length(node)
            sisters = [each for each in tree.children(tree.parent(node)) if each != node]
            found[below] += length * (tree.num_samples(sisters[0]) == 1)
            # As pairs with a target: the allele's count in the others is one less where the target has it.
            all_of[below] += length * (leaves - below)
            all_of[below - 1] += length * below
    for count in range(1, 6):
        assert found[count] / all_of[count] == pytest.approx(falsely_imputed(leaves - 1, count), rel=0.1)


def test_sums_are_those_of_all_alleles_and_targets() -> None:
    """A target's nearest haplotypes are those with which it has its youngest common ancestor."""
    leaves, got = 9, Sums.none(9)
    truth, said = [[] for _ in range(leaves)], [[] for _ in range(leaves)]
    weights: list[list[float]] = [[] for _ in range(leaves)]
    for tree in trees(leaves, 5):
        got.add(tree)
        for node in tree.nodes():
            if node == tree.root:
                continue
            carriers = set(tree.samples(node))
            for target in range(leaves):
                others = [each for each in range(leaves) if each != target]
                ages = [tree.tmrca(target, each) for each in others]
                nearest = [each for each, age in zip(others, ages, strict=True) if age == min(ages)]
                count = len(carriers - {target})
                truth[count].append(float(target in carriers))
                said[count].append(np.mean([each in carriers for each in nearest]))
                weights[count].append(tree.branch_length(node))
    for count in range(1, leaves):
        weight, x, y = (np.array(each[count]) for each in (weights, truth, said))
        for sums, expected in ((got.all, weight), (got.carried, weight * x), (got.said, weight * y)):
            assert sums[count] == pytest.approx(expected.sum())
        assert got.squared[count] == pytest.approx((weight * y**2).sum())
    chosen = [np.concatenate([np.array(each[count]) for count in (2, 3, 4)]) for each in (weights, truth, said)]
    weight, x, y = chosen
    covariance = np.cov(x, y, aweights=weight, ddof=0)
    assert got.r2(2, 4) == pytest.approx(covariance[0, 1] ** 2 / covariance[0, 0] / covariance[1, 1])


def test_no_tree_beats_the_formula() -> None:
    expected, found = Sums.expected(101), simulated(CONSTANT, 100, 200)
    for low, high in ((1, 1), (2, 2), (3, 5), (6, 10)):
        assert found.r2(low, high) < expected.r2(low, high) < found.r2(low, high) + 0.05
    assert expected.r2(1, 1) == pytest.approx(0.75, abs=0.01) and expected.r2(2, 2) == pytest.approx(0.9, abs=0.01)
    lines = table({"formula": expected}).splitlines()
    assert lines[0].startswith("| | 1 | 2 | 3-5 |") and lines[2].startswith(f"| formula | {expected.r2(1, 1):.4f} |")
    assert len(lines) == 3


@pytest.mark.parametrize("demography", ["growth", "out-of-africa"])
def test_where_populations_grow_the_rarest_are_copied_worse(demography: str) -> None:
    constant, found = simulated(CONSTANT, 200, 60), simulated(demography, 200, 60)
    assert found.r2(1, 1) < constant.r2(1, 1)
