"""Checks of DeepSpeed's half of a configuration, before anything expensive is done.

DeepSpeed refuses unknown keys in sections with a pydantic model, but only once the engine is built. In the others it
ignores them, so that ``gradient_cliping`` would train without clipping. Here every key is compared with the keys that
DeepSpeed knows. They come from the fields of its models and the parameters of its optimizers and schedulers, or else
from a list. Then DeepSpeed parses the whole, which finds wrong values and settings that it no longer has.
"""

from __future__ import annotations

import copy
import inspect
import logging
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DeepSpeedConfigError, HybridEngineConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError

from embrag_ds.config import RunConfig, parse_config
from embrag_ds.config_files import read_tree
from embrag_ds.engine.schedule_checks import check_schedule
from embrag_ds.engine.unused_settings import refuse_unused
from embrag_ds.engine.value_checks import check_values
from embrag_ds.errors import UserError
from embrag_ds.settings import as_json, nearest

MODELS: dict[str, type[BaseModel]] = {
    "": DeepSpeedMonitorConfig,
    "bfloat16": DeepSpeedBF16Config,
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "fp16": DeepSpeedFP16Config,
    "hybrid_engine": HybridEngineConfig,
    "tensor_parallel": TPTrainingConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "weight_quantization": WeightQuantConfig,
    "zero_optimization": DeepSpeedZeroConfig,
}
"""Section -> the pydantic model that DeepSpeed reads it with; the monitors are four sections of the top level."""


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


# DeepSpeed 0.19 has neither models nor a list of these; the tests record which keys it reads, and compare.
LISTED: dict[str, frozenset[str]] = {
    "": _keys(
        """
        activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger
        communication_data_type compile compression_training csv_monitor curriculum_learning
        data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
        disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
        gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
        managed_gradient_accumulation memory_breakdown nebula optimizer pipeline prescale_gradients
        progressive_layer_drop scheduler seq_parallel_communication_data_type sparse_attention
        sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast
        train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
        wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
        zero_force_ds_cpu_optimizer zero_optimization
        """
    ),
    "activation_checkpointing": _keys(
        """
        contiguous_memory_optimization cpu_checkpointing number_checkpoints partition_activations profile
        synchronize_checkpoint_boundary
        """
    ),
    "flops_profiler": _keys(
        """
        detailed enabled module_depth output_file profile_step recompute_fwd_factor top_modules
        """
    ),
    "checkpoint": _keys(
        """
        checkpoint_serialization load_universal parallel_write tag_validation use_node_local_storage
        writer
        """
    ),
    "data_types": _keys("buffer_dtype grad_accum_dtype keep_in_fp32_modules param_dtype"),
    "aio": _keys(
        """
        block_size intra_op_parallelism overlap_events queue_depth single_submit thread_count use_gds
        """
    ),
    "timers": _keys("throughput"),
    "torch_autocast": _keys("dtype enabled lower_precision_safe_modules"),
    "optimizer": _keys("legacy_fusion params type"),
    "scheduler": _keys("params type"),
}
"""Section -> keys that DeepSpeed reads without a model."""
# DeepSpeed removes these from optimizer.params itself.
_ADAM = _keys("adam_w_mode foreach fp32_optimizer_states torch_adam")
# Listed, because importing Muon compiles its kernels; it ignores keys that it does not know.
_MUON = _ADAM | _keys("adam_lr betas eps lr momentum muon_lr ns_method weight_decay")
# The class depends on the machine and on where the optimizer's state is kept.
_OPTIMIZERS: dict[str, tuple[type, ...]] = {
    "adam": (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam),
    "adamw": (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam),
    "adagrad": (torch.optim.Adagrad, DeepSpeedCPUAdagrad),
    "lamb": (FusedLamb,),
    "lion": (FusedLion, DeepSpeedCPULion),
}
_GIVEN_BY_DEEPSPEED = _keys("self params model_params optimizer adamw_mode set_grad_none max_grad_norm")


