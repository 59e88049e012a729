"""Numba loops use torch's number of threads, and several Python threads may run them at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

SCRIPT = """
from concurrent.futures import ThreadPoolExecutor
import torch
from embrag_ds.ops.li_stephens import count_by_place
rows, place = torch.ones(64, 400, 50, dtype=torch.bool), torch.arange(400).repeat(64, 1) // 200
count_by_place(rows, place, 2)
with ThreadPoolExecutor(4) as callers:
    for total in callers.map(lambda number: count_by_place(rows, place, 2), range(200)):
        assert (total == 200).all()
import numba
print(numba.threading_layer(), numba.get_num_threads(), torch.get_num_threads())
"""


def output_of(root: Path, code: str, **environment: str) -> str:
    """Standard output of a new Python process that runs ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_threads_run_loops_at_once_and_with_the_threads_that_torch_was_given(root: Path, layer: str) -> None:
    assert output_of(root, SCRIPT, OMP_NUM_THREADS="1", NUMBA_THREADING_LAYER=layer) == f"{layer} 1 1"


COUNTED = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
import torch
from embrag_ds.ops.li_stephens import count_by_place
for rows in (400, 300):
    place = torch.zeros(64, rows, dtype=torch.int64)
    assert (count_by_place(torch.ones(64, rows, 50, dtype=torch.bool), place, 1) == rows).all()
from embrag_ds.ops.li_stephens_numba import add_by_place
print(sum(add_by_place._compiled.stats.cache_hits.values()), "loaded")
"""
SAID = "compiling loops for this processor, about a minute of one core in all; numba keeps them where it can"


def test_of_two_processes_one_has_loops_compiled_and_says_so(root: Path, tmp_path: Path) -> None:
    """By a third process: the one that compiles a loop runs other machine code than those that load it."""
    environment = {**os.environ, "PYTHONPATH": str(root), "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", COUNTED], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    idle, busy = sorted([process.communicate(timeout=180)[0].splitlines() for process in started], key=len)
    assert idle == ["1 loaded"]
    assert busy == [SAID, "1 loaded"]
    assert output_of(root, COUNTED, NUMBA_CACHE_DIR=str(tmp_path)) == "1 loaded"


def test_a_process_compiles_what_a_killed_one_did_not(root: Path, tmp_path: Path) -> None:
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    code = f"from embrag_ds import children\nchildren._COMMAND = {killed!r}\n{COUNTED}"
    *_, said, count = output_of(root, code, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    assert (said, count) == (SAID, "0 loaded")


def test_loops_run_where_there_are_no_locks(root: Path, tmp_path: Path) -> None:
    unlockable = "import errno, fcntl\n\ndef refuse(*given):\n    raise OSError(errno.ENOLCK, 'No locks available')\n"
    code = f"{unlockable}\nfcntl.flock = refuse\n{COUNTED}"
    assert SAID in output_of(root, code, NUMBA_CACHE_DIR=str(tmp_path))


# Loops of a new process, in which numba finds no folder for compiled code, or one on a full disk.
UNKEPT = """
import errno, logging, sys
import numba.core.caching as caching

def refuse(*given, **named):
    raise OSError(errno.ENOSPC, "No space left on device")

if sys.argv[1:] == ["no place"]:
    caching.tempfile.TemporaryFile = refuse
else:
    caching.IndexDataCacheFile.save = refuse
    caching.IndexDataCacheFile.load = lambda *given: None
import torch
from embrag_ds.ops.li_stephens import count_by_place
logging.basicConfig(level=logging.DEBUG, format="%(message)s", stream=sys.stdout)
place = torch.zeros(64, 400, dtype=torch.int64)
assert (count_by_place(torch.ones(64, 400, 50, dtype=torch.bool), place, 1) == 400).all()
"""


@pytest.mark.parametrize("way", ["no place", "full disk"])
def test_loops_run_where_numba_cannot_keep_them(root: Path, way: str) -> None:
    said = output_of(root, f"import sys; sys.argv[1:] = [{way!r}]\n{UNKEPT}")
    assert ("numba cannot keep" in said and "No space left" in said) == (way == "full disk")


WORKERS = """
from embrag_ds.compiled.instructions import take
from embrag_ds.ops.threads import WorkerLoop

@WorkerLoop
def fill(workers, taken, started, values, bad):
    \"\"\"Number the values, each worker those that it takes.\"\"\"
    take(started, 1)
    n = take(taken, 1)
    while n < len(values):
        if n == bad:
            raise ValueError("bad value")
        rounds = 0
        while 0 <= bad < n and take(taken, 0) < 1 << 61 and rounds < 10**8:
            rounds += 1
        values[n] += n + workers
        n = take(taken, 1)
"""


def test_a_loop_of_workers_runs_once_for_each_and_raises_what_one_raises(root: Path, tmp_path: Path) -> None:
    (tmp_path / "filling.py").write_text(WORKERS)
    code = """
import numpy as np, threading
from filling import fill
for workers in (1, 2, 3, 5):
    values, started = np.zeros(500_000), np.zeros(1, dtype=np.int64)
    fill(workers, started, values, -1)
    assert (values == np.arange(500_000) + workers).all() and started[0] == workers
    watched = []
    fill(workers, started, values, -1, watch=watched.append)
    assert watched[-1] >= 500_000 and watched == sorted(watched)
    values[:] = 0
    try:
        fill(workers, started, values, 7)
        print("nothing raised")
    except ValueError as fault:  # the others stop, too
        assert str(fault) == "bad value" and (values > 0).sum() < 20
print(fill.__doc__, threading.active_count())
"""
    path = f"{root}{os.pathsep}{tmp_path}"
    for _ in range(2):  # compiled by another process, and then loaded
        assert output_of(root, code, PYTHONPATH=path) == "Number the values, each worker those that it takes. 1"
