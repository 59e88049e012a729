"""Adaptation of DeepSpeed's settings to the machine, and DeepSpeed's errors about settings."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.zero import stage_1_and_2

from embrag_ds.engine import distributed
from embrag_ds.engine.distributed import DistributedContext, adapt_to_machine, compute_type, initialize_engine
from embrag_ds.errors import UserError
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.settings import ModelConfig
from embrag_ds.training.trainer import Trainer

PRODUCTION: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "bf16": {"enabled": True},
    "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    "zero_optimization": {"stage": 1},
}


def tiny_model() -> Imputer:
    return Imputer(ModelConfig(dims=8, layers=1, heads=1))


def on(monkeypatch: pytest.MonkeyPatch, cpu: bool, bf16: bool = False) -> None:
    monkeypatch.setattr(distributed, "_on_cpu", lambda: cpu)
    monkeypatch.setattr(distributed, "cpu_has_bf16", lambda: bf16)


def test_a_cpu_without_bf16_computes_in_fp32_and_notes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, cpu=True, bf16=False)
    settings, notes = adapt_to_machine(PRODUCTION)
    assert settings["optimizer"]["params"] == {"lr": 0.01, "torch_adam": True}
    assert not settings["bf16"]["enabled"] and not settings["torch_autocast"]["enabled"]
    assert len(notes) == 3 and sum("fp32" in note for note in notes) == 2


def test_without_bf16_gradients_are_added_up_in_the_type_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, cpu=True, bf16=False)
    settings, notes = adapt_to_machine({**PRODUCTION, "data_types": {"grad_accum_dtype": "fp32"}})
    assert settings["data_types"] == {}
    assert [note for note in notes if "bf16 is off" in note and "data_types.grad_accum_dtype is left out" in note]
    on(monkeypatch, cpu=True, bf16=True)
    settings, _ = adapt_to_machine({**PRODUCTION, "data_types": {"grad_accum_dtype": "fp32"}})
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}


def test_stage_0_refuses_to_add_bf16_gradients_up_in_fp32(
    distributed: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, cpu=True, bf16=True)
    mixed = {"torch_autocast": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"}}
    settings, _ = adapt_to_machine({**PRODUCTION, **mixed, "zero_optimization": {"stage": 0}})
    with pytest.raises(UserError, match=r"^DeepSpeed refuses its settings: unsupported mix of .*grad_accum_dtype"):
        initialize_engine(tiny_model(), settings)


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


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, torch.float32),
        ({"bf16": {"enabled": True}}, torch.bfloat16),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}}, torch.float16),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, torch.bfloat16),
        ({"torch_autocast": {"enabled": False, "dtype": "bfloat16"}}, torch.float32),
    ],
)
def test_the_type_of_products_is_that_of_the_enabled_section(settings: dict[str, Any], kind: torch.dtype) -> None:
    assert compute_type(settings) == kind


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
        # The parser accepts these; the engine does not.
        {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "many"}}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": [1, 2]}}},
        {"optimizer": {"type": "AdamW", "params": {"lr": -1, "torch_adam": True}}},
        {"optimizer": {"type": "AdamW", "params": {"lr": "low", "torch_adam": True}}},
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
        {"data_types": {"grad_accum_dtype": "fp33"}},
        {"zero_optimization": {"stage": 2}, "prescale_gradients": True},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        {"log_level": "loud"},
        {"tensor_parallel": {"autotp_size": "two"}},
    ],
    ids=lambda extra: ",".join(extra),
)
def test_deepspeeds_errors_about_settings_are_user_errors(
    distributed: DistributedContext, extra: dict[str, Any]
) -> None:
    settings, _ = adapt_to_machine({**PRODUCTION, "bf16": {"enabled": False}, **extra})
    with pytest.raises(UserError) as caught:
        initialize_engine(tiny_model(), settings)
    assert "\n" not in str(caught.value)
    cause = caught.value.__cause__
    assert cause is not None and cause.__traceback__ is not None  # DeepSpeed's own error, with its traceback


def raising(fault: Exception, module: str) -> Callable[..., None]:
    """Function with a bug, which seems to be of ``module``."""
    names: dict[str, Any] = {"__name__": module, "fault": fault}
    exec("def raises(*_, **__):\n    raise fault", names)
    return names["raises"]


@pytest.mark.parametrize("kind", [TypeError, ValueError, AssertionError, RuntimeError])
@pytest.mark.parametrize(
    ("owner", "name", "module"),
    [
        (Imputer, "to", "embrag_ds.model.imputer"),
        (deepspeed.DeepSpeedEngine, "__init__", "deepspeed.runtime.engine"),
        (deepspeed.DeepSpeedEngine, "_configure_distributed_model", "deepspeed.runtime.engine"),
        (deepspeed.DeepSpeedEngine, "_check_for_duplicates", "deepspeed.runtime.engine"),
        (stage_1_and_2, "get_accelerator", "deepspeed.accelerator"),
        # Called from where the optimizer's settings are read.
        (torch.optim, "AdamW", "embrag_ds.model.imputer"),
    ],
)
def test_a_bug_stays_what_it_is(
    distributed: DistributedContext,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    module: str,
    kind: type[Exception],
) -> None:
    settings, _ = adapt_to_machine({**PRODUCTION, "bf16": {"enabled": False}, "torch_autocast": {"enabled": False}})
    model, fault = tiny_model(), kind("planted")
    monkeypatch.setattr(owner, name, raising(fault, module))
    with pytest.raises(kind) as caught:
        initialize_engine(model, settings)
    assert caught.value is fault
    assert caught.traceback[-1].name == "raises"


def test_an_assertion_without_a_message_is_not_about_settings(
    distributed: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assertions without a message in an optimizer's constructor are about its own state."""

    def constructed(words: str) -> Any:
        names: dict[str, Any] = {"__name__": stage_1_and_2.__name__, "words": words}
        exec("class Optimizer:\n    def __init__(self, *_, **__):\n        assert not _, words", names)
        return names["Optimizer"]

    settings, _ = adapt_to_machine({**PRODUCTION, "bf16": {"enabled": False}})
    for words, kind in (("not supported", UserError), ("", AssertionError)):
        monkeypatch.setattr("deepspeed.runtime.engine.DeepSpeedZeroOptimizer", constructed(words))
        with pytest.raises(kind):
            initialize_engine(tiny_model(), settings)


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_lie_where_fast_kernels_can_read_them(distributed: DistributedContext, stage: int) -> None:
    """At odd places of DeepSpeed's buffer, matrix products and layer norms take twice as long on a GPU."""
    model = Imputer(ModelConfig(dims=64, layers=2, heads=1))
    settings, _ = adapt_to_machine({**PRODUCTION, "zero_optimization": {"stage": stage}})
    engine = initialize_engine(model, settings)
    places = {}
    for name, weight in engine.module.named_parameters():
        assert weight.untyped_storage().nbytes() > weight.nbytes, "not a part of DeepSpeed's buffer"
        places[name] = weight.storage_offset() % min(weight.numel() & -weight.numel(), 64)
    assert any(weight.numel() % 2 for weight in model.parameters()) and len(places) > 20
    assert not any(places.values()), places


