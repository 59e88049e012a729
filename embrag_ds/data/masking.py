"""Genotype masks: which sites of a query are masked, that is, withheld from the network and predicted by it.

The query's tokens, the retrieval distance and the loss all use the same mask. A mask is a pure function of (seed,
epoch, window, scope, policy); nothing here keeps state. One mask row serves both haplotypes of a sample, as a
genotyping array types both.

Policies:

- ``array`` masks all sites but those of an array: one common site per cell of a grid, or the sites of a manifest.
- ``random`` masks every site independently with the curriculum's rate.
- ``frequency_guided`` masks rare sites with ``rare_rate``, and the others with the curriculum's rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from embrag_ds.errors import require
from embrag_ds.seeds import Purpose, generator
from embrag_ds.settings import strict_settings

Policy = Literal["array", "random", "frequency_guided"]


@strict_settings
class MaskingConfig:
    """Settings of the masks of training queries."""

    policies: dict[str, float] = field(default_factory=lambda: {"array": 0.6, "random": 0.2, "frequency_guided": 0.2})
    """[weight] Relative weight of each policy: ``array``, ``random``, ``frequency_guided``. Every mask draws its
    policy.
    """
    scope: Literal["sample", "window"] = "sample"
    """``sample`` draws a mask for every sample; ``window`` draws one for all samples of a micro-batch."""
    random_rate: tuple[float, float] = (0.3, 0.8)
    """[share of sites] Masked by ``random`` at the start and at the end of the curriculum."""
    curriculum_steps: int = 1000
    """[steps] Over which the rate of ``random`` rises linearly from its first to its second value."""
    rare_maf: float = 0.01
    """[frequency] ``frequency_guided``: minor-allele frequency below which a site is rare."""
    rare_rate: float = 0.7
    """[probability] ``frequency_guided``: that a rare site is masked. The other sites have the rate of ``random``."""
    array_spacing_bp: tuple[float, float] = (1000.0, 8000.0)
    """[base pairs] ``array``: least and greatest mean distance of typed sites. Each mask draws one log-uniformly."""
    array_min_maf: float = 0.05
    """[frequency] ``array``: least minor-allele frequency of a typed site."""
    array_manifest: str | None = None
    """``array``: file of the typed sites (VCF, or ``contig pos`` a line), which replaces the random choice."""

    def __post_init__(self) -> None:
        known = ("array", "random", "frequency_guided")
        for name, weight in self.policies.items():
            require(name in known, "masking.policies", f"unknown policy {name!r}; known: {', '.join(known)}")
            require(weight >= 0, "masking.policies", f"weight of {name} is negative")
        require(sum(self.policies.values()) > 0, "masking.policies", "no policy has a positive weight")
        for key in ("random_rate", "array_spacing_bp"):
            low, high = getattr(self, key)
            require(0 < low <= high, f"masking.{key}", "must be two positive numbers in increasing order")
        require(self.random_rate[1] <= 1, "masking.random_rate", "must not exceed 1")
        require(0 <= self.rare_rate <= 1, "masking.rare_rate", "must lie between 0 and 1")
        require(self.curriculum_steps >= 1, "masking.curriculum_steps", "must be at least 1")


@dataclass(frozen=True)
class MaskSites:
    """Properties of a window's sites that masks depend on.

    ``pos`` int64 [L] is in base pairs, in increasing order, and ``maf`` float32 [L] is the minor-allele frequency.
    ``manifest`` bool [L] marks the sites of an array; None without one.
    """

    pos: np.ndarray
    maf: np.ndarray
    manifest: np.ndarray | None = None


def curriculum_rate(settings: MaskingConfig, step: int) -> float:
    """Rate of the policy ``random`` at an optimiser step: it rises linearly, then stays constant."""
    low, high = settings.random_rate
    return low + (high - low) * min(1.0, step / settings.curriculum_steps)


def array_typed(sites: MaskSites, spacing_bp: float, min_maf: float, rng: np.random.Generator) -> np.ndarray:
    """Typed sites of an array-like design, bool [L]: one random common site per cell of a grid.

    Cells are ``spacing_bp`` wide and the grid's origin is random. A cell without a site of at least ``min_maf`` has no
    typed site.
    """
    return _arrays_typed(sites, np.array([spacing_bp]), min_maf, [rng])[0]


def _arrays_typed(
    sites: MaskSites, spacing_bp: np.ndarray, min_maf: float, rngs: Sequence[np.random.Generator]
) -> np.ndarray:
    """Typed sites of one array-like design for each of the n generators and spacings [n], bool [n, L]."""
    origin = np.empty(len(rngs))
    order = np.empty((len(rngs), len(sites.pos)))
    for row, rng in enumerate(rngs):
        origin[row] = rng.random() * spacing_bp[row]
        rng.random(out=order[row])
    typed = np.zeros(order.shape, dtype=bool)
    candidates = np.flatnonzero(sites.maf >= min_maf)
    if not candidates.size:
        return typed
    cell = np.floor((sites.pos[candidates] + origin[:, None]) / spacing_bp[:, None])
    begins = np.ones(cell.shape, dtype=bool)
    begins[:, 1:] = cell[:, 1:] != cell[:, :-1]
    starts = np.flatnonzero(begins)
    ranks = order[:, candidates].reshape(-1)
    lowest = np.minimum.reduceat(ranks, starts)
    # Two equal ranks in one cell have a chance of 2^-53; both sites would be typed.
    chosen = ranks == np.repeat(lowest, np.diff(starts, append=len(ranks)))
    typed[:, candidates] = chosen.reshape(cell.shape)
    return typed


def masked_by(
    policy: Policy, settings: MaskingConfig, sites: MaskSites, rate: float, rngs: Sequence[np.random.Generator]
) -> np.ndarray:
    """Masks drawn by a policy, bool [n, L], True where masked: one with each of n generators.

    ``rate`` is the curriculum's.
    """
    if policy == "array" and sites.manifest is not None:
        return np.repeat(~sites.manifest[None], len(rngs), axis=0)
    if policy == "array":
        low, high = settings.array_spacing_bp
        # One at a time: numpy's exponential of an array may differ from that of a number in the last bit.
        spacing = np.array([float(np.exp(rng.uniform(np.log(low), np.log(high)))) for rng in rngs])
        return ~_arrays_typed(sites, spacing, settings.array_min_maf, rngs)
    threshold = np.full(len(sites.pos), rate)
    if policy == "frequency_guided":
        threshold[sites.maf < settings.rare_maf] = settings.rare_rate
    drawn = np.empty((len(rngs), len(threshold)))
    for row, rng in enumerate(rngs):
        rng.random(out=drawn[row])
    return drawn < threshold


def training_masks(
    settings: MaskingConfig,
    sites: MaskSites,
    seed: int,
    epoch: int,
    step: int,
    window: int,
    samples: np.ndarray,
) -> np.ndarray:
    """Masks of a micro-batch, bool [N, L], True where masked; ``samples`` int64 [N] are panel indices.

    ``step`` matters only for the curriculum's rate. With scope ``sample``, a sample's mask does not depend on the other
    samples of the batch: each has random numbers of its own.
    """
    rate = curriculum_rate(settings, step)
    names: list[Policy] = sorted(settings.policies)  # type: ignore[arg-type]
    weights = np.array([settings.policies[name] for name in names])
    cumulative = np.cumsum(weights / weights.sum())
    scopes = [0] if settings.scope == "window" else (1 + samples).tolist()
    rngs = [generator(Purpose.TRAINING_MASKS, seed, epoch, window, scope) for scope in scopes]
    # The last sum may be below 1 by rounding.
    drawn = np.searchsorted(cumulative[:-1], [rng.random() for rng in rngs], side="right")
    masked = np.empty((len(rngs), len(sites.pos)), dtype=bool)
    for number, policy in enumerate(names):
        rows = np.flatnonzero(drawn == number)
        masked[rows] = masked_by(policy, settings, sites, rate, [rngs[row] for row in rows])
    return np.repeat(masked, len(samples), axis=0) if settings.scope == "window" else masked


@dataclass(frozen=True)
class ValidationMask:
    """A frozen validation mask. Its name ends in a version: a changed recipe needs a new name.

    ``rate`` is the masked fraction under the policy ``random``, ``spacing_bp`` the grid spacing under ``array``.
    """

    name: str
    policy: Policy
    rate: float = 0.0
    spacing_bp: float = 0.0


VALIDATION_MASKS = (
    ValidationMask("array-sparse-2", "array", spacing_bp=4000.0),
    ValidationMask("array-dense-2", "array", spacing_bp=1200.0),
    ValidationMask("random-50-2", "random", rate=0.5),
    ValidationMask("random-80-2", "random", rate=0.8),
)
"""The masks of every validation."""


def validation_mask(mask: ValidationMask, sites: MaskSites, window: int) -> np.ndarray:
    """The frozen mask of a window, bool [L], True where masked; the same for every sample, seed and training run.

    Masks of the policy ``array`` type sites with a minor-allele frequency of at least 5 %, whatever the training uses.
    """
    number = VALIDATION_MASKS.index(mask)
    rng = generator(Purpose.VALIDATION_MASKS, 0, number, window)
    if mask.policy == "array":
        return ~array_typed(sites, mask.spacing_bp, 0.05, rng)
    return rng.random(len(sites.pos)) < mask.rate
