"""The page of an imputed file: its numbers are those of a slow reader, whatever program wrote the file."""

from __future__ import annotations

import gzip
import math
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pysam
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.reports import imputed_facts, samples_part
from embrag_ds.reports.imputed_facts import read_imputed
from embrag_ds.reports.samples_part import Quality, outliers
from embrag_ds.reports.sites_part import Contig, Density, SiteTallies
from embrag_ds.variants.output import EVERYTHING, OutputOptions
from embrag_ds.variants.sites import SiteTable
from tests.reports.imputed_oracle import expected, gaps_of, records_of
from tests.reports.pages import Parsed
from tests.variants.imputed_files import Imputed, random_imputed, write

Report = Callable[..., Parsed]
Refused = Callable[..., str]
NAMES = ["<b>", 'a"b', "c&d;", "e'f", "--></script>", "Ωmega", "s6", "s7", "s8", "s9", "s10", "s11"]
SECTIONS = ["Summary", "Estimated r2", "Sites and typed sites", "Samples", "Left out"]


def many_sites(sizes: Sequence[int] = (300, 60, 1), splits: bool = False, scale: int = 1) -> SiteTable:
    """Sites of three contigs at random places, ``scale`` base pairs or more apart; with ``splits``, some are split from
    one record of the panel.
    """
    rng = np.random.default_rng(3)
    contig = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    pos = np.concatenate([np.sort(rng.choice(np.arange(1, 90_000), size, replace=False)) for size in sizes])
    record = np.arange(len(pos))
    alt = ["C"] * len(pos)
    if splits:
        for row in range(4, len(pos) - 1, 9):
            if contig[row] == contig[row + 1]:
                pos[row + 1], record[row + 1], alt[row + 1] = pos[row], record[row], "G"
    return SiteTable(
        contigs=("1", "X", "HLA*01:01", "unused")[: len(sizes) + 1],
        contig_lengths=(100_000, 0, 5, 7)[: len(sizes) + 1],
        contig=contig,
        pos=pos * scale,
        ref=["A"] * len(pos),
        alt=alt,
        id=["."] * len(pos),
        record=record,
    )


def imputed_at(sites: SiteTable, haploid: str = "none", missing: bool = False) -> Imputed:
    """Dosages with rare and common sites."""
    found = random_imputed(len(NAMES), len(sites), haploid, missing)
    frequency = np.random.default_rng(8).random(len(sites)) ** 6
    rare = (found.dosage * frequency).astype(np.float32)
    return Imputed(rare, found.typed, found.alleles, found.missing, found.haploid)


def check(found: Parsed, path: Path, marks: bool = True) -> None:
    """Compare a page's numbers with those of the slow reader."""
    numbers, oracle = found.numbers, expected(path, marks)
    assert found.headings == SECTIONS
    assert numbers["records"] == oracle["records"]
    assert numbers["sites"] == sum(each["sites"] for each in oracle["contigs"])
    assert numbers["typed"] == (sum(each["typed"] for each in oracle["contigs"]) if marks else None)
    assert [each["maf"] for each in numbers["r2"]] == [each["maf"] for each in oracle["r2"]]
    for got, wanted in zip(numbers["r2"], oracle["r2"], strict=True):
        assert got["mean"] == (wanted["mean"] and pytest.approx(wanted["mean"], rel=1e-12))
        assert {**got, "mean": None} == {**wanted, "mean": None}
    for got, wanted in zip(numbers["contigs"], oracle["contigs"], strict=True):
        if not marks:
            wanted |= {"typed": None, "longest_gap": None}
        assert {name: got[name] for name in wanted} == wanted
    assert [tuple(gap.values()) for gap in numbers["gaps"]] == (oracle["gaps"] if marks else [])
    assert numbers["number_of_samples"] == len(oracle["samples"])
    for got, wanted in zip(numbers["samples"], oracle["samples"], strict=True):
        for name in ("certainty", "heterozygosity"):
            value = wanted[name]
            wanted[name] = value and pytest.approx(value, rel=1e-9)
        assert got == wanted


