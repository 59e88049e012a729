"""A small and a large batch at equal samples seen: the settings of both, the curves and the tables."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import large_batch
import pytest

from embrag_ds.config import load_config


class Runs:
    """Stand-in for ``trained``: metrics with a loss and a score that follow from the settings."""

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []

    def __call__(
        self, config: Path, folder: Path, given: dict[str, Any], options: argparse.Namespace
    ) -> list[dict[str, Any]]:
        self.given.append(given)
        lines: list[dict[str, Any]] = []
        for step in range(1, given["embrag.train.max_steps"] + 1):
            if step % given["embrag.train.log_every"] == 0:
                lines.append({"kind": "train", "step": step, "loss": given["optimizer.params.lr"]})
            if step % given["embrag.train.eval_every"] == 0:
                sparse = {"r2": {"all <1 %": 0.5}, "prior_r2": {"all <1 %": 0.4}}
                score = 0.1 * given["embrag.seed"] + given["optimizer.params.lr"]
                lines.append({"kind": "validation", "step": step, "score": score, "array-sparse-2": sparse})
        return lines


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """All runs of the command, with two seeds."""
    made = Runs()
    monkeypatch.setattr(large_batch, "trained", made)
    words = ["--out", str(tmp_path), "--seeds", "1", "2", "--steps", "40", "--validations", "4"]
    monkeypatch.setattr(sys, "argv", ["large_batch.py", *words])
    large_batch.main()
    return made


def test_both_batches_see_the_same_samples_under_the_same_schedule(runs: Runs) -> None:
    small, large = runs.given[:2]
    micro = "train_micro_batch_size_per_gpu"
    batches = [each[micro] * each["gradient_accumulation_steps"] for each in (small, large)]
    assert batches == [32, 512] and small[micro] == large[micro]
    counted = [
        "scheduler.params.total_num_steps",
        "scheduler.params.warmup_num_steps",
        "embrag.masking.curriculum_steps",
        "embrag.train.max_steps",
        "embrag.train.log_every",
        "embrag.train.eval_every",
    ]
    refresh = "embrag.retrieval.refresh"
    assert all(small[name] == 16 * large[name] for name in counted)
    assert small[refresh] == {name: 16 * value for name, value in large[refresh].items()}
    assert large["optimizer.params.lr"] == 4 * small["optimizer.params.lr"]
    rates = [each["optimizer.params.lr"] for each in runs.given[-2:]]
    assert rates == [0.002, 0.032] and [each["embrag.seed"] for each in runs.given] == [1, 1, 2, 2, 1, 1]


def test_the_shares_are_those_of_the_shipped_configurations() -> None:
    small, large = (load_config(name) for name in ("v18", "v18_large_batch"))
    steps = large.deepspeed["scheduler"]["params"]
    assert {
        "warmup": round(steps["warmup_num_steps"] / steps["total_num_steps"], 2),
        "curriculum": round(large.embrag.masking.curriculum_steps / steps["total_num_steps"], 2),
        "refresh": round(large.embrag.retrieval.refresh.every_steps / steps["total_num_steps"], 2),
    } == large_batch.SHARES
    rate = small.deepspeed["optimizer"]["params"]["lr"] * large_batch.RULES["square root"](128)
    assert large.deepspeed["optimizer"]["params"]["lr"] == pytest.approx(rate, rel=0.01)


def test_it_writes_tables_numbers_and_a_plot(runs: Runs, tmp_path: Path) -> None:
    table = (tmp_path / "large_batch.md").read_text().splitlines()
    names = "32, 0.002 (base), 2 seeds | 512, 0.008 (square root), 2 seeds"
    assert table[2].startswith(f"| samples seen | {names} | ")
    assert table[4].startswith("| 5,120 | 0.1520 (0.1020 to 0.2020) | 0.1580 (0.1080 to 0.2080) | 0.1020 |")
    assert table[7].startswith("| 20,480 |")
    assert "| 512, 0.008 (square root) | +0.0060, +0.0060 | 4.000, 4.000 |" in table
    written = json.loads((tmp_path / "large_batch.json").read_text())
    curve = written["runs"]["32, 0.002 (base)"]["2"]
    assert curve["samples"] == [5120, 10240, 15360, 20480] and curve["loss"] == pytest.approx([0.002] * 4)
    assert curve["prior_r2"] == 0.4 and "embrag.model.dims=32" in written["set"]
    assert (tmp_path / "large_batch.png").read_bytes().startswith(b"\x89PNG")


def test_losses_between_two_validations_are_averaged() -> None:
    sparse = {"r2": {"all <1 %": 0.5}, "prior_r2": {"all <1 %": 0.4}}
    validation = {"kind": "validation", "score": 0.7, "array-sparse-2": sparse}
    train = [{"kind": "train", "loss": loss} for loss in (1.0, 2.0, 5.0, 6.0)]
    lines = [*train[:2], {**validation, "step": 2}, *train[2:], {**validation, "step": 4}]
    found = large_batch.curve(lines, 8, 1.0)
    assert found.loss == [1.5, 5.5] and found.samples == [16, 32]
    assert math.isclose(large_batch._later([1.0, 2.0, 5.0, 6.0]), 5.5)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(["--batches", "32", "500"], "multiple of SMALL"), (["--steps", "35"], "multiple of --validations")],
)
def test_what_does_not_divide_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    complaint: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["large_batch.py", "--out", "x", *words])
    with pytest.raises(SystemExit):
        large_batch.parse_arguments()
    assert complaint in capsys.readouterr().err
