"""Scoring of files: the sites and samples that count, the report, and the errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pysam
import pytest

from embrag_ds.cli.main import main
from embrag_ds.errors import UserError
from embrag_ds.evaluation import metrics
from embrag_ds.evaluation.score import ALLELE_FREQUENCY, NEAREST_HAPLOTYPE, evaluate
from embrag_ds.variants.phased_output import write_phased
from embrag_ds.variants.sites import SiteTable
from tests.whole_files import read_phased

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "kgp_chr20"
SITES, PANEL_SAMPLES, SAMPLES = 300, 60, 10
TYPED = np.arange(2, SITES, 6)


def site_table(rows: np.ndarray, swapped: bool = False) -> SiteTable:
    """Site table with positions 1000, 1010, ...; ``swapped`` exchanges REF and ALT."""
    return SiteTable(
        contigs=("20",),
        contig_lengths=(1_000_000,),
        contig=np.zeros(len(rows), dtype=np.int32),
        pos=1000 + 10 * rows,
        ref=["C" if swapped else "A"] * len(rows),
        alt=["A" if swapped else "C"] * len(rows),
        id=["."] * len(rows),
    )


def write_dosages(path: Path, samples, rows, dosage, gp=None, dr2=None, swapped=()) -> None:
    """Write a VCF as a tool would: DS, with GP and DR2 where given; REF and ALT exchanged at ``swapped``."""

    with pysam.BGZFile(str(path), "wb") as out:
        lines = [
            "##fileformat=VCFv4.2",
            "##contig=<ID=20,length=1000000>",
            '##INFO=<ID=DR2,Number=1,Type=Float,Description="r2">',
            '##FORMAT=<ID=DS,Number=A,Type=Float,Description="dosage">',
            '##FORMAT=<ID=GP,Number=G,Type=Float,Description="probabilities">',
            "\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *samples]),
        ]
        for number, row in enumerate(rows):
            info = "." if dr2 is None else f"DR2={dr2[number]:.6f}"
            cells = [f"{value:.6f}" for value in dosage[number]]
            if gp is not None:
                cells = [
                    f"{cell}:" + ",".join(f"{p:.6f}" for p in each)
                    for cell, each in zip(cells, gp[number], strict=True)
                ]
            columns = "C\tA" if row in swapped else "A\tC"
            fields = [
                "20",
                str(1000 + 10 * row),
                ".",
                columns,
                ".",
                "PASS",
                info,
                "DS" if gp is None else "DS:GP",
            ]
            lines.append("\t".join(fields + cells))
        out.write(("\n".join(lines) + "\n").encode())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Files of a panel, target and truth, whose haplotypes recombine panel haplotypes, and their contents."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    frequency = rng.choice([0.005, 0.03, 0.3, 0.8], size=SITES)
    panel = (rng.random((SITES, 2 * PANEL_SAMPLES)) < frequency[:, None]).astype(np.uint8)
    truth = np.empty((SITES, 2 * SAMPLES), dtype=np.uint8)
    for haplotype in range(2 * SAMPLES):
        truth[:150, haplotype] = panel[:150, rng.integers(panel.shape[1])]
        truth[150:, haplotype] = panel[150:, rng.integers(panel.shape[1])]
    samples = tuple(f"T{number}" for number in range(SAMPLES))
    every = np.arange(SITES)
    files = {name: folder / f"{name}.vcf.gz" for name in ("panel", "target", "truth")}
    write_phased(files["panel"], site_table(every), tuple(f"P{n}" for n in range(PANEL_SAMPLES)), panel)
    write_phased(files["truth"], site_table(every), samples, truth)
    write_phased(files["target"], site_table(TYPED), samples, truth[TYPED])
    counts = truth[:, 0::2].astype(float) + truth[:, 1::2]
    return {
        "folder": folder,
        "samples": samples,
        "counts": counts,
        "af": panel.mean(axis=1),
        "panel_alleles": panel,
        **files,
    }


def score(study: dict, **arguments):
    return evaluate(
        arguments.pop("truth", study["truth"]),
        arguments.pop("imputed", {}),
        study["panel"],
        arguments.pop("target", study["target"]),
        **{"bootstrap": 20, "cache_dir": study["folder"] / "cache", **arguments},
    )


def noisy(study: dict, seed: int, scale: float) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, scale, study["counts"].shape)
    return np.round(np.clip(study["counts"] + noise, 0, 2), 6)


UNTYPED = np.setdiff1d(np.arange(SITES), TYPED)


def test_scores_are_the_pooled_correlation_at_untyped_sites(study: dict, tmp_path: Path) -> None:
    """The order of samples, exchanged REF and ALT, an extra sample and typed sites make no difference."""
    dosage = noisy(study, 1, 0.3)
    dosage[TYPED] = 1.0  # wrong, but typed sites are not scored
    hom_alt = np.maximum(dosage - 1, 0)
    gp = np.stack([1 - dosage + hom_alt, dosage - 2 * hom_alt, hom_alt], axis=-1)
    order = np.random.default_rng(2).permutation(SAMPLES)
    names = [*(study["samples"][sample] for sample in order), "stranger"]
    odd = np.concatenate([dosage[:, order], np.ones((SITES, 1))], axis=1)
    odd_gp = np.concatenate([gp[:, order], np.full((SITES, 1, 3), 1 / 3)], axis=1)
    swapped = np.arange(0, SITES, 3)
    odd[swapped] = 2 - odd[swapped]
    odd_gp[swapped] = odd_gp[swapped][..., ::-1]
    write_dosages(tmp_path / "plain.vcf.gz", study["samples"], range(SITES), dosage, gp=gp)
    write_dosages(tmp_path / "odd.vcf.gz", names, range(SITES), odd, gp=odd_gp, swapped=set(swapped.tolist()))
    report = score(study, imputed={"plain": tmp_path / "plain.vcf.gz", "odd": tmp_path / "odd.vcf.gz"})
    assert report.sites["all"] == len(UNTYPED)
    minor = (study["af"] > 0.5)[:, None]
    x = np.where(minor, 2 - study["counts"], study["counts"])[UNTYPED]
    y = np.where(minor, 2 - dosage, dosage)[UNTYPED]
    maf = np.minimum(study["af"], 1 - study["af"])[UNTYPED]
    for name, member in (("all", maf >= 0), ("5-50 %", maf >= 0.05), ("1-5 %", (maf >= 0.01) & (maf < 0.05))):
        expected = np.corrcoef(x[member].ravel(), y[member].ravel())[0, 1] ** 2
        assert report.tools["plain"].aggregate_r2[name] == pytest.approx(expected, abs=1e-6)
        assert report.tools["odd"].aggregate_r2[name] == pytest.approx(expected, abs=1e-6)
    for measure in ("concordance", "non_reference_concordance", "iqs", "site_r2"):
        plain, odd_one = (getattr(report.tools[tool], measure)["all"] for tool in ("plain", "odd"))
        assert odd_one == pytest.approx(plain, abs=1e-5), measure


def test_every_tool_is_scored_at_the_sites_that_all_have(
    study: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_dosages(tmp_path / "a.vcf.gz", study["samples"], range(200), study["counts"][:200])
    write_dosages(tmp_path / "b.vcf.gz", study["samples"], range(100, 300), study["counts"][100:])
    write_dosages(tmp_path / "c.vcf.gz", study["samples"], range(SITES), study["counts"])
    three = {name: tmp_path / f"{name}.vcf.gz" for name in "abc"}
    with caplog.at_level(logging.WARNING):
        report = score(study, imputed=three, baselines=True, excluded=tmp_path / "excluded.tsv")
    scored = report.sites["all"]
    lacking = {"a": int((UNTYPED >= 200).sum()), "b": int((UNTYPED < 100).sum()), "c": 0}
    said = [each.getMessage() for each in caplog.records if "it lacks" in each.getMessage()]
    assert said == [
        f"{three[name]}: it lacks {lacking[name]} untyped sites that panel and truth have; the other {scored} are "
        "scored, for all files. If it was filtered (by DR2, say), r2 is that of sites that are easy to impute"
        for name in "ab"
    ]
    assert {name: report.harmonisation[f"imputed: {name}"]["lacking"] for name in "abc"} == lacking
    rows = [line.split("\t") for line in (tmp_path / "excluded.tsv").read_text().splitlines()[1:]]
    of = [row[0] for row in rows if row[-1] == "no site of the file matches"]
    assert {name: of.count(name) for name in "abc"} == lacking
    assert report.sites["all"] == int(((UNTYPED >= 100) & (UNTYPED < 200)).sum())
    assert report.tools["a"].aggregate_r2["all"] == pytest.approx(1.0)
    assert list(report.tools) == ["a", "b", "c", ALLELE_FREQUENCY, NEAREST_HAPLOTYPE]
    assert 0 < report.tools[ALLELE_FREQUENCY].aggregate_r2["all"] < 1


def test_a_panel_read_for_frequencies_only_gives_the_same_scores(study: dict, tmp_path: Path) -> None:
    write_dosages(tmp_path / "a.vcf.gz", study["samples"], range(SITES), noisy(study, 3, 0.4))
    streamed = score(study, imputed={"a": tmp_path / "a.vcf.gz"})
    whole = score(study, imputed={"a": tmp_path / "a.vcf.gz"}, baselines=True)
    assert streamed.to_json()["tools"]["a"] == whole.to_json()["tools"]["a"]


def test_nearest_haplotype_is_exact_for_a_copy_and_ignores_a_swapped_target(study: dict, tmp_path: Path) -> None:
    copies = study["panel_alleles"][:, : 2 * SAMPLES]
    write_phased(tmp_path / "truth.vcf.gz", site_table(np.arange(SITES)), study["samples"], copies)
    write_phased(tmp_path / "target.vcf.gz", site_table(TYPED, swapped=True), study["samples"], 1 - copies[TYPED])
    report = score(study, truth=tmp_path / "truth.vcf.gz", target=tmp_path / "target.vcf.gz", baselines=True)
    assert report.tools[NEAREST_HAPLOTYPE].aggregate_r2["all"] == pytest.approx(1.0)
    assert report.tools[NEAREST_HAPLOTYPE].concordance["all"] == 1.0


def test_other_measures_use_what_the_file_has(study: dict, tmp_path: Path) -> None:
    counts = study["counts"]
    gp = metrics.one_hot(counts.astype(int))
    dr2 = np.where(np.isnan(metrics.site_r2(counts, counts)), 0.0, np.linspace(0, 1, SITES))
    write_dosages(tmp_path / "full.vcf.gz", study["samples"], range(SITES), counts, gp=gp, dr2=dr2)
    noise = noisy(study, 4, 0.5)
    write_dosages(tmp_path / "bare.vcf.gz", study["samples"], range(SITES), noise)
    report = score(study, imputed={"full": tmp_path / "full.vcf.gz", "bare": tmp_path / "bare.vcf.gz"})
    full, bare = report.tools["full"], report.tools["bare"]
    assert (full.iqs_from, bare.iqs_from, bare.iqs) == ("GP", None, None)
    assert full.calibration_error == 0.0 and bare.calibration_error is None and bare.dr2_correlation is None
    assert full.rare_calibration_error == 0.0 and full.calibration_curve[-1][:2] == (1.0, 1.0)
    assert full.iqs["all"] == pytest.approx(1.0)
    alone = score(study, imputed={"full": tmp_path / "full.vcf.gz"})
    assert alone.tools["full"].iqs["all"] == full.iqs["all"]
    called = np.rint(noise)
    assert bare.concordance["all"] == pytest.approx((called == counts)[UNTYPED].mean())
    undefined = int((np.ptp(counts[UNTYPED], axis=1) == 0).sum())
    assert report.sites_without_truth_variance["all"] == undefined > 0


def test_dr2_is_compared_with_the_true_r2_of_its_own_site(study: dict, tmp_path: Path) -> None:
    dosage = noisy(study, 5, 0.4)
    true_r2 = np.nan_to_num(metrics.site_r2(study["counts"], dosage))
    write_dosages(tmp_path / "a.vcf.gz", study["samples"], range(SITES), dosage, dr2=true_r2)
    report = score(study, imputed={"a": tmp_path / "a.vcf.gz"})
    assert report.tools["a"].dr2_correlation["all"] == pytest.approx(1.0, abs=1e-4)


def test_intervals_are_seeded_and_differences_paired(study: dict, tmp_path: Path) -> None:
    for name, scale in (("good", 0.2), ("bad", 0.5)):
        write_dosages(tmp_path / f"{name}.vcf.gz", study["samples"], range(SITES), noisy(study, 6, scale))
    files = {name: tmp_path / f"{name}.vcf.gz" for name in ("good", "bad")}
    report = score(study, imputed=files, bootstrap=100, seed=3)
    again = score(study, imputed=files, bootstrap=100, seed=3)
    assert report.to_json() == again.to_json()
    low, high = report.tools["good"].aggregate_r2_interval["all"]
    assert low < report.tools["good"].aggregate_r2["all"] < high
    (difference,) = report.differences
    assert (difference.a, difference.b) == ("good", "bad")
    assert 0 < difference.interval["all"][0] < difference.difference["all"] < difference.interval["all"][1]


def test_populations_are_scored_apart(study: dict, tmp_path: Path) -> None:
    dosage = study["counts"].copy()
    dosage[:, 5:] = noisy(study, 7, 0.6)[:, 5:]
    write_dosages(tmp_path / "a.vcf.gz", study["samples"], range(SITES), dosage)
    table = tmp_path / "samples.tsv"
    lines = [f"{name}\t{'EUR' if number < 5 else 'AFR'}\tx" for number, name in enumerate(study["samples"])]
    table.write_text("sample\tgroup\trole\n" + "\n".join(lines) + "\n")
    report = score(study, imputed={"a": tmp_path / "a.vcf.gz"}, samples_path=table)
    assert report.populations == {"AFR": 5, "EUR": 5}
    assert report.tools["a"].populations["EUR"]["all"] == pytest.approx(1.0)
    assert report.tools["a"].populations["AFR"]["all"] < 0.9
    assert "AFR, 5 samples" in report.table()
    table.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UserError, match=r"samples\.tsv: 1 samples have no line, the first is T0"):
        score(study, imputed={"a": tmp_path / "a.vcf.gz"}, samples_path=table)


def test_table_is_aligned_and_json_is_plain(study: dict) -> None:
    report = score(study, baselines=True)
    lines = report.table().split("\n\n")[0].splitlines()
    assert [line.split("  ")[0].strip() for line in lines[2:]] == [
        "sites",
        ALLELE_FREQUENCY,
        NEAREST_HAPLOTYPE,
    ]
    assert len({len(line) for line in lines[1:]}) == 1
    values = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert values["tools"][NEAREST_HAPLOTYPE]["aggregate_r2"]["<0.1 %"] is None
    assert values["tools"][NEAREST_HAPLOTYPE]["aggregate_r2"]["all"] == pytest.approx(
        report.tools[NEAREST_HAPLOTYPE].aggregate_r2["all"]
    )
    assert "| sites |" in report.markdown() and "nan" not in report.markdown()


def test_the_summary_is_short_and_says_where_the_rest_is(study: dict, tmp_path: Path) -> None:
    counts = study["counts"]
    sure = np.where(np.arange(SITES) % 3, 0.9, 0.6)[:, None, None]
    gp = sure * metrics.one_hot(counts.astype(int)) + (1 - sure) / 3
    files = {name: tmp_path / f"{name}.vcf.gz" for name in ("one", "two")}
    write_dosages(files["one"], study["samples"], range(SITES), counts, gp=gp)
    write_dosages(files["two"], study["samples"], range(SITES), noisy(study, 9, 0.3))
    report = score(study, imputed=files)
    summary = report.summary()
    assert len(summary.splitlines()) <= 20 and max(map(len, summary.splitlines())) <= 120
    r2, calls, rest = summary.split("\n\n")
    assert report.table().startswith(f"{r2}\n\n{calls}\n\n")
    assert [line.split()[0] for line in r2.splitlines()[2:]] == ["sites", "one", "two"]
    one, two = (report.tools[name] for name in files)
    measures = (one.concordance, one.non_reference_concordance, one.iqs)
    numbers = [
        *(f"{each['all']:.4f}" for each in measures),
        f"{one.calibration_error:.4f}",
        f"{one.rare_calibration_error:.4f}",
    ]
    assert len(set(numbers)) == 4  # both concordances are 1
    assert calls.splitlines()[2].split() == ["one", *numbers]
    assert calls.splitlines()[3].split() == [
        "two",
        *(f"{each['all']:.4f}" for each in (two.concordance, two.non_reference_concordance)),
        "-",
        "-",
        "-",
    ]
    assert calls.splitlines()[4] == "IQS from GP: one; none without GP and HDS: two"
    assert rest == (
        "More tables (by allele count, 95 % intervals, called carriers, DR2): --details. Every number: --json FILE.\n"
    )
    fewer = score(study, imputed={"two": files["two"]}, bootstrap=0).summary()
    assert fewer.splitlines()[-1].startswith("More tables (by allele count, DR2):")


def test_without_bootstrap_no_interval_is_reported(study: dict) -> None:
    assert "95 %" not in score(study, baselines=True, bootstrap=0).table()


def test_faults_of_the_user_name_the_file(study: dict, tmp_path: Path) -> None:
    path = tmp_path / "short.vcf.gz"
    write_dosages(path, study["samples"][:-1], range(SITES), study["counts"][:, :-1])
    with pytest.raises(UserError, match=r"short\.vcf\.gz: 1 of the 10 samples of .*truth.* missing \(T9\)"):
        score(study, imputed={"a": path})
    write_dosages(path, study["samples"], TYPED, study["counts"][TYPED])
    with pytest.raises(UserError, match="no untyped site"):
        score(study, imputed={"a": path})
    write_dosages(path, study["samples"], range(SITES), 3 * study["counts"])
    with pytest.raises(UserError, match=r"short\.vcf\.gz: 20:\d+: sample T\d has dosage"):
        score(study, imputed={"a": path})
    with pytest.raises(UserError, match="nothing to score"):
        score(study)
    with pytest.raises(UserError, match="also in"):
        score(study, truth=study["panel"], baselines=True)
    with pytest.raises(UserError, match="belongs to a baseline"):
        score(study, imputed={NEAREST_HAPLOTYPE: path})


def test_exchanged_panel_and_target(study: dict) -> None:
    def exchanged(truth: Path, panel: Path, target: Path) -> str:
        with pytest.raises(UserError) as caught:
            evaluate(truth, {}, panel, target, baselines=True, cache_dir=study["folder"] / "cache")
        return str(caught.value)

    said = exchanged(study["truth"], study["target"], study["panel"])
    assert said.startswith(f"{study['target']}: its samples are also in the truth {study['truth']}, all 10 of both")
    assert said.endswith("give the panel to --panel, and the file of typed sites to --target")
    said = exchanged(study["truth"], study["truth"], study["target"])
    assert said.startswith(f"{study['truth']}: its samples are also in the truth")


def test_command_line(
    study: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dosages(tmp_path / "a.vcf.gz", study["samples"], range(SITES), noisy(study, 8, 0.3))
    arguments = [f"--{name}={study[name]}" for name in ("truth", "panel", "target")]
    outputs = [f"--json={tmp_path / 'out.json'}", f"--markdown={tmp_path / 'out.md'}", "--bootstrap=10"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = f"--imputed=ours={tmp_path / 'a.vcf.gz'}"
    main("evaluate", [*arguments, ours, "--baselines", *outputs])
    summary = capsys.readouterr().out
    assert summary.splitlines()[3].startswith("ours") and "--details" in summary.splitlines()[-1]
    main("evaluate", [*arguments, ours, "--baselines", "--bootstrap=10", "--details"])
    details = capsys.readouterr().out
    assert details.startswith(summary.rpartition("\n\n")[0]) and "95 % interval" in details
    assert "--details" not in details
    assert json.loads((tmp_path / "out.json").read_text())["tools"]["ours"]["aggregate_r2"]["all"] > 0.5
    assert "| ours |" in (tmp_path / "out.md").read_text()
    with pytest.raises(UserError, match=r"none\.vcf\.gz"):
        main("evaluate", [*arguments, f"--imputed={tmp_path / 'none.vcf.gz'}", "--debug"])


@pytest.mark.long
@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")
def test_baselines_on_1000_genomes(tmp_path: Path) -> None:
    """Check the measure against the README's figures, and the baseline against its own figures when it was written.

    The README does not tell how its nearest haplotype breaks ties. The mean over all haplotypes that are equally near
    comes close to its figures; the baseline, which takes the first of them, is lower.
    """
    arguments = (REAL / "truth.vcf.gz", {}, REAL / "panel.vcf.gz", REAL / "target.sparse.vcf.gz")
    report = evaluate(*arguments, baselines=True, samples_path=REAL / "samples.tsv", bootstrap=50, cache_dir=tmp_path)
    logging.getLogger(__name__).info("\n%s", report.table())
    assert (report.typed_sites, report.samples, report.sites["all"]) == (549, 250, 24_802 - 549)
    measured = [report.tools[NEAREST_HAPLOTYPE].aggregate_r2[name] for name in metrics.BIN_NAMES]
    np.testing.assert_allclose(measured, [0.1854, 0.2052, 0.3078, 0.4702, 0.7259, 0.2505, 0.7613], atol=2e-4)

    tied = tied_nearest_r2()
    logging.getLogger(__name__).info("mean over ties, 32 typed sites: %s", tied)
    readme = [0.2173, 0.2714, 0.4041, 0.5840, 0.8031, 0.3290, 0.8250]
    np.testing.assert_allclose([tied[name] for name in metrics.BIN_NAMES], readme, atol=0.06)


def tied_nearest_r2() -> dict[str, float]:
    """Aggregate r2 of the mean over all nearest haplotypes, in blocks of 32 typed sites without context."""
    panel, truth, target = (read_phased(REAL / f"{name}.vcf.gz") for name in ("panel", "truth", "target.sparse"))
    assert list(truth.sites.identities()) == list(panel.sites.identities()) and truth.samples == target.samples
    row = {key: number for number, key in enumerate(panel.sites.identities())}
    typed = np.array([row[key] for key in target.sites.identities()])
    alleles = panel.alleles.astype(np.float32)
    copied = np.empty(truth.alleles.shape, dtype=np.float32)
    middles = [int(typed[n - 1] + typed[n]) // 2 for n in range(32, len(typed), 32)]
    for first, begin, end in zip(range(0, len(typed), 32), [0, *middles], [*middles, len(alleles)], strict=True):
        query = target.alleles[first : first + 32].astype(np.float32)
        reference = alleles[typed[first : first + 32]]
        distance = query.T @ (1 - reference) + (1 - query).T @ reference
        nearest = (distance == distance.min(axis=1, keepdims=True)).astype(np.float32)
        copied[begin:end] = alleles[begin:end] @ (nearest / nearest.sum(axis=1, keepdims=True)).T
    untyped = np.setdiff1d(np.arange(len(alleles)), typed)
    accumulator = metrics.AggregateR2(len(truth.samples))
    counts = truth.alleles[:, 0::2].astype(float) + truth.alleles[:, 1::2]
    dosage = copied[:, 0::2] + copied[:, 1::2]
    accumulator.add(counts[untyped], dosage[untyped], panel.alleles.mean(axis=1)[untyped])
    return accumulator.result()