@pytest.mark.parametrize("container", ["vcf.gz", "bcf"])
@pytest.mark.parametrize(("haploid", "missing"), [("none", False), ("some", True), ("all", False)])
def test_our_own_files(report: Report, tmp_path: Path, container: str, haploid: str, missing: bool) -> None:
    sites = many_sites()
    path = write(tmp_path / f"out.{container}", sites, imputed_at(sites, haploid, missing), step=50, samples=NAMES)
    found = report(path)
    check(found, path)
    assert found.numbers["sources"] == ["test"] and "written by: test" in found.text
    assert sum(each["haploid"] for each in found.numbers["samples"]) > 0 or haploid == "none"
    assert [row[0] for row in found.table("12 samples").rows] == NAMES
    assert found.numbers["frequencies_from"] == {"INFO AF": 361, "the dosages": 0, "nowhere": 0}
    rows = found.table("Sites by contig").rows
    assert [row[0] for row in rows] == ["1", "X", "HLA*01:01"] and rows[0][1] == "300"
    assert found.numbers["contigs"][0]["length"] == 100_000 and found.numbers["contigs"][1]["length"] == 0
    assert len(found.table("The 20 longest gaps").rows) == 20


OPTIONS = [
    OutputOptions(formats=("GT", "DS")),
    OutputOptions(formats=("GT",)),
    OutputOptions(formats=("DS",)),
    OutputOptions(formats=("HDS",)),
    OutputOptions(formats=("GP",)),
    OutputOptions(formats=("GT", "HDS")),
    OutputOptions(sites_only=True),
    OutputOptions(typed_only=True),
    OutputOptions(min_r2=0.3),
    OutputOptions(join_multiallelic=True),
    OutputOptions(join_multiallelic=True, formats=("GT", "HDS")),
]


