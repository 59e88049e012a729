"""What targets have and panel people are spared: typing errors, and errors of phasing.

Applied to a training query before it is looked at, as a pure function of (seed, epoch, window, person). A wrongly
typed allele is shown wrong; where it is hidden the truth stays. Beyond a switch error the two
haplotypes of a person have changed sides, and so has their truth: what is asked for is the haplotype as
it is shown.
"""

from __future__ import annotations

import numpy as np

from embrag_ds.errors import require
from embrag_ds.settings import strict_settings

_AUGMENTATION = 3


@strict_settings
class AugmentationConfig:
    """Errors added to training queries; 0: none."""

    typing_error: float = 0.0
    """Share of shown alleles that are read wrongly."""
    switch_errors_per_cm: float = 0.0
    """Mean number of places, per person and cM, where the two haplotypes change sides."""

    def __post_init__(self) -> None:
        require(0 <= self.typing_error < 0.5, "augmentation.typing_error", "must lie in [0, 0.5)")
        require(self.switch_errors_per_cm >= 0, "augmentation.switch_errors_per_cm", "must not be negative")


def augmented(
    settings: AugmentationConfig,
    alleles: np.ndarray,
    hidden: np.ndarray,
    position_cm: np.ndarray,
    seed: int,
    epoch: int,
    window: int,
    people: np.ndarray,
) -> np.ndarray:
    """``alleles`` uint8 [2N, L] with errors; ``hidden`` bool [N, L], ``position_cm`` [L], ``people`` [N]."""
    if not (settings.typing_error or settings.switch_errors_per_cm):
        return alleles
    changed = alleles.copy()
    gaps = np.diff(position_cm, prepend=position_cm[0])
    # An odd number of exchanges between two sites is one exchange (Haldane's map function).
    switch = -np.expm1(-2 * settings.switch_errors_per_cm * gaps) / 2
    for row, person in enumerate(people.tolist()):
        rng = np.random.default_rng([seed, _AUGMENTATION, epoch, window, person])
        pair = changed[2 * row : 2 * row + 2]
        other = np.cumsum(rng.random(len(switch)) < switch) % 2 == 1
        pair[:, other] = pair[::-1, other]
        pair ^= (rng.random(pair.shape) < settings.typing_error) & ~hidden[row]
    return changed
