"""Dependence of a sample's two haplotypes, fitted to true genotypes of samples that are held out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from embrag_ds.dependence import INDEPENDENT, Dependence

LEAST_SAMPLES = 8
"""Samples without which nothing can be said of how certain a gain is."""
_LEAST_PROBABILITY = 5e-4
"""Half a unit of the last decimal that is written: no allele is more certain than that."""
_MOST_SWEEPS, _HALVINGS, _NO_CHANGE = 100, 20, 1e-4
_FOLDS = 2
_LEAST_ERRORS = 2.0
"""Standard errors that the mean gain of a sample must exceed."""


@dataclass(frozen=True)
class Pairs:
    """Genotypes of N samples at n sites: ``probability`` [n, N, 2] of ALT by haplotype, ``truth`` [n, N] ALT copies.

    ``diploid`` bool [n, N] marks those that have two haplotypes.
    """

    probability: np.ndarray
    truth: np.ndarray
    diploid: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """A dependence, with the mean gain of a sample in log-likelihood, nats per 1,000 genotypes, and its standard error.

    The gain is that of samples which were not fitted to.
    """

    dependence: Dependence
    gain: float
    error: float


def fit_dependence(pairs: list[Pairs]) -> Fitted:
    """The likeliest dependence, or independence where samples that were not fitted to do not gain for certain.

    Each of two halves of the samples is scored with what fits the other.
    """
    samples, likelihoods = _likelihoods(pairs)
    number = pairs[0].truth.shape[1] if pairs else 0
    if number < LEAST_SAMPLES or not len(samples):
        return Fitted(INDEPENDENT, 0.0, 0.0)
    gains = np.zeros(number)
    for fold in range(_FOLDS):
        inside = samples % _FOLDS == fold
        weights = _weights(likelihoods[~inside])
        gained = np.log(likelihoods[inside] @ weights / likelihoods[inside, 0])
        gains += np.bincount(samples[inside], gained, minlength=number)
    scale = 1000 / sum(len(each.truth) for each in pairs)
    gain, error = scale * gains.mean(), scale * gains.std(ddof=1) / np.sqrt(number)
    if not gain > _LEAST_ERRORS * error:
        return Fitted(INDEPENDENT, float(gain), float(error))
    _, opposite, alike = _weights(likelihoods)
    return Fitted(Dependence(round(float(opposite), 4), round(float(alike), 4)), float(gain), float(error))


def _likelihoods(pairs: list[Pairs]) -> tuple[np.ndarray, np.ndarray]:
    """Sample int64 [m] of every diploid genotype, and its probability [m, 3]: independent, opposite and alike.

    Where an allele is certain, within what is written, nothing depends on the other one.
    """
    samples, found = [np.empty(0, dtype=np.int64)], [np.empty((0, 3))]
    for each in pairs:
        certainty = np.maximum(each.probability, 1 - each.probability).max(axis=-1)
        site, sample = np.nonzero(each.diploid & (certainty <= 1 - _LEAST_PROBABILITY))
        p, q = each.probability[site, sample].astype(np.float64).T
        truth = each.truth[site, sample]
        columns = []
        for dependence in (INDEPENDENT, Dependence(opposite=1.0), Dependence(alike=1.0)):
            less = dependence.less(p, q)
            both = np.stack([(1 - p) * (1 - q) - less, p * (1 - q) + q * (1 - p) + 2 * less, p * q - less])
            columns.append(np.maximum(both[truth, np.arange(len(truth))], _LEAST_PROBABILITY**2))
        samples.append(sample)
        found.append(np.stack(columns, axis=1))
    return np.concatenate(samples), np.concatenate(found)


def _weights(likelihoods: np.ndarray) -> np.ndarray:
    """Weights of the three distributions that are the likeliest, float64 [3].

    The log-likelihood is concave in them. Two at a time exchange what is best, which bisection finds.
    """
    weights = np.full(3, 1 / 3)
    for _ in range(_MOST_SWEEPS):
        before = weights.copy()
        for giver, taker in combinations(range(3), 2):
            rest, change = likelihoods @ weights, likelihoods[:, taker] - likelihoods[:, giver]
            low, high = -weights[taker], weights[giver]
            for _ in range(_HALVINGS):
                moved = (low + high) / 2
                rises = (change / (rest + moved * change)).sum() > 0
                low, high = (moved, high) if rises else (low, moved)
            weights += np.bincount([giver, taker], [-(low + high) / 2, (low + high) / 2], minlength=3)
            weights = weights.clip(0)
        if np.abs(weights - before).max() < _NO_CHANGE:
            break
    return weights / weights.sum()
