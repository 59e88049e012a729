"""Small truth and imputed files that people really have: each is one edit of the same files, with what is right."""

from __future__ import annotations

import gzip
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from embrag_ds.errors import UserError
from embrag_ds.evaluation.score import evaluate
from tests.containers import BGZF_EOF_BYTES, CONTAINERS, bgzipped, contained

HEADER = """\
##fileformat=VCFv4.2
##contig=<ID=1,length=100000>
##INFO=<ID=DR2,Number=A,Type=Float,Description="r2">
##INFO=<ID=NOTE,Number=1,Type=String,Description="note">
##FORMAT=<ID=GT,Number=1,Type=String,Description="genotype">
##FORMAT=<ID=DS,Number=A,Type=Float,Description="dosage">
##FORMAT=<ID=GP,Number=G,Type=Float,Description="probabilities">
#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t"""
SITES = ["1 1000 a A G", "1 2000 b C T", "1 3000 c G A", "1 4000 d T C", "1 5000 e A C", "1 6000 f G T"]
HAPLOTYPES = ["0|0 0|1 1|0", "0|0 0|1 1|0", "1|0 0|1 1|0", "0|0 0|1 1|1", "0|1 0|1 1|0", "0|0 1|1 1|0"]
TRUTH = ["0|1 0|0", "0|1 0|1", "0|1 0|0", "1|1 0|1", "0|1 0|0", "1|1 0|0"]
FIRST = ["0|1:1:0,1,0", "0|1:0.9:0.2,0.7,0.1", "0|1:1:0,1,0", "1|1:1.5:0.1,0.3,0.6", "0|1:0.7:0.4,0.5,0.1"]
IMPUTED = [f"{each} 0|0:0.1:0.9,0.1,0" for each in (*FIRST, "1|1:2:0,0,1")]


def vcf(samples: str, keys: str, columns: list[str], sites: list[str], info: str = ".") -> bytes:
    """A VCF of some sites, with these sample columns."""
    rows = [f"{site} . PASS {info} {keys} {each}".replace(" ", "\t") for site, each in zip(sites, columns, strict=True)]
    return (HEADER + "\n".join([samples.replace(" ", "\t"), *rows, ""])).encode()


FILES = {
    "panel": vcf("P1 P2 P3", "GT", HAPLOTYPES, SITES),
    "target": vcf("T1 T2", "GT", [TRUTH[row] for row in (0, 2, 5)], [SITES[row] for row in (0, 2, 5)]),
    "truth": vcf("T1 T2", "GT", TRUTH, SITES, "DR2=0.5"),
    "imputed": vcf("T1 T2", "GT:DS:GP", IMPUTED, SITES, "DR2=0.5"),
}


def score(folder: Path, **edited: bytes) -> dict:
    """Report on the files, of which some are edited."""
    for name, content in (FILES | edited).items():
        (folder / f"{name}.vcf").write_bytes(content)
    return report_on(folder, {name: folder / f"{name}.vcf" for name in FILES})


def report_on(folder: Path, paths: dict[str, Path]) -> dict:
    """Report on files by their names."""
    files = paths["truth"], {"a": paths["imputed"]}, paths["panel"], paths["target"]
    return evaluate(*files, bootstrap=0, cache_dir=folder / "cache").to_json()


def record(content: bytes, pos: int) -> bytes:
    """The line of a record."""
    return next(line for line in content.splitlines(keepends=True) if line.startswith(b"1\t%d\t" % pos))


def without_alt(content: bytes, alt: bytes) -> bytes:
    """A line at 7000 in which no sample has another allele than REF."""
    return record(content, 6000).replace(b"6000", b"7000").replace(b"G\tT", b"G\t" + alt).replace(b"1|1", b"0|0")


