"""Validation on frozen masks: held-out samples, and the same windows and masks in every run of a panel."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed

from embrag_ds.config import ValidationConfig
from embrag_ds.data.masking import VALIDATION_MASKS, validation_mask
from embrag_ds.data.sampler import QueryBatch
from embrag_ds.data.windows import WindowedPanel
from embrag_ds.evaluation.metrics import AggregateR2, Calibration
from embrag_ds.model.imputer import Prediction
from embrag_ds.model.losses import genotype_log_probabilities
from embrag_ds.retrieval.batch import Batch
from embrag_ds.training.distributed import DistributedContext

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskScores:
    """Scores under one validation mask, over its masked genotypes.

    ``r2`` and ``prior_r2`` are aggregate dosage r2 by MAF bin, of the model and of retrieval alone (without the
    residual). ``accuracy`` is the fraction of correct genotype calls. ``calibration_error`` is the expected calibration
    error of the called genotype's probability.
    """

    r2: dict[str, float]
    prior_r2: dict[str, float]
    accuracy: float
    calibration_error: float


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
        self._samples = samples[: settings.samples]
        self._block = block
        self._distributed = distributed
        chosen = np.linspace(0, len(data) - 1, min(settings.windows, len(data))).round().astype(int)
        self._tasks = [(mask, int(window)) for mask in range(len(VALIDATION_MASKS)) for window in chosen]

    def __str__(self) -> str:
        windows = len(self._tasks) // len(VALIDATION_MASKS)
        return f"{len(self._samples)} held-out samples, {windows} windows, {len(VALIDATION_MASKS)} frozen mask sets"

    def warn_of_unscored(self) -> None:
        """Warn of masks that will have no r2, because the masked genotypes do not vary."""
        tallies = [AggregateR2(1) for _ in VALIDATION_MASKS]
        for mask, window in self._tasks:
            scored = self._scored(mask, window)
            truth = self._truth(self._data.samples_alleles(window, self._samples), window)[scored].reshape(-1, 1)
            tallies[mask].add(truth, truth, np.repeat(self._frequency(window)[scored], len(self._samples)))
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
        self, predict: Callable[[Batch], Prediction], collate: Callable[[QueryBatch], Batch]
    ) -> dict[str, MaskScores]:
        """Scores by mask name (collective): the ranks share the work, and each gets all scores.

        All ranks call ``predict`` equally often, which ZeRO-3 needs: a rank without a task repeats one.
        """
        tallies = [_Tally() for _ in VALIDATION_MASKS]
        rounds = -(-len(self._tasks) // self._distributed.ranks)
        for place in range(self._distributed.rank, rounds * self._distributed.ranks, self._distributed.ranks):
            mask, window = self._tasks[place % len(self._tasks)]
            measured = self._measure(mask, window, predict, collate)
            if place < len(self._tasks):
                tallies[mask].add(measured)
        return {
            mask.name: tally.reduce(self._distributed) for mask, tally in zip(VALIDATION_MASKS, tallies, strict=True)
        }

    def _measure(
        self,
        mask: int,
        window: int,
        predict: Callable[[Batch], Prediction],
        collate: Callable[[QueryBatch], Batch],
    ) -> _Measured:
        masked = self._masked(mask, window)
        alleles = self._data.samples_alleles(window, self._samples)
        probabilities: list[np.ndarray] = []
        dosages: list[np.ndarray] = []
        for start in range(0, len(self._samples), self._block):
            samples = self._samples[start : start + self._block]
            rows = slice(2 * start, 2 * (start + len(samples)))
            masks = np.repeat(masked[None], len(samples), axis=0)
            with torch.no_grad():
                prediction = predict(collate(QueryBatch(window, samples, alleles[rows], masks)))
            probabilities.append(genotype_log_probabilities(prediction.logits).exp().cpu().numpy())
            dosages.append(prediction.prior.sigmoid().unflatten(0, (-1, 2)).sum(1).cpu().numpy())
        scored = self._scored(mask, window)
        return _Measured(
            truth=self._truth(alleles, window)[scored],
            probabilities=np.concatenate(probabilities).transpose(1, 0, 2)[scored],
            prior=np.concatenate(dosages).T[scored],
            frequency=self._frequency(window)[scored],
        )

    def _masked(self, mask: int, window: int) -> np.ndarray:
        """Masked sites of a window, bool [L]."""
        return validation_mask(VALIDATION_MASKS[mask], self._data.mask_sites(window), window)

    def _scored(self, mask: int, window: int) -> np.ndarray:
        """Sites of a window's core that are scored under a mask, bool [core]."""
        place = self._data.windows[window]
        passes: np.ndarray = self._data.reference.passes_minimum_count[place.core_sites]
        return passes & self._masked(mask, window)[place.core]

    def _truth(self, alleles: np.ndarray, window: int) -> np.ndarray:
        """ALT counts in a window's core, uint8 [core, N], from alleles uint8 [2N, L]."""
        return (alleles[0::2] + alleles[1::2]).T[self._data.windows[window].core]

    def _frequency(self, window: int) -> np.ndarray:
        """ALT frequency of the sites of a window's core in the reference set, float32 [core]."""
        return self._data.reference.allele_frequency[self._data.windows[window].core_sites]


@dataclass(frozen=True)
class _Measured:
    """Masked genotypes of a window.

    ``truth`` [n, N] are ALT counts and ``probabilities`` [n, N, 3] those of the model. ``prior`` [n, N] is the dosage
    of retrieval alone, ``frequency`` [n] the ALT frequency.
    """

    truth: np.ndarray
    probabilities: np.ndarray
    prior: np.ndarray
    frequency: np.ndarray


class _Tally:
    """Sums under one mask, which add up over windows and ranks."""

    def __init__(self) -> None:
        self.model = AggregateR2(1)
        self.prior = AggregateR2(1)
        self.calibration = Calibration()
        self.right = np.zeros(2)

    def add(self, measured: _Measured) -> None:
        truth, probabilities = measured.truth, measured.probabilities
        dosage = probabilities[..., 1] + 2 * probabilities[..., 2]
        # One pooled "sample": validation reports no intervals over samples.
        for tally, values in ((self.model, dosage), (self.prior, measured.prior)):
            tally.add(truth.reshape(-1, 1), values.reshape(-1, 1), np.repeat(measured.frequency, truth.shape[1]))
        self.calibration.add(truth, probabilities)
        self.right += ((probabilities.argmax(-1) == truth).sum(), truth.size)

    def reduce(self, distributed: DistributedContext) -> MaskScores:
        for array in (self.model.moments, self.prior.moments, self.calibration.sums, self.right):
            total = torch.from_numpy(array).to(distributed.device)
            torch.distributed.all_reduce(total)
            array[...] = total.cpu().numpy()
        return MaskScores(
            r2=self.model.result(),
            prior_r2=self.prior.result(),
            accuracy=float(self.right[0] / max(self.right[1], 1)),
            calibration_error=self.calibration.result(),
        )
