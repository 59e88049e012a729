"""Frequencies without the query, against plain counting; and independence of all inputs from its rare alleles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.data.panel import FEW, RARE, Panel, PanelSubset, Populations
from embrag_ds.data.ploidy import Ploidy
from embrag_ds.retrieval.frequency import frequencies_without
from embrag_ds.variants.sites import SiteTable
from tests.retrieval.test_collate import WAY, leaves


def relatives_file(path: Path, pairs: list[tuple[int, int]]) -> Path:
    path.write_text("".join(f"p{a} p{b}\n" for a, b in pairs), encoding="utf-8")
    return path


def plain(alleles: np.ndarray, of: list[int], samples: list[int], barred: set[int], site: int) -> float:
    """Frequency of ALT at a site among ``samples``, counted without the barred ones if it is rare."""
    copies = [int(alleles[site, 2 * sample + i]) for sample in samples for i in range(2)]
    if min(sum(copies), len(copies) - sum(copies)) < max(RARE * len(copies), FEW):
        copies = [int(alleles[site, 2 * sample + i]) for sample in samples if sample not in barred for i in range(2)]
    return sum(copies) / len(copies) if copies else float("nan")


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), outside=st.integers(0, 3))
def test_rare_frequencies_are_counted_without_excluded_samples(
    build, tmp_path_factory: pytest.TempPathFactory, seed: int, outside: int
) -> None:
    rng = np.random.default_rng(seed)
    samples = 24
    alleles = (rng.random((30, 2 * samples)) < rng.choice([0.05, 0.3, 0.97], (30, 1))).astype(np.uint8)
    of = rng.integers(0, 3, samples).tolist()
    pairs = [(2, 5), (5, 7)]
    reference = list(range(outside, samples))
    world = build(alleles, reference=reference, populations=[*of[:-1], 2], window_sites=12, overlap=3, flank=4)
    of[-1] = 2
    relatives = relatives_file(tmp_path_factory.mktemp("relatives") / "relatives.txt", pairs)
    collate = world.collator(world.embedding(), "factored", "torch", 5, relatives)
    chosen = [0, 5, 7, samples - 1]
    barred = [{0}, {2, 5, 7}, {5, 7}, {samples - 1}]
    window = world.data.windows[1]
    batch = collate(world.batch_of(1, chosen, world.masked(1, 4, seed)))
    fewest = min(copies for row in alleles for copies in [min(int(row.sum()), 2 * samples - int(row.sum()))] if copies)
    assert world.data.reference.panel.minimum_allele_count == fewest
    for row in range(8):
        without = barred[row // 2] & set(reference)
        for place, site in enumerate(range(window.core_start, window.core_stop)):
            overall = plain(alleles, of, reference, without, site)
            assert float(batch.core.frequency[row, place]) == pytest.approx(overall, abs=1e-6)
            for population in range(3):
                members = [sample for sample in reference if of[sample] == population]
                expected = plain(alleles, of, members, without, site)
                left = set(members) - without
                found = float(batch.core.population_frequency[row, population, place])
                assert found == pytest.approx(expected if left else overall, abs=1e-6)
            left_copies = [int(alleles[site, 2 * p + i]) for p in reference if p not in without for i in range(2)]
            passes = min(sum(left_copies), len(left_copies) - sum(left_copies)) >= fewest
            assert bool(batch.core.scored[row, place]) == (bool(batch.core.masked[row, place]) and passes)


@WAY
@pytest.mark.parametrize("populations", [1, 3])
def test_a_rare_allele_of_the_query_changes_no_input(build, way: int, populations: int) -> None:
    """The panel is changed at masked rare alleles of the query; only the truth in the batch may differ."""
    rng = np.random.default_rng(5)
    samples, chosen = 60, [4]
    frequency = np.where(np.arange(40) % 2, 0.02, 0.4)[:, None]
    alleles = (rng.random((40, 2 * samples)) < frequency).astype(np.uint8)
    own = [8, 9]
    rare = np.flatnonzero((np.arange(40) % 2 == 1) & (alleles.sum(1) < FEW - 4))
    changed = alleles.copy()
    changed[np.ix_(rare, own)] ^= 1
    masked = np.zeros((1, 40), dtype=bool)
    masked[:, rare] = True
    batches = []
    for panel in (alleles, changed):
        # A sample outside the reference set has the rarest allele of all, so that both panels list the same sites.
        panel = np.concatenate([panel, np.eye(1, 40, int(rare[0]), dtype=np.uint8).T, np.zeros((40, 1), np.uint8)], 1)
        panel[rare[0], :-2] = 0
        of = [sample % populations for sample in range(samples + 1)]
        world = build(panel, reference=range(samples), populations=of)
        batches.append(world.collator(world.embedding(), *build.ways[way], 5)(world.batch_of(0, chosen, masked)))
    one, two = batches
    assert not torch.equal(one.core.alleles, two.core.alleles)
    for (name, first), (_, second) in zip(leaves(one), leaves(two), strict=True):
        if name in (
            "batch.core.alleles",
            "batch.core.good_turing",
        ):  # the latter rests on counts over all sites of the panel
            continue
        same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
        assert same, name


def test_good_turing_odds_are_what_a_filtered_call_set_gives(build) -> None:
    """Sites pass a count filter over 500 haplotypes; in the 100 outside the panel, alleles are as frequent as
    predicted.
    """
    rng = np.random.default_rng(2)
    frequency = 0.03 * rng.random((80_000, 1)) ** 3
    alleles = (rng.random((80_000, 500)) < frequency).astype(np.uint8)
    passes = alleles.sum(1) >= 5
    alleles = alleles[passes]
    copies = alleles[:, :400].sum(1)
    world = build(alleles[copies >= 2][:, :400])
    odds = world.data.reference.good_turing_odds
    assert odds.shape == (FEW + 1,) and odds[FEW] == odds[0] == odds[1] == 0
    assert odds[3] > odds[4] > 0.3 > odds[5]
    for number in (4, 5, 6, 7):
        found = alleles[copies == number][:, 400:].mean() / (number / 400)
        assert float(np.exp(odds[number])) == pytest.approx(found, rel=0.2)


def test_good_turing_odds_are_of_alt_and_of_the_copies_left(build) -> None:
    alleles = np.zeros((40, 120), dtype=np.uint8)
    for site in range(40):
        alleles[site, 30 : 33 + site % 2] = 1
    alleles[::5] ^= 1
    alleles[1, 0], alleles[1, 30] = 1, 0
    world = build(alleles)
    odds = torch.from_numpy(world.data.reference.good_turing_odds)
    batch = world.collator(world.embedding(), "factored", "torch", 5)(
        world.batch_of(0, [0, 50], np.ones((2, 40), dtype=bool))
    )
    core = range(batch.window.core.start, batch.window.core.stop)
    for sample, row in ((0, 0), (50, 2)):
        for place, site in enumerate(core):
            left = 3 + site % 2 - (sample == 0 and site == 1)
            expected = odds[left] if left >= 3 else 0.0
            of_alt = -expected if site % 5 == 0 else expected
            assert float(batch.core.good_turing[row, place]) == pytest.approx(float(of_alt))
    assert batch.core.good_turing.abs().max() > 0.1


def test_what_the_loss_leaves_out_is_what_the_panel_would_not_list(build) -> None:
    """An allele with the minimum allele count is scored only in samples without it."""
    alleles = np.zeros((3, 60), dtype=np.uint8)
    alleles[0, :20] = 1
    alleles[1, [0, 3]] = 1
    alleles[2, [2, 5, 7]] = 1
    world = build(alleles)
    everything = np.ones((4, 3), dtype=bool)
    batch = world.collator(world.embedding(), "factored", "torch", 5)(world.batch_of(0, [0, 1, 2, 3], everything))
    assert world.data.reference.panel.minimum_allele_count == 2
    # Samples 0 and 1 carry the allele of the second site. The third site keeps at least two of its three copies without
    # any one sample.
    assert batch.core.scored[0::2].tolist() == [[True, False, True]] * 2 + [[True, True, True]] * 2
    assert batch.core.frequency[0, 2] == pytest.approx(3 / 58)


def test_a_haploid_sample_counts_once() -> None:
    """The frequencies of haploid samples are those of half as many diploid ones with the same haplotypes."""
    rng = np.random.default_rng(5)
    alleles = (rng.random((40, 24)) < 0.2).astype(np.uint8)
    everywhere = Ploidy(np.array([0]), np.ones((1, 24), dtype=bool))
    haploid = subset(np.repeat(alleles, 2, axis=1), everywhere)
    diploid = subset(alleles, None)
    assert haploid.panel.minimum_allele_count == diploid.panel.minimum_allele_count
    np.testing.assert_array_equal(haploid.minor_allele_count, diploid.minor_allele_count)
    np.testing.assert_array_equal(haploid.panel.alt_count, diploid.panel.alt_count)
    np.testing.assert_array_equal(haploid.panel.allele_count, diploid.panel.allele_count)
    np.testing.assert_array_equal(haploid.allele_frequency, diploid.allele_frequency)
    np.testing.assert_array_equal(haploid.good_turing_odds, diploid.good_turing_odds)
    # Excluding a haploid sample takes one allele away, as excluding one haplotype of a diploid one would.
    found = [
        frequencies_without(
            torch.tensor([excluded]),
            torch.from_numpy(np.ascontiguousarray(each.alleles(0, 40))),
            torch.zeros(len(each), dtype=torch.int64),
            torch.from_numpy(each.counted(slice(0, 40))),
            torch.from_numpy(each.population_counts),
            torch.from_numpy(each.population_sizes),
        )
        for each, excluded in ((haploid, [6, 7]), (diploid, [3, 24]))
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_ploidy_that_changes_along_the_sites() -> None:
    rng = np.random.default_rng(6)
    alleles = (rng.random((30, 20)) < 0.3).astype(np.uint8)
    haploid = np.zeros((3, 10), dtype=bool)
    haploid[1, 4:] = True
    ploidy = Ploidy(np.array([0, 10, 25]), haploid)
    alleles[10:25, 9::2] = alleles[10:25, 8::2]
    one = subset(alleles, ploidy)
    counted = one.counted(slice(0, 30)).T
    np.testing.assert_array_equal(one.population_counts[0], (alleles * counted).sum(1))
    np.testing.assert_array_equal(one.population_sizes[0], counted.sum(1))
    np.testing.assert_array_equal(counted.sum(1), np.repeat([20, 14, 20], [10, 15, 5]))
    np.testing.assert_array_equal(one.panel.alt_count, (alleles * counted).sum(1))


def subset(alleles: np.ndarray, ploidy: Ploidy | None) -> PanelSubset:
    """Reference set of all samples of a panel in memory with ``alleles`` uint8 [S, 2N]."""
    sites, samples = len(alleles), alleles.shape[1] // 2
    table = SiteTable(
        ("1",), (0,), np.zeros(sites, np.int32), np.arange(sites) + 1, ["A"] * sites, ["C"] * sites, ["."] * sites
    )
    names = tuple(f"s{number}" for number in range(samples))
    packed = np.packbits(alleles, axis=1, bitorder="little")
    panel = Panel(Path("panel.vcf"), table, names, packed, {}, ploidy=ploidy)
    return PanelSubset(panel, Populations(("all",), np.zeros(samples, dtype=np.int64)), np.arange(samples))
