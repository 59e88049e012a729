"""What the tests of training have in common: settings of the tiny run, and what its metrics say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embrag_ds.runs.record import read_metrics as read_metrics_file

TIMES = (
    "retrieval_wait_ms",
    "time",
    "seconds",
    "total_seconds",
    "samples_per_second",
    "step_ms",
    "retrieval_wait_share",
    "flops_per_second",
    "mfu",
    "host_peak_bytes",
    "device_peak_bytes",
)
NO_DROPOUT = "embrag.model.dropout=0"
STRONG = "optimizer.params.lr=0.02"
ENCODINGS = {
    "fixed": ["embrag.retrieval.encoding=fixed"],
    "refresh": ["embrag.retrieval.encoding=refresh", 'embrag.retrieval.refresh={"every_steps": 3, "lag_steps": 0}'],
    "lagging": ["embrag.retrieval.encoding=refresh", 'embrag.retrieval.refresh={"every_steps": 3, "lag_steps": 2}'],
    "live": ["embrag.retrieval.encoding=live"],
    "token": ["embrag.retrieval.mode=token", "embrag.retrieval.token_k=2"],
}


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


def read_metrics(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Lines of one kind in a run's metrics."""
    return [line for line in read_metrics_file(run_dir / "metrics.jsonl") if line["kind"] == kind]
