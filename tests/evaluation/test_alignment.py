"""Truth and imputed files as people have them: haploid samples, a truth of dosages, names that PLINK wrote."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pysam.bcftools
import pytest

from embrag_ds.data.programs import run_logged
from embrag_ds.errors import UserError
from embrag_ds.evaluation.alignment import columns_of
from embrag_ds.evaluation.external_tools import TOOLS
from embrag_ds.evaluation.report import Report
from embrag_ds.evaluation.score import ALLELE_FREQUENCY, NEAREST_HAPLOTYPE, evaluate
from embrag_ds.variants.records import VariantReader

ROOT = Path(__file__).resolve().parents[2]
CHR_X = ROOT.parent / "shared" / "data" / "chrX_kgp26" / "chrX.kgp26.phased.vcf.gz"
SITES, PANEL_SAMPLES, SAMPLES = 90, 30, 8
MALES = np.array([True, False] * 4)
TYPED = np.arange(0, SITES, 9)
UNTYPED = np.setdiff1d(np.arange(SITES), TYPED)
DIPLOID_END = 30
"""Site at which males become haploid, as where a pseudo-autosomal region ends."""
HAPLOID = (np.arange(SITES)[:, None] >= DIPLOID_END) & MALES
Cell = Callable[[int, int], str]


def write(path: Path, samples: list[str], keys: str, cell: Cell, rows: np.ndarray, swapped: bool = False) -> Path:
    """Write a VCF whose columns are ``cell(row, sample)``, with REF and ALT exchanged if ``swapped``."""
    lines = ["##fileformat=VCFv4.2", '##INFO=<ID=IMP,Number=0,Type=Flag,Description="i">']
    lines.append("\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *samples]))
    for row in rows.tolist():
        alleles = "C\tA" if swapped else "A\tC"
        cells = [cell(row, sample) for sample in range(len(samples))]
        lines.append(f"X\t{1000 + 10 * row}\t.\t{alleles}\t.\t.\t.\t{keys}\t" + "\t".join(cells))
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


class Study:
    """Panel, target and truth of males, haploid from site DIPLOID_END on, and females; and imputed haplotypes."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.folder = folder
        self.samples = [f"T{number}" for number in range(SAMPLES)]
        frequency = rng.choice([0.02, 0.3, 0.8], size=SITES)[:, None, None]
        panel = (rng.random((SITES, PANEL_SAMPLES, 2)) < frequency).astype(int)
        self.alleles = (rng.random((SITES, SAMPLES, 2)) < frequency).astype(int)
        self.alleles[HAPLOID, 1] = self.alleles[HAPLOID, 0]
        self.hds = np.round(0.7 * self.alleles + 0.3 * rng.random(self.alleles.shape), 3)
        self.hds[HAPLOID, 1] = self.hds[HAPLOID, 0]
        self.panel_af = panel.mean(axis=(1, 2))
        every = np.arange(SITES)
        names = [f"P{number}" for number in range(PANEL_SAMPLES)]
        self.panel = write(folder / "panel.vcf", names, "GT", lambda r, s: "|".join(map(str, panel[r, s])), every)
        self.truth = write(folder / "truth.vcf", self.samples, "GT", self.gt, every)
        self.target = write(folder / "target.vcf", self.samples, "GT", self.gt, TYPED)

    def gt(self, row: int, sample: int, both: bool = False) -> str:
        a, b = self.alleles[row, sample].tolist()
        return f"{a}" if HAPLOID[row, sample] and not both else f"{a}|{b}"

    def ours(self, row: int, sample: int, swapped: bool = False) -> str:
        """GT:DS:HDS:GP, as of this package and minimac4."""
        alleles, hds = self.alleles[row, sample], self.hds[row, sample]
        if swapped:
            alleles, hds = 1 - alleles, 1 - hds
        if HAPLOID[row, sample]:
            return f"{alleles[0]}:{hds[0]:.3f}:{hds[0]:.3f}:{1 - hds[0]:.3f},{hds[0]:.3f}"
        a, b = hds.tolist()
        gp = f"{(1 - a) * (1 - b):.6f},{a * (1 - b) + b * (1 - a):.6f},{a * b:.6f}"
        return f"{alleles[0]}|{alleles[1]}:{a + b:.3f}:{a:.3f},{b:.3f}:{gp}"

    def beagle(self, row: int, sample: int) -> str:
        """GT:DS:AP1:AP2:GP, of which a haploid sample lacks the last two."""
        genotype, dosage, hds, gp = self.ours(row, sample).split(":")
        first, _, second = hds.partition(",")
        return f"{genotype}:{dosage}:{first}:{second or '.'}:{gp if second else '.'}"

    def dosage_only(self, row: int, sample: int) -> str:
        """DS, which does not tell the ploidy."""
        return self.ours(row, sample).split(":")[1]

    def homozygous(self, row: int, sample: int) -> str:
        """GT:DS:GP of a tool that writes a haploid sample as a homozygote."""
        if not HAPLOID[row, sample]:
            genotype, dosage, _, gp = self.ours(row, sample).split(":")
            return f"{genotype}:{dosage}:{gp}"
        p = self.hds[row, sample, 0]
        return f"{self.gt(row, sample, both=True)}:{2 * p:.3f}:{1 - p:.3f},0,{p:.3f}"

    def write(self, name: str, keys: str, cell: Cell, **how: bool) -> Path:
        return write(self.folder / f"{name}.vcf", self.samples, keys, cell, np.arange(SITES), **how)

    def score(self, imputed: dict[str, Path], truth: Path | None = None, **arguments) -> Report:
        files = (truth or self.truth, imputed, self.panel, self.target)
        return evaluate(*files, **{"bootstrap": 5, "cache_dir": self.folder / "cache", **arguments})

    def expected_r2(self, halve: bool = True) -> float:
        """Aggregate r2 of all sites: a haploid genotype counts 0 or 1, or 0 or 2 unless ``halve``."""
        x, y = self.alleles.sum(axis=2).astype(float), self.hds.sum(axis=2)
        major = self.panel_af[:, None] > 0.5
        x, y = np.where(major, 2 - x, x), np.where(major, 2 - y, y)
        scale = np.where(HAPLOID & halve, 0.5, 1.0)
        return np.corrcoef((scale * x)[UNTYPED].ravel(), (scale * y)[UNTYPED].ravel())[0, 1] ** 2


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("ploidy"))


