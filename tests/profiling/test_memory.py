"""The stand-alone profiler writes the report of some steps, and measures its own cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import memory
import pytest
import torch

from embrag_ds.config_files import read_tree
from embrag_ds.data.simulate import DefaultData
from embrag_ds.engine.distributed import DistributedContext
from tests.ranks import LAUNCHER

CPU = torch.device("cpu")


def test_blocks_are_measured_by_turns() -> None:
    timeline = memory.Alternating(CPU, 2)
    for number in range(12):
        with timeline.phase("forward"):
            time.sleep(0.2 if number in (4, 5) else 0.001)
        with timeline.phase("step"):
            pass
    timeline.close()
    # The first block is a warm-up; of the other five the second and the fourth are on.
    assert [total.count for total in timeline.totals()] == [4, 4]
    wall = [block.wall_s for block in timeline.blocks]
    assert len(wall) == 5
    assert wall[1] > 0.4 > max(wall[:1] + wall[2:])
    assert all(0 < block.cpu_s < 0.3 for block in timeline.blocks)  # asleep most of the time


def test_a_block_is_compared_with_its_neighbours() -> None:
    # The machine slows down all the time; measuring costs a tenth.
    ratio = memory.paired_ratio([10, 1.1 * 11, 12, 1.1 * 13, 14, 1.1 * 15])
    assert ratio.median == pytest.approx(1.1) and ratio.interval == pytest.approx((1.1, 1.1)) and ratio.blocks == 2


@pytest.fixture
def options(root: Path, simulated: DefaultData, tmp_path: Path) -> list[str]:
    """Options of eight steps of a small run."""
    settings = read_tree(root / "ds_configs" / "quickstart.json")[0]
    settings["train_micro_batch_size_per_gpu"] = 2
    settings["embrag"]["data"] |= {"window_sites": 64, "overlap_sites": 16, "flank_sites": 32, "validation_samples": 6}
    settings["embrag"]["data"]["cache_dir"] = str(tmp_path / "cache")
    settings["embrag"]["retrieval"]["k"] = 8
    settings["embrag"]["model"] |= {"dims": 8, "heads": 2, "layers": 1}
    (tmp_path / "small.json").write_text(json.dumps(settings))
    files = [f"--panel={simulated.panel}", f"--map={simulated.genetic_map}", f"--samples={simulated.samples}"]
    return [f"--deepspeed_config={tmp_path / 'small.json'}", "--steps=8", f"--out={tmp_path / 'out'}", *files]


def test_it_profiles_some_steps(
    options: list[str],
    distributed: DistributedContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "argv", ["memory.py", *options])
    # The process group serves other tests, too.
    monkeypatch.setattr(memory, "start_distributed", lambda: distributed)
    monkeypatch.setattr(DistributedContext, "close", lambda self: None)
    with caplog.at_level("INFO"):
        memory.main()
    assert json.loads((tmp_path / "out" / "profile.json").read_text())["micro_batches"] == 8
    assert "Profile of 8 micro-batches" in caplog.text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"profile.json", "profile.png", "trace.json"}


@pytest.mark.long
def test_it_measures_its_own_cost_from_the_command_line(root: Path, options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, root / "profiling" / "memory.py", *options, "--overhead", "--block=1"]
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment = alone | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True, env=environment, timeout=180
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "overhead.json").read_text())
    assert written["ratio"]["wall"]["median"] > 0 and len(written["blocks"]) == 7
    assert "with profiling, cpu time is " in done.stderr and "3 blocks of 1 micro-batches" in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"overhead.json"}
