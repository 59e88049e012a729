"""Functions of the machine that the benchmarks share."""

from __future__ import annotations

from pathlib import Path

import torch


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
