"""Outputs that are inputs, folders and devices that are not there, options, maps and tables of samples."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cases.files import FILES, ROLES, Cases, assert_base, bgzipped, embrag, encoded

Files = dict[str, Path]


@pytest.fixture
def files(cases: Cases) -> Files:
    """All inputs in one folder, with links to the target, a map and a table of samples."""
    folder = cases.new_folder()
    made = {role: bgzipped(encoded(FILES[role]), folder / f"{role}.vcf.gz") for role in ROLES}
    made["map"], made["samples"] = folder / "my.map", folder / "samples.tsv"
    made["map"].write_text("7 . 0.0001 100\n7 . 0.0008 800\n")
    made["samples"].write_text("".join(f"P{number}\tA\n" for number in range(1, 6)))
    made["symbolic link"], made["hard link"] = folder / "soft.vcf.gz", folder / "hard.vcf.gz"
    made["symbolic link"].symlink_to(made["target"])
    os.link(made["target"], made["hard link"])
    return made


def state(files: Files) -> dict[str, bytes]:
    """Content of everything in the inputs' folder."""
    return {each.name: each.read_bytes() for each in files["panel"].parent.iterdir() if each.is_file()}


def run(cases: Cases, files: Files, command: str, *options: object) -> tuple[int, list[str]]:
    """Run a command on the files; no input changes."""
    before = state(files)
    common = ["--panel", files["panel"], "--target", files["target"], "--cache-dir", cases.cache]
    if command == "impute":
        common += ["--adapt", "off", "--transformer", "off", "--device", "cpu"]
        common += [] if "--out" in options else ["--out", files["panel"].parent / "out.vcf.gz"]
    else:
        common += ["--truth", files["truth"], "--imputed", files["imputed"], "--bootstrap", 2]
    status, lines, _ = embrag(command, *common, *options)
    after = state(files)
    assert {name: after.get(name) for name in before} == before
    assert status == 0 or after == before
    return status, lines


def refused(cases: Cases, files: Files, command: str, *options: object) -> str:
    """The one line of a command that is refused before it reads anything."""
    status, lines = run(cases, files, command, *options)
    assert status == 2 and lines[-1].startswith("error: ") and "None" not in lines[-1], lines
    assert not any("packing" in line or "what was read" in line for line in lines)
    return lines[-1].removeprefix("error: ")


@pytest.mark.parametrize("role", ["panel", "target", "symbolic link", "hard link"])
def test_an_input_is_never_replaced(cases: Cases, files: Files, role: str) -> None:
    path = files[role]
    for command, options in (
        ("impute", ["--out", path]),
        ("impute", ["--report", path]),
        ("impute", ["--excluded", path]),
        ("evaluate", ["--json", path]),
        ("evaluate", ["--markdown", path]),
        ("evaluate", ["--excluded", path]),
    ):
        line = refused(cases, files, command, *options)
        assert line.startswith(f"{path}: {options[0]} is the same file as --") and "would be lost" in line


@pytest.mark.parametrize("role", ["truth", "imputed", "samples"])
def test_nor_are_those_of_evaluation(cases: Cases, files: Files, role: str) -> None:
    options = ["--samples", files["samples"]] if role == "samples" else []
    for output in ("--json", "--markdown", "--excluded"):
        assert f"same file as --{role}" in refused(cases, files, "evaluate", *options, output, files[role])


def test_nor_are_map_table_and_other_outputs(cases: Cases, files: Files) -> None:
    both = ["--map", files["map"], "--samples", files["samples"]]
    out = files["panel"].parent / "out.vcf.gz"
    for path, what in (
        (files["map"], "--map"),
        (files["samples"], "--samples"),
        (out, "--out"),
        (Path(f"{out}.tbi"), "the index of --out"),
    ):
        assert f"same file as {what}" in refused(cases, files, "impute", *both, "--out", out, "--report", path)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("impute", "--out"),
        ("impute", "--report"),
        ("impute", "--excluded"),
        ("evaluate", "--json"),
        ("evaluate", "--markdown"),
        ("evaluate", "--excluded"),
    ],
)
def test_places_that_cannot_be_written(cases: Cases, files: Files, command: str, option: str) -> None:
    absent = files["panel"].parent / "absent" / "out.vcf.gz"
    assert refused(cases, files, command, option, absent).startswith(
        f"{absent}: the folder {absent.parent} does not exist"
    )
    inside = files["map"] / "out.vcf.gz"
    assert str(inside) in refused(cases, files, command, option, inside)
    if option != "--out":
        status, lines = run(cases, files, command, option, "/dev/full")
        assert status == 2 and lines[-1].startswith("error: /dev/full: cannot write it (No space left on device)")


def test_a_cache_that_cannot_be_written(cases: Cases, files: Files) -> None:
    for command in ("impute", "evaluate"):
        for folder in (files["map"], files["map"] / "cache", Path("/proc/cache")):
            line = refused(cases, files, command, "--cache-dir", folder)
            assert line.startswith(f"{folder}: cannot write to the cache folder (") and "--cache-dir" in line


