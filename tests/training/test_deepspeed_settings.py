"""Checks of DeepSpeed's half of a configuration: its keys, its values, and the errors."""

from __future__ import annotations

import copy
import json
import logging
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import config as deepspeed_config
from deepspeed.utils import logger as deepspeed_logger
from pydantic import ValidationError

from embrag_ds.config import load_config
from embrag_ds.config_files import shipped_configurations
from embrag_ds.engine.deepspeed_settings import (
    LISTED,
    MODELS,
    check_deepspeed_settings,
    known_keys,
    load_training_config,
)
from embrag_ds.engine.distributed import adapt_to_machine, initialize_engine
from embrag_ds.errors import UserError
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.settings import ModelConfig

MINIMAL: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"}}


def with_key(dotted: str, value: Any, tree: dict[str, Any] | None = None) -> dict[str, Any]:
    """The minimal tree, or another, with one key set."""
    tree = copy.deepcopy(MINIMAL if tree is None else tree)
    *parents, last = dotted.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    return tree


def complaint(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        check_deepspeed_settings(tree, "run.json")
    error = str(caught.value)
    assert error.startswith("run.json: ") and "\n" not in error and "pydantic" not in error
    return error.removeprefix("run.json: ")


@pytest.mark.parametrize("name", shipped_configurations())
def test_every_shipped_configuration_suits_deepspeed(name: str) -> None:
    config = load_training_config(name)
    assert config == load_config(name)
    # No process group: only the settings are read.
    theirs = deepspeed_config.DeepSpeedConfig(copy.deepcopy(config.deepspeed))
    assert theirs.train_micro_batch_size_per_gpu == config.deepspeed["train_micro_batch_size_per_gpu"]
    assert theirs.optimizer_name == config.deepspeed["optimizer"]["type"].lower()


@pytest.mark.parametrize("section", sorted(known_keys()), ids=lambda name: name or "top level")
def test_unknown_keys_are_refused_with_the_nearest_name(section: str) -> None:
    base = with_key("scheduler", {"type": "WarmupLR"})
    for name in known_keys()[section]:
        where = f"{section}.{name}_" if section else f"{name}_"
        error = complaint(with_key(where, 1, base))
        assert error == f"unknown DeepSpeed key {where}; did you mean {name!r}?"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("Gradient_Clipping", "gradient_clipping"),
        ("embrg", "embrag"),
        ("Embrag", "embrag"),
        ("zero_optimization.stge", "stage"),
        ("zero_optimization.offload_param.pinned_memory", "pin_memory"),
        ("bf16.enable", "enabled"),
        ("tensorboard.output_dir", "output_path"),
        ("timers.throughput.synchronize", "synchronized"),
        ("optimizer.params.weight_decy", "weight_decay"),
    ],
)
def test_a_typo_is_not_passed_over(tmp_path: Path, typo: str, meant: str) -> None:
    assert complaint(with_key(typo, {})).endswith(f"{typo}; did you mean {meant!r}?")
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"extends": "v18"}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_training_config(path, [f"{typo}=1"])
    assert f"run.json (extends {shipped_configurations()['v18']}): unknown DeepSpeed key {typo}; " in str(caught.value)


class Recorder(dict):
    """Settings section that records which keys are read."""

    def __init__(self, tree: dict[str, Any], name: str, read: dict[str, set[str]]):
        inner = {
            key: Recorder(value, f"{name}.{key}" if name else key, read) if isinstance(value, dict) else value
            for key, value in tree.items()
        }
        super().__init__(inner)
        self._read = read.setdefault(name, set())

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._read.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return self


@pytest.fixture(scope="module")
def read_by_deepspeed() -> dict[str, set[str]]:
    """Section -> keys that DeepSpeed reads in a file with all sections of :data:`LISTED`."""
    tree: dict[str, Any] = {section: {} for section in LISTED if section}
    tree |= {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
    tree |= {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}
    tree |= {"optimizer": {"type": "AdamW", "params": {}}, "scheduler": {"type": "WarmupLR", "params": {}}}
    read: dict[str, set[str]] = {}
    deepspeed_config.DeepSpeedConfig(Recorder(tree, "", read))
    return read


@pytest.mark.parametrize("section", LISTED)
def test_the_listed_keys_are_those_deepspeed_reads(read_by_deepspeed: dict[str, set[str]], section: str) -> None:
    removed = set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    tpu_only = {"vocabulary_size"}  # read only to warn that it is not a multiple of 8
    not_ours = {"sequence_parallel_size"}  # read inside a process group only; our windows are not split over ranks
    refused = removed | tpu_only | not_ours if section == "" else set()
    assert LISTED[section] >= read_by_deepspeed[section] - refused
    # Defined, but read where the thing is used.
    elsewhere = {"aio": {"thread_count"}}
    assert read_by_deepspeed[section] >= LISTED[section] - elsewhere.get(section, set())


@pytest.mark.parametrize(
    "section", [name for name in MODELS if name] + ["tensorboard", "wandb", "comet", "csv_monitor"]
)
def test_the_models_are_those_deepspeed_reads_a_section_with(section: str) -> None:
    with pytest.raises(ValidationError, match="qqq") as caught:
        deepspeed_config.DeepSpeedConfig(with_key(f"{section}.qqq", 1))
    assert caught.value.title == MODELS.get(section, MODELS[""]).__name__


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("AdamW", ["lr", "betas", "eps", "weight_decay", "torch_adam", "fused", "foreach", "amsgrad", "maximize"]),
        ("adam", ["adam_w_mode", "bias_correction", "fp32_optimizer_states"]),
        ("Adagrad", ["lr", "lr_decay", "eps"]),
        ("Lamb", ["lr", "max_coeff", "min_coeff", "bias_correction"]),
        ("Lion", ["lr", "betas", "weight_decay"]),
        ("Muon", ["muon_lr", "adam_lr", "momentum", "ns_method", "betas"]),
        ("MuAdam", ["anything"]),
        ("SGD", ["lr", "momentum", "nesterov", "dampening"]),
        ("NAdam", ["momentum_decay", "decoupled_weight_decay"]),
    ],
)
def test_optimizer_parameters_are_those_of_the_optimizer(kind: str, parameters: list[str]) -> None:
    for name in parameters:
        check_deepspeed_settings(with_key(f"optimizer.params.{name}", 1, with_key("optimizer.type", kind)), "run.json")
        if kind != "MuAdam":  # a package of its own
            typo = with_key(f"optimizer.params.{name}x", 1, with_key("optimizer.type", kind))
            assert complaint(typo) == f"unknown DeepSpeed key optimizer.params.{name}x; did you mean {name!r}?"


