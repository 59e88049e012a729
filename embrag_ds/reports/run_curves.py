"""The curves of a run's report page: training, validation, memory and the reference cache."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

from embrag_ds.evaluation.metrics import BIN_NAMES, DISJOINT_BINS
from embrag_ds.reports.charts import COLOURS, RAMP, Series, lines_chart
from embrag_ds.reports.run_facts import RunFacts
from embrag_ds.reports.text import finite, number, paragraph, table

TRAINING = (
    "loss",
    "haplotype_loss",
    "genotype_loss",
    "learning_rate",
    "gradient_norm",
    "samples_per_second",
    "retrieval_wait_share",
    "mfu",
    "host_peak_bytes",
    "device_peak_bytes",
    "staleness",
    "generation",
    "refreshes_skipped",
    "skipped_steps",
)
"""Numbers of a line of training that the page shows."""
_STEPS = "optimiser steps"
_GIB = 1 << 30
_MOST_GENERATIONS = 60


def value(line: Any, name: str) -> float | None:
    """A finite number of a line, None for anything else."""
    return finite(line.get(name)) if isinstance(line, dict) else None


def masks(line: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a line of validation, by mask."""
    return {name: each for name, each in line.items() if isinstance(each, dict) and isinstance(each.get("r2"), dict)}


def resumes(run: RunFacts) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that resumed runs begin with."""
    return [] if run.metrics is None else run.metrics.resumes


def training_charts(run: RunFacts) -> str:
    """Loss, learning rate, speed and gradient over steps, for a run with lines of training."""
    chart = partial(lines_chart, marks=_marks(run))
    losses = {"loss": "total", "haplotype_loss": "haplotype loss", "genotype_loss": "genotype loss"}
    wait, mfu = _several(run, {"retrieval_wait_share": "wait"}, 100), _several(run, {"mfu": "utilisation"}, 100)
    charts = [
        chart("Loss of training", (_STEPS, "mean loss"), _several(run, losses)),
        chart("Learning rate", (_STEPS, "learning rate"), _several(run, {"learning_rate": "rate"}), from_zero=True),
        chart("Speed", (_STEPS, "samples a second"), _several(run, {"samples_per_second": "speed"}), from_zero=True),
        chart("Waiting for batches", (_STEPS, "percent of all time"), wait, from_zero=True),
        chart("Model FLOPs utilisation", (_STEPS, "percent of the measured rate"), mfu, from_zero=True),
        chart("Norm of the gradient", (_STEPS, "norm before clipping"), _several(run, {"gradient_norm": "norm"})),
    ]
    return _grid(charts) + paragraph(
        f"Steps skipped because a gradient was not finite: {number(_most(run, 'skipped_steps'))}."
    )


def validation_charts(run: RunFacts) -> str:
    """Score, r2 by minor-allele frequency, accuracy and calibration over steps, for a run with validations."""
    found = run.lines("validation")
    names = list(dict.fromkeys(mask for line in found for mask in masks(line)))
    chart = partial(lines_chart, marks=_marks(run))
    score = Series("score", [(float(line["step"]), value(line, "score")) for line in found])
    charts = [chart("Validation score", (_STEPS, "mean r2 of the array masks"), [score])]
    for mask in names:
        sections = [(float(line["step"]), masks(line).get(mask, {})) for line in found]
        charts.append(chart(f"r2 by frequency (MAF), {mask}", (_STEPS, "dosage r2"), _r2_series(sections)))
    for key, name in (("accuracy", "accuracy of called genotypes"), ("calibration_error", "calibration error")):
        series = []
        for place, mask in enumerate(names):
            points = [(float(line["step"]), value(masks(line).get(mask), key)) for line in found]
            series.append(Series(mask, points, COLOURS[place % len(COLOURS)]))
        charts.append(chart(name.capitalize(), (_STEPS, name), series))
    newest = masks(found[-1])
    rows = [[mask, *(value(newest.get(mask, {}).get("r2"), name) for name in BIN_NAMES)] for mask in names]
    caption = f"r2 by minor-allele frequency at step {found[-1]['step']:,}; the masks hide different sites"
    return _grid(charts) + table(["mask", *BIN_NAMES], rows, caption)


def memory_chart(run: RunFacts) -> str:
    """The most memory until each step."""
    memory = {"host_peak_bytes": "process of rank 0", "device_peak_bytes": "tensors on its GPU"}
    on_gpu = any(value(line, "device_peak_bytes") is not None for line in run.lines("train"))
    note = "" if on_gpu else "The metrics have no memory of a GPU, as of a run on a CPU."
    series = _several(run, memory, 1 / _GIB)
    return lines_chart("Most memory until now", (_STEPS, "GiB"), series, marks=_marks(run), from_zero=True, note=note)


def staleness_chart(run: RunFacts) -> str:
    """Staleness of the reference cache over steps, or a line that says that there is none."""
    found = run.lines("train")
    if all(value(line, "staleness") is None for line in found):
        return paragraph(
            "The metrics have no staleness: nothing is encoded into a reference cache, or nothing was logged yet."
        )
    changed = [
        (float(line["step"]), "a new generation")
        for before, line in pairwise(found)
        if value(line, "generation") != value(before, "generation")
    ]
    note = (
        f"Generation {number(value(found[-1], 'generation'))} is in use, and "
        f"{number(_most(run, 'refreshes_skipped'))} refreshes were left out."
    )
    chart = lines_chart(
        "Staleness of the reference cache",
        (_STEPS, "steps since its snapshot"),
        _several(run, {"staleness": "staleness"}),
        marks=changed if len(changed) <= _MOST_GENERATIONS else (),
        from_zero=True,
        note=note,
    )
    return _grid([chart])


def _r2_series(sections: list[tuple[float, dict[str, Any]]]) -> list[Series]:
    """r2 of each bin over steps, with that of all sites by the model and by retrieval alone."""

    def points(key: str, name: str) -> list[tuple[float, float | None]]:
        return [(step, value(section.get(key), name)) for step, section in sections]

    series = [Series(name, points("r2", name), RAMP[place]) for place, name in enumerate(DISJOINT_BINS)]
    series.append(Series("all", points("r2", "all"), "c1"))
    series.append(Series("all, retrieval alone", points("prior_r2", "all"), "c1", dashed=True))
    return series


def _several(run: RunFacts, names: dict[str, str], scale: float = 1.0) -> list[Series]:
    """Series of numbers of the lines of training: key -> what it is called."""
    found = []
    for place, (name, label) in enumerate(names.items()):
        points: list[tuple[float, float | None]] = []
        for line in run.lines("train"):
            each = value(line, name)
            points.append((float(line["step"]), None if each is None else each * scale))
        found.append(Series(label, points, COLOURS[place]))
    return found


def _most(run: RunFacts, name: str) -> float:
    return max((value(line, name) or 0 for line in run.lines("train")), default=0)


def _marks(run: RunFacts) -> list[tuple[float, str]]:
    return [(float(line["step"]), "resumed") for line in resumes(run)]


def _grid(charts: list[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>\n'
