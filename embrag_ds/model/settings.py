"""Settings of the network and its loss, without torch, so that a configuration is read without it."""

from __future__ import annotations

from typing import Literal

from embrag_ds.errors import require
from embrag_ds.model.poolings import fusions
from embrag_ds.settings import strict_settings


@strict_settings
class ModelConfig:
    """Settings of the network's shape. Raises UserError for values that break a rule."""

    dims: int = 256
    """[numbers] Width D of embeddings and transformer: a multiple of 2 x ``heads``, at least 8."""
    layers: int = 12
    """[blocks] Of the transformer."""
    heads: int = 4
    """[heads] Of attention in a block."""
    ffn_multiple: int = 4
    """[x dims] Width of the feed-forward's hidden layer."""
    dropout: float = 0.0
    """[probability] That an output of a block's attention or feed-forward is dropped in training."""
    fusion: str = "copying"
    """How neighbours are weighed: ``copying``, by the Li and Stephens copying model, or ``rare_variant``, by one
    distance per neighbour. Any module of ``model/poolings`` may be named.
    """
    good_turing: bool = False
    """Correct the prior's odds of the rarest alleles by the panel's own allele counts (Good and Turing)."""

    def __post_init__(self) -> None:
        require(self.dims >= 8, "model.dims", "must be at least 8")
        require(self.layers >= 1, "model.layers", "must be at least 1")
        require(self.heads >= 1, "model.heads", "must be at least 1")
        require(self.ffn_multiple >= 1, "model.ffn_multiple", "must be at least 1")
        for key, most in (("dims", 65_536), ("layers", 10_000), ("ffn_multiple", 1_024)):  # no machine holds more
            require(getattr(self, key) <= most, f"model.{key}", f"must not exceed {most}")
        require(
            self.dims % (2 * self.heads) == 0,
            "model.heads",
            f"dims ({self.dims}) must be a multiple of 2 x heads ({self.heads})",
        )
        require(0 <= self.dropout < 1, "model.dropout", "must lie in [0, 1)")
        known = fusions()
        require(self.fusion in known, "model.fusion", f"must be one of {', '.join(known)}, not {self.fusion!r}")

    @property
    def block_weights(self) -> int:
        """Number of weights in the products of all transformer blocks."""
        return self.layers * self.dims**2 * (4 + 2 * self.ffn_multiple)


@strict_settings
class LossConfig:
    """Settings of the training loss. Raises UserError for values that break a rule."""

    kind: Literal["cross_entropy", "focal", "brier"] = "cross_entropy"
    """``cross_entropy``, ``focal`` or ``brier``. The last is the squared error of the probabilities, the criterion
    closest to dosage r2. Like ``cross_entropy`` it is least for calibrated probabilities, but it weighs unpredictable
    alleles less.
    """
    focal_gamma: float = 2.0
    """[power] ``focal``: of 1 - p; 0 is cross-entropy."""
    haplotype_weight: float = 1.0
    """[weight] Of the loss on alleles."""
    genotype_weight: float = 0.5
    """[weight] Of the loss on genotypes."""
    rarity: float = 0.0
    """[power] A site's weight is its minor-allele frequency to minus this; 0: equal weights, at most 1. The frequency
    is that of the site features: at least 1 %, or 10 copies.
    """

    def __post_init__(self) -> None:
        require(self.focal_gamma >= 0, "loss.focal_gamma", "must not be negative")
        require(0 <= self.rarity <= 1, "loss.rarity", "must lie between 0 and 1")
        require(
            min(self.haplotype_weight, self.genotype_weight) >= 0 and self.haplotype_weight + self.genotype_weight > 0,
            "loss",
            "weights must not be negative and not all zero",
        )
