"""Simulated data sets: sites, maps, errors, demographies and the cache."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embrag_ds.data import simulate
from embrag_ds.data.simulate import DefaultData, SimulationSettings, simulate_default
from embrag_ds.errors import UserError
from embrag_ds.maps.genetic_map import GeneticMap
from tests.whole_files import read_phased

SMALL = SimulationSettings(length_bp=200_000, panel_samples=31, target_samples=6, seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DefaultData:
    return simulate_default(tmp_path_factory.mktemp("simulated") / "small", SMALL)


def contents(directory: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in directory.iterdir() if entry.suffix != ".tbi"}


def test_panel_sites(data):
    panel = read_phased(data.panel)
    copies = panel.alleles.sum(axis=1, dtype=int)
    assert panel.alleles.shape[1] == 62
    assert len(panel.sites) > 100
    assert copies.min() == 2 and (62 - copies).min() >= 2
    assert (np.diff(panel.sites.pos) > 0).all()
    assert panel.sites.pos[0] >= 1 and panel.sites.pos[-1] <= SMALL.length_bp
    assert panel.sites.contigs == ("1",) and panel.sites.contig_lengths == (200_000,)
    assert set(panel.sites.ref) == set(panel.sites.alt) == set("ACGT")
    assert all(ref != alt for ref, alt in zip(panel.sites.ref, panel.sites.alt, strict=True))


def test_target_is_the_truth_at_typed_sites(data):
    panel, truth, target = (read_phased(path) for path in (data.panel, data.truth, data.target))
    assert list(truth.sites.identities()) == list(panel.sites.identities())
    assert target.samples == truth.samples and len(target.samples) == 6
    assert not set(target.samples) & set(panel.samples)
    rows = np.searchsorted(panel.sites.pos, target.sites.pos)
    assert list(target.sites.identities()) == [list(panel.sites.identities())[row] for row in rows]
    np.testing.assert_array_equal(target.alleles, truth.alleles[rows])
    frequency = panel.alleles[rows].mean(axis=1)
    assert np.minimum(frequency, 1 - frequency).min() >= 0.05
    assert len(np.unique(target.sites.pos // 4000)) == len(rows)
    assert 0.5 < len(rows) / (200_000 / 4000) <= 1


def test_samples_of_a_population_resemble_each_other(data):
    """Rare alleles are shared within populations, both in the panel and between panel and target."""
    panel, truth = read_phased(data.panel), read_phased(data.truth)
    with data.samples.open() as lines:
        population = {row["sample"]: row["population"] for row in csv.DictReader(lines, delimiter="\t")}
    assert set(population) == {*panel.samples, *truth.samples}
    in_panel = [population[name] for name in panel.samples]
    assert [in_panel.count(name) for name in SMALL.populations] == [11, 10, 10]
    assert [population[name] for name in truth.samples] == ["YRI"] * 2 + ["CEU"] * 2 + ["CHB"] * 2
    assert all(name.startswith(label) for name, label in population.items())
    african = np.repeat([name == "YRI" for name in in_panel], 2)
    only_african = (panel.alleles[:, african].sum(axis=1) > 0) & (panel.alleles[:, ~african].sum(axis=1) == 0)
    copies = truth.alleles[only_african].sum(axis=0, dtype=int)
    assert copies[:4].min() > copies[4:].max()


def test_map_has_hotspots_and_the_mean_rate(data):
    bp, cm = GeneticMap.read(data.genetic_map).points["1"]
    assert (bp[0], bp[-1]) == (1, 200_001)
    assert cm[-1] == pytest.approx(0.2, rel=1e-5)
    rates = np.diff(cm) / np.diff(bp) * 1e6
    hot = rates > 1
    assert rates[~hot] == pytest.approx(0.1, rel=1e-2)
    assert np.diff(bp)[hot].max() <= 2000
    assert np.diff(cm)[hot].sum() > 0.8 * cm[-1]


def test_same_settings_same_bytes(data, tmp_path):
    again = simulate_default(tmp_path / "again", SMALL)
    assert contents(again.panel.parent) == contents(data.panel.parent)
    other = simulate_default(tmp_path / "other", replace(SMALL, seed=4))
    assert other.panel.read_bytes() != data.panel.read_bytes()


def test_cached_until_the_settings_change(data, tmp_path, monkeypatch):
    directory = tmp_path / "cached"
    first = simulate_default(directory, SMALL)
    before = first.panel.stat()
    assert simulate_default(directory, SMALL) == first
    assert (first.panel.stat().st_ino, first.panel.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    panel = first.panel.read_bytes()
    simulate_default(directory, replace(SMALL, seed=4))
    assert first.panel.read_bytes() != panel
    monkeypatch.setattr(simulate, "RECIPE_VERSION", simulate.RECIPE_VERSION + 1)
    inode = first.panel.stat().st_ino
    simulate_default(directory, replace(SMALL, seed=4))
    assert first.panel.stat().st_ino != inode


def test_interrupted_build_leaves_what_was_there(tmp_path, monkeypatch):
    directory = tmp_path / "here"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(simulate, "_write_map", interrupted)
        with pytest.raises(KeyboardInterrupt):
            simulate_default(directory, SMALL)
        assert list(tmp_path.iterdir()) == []
    before = contents(simulate_default(directory, SMALL).panel.parent)
    monkeypatch.setattr(simulate, "_write_map", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate_default(directory, replace(SMALL, seed=4))
    assert contents(directory) == before and [entry.name for entry in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("name", ["notes.txt", "panel.vcf.gz"])
def test_never_replaces_the_users_files(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"it holds {name}"):
        simulate_default(tmp_path, SMALL)
    with pytest.raises(UserError, match="is a file"):
        simulate_default(tmp_path / name, SMALL)
    assert (tmp_path / name).read_text() == "mine"


def test_fills_an_empty_folder(tmp_path):
    assert simulate_default(tmp_path, SMALL).panel.is_file()


def test_switch_errors_change_phase_and_no_genotype():
    settings = replace(SMALL, length_bp=1_000_000, switch_errors_per_mb=3.0)
    positions = np.arange(1, 1_000_000, 500)
    clean = np.tile(np.array([0, 1], dtype=np.uint8), (len(positions), 400))
    spoiled = clean.copy()
    simulate._spoil(spoiled, positions, settings)
    assert np.array_equal(spoiled[:, 0::2] + spoiled[:, 1::2], clean[:, 0::2] + clean[:, 1::2])
    changes = np.abs(np.diff(spoiled[:, 0::2].astype(int), axis=0)).sum(0)
    assert changes.mean() == pytest.approx(3.0, rel=0.15) and changes.var() == pytest.approx(3.0, rel=0.4)


def test_missed_calls_have_the_given_rate_and_are_of_the_minor_allele_only():
    rng = np.random.default_rng(1)
    clean = (rng.random((2000, 100)) < rng.choice([0.2, 0.8], (2000, 1))).astype(np.uint8)
    minor = np.where(clean.mean(1, keepdims=True) > 0.5, 1 - clean, clean)
    spoiled = clean.copy()
    simulate._spoil(spoiled, np.arange(2000), replace(SMALL, missed_calls=0.1))
    assert (spoiled != clean)[minor == 1].mean() == pytest.approx(0.1, rel=0.1)
    assert not (spoiled != clean)[minor == 0].any()


def test_every_demography_gives_its_populations(tmp_path: Path):
    settings = replace(SMALL, length_bp=60_000, demography="american-admixture", panel_samples=12, target_samples=4)
    simulated = simulate_default(tmp_path / "data", settings)
    with simulated.samples.open() as lines:
        population = [row["population"] for row in csv.DictReader(lines, delimiter="\t")]
    assert {name: population.count(name) for name in population} == dict.fromkeys(("AFR", "EUR", "EAS", "ADMIX"), 4)


def test_growth_gives_one_population_with_many_rare_variants(tmp_path: Path):
    """Without growth, the expected number of sites with i copies of the derived allele is proportional to 1/i."""
    settings = replace(SMALL, length_bp=300_000, demography="growth", panel_samples=1000)
    panel = read_phased(simulate_default(tmp_path / "data", settings).panel)
    assert all(name.startswith("GROWN") for name in panel.samples)
    copies = panel.alleles.sum(axis=1, dtype=int)
    minor = np.arange(2, 1001)
    without_growth = 1 / minor + 1 / (2000 - minor)
    expected = without_growth[:3].sum() / without_growth.sum()
    assert (np.minimum(copies, 2000 - copies) <= 4).mean() > 1.4 * expected


def test_growth_ends_at_the_ancestral_size():
    sizes = simulate._growth().debug().population_size_trajectory([0, 102, 204, 205, 10_000])[:, 0]
    np.testing.assert_allclose(sizes, [10_000 * np.exp(0.0195 * each) for each in (204, 102, 0, 0, 0)])


def test_without_errors_nothing_is_spoiled():
    clean = np.zeros((20, 10), dtype=np.uint8)
    simulate._spoil(clean, np.arange(20), SMALL)
    assert not clean.any()


def test_a_filtered_call_set_lists_what_panel_and_targets_carry_together(tmp_path: Path):
    plain = replace(SMALL, target_samples=20)
    all_of, filtered = (
        simulate_default(tmp_path / name, settings)
        for name, settings in (("all", plain), ("filtered", replace(plain, call_set_copies=4)))
    )
    panel, truth = read_phased(all_of.panel), read_phased(all_of.truth)
    together = np.concatenate([panel.alleles, truth.alleles], axis=1)
    copies = together.sum(axis=1, dtype=int)
    listed = np.minimum(copies, together.shape[1] - copies) >= 4
    assert not listed.all()
    assert read_phased(filtered.panel).sites.pos.tolist() == panel.sites.pos[listed].tolist()
    assert read_phased(filtered.panel).alleles.sum(axis=1).min() == 2


def test_the_mean_rate_is_the_given_one(data, tmp_path: Path):
    faster = simulate_default(tmp_path / "data", replace(SMALL, cm_per_mb=3.0))
    (bp, cm), (slow_bp, slow_cm) = (GeneticMap.read(each.genetic_map).points["1"] for each in (faster, data))
    np.testing.assert_array_equal(bp, slow_bp)
    np.testing.assert_allclose(cm, 3 * slow_cm, atol=1e-6)
