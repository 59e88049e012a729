"""The r2 that a copying model cannot exceed, by the allele's count in the panel, under the coalescent.

    python profiling/copying_bound.py [--haplotypes 4508] [--trees 300] [--demography constant growth]

A copying model that knows the genealogy without error copies the panel haplotypes nearest to the target: all those
below the other child of the target's parent. It is wrong where an allele arose on the branch from that parent down to
them. All of them have it, and the target does not (Si, Vanderwerff and Zoellner 2021, Genetics 217:iyab011).

Their formula was not at hand. That of the row *formula* is derived anew, for a population of constant size
(:func:`falsely_imputed`). The other rows count trees of msprime, where every haplotype is the target in turn and the
others are the panel. Where only some of the nearest haplotypes have an allele, the dosage is their share.

The table has aggregate r2 of the derived allele by its count. Nothing but copying is lost here: typed sites tell the
genealogy, phase is known, and calls are right.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import msprime
import numpy as np
import tskit

from embrag_ds.cli.command import run_command
from embrag_ds.data.simulate import DEMOGRAPHIES, POPULATIONS, equal_shares
from embrag_ds.evaluation.metrics import COUNT_BINS
from embrag_ds.progress import Progress

CONSTANT = "constant"
"""Name of one population of constant size."""
_SEED = 1


def falsely_imputed(haplotypes: int, count: int) -> float:
    """Probability that a target lacks a derived allele which all of its nearest haplotypes have.

    The allele has ``count`` of the ``haplotypes`` of a panel, from a population of constant size. With the target a
    tree has N leaves. The allele arises at the level of k lineages, on a branch with ``count`` leaves (Fu 1995, Theor.
    Popul. Biol. 48:172). That branch ends at the level j with probability 2 (j - 1) / (k (k - 1)). Its sister is the
    target alone with probability (j - 2) / (N (N - count - 1)). The sum over j and k is this quotient.
    """
    return 2 / (3 * (count + 1) * (haplotypes + 1))


@dataclass
class Sums:
    """Sums over alleles and targets, float64 [N], by the allele's count in the panel of N - 1 haplotypes.

    ``all`` counts the pairs of an allele and a target, and ``carried`` those where the target carries it. ``said`` and
    ``squared`` sum dosages and their squares. A dosage is that of one haplotype. Where a target carries the allele it
    is 1, because its nearest haplotypes have it, too.
    """

    all: np.ndarray
    carried: np.ndarray
    said: np.ndarray
    squared: np.ndarray

    @staticmethod
    def none(leaves: int) -> Sums:
        """No sums yet, for trees with so many leaves."""
        return Sums(*(np.zeros(leaves) for _ in range(4)))

    @staticmethod
    def expected(leaves: int) -> Sums:
        """Of a population of constant size, where a model is wrong only by :func:`falsely_imputed`.

        There are 1 / count alleles of a count (Fu 1995), and a target carries one with probability count / leaves.
        """
        found = Sums.none(leaves)
        for count in range(1, leaves - 1):
            found.all[count] = 1 / count
            found.carried[count] = 1 / leaves
            found.said[count] = 1 / leaves + falsely_imputed(leaves - 1, count) / count
        found.squared[:] = found.said
        return found

    def add(self, tree: tskit.Tree) -> None:
        """Add the alleles of a tree, one for every unit of the length of its branches."""
        leaves = tree.num_samples()
        for node in tree.nodes():
            if node == tree.root:
                continue
            below, length = tree.num_samples(node), tree.branch_length(node)
            self.all[below] += (leaves - below) * length
            for sums in (self.all, self.carried, self.said, self.squared):
                sums[below - 1] += below * length
            if below == 1:
                (sister,) = (each for each in tree.children(tree.parent(node)) if each != node)
                self._add_nearest(tree, sister)

    def _add_nearest(self, tree: tskit.Tree, sister: int) -> None:
        """Add the dosages of a target without the allele, whose nearest haplotypes are those below ``sister``."""
        nearest = tree.num_samples(sister)
        for node in tree.nodes(sister):
            count = tree.num_samples(node)
            self.said[count] += tree.branch_length(node) * count / nearest
            self.squared[count] += tree.branch_length(node) * (count / nearest) ** 2

    def r2(self, low: int, high: int | None) -> float:
        """Aggregate r2 of alleles with ``low`` to ``high`` copies, both included; None is no end."""
        chosen = slice(low, None if high is None else high + 1)
        pairs = self.all[chosen].sum()
        carried, said, squared = (each[chosen].sum() / pairs for each in (self.carried, self.said, self.squared))
        covariance = carried - carried * said
        return float(covariance**2 / ((carried - carried**2) * (squared - said**2)))


def simulated(demography: str, haplotypes: int, trees: int) -> Sums:
    """Sums over ``trees`` of a panel of ``haplotypes`` and one target, with equal shares of all populations."""
    model = msprime.Demography.isolated_model([10_000]) if demography == CONSTANT else DEMOGRAPHIES[demography]()
    populations = ("pop_0",) if demography == CONSTANT else POPULATIONS[demography]
    shares = equal_shares(haplotypes + 1, len(populations))
    samples = [msprime.SampleSet(*each, ploidy=1) for each in zip(shares, populations, strict=True)]
    found = Sums.none(haplotypes + 1)
    with Progress(f"trees, {demography}", trees, "trees") as progress:
        for made in msprime.sim_ancestry(samples, demography=model, num_replicates=trees, random_seed=_SEED):
            found.add(made.first())
            progress.advance()
    return found


def table(columns: dict[str, Sums]) -> str:
    """r2 by bin of the count, a row each, in Markdown."""
    bins = [each for each in COUNT_BINS if each.high is not None]
    lines = [f"| | {' | '.join(each.name for each in bins)} |", f"|---{'|---' * len(bins)}|"]
    for name, sums in columns.items():
        lines.append(f"| {name} | {' | '.join(f'{sums.r2(each.low, each.high):.4f}' for each in bins)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--haplotypes", type=int, default=4508, help="of the panel")
    parser.add_argument("--trees", type=int, default=300)
    parser.add_argument(
        "--demography", nargs="+", choices=[CONSTANT, *DEMOGRAPHIES], default=[CONSTANT, "growth", "out-of-africa"]
    )
    options = parser.parse_args()
    found = {"formula": Sums.expected(options.haplotypes + 1)}
    found |= {name: simulated(name, options.haplotypes, options.trees) for name in options.demography}
    sys.stdout.write(table(found))


if __name__ == "__main__":
    run_command(main)
