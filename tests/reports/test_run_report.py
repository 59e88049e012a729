"""The page of a run: its numbers are those of its files, whatever state the run is in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embrag_ds.evaluation.metrics import BIN_NAMES
from embrag_ds.reports.text import NOTHING, number
from embrag_ds.runs.record import RESUME, whole_metrics
from tests.reports.pages import Parsed
from tests.reports.runs import CONFIG, MASKS, PROFILE, line_of_training, line_of_validation, write_run, write_steps

Report = Callable[..., Parsed]
Refused = Callable[..., str]
SECTIONS = ["How it ended", "Training", "Validation", "Memory and phases", "Reference cache", "Evaluation"]
SECTIONS += ["Configuration", "Versions", "Log"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    return write_run(tmp_path / "run <1> & more")


def check_curves(found: Parsed, steps: list[int], validated: list[int]) -> None:
    """Compare the page's numbers with what was written at these steps."""
    training = found.numbers["training"]
    assert training["step"] == steps
    written = [line_of_training(step) for step in steps]
    for name in written[0]:
        assert training.get(name, [None] * len(steps)) == [line[name] for line in written], name
    assert "device_peak_bytes" not in training
    assert [each["step"] for each in found.numbers["validation"]] == validated
    for each in found.numbers["validation"]:
        line = line_of_validation(each["step"])
        assert each["score"] == line["score"] and each["masks"] == {mask: line[mask] for mask in MASKS}


def test_a_finished_run(report: Report, run: Path) -> None:
    found = report(run)
    assert found.headings == SECTIONS
    check_curves(found, list(range(2, 41, 2)), [10, 20, 30, 40])
    assert found.numbers["outcome"]["state"] == "finished" and found.numbers["steps"] == 40
    assert found.numbers["torn"] == found.numbers["superseded"] == 0 and found.numbers["resumes"] == []
    assert "The run has finished." in found.text and "40 of 40" in found.text and "Reason" not in found.text
    loss = found.table("Loss of training")
    assert loss.header == ["optimiser steps", "total", "haplotype loss", "genotype loss"]
    written = [line_of_training(step) for step in range(2, 41, 2)]
    assert loss.rows == [
        [str(2 * place + 2), *(number(line[name]) for name in ("loss", "haplotype_loss", "genotype_loss"))]
        for place, line in enumerate(written)
    ]
    assert [row[1] for row in found.table("Speed").rows] == [number(line["samples_per_second"]) for line in written]
    memory = found.table("Most memory until now")
    assert memory.rows[0] == ["2", number(((1 << 30) + 2) / (1 << 30))]
    assert "no memory of a GPU" in found.text
    assert found.table("Staleness").rows[-1] == ["40", "0"]
    assert "Generation 2 is in use, and 2 refreshes were left out." in found.text
    assert "Dashed vertical lines: a new generation." in found.text
    assert "not finite: 1." in found.text


def test_validation_by_frequency(report: Report, run: Path) -> None:
    found = report(run)
    newest = line_of_validation(40)
    rows = found.table("r2 by minor-allele frequency at step 40").rows
    assert rows == [[mask, *(number(newest[mask]["r2"][name]) for name in BIN_NAMES)] for mask in MASKS]
    assert rows[0][1] == NOTHING
    of_mask = found.table(f"r2 by frequency (MAF), {MASKS[1]}")
    # A bin without sites has no curve.
    assert of_mask.header[1:] == [*BIN_NAMES[1:5], "all", "all, retrieval alone"]
    for row, step in zip(of_mask.rows, (10, 20, 30, 40), strict=True):
        section = line_of_validation(step)[MASKS[1]]
        values = [section["r2"][name] for name in (*BIN_NAMES[1:5], "all")] + [section["prior_r2"]["all"]]
        assert row == [str(step), *map(number, values)]
    accuracy = found.table("Accuracy of called genotypes")
    assert accuracy.rows[0] == ["10", *(number(line_of_validation(10)[mask]["accuracy"]) for mask in MASKS)]


