"""Files of a run folder that say what was done: effective configuration, versions, and metrics as JSON lines."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embrag_ds.errors import UserError
from embrag_ds.files import make_folder, write_json

if TYPE_CHECKING:  # a run's report reads these files without torch
    import torch

    from embrag_ds.config import RunConfig

CONFIG, VERSIONS, METRICS = "config.json", "versions.json", "metrics.jsonl"
RUN_LOG, PROFILE = "run.log", "profile.json"
"""Names of the files of a run folder; other ranks than 0 add logs and profiles of their own."""
RESUME = "resume"
"""Kind of the line that a resumed run begins with; lines beyond its step are superseded by what follows."""
_FAISS = ("faiss-cpu", "faiss-gpu", "faiss-cuda")
_CUPY = ("cupy-cuda12x", "cupy-cuda13x")
_PACKAGES = ("embrag_ds", "torch", "deepspeed", "numpy", "pysam", *_FAISS, *_CUPY, "safetensors")


class RunRecord:
    """Writer of a run's configuration and metrics; only the rank that ``writes`` (rank 0) writes anything.

    ``metrics.jsonl`` only grows, by whole lines that are on the disk when :meth:`write` returns.
    """

    def __init__(self, directory: Path, writes: bool):
        self._path = directory / METRICS
        self._writes = writes
        self._started = time.monotonic()
        self._before = 0.0

    def resume_at(self, step: int, changes: dict[str, Any] | None = None) -> None:
        """Note that the run goes on from ``step``: what :func:`read_metrics` has beyond it is superseded.

        ``changes`` are settings that differ from those before.
        """
        if not self._writes:
            return
        lines = read_metrics(self._path) if self._path.exists() else []
        before = (line.get("total_seconds", 0.0) for line in lines if line["step"] <= step)
        self._before = max(before, default=0.0)
        self._append({"kind": RESUME, "step": step, **self._times(), "changes": changes or {}})

    def describe(self, config: RunConfig, facts: dict[str, Any], device: torch.device) -> None:
        """Write ``config.json``, the effective settings, and ``versions.json``: versions, device and ``facts``."""
        if not self._writes:
            return
        directory = self._path.parent
        make_folder(directory)
        versions = {
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": package_versions(),
            "git": _git_revision(),
            "device": device_name(device),
            **facts,
        }
        write_json(directory / CONFIG, config.as_dict())
        write_json(directory / VERSIONS, versions)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``. Raises :class:`UserError` if there is no room for it."""
        if self._writes:
            self._append({"kind": kind, "step": step, **self._times(), **values})

    def _times(self) -> dict[str, float]:
        seconds = time.monotonic() - self._started
        return {"time": time.time(), "seconds": seconds, "total_seconds": self._before + seconds}

    def _append(self, line: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_finite(line)) + "\n"
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                size = os.fstat(descriptor).st_size
                # A killed process may have left half a line, which must not begin this one.
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                _write_whole(descriptor, (b"\n" if torn else b"") + text.encode(), size)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as fault:
            where = f"free some space in {self._path.parent}, and go on with --resume"
            raise UserError(f"{self._path}: cannot write it ({fault.strerror}); {where}") from fault


def _write_whole(descriptor: int, content: bytes, size: int) -> None:
    """Append all of ``content`` to a file of ``size`` bytes, or nothing."""
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise


@dataclass(frozen=True)
class Metrics:
    """A run's ``metrics.jsonl``.

    ``held`` are the lines that count, without those that a resumed run has superseded (of which there are
    ``superseded``). ``resumes`` are the lines that resumed runs begin with. ``torn`` counts lines that are no whole
    record, as a killed process leaves one.
    """

    held: list[dict[str, Any]]
    resumes: list[dict[str, Any]]
    superseded: int
    torn: int


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's ``metrics.jsonl`` that count; see :func:`whole_metrics`."""
    return whole_metrics(path).held


def whole_metrics(path: Path) -> Metrics:
    """Read a run's ``metrics.jsonl``.

    A run that was killed at step 7 and resumed from its checkpoint at step 5 has its steps 6 and 7 twice. The later
    ones are those that led to the model.
    """
    held: dict[tuple[str, int], dict[str, Any]] = {}
    resumes: list[dict[str, Any]] = []
    lines = torn = 0
    for line in _lines(path):
        if line is None:
            torn += 1
        elif line["kind"] == RESUME:
            held = {place: each for place, each in held.items() if each["step"] <= line["step"]}
            resumes.append(line)
        else:
            held[line["kind"], line["step"]] = line
            lines += 1
    return Metrics(list(held.values()), resumes, lines - len(held), torn)


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Lines that are not empty, None for one that is no whole record."""
    for text in path.read_text(encoding="utf-8", errors="surrogateescape").split("\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("kind"), str):
            yield line
        elif text.strip():
            yield None


def scalars(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The finite numbers of a metrics line's values, by their path (``array/r2/all``)."""
    numbers: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            numbers += scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
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
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
