"""Plot of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from embrag_ds.evaluation.plots import save_figure
from embrag_ds.runtime.device_sampler import MEMORY
from embrag_ds.runtime.timeline import PHASES, Span

matplotlib.use("Agg")
from matplotlib import pyplot

_STEPS_DRAWN = 5


def plot_profile(report: dict[str, Any], spans: list[Span], path: Path) -> Path:
    """Plot memory over time and, below it, the phases of a few steps by thread and stream, into ``path``."""
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 6.5))
    readings = report["readings"]
    for name, label in MEMORY.items():
        if name in readings:
            gib = [np.nan if value is None else value / (1 << 30) for value in readings[name]]
            above.plot(readings["seconds"], gib, label=label)
    above.set(xlabel="seconds", ylabel="memory, GiB", ylim=(0, None))
    above.set_title(f"{report['header']['device']}\n{report['header']['source']}", fontsize="small")
    _draw_spans(below, _few_steps(spans))
    return save_figure(figure, above, path)


def _few_steps(spans: list[Span]) -> list[Span]:
    """Spans of a few steps shortly before the last ones, for which no batches are built ahead any more."""
    starts = [span.start_s for span in spans if span.name == "forward"][-2 * _STEPS_DRAWN :]
    since = starts[0] if starts else 0.0
    until = starts[_STEPS_DRAWN] if len(starts) > _STEPS_DRAWN else np.inf
    return [span for span in spans if span.stop_s >= since and span.start_s < until]


def _draw_spans(axes: pyplot.Axes, spans: list[Span]) -> None:
    rows = sorted({(span.thread, span.stream) for span in spans})
    for number, phase in enumerate(PHASES):
        of_phase = [span for span in spans if span.name == phase]
        # Phases within a collate are drawn inside its bar.
        height = 0.35 if phase in ("search", "h2d") else 0.7
        for span in of_phase:
            row = rows.index((span.thread, span.stream))
            lasting = (span.start_s, span.stop_s - span.start_s)
            label = phase if span is of_phase[0] else None
            axes.broken_barh([lasting], (row - height / 2, height), color=f"C{number}", label=label)
    axes.set_yticks(range(len(rows)), [f"{thread}\n{stream}" for thread, stream in rows])
    axes.set(xlabel="seconds")
    if spans:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