def test_settings_versions_log_and_names(report: Report, run: Path) -> None:
    found = report(run)
    settings = {row[0]: row[1] for caption in ("Our half", "DeepSpeed's half") for row in found.table(caption).rows}
    assert settings == {
        "embrag.seed": "5",
        "embrag.train.max_steps": "40",
        "embrag.train.eval_every": "10",
        "embrag.data.panel": "<b>&panel",
        "train_micro_batch_size_per_gpu": "6",
        "zero_optimization.stage": "1",
    }
    assert ["packages.faiss", "none"] in found.table("Versions").rows and "Command: embrag train <a>" in found.text
    assert found.numbers["complaints"] == 1 and "a <warning> & more" in found.text
    assert "Run run <1> & more" in found.text


def test_what_is_absent_is_said(report: Report, run: Path) -> None:
    found = report(run)
    assert "This run was not profiled: --profile nvml" in found.text
    assert "has no evaluation.json, which embrag evaluate --json" in found.text
    for name in ("config.json", "versions.json", "outcome.json", "run.log"):
        (run / name).unlink()
    found = report(run)
    for name in ("config.json", "versions.json", "outcome.json", "run.log"):
        assert f"There is no {name}" in found.text
    assert "how the run ended is not known" in found.text and "40 of unknown" in found.text


@pytest.mark.parametrize("folder", [["outcome.json"], ["config.json"], ["checkpoints"], ["metrics.jsonl"]])
def test_a_run_that_has_hardly_begun(report: Report, run: Path, folder: list[str]) -> None:
    for path in run.iterdir():
        if path.name not in folder:
            path.unlink()
    if folder == ["checkpoints"]:
        (run / "checkpoints").mkdir()
    if folder == ["metrics.jsonl"]:
        (run / "metrics.jsonl").write_text("")
    found = report(run)
    assert found.headings == SECTIONS
    assert "No line of training has been written yet." in found.text and "no validation yet" in found.text
    assert "nothing was logged yet" in found.text and found.numbers["training"] == {"step": []}


def test_a_failed_run_says_why(report: Report, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "failed", "UserError: <disk> full; free some", last=12)
    found = report(run)
    assert "The run has failed. Reason: UserError: <disk> full; free some" in found.text and "12 of 40" in found.text
    # The end of the log is open.
    assert "<details open>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("state", ["running", "stopped", "interrupted", "later"])
def test_a_run_that_has_not_finished(report: Report, tmp_path: Path, state: str) -> None:
    found = report(write_run(tmp_path / "run", state, "SIGTERM", last=12))
    says = {
        "running": "The run is under way, or was killed before it could say how it ended. If",
        "stopped": "stopped by a signal, after a checkpoint. Reason: SIGTERM If",
        "interrupted": "without a checkpoint at its end. Reason: SIGTERM If",
        "later": "outcome.json has a state that is not known here: later.",
    }
    assert says[state] in found.text and ("--resume goes on" in found.text) == (state != "later")
    profile = "writes when it ends" if state == "running" else "was not profiled"
    assert profile in found.text


@pytest.mark.parametrize("cut", [1, 2, 30, 400])
def test_a_last_line_that_is_cut_off(report: Report, run: Path, cut: int) -> None:
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    assert json.loads(whole.splitlines()[-1])["kind"] == "validation" and len(whole.splitlines()[-1]) > 400
    path.write_bytes(whole[:-cut])
    found = report(run)
    torn = cut > 1  # without its line end alone, the line is whole
    check_curves(found, list(range(2, 41, 2)), [10, 20, 30] if torn else [10, 20, 30, 40])
    assert found.numbers["torn"] == torn and ("not whole, as a killed process leaves one" in found.text) == torn