def test_devices(cases: Cases, files: Files) -> None:
    import torch

    if not torch.cuda.is_available():
        assert "use cpu" in refused(cases, files, "impute", "--device", "cuda")
    for name in ("x", "meta"):
        assert refused(cases, files, "impute", "--device", name).startswith(f"--device {name}: ")


@pytest.mark.parametrize(
    "options",
    [
        ["--threads", "0"],
        ["--samples-per-batch", "0"],
        ["--min-r2", "nan"],
        ["--min-r2", "2"],
        ["--format", "GT,XX"],
        ["--format", ""],
        ["--format", "GT,GT"],
        ["--sites-only", "--format", "GT"],
        ["--typed-only", "--min-r2", "0.5"],
        ["--cm-per-mb", "0"],
        ["--cm-per-mb", "nan"],
        ["--effective-size", "1e300"],
    ],
)
def test_options_that_make_no_sense(cases: Cases, files: Files, options: list[str]) -> None:
    assert refused(cases, files, "impute", *options).startswith(options[0])


@pytest.mark.parametrize("given", ["", "=", "a=", "=x.vcf"])
def test_an_imputed_file_without_a_name(cases: Cases, files: Files, given: str) -> None:
    line = refused(cases, files, "evaluate", "--imputed", given)
    assert line == f"--imputed {given}: it lacks a name or a file; give NAME=FILE or FILE"


@pytest.mark.parametrize("role", ["panel", "target"])
def test_tools_need_files(cases: Cases, files: Files, role: str) -> None:
    pipe = cases.new_folder() / "pipe"
    os.mkfifo(pipe)
    line = refused(cases, files, "evaluate", f"--{role}", pipe, "--run-tools", pipe.parent / "tools")
    assert line.startswith(f"{pipe}: --run-tools has it read more than once")


def test_report_and_excluded_sites(cases: Cases, files: Files) -> None:
    folder = files["panel"].parent
    panel = FILES["panel"].replace("7\t200", "7\t200\tb\tC\t.\t.\t.\t.\tGT" + "\t0|0" * 5 + "\n7\t200", 1)
    panel = panel.replace("1|0\t0|0\t0|0\t1|0\t0|1", "0|0\t0|0\t0|0\t0|0\t0|0")
    target = FILES["target"].replace("\n7\t600", "\n7\t333\tnew\tA\tC\t.\t.\t.\tGT\t1|1\t./.\n7\t600")
    table, report = folder / "excluded.tsv", folder / "report.json"
    found = cases.run("impute", {"panel": panel, "target": target}, "--excluded", table, "--report", report)
    assert found.status == 0, found.log
    assert table.read_text().splitlines() == [
        "file\tcontig\tpos\tid\tref\talt\treason",
        "panel\t7\t200\tb\tC\t.\tno ALT",
        "target\t7\t333\tnew\tA\tC\tnot in the panel",
    ]
    made = json.loads(report.read_text())
    assert made["panel"]["monomorphic_sites"] == 1 and made["panel"]["left_out"] == {"no ALT": 1}
    assert made["target"]["monomorphic_sites"] == 1 and made["harmonisation"]["dropped"] == {"not in the panel": 1}
    monomorphic = cases.run("impute", {"panel": panel, "target": target}).log
    assert "panel: monomorphic sites" in monomorphic and "target: monomorphic sites" in monomorphic
    files_read = {"panel": panel, "target": target, "truth": target}
    found = cases.run("evaluate", files_read, "--excluded", table, "--baselines")
    assert found.status == 2 and "no untyped site" in found.log  # and the table is the one before
    assert len(table.read_text().splitlines()) == 3
    found = cases.run(
        "evaluate",
        files_read | {"truth": FILES["truth"] + "7\t900\tz\tA\tC\t.\t.\t.\tGT\t0|0\t0|1\n"},
        "--excluded",
        table,
    )
    assert found.status == 0, found.log
    assert table.read_text().splitlines()[1:] == [
        "panel\t7\t200\tb\tC\t.\tno ALT",
        "truth\t7\t900\tz\tA\tC\tnot in the panel",
        "target\t7\t333\tnew\tA\tC\tnot in the panel",
    ]


def test_scores_come_with_the_harmonisation(cases: Cases) -> None:
    folder = cases.new_folder()
    truth = FILES["truth"].replace("\n7\t600", "\n7\t555\tz\tA\tC\t.\t.\t.\tGT\t0|0\t0|1\n7\t600")
    found = cases.run("evaluate", {"truth": truth, "imputed": truth}, "--json", folder / "scores.json")
    assert found.status == 0, found.log
    made = json.loads((folder / "scores.json").read_text())["harmonisation"]
    assert {name: each["matched"] for name, each in made.items()} == {"target": 4, "truth": 7, "imputed: x": 7}
    assert made["truth"]["dropped"] == made["imputed: x"]["dropped"] == {"not in the panel": 1}
    assert made["target"]["dropped"] == {} and made["target"]["matched_by_relation"] == {"the same alleles": 4}


