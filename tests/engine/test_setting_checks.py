"""Checks of DeepSpeed's half: values, settings without effect, and settings that do not suit one another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules

from embrag_ds.config import RunConfig
from embrag_ds.config_files import shipped_configurations
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.errors import UserError
from embrag_ds.training.panel_limits import settled_batch
from embrag_ds.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

SCHEDULE = "scheduler=null", "scheduler.params.total_num_steps=100", "scheduler.params.warmup_num_steps=10"


def warnings_of(caplog: pytest.LogCaptureFixture, *overrides: str, name: str = "quickstart") -> list[str]:
    """Warnings about a shipped configuration with overrides, without the file's name."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "embrag_ds"):
        load_training_config(name, overrides)
    return [message.partition(": ")[2] for message in caplog.messages]


def error_of(*overrides: str) -> str:
    """The error about ``quickstart`` with overrides, without the file's name."""
    with pytest.raises(UserError) as caught:
        load_training_config("quickstart", overrides)
    file, _, error = str(caught.value).partition(": ")
    assert file == str(shipped_configurations()["quickstart"]) and "\n" not in error
    return error


@pytest.mark.parametrize("name", shipped_configurations())
def test_nothing_is_said_of_a_shipped_configuration(caplog: pytest.LogCaptureFixture, name: str) -> None:
    assert warnings_of(caplog, name=name) == []


@pytest.mark.parametrize("value", ["abc", "nan", "0", "-0.001", "[0.1]", "true", '"0.001"'])
def test_a_learning_rate_must_be_a_positive_number(value: str) -> None:
    shown = f'"{value}"' if value in ("abc", "nan") else value
    error = error_of(f"optimizer.params.lr={value}")
    assert error == f"optimizer.params.lr must be a learning rate above 0, such as 0.001, not {shown}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.params.betas=0.9", "two numbers of at least 0 and below 1, such as [0.9, 0.95], not 0.9"),
        ("optimizer.params.betas=[0.9]", "two numbers of at least 0 and below 1"),
        ("optimizer.params.betas=[0.9, 1]", "two numbers of at least 0 and below 1"),
        ('optimizer.params.betas=["a", 0.9]', "two numbers of at least 0 and below 1"),
        ("optimizer.params.eps=small", 'a number above 0, not "small"'),
        ("optimizer.params.eps=0", "a number above 0, not 0"),
        ("optimizer.params.weight_decay=-1", "a number of at least 0, not -1"),
        ("optimizer.params.weight_decay=null", None),
        ("optimizer.params.torch_adam=yes", 'true or false, not "yes"'),
        ("optimizer.params.amsgrad=1", "true or false, not 1"),
        ("scheduler.params.total_num_steps=many", 'a whole number of steps, at least 1, not "many"'),
        ("scheduler.params.total_num_steps=240.0", "a whole number of steps, at least 1, not 240.0"),
        ("scheduler.params.warmup_num_steps=0", "a whole number of steps, at least 1, not 0"),
        ("scheduler.params.warmup_num_steps=true", "a whole number of steps, at least 1, not true"),
        ("scheduler.params.warmup_min_ratio=2", "a number from 0 to 1, not 2"),
        ("scheduler.params.cos_min_ratio=low", 'a number from 0 to 1, not "low"'),
        ("scheduler.params.warmup_type=cosine", '"linear" or "log", not "cosine"'),
        ("gradient_clipping=abc", 'a number of at least 0, not "abc"'),
        ("gradient_clipping=-1", "a number of at least 0, not -1"),
        ("steps_per_print=0", "a whole number of at least 1, not 0"),
        ("wall_clock_breakdown=1", "true or false, not 1"),
        ("train_batch_size=16.5", "a whole number of samples, at least 1, not 16.5"),
        ("activation_checkpointing.number_checkpoints=two", 'a whole number of blocks, at least 1, not "two"'),
    ],
)
def test_a_value_that_deepspeed_takes_as_it_is_is_checked(override: str, words: str | None) -> None:
    if words is None:
        load_training_config("quickstart", [override])  # null removes the key
        return
    assert error_of(override).startswith(f"{override.partition('=')[0]} must be {words}")


