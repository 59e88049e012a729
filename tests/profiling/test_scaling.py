"""Arithmetic of the comparison of ranks, and of the two nodes; the runs themselves are for an idle machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from scaling import row, speed_of
from two_nodes import SKIPPED, losses_of


def test_a_runs_speed_leaves_out_its_beginning_and_its_validations() -> None:
    lines = [{"kind": "train", "samples_per_second": each} for each in (1.0, 50.0, 100.0, 104.0, 108.0, 90.0)]
    lines.insert(3, {"kind": "validation", "score": 0.5})
    assert speed_of("\n".join(map(json.dumps, lines))) == 102.0


def test_the_row_has_the_median_ratio_of_the_rounds() -> None:
    line = row("v18_cpu", ["embrag.seed=2"], [10.0, 20.0, 10.0], [18.0, 40.0, 17.0], 2, 0.01).splitlines()[-1]
    assert line.endswith(" 10.0 | 18.0 | 1.80 (1.70 to 2.00, 3 rounds) | 0.01 |")
    assert "v18_cpu, embrag.seed=2" in line


def test_losses_are_those_of_training(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "loss": 0.5}\n{"kind": "validation"}\n')
    assert losses_of(tmp_path / "metrics.jsonl") == [0.5] and losses_of(tmp_path / "none") == []


def test_two_nodes_are_skipped_visibly_where_namespaces_cannot_be_made(root: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(root), "PATH": str(tmp_path)}
    script = root / "profiling" / "two_nodes.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == SKIPPED
    assert done.stderr.startswith("skipped: ip, unshare, nsenter: not installed")
