"""Comparison of V17 and V18: its computations, and that it runs and writes its numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import compare
import pytest
import stepper
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.config_files import read_tree
from embrag_ds.data.inputs import PanelFiles
from embrag_ds.data.simulate import DefaultData


@given(fixed=st.integers(0, 50), each=st.integers(1, 40), budget=st.integers(1, 2000), most=st.integers(1, 100))
def test_the_largest_batch_is_found_in_few_tries(fixed: int, each: int, budget: int, most: int) -> None:
    for ends_in_a_crash in (False, True):
        tried: list[int] = []

        def cost(samples: int, crash: bool = ends_in_a_crash, seen: list[int] = tried) -> int | None:
            fitted = [number for number in seen if fixed + each * number <= budget]
            assert samples <= max(2, 4 * max(fitted, default=0))  # never more than four times a number that fitted
            seen.append(samples)
            used = fixed + each * samples
            return None if crash and used > budget else used

        expected = max([samples for samples in range(1, most + 1) if fixed + each * samples <= budget], default=0)
        assert compare.largest(cost, budget, most) == compare.Largest(expected, settled=True)
        assert len(tried) == len(set(tried)) <= 11
        assert all(1 <= samples <= most for samples in tried)


@given(fixed=st.integers(0, 50), each=st.integers(1, 40), budget=st.integers(1, 2000), tries=st.integers(0, 5))
def test_no_batch_is_tried_after_the_deadline(fixed: int, each: int, budget: int, tries: int) -> None:
    costs = [fixed + each * samples for samples in range(101)]
    tried: list[int] = []

    def cost(samples: int) -> int:
        tried.append(samples)
        return costs[samples]

    found = compare.largest(cost, budget, 100, late=lambda: len(tried) == tries)
    assert len(tried) <= tries
    fits = [samples for samples in tried if costs[samples] <= budget]
    assert found.samples == max(fits, default=0)
    more = found.samples + 1
    assert found.settled == (more == 101 or (more in tried and costs[more] > budget))


def test_ratios_pair_neighbouring_blocks() -> None:
    def blocks(*seconds: float):
        return [stepper.Block(2, each, 0, 0, ()) for each in seconds]

    ratio = compare.ratio
    assert ratio(blocks(4, 40, 12), blocks(2, 20, 4)) == 2.0  # the machine drifts
    assert ratio(blocks(4), None) is None


def test_the_process_that_trains_may_have_workers(root: Path) -> None:
    """On a GPU it does, and a daemon must not have children."""
    process = stepper.Stepper(stepper.Recipe(root / "ds_configs" / "quickstart.json", (), PanelFiles()))
    assert process._process.is_alive() and not process._process.daemon
    process.close()
    assert process._process.exitcode == 0


@pytest.mark.long
def test_it_runs_and_writes_the_promised_numbers_with_their_shapes(
    root: Path, tmp_path: Path, simulated: DefaultData
) -> None:
    settings = read_tree(root / "ds_configs" / "quickstart.json")[0]
    settings["embrag"]["data"] |= {"window_sites": 64, "overlap_sites": 0, "flank_sites": 16}
    settings["embrag"]["retrieval"]["k"] = 8
    settings["embrag"]["model"] |= {"dims": 16, "heads": 2, "layers": 3}
    small = tmp_path / "small.json"
    small.write_text(json.dumps(settings))
    sizes = "--micro-batch 2 --rounds 1 --steps 2 --budget-gb 4 --most-samples 1"
    options = f"{sizes} --deepspeed_config {small} --out {tmp_path}"
    files = ["--panel", simulated.panel, "--map", simulated.genetic_map, "--samples", simulated.samples]
    done = subprocess.run(
        [
            sys.executable,
            root / "profiling" / "compare.py",
            *options.split(),
            *files,
            "--json",
            tmp_path / "again.json",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "compare.json").read_text())
    assert json.loads((tmp_path / "again.json").read_text()) == result
    for name in (
        "lean_v18_over_v17_step_time",
        "v18_over_v17_step_time",
        "v18_over_v17_peak_memory",
        "largest_batch_ratio",
        "mfu",
    ):
        assert result[name] > 0
    ways = {"V17": ("", ", lean", ", recomputed", ", 2 neighbours"), "V18 refresh": ("", ", lean", ", recomputed")}
    assert result["largest_batch"] == {name + way: 1 for name in ways for way in ways[name]}
    assert result["precision"] == "float32"
    assert result["shapes"]["samples"] == 2 and 50 < result["sites"] <= 64 and result["device"]
    names = ["no retrieval", "V17", "V18 fixed", "V18 refresh", "V18 refresh, lean", "V18 live"]
    assert list(result["variants"]) == names
    for name, variant in result["variants"].items():
        assert {"forward", "backward", "step", "collate"} <= variant["phase_ms"].keys()
        assert ("refresh" in variant["phase_ms"]) == name.startswith("V18 refresh")
        assert ("search" in variant["phase_ms"]) == (name != "no retrieval")
        assert variant["peak_gb"] > 0 and variant["step_ms"] > 0
    table = (tmp_path / "compare.md").read_text()
    assert table in done.stdout and "| time per step, ms | 210 ms | 115 ms |" in table
    assert (tmp_path / "compare.png").stat().st_size > 10_000
