"""Run folder: resolved configuration, versions, metrics as JSON lines, and DeepSpeed's monitors."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch

from embrag_ds.config import RunConfig
from embrag_ds.files import make_folder, write_json, write_text
from embrag_ds.training.distributed import DistributedContext

CONFIG, VERSIONS, METRICS = "config.json", "versions.json", "metrics.jsonl"
"""Names of the files of a run folder."""
_FAISS = ("faiss-cpu", "faiss-gpu", "faiss-cuda")
_CUPY = ("cupy-cuda12x", "cupy-cuda13x")
_PACKAGES = ("embrag_ds", "torch", "deepspeed", "numpy", "pysam", *_FAISS, *_CUPY, "safetensors")


class RunRecord:
    """Writer of a run's configuration and metrics.

    Only rank 0 writes files; DeepSpeed's monitors write their own.
    """

    def __init__(self, directory: Path, distributed: DistributedContext):
        self._path = directory / METRICS
        self._distributed = distributed
        self._started = time.monotonic()

    def forget_after(self, step: int) -> None:
        """Drop the lines beyond ``step``, which a resumed run writes again, and what a killed run left of a line."""
        if self._distributed.is_main and self._path.exists():
            lines = self._path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
            write_text(self._path, "".join(f"{line}\n" for line in lines if _step(line) <= step))

    def describe(self, config: RunConfig, engine: deepspeed.DeepSpeedEngine, inputs: dict[str, Any]) -> None:
        """Write ``config.json``, the effective settings, and ``versions.json``: versions, device, batch sizes,
        ``inputs``.
        """
        if not self._distributed.is_main:
            return
        directory = self._path.parent
        make_folder(directory)
        versions = {
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": package_versions(),
            "git": _git_revision(),
            "device": device_name(self._distributed.device),
            "ranks": self._distributed.ranks,
            "micro_batch_samples": engine.train_micro_batch_size_per_gpu(),
            "global_batch_samples": engine.train_batch_size(),
            **inputs,
        }
        write_json(directory / CONFIG, config.as_dict())
        write_json(directory / VERSIONS, versions)

    def write(self, kind: str, step: int, values: dict[str, Any], engine: deepspeed.DeepSpeedEngine) -> None:
        """Append a line to ``metrics.jsonl``, and pass its numbers to the monitors that DeepSpeed's settings enable."""
        if self._distributed.is_main:
            line = {"kind": kind, "step": step, "seconds": time.monotonic() - self._started, **values}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(_finite(line)) + "\n")
        if engine.monitor.enabled:
            events = [(f"{kind}/{name}", value, step) for name, value in _flat(values) if math.isfinite(value)]
            engine.monitor.write_events(events)


def _step(line: str) -> float:
    """Step of a line; infinity for one that is not whole."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    numbers: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            numbers += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            numbers.append((prefix + name, float(value)))
    return numbers


def _finite(value: Any) -> Any:
    """A value without NaN or infinity, which JSON lacks: such numbers become None."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that a run's numbers depend on; None for one that is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the source tree, with ``-dirty`` when it has changes; None outside a checkout."""
    source = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return found.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Name of a device, for reports: the GPU's, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
