"""Scores of a network on masked genotypes of samples that are held out of the reference set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from embrag_ds.data.sampler import QueryBatch
from embrag_ds.data.windows import WindowedPanel
from embrag_ds.evaluation.metrics import DISJOINT_BINS, AggregateR2, Calibration
from embrag_ds.model.imputer import Prediction
from embrag_ds.model.losses import genotype_log_probabilities
from embrag_ds.retrieval.batch import Batch

Predict = Callable[[Batch], Prediction]
Collate = Callable[[QueryBatch], Batch]


@dataclass(frozen=True)
class MaskScores:
    """Scores under one mask, over its masked genotypes.

    ``r2`` and ``prior_r2`` are aggregate dosage r2 by MAF bin, of the model and of retrieval alone (without the
    residual). ``accuracy`` is the fraction of correct genotype calls. ``calibration_error`` is the expected calibration
    error of the called genotype's probability.
    """

    r2: dict[str, float]
    prior_r2: dict[str, float]
    accuracy: float
    calibration_error: float


def mean_r2(scores: Iterable[MaskScores]) -> float:
    """Mean of the r2 of all disjoint MAF bins that have one, over all ``scores``; minus infinity if none has."""
    found = [each.r2[name] for each in scores for name in DISJOINT_BINS if math.isfinite(each.r2[name])]
    return sum(found) / len(found) if found else float("-inf")


@dataclass(frozen=True)
class Measured:
    """Masked genotypes of a window.

    ``truth`` [n, N] are ALT counts and ``probabilities`` [n, N, 3] those of the model, ``haplotypes`` [n, N, 2] its
    probabilities of ALT on each haplotype. ``prior`` [n, N] is the dosage of retrieval alone, ``frequency`` [n] the ALT
    frequency. ``diploid`` bool [n, N] marks samples with two haplotypes there.
    """

    truth: np.ndarray
    probabilities: np.ndarray
    haplotypes: np.ndarray
    diploid: np.ndarray
    prior: np.ndarray
    frequency: np.ndarray


class HeldOut:
    """Samples held out of the reference set of ``data``, of which ``block`` are computed at a time.

    ``samples`` int64 are their panel indices.
    """

    def __init__(self, data: WindowedPanel, samples: np.ndarray, block: int):
        self.samples = samples
        self._data = data
        self._block = block

    def measure(self, window: int, masked: np.ndarray, predict: Predict, collate: Collate) -> Measured:
        """Predict the sites ``masked`` bool [L] of a window, and read their truth."""
        alleles = self._data.samples_alleles(window, self.samples)
        probabilities: list[np.ndarray] = []
        dosages: list[np.ndarray] = []
        haplotypes: list[np.ndarray] = []
        for start in range(0, len(self.samples), self._block):
            samples = self.samples[start : start + self._block]
            rows = slice(2 * start, 2 * (start + len(samples)))
            masks = np.repeat(masked[None], len(samples), axis=0)
            with torch.no_grad():
                prediction = predict(collate(QueryBatch(window, samples, alleles[rows], masks)))
            probabilities.append(genotype_log_probabilities(prediction.logits).exp().cpu().numpy())
            haplotypes.append(prediction.logits.sigmoid().unflatten(0, (-1, 2)).cpu().numpy())
            dosages.append(prediction.prior.sigmoid().unflatten(0, (-1, 2)).sum(1).cpu().numpy())
        scored = self.scored(window, masked)
        return Measured(
            truth=self._truth(alleles, window)[scored],
            probabilities=np.concatenate(probabilities).transpose(1, 0, 2)[scored],
            haplotypes=np.concatenate(haplotypes).transpose(2, 0, 1)[scored],
            diploid=self._diploid(window)[scored],
            prior=np.concatenate(dosages).T[scored],
            frequency=self._frequency(window)[scored],
        )

    def truth(self, window: int, masked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ALT counts [n, N] at the scored sites of a window, and the sites' ALT frequency [n]."""
        scored = self.scored(window, masked)
        counts = self._truth(self._data.samples_alleles(window, self.samples), window)
        return counts[scored], self._frequency(window)[scored]

    def scored(self, window: int, masked: np.ndarray) -> np.ndarray:
        """Sites of a window's core that are scored under a mask bool [L], bool [core]."""
        place = self._data.windows[window]
        passes: np.ndarray = self._data.reference.passes_minimum_count[place.core_sites]
        return passes & masked[place.core]

    def _truth(self, alleles: np.ndarray, window: int) -> np.ndarray:
        """ALT counts in a window's core, uint8 [core, N], from alleles uint8 [2N, L]."""
        return (alleles[0::2] + alleles[1::2]).T[self._data.windows[window].core]

    def _diploid(self, window: int) -> np.ndarray:
        """Samples with two haplotypes in a window's core, bool [core, N]."""
        ploidy, place = self._data.reference.panel.ploidy, self._data.windows[window]
        if ploidy is None:
            return np.ones((place.core_stop - place.core_start, len(self.samples)), dtype=bool)
        return ~ploidy.at(np.arange(place.core_start, place.core_stop))[:, self.samples]

    def _frequency(self, window: int) -> np.ndarray:
        """ALT frequency of the sites of a window's core in the reference set, float32 [core]."""
        return self._data.reference.allele_frequency[self._data.windows[window].core_sites]


class Tally:
    """Sums over windows, from which :meth:`scores` follow; ``arrays`` add up over ranks, too."""

    def __init__(self) -> None:
        self.model = AggregateR2(1)
        self.prior = AggregateR2(1)
        self.calibration = Calibration()
        self.right = np.zeros(2)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The sums themselves, float64."""
        return self.model.moments, self.prior.moments, self.calibration.sums, self.right

    def add(self, measured: Measured) -> None:
        """Add the masked genotypes of a window."""
        truth, probabilities = measured.truth, measured.probabilities
        dosage = probabilities[..., 1] + 2 * probabilities[..., 2]
        # One pooled "sample": these scores have no intervals over samples.
        for tally, values in ((self.model, dosage), (self.prior, measured.prior)):
            tally.add(truth.reshape(-1, 1), values.reshape(-1, 1), np.repeat(measured.frequency, truth.shape[1]))
        self.calibration.add(truth, probabilities)
        self.right += ((probabilities.argmax(-1) == truth).sum(), truth.size)

    def scores(self) -> MaskScores:
        """Scores of all that was added."""
        return MaskScores(
            r2=self.model.result(),
            prior_r2=self.prior.result(),
            accuracy=float(self.right[0] / max(self.right[1], 1)),
            calibration_error=self.calibration.result(),
        )
