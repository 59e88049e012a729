"""Imputation on a CPU needs no torch, unless the model adapts or runs its transformer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embrag_ds.data.simulate import DefaultData

pytestmark = pytest.mark.long

PROGRAM = """
import sys
if sys.argv[1] == "without":
    sys.modules["torch"] = None  # its import fails
else:
    import torch
from embrag_ds.cli.main import main
main("impute", sys.argv[2:])
"""


@pytest.mark.parametrize("options", [[], ["--threads=1"], ["--region=1:1-400000", "--samples-per-batch=7"]])
def test_the_output_is_the_same_without_torch(
    root: Path, simulated: DefaultData, tmp_path: Path, options: list[str]
) -> None:
    outputs = []
    for way in ("with", "without"):
        outputs.append(tmp_path / f"{way}.vcf.gz")
        files = [f"--panel={simulated.panel}", f"--target={simulated.target}", f"--map={simulated.genetic_map}"]
        command = [sys.executable, "-c", PROGRAM, way, *files, f"--out={outputs[-1]}", "--adapt=off", *options]
        command += [f"--cache-dir={tmp_path / 'cache'}", "--device=cpu"]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
