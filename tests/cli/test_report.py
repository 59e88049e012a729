"""``embrag report`` as a user calls it: where its page goes, and what it never replaces."""

from __future__ import annotations

import gzip
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from embrag_ds.data.simulate import DefaultData
from tests.cli.test_base_install import OF_EXTRAS
from tests.reports.imputed_oracle import expected
from tests.reports.pages import parsed
from tests.reports.runs import write_run

Embrag = Callable[..., subprocess.CompletedProcess[str]]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_imputation_and_its_report(embrag: Embrag, simulated: DefaultData, tmp_path: Path) -> None:
    """Of targets with a site of other alleles and a site that the panel lacks."""
    target, out = tmp_path / "target.vcf.gz", tmp_path / "imputed.vcf.gz"
    lines = gzip.decompress(simulated.target.read_bytes()).decode().splitlines()
    records = [place for place, line in enumerate(lines) if not line.startswith("#")]
    for place, column, change in ((records[3], 4, "CTG"), (records[7], 1, None)):
        fields = lines[place].split("\t")
        fields[column] = change or str(int(fields[1]) + 1)
        lines[place] = "\t".join(fields)
    target.write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    given = [f"--panel={simulated.panel}", f"--map={simulated.genetic_map}", f"--target={target}", f"--out={out}"]
    reports = [f"--report={tmp_path / 'report.json'}", f"--excluded={tmp_path / 'excluded.tsv'}"]
    done = embrag("impute", "--adapt=off", *given, *reports)
    assert done.returncode == 0, done.stderr

    options = [f"--impute-report={tmp_path / 'report.json'}", f"--excluded={tmp_path / 'excluded.tsv'}"]
    done = embrag("report", out, *options, without=OF_EXTRAS)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    page = tmp_path / "imputed.report.html"
    assert done.stderr.startswith(f"report written to {page} in ") and done.stderr.count("\n") == 1
    found, oracle = parsed(page), expected(out)
    assert found.numbers["typed"] == sum(each["typed"] for each in oracle["contigs"])
    got = [(each["name"], each["calls"], each["certainty"]) for each in found.numbers["samples"]]
    assert got == [(each["name"], each["calls"], pytest.approx(each["certainty"])) for each in oracle["samples"]]
    listed = [line.split("\t") for line in (tmp_path / "excluded.tsv").read_text().splitlines()[1:]]
    counts = Counter((fields[0], fields[-1]) for fields in listed)
    assert len(counts) == 2
    by_list = {(what, reason): n for what, each in found.numbers["excluded"].items() for reason, n in each.items()}
    left_out = found.numbers["imputation"]["left_out"]
    assert by_list == counts == {(what, reason): n for what, each in left_out.items() for reason, n in each.items()}

    # A page of ours is replaced, and that is said; the same input gives the same bytes.
    before = page.read_bytes()
    done = embrag("report", out, *options)
    assert f"{page}: an older report is there, and is replaced by this one when it is whole" in done.stderr
    assert page.read_bytes() == before
    page.write_text("mine")
    done = embrag("report", out)
    assert done.returncode == 2 and page.read_text() == "mine"
    assert done.stderr == f"error: {page}: it is there and is no report of embrag; remove it, or choose another --out\n"


def test_a_run_without_the_packages_of_training(embrag: Embrag, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    done = embrag("report", run, without=OF_EXTRAS)
    assert done.returncode == 0, done.stderr
    assert parsed(run / "report.html").numbers["outcome"]["state"] == "finished"
    assert names(run) == {"report.html", "metrics.jsonl", "config.json", "versions.json", "outcome.json", "run.log"}
    done = embrag("report", run, f"--out={tmp_path / 'there.html'}")
    assert done.returncode == 0 and (tmp_path / "there.html").read_bytes() == (run / "report.html").read_bytes()


@pytest.mark.parametrize("name", ["a.vcf.gz", "a.bcf", "a.vcf", "a.vcf.bgz", "a"])
def test_the_page_of_a_file_lies_beside_it(embrag: Embrag, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n")
    assert embrag("report", path).returncode == 0
    assert names(tmp_path) == {name, "a.report.html"}


def test_a_pipe_needs_a_name_for_its_page(embrag: Embrag, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done = embrag("report", pipe, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {pipe}: a report has no place beside a pipe; name one with --out\n"
    text = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n1\t5\t.\tA\tT\t.\tPASS\t.\n"
    with subprocess.Popen(["sh", "-c", 'printf %s "$0" > "$1"', text, str(pipe)]):
        done = embrag("report", pipe, f"--out={tmp_path / 'page.html'}")
    assert done.returncode == 0, done.stderr
    assert parsed(tmp_path / "page.html").numbers["sites"] == 1
