"""Plots of an evaluation and of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

from embrag_ds.engine import metrics
from embrag_ds.engine.report import Report

if TYPE_CHECKING:
    from embrag_ds.retrieval.timeline import Span  # imports torch, which scoring does without

matplotlib.use("Agg")
from matplotlib import pyplot


def plot_report(report: Report, folder: Path) -> list[Path]:
    """Write ``r2.png`` (aggregate r2 against MAF, with intervals) and ``calibration.png`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_plot_r2(report, folder / "r2.png"), _plot_calibration(report, folder / "calibration.png")]


def _plot_r2(report: Report, path: Path) -> Path:
    bins = metrics.DISJOINT_BINS
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for number, (tool, scores) in enumerate(report.tools.items()):
        place = np.arange(len(bins)) + 0.08 * (number - (len(report.tools) - 1) / 2)
        value = np.array([scores.aggregate_r2[name] for name in bins])
        limits = np.array([scores.aggregate_r2_interval[name] for name in bins]).T
        spread = np.clip([value - limits[0], limits[1] - value], 0, None)
        axes.errorbar(place, value, yerr=spread if report.bootstrap else None, marker="o", capsize=3, label=tool)
    axes.set_xticks(range(len(bins)), bins)
    axes.set(xlabel="minor-allele frequency in the panel", ylabel="aggregate dosage r2")
    axes.set_title(f"{report.people} people, {report.sites['all']} sites; bars: 95 % over people")
    return _save(figure, axes, path)


def _plot_calibration(report: Report, path: Path) -> Path:
    figure, both = pyplot.subplots(1, 2, figsize=(10, 4.8), sharey=True)
    for axes, title, curve in (
        (both[0], "all genotypes", "calibration_curve"),
        (both[1], "called carriers of an allele below 1 % MAF", "rare_calibration_curve"),
    ):
        axes.plot([0.33, 1], [0.33, 1], color="grey", linewidth=0.8)
        for tool, scores in report.tools.items():
            said, right, _ = np.array(getattr(scores, curve)).reshape(-1, 3).T
            if len(said):
                axes.plot(said, right, marker="o", label=tool)
        axes.set(xlabel="probability of the called genotype", title=title)
    both[0].set_ylabel("share called correctly")
    return _save(figure, both[1], path)


_MEMORY = {
    "host_bytes": "process",
    "process_bytes": "GPU, this process",
    "device_bytes": "GPU, all",
    "allocated_bytes": "in tensors",
    "reserved_bytes": "reserved by torch",
}
_STEPS_SHOWN = 5


def plot_profile(report: dict[str, Any], spans: list[Span], path: Path) -> Path:
    """Memory over time, and below it the phases of a few steps, a row for each thread."""
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 6.5))
    samples = report["samples"]
    for name, label in _MEMORY.items():
        if name in samples:
            gib = [np.nan if value is None else value / (1 << 30) for value in samples[name]]
            above.plot(samples["seconds"], gib, label=label)
    above.set(xlabel="seconds", ylabel="memory, GiB", ylim=(0, None))
    above.set_title(f"{report['header']['device']}\n{report['header']['source']}", fontsize="small")
    _draw_spans(below, _few_steps(spans))
    return _save(figure, above, path)


def _few_steps(spans: list[Span]) -> list[Span]:
    """Those of a few steps shortly before the last, for which nothing is built ahead any more."""
    starts = [span.start_s for span in spans if span.name == "forward"][-2 * _STEPS_SHOWN :]
    since = starts[0] if starts else 0.0
    until = starts[_STEPS_SHOWN] if len(starts) > _STEPS_SHOWN else np.inf
    return [span for span in spans if span.stop_s >= since and span.start_s < until]


def _draw_spans(axes: pyplot.Axes, spans: list[Span]) -> None:
    from embrag_ds.retrieval.timeline import PHASES

    rows = sorted({(span.thread, span.stream) for span in spans})
    for number, phase in enumerate(PHASES):
        shown = [span for span in spans if span.name == phase]
        # What is part of a collate is drawn into its bar.
        height = 0.35 if phase in ("search", "h2d") else 0.7
        for span in shown:
            row = rows.index((span.thread, span.stream))
            lasting = (span.start_s, span.stop_s - span.start_s)
            label = phase if span is shown[0] else None
            axes.broken_barh([lasting], (row - height / 2, height), color=f"C{number}", label=label)
    axes.set_yticks(range(len(rows)), [f"{thread}\n{stream}" for thread, stream in rows])
    axes.set(xlabel="seconds")
    if spans:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _save(figure: pyplot.Figure, axes: pyplot.Axes, path: Path) -> Path:
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
