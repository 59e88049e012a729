"""The sampling benchmark runs and writes its numbers; their sizes are not tested here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from embrag_ds.data.simulate import DefaultData


@pytest.mark.long
def test_it_writes_the_promised_numbers(root: Path, tmp_path: Path, simulated: DefaultData, cache_dir: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ["--workers", "0", "1", "--micro-batches", "3", "--pause-ms", "1"]
    command = [sys.executable, root / "profiling" / "bench_sampling.py", *sizes, "--panel", simulated.panel]
    subprocess.run(
        [*command, "--json", out],
        check=True,
        capture_output=True,
        cwd=root,
        env=os.environ | {"XDG_CACHE_HOME": str(cache_dir), "PYTHONPATH": str(root)},
    )
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["shape"] == {
        "samples": 32,
        "panel_samples": 60,
        "longest_window": written["shape"]["longest_window"],
    }
    for workers in ("0", "1"):
        assert written["total_ms"][workers] == written["drawing_ms"][workers] + written["staging_ms"]
        assert written["drawing_ms"][workers] > 0
    assert written["staged_mb"] > 0
