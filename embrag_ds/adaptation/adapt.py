"""Adaptation: a few optimiser steps on the very panel, and at the very sites, that a model is to impute with.

First the scale of the genetic distances is chosen, then the copying model, the confidence head and the residual move.
At last the head is fitted to what imputation sees (:mod:`embrag_ds.adaptation.head`). Panel samples that are held out
decide whether the adapted model is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embrag_ds.adaptation.learner import LEAST_TYPED, HeldOutScores, Learner, Source
from embrag_ds.adaptation.pairs import fit_dependence
from embrag_ds.adaptation.settings import LEAST_STEPS, Adapt, least_minutes, steps_within
from embrag_ds.data.cache import building
from embrag_ds.data.windows import Window
from embrag_ds.dependence import INDEPENDENT
from embrag_ds.export import MODEL_FILE, ExportedModel, read_export, write_export
from embrag_ds.files import write_json

logger = logging.getLogger(__name__)

VERSION = 6
"""Raised whenever the same inputs come to mean another adapted model, so that cached ones are made again."""
LEAST_SAMPLES = 12
"""Fewest panel samples to adapt to. With fewer there is too little to learn from, and to judge the result by."""
_REPORT = "adaptation.json"
_SCALES_PER_DECADE = 2
_MOST_SCALE_STEPS = 6
_LEAST_GAIN = 0.005
"""Relative gain in loss without which a scale is not taken."""


@dataclass(frozen=True)
class Adapted:
    """An adapted model, or the model as it was, with a ``report`` of steps and scores for JSON (docs/files.md)."""

    model: ExportedModel
    report: dict[str, Any]


def adapt_model(source: Source, model: ExportedModel, how: Adapt, cache: Path) -> Adapted:
    """Adapt ``model`` to the panel and to the typed sites, or find it in the folder ``cache`` from another time.

    The model comes back as it was where ``how`` is ``off``, where there is too little to learn from, where a step takes
    too long, and where the samples held out are imputed no better. The log says which. Raises :class:`UserError` if the
    cache cannot be written.
    """
    if how == "off":
        return Adapted(model, {"adapt": "off"})
    windows = source.windows(model) if len(source.samples) >= LEAST_SAMPLES else []
    if not windows:
        few = len(source.samples) < LEAST_SAMPLES
        why = (
            f"the panel has {len(source.samples)} samples to learn from"
            if few
            else f"no window has {LEAST_TYPED} typed sites and a site to predict"
        )
        return _left_alone(model, how, why)
    learner = Learner(source, model, windows, model.config.data.map_scale)
    seconds = learner.step_size().seconds(model.config.model if source.transformer else None, source.device.type)
    steps = steps_within(how, seconds, learner.batches)
    if not steps and steps_within(how, seconds, batches=LEAST_STEPS):
        return _left_alone(
            model, how, f"too few to learn from (windows: {len(windows)}, samples: {len(source.samples)})"
        )
    if not steps:
        enough = f"--adapt {least_minutes(seconds)} gives enough time"
        return _left_alone(model, how, f"a step would take about {seconds:.1f} s; {enough}")
    entry = cache / f"adapted-{_identity(source, model, [*windows, *source.stretches(model)], steps)}"
    with building(entry) as folder:
        if folder is not None:
            made = _adapted(source, model, learner, windows, steps)
            write_json(folder / _REPORT, made.report)
            if made.report["kept"]:
                write_export(folder / MODEL_FILE, made.model)
        else:
            logger.info("the model was adapted to this panel and these sites before: %s", entry)
    report = json.loads((entry / _REPORT).read_text(encoding="utf-8"))
    return Adapted(read_export(entry / MODEL_FILE) if report["kept"] else model, {"adapt": how, **report})


def _left_alone(model: ExportedModel, how: Adapt, why: str) -> Adapted:
    logger.info("the model is not adapted to the panel: %s", why)
    return Adapted(model, {"adapt": how, "kept": False, "left_alone": why})


def _adapted(source: Source, model: ExportedModel, learner: Learner, windows: list[Window], steps: int) -> Adapted:
    learning, held_out = (len(each) for each in source.split)
    logger.info(
        "adapting the model to the panel and to %d typed sites: %d steps (windows: %d, samples: %d, held out: %d)",
        source.typed.sum(),
        steps,
        len(windows),
        learning,
        held_out,
    )
    began = time.monotonic()
    before = learner.scores()
    scale, learner = _scaled(source, model, learner, windows)
    learner.learn(steps)
    head = learner.fit_head()
    after = learner.scores()
    fitted = fit_dependence(after.pairs)
    # The loss weighs rare alleles up, and r2 over all sites is mostly that of common ones: neither may get worse.
    better = after.loss < before.loss and not after.scores.r2["all"] < before.scores.r2["all"]
    logger.info(
        "adapted in %.0f s; on the samples held out: loss %.5f -> %.5f, r2 %s -> %s (below 1 %% MAF %s -> %s); %s",
        time.monotonic() - began,
        before.loss,
        after.loss,
        *(_shown(each.scores.r2[name]) for name in ("all", "all <1 %") for each in (before, after)),
        "the adapted model imputes" if better else "that is no better, so the model imputes as it was",
    )
    report = {
        "kept": better,
        "steps": steps,
        "windows": len(windows),
        "samples": learning,
        "held_out_samples": held_out,
        "map_scale": scale,
        "before": _numbers(before),
        "after": _numbers(after),
        "head": None if head is None else {**asdict(head), "kept": head.kept},
        "dependence": asdict(fitted),
    }
    if better and fitted.dependence != INDEPENDENT:
        logger.info(
            "a sample's two haplotypes depend on each other (opposite %.2f, alike %.2f): genotypes gain %.2f nats per "
            "1,000 (standard error %.2f)",
            *astuple(fitted.dependence),
            fitted.gain,
            fitted.error,
        )
    config = replace(model.config, data=replace(model.config.data, map_scale=scale))
    adapted = ExportedModel.of(config, learner.weights(), model.snapshot)
    return Adapted(replace(adapted, dependence=fitted.dependence), report)


def _scaled(source: Source, model: ExportedModel, learner: Learner, windows: list[Window]) -> tuple[float, Learner]:
    """The scale of genetic distances at which the model as it was fits best, and a learner at that scale.

    Scales are tried up and down from the model's own, each the square root of ten from the next, until the loss rises.
    """
    start = model.config.data.map_scale
    first = best = learner.loss()
    chosen = start
    for direction in (1, -1):
        for number in range(1, _MOST_SCALE_STEPS + 1):
            scale = start * 10.0 ** (direction * number / _SCALES_PER_DECADE)
            trial = Learner(source, model, windows, scale)
            loss = trial.loss()
            logger.debug("genetic distances x %.3g: loss %.5f", scale, loss)
            if not loss < min(best, first * (1 - _LEAST_GAIN)):
                break
            best, chosen, learner = loss, scale, trial
        if chosen != start:
            break
    if chosen != start:
        logger.info("genetic distances x %.3g fit better: loss %.5f -> %.5f", chosen, first, best)
    return chosen, learner


def _identity(source: Source, model: ExportedModel, windows: list[Window], steps: int) -> str:
    """Digest of everything that decides an adapted model."""
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        for part in parts:
            if isinstance(part, np.ndarray):
                digest.update(f"{part.dtype.str}{part.shape}".encode())
                digest.update(np.ascontiguousarray(part).data)
            else:
                digest.update(json.dumps(part).encode())

    add(VERSION, steps, asdict(model.config), source.device.type, source.transformer, source.bf16)
    for name in sorted(model.arrays):
        add(name, model.arrays[name])
    panel = source.inputs.panel
    add(source.samples, source.inputs.populations.of, panel.minimum_allele_count, source.reference.good_turing_odds)
    covered = np.zeros(len(panel.sites), dtype=bool)
    for window in windows:
        add([window.start, window.stop, window.core_start, window.core_stop])
        covered[window.sites] = True
    # Sites that no window holds decide nothing.
    edges = np.flatnonzero(np.diff(np.concatenate([[False], covered, [False]])))
    for start, stop in edges.reshape(-1, 2).tolist():
        add(panel.packed[start:stop], source.inputs.position_cm[start:stop], source.typed[start:stop])
        if panel.ploidy is not None:
            add(panel.ploidy.at(np.arange(start, stop)))
    return digest.hexdigest()[:20]


def _numbers(found: HeldOutScores) -> dict[str, Any]:
    """Scores for JSON, where what has no value is null, as the r2 of a bin without sites."""
    values = {"loss": found.loss, "calibration_error": found.scores.calibration_error}
    return {**_finite(values), "r2": _finite(found.scores.r2)}


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _shown(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"