def test_a_group_of_one(distributed: DistributedContext) -> None:
    assert (distributed.rank, distributed.ranks, distributed.is_main) == (0, 1, True)
    assert distributed.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert distributed.agree("mine") == "mine"
    assert distributed.own_file("run.log") == "run.log"
    assert DistributedContext(1, 2, distributed.device).own_file("run.log") == "run-rank1.log"


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch as it was, after a test that makes it deterministic."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that the variable is restored, whatever it was
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.usefixtures("_as_before")
def test_a_deterministic_run_allows_no_other_operations(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer("free")
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    trainer = make_trainer("run", "embrag.train.deterministic=true", "embrag.train.max_steps=2")
    # A mere warning would leave flash attention as it is.
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory
    trainer.run()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match=r"embrag\.train\.deterministic: CUBLAS_WORKSPACE_CONFIG is :0:0; unset it"):
        make_trainer("other", "embrag.train.deterministic=true")


@pytest.mark.gpu
@pytest.mark.usefixtures("_as_before")
def test_a_deterministic_run_on_a_gpu_resumes_bit_for_bit(
    make_trainer: Callable[..., Trainer], metrics_of: Callable[..., list[dict[str, Any]]]
) -> None:
    settings = ["embrag.train.deterministic=true", "bf16.enabled=true", "embrag.model.dims=64", "embrag.model.heads=1"]
    settings += ["optimizer.params.lr=0.02", "embrag.retrieval.encoding=refresh"]
    make_trainer("whole", *settings, "embrag.train.max_steps=8").run()
    make_trainer("cut", *settings, "embrag.train.max_steps=4").run()
    make_trainer("cut", *settings, "embrag.train.max_steps=8", resume=True).run()
    whole, cut = ([line["loss"] for line in metrics_of(name)] for name in ("whole", "cut"))
    assert len(cut) == 8 and cut == whole


@pytest.mark.parametrize(("kind", "imported"), [("AdamW", True), ("Muon", False), ("muon", False)])
def test_muon_is_imported_without_torchs_compiler_by_runs_without_it(
    monkeypatch: pytest.MonkeyPatch, kind: str, imported: bool
) -> None:
    name = "deepspeed.runtime.zero.muon.original_muon"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch, "compile", lambda *given, **named: pytest.fail("compiled"))
    before = compiler.compile
    distributed._leave_muon_uncompiled({"optimizer": {"type": kind}})
    assert (name in sys.modules) == imported and compiler.compile is before
