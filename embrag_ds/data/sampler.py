"""Training sampler: micro-batches of queries on the CPU, drawn from a panel.

A micro-batch is one window and a group of samples. It is a pure function of (seed, rank, micro-batch number), so a run
resumes from its step alone, and any process may draw it (:mod:`embrag_ds.runtime.workers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from embrag_ds.data.masking import MaskingConfig, training_masks
from embrag_ds.data.panel import Panel
from embrag_ds.data.windows import WindowedPanel
from embrag_ds.errors import UserError, require
from embrag_ds.files import read_lines, read_position, split_fields
from embrag_ds.ops.bits import pack_host, unpack_host
from embrag_ds.seeds import Purpose, generator
from embrag_ds.settings import strict_settings


@strict_settings
class AugmentationConfig:
    """Settings of errors added to training queries; 0 adds none."""

    typing_error: float = 0.0
    """[probability] That an observed allele is read wrongly; below 0.5."""
    switch_errors_per_cm: float = 0.0
    """[per sample and cM] Mean number of switch errors: places where the two haplotypes change sides."""

    def __post_init__(self) -> None:
        require(0 <= self.typing_error < 0.5, "augmentation.typing_error", "must lie in [0, 0.5)")
        require(self.switch_errors_per_cm >= 0, "augmentation.switch_errors_per_cm", "must not be negative")


@dataclass(frozen=True)
class QueryBatch:
    """Micro-batch of queries before retrieval, on the CPU.

    ``alleles`` uint8 [B, L] are the observed alleles and, at masked sites, the truth (REF where unknown). ``masked``
    bool [N, L] is True where a site is masked. ``samples`` int64 [N] are panel indices, -1 for samples outside the
    panel. ``missing`` bool [B, L] marks alleles that a target lacks at sites that are not masked; None if there are
    none, as in training. A pickle has one bit for an allele or a mask.
    """

    window: int
    samples: np.ndarray
    alleles: np.ndarray
    masked: np.ndarray
    missing: np.ndarray | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.missing is None, "only training batches are sent between processes"
        sites = self.masked.shape[1]
        return _unpickled, (self.window, self.samples, pack_host(self.alleles), pack_host(self.masked), sites)


def _unpickled(window: int, samples: np.ndarray, alleles: np.ndarray, masked: np.ndarray, sites: int) -> QueryBatch:
    """A batch from its ``alleles`` and masks (``masked``) in bits."""
    return QueryBatch(window, samples, unpack_host(alleles, 0, sites), unpack_host(masked, 0, sites).view(bool))


def split_samples(count: int, held_out: int, seed: int, part: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Split ``count`` panel samples into training and validation samples: two sorted, disjoint int64 arrays of indices.

    ``held_out`` samples are for validation, but at most one in ``part`` of the panel (and at least one).
    """
    held_out = min(held_out, max(1, count // part))
    order = generator(Purpose.SPLIT, seed).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


NO_AUGMENTATION = AugmentationConfig()


class TrainingSampler:
    """Sampler of training micro-batches: every pair of window and group of samples comes once an epoch.

    Groups have ``samples_per_batch`` samples, or all if there are fewer, and are drawn anew for every epoch and window.
    The ranks share an epoch's micro-batches in turn. An unpickled copy draws the same, but lacks ``data``. Raises
    :class:`UserError` for fewer than two training samples, and if no site varies among them.
    """

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
        left_out: Sequence[int] = (),
    ):
        """``left_out`` are numbers of micro-batches, counted over all ranks, that are passed over."""
        self.data = data
        self.masking = masking
        self.augmentation = augmentation
        self.left_out = sorted(left_out)
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.accumulation = accumulation
        self.samples = data.reference.samples
        if len(self.samples) < 2:
            raise UserError(f"{data.reference.panel.path}: training needs at least 3 samples")
        if not data.reference.minor_allele_count.any():
            raise UserError(
                f"{data.reference.panel.path}: none of its {len(data.reference.panel.sites)} sites varies among the "
                f"{len(self.samples)} samples to train on; give a panel with variants, or more samples"
            )
        self.group_size = min(samples_per_batch, len(self.samples))
        self.groups = len(self.samples) // self.group_size
        self._source = data.query_source

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "data"}

    def __getitem__(self, micro_batch: int) -> QueryBatch:
        """Same as :meth:`queries`."""
        return self.queries(micro_batch)

    @property
    def micro_batches_per_epoch(self) -> int:
        """Micro-batches of one epoch over all ranks; samples beyond the last full group are left out."""
        return self.groups * len(self._source)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch (at least 1)."""
        return max(1, self.micro_batches_per_epoch // (self.ranks * self.accumulation))

    def number(self, micro_batch: int) -> int:
        """Number, over all ranks, of this rank's ``micro_batch``; any number of ranks has the same ones in a step."""
        number = micro_batch * self.ranks + self.rank
        for each in self.left_out:
            number += each <= number
        return number

    def queries(self, micro_batch: int) -> QueryBatch:
        """Micro-batch number ``micro_batch`` of this rank, counted from the start of training."""
        epoch, place = divmod(self.number(micro_batch), self.micro_batches_per_epoch)
        order = _epoch_order(self.seed, epoch, self.micro_batches_per_epoch)
        window, group = divmod(int(order[place]), self.groups)
        shuffled = generator(Purpose.SAMPLE_GROUPS, self.seed, epoch, window).permutation(self.samples)
        samples = shuffled[group * self.group_size : (group + 1) * self.group_size]
        step = micro_batch // self.accumulation
        sites = self._source.mask_sites(window)
        masked = training_masks(self.masking, sites, self.seed, epoch, step, window, samples)
        alleles = augmented(
            self.augmentation,
            self._source.samples_alleles(window, samples),
            masked,
            self._source.position_cm[self._source.windows[window].sites],
            self.seed,
            epoch,
            window,
            samples,
        )
        return QueryBatch(window, samples, alleles, masked)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return generator(Purpose.EPOCH_ORDER, seed, epoch).permutation(size)


