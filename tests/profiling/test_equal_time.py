"""V17 beside V18 at equal time: the number of steps, the schedule, and the table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import equal_time
import pytest

STEP_MS = {"v17": 200.0, "v18": 100.0}


class Launcher:
    """Stand-in for ``trained``: the metrics of a run with the settings that it was given."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    def __call__(
        self, config: Path, folder: Path, given: dict[str, Any], options: argparse.Namespace
    ) -> list[dict[str, Any]]:
        name = config.stem
        steps, every = given["embrag.train.max_steps"], given["embrag.train.log_every"]
        self.runs.append({"name": name, "folder": folder.name, **given})
        lines: list[dict[str, Any]] = [{"kind": "train", "step": 1, "step_ms": 9000.0}]
        lines += [
            {"kind": "train", "step": step, "step_ms": STEP_MS[name]} for step in (*range(every, steps, every), steps)
        ]
        r2 = {"all": 0.9 if name == "v18" else 0.8, "<0.1 %": None}
        lines.append({"kind": "validation", "step": steps, "array": {"r2": r2}, "score": 0.5})
        folder.mkdir(parents=True)
        (folder / "versions.json").write_text("{}")
        return lines


def test_each_trains_the_steps_that_fit_the_time_with_a_schedule_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = Launcher()
    monkeypatch.setattr(equal_time, "trained", launcher)
    monkeypatch.setattr(sys, "argv", ["equal_time.py", "--minutes", "2", "--out", str(tmp_path)])
    equal_time.main()
    assert [run["folder"] for run in launcher.runs] == ["V17-probe", "V17", "V18-probe", "V18"]
    for run, steps in zip(launcher.runs[1::2], (600, 1200), strict=True):
        assert int(run["embrag.train.max_steps"]) == int(run["scheduler.params.total_num_steps"]) == steps
        assert int(run["scheduler.params.warmup_num_steps"]) == 0.05 * steps
    result = json.loads((tmp_path / "equal_time.json").read_text())["runs"]
    assert {name: each["steps"] for name, each in result.items()} == {"V17": 600, "V18": 1200}
    for each in result.values():
        assert each["seconds"] == pytest.approx(120, rel=0.1)
    table = (tmp_path / "equal_time.md").read_text()
    assert "| r2, array, all | 0.8000 | 0.9000 |" in table and "| r2, array, <0.1 % |  |  |" in table
    assert capsys.readouterr().out == table
