"""What a run computes beside what its machine can, how far it is, and its peak memory."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from embrag_ds.model.fusion import GatedFusion
from embrag_ds.model.settings import ModelConfig
from embrag_ds.model.transformer import Transformer
from embrag_ds.runtime.processor import peak_resident_bytes
from embrag_ds.training.throughput import matrix_rate, measured_rate, step_flops
from embrag_ds.training.trainer import Trainer

CPU = torch.device("cpu")
Metrics = Callable[..., list[dict[str, Any]]]
MakeTrainer = Callable[..., Trainer]


@pytest.mark.parametrize("references", [0, 1, 3])
def test_operations_are_those_that_torch_counts(references: int) -> None:
    model = ModelConfig(dims=32, layers=2, heads=2, ffn_multiple=3)
    haplotypes, sites = 4, 20
    transformer = Transformer(model.dims, model.layers, model.heads, model.ffn_multiple, 0.0)
    fusion, head = GatedFusion(model.dims), torch.nn.Linear(model.dims, 1)
    frequency = torch.rand(haplotypes, sites)
    position = torch.linspace(0, 1, sites)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        x = torch.randn(haplotypes, sites, model.dims, requires_grad=True)
        fused = fusion(x, x, frequency, frequency.requires_grad_())
        for _ in range(references + 1):
            fused = transformer(fused, position)
        head(fused).sum().backward()
    expected = step_flops(model, haplotypes, sites, references)
    assert counted.get_total_flops() == pytest.approx(expected, rel=0.03)


def test_the_rate_of_matrix_products_is_a_rate() -> None:
    assert 1e6 < matrix_rate(CPU, torch.float32, 64, rounds=3) < 1e14


def test_other_programs_on_the_machine_do_not_lower_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that is too low would show a share of the machine above 1."""
    clock = iter([0, 1, 10, 18, 20, 24, 30, 39])  # the warm-up takes 1 s, the products take 8, 4 and 9
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert matrix_rate(CPU, torch.float32, 64, rounds=3) == 2 * 64**3 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_machine_is_measured_once_shortly_and_without_random_numbers(dtype: torch.dtype) -> None:
    measured_rate.cache_clear()
    state, began = torch.random.get_rng_state(), time.process_time()
    rate = measured_rate(CPU, dtype, torch.get_num_threads())
    assert time.process_time() - began < 1  # some 0.15 s, on a machine that does other things as well
    assert measured_rate(CPU, dtype, torch.get_num_threads()) == rate
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.gpu
def test_a_gpu_reaches_more_than_a_processor() -> None:
    measured_rate.cache_clear()
    began = time.monotonic()
    assert measured_rate(torch.device("cuda", 0), torch.bfloat16, 1) > 1e12
    assert time.monotonic() - began < 3


def test_peak_memory_is_what_a_process_once_held() -> None:
    held = "held = b'1' * 200_000_000; del held; print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None and child.stdout.readline() == b"\n"
        assert 200e6 < (peak_resident_bytes(child.pid) or 0) < 400e6
        child.communicate(b"\n")
    assert peak_resident_bytes(child.pid) is None


def test_a_line_of_metrics_says_how_far_and_how_fast_the_run_is(
    make_trainer: MakeTrainer, metrics_of: Metrics, tmp_path: Path
) -> None:
    overrides = ["gradient_accumulation_steps=2", "embrag.train.log_every=2"]
    make_trainer("run", *overrides, "embrag.train.max_steps=4").run()
    trainer = make_trainer("run", *overrides, "embrag.train.max_steps=8", resume=True)
    trainer.run()
    lines = metrics_of("run")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    # Of the whole run, and not since it was resumed: 2 micro-batches of 6 samples a step.
    assert [line["samples_seen"] for line in lines] == [24, 48, 72, 96]
    epochs = [2 * step / trainer.sampler.micro_batches_per_epoch for step in (2, 4, 6, 8)]
    assert [line["epoch"] for line in lines] == pytest.approx(epochs)
    rate = json.loads((tmp_path / "run" / "versions.json").read_text())["matrix_rate"]
    assert rate == trainer.report.throughput.matrix_rate
    sites = [window.core_stop - window.core_start for window in trainer.sampler.data.windows]
    model = trainer.embrag.model
    for line in lines:
        assert line["mfu"] == pytest.approx(line["flops_per_second"] / rate) and 0 < line["mfu"] < 1
        operations = line["flops_per_second"] * 2 * line["step_ms"] / 1000
        least, most = (4 * step_flops(model, 12, length, 0) for length in (min(sites), max(sites)))
        assert least * 0.999 <= operations <= most * 1.001
        # Linux adds up pages by processor: the peak it prints may fall by some of them.
        assert 1e8 < line["host_peak_bytes"] <= 1.01 * (peak_resident_bytes() or math.inf)
        assert ("device_peak_bytes" in line) == torch.cuda.is_available()


def test_references_in_the_transformer_count(make_trainer: MakeTrainer, metrics_of: Metrics) -> None:
    operations = {}
    for mode in ("embedding", "token"):
        make_trainer(
            mode, f"embrag.retrieval.mode={mode}", "embrag.retrieval.token_k=2", "embrag.train.max_steps=2"
        ).run()
        operations[mode] = sum(line["flops_per_second"] * line["step_ms"] for line in metrics_of(mode))
    assert 2 < operations["token"] / operations["embedding"] < 3


def test_every_key_of_a_line_is_documented(make_trainer: MakeTrainer, metrics_of: Metrics, root: Path) -> None:
    make_trainer("run", "embrag.train.max_steps=1", "embrag.train.eval_every=1").run()
    section = (root / "docs" / "files.md").read_text(encoding="utf-8").split("## A run folder")[1]
    rows = re.findall(r"^\| (`.+?`) \|", section, flags=re.MULTILINE)
    documented = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    (line,) = metrics_of("run")
    assert set(line) - documented == {"kind"}
    (line,) = metrics_of("run", "validation")
    scores = {key for name, value in line.items() if isinstance(value, dict) for key in value}
    assert all(f"`{key}`" in section for key in scores | {"score"})
