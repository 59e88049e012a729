"""Plots of an evaluation report."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from embrag_ds.evaluation import metrics
from embrag_ds.evaluation.report import Report
from embrag_ds.files import make_folder, written

matplotlib.use("Agg")
from matplotlib import pyplot


def plot_files(folder: Path) -> tuple[Path, Path]:
    """Files that :func:`plot_report` writes."""
    return folder / "r2.png", folder / "calibration.png"


def plot_report(report: Report, folder: Path) -> list[Path]:
    """Write ``r2.png`` (aggregate r2 against MAF, with intervals) and ``calibration.png`` into ``folder``.

    Returns the two paths.
    """
    make_folder(folder)
    r2, calibration = plot_files(folder)
    return [_plot_r2(report, r2), _plot_calibration(report, calibration)]


def label(name: str) -> str:
    """A tool's name as plain text: matplotlib sets formulas between dollars, and leaves out names that begin with _."""
    shown = name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _plot_r2(report: Report, path: Path) -> Path:
    bins = metrics.DISJOINT_BINS
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for number, (tool, scores) in enumerate(report.tools.items()):
        place = np.arange(len(bins)) + 0.08 * (number - (len(report.tools) - 1) / 2)
        value = np.array([scores.aggregate_r2[name] for name in bins])
        limits = np.array([scores.aggregate_r2_interval[name] for name in bins]).T
        spread = np.clip([value - limits[0], limits[1] - value], 0, None)
        axes.errorbar(place, value, yerr=spread if report.bootstrap else None, marker="o", capsize=3, label=label(tool))
    axes.set_xticks(range(len(bins)), bins)
    axes.set(xlabel="minor-allele frequency in the panel", ylabel="aggregate dosage r2")
    axes.set_title(f"{report.samples} samples, {report.sites['all']} sites; bars: 95 % over samples")
    return save_figure(figure, axes, path)


def _plot_calibration(report: Report, path: Path) -> Path:
    figure, both = pyplot.subplots(1, 2, figsize=(10, 4.8), sharey=True)
    for axes, title, curve in (
        (both[0], "all genotypes", "calibration_curve"),
        (both[1], "called carriers of an allele below 1 % MAF", "rare_calibration_curve"),
    ):
        axes.plot([0.33, 1], [0.33, 1], color="grey", linewidth=0.8)
        for tool, scores in report.tools.items():
            confidence, correct, _ = np.array(getattr(scores, curve)).reshape(-1, 3).T
            if len(confidence):
                axes.plot(confidence, correct, marker="o", label=label(tool))
        axes.set(xlabel="probability of the called genotype", title=title)
    both[0].set_ylabel("share called correctly")
    return save_figure(figure, both[1], path)


def save_figure(figure: pyplot.Figure, axes: pyplot.Axes, path: Path) -> Path:
    """Write ``figure`` to ``path`` and close it, with a legend of ``axes`` if anything there has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.tight_layout()
    with written(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    return path
