"""Run folders for tests, written by what writes those of real runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from embrag_ds.evaluation.metrics import BIN_NAMES
from embrag_ds.runs.folder import write_outcome
from embrag_ds.runs.record import RunRecord

MASKS = ("array-sparse-2", "<i>mask&")
CONFIG = {
    "train_micro_batch_size_per_gpu": 6,
    "zero_optimization": {"stage": 1},
    "embrag": {"seed": 5, "train": {"max_steps": 40, "eval_every": 10}, "data": {"panel": "<b>&panel"}},
}
PROFILE = {
    "header": {"source": "NVML <x>", "device": "a CPU", "rank": 0, "ranks": 2},
    "micro_batches": 4,
    "peaks": {"host_bytes": 3 << 30, "cpu_percent": 150.0},
    "phases": [
        {
            "name": "forward",
            "thread": "MainThread",
            "stream": "cpu",
            "count": 4,
            "median_ms": 2.5,
            "ms_per_micro_batch": 3.5,
        },
        {"name": "search", "thread": "beside", "stream": "cpu", "count": 4, "median_ms": 1, "ms_per_micro_batch": None},
    ],
    "readings": {
        "seconds": [0.0, 0.1, 0.2],
        "host_bytes": [1 << 30, 2 << 30, 3 << 30],
        "cpu_percent": [None, 150, None],
    },
}


def line_of_training(step: int) -> dict[str, Any]:
    """Numbers of a line of training; some are None, as in real ones."""
    rng = random.Random(step)
    values = {name: rng.random() for name in ("loss", "haplotype_loss", "genotype_loss", "learning_rate")}
    values |= {name: rng.random() for name in ("samples_per_second", "retrieval_wait_share", "mfu")}
    counts = {"host_peak_bytes": (1 << 30) + step, "generation": step // 20, "staleness": step % 20}
    counts |= {"refreshes_skipped": 2, "skipped_steps": step // 30}
    return {**values, **counts, "gradient_norm": None if step % 8 else rng.random()}


def line_of_validation(step: int) -> dict[str, Any]:
    """Sections of a line of validation, with a bin that has no site."""
    rng = random.Random(-step)
    sections: dict[str, Any] = {
        mask: {
            "r2": {name: None if name == "<0.1 %" else rng.random() for name in BIN_NAMES},
            "prior_r2": {name: rng.random() for name in BIN_NAMES},
            "accuracy": rng.random(),
            "calibration_error": 0.001 * rng.random(),
        }
        for mask in MASKS
    }
    return {**sections, "score": rng.random()}


def write_steps(folder: Path, first: int, last: int, resume: int | None = None) -> None:
    """Lines of training every 2 steps, and of validation every 10, after a line of a resume if one is named."""
    record = RunRecord(folder, writes=True)
    if resume is not None:
        record.resume_at(resume, {"optimizer.params.lr": [0.1, "<new>"]})
    for step in range(first, last + 1, 2):
        record.write("train", step, line_of_training(step))
        if step % 10 == 0:
            record.write("validation", step, line_of_validation(step))


def write_run(folder: Path, state: str = "finished", reason: str = "training has ended", last: int = 40) -> Path:
    """A run folder with every file but profiles and an evaluation."""
    write_steps(folder, 2, last)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    versions = {"command": ["embrag", "train", "<a>"], "python": "3.11", "packages": {"torch": "2.6", "faiss": None}}
    (folder / "versions.json").write_text(json.dumps(versions))
    (folder / "run.log").write_text(
        "2026-11-27 05:13:36,246 INFO embrag_ds.training.run: run folder\n"
        "2026-11-27 05:13:37,246 WARNING embrag_ds.x: a <warning> & more\n"
    )
    write_outcome(folder, state, state in ("stopped", "interrupted", "running"), reason, last)
    return folder
