"""The examples of starts do what they say, with stand-ins for what this machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STAND_IN = '#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >>"{log}"\n{more}\n'


def stand_ins(folder: Path, **programs: str) -> tuple[dict[str, str], Path]:
    """Environment in which these programs only note how they were called, and do what is given; and the notes."""
    log = folder / "called"
    for name, more in programs.items():
        program = folder / name
        program.write_text(STAND_IN.format(name=name, log=log, more=more))
        program.chmod(0o755)
    python = folder / "python"
    python.symlink_to(sys.executable)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}, log


def call(script: Path, environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("restart", [True, False])
def test_a_slurm_job_goes_back_to_the_queue_only_if_the_run_says_so(root: Path, tmp_path: Path, restart: bool) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "outcome.json").write_text(json.dumps({"restart": restart}))
    environment, log = stand_ins(tmp_path, srun="exit 138", scontrol="")
    environment |= {"SLURM_JOB_ID": "4711", "RUN": str(run), "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = call(root / "launch" / "examples" / "slurm.sh", environment, "--panel", "p.vcf.gz")
    assert done.returncode == 138, done.stderr
    first, *others = log.read_text().splitlines()
    assert first == f"srun --kill-on-bad-exit=0 embrag train --deepspeed_config v18 --run-dir {run} --panel p.vcf.gz"
    assert others == ["scontrol requeue 4711"] * restart


def test_a_run_with_a_checkpoint_goes_on(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step5").mkdir(parents=True)
    environment, log = stand_ins(tmp_path, deepspeed="", srun="", scontrol="")
    environment |= {"RUN": str(tmp_path / "run"), "GPUS": "3", "PORT": "1234", "NODE": "1", "HOSTS": "n1 n2"}
    environment |= {"SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(tmp_path)}
    for name in ("one_node", "several_nodes", "slurm"):
        call(root / "launch" / "examples" / f"{name}.sh", environment)
    one, several, slurm = log.read_text().splitlines()
    given = f"--deepspeed_config v18 --run-dir {tmp_path / 'run'} --resume"
    assert one == f"deepspeed --num_accelerators 3 --master_port 1234 launch/train.py {given}"
    assert several.startswith("deepspeed --hostfile ")
    where = "--no_ssh --node_rank 1 --master_addr n1 --master_port 1234"
    assert several.endswith(f"{where} launch/train.py {given}")
    assert slurm == f"srun --kill-on-bad-exit=0 embrag train {given}"
