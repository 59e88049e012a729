"""The GPU suite, with stand-ins for the GPU and for the programs that it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

COMPARISONS = ("eager", "compiled")
PARTS = tuple(
    ["check", "tests", "eager", "compiled", "kernels", "memory-v17", "memory-v18", "training", "retrieval", "impute"]
)
STAND_IN = """#!/usr/bin/env bash
echo "$PWD $PYTHONPATH $*" >>"$CALLS"
case "$*" in
    *"-m pip"*) ;;
    *gpu_check.py*) echo "ok  all of it" ;;
    *pytest*) echo "3 passed"; sleep "${TESTS_SLEEP:-0}"; exit "${TESTS_STATUS:-0}" ;;
    *compare.py*)
        while [ "$1" != --out ]; do shift; done
        mkdir -p "$2"; echo "# Table of $(basename "$2")" >"$2/compare.md"
        echo {} >"$2/compare.json"; echo png >"$2/compare.png" ;;
    *train.py*)
        while [ "$1" != --run-dir ]; do shift; done
        mkdir -p "$2"; echo '{"step": 60}' >"$2/metrics.jsonl"; echo {} >"$2/profile.json" ;;
esac
"""

Suite = Callable[..., subprocess.CompletedProcess[str]]


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def suite(root: Path, tmp_path: Path) -> Suite:
    """Function that runs the suite in a copy of its surroundings, with or without a pretended GPU."""
    tree = tmp_path / "tree"
    (tree / "profiling").mkdir(parents=True)
    shutil.copy(root / "profiling" / "gpu_suite.sh", tree / "profiling")
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    stand_in = script(bin_ / "python-stand-in", STAND_IN)

    def run(*arguments: object, gpu: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        script(bin_ / "nvidia-smi", f"#!/bin/sh\necho 'Some GPU, 1.2, 3 MiB'\nexit {0 if gpu else 9}\n")
        environment = {
            **os.environ,
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "PYTHON": str(stand_in),
            "CALLS": str(tmp_path / "calls"),
            "PYTHONPATH": "",
            **more,
        }
        command = [tree / "profiling" / "gpu_suite.sh", *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)

    return run


def archived(results: Path) -> dict[str, bytes]:
    """Files of the archive of results."""
    with tarfile.open(results / "results.tar.gz") as archive:
        files = {each.name: archive.extractfile(each) for each in archive.getmembers() if each.isfile()}
        return {name: stream.read() for name, stream in files.items() if stream is not None}


def test_every_part_runs_and_is_reported(suite: Suite, tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = suite("-", "/some/panel", results)
    assert done.returncode == 0, done.stderr
    report = (results / "report.md").read_text()
    for part in PARTS:
        assert f"| {part} | ok |" in report
    assert "Some GPU, 1.2, 3 MiB" in report and "ok  all of it" in report and "rehearsal" not in report
    for name in COMPARISONS:
        assert f"### Table of {name}" in report
    assert '{"step": 60}' in report
    assert {path.name for path in results.iterdir()} == {"report.md", "suite.log", "results.tar.gz"}
    compared = {f"results/{name}/compare.{kind}" for name in COMPARISONS for kind in ("md", "json", "png")}
    assert set(archived(results)) == {"results/metrics.jsonl", "results/profile.json"} | compared
    calls = (tmp_path / "calls").read_text().splitlines()
    assert not [call for call in calls if "-m pip" in call]
    assert "impute_rate.py" in calls[-1] and calls[-1].endswith("--target /some/panel/target.vcf.gz")
    for call in calls[2:-2]:
        assert "--panel /some/panel/panel.vcf.gz --map /some/panel/genetic.map" in call
        assert call.startswith(str(tmp_path / "tree"))


@pytest.mark.long
def test_the_deadline_ends_it_and_what_was_done_is_kept(suite: Suite, tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = suite("-", "-", results, DEADLINE="12", TESTS_SLEEP="30")
    report = (results / "report.md").read_text()
    assert done.returncode == 124
    assert "| check | ok |" in report and "| tests | over 1" in report
    for part in PARTS[2:]:
        assert f"| {part} | not begun: the deadline is near |" in report
    assert "3 passed" in (results / "suite.log").read_text()  # written while the part runs


def test_a_rehearsal_is_small_on_the_cpu_and_says_so(suite: Suite, tmp_path: Path) -> None:
    suite("-", "-", tmp_path / "results", REHEARSAL="1")
    assert "A rehearsal on a CPU" in (tmp_path / "results" / "report.md").read_text()
    calls = (tmp_path / "calls").read_text()
    assert "gpu_check.py --device cpu" in calls and calls.count("embrag.model.layers=1") == 5


def test_single_parts_can_be_run(suite: Suite, tmp_path: Path) -> None:
    suite("-", "-", tmp_path / "results", ONLY="check training")
    report = (tmp_path / "results" / "report.md").read_text()
    assert [part for part in PARTS if f"| {part} |" in report] == ["check", "training"]


def test_wheels_are_installed_without_a_network_and_used(suite: Suite, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "one.whl").touch()
    suite(wheels, "-", tmp_path / "results")
    first, *others = (tmp_path / "calls").read_text().splitlines()
    assert "-m pip install -q --no-index" in first and str(wheels / "one.whl") in first
    site = first.split("--target ")[1].split()[0]
    assert all(site in call.split()[1] for call in others if call.split()[1:])
    assert not Path(site).exists()


def test_a_part_that_fails_fails_alone(suite: Suite, tmp_path: Path) -> None:
    done = suite("-", "-", tmp_path / "results", TESTS_STATUS="3")
    report = (tmp_path / "results" / "report.md").read_text()
    assert done.returncode == 3
    assert "| tests | failed (3) |" in report and "| training | ok |" in report


def test_without_a_gpu_it_ends_with_one_line_and_writes_nothing(suite: Suite, tmp_path: Path) -> None:
    done = suite("-", "-", tmp_path / "results", gpu=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()