@pytest.mark.parametrize(
    "override",
    [
        "autotuning.enabled=true",
        "compile.deepcompile=true",
        "data_efficiency.enabled=true",
        "dataloader_drop_last=true",
        "disable_allgather=true",
        "checkpoint.parallel_write.pipeline_stage=true",
        "pipeline.stages=2",
        "use_data_before_expert_parallelism=true",
        "seq_parallel_communication_data_type=fp32",
        "weight_quantization.quantized_initialization=null",
        "managed_gradient_accumulation=false",
        "aio.thread_count=2",
        "zero_optimization.offload_param.device=cpu",
        "zero_optimization.stage3_max_live_parameters=5",
        "zero_optimization.sub_group_size=5",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save=true",
    ],
)
def test_a_setting_without_effect_is_refused(override: str) -> None:
    error = error_of(override)
    key = override.partition("=")[0]
    named = error.partition(" ")[0]
    assert key.startswith(named) and error.startswith(f"{named} has no effect in embrag_ds: ")
    assert error.endswith("; leave it out")


def test_offload_needs_a_stage() -> None:
    offload = "zero_optimization.offload_optimizer.device=cpu"
    assert error_of("zero_optimization.stage=0", offload).startswith(
        "zero_optimization.offload_optimizer has no effect"
    )
    load_training_config("quickstart", [offload])
    # The remedy, taken literally, helps.
    error = error_of("zero_optimization.stage=0", offload)
    assert error.endswith("leave it out")
    load_training_config("quickstart", ["zero_optimization.stage=0"])


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.writer.type=fast",
        "datastates_ckpt.enabled=true",
        "hybrid_engine.enabled=true",
        "tensor_parallel.autotp_size=2",
    ],
)
def test_a_setting_that_breaks_a_run_is_refused(override: str) -> None:
    assert " cannot be used in embrag_ds: " in error_of(override)


@pytest.mark.parametrize(
    "override",
    [
        "amp.enabled=true",
        "nebula.enabled=true",
        "compression_training.layer_reduction=1",
        "curriculum_learning.enabled=true",
        "progressive_layer_drop.enabled=true",
        "sparse_attention.mode=fixed",
        "eigenvalue.enabled=true",
    ],
)
def test_what_deepspeed_no_longer_has_is_refused(override: str) -> None:
    assert "has been removed" in error_of(override) or "unknown DeepSpeed key" in error_of(override)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (
            ["scheduler.params.warmup_num_steps=240"],
            "scheduler.params.warmup_num_steps (240) must be less than total_num_steps (240): the schedule would end "
            "before its warm-up; set it to 12, for example",
        ),
        (
            ["scheduler=null", "scheduler.type=WarmupCosineLR", "scheduler.params.total_num_steps=240"],
            "scheduler.params.warmup_num_steps (1000, DeepSpeed's default) must be less than total_num_steps (240)",
        ),
        (
            [*SCHEDULE, "scheduler.type=WarmupDecayLR", "embrag.train.max_steps=100"],
            "optimizer.params.lr (0.002) has no effect, because WarmupDecayLR takes its learning rate from "
            "scheduler.params.warmup_max_lr (0.001, DeepSpeed's default); set both alike, or leave",
        ),
        (
            ["scheduler=null", "scheduler.type=WarmupLR", "scheduler.params.warmup_max_lr=0.1"],
            "optimizer.params.lr (0.002) has no effect, because WarmupLR takes its learning rate from "
            "scheduler.params.warmup_max_lr (0.1); set both alike",
        ),
        (["scheduler.params.total_num_steps=null"], "scheduler.params.total_num_steps is missing, and WarmupCosineLR"),
        (["scheduler=null", "scheduler.type=StepLR"], "scheduler.params.step_size is missing, and StepLR needs it"),
        (["scheduler=null", "scheduler.type=ReduceLROnPlateau"], "scheduler.type ReduceLROnPlateau needs a score"),
        (
            ["scheduler=null", "scheduler.type=LambdaLR", "scheduler.params.lr_lambda=x"],
            "scheduler.params: DeepSpeed refuses its settings: ",
        ),
        (
            ["scheduler=null", "scheduler.type=WarmupLR", "scheduler.params.warmup_min_lr=[0, 0]"],
            "scheduler.params: DeepSpeed refuses its settings: ",
        ),
        (
            [
                "scheduler=null",
                "scheduler.type=OneCycleLR",
                "scheduler.params.max_lr=0.002",
                "scheduler.params.total_steps=100",
            ],
            "embrag.train.max_steps (240) exceeds the 100 steps of the scheduler OneCycleLR, which stops there",
        ),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(overrides: list[str], error: str) -> None:
    assert error_of(*overrides).startswith(error)