SAME: dict[str, Callable[[bytes], bytes]] = {
    "empty lines": lambda text: text.replace(b"1\t3000", b"\n\n1\t3000"),
    "bytes that are not UTF-8": lambda text: text.replace(b"\tc\t", b"\t\xe9\t").replace(b"\tDR2", b"\tNOTE=\xfc;DR2"),
    "no contig lines": lambda text: text.replace(b"##contig=<ID=1,length=100000>\n", b""),
    "no fileformat": lambda text: text.replace(b"##fileformat=VCFv4.2\n", b""),
    "byte-order mark": lambda text: b"\xef\xbb\xbf" + text,
    "CRLF": lambda text: text.replace(b"\n", b"\r\n"),
    "no last end of line": lambda text: text.removesuffix(b"\n"),
    "a record twice": lambda text: text + record(text, 6000),
    "the second time with other values": lambda text: text + record(text, 6000).replace(b"1|1", b"0|0"),
    "chr1": lambda text: text.replace(b"\n1\t", b"\nchr1\t").replace(b"ID=1,", b"ID=chr1,"),
    "other samples and order": lambda text: re.sub(rb"\t([^\t\n]*)\t([^\t\n]*)\n(?=1|$)", rb"\t\2\t\1\n", text),
    "gzip": gzip.compress,
    "bgzip": bgzipped,
    "bgzip without end-of-file block": lambda text: bgzipped(text)[:-BGZF_EOF_BYTES],
    "monomorphic records": lambda text: text + without_alt(text, b"."),
    "records of a genomic VCF": lambda text: text + without_alt(text, b"<*>") + without_alt(text, b"<NON_REF>"),
}


@pytest.mark.parametrize("kind", ["truth", "imputed"])
@pytest.mark.parametrize("case", SAME)
def test_the_scores_are_the_same(tmp_path: Path, kind: str, case: str) -> None:
    expected = score(tmp_path)
    assert expected["sites"]["all"] == 3
    found = score(tmp_path, **{kind: SAME[case](FILES[kind])})
    assert found["tools"] == expected["tools"] and found["sites"] == expected["sites"]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ["truth", "imputed"])
def test_any_container(tmp_path: Path, kind: str, container: str) -> None:
    expected = score(tmp_path)
    paths = {name: tmp_path / f"{name}.vcf" for name in FILES}
    with contained(FILES[kind], container, tmp_path) as path:
        found = report_on(tmp_path, paths | {kind: path})
    assert found["tools"] == expected["tools"]


