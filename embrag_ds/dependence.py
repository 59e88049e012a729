"""How the alleles of a sample's two haplotypes depend on each other, given the ALT probability of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Dependence:
    """Weights of two extremes in the joint distribution of a sample's two alleles; independence has the rest.

    ALT has the probabilities p and q on the two haplotypes. Independent alleles are both ALT with p q, and both REF
    with (1 - p) (1 - q). As ``opposite`` as can be, both are less by min(p q, (1 - p) (1 - q)): a switch error gives
    each haplotype the other's allele. As ``alike`` as can be, both are more by min(p (1 - q), q (1 - p)): inbreeding.
    In both, p, q and the dosage stay. Raises :class:`ValueError` for weights below 0, and for a sum above 1.
    """

    opposite: float = 0.0
    alike: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.opposite, self.alike)
        if not all(math.isfinite(each) and each >= 0 for each in weights) or sum(weights) > 1:
            raise ValueError(f"{weights} are no weights of two parts of a whole")

    def less(self, p: np.ndarray, q: np.ndarray, whole: float = 1) -> np.ndarray:
        """How much less both alleles are REF, and both ALT, than if independent; p and q are in units of 1/``whole``.

        The result has the shape of p and q, and is in units of 1/``whole``**2.
        """
        opposite = np.minimum(p * q, (whole - p) * (whole - q))
        alike = np.minimum(p * (whole - q), q * (whole - p))
        found: np.ndarray = self.opposite * opposite - self.alike * alike
        return found


INDEPENDENT = Dependence()
