"""What is tracked: small files, nothing of one machine, and versions and commands that agree wherever they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from embrag_ds import __version__

MEGABYTE = 1_000_000
CHECKPOINT = "embrag_ds/pretrained/model.safetensors"
# Spelled so that this file does not hold them. A URL or a longer path may have such a folder further down.
OF_THIS_MACHINE = re.compile(rb"(?<![\w.~/-])/(?:work|root|tmp/w)/")


@pytest.fixture(scope="module")
def tracked(root: Path) -> list[Path]:
    """Every tracked file that the working tree has."""
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def large(paths: list[Path], root: Path) -> list[str]:
    names = [path.relative_to(root).as_posix() for path in paths if path.stat().st_size > MEGABYTE]
    return [name for name in names if name != CHECKPOINT]


def of_this_machine(paths: list[Path]) -> list[str]:
    return [
        f"{path}: {found.group().decode()}" for path in paths if (found := OF_THIS_MACHINE.search(path.read_bytes()))
    ]


def test_no_tracked_file_is_large_but_the_checkpoint(tracked: list[Path], root: Path) -> None:
    assert root / CHECKPOINT in tracked and len(tracked) > 100
    assert large(tracked, root) == []


def test_no_tracked_file_names_a_folder_of_this_machine(tracked: list[Path]) -> None:
    assert of_this_machine(tracked) == []


@pytest.mark.parametrize("text", ["in {}here", 'path = "{}here"', "--out={}here", "\0{}here\0", "{}here"])
@pytest.mark.parametrize("folder", ["work", "root", "tmp/w"])
def test_a_planted_path_or_a_large_file_is_found(tmp_path: Path, text: str, folder: str) -> None:
    planted = tmp_path / "planted.txt"
    planted.write_text(text.format(f"/{folder}/"))
    assert len(of_this_machine([planted])) == 1 and large([planted], tmp_path) == []
    planted.write_text(f"a.b/{folder}/c ~/{folder}/d ../{folder}/" + "." * MEGABYTE)
    assert of_this_machine([planted]) == [] and large([planted], tmp_path) == ["planted.txt"]


def test_versions_agree(root: Path) -> None:
    assert re.findall(r'^    version="(.+)",$', (root / "setup.py").read_text(), re.MULTILINE) == [__version__]
    assert re.findall(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE) == [__version__]


def test_the_hooks_have_the_pinned_ruff(root: Path) -> None:
    (pinned,) = re.findall(r"^ruff==\S+$", (root / "constraints.txt").read_text(), re.MULTILINE)
    named = re.findall(r"ruff==[^\]\s]+", (root / ".pre-commit-config.yaml").read_text())
    assert len(named) == 2 and set(named) == {pinned}


def test_continuous_integration_is_one_script(root: Path) -> None:
    workflow = (root / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"run: (.+)$", workflow, re.MULTILINE) == ["bash .ci/run"]
    script = (root / ".ci" / "run").read_text()
    assert re.findall(r"^(?:make|\.ci/).+$", script, re.MULTILINE) == [
        "make lint",
        "make docs",
        ".ci/base_install",
        "make test MARKS='not gpu'",
    ]


@pytest.fixture
def make(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What ``make`` would run, a command a line. Every time it is asked, the clock has gone on."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    clock = tmp_path / "bin" / "date"
    clock.parent.mkdir()
    clock.write_text(f"#!/bin/sh\necho >>{tmp_path}/asked\nprintf '20260101-%06d\\n' $(wc -l <{tmp_path}/asked)\n")
    clock.chmod(0o755)
    monkeypatch.setenv("PATH", f"{clock.parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("RUN", "MARKS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"):  # of the make that runs the tests
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> list[str]:
        command = ["make", "--dry-run", "--no-print-directory", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    return run


@pytest.mark.parametrize("named", [None, "runs/mine"])
def test_make_train_deletes_nothing_and_keeps_to_one_folder(make, named: str | None) -> None:
    lines = make("train", *([f"RUN={named}"] if named else []))
    folder = named or "runs/quickstart-20260101-000001"
    assert lines[-3:] == [
        f"deepspeed launch/train.py --deepspeed_config ds_configs/quickstart.json --run-dir {folder}",
        f"embrag impute --run-dir {folder} --adapt off --out {folder}/imputed.vcf.gz",
        f"embrag evaluate --imputed embrag_ds={folder}/imputed.vcf.gz --baselines --json {folder}/evaluation.json",
    ]
    assert not any(re.search(r"\brm\b", line) for line in lines)


def test_every_test_is_run_by_one_of_the_commands(make) -> None:
    said = "\n".join(make("test", "test-long", "test-gpu"))
    chosen = [compile(each, "marks", "eval") for each in re.findall(r"pytest .*-m '?([a-z ]+)", said)]
    assert len(chosen) == 3
    for gpu, long in product((False, True), repeat=2):
        assert [eval(each, {"gpu": gpu, "long": long}) for each in chosen].count(True) == 1


def test_make_clean_leaves_trained_models(make) -> None:
    (line,) = make("clean")
    assert line.startswith("rm -rf .venv ") and "runs" not in line
