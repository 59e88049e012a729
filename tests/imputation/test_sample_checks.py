"""Call rates and distances of target samples, compared with loops."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import embrag_ds.imputation.sample_checks as module
from embrag_ds.config import EmbragConfig
from embrag_ds.data.panel import Panel
from embrag_ds.data.ploidy import Ploidy
from embrag_ds.data.targets import Targets, match_targets, open_targets
from embrag_ds.dependence import Dependence
from embrag_ds.export import ExportedModel
from embrag_ds.imputation.preparation import for_targets
from embrag_ds.imputation.sample_checks import call_rates, check_samples, inbreeding
from embrag_ds.ops.bits import pack_host
from embrag_ds.variants.sites import SiteTable

SITES, SAMPLES = 200, 30


def packed(name: str, alleles: np.ndarray, missing: np.ndarray | None = None) -> Panel:
    number = len(alleles)
    texts = (["A"] * number, ["C"] * number, ["."] * number)
    sites = SiteTable(("1",), (0,), np.zeros(number, np.int32), np.arange(number), *texts)
    samples = tuple(f"{name}{each}" for each in range(alleles.shape[1] // 2))
    return Panel(
        Path(name), sites, samples, pack_host(alleles), {}, missing=None if missing is None else pack_host(missing)
    )


def panel_alleles(samples: int = SAMPLES) -> np.ndarray:
    """Alleles [S, 2N] of haplotypes that are copies of eight, with one allele in fifty changed."""
    rng = np.random.default_rng(1)
    kinds = rng.integers(0, 2, (SITES, 8), dtype=np.uint8)
    copies = kinds[:, rng.integers(8, size=2 * samples)]
    return copies ^ (rng.random(copies.shape) < 0.02)


def opened(panel: Panel, alleles: np.ndarray, missing: np.ndarray | None = None) -> Targets:
    target = packed("t", alleles, missing)
    return open_targets(target, match_targets(target, panel, "report", allow_overlap=True), panel)


def slow_distance(own: np.ndarray, known: np.ndarray, panel: np.ndarray, chunks: list[int]) -> float:
    """Share of differing alleles of a sample [S, 2] from the nearest of the panel's haplotypes, chunk by chunk."""
    different = seen = 0
    for chunk in chunks:
        span = slice(chunk, chunk + module._CHUNK_SITES)
        for haplotype in range(2):
            there = known[span, haplotype]
            apart = (own[span, haplotype][:, None] != panel[span])[there].sum(axis=0)
            different += int(apart.min())
            seen += int(there.sum())
    return different / seen


