"""Worker processes: the same items for any number of them, faults that are heard of, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from embrag_ds.errors import UserError
from embrag_ds.runtime import workers as workers_module
from embrag_ds.runtime.workers import InOrder, chosen_workers

# torch's loader warns of more workers than cores.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")]


class Squares:
    """Source of arrays; item 7 fails, if it shall."""

    def __init__(self, fails: bool = False):
        self.fails = fails

    def __getitem__(self, number: int) -> np.ndarray:
        if self.fails and number == 7:
            raise UserError("panel.vcf.gz: no window 7; restore the file")
        return np.full(3, number**2)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_items_come_in_order_as_arrays_from_any_number_of_workers(workers: int) -> None:
    before = torch.get_rng_state()
    items = InOrder(Squares(), 5, 12, workers)
    taken = [items.take(number) for number in range(5, 12)]
    items.close()
    assert [each.tolist() for each in taken] == [[number**2] * 3 for number in range(5, 12)]
    assert all(isinstance(each, np.ndarray) and each.flags.writeable for each in taken)
    assert torch.equal(torch.get_rng_state(), before)  # those numbers belong to the training step
    assert not active_children()


def test_items_must_be_taken_in_order() -> None:
    with pytest.raises(AssertionError):
        InOrder(Squares(), 5, 12, 0).take(6)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_in_a_worker_is_raised_in_its_place_with_its_message(workers: int) -> None:
    items = InOrder(Squares(fails=True), 6, 9, workers)
    items.take(6)
    with pytest.raises(UserError, match=r"panel\.vcf\.gz: no window 7; restore the file"):
        items.take(7)
    items.close()


def test_a_killed_worker_is_noticed() -> None:
    items = InOrder(Squares(), 0, 1000, 1)
    items.take(0)
    (worker,) = active_children()
    worker.kill()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        for number in range(1, 1000):
            items.take(number)
    items.close()


@pytest.mark.parametrize(
    ("kind", "cores", "environment", "expected"),
    [
        ("cpu", 64, {}, 0),
        ("cuda", 2, {}, 0),
        ("cuda", 4, {}, 1),
        ("cuda", 16, {}, 4),
        ("cuda", 96, {"LOCAL_SIZE": "8"}, 3),
        ("cuda", 96, {"LOCAL_WORLD_SIZE": "4"}, 4),
    ],
)
def test_workers_are_chosen_by_the_ranks_share_of_the_cores(
    kind: str, cores: int, environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(workers_module.os, "sched_getaffinity", lambda process: set(range(cores)))
    assert chosen_workers(torch.device(kind)) == expected


PROGRAM = '''
import signal, sys, time
import numpy as np, torch
from embrag_ds.runtime.workers import InOrder, start_server

class Big:
    """Items that do not fit a pipe: a worker waits in the middle of writing one."""
    def __getitem__(self, number):
        if number == 0:
            return "deepspeed" in sys.modules, torch.cuda.is_initialized(), torch.get_num_threads()
        return np.zeros(1 << 20, dtype=np.uint8)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    if sys.argv[1] == "trains":
        from embrag_ds.training import trainer
    if sys.argv[1] == "starts":
        start_server()
        print(flush=True)
    else:
        items = InOrder(Big(), 0, 100, 2)
        first = items.take(0)
        items.take(1)
        print(*first, flush=True)  # from here on Ctrl-C may come
    try:
        time.sleep(100)
    except KeyboardInterrupt:
        if sys.argv[1] == "closes":
            items.close()
        print("interrupted", flush=True)
'''


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def run_program(tmp_path: Path, root: Path, how: str) -> subprocess.Popen[str]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, script, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
        start_new_session=True,
    )
    assert process.stdout is not None
    said = process.stdout.readline().split()
    assert said == ([] if how == "starts" else ["False", "False", "1"])
    # Python's tracker of semaphores, the server, and its two workers.
    assert len(descendants(process)) >= (2 if how == "starts" else 4)
    return process


def assert_ended(processes: list[psutil.Process], seconds: float) -> None:
    """Fail unless these processes end in this time; those that do not are killed."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for each in alive:
        each.kill()
    assert not alive


@pytest.mark.parametrize("how", ["starts", "closes", "leaves it open"])
def test_ctrl_c_is_quiet_and_leaves_no_process(tmp_path: Path, root: Path, how: str) -> None:
    process = run_program(tmp_path, root, how)
    started = descendants(process)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=60)
    assert_ended(started, 30)
    assert (*process.communicate(), process.returncode) == ("interrupted\n", "", 0)


def test_workers_end_when_their_run_is_killed_in_the_middle_of_a_write(tmp_path: Path, root: Path) -> None:
    process = run_program(tmp_path, root, "trains")
    started = descendants(process)
    time.sleep(0.5)
    process.kill()
    assert_ended(started, 30)
    process.communicate()