def edit(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def edited(text: bytes) -> bytes:
        assert old in text
        return text.replace(old, new)

    return edited


ONLY_TRUTH = {
    "left-over DR2": edit(b"DR2=0.5", b"DR2=high"),
    "unphased": edit(b"|", b"/"),
    "VCF 4.4": edit(b"\t0|", b"\t|0|"),
    "left-over DS and GP": lambda text: re.sub(rb"\tGT\t(.*)\t(.*)\n", rb"\tGT:DS:GP\t\1:0.3:9,9\t\2:1.7:x\n", text),
    "GT behind DP": lambda text: re.sub(rb"\tGT\t(.*)\t(.*)\n", rb"\tDP:GT\t7:\1\t.:\2\n", text),
    "no ALT where monomorphic": lambda text: text + b"1\t7000\t.\tA\t.\t.\t.\t.\tGT\t0/0\t./.\n",
}


@pytest.mark.parametrize("case", ONLY_TRUTH)
def test_the_scores_are_the_same_with_such_a_truth(tmp_path: Path, case: str) -> None:
    assert score(tmp_path, truth=ONLY_TRUTH[case](FILES["truth"]))["tools"] == score(tmp_path)["tools"]


@pytest.mark.parametrize("missing", [b"./.", b".|.", b".", b".|1", b"1/."])
def test_one_missing_call_of_a_truth_is_not_scored(tmp_path: Path, missing: bytes) -> None:
    found = score(tmp_path, truth=edit(b"GT\t1|1\t0|1", b"GT\t%s\t0|1" % missing)(FILES["truth"]))
    assert found["missing_truth_genotypes"] == 1 and found["sites"]["all"] == 3
    assert found["tools"]["a"]["concordance"]["all"] == 3 / 5


def test_haploid_truth_and_imputed(tmp_path: Path) -> None:
    """A diploid's probabilities come to those of a haploid sample, each allele with half of the heterozygote's."""
    truth = edit(b"GT\t1|1\t0|1", b"GT\t1\t0|1")(FILES["truth"])
    before = b"1|1:1.5:0.1,0.3,0.6"
    found = score(tmp_path, truth=truth, imputed=edit(before, b"1:0.65:0.35,0.65")(FILES["imputed"]))
    diploid = score(tmp_path, truth=truth, imputed=edit(before, b"0|1:1.3:0.1,0.5,0.4")(FILES["imputed"]))
    for measure in ("aggregate_r2", "site_r2", "concordance", "iqs"):
        one, other = (each["tools"]["a"][measure]["all"] for each in (found, diploid))
        assert one == pytest.approx(other, abs=1e-6), measure
    calibration = [each["tools"]["a"]["calibration_error"] for each in (found, diploid)]
    assert calibration[0] == pytest.approx(calibration[1], abs=1e-6)
    assert found["tools"]["a"]["concordance"] == score(tmp_path)["tools"]["a"]["concordance"]
    assert found["tools"]["a"]["aggregate_r2"] != score(tmp_path)["tools"]["a"]["aggregate_r2"]


@pytest.mark.parametrize("kind", ["truth", "imputed"])
def test_two_deletions_at_one_position(tmp_path: Path, kind: str) -> None:
    """They are told apart by END, whatever their order."""
    long, short = (f"1 4500 {end} T <DEL> . PASS END={end} " for end in (4900, 4600))
    tail = {"panel": ("GT 0|1 0|1 0|0", "GT 0|0 0|0 1|1"), "truth": ("GT 0|1 0|0", "GT 0|0 1|1")}
    tail["imputed"] = ("GT:DS:GP 0|1:0.9:0.1,0.9,0 0|0:0:1,0,0", "GT:DS:GP 0|0:0.2:0.8,0.2,0 1|1:1.7:0,0.3,0.7")
    edited, swapped = {}, {}
    for name, (first, second) in tail.items():
        rows = [
            (each + columns).replace(" ", "\t").encode() + b"\n" for each, columns in ((long, first), (short, second))
        ]
        before = record(FILES[name], 5000)
        edited[name] = FILES[name].replace(before, b"".join(rows) + before)
        swapped[name] = FILES[name].replace(before, b"".join(rows[::-1]) + before)
    expected = score(tmp_path, **edited)
    assert expected["sites"]["all"] == 5
    assert score(tmp_path, **(edited | {kind: swapped[kind]}))["tools"] == expected["tools"]


def test_multiallelic_records(tmp_path: Path) -> None:
    """One record with two ALTs scores as the two records that it is split into."""
    joined, split = {}, {}
    columns = {
        "panel": ("GT 0|1 2|0 0|1", "GT 0|1 0|0 0|1", "GT 0|0 1|0 0|0"),
        "truth": ("GT 1/2 0/1", "GT 1/0 0/1", "GT 0/1 0/0"),
        "imputed": (
            "GT:DS:GP 1|2:0.9,0.8:0.02,0.2,0.14,0.05,0.52,0.07 0|1:0.7,0.1:0.3,0.6,0,0.1,0,0",
            "GT:DS:GP 1|0:0.9:0.14,0.72,0.14 0|1:0.7:0.4,0.6,0",
            "GT:DS:GP 0|1:0.8:0.36,0.57,0.07 0|0:0.1:0.9,0.1,0",
        ),
    }
    for name, (both, first, second) in columns.items():
        before = record(FILES[name], 5000)
        for made, records in ((joined, [("C,G", both)]), (split, [("C", first), ("G", second)])):
            rows = "".join(f"1 4500 . T {alt} . PASS . {each}".replace(" ", "\t") + "\n" for alt, each in records)
            made[name] = FILES[name].replace(before, rows.encode() + before)
    expected = score(tmp_path, **split)
    assert expected["sites"]["all"] == 5
    for kinds in (["panel"], ["truth"], ["imputed"], list(columns)):
        assert score(tmp_path, **(split | {kind: joined[kind] for kind in kinds}))["tools"] == expected["tools"]


ERRORS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "GP 0.2,0.2,0.2": (
        "imputed",
        edit(b"0.2,0.7,0.1", b"0.2,0.2,0.2"),
        "1:2000: sample T1 has GP .* the sum 0.6, not 1",
    ),
    "GP -5,7,-1": ("imputed", edit(b"0.2,0.7,0.1", b"-5,7,-1"), "1:2000: sample T1 has GP .* not from 0 to 1"),
    "GP log10": ("imputed", edit(b"0.2,0.7,0.1", b"-0.7,-0.15,-1"), "1:2000: sample T1 has GP .* log10-scaled"),
    "GP nan": ("imputed", edit(b"0.2,0.7,0.1", b"nan,0,0"), "1:2000: sample T1 has .* missing or not a number"),
    "DR2=high": ("imputed", edit(b"DR2=0.5", b"DR2=high"), r"1:1000: its INFO has an r2 that is no number \(high\)"),
    "missing": ("imputed", edit(b"0|1:0.9:0.2,0.7,0.1", b"./."), "1:2000: sample T1 has .* missing or not a number"),
}
for _kind in ("truth", "imputed"):
    ERRORS |= {
        f"POS, {_kind}": (_kind, edit(b"1\t6000", b"1\t99999999999999999999"), "1:9+: no position exceeds"),
        f"CR in an ID, {_kind}": (_kind, edit(b"\tc\t", b"\tc\rx\t"), "control character, such as a carriage return"),
        f"sample twice, {_kind}": (_kind, edit(b"T1\tT2", b"T1\tT1"), "sample T1 appears twice"),
        f"names by PLINK, {_kind}": (_kind, edit(b"T1\tT2", b"T1_T1\tT2_T2"), "its sample T1_T1 is T1 in .*reheader"),
        f"another genome, {_kind}": (_kind, edit(b"\n1\t", b"\n5\t"), "no site in common with .*its contigs are 5"),
        f"no records, {_kind}": (_kind, lambda text: text[: text.index(b"1\t1000")], "in common .*it has no sites"),
        f"unsorted, {_kind}": (_kind, edit(b"1\t2000", b"1\t3500"), "1:3000: it follows position 3500"),
        f"cut short, {_kind}": (_kind, lambda text: bgzipped(text * 9)[:-90], "damaged|header"),
        f"allele above the last, {_kind}": (_kind, edit(b"1|1", b"1|2"), "1:4000: .*T1 has the genotype '1|2'"),
    }


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_with_file_and_record(tmp_path: Path, case: str) -> None:
    kind, change, message = ERRORS[case]
    with pytest.raises(UserError, match=rf"^{tmp_path}/{kind}\.vcf: .*{message}") as caught:
        score(tmp_path, **{kind: change(FILES[kind])})
    assert "\n" not in str(caught.value) and "None" not in str(caught.value)


def test_what_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Warnings and lines with numbers, which name the file."""
    caplog.set_level(logging.INFO, logger="embrag_ds")
    truth = SAME["chr1"](FILES["truth"].replace(b"1\t3000", b"\n1\t3000") + record(FILES["truth"], 6000))
    score(tmp_path, truth=truth)
    for line in (
        "truth.vcf: 1 empty lines between the records are ignored",
        "truth.vcf: 1 records skipped (duplicate)",
        "truth.vcf: its contig chr1 is the panel's 1",
    ):
        assert line in caplog.text
