"""Run configuration: one JSON file with DeepSpeed's keys at the top level and this package's keys under ``"embrag"``.

The section ``"embrag"`` is parsed into strict frozen dataclasses (:mod:`embrag_ds.settings`). An unknown key, a wrong
type or a value out of range raises :class:`~embrag_ds.errors.UserError`. Its message names the key and, for a typo, the
nearest valid key. :mod:`embrag_ds.config_files` finds the file and merges what it extends.

Of DeepSpeed's keys, only those that this package reads are checked here, because imputation runs without DeepSpeed.
Training checks the others (:mod:`embrag_ds.engine.deepspeed_settings`). Batch size, precision, clipping, learning
rate and ZeRO have DeepSpeed's keys only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from embrag_ds.config_files import read_tree
from embrag_ds.data.masking import MaskingConfig
from embrag_ds.data.sampler import AugmentationConfig
from embrag_ds.data.windows import DataConfig
from embrag_ds.errors import UserError, require
from embrag_ds.model.settings import LossConfig, ModelConfig
from embrag_ds.retrieval.settings import RetrievalConfig
from embrag_ds.seeds import SEED_LIMIT
from embrag_ds.settings import as_json, parse_settings, strict_settings

_LARGEST = 1 << 53
_MINUTES = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) ?min")


@strict_settings
class TrainConfig:
    """Settings of the training loop. A step is one optimiser step: ``gradient_accumulation_steps`` micro-batches."""

    max_steps: int = 100_000
    """[steps] After which training ends. DeepSpeed's learning-rate schedule does not depend on it."""
    log_every: int = 10
    """[steps] Between two log lines."""
    eval_every: int = 500
    """[steps] Between two validations. The weights of the best validation become the exported model."""
    checkpoint_every: int | str = 500
    """[steps] Between two checkpoints, or minutes by the clock, such as ``"30min"``. The last step always writes one.
    """
    keep_checkpoints: int = 2
    """[checkpoints] Kept; older ones are deleted."""
    most_skipped_steps: int = 20
    """[steps] In a row that may be skipped because no gradient was finite. Also the micro-batches in all that may be
    left out because they spoilt the weights. With one more, training ends. In fp16, which looks for its loss scale by
    skipping, any number of steps may be skipped.
    """
    patience: int | None = None
    """[validations] In a row without a better score, after which training stops; null: never."""
    patience_s: float = 600.0
    """[seconds] Without progress of a rank, after which the other ranks name it, and end; at most 1e6. Collective
    operations may take 5 minutes longer.
    """
    workers: int | None = None
    """[processes] Of each rank that draw micro-batches ahead, with the same results for any number; 0: the rank itself.
    null: 0 on a CPU; on a GPU machine a quarter of the rank's share of the cores, at most 4.
    """
    frozen: tuple[str, ...] = ()
    """Parts of the network that are not trained: ``embedding``, ``pooling``, ``fusion``, ``transformer``,
    ``confidence``, ``head``, and the one number ``background``.
    """
    compile: bool | Literal["max"] = False
    """Compile everything behind the copying model, up to the losses, with ``torch.compile``; not under ZeRO-3. This
    takes a minute or more at the start, and a C++ compiler on a CPU. ``max``: try several kernels for every product,
    which takes longer.
    """
    recompute_projections: bool = False
    """Recompute a transformer block's projections, but not its attention, in the backward pass. This keeps about three
    tenths of the block's activations.
    """
    deterministic: bool = False
    """Use only operations with one result for the same input, so that a resumed run equals an uninterrupted one on a
    GPU, too. What this costs in time has not been measured. On a CPU runs are equal without it.
    """

    def __post_init__(self) -> None:
        for key in ("max_steps", "log_every", "eval_every", "keep_checkpoints", "most_skipped_steps"):
            require(getattr(self, key) >= 1, f"train.{key}", "must be at least 1")
        steps, minutes = isinstance(self.checkpoint_every, int), self.minutes_between_checkpoints
        require(
            minutes is not None if not steps else int(self.checkpoint_every) >= 1,
            "train.checkpoint_every",
            'must be at least 1 step, or minutes such as "30min"',
        )
        require(self.workers is None or self.workers >= 0, "train.workers", "must not be negative, or null")
        require(self.workers is None or self.workers <= 1_024, "train.workers", "must not exceed 1024")
        require(0 < self.patience_s <= 1e6, "train.patience_s", "must be positive, and at most 1e6 seconds")
        require(self.patience is None or self.patience >= 1, "train.patience", "must be at least 1, or null")

    @property
    def minutes_between_checkpoints(self) -> float | None:
        """Minutes from one checkpoint to the next; None where steps are counted."""
        if isinstance(self.checkpoint_every, int):
            return None
        found = _MINUTES.fullmatch(self.checkpoint_every)
        return float(found[1]) if found and float(found[1]) > 0 else None

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after ``step`` steps, by their number."""
        return isinstance(self.checkpoint_every, int) and step % self.checkpoint_every == 0


@strict_settings
class ValidationConfig:
    """Settings of validation, which uses the frozen masks :data:`embrag_ds.data.masking.VALIDATION_MASKS`."""

    windows: int = 8
    """[windows] At most, spread evenly over the panel."""
    samples: int = 48
    """[samples] At most, of those held out."""

    def __post_init__(self) -> None:
        require(self.windows >= 1 and self.samples >= 1, "validation", "windows and samples must be at least 1")


@strict_settings
class EmbragConfig:
    """The section ``"embrag"``: all settings of this package."""

    seed: int = 1
    """Seed, in [0, 2^64), of held-out samples, order of batches, masks, augmentation, initial weights and dropout."""
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < SEED_LIMIT, "seed", "must lie in [0, 2^64)")

    @property
    def copies(self) -> bool:
        """Whether a model with these settings copies haplotypes, and can do so along stretches of a chromosome."""
        return self.model.fusion == "copying" and self.retrieval.mode == "embedding"


PATHS = ("data.windows_file", "data.cache_dir", "masking.array_manifest", "retrieval.relatives")
"""Keys of the section ``"embrag"`` that name a file or a folder of the machine on which a model is trained."""
_FOLDER = "data.cache_dir"


def named_files(config: EmbragConfig) -> dict[str, Path]:
    """Files that the settings name, by their dotted keys; those that are not set are left out."""
    found = {}
    for place in PATHS:
        section, key = place.split(".")
        value = getattr(getattr(config, section), key)
        if value is not None and place != _FOLDER:
            found[f"embrag.{place}"] = Path(value)
    return found


def without_paths(config: EmbragConfig) -> tuple[EmbragConfig, list[str]]:
    """The settings with null for every key of :data:`PATHS`, and the keys that had another value."""
    dropped = []
    for section, key in (path.split(".") for path in PATHS):
        settings = getattr(config, section)
        if getattr(settings, key) is not None:
            config = replace(config, **{section: replace(settings, **{key: None})})
            dropped.append(f"embrag.{section}.{key}")
    return config, dropped


@dataclass(frozen=True)
class RunConfig:
    """Run configuration: the settings of this package (``embrag``) and DeepSpeed's settings as a JSON tree."""

    embrag: EmbragConfig
    deepspeed: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The configuration as one JSON tree in the layout of its file, with the defaults of ``"embrag"`` filled in."""
        return {**self.deepspeed, "embrag": asdict(self.embrag)}


def load_config(name: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration, given by path or shipped name, and apply ``dotted.key=value`` overrides.

    Raises :class:`UserError` as :func:`embrag_ds.config_files.read_tree` and :func:`parse_config` do.
    """
    return parse_config(*read_tree(name, overrides))


