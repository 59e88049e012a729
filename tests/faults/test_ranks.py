"""Two ranks that are told to stop, and one of them killed: nothing saved is lost, and the run goes on.

The long form, with DeepSpeed's launcher and many more faults, is ``profiling/faults.py``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from embrag_ds.data.simulate import DefaultData
from embrag_ds.runs.checkpoints import newest_first
from embrag_ds.runs.folder import read_outcome
from embrag_ds.runs.record import read_metrics
from tests.conftest import TINY
from tests.faults.test_silent_rank import until
from tests.ranks import environment_of_rank, free_port

pytestmark = pytest.mark.long


def start(root: Path, simulated: DefaultData, cache_dir: Path, folder: Path, *more: str) -> list[subprocess.Popen[str]]:
    """Start the two ranks of a run in ``folder``, which saves a checkpoint after every step."""
    config = folder.parent / "tiny.json"
    config.write_text(json.dumps(TINY))
    command = [sys.executable, str(root / "launch" / "train.py"), "--deepspeed_config", str(config)]
    command += [f"--panel={simulated.panel}", f"--map={simulated.genetic_map}", f"--run-dir={folder}", *more]
    command += ["--set=embrag.train.checkpoint_every=1", f"--cache-dir={cache_dir}"]
    port = free_port()
    return [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment_of_rank(root, rank, 2, port))
        for rank in range(2)
    ]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def test_a_signal_and_a_killed_rank_lose_nothing(
    root: Path, simulated: DefaultData, cache_dir: Path, tmp_path: Path
) -> None:
    folder, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    ranks = start(root, simulated, cache_dir, folder, "--max-steps=100000")
    try:
        until(lambda: len(newest_first(checkpoints)) >= 2, ranks)
        ranks[1].send_signal(signal.SIGUSR1)  # only one of them is told
        said = [each.communicate(timeout=180)[1] for each in ranks]
        assert [each.returncode for each in ranks] == [128 + signal.SIGUSR1] * 2 and "Traceback" not in "".join(said)
        outcome = read_outcome(folder)
        stopped = outcome["step"]
        assert (outcome["state"], outcome["restart"], outcome["reason"]) == ("stopped", True, "SIGUSR1")
        assert newest_first(checkpoints)[0].name == f"step{stopped}" == f"step{losses(folder)[-1][0]}"

        ranks = start(root, simulated, cache_dir, folder, "--max-steps=100000", "--resume")
        until(lambda: newest_first(checkpoints)[0].name == f"step{stopped + 2}", ranks)
        ranks[1].kill()
        said = [each.communicate(timeout=180)[1] for each in ranks]
        assert ranks[0].returncode not in (0, -signal.SIGKILL) and "Traceback" not in said[0]
        newest = int(newest_first(checkpoints)[0].name.removeprefix("step"))
        assert newest >= stopped + 2

        ends = [f"--max-steps={newest + 1}"]
        ranks = start(root, simulated, cache_dir, folder, *ends, "--resume")
        said = [each.communicate(timeout=180)[1] for each in ranks]
        assert [each.returncode for each in ranks] == [0, 0], said
        ranks = start(root, simulated, cache_dir, tmp_path / "whole", *ends)
        said = [each.communicate(timeout=180)[1] for each in ranks]
        assert [each.returncode for each in ranks] == [0, 0], said
    finally:
        for each in ranks:
            each.kill()
            each.communicate()
    assert losses(folder) == losses(tmp_path / "whole") and len(losses(folder)) == newest + 1
    models = [(each / "model.safetensors").read_bytes() for each in (folder, tmp_path / "whole")]
    assert models[0] == models[1]
    assert read_outcome(folder)["state"] == "finished" and not os.path.exists(folder / ".alive")