@pytest.mark.parametrize("container", ["vcf.gz", "bcf"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_files_with_fewer_fields(report: Report, tmp_path: Path, options: OutputOptions, container: str) -> None:
    sites = many_sites(splits=True)
    haploid = "none" if options.formats == ("DS",) else "some"  # DS alone does not tell one
    path = write(tmp_path / f"out.{container}", sites, imputed_at(sites, haploid), options, step=50, samples=NAMES)
    found = report(path)
    check(found, path)
    if options.sites_only:
        assert "no sample columns" in found.text and found.numbers["samples"] == []
    elif options.formats == ("GT",):
        assert "from nothing, for FORMAT has GT alone" in found.text
        assert {each["certainty"] for each in found.numbers["samples"]} == {None}
    if options.typed_only:
        assert "The file has no imputed site." in found.text


HEADERS = {
    "beagle": ['##source="beagle.27Feb25.75f.jar"', "DR2", "IMP", "AF"],
    "minimac4": ["##source=minimac v4.1.6", "R2", "IMPUTED", "TYPED", "AF"],
    "bare": [],
}
FLAGS = {"IMP", "IMPUTED", "TYPED"}


def written_by(path: Path, program: str, records: Sequence[str], samples: Sequence[str] = ("A", "B")) -> Path:
    """A file as another program writes it, from records of text with blanks."""
    lines = ["##fileformat=VCFv4.2"]
    for each in HEADERS[program]:
        kind = "Number=0,Type=Flag" if each in FLAGS else "Number=A,Type=Float"
        lines.append(each if each.startswith("##") else f'##INFO=<ID={each},{kind},Description="x">')
    columns = [
        "#CHROM",
        "POS",
        "ID",
        "REF",
        "ALT",
        "QUAL",
        "FILTER",
        "INFO",
        *(["FORMAT", *samples] if samples else []),
    ]
    lines += ["\t".join(columns), *(record.replace(" ", "\t") for record in records)]
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return path


BEAGLE = [
    "chr1 10 . A T . PASS DR2=0.87;AF=0.3;IMP GT:DS:AP1:AP2:GP 0|1:1.1:0.2:0.9:0.08,0.74,0.18 0|0:0:0:0:1,0,0",
    "chr1 12 . A T . PASS DR2=1.00;AF=0.5 GT:DS:AP1:AP2:GP 0|1:1:0:1:0,1,0 1|1:2:1:1:0,0,1",
    "chr1 12 . G T,C . PASS DR2=0.10,0.85;AF=0.004,0.2;IMP GT:DS:AP1:AP2 1|2:1,1:1,0:0,1 0|0:0,0.2:0,0.1:0,0.1",
    "chrX 5 . A T . PASS DR2=0.29;AF=0;IMP GT:DS:AP1:AP2:GP 0:0.1:0.1:.:0.9,0.1 0|0:0:0:0:1,0,0",
]
MINIMAC = [
    "1 10 . A T . PASS IMPUTED;AF=0.2;R2=0.4 GT:HDS 0|0:0.1,0.3 0|1:0,1",
    "1 12 . A T . PASS TYPED;IMPUTED;AF=0.75;R2=1.02 GT:HDS 0|1:0,1 1|1:1,1",
    "1 14 . A T . PASS IMPUTED;AF=0.0004;R2=1.01 GT:HDS 0|0:0,0 0|0:0.001,0",
    "1 15 . A T . PASS IMPUTED;AF=0.0004;R2=-0.001 GT:HDS 0|0:0,0 0|0:0,0",
]


def test_a_file_of_beagle(report: Report, tmp_path: Path) -> None:
    path = written_by(tmp_path / "in.vcf.gz", "beagle", BEAGLE)
    found = report(path)
    check(found, path)
    assert found.numbers["sources"] == ['"beagle.27Feb25.75f.jar"'] and found.numbers["typed"] == 1
    # AP1 and AP2 without GP are haplotype dosages.
    assert found.numbers["certainty_from"] == {"GP": 2, "HDS": 2}


def test_a_file_of_minimac(report: Report, tmp_path: Path) -> None:
    path = written_by(tmp_path / "in.vcf.gz", "minimac4", MINIMAC)
    found = report(path)
    check(found, path)
    assert found.numbers["typed"] == 1 and found.numbers["r2"][0]["histogram"][19] == 1


def test_a_file_without_marks_or_frequencies(report: Report, tmp_path: Path) -> None:
    records = [
        "1 10 . A T . PASS . GT:DS 0|1:1.1 0|0:.",
        "1 20 . A T . PASS . GT 0|1 ./.",
        "1 30 . A . . PASS . GT 0|0 0|0",
        "1 30 . A G . PASS . XX 3 4",
        "1 40 . A T . PASS . GT:DS 0|0:0.5 1|1:1.5",
    ]
    found = report(written_by(tmp_path / "in.vcf.gz", "bare", records))
    numbers = found.numbers
    assert numbers["typed"] is None and numbers["gaps"] == [] and numbers["tracks"] == []
    assert "The header defines no flag IMP or IMPUTED" in found.text and "does not mark typed sites" in found.text
    assert "No record has INFO DR2 or R2" in found.text and "the header has no ##source line" in found.text
    assert numbers["left_out"] == {"no ALT": 1} and numbers["records"] == 5 and numbers["sites"] == 4
    assert numbers["frequencies_from"] == {"INFO AF": 0, "the dosages": 3, "nowhere": 1}
    # 1.1 of two haplotypes, one of two, and two of four, and what has no value.
    assert {each["maf"]: each["sites"] for each in numbers["r2"]} == {
        "<0.1 %": 0,
        "0.1-0.5 %": 0,
        "0.5-1 %": 0,
        "1-5 %": 0,
        "5-50 %": 3,
        "unknown": 1,
        "all": 4,
    }
    a, b = numbers["samples"]
    assert (a["calls"], a["missing"], b["calls"], b["missing"]) == (3, 1, 1, 3)
    assert a["certainty"] == pytest.approx((0.9 + 0.5) / 2) and b["certainty"] == pytest.approx(0.5)
    assert a["heterozygosity"] == pytest.approx(2 / 3) and b["heterozygosity"] == 0


@pytest.mark.parametrize("samples", [[], ["A", "B"]])
def test_a_file_without_records(report: Report, tmp_path: Path, samples: list[str]) -> None:
    found = report(written_by(tmp_path / "in.vcf.gz", "beagle", [], samples))
    assert found.headings == SECTIONS and found.numbers["sites"] == 0 and found.numbers["r2"][-1]["mean"] is None
    assert "The file has no record." in found.text and "The file has no imputed site." in found.text


def test_a_file_without_typed_sites(report: Report, tmp_path: Path) -> None:
    found = report(written_by(tmp_path / "in.vcf.gz", "beagle", BEAGLE[:1]))
    assert "The file has no typed site." in found.text and found.numbers["typed"] == 0


FAULTY = [
    ("1 10 . A T . PASS AF=x GT 0|0 0|0", "1:10: its INFO has an AF that is no number (x)"),
    ("1 10 . A T . PASS DR2=1_0 GT 0|0 0|0", "1:10: its INFO has an r2 that is no number (1_0)"),
    ("1 10 . A T . PASS . GT:DS 0|0:0 0|0:2.5", "1:10: sample B has dosage 2.5, which is not from 0 to 2"),
    ("1 10 . A T . PASS . GT:GP 0|0:0,0,1 0|0:30,0,40", "1:10: sample B has GP 30,0,40, which is phred-scaled"),
    ("1 10 . A T . PASS . GT 0|0 0|2", "1:10: sample B has the genotype '0|2', which has an allele above 1"),
    ("1 10 . A T . PASS . GT 0|0", "1:10: it has 1 genotype columns for 2 samples"),
    ("1 10 . A T . PASS .", "it is not a VCF record with genotypes"),
]


@pytest.mark.parametrize(("record", "said"), FAULTY)
def test_a_faulty_record_is_one_line_and_no_page(refused: Refused, tmp_path: Path, record: str, said: str) -> None:
    path = written_by(tmp_path / "in.vcf.gz", "bare", ["1 5 . A T . PASS . GT 0|0 0|0", record])
    assert said in refused(path)
    assert not (tmp_path / "in.report.html").exists()


def test_sites_only_records_have_no_genotypes(refused: Refused, tmp_path: Path) -> None:
    path = written_by(tmp_path / "in.vcf.gz", "bare", ["1 5 . A T . PASS . GT 0|0"], [])
    assert "it is not a VCF record without genotypes" in refused(path)


def test_no_vcf(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "in.vcf.gz"
    assert f"{path}: cannot read it" in refused(path)
    path.write_text("hello")
    assert "it is not a VCF or BCF" in refused(path)


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.booleans()), min_size=1, max_size=80),
    st.lists(st.integers(1, 9), max_size=20),
)
def test_gaps_and_densities_do_not_depend_on_blocks(steps: list[tuple[int, bool]], sizes: list[int]) -> None:
    positions = np.cumsum([step for step, _ in steps]) + 17
    typed = np.array([each for _, each in steps])
    contig = Contig("1", 0, int(positions[0]))
    found = []
    begin = 0
    for size in [*sizes, len(positions)]:
        if begin < len(positions):
            found += contig.add(positions[begin : begin + size], typed[begin : begin + size])
        begin += size
    found.append(contig.finish())
    sites = [(int(pos), bool(each)) for pos, each in zip(positions, typed, strict=True)]
    wanted = sorted(gaps_of("1", sites), reverse=True)
    assert sorted((tuple(gap) for gap in found if gap.length), reverse=True)[:20] == wanted[:20]
    assert contig.longest_gap == (wanted[0][0] if wanted else 0)
    assert contig.density is not None
    counts, width = contig.density.counts(contig.last), contig.density.width
    assert len(counts) <= 512 and width & (width - 1) == 0
    slow = [0] * len(counts)
    for pos, each in sites:
        slow[(pos - sites[0][0]) // width] += each
    assert counts == slow


def test_a_density_grows_no_wider_than_it_must() -> None:
    density = Density(1)
    density.add(np.array([1, 512]), 512)
    assert density.width == 1
    density.add(np.array([513]), 1024)
    assert density.width == 2 and density.counts(513)[0] == 1 and sum(density.counts(513)) == 3
    density.add(np.array([], dtype=np.int64), 1025)
    assert density.width == 4 and len(density.counts(1025)) == 257


def test_only_the_largest_contigs_are_drawn(report: Report, tmp_path: Path) -> None:
    records = []
    for number in range(260):
        for pos in range(1, 2 + (number >= 200)):
            records.append(f"c{number} {pos} . A T . PASS AF=0.5;DR2=1{';IMP' if pos == 1 else ''} GT 0|0 0|0")
    found = report(written_by(tmp_path / "in.vcf.gz", "beagle", records))
    drawn = [each["contig"] for each in found.numbers["tracks"]]
    assert drawn == [f"c{number}" for number in range(200, 260)]
    rows = found.table("Sites by contig").rows
    assert len(rows) == 200 and {f"c{number}" for number in range(200, 260)} <= {row[0] for row in rows}
    assert "60 more contigs have 60 sites in all." in found.text and len(found.numbers["contigs"]) == 260


def qualities(values: Sequence[tuple[float | None, float | None]]) -> list[Quality]:
    return [Quality(f"s{place}", *each, 9, 0, 0) for place, each in enumerate(values)]


def test_outliers() -> None:
    rng = np.random.default_rng(2)
    usual = [(0.98 + 0.002 * a, 0.2 + 0.01 * b) for a, b in rng.standard_normal((40, 2)).clip(-2, 2)]
    assert outliers(qualities(usual)) == []
    found = outliers(qualities([*usual, (0.9, 0.2), (0.98, 0.4), (0.98, 0.05), (1.0, 0.2), (None, None)]))
    assert [each.name for each in found] == ["s40", "s41", "s42"]  # none is too certain
    assert "certainty 0.9000 is low (median 0.98" in found[0].reason
    assert "heterozygosity 0.4000 is high" in found[1].reason and "0.0500 is low" in found[2].reason
    # Of equal samples, a hair's breadth is no outlier.
    assert outliers(qualities([(1.0, 0.2)] * 12 + [(0.999, 0.2)])) == []
    assert [each.name for each in outliers(qualities([(1.0, 0.2)] * 12 + [(0.9, 0.2)]))] == ["s12"]
    assert outliers(qualities([(1.0, 0.2)] * 8 + [(0.5, 0.2)])) == []


def test_an_outlier_is_named_on_the_page(report: Report, tmp_path: Path) -> None:
    sites = many_sites()
    imputed = imputed_at(sites)
    imputed.dosage[2:4] = 0.5
    found = report(write(tmp_path / "out.vcf.gz", sites, imputed, step=50, samples=NAMES))
    assert {each["name"] for each in found.numbers["outliers"]} == {NAMES[1]}
    assert {row[0] for row in found.table("Outliers").rows} == {NAMES[1]}
    assert any(f"outliers: {NAMES[1]}" in each for each in found.described)


def test_many_samples_make_no_long_page(report: Report, tmp_path: Path) -> None:
    samples = [f"s{number}" for number in range(6000)]
    cells = " ".join("0|1:1:0.1,0.8,0.1" if number == 4321 else "0|0:0.02:0.98,0.02,0" for number in range(6000))
    records = [f"1 {pos} . A T . PASS AF=0.1;DR2=0.9;IMP GT:DS:GP {cells}" for pos in range(1, 4)]
    found = report(written_by(tmp_path / "in.vcf.gz", "beagle", records, samples))
    assert found.numbers["number_of_samples"] == 6000 and len(found.numbers["samples"]) == 5000
    rows = found.table("200 of 6,000 samples").rows
    assert len(rows) == 200 and rows[0][0] == "s4321"
    assert {each["name"] for each in found.numbers["outliers"]} == {"s4321"}
    assert found.tags.count("circle") <= 2001 and "2,001 of 6,000 samples are drawn." in found.text


def test_columns_are_forgotten_without_a_change_of_numbers(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for two rows of columns, they are forgotten all the time."""
    monkeypatch.setattr(samples_part, "_LEAST_TEXTS", 1)
    sites = many_sites(splits=True)
    path = write(tmp_path / "out.vcf.gz", sites, imputed_at(sites, "some"), EVERYTHING, step=50, samples=NAMES)
    check(report(path), path)


def test_memory_does_not_grow_with_the_number_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(records: int) -> int:
        path = tmp_path / f"{records}.vcf.gz"
        rng = np.random.default_rng(1)
        with pysam.BGZFile(str(path), "wb") as out:
            out.write(b'##fileformat=VCFv4.3\n##INFO=<ID=IMP,Number=0,Type=Flag,Description="x">\n#CHROM\tPOS\tID\tREF')
            out.write(b"\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tA\tB\n")
            for pos in range(1, records + 1):
                a, b = rng.integers(1001, size=2) / 1000
                cells = f"GT:DS:HDS\t0|0:{a + b:.3f}:{a:.3f},{b:.3f}\t0|0:0:0,0"
                flag = "" if pos % 7 == 0 else ";IMP"
                out.write(f"1\t{100 * pos}\trs{pos}\tA\tC\t.\tPASS\tAF={a:.3f};DR2={b:.3f}{flag}\t{cells}\n".encode())
        tracemalloc.start()
        read_imputed(path)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    monkeypatch.setattr(samples_part, "_LEAST_TEXTS", 1 << 9)
    monkeypatch.setattr(imputed_facts, "_AT_ONCE", 512)
    peak(100)  # what is made once
    few, many = peak(1_500), peak(9_000)
    assert many < few + 50_000, (few, many)


def test_sites_of_no_frequency_have_a_bin_of_their_own() -> None:
    tallies = SiteTallies()
    tallies.add("1", 0, [1, 2, 3], [False] * 3, [math.nan, 1.5, 0.5], [0.5, math.nan, 0.7])
    tallies.finish()
    rows: dict[str, Any] = {row["maf"]: row for row in tallies.r2()}
    assert (rows["unknown"]["sites"], rows["unknown"]["with_r2"], rows["5-50 %"]["sites"]) == (2, 1, 1)
    assert rows["all"]["mean"] == pytest.approx(0.6)


def test_a_level_counts_from_itself_on() -> None:
    tallies = SiteTallies()
    dr2 = [0.3, 0.2999, 0.8, 0.7999, 0.95, 1.0, 0.05]
    tallies.add("1", 0, list(range(1, 8)), [False] * 7, [0.2] * 7, dr2)
    tallies.finish()
    row = tallies.r2()[-1]
    assert row["at_least"] == {"0.3": 5, "0.8": 3}
    assert {place: count for place, count in enumerate(row["histogram"]) if count} == {
        1: 1,
        5: 1,
        6: 1,
        15: 1,
        16: 1,
        19: 2,
    }


def test_frequencies_by_dosage_count_haploid_samples_once(report: Report, tmp_path: Path) -> None:
    record = "X 10 . A T . PASS DR2=0.5;IMP GT:DS 0:0.03 0|0:0 0|0:0.06"
    rare = "X 20 . A T . PASS DR2=0.5;IMP GT:DS 0:0.052 0|0:0 0:0"
    path = written_by(tmp_path / "in.vcf.gz", "beagle", [record, rare], ("A", "B", "C"))
    found = report(path).numbers
    assert found["frequencies_from"]["the dosages"] == 2
    # .09 of five haplotypes is .018, and .052 of four .013; of six each, the second one would be .0087.
    assert {row["maf"]: row["sites"] for row in found["r2"] if row["sites"]} == {"1-5 %": 2, "all": 2}


def test_the_oracle_reads_both_containers_alike(tmp_path: Path) -> None:
    sites = many_sites()
    found = [records_of(write(tmp_path / f"o.{each}", sites, imputed_at(sites), step=50)) for each in ("vcf.gz", "bcf")]
    assert found[0][0] == found[1][0] and len(found[0][1]) == len(found[1][1]) == len(sites)
