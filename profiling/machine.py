"""Functions of the machine that the benchmarks share."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def on_gpu() -> bool:
    """Whether runs are on a GPU here: there is one, and DS_ACCELERATOR=cpu does not leave it alone."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def synchronise(device: torch.device) -> None:
    """Wait until the work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_resident_bytes(process: int | str = "self") -> int | None:
    """Peak resident memory of a process, since its start or since the peak was reset; None once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return found[0] * 1024 if found else None
