"""Fixtures of training: a run small enough to train in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embrag_ds.config import RunConfig, load_config
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.runs.record import read_metrics as read_metrics_file
from embrag_ds.training.trainer import Trainer
from tests.conftest import TINY

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
    return [line for line in read_metrics_file(run_dir / "metrics.jsonl") if line["kind"] == kind]


@pytest.fixture
def metrics_of(tmp_path: Path) -> Callable[[str, str], list[dict[str, Any]]]:
    """Function that reads the lines of one kind in the metrics of the run called ``name``."""
    return lambda name, kind="train": read_metrics(tmp_path / name, kind)


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs that the tests of a module share."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def make_module_trainer(
    inputs: PanelInputs, distributed: DistributedContext, cache_dir: Path, module_folder: Path
) -> MakeTrainer:
    """Like ``make_trainer``, for runs in ``module_folder / name``."""

    def make(name: str, *overrides: str) -> Trainer:
        path = module_folder / "tiny.json"
        path.write_text(json.dumps(TINY), encoding="utf-8")
        config = load_config(path, [f"embrag.data.cache_dir={cache_dir}", *overrides])
        return Trainer(config, inputs, module_folder / name, distributed, False)

    return make
