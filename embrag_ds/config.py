"""The run's configuration: one JSON file, DeepSpeed's keys at top level, ours under ``"embrag"``.

Our section is parsed into strict frozen dataclasses: an unknown key, a wrong type or a value out of
range is a :class:`~embrag_ds.errors.UserError` that names the key and, for a typo, the nearest valid
one. DeepSpeed rejects unknown keys in some of its sections and passes over them silently elsewhere;
the silent places are checked here. Batch size, precision, clipping, learning rate and ZeRO live only
on DeepSpeed's side.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import hjson

from embrag_ds.data.augmentation import AugmentationConfig
from embrag_ds.data.dataset import DataConfig
from embrag_ds.data.masking import MaskingConfig
from embrag_ds.errors import UserError, require
from embrag_ds.model.imputer import ModelConfig
from embrag_ds.model.losses import LossConfig
from embrag_ds.retrieval.settings import RetrievalConfig


@dataclass(frozen=True)
class TrainConfig:
    """The loop. A step is one optimiser step (``gradient_accumulation_steps`` micro-batches)."""

    max_steps: int = 100_000
    log_every: int = 10
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    patience: int | None = None
    """Stop after this many validations without a better score; null: never."""
    frozen: tuple[str, ...] = ()
    """Parts of the network whose weights stay as they are: ``pooling``, ``confidence``, ``embedding``, ..."""
    compile: bool = False
    """Compile the transformer's blocks with ``torch.compile``: a minute at the start, and a C++ compiler on a CPU."""
    recompute_projections: bool = False
    """Keep three tenths of a block's activations for the backward pass and do its projections, but not its attention,
    again."""

    def __post_init__(self) -> None:
        for key in ("max_steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints"):
            require(getattr(self, key) >= 1, f"train.{key}", "must be at least 1")
        require(self.patience is None or self.patience >= 1, "train.patience", "must be at least 1, or null")


@dataclass(frozen=True)
class ValidationConfig:
    """Frozen validation masks (see :data:`embrag_ds.data.masking.VALIDATION_MASKS`)."""

    windows: int = 8
    """Validate on at most this many windows, spread evenly."""
    people: int = 48
    """... and this many of the held-out people."""

    def __post_init__(self) -> None:
        require(self.windows >= 1 and self.people >= 1, "validation", "windows and people must be at least 1")


@dataclass(frozen=True)
class EmbragConfig:
    """The ``"embrag"`` section."""

    seed: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**64, "seed", "must lie in [0, 2^64)")  # torch takes no more


@dataclass(frozen=True)
class RunConfig:
    """Both halves of a run's file."""

    embrag: EmbragConfig
    deepspeed: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The resolved configuration, in the shape of the file it came from."""
        return {**self.deepspeed, "embrag": dataclasses.asdict(self.embrag)}


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


# DeepSpeed 0.19 passes over unknown keys in these places without a word.
DEEPSPEED_KEYS: dict[str, frozenset[str]] = {
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
    "optimizer": _keys("legacy_fusion params type"),
    "optimizer.params": _keys(
        """
        adam_lr adam_w_mode amsgrad betas bias_correction coeff_beta comm_backend_name cuda_aware
        dampening eps factor_max factor_min factor_threshold foreach fused fp32_optimizer_states freeze_step
        local_step_clipper local_step_scaler lr max_coeff min_coeff momentum muon_lr nesterov ns_method
        torch_adam var_freeze_step var_update_scaler weight_decay
        """
    ),
    "scheduler": _keys("params type"),
}


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run's file and apply ``dotted.key=value`` overrides (values are JSON, or plain text)."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as fault:
        raise UserError(f"{path}: cannot read the configuration: {fault.strerror}") from fault
    try:
        tree = hjson.loads(text, object_pairs_hook=_no_duplicates, use_decimal=False)
    except (hjson.HjsonDecodeError, ValueError) as fault:
        raise UserError(f"{path}: not valid JSON: {fault}") from fault
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a configuration: expected a JSON object, as in ds_configs/v18.json")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(_plain(tree), str(path))


def parse_config(tree: dict[str, Any], source: str) -> RunConfig:
    """Split and check a configuration tree; ``source`` names it in errors."""
    ours = tree.get("embrag", {})
    theirs = {key: value for key, value in tree.items() if key != "embrag"}
    _check_deepspeed_keys(theirs, source)
    return RunConfig(_build(EmbragConfig, ours, "embrag", source), theirs)


def parse_embrag(tree: dict[str, Any], source: str) -> EmbragConfig:
    """Parse our section alone (as an exported model carries it)."""
    return _build(EmbragConfig, tree, "embrag", source)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"key {key!r} appears twice")
        tree[key] = value
    return tree


def _plain(value: Any) -> Any:
    """hjson's ordered containers as plain ones."""
    return json.loads(json.dumps(value))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write it as dotted.key=value, for example embrag.model.dims=128")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    node = tree
    *parents, last = key.split(".")
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {name!r} is not a section")
    if last in ("every_steps", "every_epochs") and parents[-1:] == ["refresh"]:
        node.clear()  # the two exclude each other: setting one replaces the other
    node[last] = value


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key.lower(), sorted(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"


def _check_deepspeed_keys(tree: dict[str, Any], source: str) -> None:
    for section, known in DEEPSPEED_KEYS.items():
        node: Any = tree
        for name in filter(None, section.split(".")):
            node = node.get(name, {}) if isinstance(node, dict) else {}
        if not isinstance(node, dict):
            raise UserError(f"{source}: {section} must be a section")
        for key in node:
            if key not in known:
                where = f"{section}.{key}" if section else key
                offered = known if section else known | {"embrag"}
                raise UserError(f"{source}: unknown DeepSpeed key {where}; {_nearest(key, offered)}")
    for key in ("train_micro_batch_size_per_gpu", "optimizer"):
        if key not in tree:
            raise UserError(f"{source}: {key} is missing; see ds_configs/v18.json")
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        count = tree.get(key, 1)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"{source}: {key} must be a whole number of at least 1, not {count!r}")


def _build(kind: type, tree: Any, where: str, source: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"{source}: {where} must be a section")
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in hints:
            raise UserError(f"{source}: unknown key {where}.{key}; {_nearest(key, hints)}")
    values = {key: _convert(hints[key], value, f"{where}.{key}", source) for key, value in tree.items()}
    try:
        return kind(**values)
    except UserError as fault:
        raise UserError(f"{source}: {fault}") from None


def _convert(hint: Any, value: Any, where: str, source: str) -> Any:
    """``value`` as the annotated type; only what JSON can say and our dataclasses use."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where, source)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(inner, value, where, source)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{source}: {where} is {value!r}; choose one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple and arguments[-1] is Ellipsis:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{source}: {where} must be a list")
        return tuple(_convert(arguments[0], item, where, source) for item in value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise UserError(f"{source}: {where} must be a list of {len(arguments)} numbers")
        return tuple(_convert(inner, item, where, source) for inner, item in zip(arguments, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{source}: {where} must be a section")
        return {str(key): _convert(arguments[1], item, f"{where}.{key}", source) for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{source}: {where} must be of type {hint.__name__}, not {value!r}")
    return value