def close(found: object, expected: object) -> bool:
    """Whether two reports agree but for rounding."""
    if isinstance(expected, dict):
        return all(close(found[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return all(close(a, b) for a, b in zip(found, expected, strict=True))
    return found == (expected if expected is None else pytest.approx(expected, abs=2e-5))


def test_haploid_samples_score_alike_however_they_are_written(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="embrag_ds")
    ours = "GT:DS:HDS:GP"
    files = {
        "ours": study.write("ours", ours, study.ours),
        "swapped": study.write("swapped", ours, lambda r, s: study.ours(r, s, swapped=True), swapped=True),
        "beagle": study.write("beagle", "GT:DS:AP1:AP2:GP", study.beagle),
        "homozygous": study.write("homozygous", "GT:DS:GP", study.homozygous),
    }
    report = study.score(files)
    assert report.tools["ours"].aggregate_r2["all"] == pytest.approx(study.expected_r2(), abs=1e-5)
    assert abs(study.expected_r2() - study.expected_r2(halve=False)) > 1e-3
    expected = report.to_json()["tools"]["ours"]
    for name in ("swapped", "beagle", "homozygous"):
        assert close(report.to_json()["tools"][name], expected), name
    count = int(HAPLOID[UNTYPED].sum())
    assert f"{count} of {len(UNTYPED) * SAMPLES} truth genotypes are haploid" in caplog.text


def test_measures_of_haploid_samples_are_those_of_their_definitions(study: Study) -> None:
    files = {"gp": study.write("gp", "GT:DS:HDS:GP", study.ours), "ds": study.write("ds", "DS", study.dosage_only)}
    report = study.score(files)
    truth = np.where(HAPLOID, study.alleles[..., 0], study.alleles.sum(axis=2))
    dosage = np.where(HAPLOID, study.hds[..., 0], study.hds.sum(axis=2))
    site_r2 = [np.corrcoef(truth[row], dosage[row])[0, 1] ** 2 for row in UNTYPED if np.ptp(truth[row])]
    assert report.tools["gp"].site_r2["all"] == pytest.approx(np.mean(site_r2), abs=1e-5)
    a, b = study.hds[..., 0], study.hds[..., 1]
    most_likely = np.stack([(1 - a) * (1 - b), a * (1 - b) + b * (1 - a), a * b], axis=2).argmax(axis=2)
    called = np.where(HAPLOID, a > 0.5, most_likely)
    assert report.tools["gp"].concordance["all"] == pytest.approx((called == truth)[UNTYPED].mean())
    called = np.where(HAPLOID, dosage > 0.5, np.rint(dosage))
    assert report.tools["ds"].concordance["all"] == pytest.approx((called == truth)[UNTYPED].mean())
    assert report.tools["ds"].aggregate_r2["all"] == pytest.approx(study.expected_r2(), abs=1e-5)


def test_the_truth_decides_on_the_scale(study: Study) -> None:
    """A truth with homozygotes for haploid samples scores all files on the diploid scale."""
    truth = study.write("homozygous-truth", "GT", lambda r, s: study.gt(r, s, both=True))
    files = {
        "ours": study.write("ours-2", "GT:DS:HDS:GP", study.ours),
        "homozygous": study.write("homozygous-2", "GT:DS:GP", study.homozygous),
    }
    report = study.score(files, truth)
    assert report.tools["ours"].aggregate_r2["all"] == pytest.approx(study.expected_r2(halve=False), abs=1e-5)
    assert close(report.to_json()["tools"]["homozygous"], report.to_json()["tools"]["ours"])


def test_baselines_are_scored_at_haploid_samples(study: Study) -> None:
    report = study.score({"a": study.write("ours-8", "GT:DS:HDS:GP", study.ours)}, baselines=True)
    assert report.tools["a"].aggregate_r2["all"] == pytest.approx(study.expected_r2(), abs=1e-5)
    scale = np.where(HAPLOID, 0.5, 1.0)[UNTYPED]
    minor = np.minimum(study.panel_af, 1 - study.panel_af)[UNTYPED, None]
    major = study.panel_af[UNTYPED, None] > 0.5
    counts = study.alleles.sum(axis=2)[UNTYPED]
    x, y = scale * np.where(major, 2 - counts, counts), scale * 2 * minor
    expected = np.corrcoef(x.ravel(), y.ravel())[0, 1] ** 2
    assert report.tools[ALLELE_FREQUENCY].aggregate_r2["all"] == pytest.approx(expected, abs=1e-5)
    assert 0 <= report.tools[NEAREST_HAPLOTYPE].aggregate_r2["all"] <= 1


def test_dosage_of_a_haploid_sample_above_1_without_gt_is_an_error(study: Study) -> None:
    path = study.write("two", "DS", lambda r, s: f"{2 * study.alleles[r, s, 0]}")
    with pytest.raises(UserError, match=r"two\.vcf: X:1\d+: sample T\d has dosage 2, but is haploid in .*truth\.vcf"):
        study.score({"a": path})


def test_truth_of_dosages(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    """Its r2 is that of the dosages; genotypes are compared with the nearest ones."""
    dosage = np.round(0.9 * study.alleles.sum(axis=2) + 0.1, 3)
    truth = study.write("ds-truth", "DS:DP", lambda r, s: "." if (r, s) == (40, 3) else f"{dosage[r, s]}:7")
    called = study.write("called-truth", "GT", lambda r, s: "./." if (r, s) == (40, 3) else study.gt(r, s, both=True))
    imputed = {"a": study.write("ours-3", "GT:DS:GP", study.homozygous)}
    report, expected = study.score(imputed, truth), study.score(imputed, called)
    assert "records lack GT; their dosages are the truth" in caplog.text
    assert report.missing_truth_genotypes == expected.missing_truth_genotypes == 1
    for measure in ("aggregate_r2", "concordance", "non_reference_concordance", "iqs", "calibration_error"):
        assert close(report.to_json()["tools"]["a"][measure], expected.to_json()["tools"]["a"][measure]), measure
    noisy = study.write("noisy-truth", "DS", lambda r, s: f"{min(2, dosage[r, s] + 0.04 * ((r + s) % 5)):.3f}")
    assert study.score(imputed, noisy).tools["a"].aggregate_r2["all"] < report.tools["a"].aggregate_r2["all"]


def test_left_over_dosages_of_a_truth_do_not_count(study: Study) -> None:
    imputed = {"a": study.write("ours-4", "GT:DS:HDS:GP", study.ours)}
    again = study.write("imputed-before", "GT:DS:GP", lambda r, s: f"{study.gt(r, s)}:{(r + s) % 3}:0.2,0.2,0.2")
    assert study.score(imputed, again).to_json()["tools"] == study.score(imputed).to_json()["tools"]


def test_monomorphic_truth_without_alt_is_scored(study: Study) -> None:
    """Sites where no truth sample has the ALT are sites of the truth with the count 0."""
    study_alleles = study.alleles.copy()
    try:
        study.alleles[50:60] = 0
        polymorphic = study.write("zeros", "GT", study.gt)
        text = polymorphic.read_text(encoding="utf-8").split("\n")
        lines = [
            line.replace("\tA\tC\t", "\tA\t.\t") if line[:2] == "X\t" and 1500 <= int(line[2:6]) < 1600 else line
            for line in text
        ]
        without = study.folder / "without.vcf"
        without.write_text("\n".join(lines), encoding="utf-8")
    finally:
        study.alleles = study_alleles
    imputed = {"a": study.write("ours-5", "GT:DS:HDS:GP", study.ours)}
    assert study.score(imputed, without).to_json()["tools"] == study.score(imputed, polymorphic).to_json()["tools"]


def test_probabilities_may_lack_where_targets_are_typed(study: Study) -> None:
    files = {
        name: study.write(name, "GT:DS:HDS:GP", study.ours) for name in ("gp-everywhere", "gp-at-untyped", "gp-nowhere")
    }
    for name, without in (("gp-at-untyped", TYPED), ("gp-nowhere", np.arange(SITES))):
        lines = files[name].read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines):
            if line[:2] == "X\t" and (int(line[2:6]) - 1000) // 10 in without:
                columns = [column.split(":")[0] for column in line.split("\t")]
                lines[number] = "\t".join(columns)
        files[name].write_text("\n".join(lines), encoding="utf-8")
    scores = {name: study.score({"a": path}).to_json()["tools"]["a"] for name, path in files.items()}
    assert scores["gp-at-untyped"] == scores["gp-everywhere"]
    assert scores["gp-nowhere"]["calibration_error"] is None


def iqs_by_hand(study: Study) -> float:
    """Mean IQS of the untyped sites, from the products of haplotype probabilities; a haploid genotype has one."""
    found = []
    for row in UNTYPED:
        table = np.zeros((3, 3))  # imputed genotype by true genotype
        for sample in range(SAMPLES):
            a, b = study.hds[row, sample].tolist()
            gp = [1 - a, 0, a] if HAPLOID[row, sample] else [(1 - a) * (1 - b), a * (1 - b) + b * (1 - a), a * b]
            table[:, study.alleles[row, sample].sum()] += gp
        observed = np.trace(table) / SAMPLES
        chance = float(table.sum(axis=0) @ table.sum(axis=1)) / SAMPLES**2
        found.append((observed - chance) / (1 - chance))
    return float(np.mean(found))


def test_iqs_is_of_the_file_alone(study: Study) -> None:
    """From GP, or else from haplotypes: the same number, whatever the file is compared with."""

    def haplotypes(row: int, sample: int, swapped: bool = False) -> str:
        return ":".join(study.ours(row, sample, swapped).split(":")[:3])

    def other_hds(row: int, sample: int) -> str:
        genotype, dosage, hds, gp = study.ours(row, sample).split(":")
        return f"{genotype}:{dosage}:{'0.5,0.5' if ',' in hds else '0.5'}:{gp}"

    files = {
        "gp": study.write("iqs-gp", "GT:DS:HDS:GP", study.ours),
        "both": study.write("iqs-both", "GT:DS:HDS:GP", other_hds),
        "hds": study.write("iqs-hds", "GT:DS:HDS", haplotypes),
        "swapped": study.write("iqs-swapped", "GT:DS:HDS", lambda r, s: haplotypes(r, s, swapped=True), swapped=True),
        "ap": study.write("iqs-ap", "GT:DS:AP1:AP2", lambda r, s: study.beagle(r, s).rpartition(":")[0]),
        "ds": study.write("iqs-ds", "DS", study.dosage_only),
    }
    report = study.score(files, baselines=True)
    expected = iqs_by_hand(study)
    for name, kind in (
        ("gp", "GP"),
        ("both", "GP"),
        *((each, "haplotype probabilities") for each in ("hds", "swapped", "ap")),
    ):
        scores = report.tools[name]
        assert scores.iqs is not None and scores.iqs_from == kind
        assert scores.iqs["all"] == pytest.approx(expected, abs=1e-5), name
    assert report.tools["ds"].iqs is report.tools["ds"].iqs_from is None
    line = "IQS from GP: gp, both; from haplotype probabilities: hds, swapped, ap; "
    assert f"\n{line}none without GP and HDS: ds, {ALLELE_FREQUENCY}, {NEAREST_HAPLOTYPE}\n" in report.summary()
    for name, path in files.items():
        alone = study.score({name: path}).to_json()["tools"][name]
        assert alone["iqs"] == report.to_json()["tools"][name]["iqs"]
    homozygous = study.write("iqs-truth", "GT", lambda r, s: study.gt(r, s, both=True))
    assert study.score({"a": files["hds"]}, homozygous).tools["a"].iqs["all"] == pytest.approx(expected, abs=1e-5)


def test_iqs_where_hds_is_left_out(study: Study) -> None:
    """PLINK 2 leaves out HDS where both haplotypes have half of DS."""

    def cell(row: int, sample: int) -> str:
        a, b = study.hds[row, sample].tolist()
        alleles, ds = study.gt(row, sample), a if HAPLOID[row, sample] else a + b
        if sample % 3:
            both = f"{a:.3f}" if HAPLOID[row, sample] else f"{a:.3f},{b:.3f}"
            return f"{alleles}:{ds:.3f}:{both}"
        half = f"{ds:.4f}" if HAPLOID[row, sample] else f"{ds / 2:.4f},{ds / 2:.4f}"
        return f"{alleles}:{ds:.3f}:{'.' if left_out else half}"

    left_out = False
    whole = study.score({"a": study.write("hds-whole", "GT:DS:HDS", cell)}).tools["a"].iqs
    left_out = True
    found = study.score({"a": study.write("hds-left-out", "GT:DS:HDS", cell)}).tools["a"].iqs
    assert whole is not None and found is not None
    assert found["all"] == pytest.approx(whole["all"], abs=1e-6)


@pytest.mark.parametrize("joined", ["T{0}_T{0}", "0_T{0}"])
def test_names_that_plink_joined(study: Study, joined: str) -> None:
    """The error's command, followed literally, gives a file that is scored."""
    names = [joined.format(number) for number in range(SAMPLES)]
    path = write(study.folder / f"{joined[0]}.vcf", names, "GT:DS:HDS:GP", study.ours, np.arange(SITES))
    with pytest.raises(UserError, match=rf"its sample {names[0]} is T0 in .*truth\.vcf, as PLINK joins") as caught:
        study.score({"a": path})
    command = str(caught.value).partition("rename all such samples: ")[2].split(" && ")
    sed = command[0].partition(" | ")[2].removesuffix(" > names")
    renamed = subprocess.run(["sh", "-c", sed], input="\n".join(names), capture_output=True, text=True, check=True)
    assert renamed.stdout.split() == study.samples
    list_file = study.folder / "names"
    list_file.write_text(renamed.stdout + "\n", encoding="utf-8")
    out = study.folder / "renamed.vcf"
    pysam.bcftools.reheader("-s", str(list_file), "-o", str(out), str(path), catch_stdout=False)
    assert study.score({"a": out}).samples == SAMPLES
    with pytest.raises(UserError, match=rf"{path.name}: its sample {names[0]} is T0 in .*ours-6"):
        study.score({"a": study.write("ours-6", "GT:DS:HDS:GP", study.ours)}, path)


def test_names_with_underscores_are_not_taken_apart() -> None:
    files = Path("imputed"), Path("truth")
    assert columns_of(("T1", "T1_T1"), ("T1_T1", "0_T1", "T1"), *files).tolist() == [2, 0]
    with pytest.raises(UserError, match=r"imputed: 1 of the 2 samples of truth are missing \(T_2\)"):
        columns_of(("T1", "T_2"), ("T1", "T2"), *files)


def test_errors_name_the_file_at_fault(study: Study) -> None:
    good = study.write("ours-7", "GT:DS:HDS:GP", study.ours)
    scaled = study.write("log10", "GT:DS:GP", lambda r, s: "0|0:0.1:-0.05,-1.2,-5")
    with pytest.raises(UserError, match=r"log10\.vcf: X:1000: sample T0 has GP .* log10-scaled, .* so that DS counts"):
        study.score({"good": good, "bad": scaled})
    with pytest.raises(UserError, match=r"broken\.vcf: X:1000: sample T0 has the genotype '0\|7', which has an allele"):
        study.score({"good": good}, study.write("broken", "GT", lambda r, s: "0|7"))
    with pytest.raises(UserError, match=r"nothing\.vcf: X:1000: FORMAT DP has no .*; give .* genotypes \(GT\)"):
        study.score({"good": good}, study.write("nothing", "DP", lambda r, s: "7"))


@pytest.mark.real
@pytest.mark.skipif(not CHR_X.exists(), reason=f"no real data at {CHR_X}")
@pytest.mark.skipif(not all(map(shutil.which, ("beagle", "minimac4"))), reason="beagle and minimac4 are not installed")
def test_beagle_and_minimac_on_chromosome_x(tmp_path: Path) -> None:
    """Both keep males haploid; pooled r2 is that of their DS fields as they are written."""
    with VariantReader(CHR_X) as vcf:
        every = vcf.samples
    truth_samples = ["HG00113", "HG00114", "HG00116", "HG00119", "HG00120", "HG00121"]
    files = {name: tmp_path / f"{name}.vcf.gz" for name in ("panel", "truth", "target")}
    for name, chosen in (("panel", [s for s in every if s not in truth_samples]), ("truth", truth_samples)):
        region = ("-r", "X:2700000-6000000")
        pysam.bcftools.view(
            "-Oz", "-s", ",".join(chosen), *region, "-o", str(files[name]), str(CHR_X), catch_stdout=False
        )
    kept = tmp_path / "positions"
    sites = pysam.bcftools.query("-f", "%CHROM\t%POS\n", str(files["truth"])).splitlines()
    kept.write_text("\n".join(sites[::5]) + "\n", encoding="utf-8")
    pysam.bcftools.view("-Oz", "-T", str(kept), "-o", str(files["target"]), str(files["truth"]), catch_stdout=False)
    for path in files.values():
        pysam.tabix_index(str(path), preset="vcf", force=True, csi=True)
    imputed = {
        name: TOOLS[name](files["panel"], files["target"], None, tmp_path, 1, run_logged)
        for name in ("beagle", "minimac4")
    }
    report = evaluate(files["truth"], imputed, files["panel"], files["target"], bootstrap=0, cache_dir=tmp_path)

    def dosages(path: Path, key: str) -> dict[str, list[str]]:
        rows = pysam.bcftools.query("-f", f"%POS:%REF:%ALT[ %{key}]\n", str(path)).splitlines()
        return {row.split()[0]: row.split()[1:] for row in rows}

    typed = set(dosages(files["target"], "GT"))
    truth = {site: calls for site, calls in dosages(files["truth"], "GT").items() if site not in typed}
    x = np.array([[sum(map(int, call.split("|"))) for call in calls] for calls in truth.values()], dtype=float)
    most = np.array([[call.count("|") + 1 for call in calls] for calls in truth.values()])
    assert (most == 1).all(axis=0).sum() == 4 and report.sites["all"] == len(truth) > 1000
    panel = dosages(files["panel"], "GT")
    alleles = [[int(allele) for call in panel[site] for allele in call.split("|")] for site in truth]
    major = np.array([np.mean(each) for each in alleles])[:, None] > 0.5
    for name, path in imputed.items():
        found = dosages(path, "DS")
        y = np.array([found[site] for site in truth], dtype=float)
        x_minor, y_minor = np.where(major, most - x, x), np.where(major, most - y, y)
        expected = np.corrcoef(x_minor.ravel(), y_minor.ravel())[0, 1] ** 2
        assert report.tools[name].aggregate_r2["all"] == pytest.approx(expected, abs=1e-6), name
        assert expected > 0.5
