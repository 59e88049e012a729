"""The roofline of a training step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import arithmetic
import pytest

from embrag_ds.config import load_config
from embrag_ds.model.settings import ModelConfig


def test_a_part_takes_as_long_as_what_limits_it() -> None:
    gpu = arithmetic.Gpu(operations=100.0, bytes_moved=10.0, source="none")
    by_products, by_memory = arithmetic.Part("a", 200.0, 5.0), arithmetic.Part("b", 200.0, 40.0)
    assert (by_products.seconds(gpu), by_products.bound(gpu)) == (2.0, "products")
    assert (by_memory.seconds(gpu), by_memory.bound(gpu)) == (4.0, "memory")


def test_products_between_two_activations_reach_three_quarters_of_the_width() -> None:
    """24 D^2 operations per site and block on 16 D values of two bytes, if weights are small beside activations."""
    parts = arithmetic.parts_of_step(ModelConfig(dims=256, layers=2, heads=4), 64, 930)
    products = [part for part in parts if part.operations and part.name not in ("attention", "fusion and head")]
    moved = sum(part.bytes_moved for part in products)
    assert sum(part.operations for part in products) / moved == pytest.approx(0.75 * 256, rel=0.01)


def test_a_reference_in_the_transformer_doubles_its_parts() -> None:
    model = ModelConfig(dims=32, layers=2, heads=2)
    alone, both = (arithmetic.parts_of_step(model, 8, 50, references) for references in (0, 1))
    for one, two in zip(alone, both, strict=True):
        twice = one.name not in ("fusion and head", "optimiser")
        assert two.operations == (2 if twice else 1) * one.operations


@pytest.mark.long
def test_the_command_prints_what_a_configuration_can_reach(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, root / "profiling" / "arithmetic.py"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root / "docs").stdout
    assert "5.56 TFLOP" in text and "7.0 ms" in text  # of ds_configs/v18.json on an H100
    assert [line.split()[1] for line in text.splitlines() if line.startswith("## ")] == [
        "H100:",
        "H200:",
        "A100:",
        "L4:",
    ]
    monkeypatch.setattr(sys, "argv", ["arithmetic.py", "--deepspeed_config", "v18_wide", "--gpu", "H100"])
    arithmetic.main()
    wide = capsys.readouterr().out
    reached = {name: int(each.split("at most ")[1].split()[0]) for name, each in (("narrow", text), ("wide", wide))}
    assert reached["wide"] > reached["narrow"] > 40


def test_the_wide_configuration_differs_in_width_only() -> None:
    narrow, wide = load_config("v18"), load_config("v18_wide")
    assert (wide.embrag.model.dims, wide.embrag.model.heads) == (512, 8)
    assert wide.deepspeed == narrow.deepspeed
    for name in ("data", "masking", "retrieval", "loss", "train", "validation", "seed"):
        assert getattr(wide.embrag, name) == getattr(narrow.embrag, name)
