"""From a panel to CPU micro-batches: site features per window, people, and the sampler.

A micro-batch is one window and some people. Which ones is a pure function of (seed, rank, micro-batch
number), so a run is resumed by its step alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from embrag_ds.data.augmentation import AugmentationConfig, augmented
from embrag_ds.data.masking import MaskingConfig, MaskSites, training_masks
from embrag_ds.data.panel import FEW, RARE, Panel, ReferenceSet
from embrag_ds.data.text import read_lines
from embrag_ds.data.windows import Window, make_windows, read_windows
from embrag_ds.errors import UserError, require
from embrag_ds.settings import strict_settings


@strict_settings
class DataConfig:
    """Windows and people."""

    window_sites: int = 1024
    """Sites a window predicts (a contig's windows are made equally long, so this is the upper bound)."""
    overlap_sites: int = 128
    """Sites shared by consecutive windows; imputed values are blended across them."""
    flank_sites: int = 1024
    """Sites on either side that retrieval looks at, too."""
    windows_file: str | None = None
    """Take windows from this file (``contig start end``, 1-based inclusive) instead."""
    validation_people: int = 48
    """People of the panel held out of training for validation (at most a tenth of the panel)."""
    cache_dir: str | None = None
    """Where packed panels and the default data set are kept; default ``$XDG_CACHE_HOME/embrag_ds``."""

    def __post_init__(self) -> None:
        require(self.window_sites >= 2, "data.window_sites", "must be at least 2")
        require(
            0 <= self.overlap_sites <= self.window_sites // 3,
            "data.overlap_sites",
            f"must lie between 0 and a third of window_sites ({self.window_sites // 3})",
        )
        require(self.flank_sites >= 0, "data.flank_sites", "must not be negative")
        require(self.validation_people >= 1, "data.validation_people", "must be at least 1")

    def windows(self, panel: Panel) -> list[Window]:
        """The panel's windows under these settings."""
        if self.windows_file is not None:
            return read_windows(Path(self.windows_file), panel.sites, self.flank_sites)
        return make_windows(panel.sites, self.window_sites, self.overlap_sites, self.flank_sites)


@dataclass(frozen=True)
class SiteFeatures:
    """What the network knows of a window's sites, all float32 on the CPU.

    ``position`` [L] is in cM from the core's centre; ``frequency`` [L] is the ALT frequency over the reference
    set, no nearer to 0 or 1 than a frequency that one person more or less does not show in (see
    :mod:`embrag_ds.retrieval.frequency`); ``counts`` [P, L] are the copies of ALT in every population.
    """

    position: np.ndarray
    frequency: np.ndarray
    counts: np.ndarray


class WindowedPanel:
    """A reference set cut into windows: the alleles, features and mask view of each."""

    def __init__(
        self,
        reference: ReferenceSet,
        windows: list[Window],
        position_cm: np.ndarray,
        manifest: np.ndarray | None = None,
    ):
        """``position_cm`` [S] in cM; ``manifest`` [S] bool marks the sites of an array."""
        self.reference = reference
        self.windows = windows
        self.position_cm = position_cm
        self.manifest = manifest

    def __len__(self) -> int:
        return len(self.windows)

    def features(self, window: int) -> SiteFeatures:
        """Site features of a window."""
        span = slice(self.windows[window].start, self.windows[window].stop)
        position = self.position_cm[span]
        core = position[self.windows[window].core]
        centre = (core[0] + core[-1]) / 2
        rare = min(0.5, max(RARE, FEW / len(self.reference)))
        return SiteFeatures(
            (position - centre).astype(np.float32),
            self.reference.allele_frequency[span].clip(rare, 1 - rare),
            np.ascontiguousarray(self.reference.population_counts[:, span]),
        )

    def mask_sites(self, window: int) -> MaskSites:
        """What masking looks at in a window."""
        span = slice(self.windows[window].start, self.windows[window].stop)
        frequency = self.reference.allele_frequency[span]
        manifest = None if self.manifest is None else self.manifest[span]
        return MaskSites(self.reference.panel.sites.pos[span], np.minimum(frequency, 1 - frequency), manifest)

    def people_alleles(self, window: int, people: np.ndarray) -> np.ndarray:
        """Alleles of panel people in a window, uint8 [B, L]."""
        rows = (2 * people[:, None] + np.arange(2)).reshape(-1)
        return self.reference.panel.alleles(self.windows[window].start, self.windows[window].stop, rows)

    def reference_alleles(self, window: int) -> np.ndarray:
        """Alleles of the reference haplotypes in a window, uint8 [H, L]."""
        return self.reference.alleles(self.windows[window].start, self.windows[window].stop)


@dataclass(frozen=True)
class Samples:
    """A micro-batch before retrieval, on the CPU.

    ``alleles`` uint8 [B, L]; ``hidden`` bool [N, L], True where the query hides the site; ``people``
    int64 [N], panel indices of the people, or -1 for people that are not in the panel.
    """

    window: int
    people: np.ndarray
    alleles: np.ndarray
    hidden: np.ndarray


def split_people(count: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation people of a panel of ``count``: disjoint, sorted, seeded."""
    held_out = min(held_out, max(1, count // 10))
    order = np.random.default_rng([seed, 7]).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


NO_AUGMENTATION = AugmentationConfig()


class TrainingSampler:
    """Micro-batches of the training people: every (window, group of people) once an epoch."""

    def __init__(
        self,
        data: WindowedPanel,
        masking: MaskingConfig,
        seed: int,
        people_per_batch: int,
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
        self.people = data.reference.people
        if len(self.people) < 2:
            raise UserError(f"{data.reference.panel.path}: training needs at least 3 people")
        self.group_size = min(people_per_batch, len(self.people))
        self.groups = len(self.people) // self.group_size

    @property
    def micro_batches_per_epoch(self) -> int:
        """Micro-batches of one epoch, over all ranks; people beyond the last full group sit it out."""
        return self.groups * len(self.data)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch (at least 1)."""
        return max(1, self.micro_batches_per_epoch // (self.ranks * self.accumulation))

    def samples(self, micro_batch: int) -> Samples:
        """This rank's micro-batch number ``micro_batch``, counted from the start of training."""
        epoch, place = divmod(micro_batch * self.ranks + self.rank, self.micro_batches_per_epoch)
        order = _epoch_order(self.seed, epoch, self.micro_batches_per_epoch)
        window, group = divmod(int(order[place]), self.groups)
        shuffled = np.random.default_rng([self.seed, 2, epoch, window]).permutation(self.people)
        people = shuffled[group * self.group_size : (group + 1) * self.group_size]
        step = micro_batch // self.accumulation
        sites = self.data.mask_sites(window)
        hidden = training_masks(self.masking, sites, self.seed, epoch, step, window, people)
        span = slice(self.data.windows[window].start, self.data.windows[window].stop)
        alleles = augmented(
            self.augmentation,
            self.data.people_alleles(window, people),
            hidden,
            self.data.position_cm[span],
            self.seed,
            epoch,
            window,
            people,
        )
        return Samples(window, people, alleles, hidden)


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
    """Whom each panel person must not retrieve, int64 [N, E]: itself, its relatives, -1 for nobody."""
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
            for person, relative in ((one, other), (other, one)):
                if relative not in excluded[person]:
                    excluded[person].append(relative)
    width = max(map(len, excluded))
    return np.array([row + [-1] * (width - len(row)) for row in excluded], dtype=np.int64)
