"""Training started by torchrun, srun and mpirun: the ranks form one run, and only rank 0 talks.

Of srun and mpirun there are stand-ins, which start processes with the variables that those set.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from embrag_ds.data.simulate import DefaultData
from embrag_ds.runs.launchers import PLACE, RANKS_HERE, _port_of_job
from tests.conftest import TINY
from tests.ranks import free_port

pytestmark = pytest.mark.long

SRUN = """\
for rank in 0 1; do
    SLURM_JOB_ID=$JOB SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 \\
    SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=2 "$@" & started="$started $!"
done
"""
MPIRUN = """\
for rank in 0 1; do
    OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_LOCAL_RANK=$rank OMPI_COMM_WORLD_LOCAL_SIZE=2 \\
    PMIX_RANK=$rank "$@" & started="$started $!"
done
"""
ENDS = "status=0; for each in $started; do wait $each || status=$?; done; exit $status\n"

PROGRAM = """
from embrag_ds.runs.launchers import take_place
take_place()
import torch
from embrag_ds.engine.distributed import collective_limit, start_distributed
from embrag_ds.runs.meeting import meet
with meet(collective_limit(0)) as met:
    group = start_distributed()
    total = torch.tensor([group.rank + 1])
    torch.distributed.all_reduce(total)
    threads = met.gather(str(torch.get_num_threads()))[0]
    print(f"{group.ranks} {int(total)} {threads}\\n", end="", flush=True)  # one write: lines of ranks do not mix
    group.close()
"""


def environment(root: Path, **more: str) -> dict[str, str]:
    """Environment of a terminal, in which nobody has set a rank or a number of threads."""
    ours = {*PLACE, RANKS_HERE, "OMP_NUM_THREADS"}
    return {name: value for name, value in os.environ.items() if name not in ours} | {"PYTHONPATH": str(root)} | more


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=180)


@pytest.fixture
def training(root: Path, simulated: DefaultData, cache_dir: Path, tmp_path: Path) -> list[str]:
    """The script and the options of the tiny run, in a folder."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    files = [f"--panel={simulated.panel}", f"--map={simulated.genetic_map}", f"--run-dir={tmp_path / 'run'}"]
    settings = [f"--set=embrag.{each}" for each in ("train.max_steps=2", f"data.cache_dir={cache_dir}")]
    return [str(root / "launch" / "train.py"), "--deepspeed_config", str(tmp_path / "tiny.json"), *files, *settings]


def test_ranks_of_torchrun_are_one_run(root: Path, training: list[str], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run([*torchrun, *training], environment(root))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 2/2") == 1 and "2 x cpu" in done.stderr
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["ranks"] == 2
    assert (tmp_path / "run" / "run-rank1.log").exists() and not (tmp_path / "run" / ".alive").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def job_with_a_free_port() -> str:
    """Number of a job whose port, which follows from it, nobody has."""
    for job in map(str, range(os.getpid(), os.getpid() + 1000)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", _port_of_job({"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0"})))
            return job
    raise AssertionError("no port is free")


@pytest.mark.parametrize("launcher", [SRUN, MPIRUN], ids=["srun", "mpirun"])
def test_ranks_of_other_launchers_form_one_group(root: Path, launcher: str) -> None:
    port = {"JOB": job_with_a_free_port()} if launcher == SRUN else {"MASTER_PORT": str(free_port())}
    done = run(["bash", "-c", launcher + ENDS, "launcher", sys.executable, "-c", PROGRAM], environment(root, **port))
    assert done.returncode == 0, done.stderr
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    lines = [line for line in done.stdout.splitlines() if "[Gloo]" not in line]
    assert [line.split()[:2] for line in lines] == [["2", "3"]] * 2
    assert all(1 <= int(line.split()[2]) <= share for line in lines)


def test_a_fault_of_all_ranks_is_one_line(root: Path, training: list[str], tmp_path: Path) -> None:
    command = ["bash", "-c", MPIRUN + ENDS, "mpirun", sys.executable, *training, "--set=embrag.model.dim=3"]
    done = run(command, environment(root, MASTER_PORT=str(free_port())))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "unknown key embrag.model.dim" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "SLURM_LOCALID is not set, although srun started this"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK is set, but LOCAL_RANK is not; start with deepspeed or torchrun"),
        ({"FLUX_TASK_RANK": "0"}, "FLUX_TASK_RANK is set, so flux started this process, which is not known here"),
    ],
)
def test_a_rank_without_a_place_trains_nothing(
    root: Path, training: list[str], tmp_path: Path, variables: dict[str, str], complaint: str
) -> None:
    done = run([sys.executable, *training], environment(root, **variables))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"error: {complaint}" in line and not (tmp_path / "run").exists()