def test_the_remedy_for_a_rate_without_effect_works(caplog: pytest.LogCaptureFixture) -> None:
    decay = [*SCHEDULE, "scheduler.type=WarmupDecayLR", "embrag.train.max_steps=100", "embrag.train.eval_every=50"]
    alike = "scheduler.params.warmup_max_lr=0.002"
    assert warnings_of(caplog, *decay, alike, "embrag.masking.curriculum_steps=100") == []
    assert warnings_of(caplog, *decay, "optimizer.params.lr=null", "embrag.masking.curriculum_steps=100") == []


def test_a_run_beyond_its_schedule_is_told_its_rate(caplog: pytest.LogCaptureFixture) -> None:
    (cosine,) = warnings_of(caplog, "embrag.train.max_steps=500", "scheduler.params.cos_min_ratio=0.05")
    assert cosine == (
        "embrag.train.max_steps (500) lies beyond scheduler.params.total_num_steps (240): the last 260 steps have "
        "5.00% of the highest learning rate; set both alike"
    )
    decay = [*SCHEDULE, "scheduler.type=WarmupDecayLR", "scheduler.params.warmup_max_lr=0.002"]
    (linear,) = warnings_of(caplog, *decay)
    assert "the last 140 steps have 0.00% of the highest learning rate" in linear
    wave = ["scheduler=null", "scheduler.type=CosineAnnealingLR", "scheduler.params.T_max=100"]
    (again,) = warnings_of(caplog, *wave)
    assert "rises again from there" in again
    assert warnings_of(caplog, "embrag.train.max_steps=240") == []


