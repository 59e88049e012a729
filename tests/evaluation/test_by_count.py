"""Scores by the minor allele's count in the panel, and calibration of called carriers, against slow, obvious counts."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.evaluation import metrics
from embrag_ds.evaluation.carriers import CalledCarriers, CarrierCalibration, Gap, largest_gap
from embrag_ds.evaluation.metrics import BIN_NAMES, COUNT_NAMES, EVERY_NAME
from embrag_ds.evaluation.report import Report
from embrag_ds.evaluation.score import evaluate

SEEDS = st.integers(0, 2**32 - 1)
HAPLOTYPES = 1000
LAST = {"1": 1, "2": 2, "3-5": 5, "6-10": 10, "11-20": 20, "21-50": 50, "51-100": 100}


def bins_of(alt: int, haplotypes: int) -> set[str]:
    """Names of the bins of a site whose ALT has ``alt`` copies in a panel."""
    minor = min(alt, haplotypes - alt)
    permille = 1000 * minor / haplotypes
    edges = [("<0.1 %", 1), ("0.1-0.5 %", 5), ("0.5-1 %", 10), ("1-5 %", 50), ("5-50 %", 1000)]
    names = {"all", next(name for name, end in edges if permille < end)}
    if permille < 10:
        names.add("all <1 %")
    if minor > 0:
        names.add(next((name for name, last in LAST.items() if minor <= last), ">100"))
    return names


@pytest.mark.parametrize(
    ("minor", "name"),
    [*zip(LAST.values(), LAST, strict=True), (0, None), (3, "3-5"), (51, "51-100"), (101, ">100"), (500, ">100")],
)
def test_both_ends_of_a_count_bin_belong_to_it(minor: int, name: str | None) -> None:
    members = metrics.every_member(np.array([minor / HAPLOTYPES]), np.array([minor]))[len(BIN_NAMES) :, 0]
    assert [each for each, member in zip(COUNT_NAMES, members, strict=True) if member] == ([name] if name else [])


def simulate(seed: int, sites: int = 40, samples: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ALT copies [S] in the panel, true counts [S, N] with gaps, and genotype probabilities [S, N, 3] with ties."""
    rng = np.random.default_rng(seed)
    minor = rng.choice([0, 1, 2, 3, 5, 6, 10, 11, 20, 21, 50, 51, 100, 101, 400], size=sites)
    alt = np.where(rng.random(sites) < 0.5, minor, HAPLOTYPES - minor)
    truth = rng.integers(0, 3, size=(sites, samples)).astype(np.float64)
    gp = rng.dirichlet([0.5, 0.5, 0.5], size=(sites, samples))
    gp[np.arange(sites)[:, None], np.arange(samples), truth.astype(int)] += 0.7
    gp = np.round(gp / gp.sum(axis=-1, keepdims=True), 1)
    truth[rng.random(truth.shape) < 0.15] = np.nan
    return alt, truth, gp


def oracle(alt: np.ndarray, truth: np.ndarray, gp: np.ndarray, haplotypes: int) -> dict[str, tuple[int, float, float]]:
    """Number, sum said and sum right of the called carriers of every bin."""
    found = dict.fromkeys(EVERY_NAME, (0, 0.0, 0.0))
    for copies, row, probabilities in zip(alt.tolist(), truth.tolist(), gp.tolist(), strict=True):
        major = 2 if copies > haplotypes - copies else 0
        for true, each in zip(row, probabilities, strict=True):
            called = each.index(max(each))
            if math.isnan(true) or called == major:
                continue
            for name in bins_of(copies, haplotypes):
                number, said, right = found[name]
                found[name] = (number + 1, said + max(each), right + (called == true))
    return found


def add_called(
    accumulator: CalledCarriers, truth: np.ndarray, gp: np.ndarray, af: np.ndarray, members: np.ndarray
) -> None:
    """Add a block with what :mod:`embrag_ds.evaluation.scoring` calls of it."""
    called = metrics.best_guess(gp, gp)
    accumulator.add(truth, gp, called, metrics.polarise(called, af) > 0, members)


