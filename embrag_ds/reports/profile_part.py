"""The part of a run's report page that shows a profile: memory and load over time, and phases."""

from __future__ import annotations

from typing import Any

from embrag_ds.reports.bars import rows_chart
from embrag_ds.reports.charts import COLOURS, Series, lines_chart
from embrag_ds.reports.text import facts, finite, number, table

_GIB = 1 << 30
_MEMORY = {
    "host_bytes": "process",
    "process_bytes": "GPU, this process",
    "device_bytes": "GPU, all",
    "allocated_bytes": "in tensors",
    "reserved_bytes": "reserved by torch",
}
_LOAD = {"cpu_percent": "CPU (100 is one core)", "gpu_percent": "GPU"}
_PEAKS = {"peak_allocated_bytes": "most in tensors", **_MEMORY, **_LOAD, "power_w": "power, W"}
_HEAD = ["phase", "thread", "stream", "count", "median ms", "ms a micro-batch"]


def profile_charts(name: str, profile: dict[str, Any]) -> list[str]:
    """Charts of one rank's profile, as HTML; ``name`` is its file."""
    header = _section(profile, "header")
    readings = _section(profile, "readings")
    source = f"{header.get('device', 'unknown device')}; {header.get('source', 'unknown source')}"
    memory, load = _over_time(readings, _MEMORY, 1 / _GIB), _over_time(readings, _LOAD)
    return [
        lines_chart(f"Memory over time ({name})", ("seconds", "GiB"), memory, from_zero=True, note=source),
        lines_chart(f"Load over time ({name})", ("seconds", "percent"), load, from_zero=True),
        _phases_chart(name, profile),
    ]


def profile_tables(name: str, profile: dict[str, Any]) -> str:
    """Peaks and phases of one rank's profile, as HTML."""
    peaks = _section(profile, "peaks")
    found = []
    for key, label in _PEAKS.items():
        if (most := finite(peaks.get(key))) is not None:
            unit = " %" if key in _LOAD else ""
            shown = f"{most / _GIB:.3g} GiB" if key.endswith("_bytes") else f"{number(most)}{unit}"
            found.append((f"peak: {label}", shown))
    rows = []
    for each in _phases(profile):
        numbers = (finite(each.get(key)) for key in ("count", "median_ms", "ms_per_micro_batch"))
        rows.append([each.get("name"), each.get("thread"), each.get("stream"), *numbers])
    return facts(found) + table(_HEAD, rows, f"Phases ({name}); collate contains search and h2d", texts=3)


def _phases_chart(name: str, profile: dict[str, Any]) -> str:
    rows = []
    for each in _phases(profile):
        if (mean := finite(each.get("ms_per_micro_batch"))) is not None:
            beside = each.get("thread") not in (None, "MainThread")
            rows.append((f"{each.get('name')}{' (beside it)' if beside else ''}", mean))
    note = (
        f"Mean of {number(finite(profile.get('micro_batches')))} micro-batches, the slow first ones among them. What "
        "runs beside the step, on another thread, adds nothing to it unless it waits."
    )
    return rows_chart(f"Phases ({name})", "ms a micro-batch", rows, note)


def _phases(profile: dict[str, Any]) -> list[dict[str, Any]]:
    found = profile.get("phases")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _section(profile: dict[str, Any], name: str) -> dict[str, Any]:
    found = profile.get(name)
    return found if isinstance(found, dict) else {}


def _over_time(readings: dict[str, Any], names: dict[str, str], scale: float = 1.0) -> list[Series]:
    seconds = readings.get("seconds")
    found = []
    for place, (key, label) in enumerate(names.items()):
        column = readings.get(key)
        if isinstance(seconds, list) and isinstance(column, list):
            points: list[tuple[float, float | None]] = []
            for second, each in zip(seconds, map(finite, column), strict=False):
                if finite(second) is not None:
                    points.append((float(second), None if each is None else each * scale))
            found.append(Series(label, points, COLOURS[place]))
    return found
