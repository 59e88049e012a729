"""Joint distribution of a sample's two alleles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.dependence import INDEPENDENT, Dependence

probabilities = st.integers(0, 1000).map(lambda value: value / 1000)


@given(probabilities, probabilities, probabilities, probabilities)
def test_every_dependence_keeps_both_haplotypes(p: float, q: float, first: float, second: float) -> None:
    dependence = Dependence(first * second, first * (1 - second))
    less = float(dependence.less(np.array(p), np.array(q)))
    ref, alt = (1 - p) * (1 - q) - less, p * q - less
    apart = [p - alt, q - alt]  # ALT on the first haplotype alone, and on the second
    assert min(ref, alt, *apart) > -1e-12
    assert ref + alt + sum(apart) == pytest.approx(1)


@pytest.mark.parametrize(
    ("dependence", "both", "none"),
    [(INDEPENDENT, 0.12, 0.42), (Dependence(opposite=1), 0.0, 0.3), (Dependence(alike=1), 0.3, 0.6)],
)
def test_extremes(dependence: Dependence, both: float, none: float) -> None:
    """By hand, of p = .3 and q = .4: ALT on both at least 0 and at most .3, the smaller of both."""
    less = dependence.less(np.array(0.3), np.array(0.4))
    assert (0.3 * 0.4 - less, 0.7 * 0.6 - less) == pytest.approx((both, none))


def test_units() -> None:
    dependence = Dependence(0.3, 0.5)
    assert dependence.less(np.array(300), np.array(400), 1000) == pytest.approx(
        1e6 * dependence.less(np.array(0.3), np.array(0.4))
    )


@pytest.mark.parametrize("weights", [(-0.1, 0.0), (0.0, -0.1), (0.6, 0.5), (float("nan"), 0.0)])
def test_weights_that_cannot_be(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="no weights"):
        Dependence(*weights)
