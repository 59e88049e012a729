"""What a machine needs of DeepSpeed's settings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from embrag_ds.errors import UserError
from embrag_ds.model.imputer import Imputer, ModelConfig
from embrag_ds.training import distributed
from embrag_ds.training.distributed import DistributedContext, adapt_to_machine, initialize_engine

PRODUCTION: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "bf16": {"enabled": True},
    "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    "zero_optimization": {"stage": 1},
}


def on(monkeypatch: pytest.MonkeyPatch, cpu: bool, bf16: bool = False) -> None:
    monkeypatch.setattr(distributed, "_on_cpu", lambda: cpu)
    monkeypatch.setattr(distributed, "_cpu_has_bf16", lambda: bf16)


def test_a_cpu_without_bf16_computes_in_fp32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, cpu=True, bf16=False)
    settings, notes = adapt_to_machine(PRODUCTION)
    assert settings["optimizer"]["params"] == {"lr": 0.01, "torch_adam": True}
    assert not settings["bf16"]["enabled"] and not settings["torch_autocast"]["enabled"]
    assert len(notes) == 3 and sum("fp32" in note for note in notes) == 2


def test_a_cpu_with_bf16_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, cpu=True, bf16=True)
    settings, notes = adapt_to_machine(PRODUCTION)
    assert settings["bf16"]["enabled"] and settings["torch_autocast"]["enabled"]
    assert len(notes) == 1


@pytest.mark.parametrize("kind", ["Adam", "adamw"])
@pytest.mark.parametrize("parameters", [{"params": {}}, {}], ids=["empty params", "no params"])
def test_adam_never_compiles_on_a_cpu(monkeypatch: pytest.MonkeyPatch, kind: str, parameters: dict) -> None:
    on(monkeypatch, cpu=True)
    settings, notes = adapt_to_machine({"optimizer": {"type": kind, **parameters}})
    assert settings["optimizer"].get("params", {}).get("torch_adam") is True
    assert len(notes) == 1


@pytest.mark.parametrize("cpu", [True, False])
def test_the_input_is_not_changed(monkeypatch: pytest.MonkeyPatch, cpu: bool) -> None:
    on(monkeypatch, cpu=cpu)
    before = copy.deepcopy(PRODUCTION)
    adapt_to_machine(PRODUCTION)
    assert before == PRODUCTION


def test_what_runs_as_it_is_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, cpu=False)
    assert adapt_to_machine(PRODUCTION) == (PRODUCTION, [])
    on(monkeypatch, cpu=True)
    plain = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "bf16": {"enabled": False}}
    assert adapt_to_machine(plain) == (plain, [])
    other = {"optimizer": {"type": "Lion", "params": {}}}
    assert adapt_to_machine(other) == (other, [])


def test_fp16_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, cpu=True)
    with pytest.raises(UserError, match=r"fp16\.enabled.*use bf16 or a GPU"):
        adapt_to_machine({**PRODUCTION, "fp16": {"enabled": True}})
    adapt_to_machine({**PRODUCTION, "fp16": {"enabled": False}})


@pytest.mark.parametrize(
    "extra",
    [
        {"zero_optimization": {"stgae": 1}},
        {"zero_optimization": {"stage": 7}},
        {"train_batch_size": 3},
        {"gradient_allreduce_op": "median"},
        {"torch_autocast": {"enabled": True, "dtype": "bf17"}},
        {"scheduler": {"type": "WarmupCosineLR", "params": {}}},
        {"scheduler": {"type": "Cosine", "params": {}}},
        {"optimizer": {"type": "AdamWW", "params": {"lr": 0.01}}},
        {"sparse_attention": {}},
        {"activation_checkpointing": {"contiguous_memory_optimization": True}},
    ],
    ids=lambda extra: ",".join(extra),
)
def test_deepspeeds_complaints_are_the_users(distributed: DistributedContext, extra: dict[str, Any]) -> None:
    settings, _ = adapt_to_machine({**PRODUCTION, "bf16": {"enabled": False}, **extra})
    with pytest.raises(UserError) as caught:
        initialize_engine(Imputer(ModelConfig(dims=8, layers=1, heads=1)), settings)
    assert "\n" not in str(caught.value)


def test_a_group_of_one(distributed: DistributedContext) -> None:
    assert (distributed.rank, distributed.ranks, distributed.is_main) == (0, 1, True)
    assert distributed.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert distributed.agree("mine") == "mine"
    assert distributed.own_file("run.log") == "run.log"
    assert DistributedContext(1, 2, distributed.device).own_file("run.log") == "run-rank1.log"
