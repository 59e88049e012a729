"""What the processor can compute fast, its threads, and memory that processes took."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from embrag_ds.errors import UserError

_THREADS = "OMP_NUM_THREADS"
_RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16; without the instructions it is some 20 times slower than fp32."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_threads(number: int) -> None:
    """Let torch, the compiled loops and the packing of files use ``number`` threads or processes.

    Raises :class:`UserError` below 1.
    """
    if number < 1:
        raise UserError(f"--threads {number}: give at least 1")
    os.environ[_THREADS] = str(number)  # for loops and packing, and for torch when it is imported
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(number)


def ranks_here() -> int:
    """Number of ranks on this machine, as the launcher says; where it does not, all of them."""
    # Of torchrun and of srun or mpirun as they are recognised, then of DeepSpeed's launcher.
    told = next((os.environ[name] for name in _RANKS_HERE if os.environ.get(name)), "1")
    return max(1, int(told)) if told.isdigit() else 1


def share_of_cores() -> int:
    """Number of cores for this rank, at least one: those of all ranks on this machine are shared out equally.

    A rank that its launcher has bound to cores of its own has fewer than the process that started it, and keeps them.
    """
    own = len(os.sched_getaffinity(0))
    try:
        all_cores = max(own, len(os.sched_getaffinity(os.getppid())))
    except OSError:  # it has ended
        all_cores = own
    allocated = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if allocated.isdigit():
        all_cores = min(all_cores, int(allocated))
    return max(1, min(own, all_cores // ranks_here()))


def share_threads() -> None:
    """Use this rank's share of the cores, where several ranks are here and ``OMP_NUM_THREADS`` is not set.

    One rank keeps the number that torch has chosen for the machine.
    """
    if _THREADS not in os.environ and ranks_here() > 1:
        torch = sys.modules.get("torch")
        use_threads(share_of_cores() if torch is None else min(torch.get_num_threads(), share_of_cores()))


def peak_resident_bytes(process: int | str = "self") -> int | None:
    """Peak resident memory of a process, since its start or since the peak was reset; None once it has ended."""
    return memory_field("VmHWM", process)


def memory_field(name: str, process: int | str = "self") -> int | None:
    """A field of a process's memory in bytes, as Linux names it (``RssAnon``, ``VmRSS``); None where there is none."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith(f"{name}:")]
    return found[0] * 1024 if found else None
