"""The imputation benchmark runs every installed tool and writes its numbers; their sizes are not tested here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from embrag_ds.data.simulate import DefaultData
from embrag_ds.evaluation.external_tools import TOOLS, able


@pytest.mark.long
def test_it_measures_time_and_memory_of_every_tool(root: Path, simulated: DefaultData, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    files = ["--panel", simulated.panel, "--target", simulated.target, "--map", simulated.genetic_map]
    command = [sys.executable, root / "profiling" / "bench_impute.py", *files, "--rounds", "1", "--json", out]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=root, env=environment)
    written = json.loads(out.read_text())
    ways = ("", ", first run", ", panel packed", ", panel packed, with the transformer")
    tools = able(simulated.genetic_map)
    converted = {f"{name}, panel converted" for name in tools if name != "beagle"}
    assert set(written["tools"]) == {*tools, *converted, *(f"embrag_ds cpu{how}" for how in ways)}
    assert written["missing"] == [name for name in TOOLS if name not in tools]
    assert written["shape"]["samples"] == 9 and written["shape"]["panel_samples"] == 60
    for name, cost in written["tools"].items():
        # The other tools end before their memory has been sampled twice.
        assert len(cost["seconds"]) == 1 and cost["peak_gb"] > (0.1 if name.startswith("embrag") else 0)
        expected = 9 * written["shape"]["sites"] / cost["median_seconds"]
        assert abs(cost["samples_x_sites_per_second"] - expected) < 1e-6 * expected
