"""Functions of one number and products of matrices, parts of compiled loops, beside numpy in float64."""

from __future__ import annotations

import math

import numba
import numpy as np
import pytest

from embrag_ds.compiled import functions
from embrag_ds.compiled.parts import product


def each(function):
    """A compiled function of an array; Python itself cannot call a part of the loop."""

    @numba.njit
    def over(values):
        found = np.empty_like(values)
        for n in range(len(values)):
            found[n] = function(values[n])
        return found

    return over


ERROR = np.vectorize(math.erf)
UNIT = np.linspace(0, 1, 20001)
HALF_TURN = np.linspace(-math.pi / 2, math.pi / 2, 20001)
WIDE = np.concatenate([np.linspace(-80, 80, 20001), [0.0, -0.0, 1e-30, -1e-7]])
POSITIVE = np.logspace(-37, 37, 20001)


@pytest.mark.parametrize(
    ("function", "values", "oracle", "relative", "absolute"),
    [
        (functions.power_of_two, WIDE, np.exp2, 3e-7, 0),
        (functions.exponential, WIDE / 16, np.exp, 1e-6, 0),
        (functions.sigmoid, WIDE, lambda x: 1 / (1 + np.exp(-x)), 6e-6, 1e-30),
        (functions.gelu, WIDE / 8, lambda x: x * (1 + ERROR(x / math.sqrt(2))) / 2, 3e-7, 3e-7),
        (functions.logarithm, POSITIVE, np.log, 3e-7, 1e-7),
        (functions.arcsine, UNIT, np.arcsin, 3e-7, 3e-7),
        (functions.sine, HALF_TURN, np.sin, 0, 2e-7),
        (functions.cosine, HALF_TURN, np.cos, 0, 2e-7),
    ],
)
def test_functions_are_those_of_numpy(function, values, oracle, relative, absolute) -> None:
    given = values.astype(np.float32)
    found = each(function)(given)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, oracle(given.astype(np.float64)), rtol=relative, atol=absolute)


def test_powers_stay_finite_whatever_the_exponent() -> None:
    given = np.array([-1e30, -126, -125, 125, 126, 1e30], dtype=np.float32)
    low, high = 2.0**-125, 2.0**125
    np.testing.assert_allclose(each(functions.power_of_two)(given), [low, low, low, high, high, high], rtol=3e-7)


@numba.njit
def multiplied(into, left, right, rows, columns):
    product(into, left, right, rows, columns)


@pytest.mark.parametrize(("rows", "columns", "depth"), [(4, 16, 1), (4, 16, 16), (12, 48, 33), (3, 5, 7)])
def test_products_are_those_of_numpy_in_whole_tiles(rows: int, columns: int, depth: int) -> None:
    rng = np.random.default_rng(rows)
    left, right = rng.normal(size=(12, depth)).astype(np.float32), rng.normal(size=(depth, 48)).astype(np.float32)
    into = np.full((12, 48), 7, dtype=np.float32)
    multiplied(into, left, right, rows, columns)
    expected = np.full((12, 48), 7.0)
    whole = -(-rows // 4) * 4, -(-columns // 16) * 16
    expected[: whole[0], : whole[1]] = (left.astype(np.float64) @ right)[: whole[0], : whole[1]]
    np.testing.assert_allclose(into, expected, rtol=1e-5, atol=1e-5)
