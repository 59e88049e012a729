"""A model's part of the copying along a stretch, from its weights, without torch.

The formulas are those of :class:`embrag_ds.model.poolings.copying.CopyingPooling`,
:class:`embrag_ds.model.embedding.HaplotypeEmbedding` and :mod:`embrag_ds.model.confidence`. All is computed in float64
and rounded once, so the numbers are the same for any number of threads that a product is divided among.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from embrag_ds.copying.records import Head, Rates
from embrag_ds.data.tokens import ALT, REF
from embrag_ds.data.windows import SiteFeatures, most_places, places
from embrag_ds.model import numbers
from embrag_ds.ops.li_stephens_numba import LEAST_RECOMBINATION, MOST_MISMATCH_NATS


class CopyingModel:
    """Weights of a network with the fusion ``copying``, float32 by name, as the loop along a stretch takes them.

    ``good_turing`` says whether the prior's odds of the rarest alleles are corrected.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], good_turing: bool):
        self.good_turing = good_turing
        self._weights = weights

    def rates(self, features: SiteFeatures, rows: np.ndarray, haplotypes: int) -> Rates:
        """Numbers for a stretch with these site features, typed at ``rows`` int64 [T], with H ``haplotypes``."""
        weight = self.site_weights(features.frequency[rows])
        weight /= weight.mean()
        position = features.position[rows]
        gap = np.diff(position, prepend=position[:1]).astype(np.float64)
        per_cm = density(rows, features.position)
        jump = -np.expm1(-self._power("rate", per_cm)[:, None] * gap)
        nats = self._power("penalty", per_cm)[:, None] * weight
        place, number, place_cm = places(features.position, most_places(haplotypes))
        reach = np.exp(-place_cm / np.exp(self._scaled("reach")))
        typed = np.bincount(place[rows], minlength=number).astype(np.float64)
        typed_at = np.stack([_weighed(typed, float(each)) for each in reach])
        return Rates(
            ratio=np.exp(-np.minimum(nats, MOST_MISMATCH_NATS)).astype(np.float32),
            jump=np.maximum(jump, LEAST_RECOMBINATION).astype(np.float32),
            strength=(100 * self._scaled("closeness")).astype(np.float32),
            reach=reach.astype(np.float32),
            typed_at=np.maximum(typed_at, numbers.LEAST_TYPED_NEAR).astype(np.float32),
            keep=np.float32(numbers.NEGLIGIBLE),
            background=np.float32(_sigmoid(self._of("background")[0])),
            least=np.float32(numbers.LEAST_PROBABILITY),
        )

    def head(self, per_cm: float) -> Head:
        """Weights of the confidence head for a :func:`density` of typed sites."""
        (first, first_bias), (second, second_bias), (last, last_bias) = (
            [self._weights[f"{name}.{kind}"] for kind in ("weight", "bias")] for name in numbers.CONFIDENCE_LAYERS
        )
        return Head(
            first,
            first_bias,
            second,
            second_bias,
            last[0].copy(),
            np.float32(last_bias[0]),
            np.float32(math.log(per_cm) / 2),
        )

    def share_of_slow(self, frequency: np.ndarray) -> np.ndarray:
        """Weight of the slow copying model at ALT ``frequency`` [...], float32 [...]."""
        level, per_decade = self._scaled("slow")
        maf = np.maximum(np.minimum(frequency, 1 - frequency), 1e-5)
        return _sigmoid(level + per_decade * np.log10(maf / 1e-3)).astype(np.float32)

    def site_weights(self, frequency: np.ndarray) -> np.ndarray:
        """Weight of a mismatch at sites of ALT ``frequency`` [n], the squared distance of their alleles' embeddings."""
        # At the core's centre: the sines of a position of 0 are 0, and its cosines 1.
        position = np.repeat([0.0, 1.0], numbers.WAVELENGTHS)
        minor = frequency_features(np.minimum(frequency, 1 - frequency))
        features = np.concatenate([minor, np.broadcast_to(position, (len(minor), len(position)))], axis=1)
        # Not by BLAS, whose threads go on waiting for work while the loop needs their cores.
        modulation = np.einsum("nf,df->nd", features, self._of("embedding.modulation.weight"))
        modulation += self._of("embedding.modulation.bias")
        token, effect = (
            each[ALT] - each[REF] for each in map(self._of, ("embedding.token.weight", "embedding.effect.weight"))
        )
        found: np.ndarray = np.square(token + modulation * effect).sum(axis=1)
        return found

    def _of(self, name: str) -> np.ndarray:
        return self._weights[name].astype(np.float64)

    def _scaled(self, name: str) -> np.ndarray:
        return self._of(f"pooling.{name}") * numbers.COPYING_GAIN

    def _power(self, name: str, per_cm: float) -> np.ndarray:
        """A learned constant times a learned power of a density, for the slow and the fast model: [2]."""
        logarithm, exponent = self._scaled(name).reshape(2, 2)
        found: np.ndarray = np.exp(logarithm + exponent * math.log(per_cm))
        return found


def density(rows: np.ndarray, position: np.ndarray) -> float:
    """Typed sites per cM of a stretch, in units of :data:`embrag_ds.model.numbers.TYPICAL_DENSITY`."""
    length = max(float(position[-1] - position[0]), 1e-6)
    return len(rows) / (length * numbers.TYPICAL_DENSITY)


def log_rarity(frequency: np.ndarray) -> np.ndarray:
    """Scaled logarithm of the minor allele's frequency, from that of ALT, float32."""
    found: np.ndarray = np.log(np.maximum(np.minimum(frequency, 1 - frequency), numbers.RAREST)) / 4
    return found.astype(np.float32)


def frequency_features(frequency: np.ndarray) -> np.ndarray:
    """Fourier features [n, FREQUENCY_FEATURES] of allele frequencies [n]."""
    # Rounded as the network's are: near 1, what is left of a float32 is coarse.
    low, high = np.float32(numbers.LEAST_FREQUENCY), np.float32(1 - numbers.LEAST_FREQUENCY)
    clipped = frequency.astype(np.float32).clip(low, high)
    minor = np.minimum(clipped, np.float32(1) - clipped)
    arcsine = np.arcsin(np.sqrt(clipped.astype(np.float64))) * (2 / math.pi)
    logarithm = -np.log10(minor.astype(np.float64)) / 6
    octaves = math.pi * 2.0 ** np.arange(numbers.FREQUENCY_OCTAVES)
    angles = np.concatenate([arcsine[:, None] * octaves, logarithm[:, None] * octaves], axis=1)
    return np.concatenate([np.sin(angles), np.cos(angles), np.stack([arcsine, logarithm], axis=1)], axis=1)


def log_cm(length: np.ndarray) -> np.ndarray:
    """Scaled logarithm of a length in cM, finite at 0, float32."""
    found: np.ndarray = np.log(length + numbers.SHORTEST_CM) / 3
    return found.astype(np.float32)


def _weighed(values: np.ndarray, decay: float) -> np.ndarray:
    """Sum of ``values`` [G] around each place, those g places away times ``decay`` to the power of g."""
    before, after = values.copy(), values.copy()
    for place in range(1, len(values)):
        before[place] += decay * before[place - 1]
        after[-1 - place] += decay * after[-place]
    return before + after - values


def _sigmoid(value: np.ndarray) -> np.ndarray:
    found: np.ndarray = 1 / (1 + np.exp(-value))
    return found