@pytest.mark.parametrize(
    "kind", [name for name, each in vars(torch.optim).items() if isinstance(each, type) and name != "Optimizer"]
)
def test_parameters_of_another_optimizer_are_refused(kind: str) -> None:
    settings = with_key("optimizer.params.cycle_min_lr", 1, with_key("optimizer.type", kind))
    assert "unknown DeepSpeed key optimizer.params.cycle_min_lr; " in complaint(settings)


def test_a_parameter_that_passes_can_be_given_to_the_optimizer(distributed: Any) -> None:
    """Every parameter that AdamW takes in this machine's engine is set to its default."""
    defaults = torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).defaults
    taken = {name: value for name, value in defaults.items() if value is not None and name != "decoupled_weight_decay"}
    settings, _ = adapt_to_machine(with_key("optimizer.params", taken))
    check_deepspeed_settings(settings, "run.json")
    engine = initialize_engine(Imputer(ModelConfig(dims=8, layers=1, heads=1)), settings)
    assert engine.optimizer.param_groups[0]["lr"] == defaults["lr"]
    settings["optimizer"]["params"]["learning_rate"] = 1
    assert "learning_rate" in complaint(settings)
    with pytest.raises(UserError, match="learning_rate"):
        initialize_engine(Imputer(ModelConfig(dims=8, layers=1, heads=1)), settings)


@pytest.mark.parametrize(
    ("kind", "parameter", "typo"),
    [
        ("WarmupCosineLR", "total_num_steps", "total_num_step"),
        ("WarmupLR", "warmup_max_lr", "warmup_maximum_lr"),
        ("OneCycle", "cycle_min_lr", "cycle_min"),
        ("StepLR", "step_size", "stepsize"),
    ],
)
def test_scheduler_parameters_are_those_of_the_scheduler(kind: str, parameter: str, typo: str) -> None:
    base = with_key("scheduler.type", kind)
    check_deepspeed_settings(with_key(f"scheduler.params.{parameter}", 1, base), "run.json")
    error = complaint(with_key(f"scheduler.params.{typo}", 1, base))
    assert error == f"unknown DeepSpeed key scheduler.params.{typo}; did you mean {parameter!r}?"


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("optimizer.type", "AdmW", "unknown optimizer.type \"AdmW\"; did you mean 'AdamW'?"),
        ("optimizer.type", None, "optimizer.type must name one, for example adam"),
        ("scheduler.type", "WarmupCosinLR", "unknown scheduler.type \"WarmupCosinLR\"; did you mean 'WarmupCosineLR'?"),
        ("scheduler.params", {}, "scheduler.type must name one, for example LRRangeTest"),
        ("scheduler", None, "scheduler must be a section, not null"),
        ("optimizer.params", [1], "optimizer.params must be a section, not [1]"),
        ("zero_optimization", 3, "zero_optimization must be a section, not 3"),
        ("timers.throughput", True, "timers.throughput must be a section, not true"),
        ("zero_optimization.stage", 7, "DeepSpeed refuses zero_optimization.stage: Input should be "),
        ("zero_optimization.offload_param.device", "gpu", "DeepSpeed refuses zero_optimization.offload_param.device: "),
        ("tensorboard.enabled", "maybe", "DeepSpeed refuses tensorboard.enabled: "),
        ("fp16", {"loss_scale": -1}, "DeepSpeed refuses fp16.loss_scale: "),
        ("amp.enabled", True, "DeepSpeed refuses its settings: NVIDIA Apex AMP integration has been removed. "),
        ("gradient_allreduce_op", "most", "DeepSpeed refuses its settings: Invalid gradient_allreduce_op. "),
        ("checkpoint.tag_validation", "no", "DeepSpeed refuses its settings: Checkpoint config contains invalid "),
    ],
)
def test_wrong_values_are_refused_before_there_is_an_engine(key: str, value: Any, error: str) -> None:
    assert complaint(with_key(key, value)).startswith(error)


def test_what_is_right_passes_unchanged_and_without_a_log_line(capfd: pytest.CaptureFixture[str]) -> None:
    tree = with_key("zero_optimization", {"stage": 3, "offload_param": None, "leaf_module": {"names": ["x"]}})
    # Right for 32 ranks, which only the engine can know.
    tree |= {"train_batch_size": 64, "gradient_accumulation_steps": 1}
    tree |= {"bf16": {"enabled": "auto"}, "comms_logger": {"enabled": False}}
    before, handler = copy.deepcopy(tree), BufferingHandler(1000)
    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.INFO)
    deepspeed_logger.addHandler(handler)
    try:
        check_deepspeed_settings(tree, "run.json")
    finally:
        deepspeed_logger.removeHandler(handler)
        deepspeed_logger.setLevel(level)
    assert tree == before and capfd.readouterr() == ("", "") and not handler.buffer
