"""Numba loops use torch's number of threads, and several Python threads may run them at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from concurrent.futures import ThreadPoolExecutor
import torch
from embrag_ds.ops.li_stephens import count_true
rows = torch.ones(64, 400, 50, dtype=torch.bool)
count_true(rows)
with ThreadPoolExecutor(4) as callers:
    for total in callers.map(lambda number: count_true(rows), range(200)):
        assert (total == 400).all()
import numba
print(numba.threading_layer(), numba.get_num_threads(), torch.get_num_threads())
"""


def output_of(root: Path, code: str, **environment: str) -> str:
    """Standard output of a new Python process that runs ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_threads_run_loops_at_once_and_with_the_threads_that_torch_was_given(root: Path, layer: str) -> None:
    assert output_of(root, SCRIPT, OMP_NUM_THREADS="1", NUMBA_THREADING_LAYER=layer) == f"{layer} 1 1"
