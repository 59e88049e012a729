"""Scoring from disk: memory, scratch files and imports; and a truth with missing genotypes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pysam
import pytest

from embrag_ds.data import panel as panel_module
from embrag_ds.errors import UserError
from embrag_ds.evaluation import metrics, scoring
from embrag_ds.evaluation.report import Report
from embrag_ds.evaluation.score import ALLELE_FREQUENCY, NEAREST_HAPLOTYPE, evaluate
from embrag_ds.progress import Progress
from embrag_ds.variants import spool as spool_module
from embrag_ds.variants.output import ImputedVcfWriter
from embrag_ds.variants.phased_output import write_phased
from embrag_ds.variants.sites import SiteTable

PANEL_SAMPLES = 40


def site_table(rows: np.ndarray) -> SiteTable:
    letters = (["A"] * len(rows), ["C"] * len(rows), ["."] * len(rows))
    return SiteTable(("20",), (10_000_000,), np.zeros(len(rows), dtype=np.int32), 1000 + 10 * rows, *letters)


def write_study(folder: Path, sites: int, samples: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Write a panel, a truth, a target typed at every tenth site, and an imputed file whose values all differ."""
    rng = np.random.default_rng(seed)
    every = np.arange(sites)
    frequency = rng.choice([0.008, 0.05, 0.3, 0.9], size=sites)[:, None]
    panel = (rng.random((sites, 2 * PANEL_SAMPLES)) < frequency).astype(np.uint8)
    truth = (rng.random((sites, 2 * samples)) < np.clip(frequency, 0.1, 0.9)).astype(np.uint8)
    names = [f"T{number}" for number in range(samples)]
    write_phased(folder / "panel.vcf.gz", site_table(every), [f"P{n}" for n in range(PANEL_SAMPLES)], panel)
    write_phased(folder / "truth.vcf.gz", site_table(every), names, truth)
    write_phased(folder / "target.vcf.gz", site_table(every[::10]), names, truth[::10])
    dosage = (0.6 * truth + 0.4 * rng.random(truth.shape)).T.astype(np.float32)
    with ImputedVcfWriter(folder / "imputed.vcf.gz", site_table(every), names, "test") as out:
        out.write(0, dosage, np.zeros(sites, dtype=bool), np.zeros(dosage.shape, dtype=np.uint8))
    return {"panel": panel, "truth": truth[:, 0::2].astype(float) + truth[:, 1::2]}