def read_manifest(path: Path, panel: Panel) -> np.ndarray:
    """Read the sites of a genotyping array, bool [S], from a VCF (plain or gzipped) or from ``contig pos`` lines.

    Sites are matched by position. Raises :class:`UserError` for a malformed line, and if no site is in the panel.
    """
    listed: set[tuple[str, int]] = set()
    for number, line in enumerate(read_lines(path, "manifest"), start=1):
        fields = line.split(maxsplit=2)
        if not fields or fields[0].startswith("#"):
            continue
        try:
            listed.add((fields[0], read_position(fields[1])))
        except (IndexError, ValueError):
            raise UserError(f"{path}: line {number}: expected contig and position") from None
    sites = panel.sites
    typed = np.fromiter(((contig, pos) in listed for contig, pos, _, _ in sites.identities()), bool, len(sites))
    if not typed.any():
        raise UserError(f"{path}: no site of the manifest is in {panel.path}: check contig names and build")
    return typed


def exclusion_table(samples: Sequence[str], relatives: Path | None) -> np.ndarray:
    """Panel samples that each sample must not retrieve, int64 [N, E]: itself and its relatives, padded with -1.

    ``relatives`` is a file of related pairs, two sample ids per line; lines that begin with ``#`` are
    comments. Raises :class:`UserError` for any other line.
    """
    excluded: list[list[int]] = [[number] for number in range(len(samples))]
    if relatives is not None:
        number_of = {sample: number for number, sample in enumerate(samples)}
        for number, line in enumerate(read_lines(relatives, "relatives"), start=1):
            pair = split_fields(line)
            if not pair or (pair[0].startswith("#") and pair[0] not in number_of):
                continue
            if len(pair) != 2 or not all(sample in number_of for sample in pair):
                raise UserError(f"{relatives}: line {number}: expected two sample ids of the panel")
            one, other = (number_of[sample] for sample in pair)
            for sample, relative in ((one, other), (other, one)):
                if relative not in excluded[sample]:
                    excluded[sample].append(relative)
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
    """Training queries with typing and phasing errors added, uint8 [2N, L], since real targets have such errors.

    The errors are a pure function of (seed, epoch, window, sample). A typing error changes an observed allele; the
    truth of a masked site never changes. Beyond a switch error the sample's two haplotypes have changed sides, at
    masked sites too: the truth follows the haplotype as observed. Arguments: ``alleles`` uint8 [2N, L], ``masked`` bool
    [N, L], ``position_cm`` [L] in cM, and ``samples`` int64 [N], panel indices.
    """
    if not (settings.typing_error or settings.switch_errors_per_cm):
        return alleles
    changed = alleles.copy()
    gaps = np.diff(position_cm, prepend=position_cm[0])
    # An odd number of exchanges between two sites is one exchange (Haldane's map function).
    switch = -np.expm1(-2 * settings.switch_errors_per_cm * gaps) / 2
    for row, sample in enumerate(samples.tolist()):
        rng = generator(Purpose.AUGMENTATION, seed, epoch, window, sample)
        pair = changed[2 * row : 2 * row + 2]
        other = np.cumsum(rng.random(len(switch)) < switch) % 2 == 1
        pair[:, other] = pair[::-1, other]
        pair ^= (rng.random(pair.shape) < settings.typing_error) & ~masked[row]
    return changed
