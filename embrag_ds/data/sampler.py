"""From a panel to CPU micro-batches.

A micro-batch is one window and some samples. Which ones is a pure function of (seed, rank, micro-batch
number), so a run is resumed by its step alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from embrag_ds.data.masking import MaskingConfig, training_masks
from embrag_ds.data.panel import Panel
from embrag_ds.data.windows import WindowedPanel
from embrag_ds.errors import UserError, require
from embrag_ds.files import read_lines
from embrag_ds.settings import strict_settings

_AUGMENTATION = 3


@strict_settings
class AugmentationConfig:
    """Errors added to training queries; 0: none."""

    typing_error: float = 0.0
    """Share of observed alleles that are read wrongly."""
    switch_errors_per_cm: float = 0.0
    """Mean number of places, per sample and cM, where the two haplotypes change sides."""

    def __post_init__(self) -> None:
        require(0 <= self.typing_error < 0.5, "augmentation.typing_error", "must lie in [0, 0.5)")
        require(self.switch_errors_per_cm >= 0, "augmentation.switch_errors_per_cm", "must not be negative")


@dataclass(frozen=True)
class QueryBatch:
    """A micro-batch before retrieval, on the CPU.

    ``alleles`` uint8 [B, L]; ``masked`` bool [N, L], True where the query hides the site; ``samples``
    int64 [N], panel indices of the samples, or -1 for samples that are not in the panel.
    """

    window: int
    samples: np.ndarray
    alleles: np.ndarray
    masked: np.ndarray


def split_samples(count: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation samples of a panel of ``count``: disjoint, sorted, seeded."""
    held_out = min(held_out, max(1, count // 10))
    order = np.random.default_rng([seed, 7]).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


NO_AUGMENTATION = AugmentationConfig()


class TrainingSampler:
    """Micro-batches of the training samples: every (window, group of samples) once an epoch."""

    def __init__(
        self,
        data: WindowedPanel,
        masking: MaskingConfig,
        seed: int,
        samples_per_batch: int,
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        augmentation: AugmentationConfig = NO_AUGMENTATION,
    ):
        self.data = data
        self.masking = masking
        self.augmentation = augmentation
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.accumulation = accumulation
        self.samples = data.reference.samples
        if len(self.samples) < 2:
            raise UserError(f"{data.reference.panel.path}: training needs at least 3 samples")
        self.group_size = min(samples_per_batch, len(self.samples))
        self.groups = len(self.samples) // self.group_size

    @property
    def micro_batches_per_epoch(self) -> int:
        """Micro-batches of one epoch, over all ranks; samples beyond the last full group sit it out."""
        return self.groups * len(self.data)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch (at least 1)."""
        return max(1, self.micro_batches_per_epoch // (self.ranks * self.accumulation))

    def queries(self, micro_batch: int) -> QueryBatch:
        """This rank's micro-batch number ``micro_batch``, counted from the start of training."""
        epoch, place = divmod(micro_batch * self.ranks + self.rank, self.micro_batches_per_epoch)
        order = _epoch_order(self.seed, epoch, self.micro_batches_per_epoch)
        window, group = divmod(int(order[place]), self.groups)
        shuffled = np.random.default_rng([self.seed, 2, epoch, window]).permutation(self.samples)
        samples = shuffled[group * self.group_size : (group + 1) * self.group_size]
        step = micro_batch // self.accumulation
        sites = self.data.mask_sites(window)
        masked = training_masks(self.masking, sites, self.seed, epoch, step, window, samples)
        span = slice(self.data.windows[window].start, self.data.windows[window].stop)
        alleles = augmented(
            self.augmentation,
            self.data.samples_alleles(window, samples),
            masked,
            self.data.position_cm[span],
            self.seed,
            epoch,
            window,
            samples,
        )
        return QueryBatch(window, samples, alleles, masked)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, 1, epoch]).permutation(size)


def read_manifest(path: Path, panel: Panel) -> np.ndarray:
    """Sites of an array, bool [S]: a VCF (plain or .gz), or ``contig pos`` per line; matched on position."""
    listed: set[tuple[str, int]] = set()
    for number, line in enumerate(read_lines(path, "manifest"), start=1):
        fields = line.split()
        if not fields or line.startswith("#"):
            continue
        try:
            listed.add((fields[0], int(fields[1])))
        except (IndexError, ValueError):
            raise UserError(f"{path}: line {number}: expected contig and position") from None
    sites = panel.sites
    typed = np.fromiter(((contig, pos) in listed for contig, pos, _, _ in sites.identities()), bool, len(sites))
    if not typed.any():
        raise UserError(f"{path}: no site of the manifest is in {panel.path}: check contig names and build")
    return typed


def exclusion_table(samples: Sequence[str], relatives: Path | None) -> np.ndarray:
    """Whom each panel sample must not retrieve, int64 [N, E]: itself, its relatives, -1 for nobody."""
    excluded: list[list[int]] = [[number] for number in range(len(samples))]
    if relatives is not None:
        number_of = {sample: number for number, sample in enumerate(samples)}
        for number, line in enumerate(read_lines(relatives, "relatives"), start=1):
            pair = line.split()
            if not pair:
                continue
            if len(pair) != 2 or not all(sample in number_of for sample in pair):
                raise UserError(f"{relatives}: line {number}: expected two sample ids of the panel")
            one, other = (number_of[sample] for sample in pair)
            for number, relative in ((one, other), (other, one)):
                if relative not in excluded[number]:
                    excluded[number].append(relative)
    width = max(map(len, excluded))
    return np.array([row + [-1] * (width - len(row)) for row in excluded], dtype=np.int64)


def augmented(
    settings: AugmentationConfig,
    alleles: np.ndarray,
    masked: np.ndarray,
    position_cm: np.ndarray,
    seed: int,
    epoch: int,
    window: int,
    samples: np.ndarray,
) -> np.ndarray:
    """Errors of typing and phasing put into training queries, as targets have them and panel samples do not.

    A pure function of (seed, epoch, window, sample). A wrongly typed allele is observed wrong; where it is masked the
    truth stays. Beyond a switch error the two haplotypes of a sample have changed sides, and so has their truth:
    what is asked for is the haplotype as it is observed. ``alleles`` uint8 [2N, L]; ``masked`` bool [N, L],
    ``position_cm`` [L], ``samples`` [N].
    """
    if not (settings.typing_error or settings.switch_errors_per_cm):
        return alleles
    changed = alleles.copy()
    gaps = np.diff(position_cm, prepend=position_cm[0])
    # An odd number of exchanges between two sites is one exchange (Haldane's map function).
    switch = -np.expm1(-2 * settings.switch_errors_per_cm * gaps) / 2
    for row, sample in enumerate(samples.tolist()):
        rng = np.random.default_rng([seed, _AUGMENTATION, epoch, window, sample])
        pair = changed[2 * row : 2 * row + 2]
        other = np.cumsum(rng.random(len(switch)) < switch) % 2 == 1
        pair[:, other] = pair[::-1, other]
        pair ^= (rng.random(pair.shape) < settings.typing_error) & ~masked[row]
    return changed