def write_truth(path: Path, samples: list[int], rows: np.ndarray, counts: np.ndarray, keys: str = "GT") -> Path:
    """Write unphased genotypes [S, N], missing where ``counts`` are NaN, in all possible notations."""
    spelled = [["0/0", "0|0"], ["0/1", "1|0"], ["1/1", "1|1"], ["./.", ".|.", ".", "0/.", ".|1"]]
    names = [f"T{number}" for number in samples]
    lines = ["##fileformat=VCFv4.3", "##contig=<ID=20>", '##FORMAT=<ID=GT,Number=1,Type=String,Description="g">']
    lines.append("\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *names]))
    for row, values in zip(rows, counts, strict=True):
        codes = np.where(np.isnan(values), 3, values).astype(int)
        genotypes = [spelled[code][(row + place) % len(spelled[code])] for place, code in enumerate(codes)]
        cells = [f"{genotype}:7" if keys == "GT:DP" else genotype for genotype in genotypes]
        lines.append("\t".join(["20", str(1000 + 10 * row), ".", "A", "C", ".", ".", ".", keys, *cells]))
    with pysam.BGZFile(str(path), "wb") as out:
        out.write(("\n".join(lines) + "\n").encode())
    return path


def score(folder: Path, truth: Path | None = None, **arguments) -> Report:
    return evaluate(
        truth or folder / "truth.vcf.gz",
        arguments.pop("imputed", {"a": folder / "imputed.vcf.gz"}),
        folder / "panel.vcf.gz",
        folder / "target.vcf.gz",
        **{"bootstrap": 5, "cache_dir": folder / "cache", **arguments},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming")
    np.savez(folder / "study.npz", **write_study(folder, sites=120, samples=12))
    return folder


@pytest.fixture(scope="module")
def counts(folder: Path) -> np.ndarray:
    """True ALT counts [S, N]."""
    return np.load(folder / "study.npz")["truth"]


# --- memory, scratch, imports -------------------------------------------------------------------


def test_block_and_page_sizes_do_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(folder, baselines=True).to_json()
    monkeypatch.setattr(scoring, "BLOCK_GENOTYPES", 7 * 12)
    monkeypatch.setattr(spool_module, "_PAGE_ENTRIES", 1)
    small = score(folder, baselines=True).to_json()
    for tool in ("a", ALLELE_FREQUENCY, NEAREST_HAPLOTYPE):
        for measure, expected in whole["tools"][tool].items():
            found = small["tools"][tool][measure]
            assert json.dumps(found) == json.dumps(expected) or _close(found, expected), (tool, measure)
    assert small["sites"] == whole["sites"]


def test_progress_is_that_of_the_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []

    class Told(Progress):
        def __init__(self, *given: object):
            said.append(given)
            super().__init__(*given)  # type: ignore[arg-type]

        def advance(self, parts: float = 1) -> None:
            said.append(parts)

    monkeypatch.setattr(scoring, "BLOCK_GENOTYPES", 50 * 12)
    monkeypatch.setattr(scoring, "Progress", Told)
    score(folder)
    assert said == [("scoring", 108, "sites"), 50, 50, 8]


def _close(found: object, expected: object) -> bool:
    """Equal but for the order of sums."""
    if isinstance(expected, dict):
        return all(_close(found[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return all(_close(a, b) for a, b in zip(found, expected, strict=True))
    if expected is None or isinstance(expected, str):
        return found == expected
    return found == pytest.approx(expected, rel=1e-12, abs=1e-12)


PEAK = """
import sys
from pathlib import Path
from embrag_ds.variants import spool
from embrag_ds.evaluation import scoring
from embrag_ds.evaluation.score import evaluate
spool._PAGE_ENTRIES, scoring.BLOCK_SITES = 1024, 256  # what does not depend on the number of sites: small
folder = Path(sys.argv[1])
files = {name: folder / f"{name}.vcf.gz" for name in ("truth", "imputed", "panel", "target")}
evaluate(files["truth"], {"a": files["imputed"]}, files["panel"], files["target"], True, cache_dir=folder / "cache")
# Not ru_maxrss, which starts with the parent's memory.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def python(root: Path, *arguments: str) -> str:
    """Output of a Python process."""
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_memory_grows_by_the_site_tables_alone(root: Path, tmp_path: Path) -> None:
    """All values differ, so that nothing can be packed: those of 100 samples would be 2,400 bytes a site."""
    few, many, samples = 1000, 4000, 100
    peak = {}
    for sites in (few, many):
        folder = tmp_path / str(sites)
        folder.mkdir()
        write_study(folder, sites, samples)
        peak[sites] = 1024 * int(python(root, "-c", PEAK, str(folder)))
    assert (peak[many] - peak[few]) / (many - few) < 1600


def test_nothing_is_left_behind(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    score(folder, cache_dir=cache)
    assert [path.name[:6] for path in sorted(cache.glob("[!.]*"))] == ["panel-"]
    lines = "20\t1010\t.\tA\tC\t.\t.\t.\tGT" + 11 * "\t0|1" + "\t.|.\n"
    header = "\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT"])
    names = "".join(f"\tT{number}" for number in range(12))
    with pysam.BGZFile(str(tmp_path / "gap.vcf.gz"), "wb") as out:
        out.write(f"##fileformat=VCFv4.3\n##contig=<ID=20>\n{header}{names}\n{lines}".encode())
    with pytest.raises(UserError, match=r"gap\.vcf\.gz: 20:1010: sample T11 has GT .*missing"):
        score(folder, imputed={"a": folder / "imputed.vcf.gz", "b": tmp_path / "gap.vcf.gz"}, cache_dir=cache)
    assert [path.name[:6] for path in sorted(cache.glob("[!.]*"))] == ["panel-"]


def test_the_panel_is_packed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = score(folder, cache_dir=tmp_path)
    read: list[Path] = []
    real = panel_module.pack
    monkeypatch.setattr(panel_module, "pack", lambda path, *others: read.append(path) or real(path, *others))
    assert score(folder, cache_dir=tmp_path).to_json() == first.to_json()
    assert read == [folder / "target.vcf.gz"]


def test_a_cache_that_cannot_be_written_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: cannot write to the cache .*XDG_CACHE_HOME"):
        score(folder, cache_dir=tmp_path / "file")


def test_scoring_needs_neither_torch_nor_deepspeed(root: Path) -> None:
    modules = [f"embrag_ds.evaluation.{name}" for name in ("score", "metrics", "baselines", "report", "plots")]
    loaded = python(root, "-c", f"import sys, {', '.join(modules)}; print(*sys.modules)").split()
    assert "numpy" in loaded and not {"torch", "deepspeed"} & set(loaded)


# --- a truth with gaps --------------------------------------------------------------------------


def with_gaps(counts: np.ndarray, seed: int) -> np.ndarray:
    """Counts with a seventh of the genotypes missing, among them all of sites 31 and 62."""
    found = np.where(np.random.default_rng(seed).random(counts.shape) < 1 / 7, np.nan, counts)
    found[[31, 62]] = np.nan
    return found


@pytest.mark.parametrize("keys", ["GT", "GT:DP"])
def test_missing_truth_is_not_scored(folder: Path, counts: np.ndarray, tmp_path: Path, keys: str) -> None:
    """Compare every measure with its definition, over the genotypes that are known."""
    truth = with_gaps(counts, seed=1)
    every = np.arange(len(truth))
    report = score(folder, write_truth(tmp_path / "truth.vcf.gz", list(range(12)), every, truth, keys))
    rows = np.delete(every, every[::10])
    found = report.tools["a"]
    missing = int(np.isnan(truth[rows]).sum())
    assert report.missing_truth_genotypes == missing > 150
    assert f"; {missing} of {12 * len(rows)} truth genotypes are missing and not scored" in report.table()
    assert report.sites["all"] == len(rows)

    with pysam.VariantFile(str(folder / "imputed.vcf.gz")) as records:
        values = [[(*call["DS"], *call["GP"]) for call in record.samples.values()] for record in records]
    dosage, gp = np.split(np.array(values)[rows], [1], axis=2)
    dosage, truth = dosage[..., 0], truth[rows]
    af = np.load(folder / "study.npz")["panel"].mean(axis=1)[rows]
    known = ~np.isnan(truth)
    minor = np.where(af[:, None] > 0.5, 2 - truth, truth), np.where(af[:, None] > 0.5, 2 - dosage, dosage)
    called = gp.argmax(axis=2)
    called_minor = np.where(af[:, None] > 0.5, 2 - called, called)
    assert found.aggregate_r2["all"] == pytest.approx(np.corrcoef(minor[0][known], minor[1][known])[0, 1] ** 2)
    assert found.concordance["all"] == pytest.approx((called == truth)[known].mean())
    carrier = known & ((minor[0] > 0) | (called_minor > 0))
    assert found.non_reference_concordance["all"] == pytest.approx((called == truth)[carrier].mean())
    site_r2, iqs, constant = [], [], 0
    for site in range(len(rows)):
        here = known[site]
        if not here.any() or np.ptp(truth[site, here]) == 0:
            constant += 1
        else:
            site_r2.append(np.corrcoef(truth[site, here], dosage[site, here])[0, 1] ** 2)
        table = np.zeros((3, 3))
        for sample in np.flatnonzero(here):
            table[:, int(truth[site, sample])] += gp[site, sample]
        if here.any():
            observed, chance = np.trace(table) / table.sum(), table.sum(0) @ table.sum(1) / table.sum() ** 2
            iqs.append((observed - chance) / (1 - chance))
    assert report.sites_without_truth_variance["all"] == constant >= 2
    assert found.site_r2["all"] == pytest.approx(np.mean(site_r2))
    assert found.iqs["all"] == pytest.approx(np.mean(iqs))
    confidence = gp.max(axis=2)[known]
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(((called == truth)[known][bins == b] - confidence[bins == b]).sum()) for b in range(15)]
    assert found.calibration_error == pytest.approx(sum(gaps) / known.sum(), abs=1e-6)
    assert sum(count for *_, count in found.calibration_curve) == known.sum()


def test_a_sample_or_a_site_without_truth_changes_no_score(folder: Path, counts: np.ndarray, tmp_path: Path) -> None:
    rows, samples = np.arange(len(counts)), list(range(12))
    truth = counts.copy()
    truth[:, 4] = np.nan
    gaps = score(folder, write_truth(tmp_path / "sample.vcf.gz", samples, rows, truth), baselines=True, bootstrap=0)
    others = [number for number in samples if number != 4]
    fewer = write_truth(tmp_path / "without.vcf.gz", others, rows, counts[:, others])
    without = score(folder, fewer, baselines=True, bootstrap=0)
    assert (gaps.sites, gaps.sites_without_truth_variance) == (without.sites, without.sites_without_truth_variance)
    assert _close(gaps.to_json()["tools"], without.to_json()["tools"])

    truth = counts.copy()
    truth[[31, 62]] = np.nan
    gaps = score(folder, write_truth(tmp_path / "sites.vcf.gz", samples, rows, truth), baselines=True)
    kept = np.delete(rows, [31, 62])
    without = score(folder, write_truth(tmp_path / "kept.vcf.gz", samples, kept, counts[kept]), baselines=True)
    assert _close(gaps.to_json()["tools"], without.to_json()["tools"])
    assert gaps.sites["all"] == without.sites["all"] + 2
    assert gaps.sites_without_truth_variance["all"] == without.sites_without_truth_variance["all"] + 2
    assert (gaps.missing_truth_genotypes, without.missing_truth_genotypes) == (24, 0)
    assert "missing" not in without.table()


def test_a_truth_without_any_genotype(folder: Path, counts: np.ndarray, tmp_path: Path) -> None:
    empty = write_truth(tmp_path / "empty.vcf.gz", list(range(12)), np.arange(120), np.full(counts.shape, np.nan))
    report = score(folder, empty, baselines=True)
    assert report.missing_truth_genotypes == 12 * report.sites["all"]
    assert report.sites_without_truth_variance == report.sites
    assert report.to_json()["tools"]["a"]["aggregate_r2"] == dict.fromkeys(metrics.BIN_NAMES)
