"""The run's configuration: one JSON file, DeepSpeed's keys at top level, ours under ``"embrag"``.

Our section is parsed into strict frozen dataclasses (:mod:`embrag_ds.settings`). An unknown key, a wrong type or a
value out of range is a :class:`~embrag_ds.errors.UserError` that names the key and, for a typo, the nearest valid one.
How a file is found and what it may extend: :mod:`embrag_ds.config_files`. Of DeepSpeed's half only what this package
reads itself is checked here, because imputing runs without DeepSpeed. Where training starts, DeepSpeed is asked about
the rest (:mod:`embrag_ds.training.deepspeed_settings`). Batch size, precision, clipping, learning rate and ZeRO live
only on DeepSpeed's side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from embrag_ds.config_files import read_tree
from embrag_ds.data.masking import MaskingConfig
from embrag_ds.data.sampler import AugmentationConfig
from embrag_ds.data.windows import DataConfig
from embrag_ds.errors import UserError, require
from embrag_ds.model.imputer import ModelConfig
from embrag_ds.model.losses import LossConfig
from embrag_ds.retrieval.settings import RetrievalConfig
from embrag_ds.settings import as_json, parse_settings, strict_settings


@strict_settings
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


@strict_settings
class ValidationConfig:
    """Frozen validation masks (see :data:`embrag_ds.data.masking.VALIDATION_MASKS`)."""

    windows: int = 8
    """Validate on at most this many windows, spread evenly."""
    samples: int = 48
    """... and this many of the held-out samples."""

    def __post_init__(self) -> None:
        require(self.windows >= 1 and self.samples >= 1, "validation", "windows and samples must be at least 1")


@strict_settings
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
        return {**self.deepspeed, "embrag": asdict(self.embrag)}


def load_config(name: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run's file, or a shipped configuration, and apply ``dotted.key=value`` overrides."""
    return parse_config(*read_tree(name, overrides))


def parse_config(tree: dict[str, Any], source: str) -> RunConfig:
    """Split and check a configuration tree; ``source`` names it in errors."""
    theirs = {key: value for key, value in tree.items() if key != "embrag"}
    for key in ("train_micro_batch_size_per_gpu", "optimizer"):
        if key not in theirs:
            raise UserError(f"{source}: {key} is missing; see ds_configs/v18.json")
    if not isinstance(theirs["optimizer"], dict):
        raise UserError(f"{source}: optimizer must be a section, not {as_json(theirs['optimizer'])}")
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        count = theirs.get(key, 1)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"{source}: {key} must be a whole number of at least 1, not {as_json(count)}")
    return RunConfig(parse_embrag(tree.get("embrag", {}), source), theirs)


def parse_embrag(tree: dict[str, Any], source: str) -> EmbragConfig:
    """Parse our section alone (as an exported model carries it)."""
    return parse_settings(EmbragConfig, tree, "embrag", source)