def test_call_rates_and_distances_equal_loops() -> None:
    rng = np.random.default_rng(2)
    alleles = panel_alleles()
    panel = packed("p", alleles)
    own = np.concatenate([alleles[:, 3:5], rng.integers(0, 2, (SITES, 2), dtype=np.uint8), alleles[:, [9, 2]]], axis=1)
    missing = rng.random(own.shape) < 0.3
    missing[:, 4:] = True  # nothing is known of the last sample
    missing[missing.all(axis=1), 0] = False  # a site at which nobody has a call is not typed
    targets = opened(panel, own, missing)
    np.testing.assert_allclose(call_rates(targets), 1 - missing.reshape(SITES, 3, 2).mean(axis=(0, 2)))
    found = check_samples(targets, panel)
    assert [each["sample"] for each in found] == ["t0", "t1", "t2"]
    assert [each["call_rate"] for each in found] == pytest.approx([*call_rates(targets)])
    chunks = np.unique(np.linspace(0, SITES - 64, -(-SITES // 64)).astype(int)).tolist()  # as few as cover all sites
    for number in range(2):
        columns = slice(2 * number, 2 * number + 2)
        expected = slow_distance(own[:, columns], ~missing[:, columns], alleles, chunks)
        assert found[number]["distance"] == pytest.approx(expected)
    assert found[0]["distance"] == 0
    assert found[2] == {"sample": "t2", "call_rate": 0.0, "distance": None}


def test_inbreeding_counts_heterozygous_genotypes() -> None:
    """By hand: frequencies .5 and .25 expect .5 and .375 heterozygous genotypes a sample."""
    panel = packed("p", np.array([[0, 1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0, 1, 0]], dtype=np.uint8))
    alleles = np.array([[0, 1, 1, 1], [1, 0, 0, 1]], dtype=np.uint8)
    missing = np.array([[0, 0, 0, 0], [0, 0, 0, 1]], dtype=np.uint8)
    own, usual = inbreeding(opened(panel, alleles, missing), panel)
    assert own == pytest.approx(1 - 2 / (0.5 + 0.375 + 0.5))
    assert usual == pytest.approx(1 - 6 / (4 * 0.875))


def test_haploid_genotypes_are_not_inbred() -> None:
    """Half of the samples are haploid, with the same allele on both haplotypes."""
    rng = np.random.default_rng(5)
    alleles = rng.integers(0, 2, (2000, 80), dtype=np.uint8)
    alleles[:, 1:40:2] = alleles[:, 0:40:2]
    haploid = Ploidy(np.array([0]), (np.arange(40) < 20)[None])
    panel, target = (packed(name, alleles) for name in "pt")
    for ploidy, least in ((None, 0.45), (haploid, -0.03)):
        of_panel, of_target = replace(panel, ploidy=ploidy), replace(target, ploidy=ploidy)
        found = open_targets(of_target, match_targets(of_target, of_panel, "report", allow_overlap=True), of_panel)
        assert inbreeding(found, of_panel) == pytest.approx((least + 0.03,) * 2, abs=0.04)


@pytest.mark.parametrize(("selfed", "alike"), [(False, 0.0), (True, 0.7)])
def test_haplotypes_are_alike_only_where_targets_are_as_inbred_as_the_panel(
    selfed: bool, alike: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(6)
    lines = rng.integers(0, 2, (300, 60), dtype=np.uint8).repeat(2, axis=1)
    targets = lines[:, :20] if selfed else rng.integers(0, 2, (300, 20), dtype=np.uint8)
    panel = packed("p", lines)
    model = ExportedModel(EmbragConfig(), {}, Dependence(0.1, 0.7))
    found = for_targets(model, panel, opened(panel, targets))
    assert found.dependence == Dependence(0.1, alike)
    assert ("for alike" in caplog.text) is not selfed


def test_samples_that_look_wrong_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    alleles = panel_alleles(SAMPLES + 1)
    panel = packed("p", alleles[:, :-2])
    usual = alleles[:, -2:]
    other = np.random.default_rng(3).integers(0, 2, (SITES, 2), dtype=np.uint8)
    missing = np.zeros((SITES, 6), dtype=bool)
    missing[:30, 4:] = True
    check_samples(opened(panel, np.concatenate([usual, other, usual], axis=1), missing), panel)
    assert len(caplog.messages) >= 2
    lines = [each for each in caplog.messages if each.startswith("sample ")]
    assert [each.split(":")[0] for each in lines] == ["sample t1", "sample t2"]
    assert "differ from the panel's nearest in" in lines[0] and "wrong build, strand or population" in lines[0]
    assert lines[1] == "sample t2: calls at only 85.0 % of the typed sites"


@pytest.mark.parametrize(("samples", "sites"), [(19, SITES), (SAMPLES, 19)])
def test_few_samples_or_sites_have_no_distance(samples: int, sites: int) -> None:
    panel = packed("p", panel_alleles(samples)[:sites])
    found = check_samples(opened(panel, panel_alleles(samples)[:sites, :2]), panel)
    assert found == [{"sample": "t0", "call_rate": 1.0, "distance": None}]


def test_a_large_panel_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    alleles = panel_alleles()
    panel = packed("p", alleles)
    targets = opened(panel, alleles[:, [0, 6]])
    assert check_samples(targets, panel)[0]["distance"] == 0
    monkeypatch.setattr(module, "_MOST_HAPLOTYPES", 20)
    # Every third haplotype is compared, these two among them.
    assert check_samples(targets, panel)[0]["distance"] == 0
    assert check_samples(opened(panel, alleles[:, [1, 2]]), panel)[0]["distance"] > 0
