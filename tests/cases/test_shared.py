"""The project's own small cases, from their files (``../shared/cases``)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cases.files import Cases, Outcome, assert_base, assert_refused
from tests.conftest import REAL_DATA

SHARED = REAL_DATA.parents[1] / "cases"
Run = Callable[..., Outcome]
pytestmark = [pytest.mark.real, pytest.mark.skipif(not SHARED.is_dir(), reason=f"no small cases at {SHARED}")]


@pytest.fixture
def texts() -> dict[str, str]:
    """Text of panel and target."""
    return {role: (SHARED / f"{role}.vcf").read_text() for role in ("panel", "target")}


@pytest.fixture
def run(cases: Cases, texts: dict[str, str]) -> Run:
    """Function that imputes the shared target, with other texts of the two files."""

    def run(*options: object, **others: str | bytes | Path) -> Outcome:
        return cases.run("impute", {**texts, **others}, *options)

    return run


def test_rows_that_change_nothing(run: Run, texts: dict[str, str]) -> None:
    base = run()
    assert base.status == 0 and len(base.records) == 6
    target, panel = texts["target"], texts["panel"]
    contig = re.search("##contig.*\n", target)
    assert contig
    assert_base(run(target=target.replace("1\t3000", "\n1\t3000")), base, "1 empty lines")
    assert_base(run(panel=panel.replace("1\t3000", "\n1\t3000")), base, "1 empty lines")
    assert_base(run(target=target.replace("\tc\t", "\t\udce9\t")), base)
    latin = run(panel=panel.replace("\tc\t", "\t\udce9\t"))
    assert_base(latin, base)
    assert [each[2] for each in latin.records] == ["a", "b", "\udce9", "d", "e", "f"]
    assert_base(run(target=target.replace(contig.group(), "")), base)
    assert_base(run(panel=panel.replace(contig.group(), "")), base)
    assert_base(run(target=target.replace("\n1\t", "\nchr1\t").replace("ID=1,", "ID=chr1,")), base)
    record = re.search("1\t3000.*\n", target)
    assert record
    assert_base(run(target=target.replace(record.group(), 2 * record.group())), base)


def test_rows_that_are_refused(run: Run, texts: dict[str, str], tmp_path: Path) -> None:
    target, panel = texts["target"], texts["panel"]
    swapped = tmp_path / "swapped.map"
    swapped.write_text("1 . 1000 0.001\n1 . 6000 0.006\n")
    found = run("--map", swapped)
    assert found.status == 2 and "columns chr, id, cM, bp" in found.said("error")[0]
    assert_refused(run(target=target.replace("\t3000\t", "\t99999999999999999999\t")), "target", "no position exceeds")
    assert_refused(run(panel=panel.replace("\tc\t", "\tc\rc\t")), "panel", "control character")
    assert_refused(run(target=target.replace("0|1", "0/1")), "target", "1:1000", "--phase beagle")


def test_rows_with_a_word(run: Run, texts: dict[str, str], tmp_path: Path) -> None:
    target, panel = texts["target"], texts["panel"]
    beside = tmp_path / "beside.map"
    beside.write_text("1 . 1 1000000\n1 . 2 2000000\n")
    assert "6 of 6 panel sites lie outside it" in run("--map", beside).warnings[0]
    eagle = tmp_path / "eagle.map"
    eagle.write_text("1 600000 1.10 1.0\n1 700000 1.10 1.11\n")
    assert "extrapolated at 1.1 cM/Mb" in run("--map", eagle).warnings[0]
    palindromic = run(panel=panel.replace("\tG\tA\t", "\tA\tT\t"), target=target.replace("\tG\tA\t", "\tT\tA\t"))
    assert palindromic.status == 0 and "dropped, palindromic, strand unclear  1" in palindromic.log
    shifted = run(target=target.replace("\t3000\t", "\t3001\t").replace("\t6000\t", "\t6001\t"))
    assert "only 1 of its 3 sites" in shifted.warnings[0]
    untyped = run(panel=panel + "2\t500\tz\tA\tC\t.\t.\t.\tGT\t0|1\t0|0\t0|0\t1|0\n")
    assert "not typed on 2" in untyped.warnings[0] and len(untyped.records) == 6
    haploid = run(target=re.sub(r"[01]\|([01])", r"\1", target))
    assert all(re.fullmatch("[01]", call.split(":")[0]) for each in haploid.records for call in each[9:])