def test_a_resumed_run(report: Report, run: Path) -> None:
    """Killed at step 40 and resumed from 26: lines beyond that are superseded, also those not written again."""
    with (run / "metrics.jsonl").open("ab") as lines:
        lines.write(b'{"kind": "train", "st')
    write_steps(run, 28, 34, resume=26)
    found = report(run)
    check_curves(found, list(range(2, 35, 2)), [10, 20, 30])
    # Seven lines of training and two of validation.
    assert found.numbers["superseded"] == 9 and found.numbers["torn"] == 1 and found.numbers["steps"] == 34
    assert found.numbers["resumes"] == [{"step": 26, "changes": {"optimizer.params.lr": [0.1, "<new>"]}}]
    row = found.table("Resumed: 1").rows[0]
    assert row[0] == "26" and row[2] == "optimizer.params.lr: [0.1, '<new>']"
    assert "Dashed vertical lines: resumed." in found.text


def test_a_run_that_was_resumed_and_has_not_logged_again(report: Report, run: Path) -> None:
    write_steps(run, 28, 26, resume=26)
    found = report(run)
    assert found.numbers["steps"] == 26 and found.numbers["training"]["step"][-1] == 26
    write_steps(run, 8, 6, resume=6)
    found = report(run)
    assert found.numbers["steps"] == 6 and found.numbers["training"]["step"][-1] == 6


def test_whole_metrics_counts_what_read_metrics_leaves_out(run: Path) -> None:
    """The oracle reads from the end: a line counts unless a later one has its place, or a later resume is before it."""
    write_steps(run, 28, 34, resume=26)
    write_steps(run, 12, 12, resume=10)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    limit, seen, held = 1 << 60, set(), []
    for line in reversed(lines):
        if line["kind"] == RESUME:
            limit = min(limit, line["step"])
        elif line["step"] <= limit and (line["kind"], line["step"]) not in seen:
            seen.add((line["kind"], line["step"]))
            held.append(line)
    found = whole_metrics(run / "metrics.jsonl")
    assert sorted(found.held, key=str) == sorted(held, key=str)
    resumes = [line for line in lines if line["kind"] == RESUME]
    assert found.resumes == resumes and found.superseded == len(lines) - len(held) - len(resumes) and found.torn == 0


def test_profiles_of_all_ranks(report: Report, run: Path) -> None:
    for name in ("profile.json", "profile-rank10.json", "profile-rank2.json"):
        (run / name).write_text(json.dumps(PROFILE))
    found = report(run)
    assert list(found.numbers["profiles"]) == ["profile.json", "profile-rank2.json", "profile-rank10.json"]
    assert found.numbers["profiles"]["profile.json"] == {name: PROFILE[name] for name in ("peaks", "phases")}
    assert "not profiled" not in found.text and "a CPU; NVML <x>" in found.text
    over_time = found.table("Memory over time (profile-rank2.json)")
    assert over_time.rows == [["0", "1"], ["0.1", "2"], ["0.2", "3"]]
    assert found.table("Load over time (profile.json)").rows[1] == ["0.1", "150"]
    phases = found.table("Phases (profile.json); collate")
    assert phases.rows == [
        ["forward", "MainThread", "cpu", "4", "2.5", "3.5"],
        ["search", "beside", "cpu", "4", "1", NOTHING],
    ]
    assert "3 GiB" in found.text and "150 %" in found.text


def test_an_evaluation(report: Report, run: Path) -> None:
    r2 = {name: 0.5 + place / 100 for place, name in enumerate(BIN_NAMES)}
    tools = {"ours <1>": {"aggregate_r2": r2 | {"<0.1 %": None}}, "faulty": 3}
    (run / "evaluation.json").write_text(json.dumps({"tools": tools, "samples": 60, "sites": {"all": 4693}}))
    found = report(run)
    assert found.numbers["evaluation"] == {"ours <1>": r2 | {"<0.1 %": None}}
    table = found.table("Aggregate dosage r2 by minor-allele frequency, 60 samples")
    assert table.rows[0][0] == "sites" and table.rows[0][-1] == "4,693"
    assert table.rows[1] == ["ours <1>", NOTHING, *(number(r2[name]) for name in BIN_NAMES[1:])]


BROKEN: dict[str, list[bytes]] = {
    "outcome.json": [b"", b'{"state": "fin', b"[1]", b"\xff\xfe", b"[" * 100_000],
    "config.json": [b"{", b"null"],
    "versions.json": [b"{"],
    "profile.json": [b'{"header": {', b"3"],
    "evaluation.json": [b"{"],
}