def test_the_rate_that_is_told_is_the_engines(caplog: pytest.LogCaptureFixture) -> None:
    """Beyond the end of the schedule, the steps really have the rate that is named."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = lr_schedules.WarmupCosineLR(optimizer, 40, warmup_num_steps=10, cos_min_ratio=0.05)
    rates = []
    for _ in range(60):
        rates.append(optimizer.param_groups[0]["lr"])  # what the step takes; the engine steps the schedule after it
        schedule.step()
    assert [round(rate, 9) for rate in rates[40:]] == [0.05] * 20 and rates[39] > 0.05
    overrides = ["scheduler.params.total_num_steps=40", "scheduler.params.warmup_num_steps=10"]
    said = warnings_of(caplog, *overrides, "embrag.train.max_steps=60", "scheduler.params.cos_min_ratio=0.05")
    assert any("the last 20 steps have 5.00% of" in each for each in said)


def test_a_run_that_ends_early_is_told_what_it_misses(caplog: pytest.LogCaptureFixture) -> None:
    validated, masks, warm_up = warnings_of(caplog, "embrag.train.max_steps=11")
    assert validated.startswith(
        "embrag.train.eval_every (120) exceeds embrag.train.max_steps (11), so the run is never"
    )
    assert masks.startswith(
        "embrag.masking.curriculum_steps (200) exceeds embrag.train.max_steps (11): masks end at a "
    )
    assert warm_up.startswith("scheduler.params.warmup_num_steps (20) is not below embrag.train.max_steps (11): ")
    assert "to 45.6% of its highest" in warm_up  # linear, from .01: .01 + .99 * 9 / 20
    # Masks of a policy that has no curriculum do not depend on it.
    alone = warnings_of(caplog, "embrag.train.max_steps=150", 'embrag.masking.policies={"array": 1.0}')
    assert alone == []


def test_other_ranks_are_silent(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert warnings_of(caplog, "embrag.train.max_steps=11") == []


@pytest.fixture
def trainer_of(
    make_config: MakeConfig, inputs: PanelInputs, distributed: DistributedContext, tmp_path: Path
) -> Callable[..., Trainer]:
    """Function that builds a trainer of the tiny run, on a panel with 54 samples to train on."""
    return lambda *overrides: Trainer(make_config(*overrides), inputs, tmp_path / "run", distributed, False)


def test_a_micro_batch_larger_than_the_panel_is_named(
    trainer_of: Callable[..., Trainer], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    trainer = trainer_of("train_micro_batch_size_per_gpu=64", "gradient_accumulation_steps=2")
    (said,) = [each for each in caplog.messages if "train_micro_batch_size_per_gpu" in each]
    assert said == (
        "train_micro_batch_size_per_gpu is 64, and the panel has 54 samples to train on: micro-batches have 54, and a "
        "step 108; lower train_micro_batch_size_per_gpu, or give a panel of more samples"
    )
    # What is not in force is written nowhere.
    assert trainer.engine.train_batch_size() == 108
    written = (tmp_path / "run" / "config.json").read_text(encoding="utf-8")
    assert '"train_micro_batch_size_per_gpu": 54' in written and "64" not in written.partition("embrag")[0]
    trainer.reference.close()


def test_a_micro_batch_as_large_as_the_panel_is_not_named(
    trainer_of: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer_of("train_micro_batch_size_per_gpu=54").reference.close()
    assert not [each for each in caplog.messages if "train_micro_batch_size_per_gpu" in each]


def test_micro_batches_of_a_step_follow_from_the_global_batch(
    trainer_of: Callable[..., Trainer], tmp_path: Path
) -> None:
    """DeepSpeed derives them, too: with another number a step would be no step of the optimiser."""
    trainer = trainer_of("gradient_accumulation_steps=null", "train_batch_size=12")
    assert trainer.accumulation == trainer.engine.gradient_accumulation_steps() == 2
    assert trainer.sampler.accumulation == 2
    trainer.run()
    assert trainer.engine.global_steps == trainer.embrag.train.max_steps
    assert '"gradient_accumulation_steps": 2' in (tmp_path / "run" / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "ranks", "said"),
    [
        ({"gradient_accumulation_steps": 1}, 1, "size_per_gpu 6 x 1 ranks x gradient_accumulation_steps 1 is 6; leave"),
        ({"gradient_accumulation_steps": 2}, 2, "6 x 2 ranks x gradient_accumulation_steps 2 is 24; leave"),
        ({}, 2, "size_per_gpu 6 x 2 ranks is 12; leave out train_batch_size, or make it a multiple of that number"),
    ],
)
def test_a_global_batch_that_does_not_fit_is_refused(given: dict[str, int], ranks: int, said: str) -> None:
    settings = {"train_micro_batch_size_per_gpu": 6, "train_batch_size": 18, **given}
    with pytest.raises(UserError, match=r"^train_batch_size is 18, and train_micro_batch_") as refused:
        settled_batch(settings, ranks)
    assert said in str(refused.value)


def test_a_global_batch_beyond_the_panel_is_refused(trainer_of: Callable[..., Trainer]) -> None:
    with pytest.raises(UserError, match="so train_batch_size cannot be 64; leave it out"):
        trainer_of("train_micro_batch_size_per_gpu=64", "train_batch_size=64")


@pytest.mark.parametrize(("mode", "said"), [("embedding", 1), ("token", 1), ("none", 0)])
def test_fewer_neighbours_than_asked_for_are_named_once(
    trainer_of: Callable[..., Trainer], caplog: pytest.LogCaptureFixture, mode: str, said: int
) -> None:
    trainer = trainer_of("embrag.retrieval.k=500", f"embrag.retrieval.mode={mode}")
    messages = [each for each in caplog.messages if "embrag.retrieval.k is" in each]
    assert len(messages) == said
    if said:
        assert messages[0].startswith(f"embrag.retrieval.k is 500, and the panel has {trainer.collate.k} haplotypes")
    trainer.reference.close()


def test_as_many_neighbours_as_there_are_are_not_named(
    trainer_of: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of("embrag.retrieval.k=106")
    assert trainer.collate.k == 106
    assert not [each for each in caplog.messages if "embrag.retrieval.k is" in each]
    trainer.reference.close()


def test_a_class_that_the_engine_cannot_step_is_refused() -> None:
    params: dict[str, Any] = {"lr": 0.1}
    overrides = ["optimizer=null", "optimizer.type=LBFGS", *(f"optimizer.params.{k}={v}" for k, v in params.items())]
    assert error_of(*overrides).startswith("optimizer.type LBFGS computes the loss several times a step")
