"""A rank that is stopped in the middle of training is noticed by the other, which names it and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from embrag_ds.data.simulate import DefaultData
from embrag_ds.runs.alive import FOLDER
from tests.conftest import TINY
from tests.ranks import environment_of_rank, free_port

pytestmark = pytest.mark.long

WITHIN_S = 120.0


def until(condition: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    """Wait for a condition while all processes run."""
    began = time.monotonic()
    while not condition():
        assert all(process.poll() is None for process in processes), [each.communicate()[1] for each in processes]
        assert time.monotonic() - began < WITHIN_S, "the run does not get that far"
        time.sleep(0.05)


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_rank_is_named_and_the_other_ends(
    root: Path, simulated: DefaultData, cache_dir: Path, tmp_path: Path, stopped: int
) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    run_dir, port = tmp_path / "run", free_port()
    settings = ("train.max_steps=1000000", "train.patience_s=4", f"data.cache_dir={cache_dir}")
    command = [sys.executable, str(root / "launch" / "train.py"), "--deepspeed_config", str(tmp_path / "tiny.json")]
    command += [f"--panel={simulated.panel}", f"--map={simulated.genetic_map}", f"--run-dir={run_dir}"]
    command += [f"--set=embrag.{each}" for each in settings]
    ranks = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment_of_rank(root, rank, 2, port))
        for rank in range(2)
    ]
    try:
        until(lambda: (run_dir / "metrics.jsonl").exists(), ranks)
        ranks[stopped].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        other = ranks[1 - stopped]
        said = other.communicate(timeout=60)[1].splitlines()
        waited = time.monotonic() - began
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert other.returncode == 1 and 3 < waited < 30
    line = next(each for each in said if "no sign of progress" in each)
    assert f"error: no sign of progress in 4 s (embrag.train.patience_s) from rank {stopped} (" in line
    assert f"process {ranks[stopped].pid})" in line and "last at step " in line
    assert line.endswith(f"go on with --resume --run-dir {run_dir}") and "Traceback" not in "\n".join(said)
    log = run_dir / ("run-rank1.log" if stopped == 0 else "run.log")
    assert line.partition("error: ")[2] in log.read_text()
    assert os.path.isdir(run_dir / FOLDER)  # which the next start clears
