"""Functions of the machine that the benchmarks share."""

from __future__ import annotations

import os
import socket

import torch


def on_gpu() -> bool:
    """Whether runs are on a GPU here: there is one, and DS_ACCELERATOR=cpu does not leave it alone."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def synchronise(device: torch.device) -> None:
    """Wait until the work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