@pytest.mark.parametrize(("name", "content"), [(name, each) for name, found in BROKEN.items() for each in found])
def test_a_file_that_cannot_be_read_is_named(
    report: Report, run: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    (run / name).write_bytes(content)
    found = report(run)
    assert list(found.numbers["unreadable"]) == [name]
    assert f"{name} cannot be read: " in found.text and found.headings == SECTIONS
    assert [record.message for record in caplog.records if f"{run / name}: cannot be read" in record.message]


ODD: list[Any] = [None, True, "text", [], {}, [1], {"r2": 3}, 1e400, -1e300, {"a": {"b": [None]}}]


@pytest.mark.parametrize("value", ODD)
def test_values_of_other_types_are_left_out(report: Report, run: Path, value: Any) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines += [
        {name: value for name in line} | {"step": line["step"] + 100, "kind": line["kind"]} for line in lines[-2:]
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, content in (
        ("profile.json", PROFILE),
        ("versions.json", {"command": 0, "x": 0}),
        ("config.json", CONFIG),
    ):
        (run / name).write_text(json.dumps({key: value for key in content}))
    (run / "evaluation.json").write_text(
        json.dumps({"tools": {"a": value, "b": {"aggregate_r2": value}}, "sites": value})
    )
    outcome = {"state": value, "restart": value, "reason": value, "step": value, "time": value}
    (run / "outcome.json").write_text(json.dumps(outcome))
    found = report(run)
    assert found.headings == SECTIONS and found.numbers["training"]["step"][-1] == 140


def test_a_long_run_makes_no_long_page(report: Report, run: Path, tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": step, "time": step, **line_of_training(step)} for step in range(1, 12_001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report(run)
    steps = found.numbers["training"]["step"]
    assert len(steps) == 5_000 and (steps[0], steps[-1]) == (1, 12_000) and found.numbers["steps"] == 12_000
    assert len(found.table("Loss of training").rows) == 200
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


def test_a_folder_that_holds_no_run(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run.log").write_text("")
    said = refused(tmp_path)
    assert said.startswith(f"{tmp_path}: it is no run folder") and "embrag train" in said
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "outcome.json", "config.json", "profile-rank1.json", "run.log"])
def test_no_file_of_the_run_is_replaced(refused: Refused, run: Path, tmp_path: Path, name: str) -> None:
    if name.startswith("profile"):
        (run / name).write_text("{}")
    before = (run / name).read_bytes()
    os.link(run / name, tmp_path / "link.html")
    for out in (run / name, tmp_path / "link.html"):
        assert "--out is the same file as INPUT" in refused(run, f"--out={out}")
    assert (run / name).read_bytes() == before


def test_options_of_an_imputed_file(refused: Refused, run: Path) -> None:
    for option in ("--impute-report", "--excluded"):
        said = refused(run, f"{option}={run / 'run.log'}")
        assert said.startswith(f"{option} is of an imputed file, and {run} is a folder")
    shutil.rmtree(run)
    assert f"{run}: cannot read it (No such file or directory)" in refused(run)


def test_a_place_that_cannot_be_written(refused: Refused, run: Path, tmp_path: Path) -> None:
    for out, said in ((tmp_path / "none" / "page.html", "does not exist; create it"), (tmp_path, "it is a folder")):
        assert said in refused(run, f"--out={out}")


@pytest.mark.parametrize("content", ["mine", "<!DOCTYPE html>\n<html></html>"])
def test_only_an_older_report_is_replaced(
    report: Report, refused: Refused, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    page = tmp_path / "page.html"
    page.write_text(content)
    assert f"{page}: it is there and is no report of embrag" in refused(run, f"--out={page}")
    assert page.read_text() == content
    page.write_text("")
    report(run)
    before = page.read_bytes()
    caplog.clear()
    report(run)
    assert page.read_bytes() == before and f"{page}: an older report is there" in caplog.text
