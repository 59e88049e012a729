"""A rank's share of the cores follows the ranks on its machine, and what its launcher bound it to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embrag_ds.runtime import processor
from embrag_ds.runtime.processor import ranks_here, share_of_cores

NAMES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE", "SLURM_CPUS_ON_NODE")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8"}, 2),
        ({"LOCAL_SIZE": "4", "WORLD_SIZE": "8"}, 4),
        ({"WORLD_SIZE": "8"}, 8),
        ({"LOCAL_SIZE": "none"}, 1),
    ],
)
def test_the_launcher_says_how_many_ranks_are_here(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks_here() == expected


@pytest.mark.parametrize(
    ("own", "of_launcher", "ranks", "allocated", "expected"),
    [
        (8, 8, 1, None, 8),
        (8, 8, 2, None, 4),
        (2, 2, 4, None, 1),  # more ranks than cores
        (4, 8, 2, None, 4),  # each bound to its half
        (4, 8, 4, None, 2),  # two ranks bound to either half
        (1, 64, 2, None, 1),
        (8, 64, 2, "8", 4),  # a job of 8 cores, in which srun binds nothing
    ],
)
def test_cores_are_shared_out(
    own: int, of_launcher: int, ranks: int, allocated: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    if allocated:
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", allocated)
    cores = {0: own, os.getppid(): of_launcher}
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda process: set(range(cores[process])))
    assert share_of_cores() == expected


PROGRAM = """
from embrag_ds.runtime.processor import share_threads
share_threads()
import torch
print(torch.get_num_threads())
"""


@pytest.mark.long
@pytest.mark.parametrize(("set_to", "ranks", "share"), [(None, 1, None), (None, 1_000, 1), ("2", 1_000, None)])
def test_torch_takes_the_share_unless_the_user_set_a_number(
    root: Path, set_to: str | None, ranks: int, share: int | None
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(root), "LOCAL_WORLD_SIZE": str(ranks)}
    if set_to:
        environment["OMP_NUM_THREADS"] = set_to

    def printed(program: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        return int(done.stdout)

    chosen_by_torch = None if share else printed("import torch; print(torch.get_num_threads())")
    assert printed(PROGRAM) == (share or chosen_by_torch)
