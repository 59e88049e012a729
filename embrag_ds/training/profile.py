"""Profile of a run (``--profile``): its timeline and readings of its machine, as a report in the run folder."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.errors import UserError
from embrag_ds.files import make_folder, write_json, write_text, written
from embrag_ds.retrieval.device_panel import GIB
from embrag_ds.runs.record import PROFILE, device_name, package_versions
from embrag_ds.runtime.device_sampler import DeviceSampler
from embrag_ds.runtime.timeline import Timeline
from embrag_ds.runtime.trace import chrome_trace

logger = logging.getLogger(__name__)

PROFILES = ("nvml", "snapshot")
"""Kinds of profile; ``snapshot`` adds the history of torch's allocator."""
SNAPSHOT_FILE = "memory-snapshot.pickle"

_HISTORY_ENTRIES = 100_000  # some KB each
_PEAKS = (
    ("host_bytes", "process memory", 1 / GIB, "GiB"),
    ("cpu_percent", "CPU", 1, "%"),
    ("process_bytes", "GPU memory of this process", 1 / GIB, "GiB"),
    ("device_bytes", "GPU memory of all", 1 / GIB, "GiB"),
    ("peak_allocated_bytes", "in tensors", 1 / GIB, "GiB"),
    ("reserved_bytes", "reserved by torch", 1 / GIB, "GiB"),
    ("gpu_percent", "GPU", 1, "%"),
    ("power_w", "power", 1, "W"),
)


class Profile:
    """Context that measures a run, and at its end writes its report into ``folder``.

    The report is ``profile.json``, ``profile.png`` and ``trace.json`` (:mod:`embrag_ds.runtime.trace`). The context
    yields the timeline for the code that is measured. The kind ``snapshot`` adds ``memory-snapshot.pickle``, the
    history of torch's allocator. Every rank writes files of its own (``profile-rank1.json``, ...) and logs a table. A
    run that fails leaves its report, too.
    """

    timeline: Timeline
    _sampler: DeviceSampler

    def __init__(self, kind: str, folder: Path, distributed: DistributedContext):
        """``kind`` is one of :data:`PROFILES`. Raises :class:`UserError` for ``snapshot`` without CUDA."""
        self._snapshot = kind == "snapshot"
        if self._snapshot and distributed.device.type != "cuda":
            raise UserError("--profile snapshot: the history of torch's allocator needs a CUDA device")
        self._folder = folder
        self._distributed = distributed

    def __enter__(self) -> Timeline:
        self._sampler = DeviceSampler(self._distributed.device)
        self.timeline = Timeline(self._distributed.device)
        self._sampler.start(self.timeline.began)
        if self._snapshot:
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)
        return self.timeline

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if fault is None:
            self._close()
            return
        try:
            self._close()
        except Exception as another:  # the failure of the measured code is the one to raise
            logger.error("the profile failed: %r", another)

    def _close(self) -> None:
        try:
            self._sampler.stop()
        finally:
            make_folder(self._folder)
            if self._snapshot:
                self._dump_snapshot()
            if self._distributed.device.type == "cuda":
                torch.cuda.synchronize(self._distributed.device)
            self._write()

    def _dump_snapshot(self) -> None:
        with written(self._folder / self._distributed.own_file(SNAPSHOT_FILE)) as temporary:
            torch.cuda.memory._dump_snapshot(str(temporary))
        torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self) -> None:
        # Imported here, because a run without a profile does not need matplotlib.
        from embrag_ds.training.profile_plot import plot_profile

        report = self.report()
        path = self._folder / self._distributed.own_file(PROFILE)
        write_json(path, report)
        spans = self.timeline.spans()
        trace = path.with_name(self._distributed.own_file("trace.json"))
        events = chrome_trace(spans, self._sampler.readings, self._distributed.rank)
        write_text(trace, json.dumps(events, separators=(",", ":")) + "\n")
        plot = plot_profile(report, spans, path.with_suffix(".png"))
        for line in table(report):
            logger.info(line)
        logger.info(f"written to {path}, {plot.name} and {trace.name}")

    def report(self) -> dict[str, Any]:
        """The measurements as JSON types: header, peaks, phases, and readings field by field."""
        totals = self.timeline.totals()
        micro_batches = sum(total.count for total in totals if total.name == "step")
        phases = []
        for total in totals:
            mean_ms = total.total_ms / total.kept
            share = mean_ms * total.count / micro_batches if micro_batches else None
            phases.append({**asdict(total), "ms_per_micro_batch": share})
        return {
            "header": {
                "source": self._sampler.source,
                "device": device_name(self._distributed.device),
                "rank": self._distributed.rank,
                "ranks": self._distributed.ranks,
                "python": platform.python_version(),
                "packages": package_versions(),
            },
            "micro_batches": micro_batches,
            "peaks": self._sampler.peaks(),
            "phases": phases,
            "readings": self._sampler.columns(),
        }


def table(report: dict[str, Any]) -> list[str]:
    """A report in lines of text: source, one row per phase, peaks."""
    header = report["header"]
    lines = [f"Profile of {report['micro_batches']} micro-batches on {header['device']}; {header['source']}"]
    lines.append(f"{'phase':10}{'thread':22}{'stream':16}{'count':>7}{'median ms':>12}{'ms a micro-batch':>19}")
    for each in report["phases"]:
        share = each["ms_per_micro_batch"]
        lines.append(
            f"{each['name']:10}{each['thread']:22}{each['stream']:16}{each['count']:7d}{each['median_ms']:12.3f}"
            f"{'-' if share is None else format(share, '.3f'):>19}"
        )
    peaks = report["peaks"]
    parts = [f"{label} {peaks[name] * scale:.4g} {unit}" for name, label, scale, unit in _PEAKS if name in peaks]
    return [*lines, f"peaks: {', '.join(parts)}"]
