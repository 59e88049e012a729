"""Calibration of called carriers of the minor allele, by bin of sites, in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embrag_ds.evaluation.metrics import COUNT_NAMES, DISJOINT_BINS, EVERY_NAME, interval

FEWEST_CARRIERS = 100
"""A bin with fewer called carriers has no say in :func:`largest_gap`."""


@dataclass(frozen=True)
class CarrierCalibration:
    """Called carriers of a bin: their number, the mean probability ``said``, and the share ``right``.

    ``interval`` is a 95 % bootstrap interval over samples of said - right. NaN where there is no called carrier.
    """

    number: int
    said: float
    right: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Gap:
    """Name of a bin, and its abs(said - right)."""

    bin: str
    gap: float


class CalledCarriers:
    """Calibration of called carriers by bin, accumulated over blocks of sites.

    A *called carrier* is a genotype whose most probable value has the panel's minor allele. What is *said* of it is the
    probability of the called genotype. It is *right* if that is the true genotype. Of calibrated probabilities, the
    mean said is the share right. Genotypes that the truth lacks do not count.

    Three sums are kept for each sample: ``sums`` float64 [G, N, 3] = (number, said, right), bins as ``EVERY_NAME``.
    """

    def __init__(self, samples: int) -> None:
        self.sums = np.zeros((len(EVERY_NAME), samples, 3), dtype=np.float64)

    def add(
        self,
        truth: np.ndarray,
        probabilities: np.ndarray,
        called: np.ndarray,
        carried: np.ndarray,
        members: np.ndarray,
    ) -> None:
        """Add a block: truth [n, N], probabilities [n, N, 3], their most probable genotypes ``called`` [n, N].

        ``carried`` bool [n, N] says which of those have the panel's minor allele; ``members`` bool [G, n] are the sites
        of every bin.
        """
        carrier = np.isfinite(truth) & carried
        # Few genotypes are called carriers, and a maximum over the short last axis is slow.
        said = np.zeros(truth.shape)
        said[carrier] = probabilities[carrier].max(axis=-1)
        weight = members.astype(np.float64)
        for column, values in enumerate((carrier, said, carrier & (called == truth))):
            self.sums[:, :, column] += weight @ values.astype(np.float64)

    def result(self, weights: np.ndarray) -> dict[str, CarrierCalibration]:
        """Calibration by bin name; ``weights`` [R, N] are those of the resamples."""
        number, said, right = self.sums.sum(axis=1).T
        resampled = np.einsum("rp,gpm->rgm", weights, self.sums, optimize=True)
        with np.errstate(invalid="ignore"):
            limits = interval((resampled[..., 1] - resampled[..., 2]) / resampled[..., 0], EVERY_NAME)
            said, right = said / number, right / number
        return {
            name: CarrierCalibration(int(number[row]), float(said[row]), float(right[row]), limits[name])
            for row, name in enumerate(EVERY_NAME)
        }


def largest_gap(found: dict[str, CarrierCalibration]) -> Gap | None:
    """The largest abs(said - right) of a bin.

    Bins that pool others, and those with fewer than ``FEWEST_CARRIERS`` called carriers, are left out. None if no bin
    is left.
    """
    gaps = (
        Gap(name, abs(found[name].said - found[name].right))
        for name in (*DISJOINT_BINS, *COUNT_NAMES)
        if found[name].number >= FEWEST_CARRIERS
    )
    return max(gaps, key=lambda each: each.gap, default=None)
