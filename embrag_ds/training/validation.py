"""Validation on frozen masks: held-out samples, and the same windows and masks in every run of a panel."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed

from embrag_ds.adaptation.held_out import Collate, HeldOut, MaskScores, Predict, Tally
from embrag_ds.config import ValidationConfig
from embrag_ds.data.masking import VALIDATION_MASKS, validation_mask
from embrag_ds.data.windows import WindowedPanel, spread
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.evaluation.metrics import AggregateR2

logger = logging.getLogger(__name__)


class Validator:
    """Validation of a model on the held-out samples."""

    def __init__(
        self,
        data: WindowedPanel,
        settings: ValidationConfig,
        samples: np.ndarray,
        block: int,
        distributed: DistributedContext,
    ):
        """``samples`` int64 are panel indices outside the reference set; ``block`` of them are computed at a time."""
        self._data = data
        self._held_out = HeldOut(data, samples[: settings.samples], block)
        self._distributed = distributed
        chosen = spread(len(data), settings.windows)
        self._tasks = [(mask, window) for mask in range(len(VALIDATION_MASKS)) for window in chosen]

    def __str__(self) -> str:
        windows = len(self._tasks) // len(VALIDATION_MASKS)
        samples = len(self._held_out.samples)
        return f"{samples} held-out samples, {windows} windows, {len(VALIDATION_MASKS)} frozen mask sets"

    def warn_of_unscored(self) -> None:
        """Warn of masks that will have no r2, because the masked genotypes do not vary."""
        tallies = [AggregateR2(1) for _ in VALIDATION_MASKS]
        for mask, window in self._tasks:
            truth, frequency = self._held_out.truth(window, self._masked(mask, window))
            one = truth.reshape(-1, 1)
            tallies[mask].add(one, one, np.repeat(frequency, truth.shape[1]))
        masks = zip(VALIDATION_MASKS, tallies, strict=True)
        unscored = [mask.name for mask, tally in masks if np.isnan(tally.result()["all"])]
        if unscored and self._distributed.is_main:
            logger.warning(
                "validation will have no r2 under %s: the masked genotypes of %s do not vary; hold out more samples "
                "(embrag.data.validation_samples), or give a panel with more variants",
                " and ".join(unscored),
                self,
            )

    def scores(
        self, predict: Predict, collate: Collate, stop: Callable[[], int] = lambda: 0
    ) -> dict[str, MaskScores] | int:
        """Scores by mask name (collective): the ranks share the work, and each gets all scores.

        All ranks call ``predict`` equally often, which ZeRO-3 needs: a rank without a task repeats one. ``stop`` is
        asked after each task, equally on all ranks; if it says anything but 0, that is returned instead of scores.
        """
        tallies = [Tally() for _ in VALIDATION_MASKS]
        rounds = -(-len(self._tasks) // self._distributed.ranks)
        for place in range(self._distributed.rank, rounds * self._distributed.ranks, self._distributed.ranks):
            mask, window = self._tasks[place % len(self._tasks)]
            measured = self._held_out.measure(window, self._masked(mask, window), predict, collate)
            if place < len(self._tasks):
                tallies[mask].add(measured)
            if signal := stop():
                return signal
        return {
            mask.name: _reduced(tally, self._distributed) for mask, tally in zip(VALIDATION_MASKS, tallies, strict=True)
        }

    def _masked(self, mask: int, window: int) -> np.ndarray:
        """Masked sites of a window, bool [L]."""
        return validation_mask(VALIDATION_MASKS[mask], self._data.mask_sites(window), window)


def _reduced(tally: Tally, distributed: DistributedContext) -> MaskScores:
    """Scores of what all ranks have tallied (collective)."""
    for array in tally.arrays:
        total = torch.from_numpy(array).to(distributed.device)
        torch.distributed.all_reduce(total)
        array[...] = total.cpu().numpy()
    return tally.scores()


def described_scores(scores: MaskScores) -> str:
    """Scores under one mask, as a log line has them."""
    return (
        f"r2 {scores.r2['all']:.4f} (below 1 % MAF {scores.r2['all <1 %']:.4f}), "
        f"retrieval alone {scores.prior_r2['all']:.4f} ({scores.prior_r2['all <1 %']:.4f}), "
        f"accuracy {scores.accuracy:.4f}, calibration error {scores.calibration_error:.4f}"
    )