def parse_config(tree: dict[str, Any], source: str) -> RunConfig:
    """Check a configuration tree and split it into its two halves; ``source`` names the tree in errors.

    Raises :class:`UserError` for a missing ``optimizer`` or ``train_micro_batch_size_per_gpu``, for a batch size that
    is no positive whole number, and for any fault of ``"embrag"``.
    """
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
    """Parse the section ``"embrag"`` alone, as an exported model holds it; ``source`` names it in errors.

    Raises :class:`UserError` for an unknown key, a wrong type, and a value out of range.
    """
    config = parse_settings(EmbragConfig, tree, "embrag", source)
    for section, settings in asdict(config).items():
        _require_countable(settings if isinstance(settings, dict) else {}, f"embrag.{section}", source)
    return config


def _require_countable(tree: dict[str, Any], place: str, source: str) -> None:
    """Raise :class:`UserError` for a whole number above 2^53, beyond which sums of such numbers overflow."""
    for key, value in tree.items():
        if isinstance(value, dict):
            _require_countable(value, f"{place}.{key}", source)
        elif any(
            isinstance(each, int) and each > _LARGEST for each in (value if isinstance(value, tuple) else (value,))
        ):
            raise UserError(f"{source}: {place}.{key} must not exceed 2^53, and is {as_json(value)}")