def test_nothing_is_written_where_imputation_is_refused_late(cases: Cases) -> None:
    folder = cases.new_folder()
    found = cases.run("impute", {}, "--excluded", folder / "e", "--report", folder / "r", "--region", "9")
    assert found.status == 2 and list(folder.iterdir()) == [] and found.made == set()


# --- maps -------------------------------------------------------------------------------------------

MAPS_TAKEN = {
    "PLINK": "7 . 0.0001 100\n7 . 0.0008 800\n",
    "a byte-order mark": "\ufeff7 . 0.0001 100\n7 . 0.0008 800\n",
    "CRLF": "7 . 0.0001 100\r\n7 . 0.0008 800\r\n",
    "chr": "chr7 . 0.0001 100\nchr7 . 0.0008 800\n",
    "Eagle without a header": "7 100 1.0 0.0001\n7 800 1.0 0.0008\n",
    "HapMap": "Chromosome Position(bp) Rate(cM/Mb) Map(cM)\nchr7 100 1 0.0001\nchr7 800 1 0.0008\n",
    "SHAPEIT": "pos chr cM\n100 7 0.0001\n800 7 0.0008\n",
}


@pytest.mark.parametrize("name", MAPS_TAKEN)
@pytest.mark.parametrize("compress", [lambda content: content, gzip.compress], ids=["plain", "gzip"])
def test_maps(cases: Cases, name: str, compress: Callable[[bytes], bytes]) -> None:
    path = cases.new_folder() / "my.map"
    path.write_bytes(compress(MAPS_TAKEN[name].encode()))
    assert_base(cases.run("impute", {}, "--map", path), cases.base("panel"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("7 . 100 0.0001\n7 . 800 0.0008\n", "exchanged"),
        ("7 . 0.0001 100\n7 . 1e300 800\n", "1e+300"),
        ("7 . nan 100\n7 . 1 800\n", "finite"),
        ("7 . 0.0008 100\n7 . 0.0001 800\n", "decrease"),
        ("8 . 0.0001 100\n8 . 0.0008 800\n", "no contig 7"),
        ("7 . 0.0001 100\n", "7"),
        ("", "no points"),
        ("7 . high 100\n7 . 1 800\n", "line 1"),
        ("7 . 500 100\n7 . 900 800\n", "cM/Mb"),
    ],
)
def test_maps_that_are_refused(cases: Cases, text: str, what: str) -> None:
    path = cases.new_folder() / "my.map"
    path.write_text(text)
    found = cases.run("impute", {}, "--map", path)
    (line,) = found.said("error")
    assert found.status == 2 and line.startswith(f"{path}: ") and what in line and found.made == set(), line


@pytest.mark.parametrize(
    ("text", "outside"),
    [
        ("7 . 0.0001 100\n7 . 0.0003 300\n", "5 of 8 panel sites"),
        ("7 . 1 1000000\n7 . 2 2000000\n", "8 of 8 panel sites"),
    ],
)
def test_a_map_that_does_not_cover_the_panel(cases: Cases, text: str, outside: str) -> None:
    path = cases.new_folder() / "my.map"
    path.write_text(text)
    assert_base(cases.run("impute", {}, "--map", path), cases.base("panel"), f"{outside} lie outside it")


# --- tables of samples ------------------------------------------------------------------------------

TABLE = "P1\tA\nP2\tA\nP3\tB\nP4\tB\nP5\tB\n"
TABLES = {
    "plain": TABLE,
    "a byte-order mark": f"\ufeff{TABLE}",
    "CRLF": TABLE.replace("\n", "\r\n"),
    "blanks": TABLE.replace("P2\tA", "P2\tA ").replace("P4\tB", "P4 \t B"),
    "a tab at the end": TABLE.replace("P2\tA", "P2\tA\t"),
    "a header": f"sample\tpopulation\n{TABLE}",
    "a line twice": f"{TABLE}P1\tA\n",
    "Latin-1 elsewhere": f"{TABLE}P9\t\udce9\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_samples(cases: Cases, name: str) -> None:
    path = cases.new_folder() / "samples.tsv"
    path.write_bytes(encoded(TABLES[name]))
    assert cases.run("impute", {}, "--samples", path).status == 0
    path.write_bytes(encoded(TABLES[name].replace("P1", "T1").replace("P3", "T2")))
    found = cases.run("evaluate", {}, "--samples", path)
    assert found.status == 0 and set(found.result["populations"]) == {"A", "B"}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("P1\tA\n", "4 samples have no line"),
        (f"{TABLE}P1\tB\n", "line 6: P1"),
        ("P1\nP2\n", "line 1"),
        ("", "no line"),
        ("P1\t\n", "line 1"),
    ],
)
def test_tables_that_are_refused(cases: Cases, text: str, what: str) -> None:
    path = cases.new_folder() / "samples.tsv"
    path.write_text(text)
    found = cases.run("impute", {}, "--samples", path)
    (line,) = found.said("error")
    assert found.status == 2 and line.startswith(f"{path}: ") and what in line and found.made == set()
