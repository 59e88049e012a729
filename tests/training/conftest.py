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
from embrag_ds.training.trainer import Trainer
from tests.conftest import TINY
from tests.training.runs import read_metrics

MakeConfig = Callable[..., RunConfig]
MakeTrainer = Callable[..., Trainer]
Trained = Callable[..., Path]


@pytest.fixture
def make_trainer(
    make_config: MakeConfig, inputs: PanelInputs, distributed: DistributedContext, tmp_path: Path
) -> MakeTrainer:
    """Function that builds a trainer of the tiny run in ``tmp_path / name``."""

    def make(name: str, *overrides: str, resume: bool = False, init_from: Path | None = None) -> Trainer:
        return Trainer(make_config(*overrides), inputs, tmp_path / name, distributed, resume, init_from)

    return make


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


@pytest.fixture(scope="module")
def trained(make_module_trainer: MakeTrainer, module_folder: Path) -> Trained:
    """Function that trains a run, once for all tests of a module, and returns its folder, which tests only read."""
    folders: dict[tuple[str, ...], Path] = {}

    def folder_of(*overrides: str) -> Path:
        if overrides not in folders:
            name = f"trained{len(folders)}"
            make_module_trainer(name, *overrides).run()
            folders[overrides] = module_folder / name
        return folders[overrides]

    return folder_of
