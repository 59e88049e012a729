"""A run small enough to train in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embrag_ds.config import RunConfig, load_config
from embrag_ds.engine.initialize import World
from embrag_ds.engine.inputs import PanelInputs
from embrag_ds.engine.trainer import Trainer

TINY: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 6,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "steps_per_print": 1_000_000_000,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 40, "warmup_num_steps": 3, "warmup_type": "linear"},
    },
    "zero_optimization": {"stage": 1},
    "embrag": {
        "seed": 5,
        "data": {"window_sites": 64, "overlap_sites": 16, "flank_sites": 32, "validation_people": 6},
        "masking": {"curriculum_steps": 10, "array_spacing_bp": [1000, 3000]},
        "retrieval": {"encoding": "fixed", "k": 16},
        "model": {"dims": 16, "layers": 1, "heads": 2, "dropout": 0.1},
        "train": {"max_steps": 6, "log_every": 1, "eval_every": 1000, "checkpoint_every": 1000},
        "validation": {"windows": 2, "people": 6},
    },
}

MakeConfig = Callable[..., RunConfig]
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_config(tmp_path: Path, cache_dir: Path) -> MakeConfig:
    """The tiny run's configuration with ``dotted.key=value`` overrides."""

    def make(*overrides: str) -> RunConfig:
        path = tmp_path / "tiny.json"
        path.write_text(json.dumps(TINY), encoding="utf-8")
        return load_config(path, [f"embrag.data.cache_dir={cache_dir}", *overrides])

    return make


@pytest.fixture
def make_trainer(make_config: MakeConfig, inputs: PanelInputs, world: World, tmp_path: Path) -> MakeTrainer:
    """A trainer of the tiny run in ``tmp_path / name``."""

    def make(name: str, *overrides: str, resume: bool = False, init_from: Path | None = None) -> Trainer:
        return Trainer(make_config(*overrides), inputs, tmp_path / name, world, resume, init_from)

    return make


def read_metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind of a run's metrics."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


@pytest.fixture
def metrics_of(tmp_path: Path) -> Callable[[str, str], list[dict[str, Any]]]:
    """Lines of one kind of the metrics of the run called ``name``."""
    return lambda name, kind="train": read_metrics(tmp_path / name, kind)