@given(SEEDS, st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_called_carriers_are_counted(seed: int, block: int) -> None:
    alt, truth, gp = simulate(seed)
    af, minor = alt / HAPLOTYPES, np.minimum(alt, HAPLOTYPES - alt)
    members = metrics.every_member(af, minor)
    accumulator = CalledCarriers(truth.shape[1])
    for start in range(0, len(af), block):
        rows = slice(start, start + block)
        add_called(accumulator, truth[rows], gp[rows], af[rows], members[:, rows])
    found = accumulator.result(np.ones((1, truth.shape[1])))
    assert tuple(found) == EVERY_NAME
    for name, (number, said, right) in oracle(alt, truth, gp, HAPLOTYPES).items():
        assert found[name].number == number
        expected = [said / number, right / number] if number else [math.nan, math.nan]
        assert [found[name].said, found[name].right] == pytest.approx(expected, nan_ok=True)


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_the_interval_is_that_of_repeated_samples(seed: int) -> None:
    alt, truth, gp = simulate(seed)
    af, minor = alt / HAPLOTYPES, np.minimum(alt, HAPLOTYPES - alt)
    weights = metrics.bootstrap_weights(truth.shape[1], 20, seed)
    accumulator = CalledCarriers(truth.shape[1])
    add_called(accumulator, truth, gp, af, metrics.every_member(af, minor))
    found = accumulator.result(weights)
    gaps: dict[str, list[float]] = {name: [] for name in EVERY_NAME}
    for draw in weights:
        drawn = np.repeat(np.arange(truth.shape[1]), draw.astype(int))
        for name, (number, said, right) in oracle(alt, truth[:, drawn], gp[:, drawn], HAPLOTYPES).items():
            if number:
                gaps[name].append((said - right) / number)
    for name, values in gaps.items():
        expected = np.percentile(values, [2.5, 97.5]) if values else [math.nan, math.nan]
        assert found[name].interval == pytest.approx(tuple(expected), abs=1e-9, nan_ok=True), name


def test_the_largest_gap_needs_a_hundred_carriers_and_leaves_out_pooled_bins() -> None:
    nan = (math.nan, math.nan)
    found = dict.fromkeys(EVERY_NAME, CarrierCalibration(0, math.nan, math.nan, nan))
    assert largest_gap(found) is None
    found["1"] = CarrierCalibration(99, 0.9, 0.1, nan)
    found["all"] = CarrierCalibration(1000, 0.9, 0.2, nan)
    assert largest_gap(found) is None
    found["5-50 %"] = CarrierCalibration(100, 0.9, 0.8, nan)
    found[">100"] = CarrierCalibration(100, 0.7, 0.9, nan)
    assert largest_gap(found) == Gap(">100", pytest.approx(0.2))


# --- from files -----------------------------------------------------------------------------------

SITES, PANEL, HAPLOID_PANEL, SAMPLES, HAPLOID = 90, 140, 10, 12, 3
"""Sites; samples of the panel and of the truth, the first of which are haploid."""
PANEL_HAPLOTYPES = 2 * PANEL - HAPLOID_PANEL
TYPED = np.arange(0, SITES, 15)
UNTYPED = np.setdiff1d(np.arange(SITES), TYPED)


def vcf(path: Path, prefix: str, keys: str, rows: np.ndarray, cells: list[list[str]]) -> None:
    """Write a VCF of these sites, one cell a sample."""
    lines = ["##fileformat=VCFv4.3", "##contig=<ID=X,length=100000>"]
    for key in keys.split(":"):
        kind = "String" if key == "GT" else "Float"
        lines.append(f'##FORMAT=<ID={key},Number=.,Type={kind},Description="{key}">')
    names = [f"{prefix}{number}" for number in range(len(cells[0]))]
    lines.append("\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *names]))
    for row, values in zip(rows.tolist(), cells, strict=True):
        lines.append("\t".join(["X", str(1000 + 10 * row), ".", "A", "C", ".", "PASS", ".", keys, *values]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def genotypes(alleles: np.ndarray, haploid: int) -> list[list[str]]:
    """GT of alleles [S, N, 2]; the first ``haploid`` samples have their first allele only."""
    return [
        [str(a) if sample < haploid else f"{a}|{b}" for sample, (a, b) in enumerate(row)] for row in alleles.tolist()
    ]


def imputed(p: np.ndarray) -> tuple[list[list[str]], np.ndarray, np.ndarray]:
    """Cells of GT:DS:GP for ALT probabilities [S, N, 2] of haplotypes; dosage [S, N], and GP of genotypes [S, N, 3]."""
    cells: list[list[str]] = []
    dosage, gp = np.empty(p.shape[:2]), np.empty((*p.shape[:2], 3))
    for site, row in enumerate(p.tolist()):
        cells.append([])
        for sample, (a, b) in enumerate(row):
            if sample < HAPLOID:
                found = [round(1 - a, 4), 0.0, a]
                shown, guess, each = [found[0], found[2]], f"{int(a > 0.5)}", a
            else:
                found = [round(each, 4) for each in ((1 - a) * (1 - b), a * (1 - b) + b * (1 - a), a * b)]
                shown, guess, each = found, f"{int(a > 0.5)}|{int(b > 0.5)}", round(a + b, 4)
            cells[-1].append(f"{guess}:{each}:{','.join(map(str, shown))}")
            dosage[site, sample], gp[site, sample] = each, found
    return cells, dosage, gp


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Files of an X chromosome with haploid samples, all count bins on both sides of 0.5, and gaps in the truth."""
    folder, rng = tmp_path_factory.mktemp("by-count"), np.random.default_rng(5)
    every = np.arange(SITES)
    counts = rng.choice([0, 1, 2, 4, 8, 15, 30, 70, 110], size=SITES)
    counts = np.where(rng.random(SITES) < 0.5, counts, PANEL_HAPLOTYPES - counts)
    panel = np.zeros((SITES, 2 * PANEL), dtype=np.int64)
    written = np.delete(np.arange(2 * PANEL), 2 * np.arange(HAPLOID_PANEL) + 1)
    for site in range(SITES):
        panel[site, rng.permutation(written)[: counts[site]]] = 1
    vcf(folder / "panel.vcf", "P", "GT", every, genotypes(panel.reshape(SITES, PANEL, 2), HAPLOID_PANEL))

    frequency = np.where(2 * counts <= PANEL_HAPLOTYPES, 0.3, 0.7)[:, None, None]
    alleles = (rng.random((SITES, SAMPLES, 2)) < frequency).astype(np.int64)
    known = rng.random((SITES, SAMPLES)) > 0.1
    called = genotypes(alleles, HAPLOID)
    vcf(folder / "target.vcf", "T", "GT", TYPED, [called[row] for row in TYPED])
    gaps = [
        [each if known[site, sample] else "." for sample, each in enumerate(row)] for site, row in enumerate(called)
    ]
    vcf(folder / "truth.vcf", "T", "GT", every, gaps)
    truth = alleles.sum(axis=2).astype(np.float64)
    truth[:, :HAPLOID] = alleles[:, :HAPLOID, 0]
    truth[~known] = np.nan

    found: dict[str, Any] = {"folder": folder, "alt": counts, "truth": truth}
    for name, kept in (("good", 0.7), ("bad", 0.4)):
        p = (kept * alleles + (1 - kept) * rng.random(alleles.shape)).round(3)
        cells, dosage, gp = imputed(p)
        vcf(folder / f"{name}.vcf", "T", "GT:DS:GP", every, cells)
        found |= {name: dosage, f"{name} gp": gp}
    bare = [[each.rpartition(":")[0] for each in row] for row in cells]
    vcf(folder / "bare.vcf", "T", "GT:DS", every, bare)
    return found


def score(study: dict[str, Any], *names: str, **arguments: Any) -> Report:
    """Report on the imputed files with these names."""
    folder = study["folder"]
    files = {name: folder / f"{name}.vcf" for name in names}
    given = {"bootstrap": 30, "seed": 4, "cache_dir": folder / "cache", **arguments}
    return evaluate(folder / "truth.vcf", files, folder / "panel.vcf", folder / "target.vcf", **given)


def drawn_samples() -> list[np.ndarray]:
    """Samples of every bootstrap draw of :func:`score`."""
    weights = metrics.bootstrap_weights(SAMPLES, 30, seed=4)
    return [np.repeat(np.arange(SAMPLES), draw.astype(int)) for draw in weights]


def untyped(study: dict[str, Any], name: str) -> list[int]:
    """Scored sites of a bin."""
    return [site for site in UNTYPED.tolist() if name in bins_of(int(study["alt"][site]), PANEL_HAPLOTYPES)]


def pooled_r2(study: dict[str, Any], values: np.ndarray, name: str, drawn: np.ndarray) -> float:
    """Squared correlation over the known genotypes of a bin, haploid ones 0 to 1, of the samples ``drawn``."""
    x, y = [], []
    for site in untyped(study, name):
        flip = 2 * study["alt"][site] > PANEL_HAPLOTYPES
        for sample in drawn.tolist():
            true, value = study["truth"][site, sample], values[site, sample]
            if not math.isnan(true):
                most = 1 if sample < HAPLOID else 2
                x.append(most - true if flip else true)
                y.append(most - value if flip else value)
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def test_r2_by_count_is_the_pooled_correlation(study: dict[str, Any]) -> None:
    report = score(study, "good")
    for name in EVERY_NAME:
        by_count = name in COUNT_NAMES
        sites = report.sites_by_count[name] if by_count else report.sites[name]
        assert sites == len(untyped(study, name)) and (sites > 3 or not by_count)
        scores = report.tools["good"]
        found = (scores.aggregate_r2_by_count if by_count else scores.aggregate_r2)[name]
        if sites:
            assert found == pytest.approx(pooled_r2(study, study["good"], name, np.arange(SAMPLES)), abs=1e-6), name
    absent = int((study["alt"][UNTYPED] % PANEL_HAPLOTYPES == 0).sum())
    assert report.sites_monomorphic_in_panel == absent > 3
    assert sum(report.sites_by_count.values()) + absent == report.sites["all"]
    assert f"with the minor allele (without {absent} sites where there is none)\n" in report.table()


def test_intervals_and_differences_by_count_use_the_same_draws(study: dict[str, Any]) -> None:
    report = score(study, "good", "bad")
    (found,) = report.differences
    for name in COUNT_NAMES:
        good, bad = (
            np.array([pooled_r2(study, study[each], name, drawn) for drawn in drawn_samples()])
            for each in ("good", "bad")
        )
        limits = report.tools["good"].aggregate_r2_by_count_interval[name]
        assert limits == pytest.approx(np.percentile(good, [2.5, 97.5]), abs=1e-6)
        assert found.interval_by_count[name] == pytest.approx(np.percentile(good - bad, [2.5, 97.5]), abs=1e-6)
        one, two = (report.tools[each].aggregate_r2_by_count[name] for each in ("good", "bad"))
        assert found.difference_by_count[name] == pytest.approx(one - two)


def carriers(study: dict[str, Any], tool: str, name: str, drawn: np.ndarray) -> tuple[int, float, float]:
    """Number, mean said and share right of a bin, counted over the samples ``drawn``."""
    said, right = [], []
    for site in untyped(study, name):
        major = 2 if 2 * study["alt"][site] > PANEL_HAPLOTYPES else 0
        for sample in drawn.tolist():
            true = study["truth"][site, sample] * (2 if sample < HAPLOID else 1)
            probabilities = study[f"{tool} gp"][site, sample].tolist()
            called = probabilities.index(max(probabilities))
            if called != major and not math.isnan(true):
                said.append(max(probabilities))
                right.append(called == true)
    return len(said), float(np.mean(said)), float(np.mean(right))


def test_called_carriers_of_every_bin(study: dict[str, Any]) -> None:
    report = score(study, "good", "bad", "bare")
    assert report.tools["bare"].called_carriers is report.tools["bare"].called_carriers_by_count is None
    assert report.tools["bare"].largest_carrier_gap is None
    gaps = {}
    for tool, name in product(("good", "bad"), EVERY_NAME):
        scores = report.tools[tool]
        assert scores.called_carriers is not None and scores.called_carriers_by_count is not None
        found = {**scores.called_carriers, **scores.called_carriers_by_count}[name]
        if not untyped(study, name):
            assert found.number == 0 and math.isnan(found.said) and math.isnan(found.interval[0])
            continue
        number, said, right = carriers(study, tool, name, np.arange(SAMPLES))
        assert (found.number, found.right) == (number, pytest.approx(right))
        assert found.said == pytest.approx(said, abs=1e-4)
        drawn = np.array([carriers(study, tool, name, each) for each in drawn_samples()])
        assert found.interval == pytest.approx(np.percentile(drawn[:, 1] - drawn[:, 2], [2.5, 97.5]), abs=1e-4)
        if number >= 100 and not name.startswith("all"):
            gaps[tool, name] = abs(said - right)
    for tool in ("good", "bad"):
        worst = report.tools[tool].largest_carrier_gap
        assert worst is not None
        assert worst.gap == pytest.approx(max(gap for (each, _), gap in gaps.items() if each == tool), abs=1e-4)
        assert worst.gap == pytest.approx(gaps[tool, worst.bin], abs=1e-4)


def test_the_report_has_carriers_in_a_table_and_in_json(study: dict[str, Any]) -> None:
    report = score(study, "good", "bare")
    lines = next(each for each in report.table().split("\n\n") if each.startswith("Called carriers")).splitlines()
    names = [*metrics.DISJOINT_BINS, *COUNT_NAMES]
    rows = ["called", "said", "right", "said - right, from", "said - right, to"]
    assert [each.split("  ")[0] for each in lines[2:]] == [f"good: {row}" for row in rows]
    cells = {line.split("  ")[0]: line.removeprefix(line.split("  ")[0]).split() for line in lines[2:]}
    values = json.loads(json.dumps(report.to_json(), allow_nan=False))["tools"]
    assert values["bare"]["called_carriers"] is None
    both = {**values["good"]["called_carriers"], **values["good"]["called_carriers_by_count"]}
    assert set(both) == set(EVERY_NAME)
    assert cells["good: called"] == [str(both[name]["number"]) for name in names]
    for row, key in (("said", "said"), ("right", "right")):
        assert cells[f"good: {row}"] == [f"{both[name][key]:.4f}" for name in names]
    assert cells["good: said - right, to"][-1] == f"{both['>100']['interval'][1]:.4f}"
    worst = values["good"]["largest_carrier_gap"]
    assert f" {worst['gap']:.4f} ({worst['bin']}) " in report.table()
    assert "said - right, from" not in score(study, "good", bootstrap=0).table()
    assert "Called carriers" not in score(study, "bare").table()