def load_training_config(name: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration for training: :func:`embrag_ds.config.load_config`, with DeepSpeed's half checked as well.

    Raises :class:`UserError` for a fault in either half, and between them. Warns of settings that do not suit one
    another, but with which a run may go on.
    """
    tree, source = read_tree(name, overrides)
    config = parse_config(tree, source)
    check_deepspeed_settings(config.deepspeed, source)
    refuse_unused(config.deepspeed, source)
    check_values(config.deepspeed, source)
    check_schedule(config, _scheduler_class(config.deepspeed, source) if "scheduler" in tree else None, source)
    return config


def check_deepspeed_settings(tree: dict[str, Any], source: str) -> None:
    """Raise :class:`UserError` if DeepSpeed would not accept all of ``tree``, its half; ``source`` names the file."""
    for section, known in known_keys().items():
        _check_keys(section, known, tree, source)
    _check_keys("optimizer.params", _optimizer_parameters(tree, source), tree, source)
    if "scheduler" in tree:
        _check_keys("scheduler.params", _parameters(_scheduler_class(tree, source)), tree, source)
    _parse_with_deepspeed(tree, source)


def known_keys() -> dict[str, frozenset[str]]:
    """Section -> its keys, from DeepSpeed's models and from :data:`LISTED`."""
    of_models = {name: keys for section, model in MODELS.items() for name, keys in _fields(section, model)}
    return of_models | LISTED


def _fields(section: str, model: type[BaseModel]) -> Iterator[tuple[str, frozenset[str]]]:
    """Keys of a model, and of the models nested in it, by section."""
    names = frozenset(model.model_fields)
    yield section, names | {field.alias for field in model.model_fields.values() if field.alias is not None}
    for name, field in model.model_fields.items():
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                for key in {name, field.alias or name}:
                    yield from _fields(f"{section}.{key}" if section else key, inner)


def _check_keys(section: str, known: frozenset[str] | None, tree: dict[str, Any], source: str) -> None:
    """Raise :class:`UserError` if a section has other keys than those ``known``; None allows all."""
    node: Any = tree
    for name in filter(None, section.split(".")):
        node = node.get(name, {}) if isinstance(node, dict) else {}
    if node is None and "." in section:
        return  # null stands for a section that is absent
    if not isinstance(node, dict):
        raise UserError(f"{source}: {section} must be a section, not {as_json(node)}")
    for key in node:
        if known is not None and key not in known:
            where = f"{section}.{key}" if section else key
            offered = known if section else known | {"embrag"}
            raise UserError(f"{source}: unknown DeepSpeed key {where}; {nearest(key, offered)}")


def _optimizer_parameters(tree: dict[str, Any], source: str) -> frozenset[str] | None:
    """Keys of ``optimizer.params`` for the optimizer's type; None if they cannot be found out."""
    kind = tree["optimizer"].get("type")
    name = kind.lower() if isinstance(kind, str) else None
    if name == "muon":
        return _MUON
    if name in _OPTIMIZERS:
        return _parameters(*_OPTIMIZERS[name]) | (_ADAM if "adam" in name else frozenset())
    if name in DEEPSPEED_OPTIMIZERS:
        return None  # classes of the package mup, which may not be installed
    return _parameters(_class_called(kind, torch.optim, torch.optim.Optimizer, "optimizer", tuple(_OPTIMIZERS), source))


def _scheduler_class(tree: dict[str, Any], source: str) -> type:
    """Class of the learning-rate schedule, DeepSpeed's or torch's."""
    kind = tree["scheduler"].get("type")
    if kind in lr_schedules.VALID_LR_SCHEDULES:
        own_class: type = getattr(lr_schedules, kind)
        return own_class
    torchs = torch.optim.lr_scheduler
    own = tuple(lr_schedules.VALID_LR_SCHEDULES)
    return _class_called(kind, torchs, torchs.LRScheduler, "scheduler", own, source)


def _class_called(name: Any, module: Any, base: type, section: str, own: tuple[str, ...], source: str) -> type:
    """The class ``name`` of torch's ``module``; ``own`` are the names of DeepSpeed's classes, for the error."""
    members = inspect.getmembers(module, lambda each: isinstance(each, type) and issubclass(each, base))
    classes = {key: each for key, each in members if each is not base and not key.startswith("_")}
    if not isinstance(name, str):
        raise UserError(f"{source}: {section}.type must name one, for example {own[0]}")
    if name not in classes:
        raise UserError(f"{source}: unknown {section}.type {as_json(name)}; {nearest(name, {*classes, *own}, 'types')}")
    return classes[name]


def _parameters(*kinds: type) -> frozenset[str]:
    names = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}  # type: ignore[misc]
    return frozenset(names) - _GIVEN_BY_DEEPSPEED


def _parse_with_deepspeed(tree: dict[str, Any], source: str) -> None:
    """Let DeepSpeed parse its settings, without an engine and without the other ranks."""
    deepspeed_logger.setLevel(logging.WARNING)  # it logs how it reads them
    # Whether the global batch is right depends on the number of ranks, which only the engine knows.
    alone = {key: value for key, value in copy.deepcopy(tree).items() if key != "train_batch_size"}
    try:
        DeepSpeedConfig(alone)
    except ValidationError as fault:
        sections = {model.__name__: section for section, model in MODELS.items()}
        error = fault.errors(include_url=False)[0]
        place = ".".join(filter(None, (sections.get(fault.title, fault.title), *map(str, error["loc"]))))
        raise UserError(
            f"{source}: DeepSpeed refuses {place}: {error['msg']}, not {as_json(error['input'])}"
        ) from fault
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError, AttributeError) as fault:
        raise UserError(f"{source}: DeepSpeed refuses its settings: {' '.join(str(fault).split())}") from fault
