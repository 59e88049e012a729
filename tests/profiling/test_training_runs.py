"""Training runs in processes of their own: what they are given, the ranks' places, and failures."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import training_runs

from embrag_ds.errors import UserError

NO_FILES = argparse.Namespace(set=[], panel=None, map=None, samples=None)


class Started:
    """Stand-in for ``subprocess.Popen``: rank ``fails`` ends with status 2 and the others wait for it forever."""

    def __init__(self, fails: int | None = None):
        self.fails = fails
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.killed = 0
        self.polled = 0

    def __call__(self, command: list[str], stdout: Any, env: dict[str, str]) -> Started:
        folder = Path(command[command.index("--run-dir") + 1])
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        self.commands.append(command)
        self.environments.append(env)
        process = Started(self.fails)
        process.kill = self.kill  # type: ignore[method-assign]
        process.rank = int(env.get("RANK", 0))  # type: ignore[attr-defined]
        return process

    def kill(self) -> None:
        self.killed += 1

    def wait(self, timeout: float | None = None) -> int:
        if self.fails is None:
            return 0
        if self.rank != self.fails and timeout is not None:  # type: ignore[attr-defined]
            self.polled += 1
            assert self.polled < 100, "the failure of the other rank was not noticed"
            raise subprocess.TimeoutExpired("python", timeout)
        return 2


def test_a_run_gets_its_files_and_its_settings_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started()
    monkeypatch.setattr(training_runs.subprocess, "Popen", started)
    options = argparse.Namespace(set=["a=1"], panel=Path("p.vcf"), map=None, samples=None)
    settings = {"b": 0.5, "c": None, "d": {"every_steps": 2}, "e": "torch", "f": False}
    lines = training_runs.trained(Path("x.json"), tmp_path / "run", settings, options)
    assert lines == [{"step": 1}, {"step": 2}]
    (command,) = started.commands
    words = ["--deepspeed_config", "x.json", "--run-dir", str(tmp_path / "run"), "--panel", "p.vcf"]
    for override in ("a=1", "b=0.5", "c=null", 'd={"every_steps": 2}', "e=torch", "f=false"):
        words += ["--set", override]
    assert command[2:] == words and Path(command[1]).name == "train.py"


def test_ranks_find_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started()
    monkeypatch.setattr(training_runs.subprocess, "Popen", started)
    training_runs.trained(Path("x.json"), tmp_path / "run", {}, NO_FILES, ranks=2)
    places = [{name: env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} for env in started.environments]
    assert places == [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"} for rank in "01"]
    assert len({(env["MASTER_ADDR"], env["MASTER_PORT"]) for env in started.environments}) == 1


@pytest.mark.parametrize(("ranks", "fails"), [(1, 0), (2, 0), (2, 1)])
def test_a_rank_that_fails_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, fails: int
) -> None:
    started = Started(fails)
    monkeypatch.setattr(training_runs.subprocess, "Popen", started)
    with pytest.raises(UserError, match=r"^x\.json: the run in .* failed"):
        training_runs.trained(Path("x.json"), tmp_path / "run", {}, NO_FILES, ranks=ranks)
    assert started.killed == ranks


def test_a_settings_file_that_is_not_there_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="failed"):
        training_runs.trained(tmp_path / "none.json", tmp_path / "run", {}, NO_FILES)


def test_metrics_are_those_of_the_run_folder() -> None:
    assert json.loads(training_runs._as_text({"every_steps": 2})) == {"every_steps": 2}
