"""Fixtures of training: a run small enough to train in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.training.distributed import DistributedContext
from embrag_ds.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(
    make_config: MakeConfig, inputs: PanelInputs, distributed: DistributedContext, tmp_path: Path
) -> MakeTrainer:
    """Function that builds a trainer of the tiny run in ``tmp_path / name``."""

    def make(name: str, *overrides: str, resume: bool = False, init_from: Path | None = None) -> Trainer:
        return Trainer(make_config(*overrides), inputs, tmp_path / name, distributed, resume, init_from)

    return make


def read_metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind in a run's metrics."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


@pytest.fixture
def metrics_of(tmp_path: Path) -> Callable[[str, str], list[dict[str, Any]]]:
    """Function that reads the lines of one kind in the metrics of the run called ``name``."""
    return lambda name, kind="train": read_metrics(tmp_path / name, kind)
