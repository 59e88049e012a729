"""Scripts that measure on a GPU: the table of kernels, and the rate of imputation, which any machine can measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels import table
from stepper import Block, Kernel

from embrag_ds.data.simulate import DefaultData


def run(root: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "profiling" / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )


def test_kernels_are_given_by_step_and_the_rest_is_summed_up() -> None:
    kernels = [Kernel(f"first|{number}", 8, 80.0 - number) for number in range(45)]
    text = table(kernels, Block(4, 0.5, 0, 0, ()), steps=4)
    total = sum(each.ms for each in kernels) / 4
    assert f"A step takes 125.0 ms, its kernels {total:.1f} ms." in text
    assert "| `first\\|0` | 2.0 | 20.000 |" in text
    rest = sum(each.ms for each in kernels[40:]) / 4
    assert f"| 5 others | 10.0 | {rest:.3f} |" in text and "first\\|40" not in text


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_no_kernels_are_recorded(root: Path, tmp_path: Path) -> None:
    done = run(root, "kernels.py", "--out", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr == "error: profiling/kernels.py records what runs on a GPU, and torch finds none here\n"


@pytest.mark.long
def test_the_rate_of_imputation_is_measured_with_and_without_the_transformer(
    root: Path, tmp_path: Path, simulated: DefaultData
) -> None:
    files = ["--panel", simulated.panel, "--map", simulated.genetic_map, "--target", simulated.target]
    done = run(root, "impute_rate.py", *files, "--device", "cpu", "--rounds", 2, "--json", tmp_path / "rate.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rate.json").read_text())
    assert [row["transformer"] for row in found["rows"]] == [False, True]
    for row, line in zip(found["rows"], done.stdout.splitlines(), strict=True):
        assert len(row["seconds"]) == 2 and row["rate"] > 0
        assert f"{row['rate']:.3g} samples x sites a second" in line
