"""What an imputation reported and left out, on the page of its file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embrag_ds.data.left_out import left_out_table
from embrag_ds.variants.records import Excluded
from tests.reports.pages import Parsed
from tests.reports.test_imputed_report import BEAGLE, written_by

Report = Callable[..., Parsed]
Refused = Callable[..., str]


def one(**replaced: Any) -> dict[str, Any]:
    """A report of one panel file, as far as it is read."""
    return {
        "panel": {"left_out": {"duplicate": 2}},
        "target": {"left_out": {"no <ALT>": 3}},
        "harmonisation": {
            "dropped": {"palindromic": 5, "duplicate": 1},
            "matched_by_relation": {"the same alleles": 70},
        },
        "typed_sites": 70,
        "samples": [{"sample": "A", "call_rate": 1.0}, {"sample": "<B>", "call_rate": 0.97}],
    } | replaced


@pytest.fixture
def imputed(tmp_path: Path) -> Path:
    return written_by(tmp_path / "in.vcf.gz", "beagle", BEAGLE, ("A", "<B>"))


def test_nothing_given_is_said(report: Report, imputed: Path) -> None:
    found = report(imputed)
    assert "--impute-report names the JSON" in found.text and "--excluded names that of the imputation" in found.text
    assert found.numbers["imputation"] is None and found.numbers["excluded"] is None


def test_a_report_of_one_file(report: Report, imputed: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(one()))
    found = report(imputed, f"--impute-report={path}")
    assert found.numbers["imputation"] == {
        "left_out": {"panel": {"duplicate": 2}, "target": {"no <ALT>": 3, "palindromic": 5, "duplicate": 1}},
        "matched": {"the same alleles": 70},
    }
    rows = found.table("Sites left out by the imputation, from its report: 11").rows
    assert rows == [
        ["target", "palindromic", "5"],
        ["target", "no <ALT>", "3"],
        ["panel", "duplicate", "2"],
        ["target", "duplicate", "1"],
    ]
    assert found.table("Sites of the targets that were matched; 70 typed sites").rows == [["the same alleles", "70"]]
    assert found.table("Samples with missing calls: 1").rows == [["<B>", "0.97"]]


@pytest.mark.parametrize(
    ("adaptation", "said"),
    [
        ({"adapt": "off"}, "was not adapted to the panel (--adapt off)."),
        ({"adapt": "auto", "left_alone": "few <sites>"}, "was not adapted to the panel: few <sites>."),
        ({"kept": True, "steps": 40, "map_scale": 1.5}, "in 40 steps, and the adapted model imputed. Map scale: 1.5."),
        ({"kept": False, "steps": 40, "map_scale": 1}, "in 40 steps, but was not better then"),
    ],
)
def test_the_adaptation(report: Report, imputed: Path, tmp_path: Path, adaptation: dict[str, Any], said: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(
        json.dumps(one(adaptation=adaptation, samples=[{"sample": each, "call_rate": 1.0} for each in ("A", "<B>")]))
    )
    found = report(imputed, f"--impute-report={path}")
    assert said in found.text and "No sample of the targets misses a call" in found.text


def test_a_report_of_several_files_is_added_up(report: Report, imputed: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    lost = [{"file": "t", "sites_without_panel": 4}, {"file": "u", "sites_without_panel": 0}]
    path.write_text(json.dumps({"files": [one(), one(adaptation={"adapt": "off"})], "targets": lost}))
    found = report(imputed, f"--impute-report={path}").numbers["imputation"]
    assert found["matched"] == {"the same alleles": 140}
    assert found["left_out"] == {
        "panel": {"duplicate": 4},
        "target": {"no <ALT>": 6, "palindromic": 10, "duplicate": 2, "no panel file has it": 4},
    }


def test_a_list_of_sites(report: Report, imputed: Path, tmp_path: Path) -> None:
    path = tmp_path / "excluded.tsv"
    reasons = [("panel", "duplicate"), ("target", "palindromic"), ("target", "<b>"), ("target", "palindromic")]
    with left_out_table(path) as table:
        for number, (what, reason) in enumerate(reasons):
            table.add(what, Excluded("1", number, "Caf\udce9", "A", "T", reason))
    found = report(imputed, f"--excluded={path}")
    assert found.numbers["excluded"] == {"panel": {"duplicate": 1}, "target": {"palindromic": 2, "<b>": 1}}
    table_ = found.table("Sites left out by the imputation, from its list: 4")
    assert table_.rows == [["target", "palindromic", "2"], ["panel", "duplicate", "1"], ["target", "<b>", "1"]]


def test_reasons_without_end_share_a_row(report: Report, imputed: Path, tmp_path: Path) -> None:
    path = tmp_path / "excluded.tsv"
    with left_out_table(path) as table:
        for number in range(1_500):
            table.add("target", Excluded("1", 1, ".", "A", "T", f"reason {number % 1_200}"))
    found = report(imputed, f"--excluded={path}").numbers["excluded"]["target"]
    assert len(found) == 1_001 and found["other reasons"] == 200 and sum(found.values()) == 1_500


NO_REPORT = [
    "",
    "[1]",
    "{}",
    '{"files": 3}',
    json.dumps(one(typed_sites=None)),
    json.dumps(one(samples=[{}])),
    "[" * 99999,
]


@pytest.mark.parametrize("content", NO_REPORT)
def test_a_file_that_is_no_report(refused: Refused, imputed: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    assert f"{path}: it is no report of an imputation" in refused(imputed, f"--impute-report={path}")
    assert not (tmp_path / "in.report.html").exists()


HEAD = "file\tcontig\tpos\tid\tref\talt\treason\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("file\tcontig\n", "its first line is not 'file contig pos id ref alt reason' with tabs between"),
        (HEAD + "panel\t1\t2\t.\tA\tT\tno\n" + "panel\t1\n", "line 3 has 2 fields, not 7"),
        (HEAD + "\n", "line 2 has 1 fields, not 7"),
    ],
)
def test_a_file_that_is_no_list(refused: Refused, imputed: Path, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "excluded.tsv"
    path.write_text(content)
    assert f"{path}: {said}" in refused(imputed, f"--excluded={path}")


def test_no_input_is_replaced(refused: Refused, imputed: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(one()))
    os.link(imputed, tmp_path / "link")
    for out, what in ((path, "--impute-report"), (tmp_path / "link", "INPUT"), (f"{imputed}.tbi", "INPUT")):
        if str(out).endswith(".tbi"):
            Path(out).touch()
        said = refused(imputed, f"--impute-report={path}", f"--out={out}")
        assert "--out is the same file as" in said and what in said
    for option in ("--impute-report", "--excluded"):
        assert f"cannot read it (No such file or directory); check what {option} names" in refused(
            imputed, f"{option}={tmp_path / 'none'}"
        )


def test_a_report_of_other_samples_is_refused(refused: Refused, imputed: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(one(samples=[{"sample": "A", "call_rate": 1.0}, {"sample": "C", "call_rate": 1.0}])))
    said = refused(imputed, f"--impute-report={path}")
    assert (
        f"{path}: it lacks 1 samples of {imputed}, the first is <B>; give the --report of the same imputation" in said
    )
