"""Functions of one number, parts of compiled loops, which compilers turn into vector instructions.

Those of a processor's library are called for one number at a time. Relative errors are below 3e-7, as far as not said.
"""

from __future__ import annotations

import math

import numpy as np

from embrag_ds.compiled.instructions import bits_of, from_bits, quotient
from embrag_ds.compiled.parts import compiled_part

LOG2_E = math.log2(math.e)
_TO_POWER = np.float32(LOG2_E)
_ONE, _TWO, _HALF = np.float32(1), np.float32(2), np.float32(0.5)
_SQRT_HALF = np.float32(math.sqrt(0.5))
_LOG_2 = np.float32(math.log(2))
_HALF_PI = np.float32(math.pi / 2)


@compiled_part
def power_of_two(x):
    """2 to the power of a float32 from -125 to 125; what lies beyond counts as that.

    x is a whole number and a rest, for which there is a polynomial.
    """
    x = min(max(x, np.float32(-125)), np.float32(125))
    whole = np.int32(np.int32(x + np.float32(200.5)) - 200)
    r = x - np.float32(whole)
    series = np.float32(0.001326697038665406) * r + np.float32(0.009675459745527012)
    series = series * r + np.float32(0.05550742616001791)
    series = series * r + np.float32(0.24022121753561543)
    series = series * r + np.float32(0.693146949161063)
    series = series * r + _ONE
    return series * from_bits(np.int32((whole + 127) << 23))


@compiled_part
def exponential(x):
    """exp(x), with a relative error of 3e-7 and 6e-8 of x."""
    return power_of_two(x * _TO_POWER)


@compiled_part
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return quotient(_ONE, _ONE + exponential(-x))


@compiled_part
def gelu(x):
    """x (1 + erf(x / sqrt 2)) / 2, with an error of 3e-7.

    The error function is that of Abramowitz and Stegun 7.1.26.
    """
    z = abs(x) * _SQRT_HALF
    t = quotient(_ONE, _ONE + np.float32(0.3275911) * z)
    series = np.float32(1.061405429) * t + np.float32(-1.453152027)
    series = series * t + np.float32(1.421413741)
    series = series * t + np.float32(-0.284496736)
    series = series * t + np.float32(0.254829592)
    rest = _HALF * series * t * exponential(-z * z)  # of the smaller side
    return x * (rest if x < 0 else _ONE - rest)


@compiled_part
def logarithm(x):
    """log x of a normal, positive float32.

    x is m 2^e with m in [.707, 1.414]; then log m = 2 artanh((m - 1) / (m + 1)), of which five terms are enough.
    """
    bits = bits_of(x)
    power = np.int32((bits - 0x3F3504F3) >> 23)
    m = from_bits(np.int32(bits - (power << 23)))
    s = quotient(m - _ONE, m + _ONE)
    square = s * s
    series = square * np.float32(1 / 9) + np.float32(1 / 7)
    series = series * square + np.float32(1 / 5)
    series = series * square + np.float32(1 / 3)
    series = series * square + _ONE
    return np.float32(power) * _LOG_2 + _TWO * s * series


@compiled_part
def arcsine(x):
    """asin(x) for x from 0 to 1, with an error of 1e-7 (Abramowitz and Stegun 4.4.46)."""
    series = np.float32(-0.0012624911) * x + np.float32(0.0066700901)
    series = series * x + np.float32(-0.0170881256)
    series = series * x + np.float32(0.0308918810)
    series = series * x + np.float32(-0.0501743046)
    series = series * x + np.float32(0.0889789874)
    series = series * x + np.float32(-0.2145988016)
    series = series * x + np.float32(1.5707963050)
    return _HALF_PI - math.sqrt(_ONE - x) * series


@compiled_part
def sine(x):
    """sin(x) for x from -pi / 2 to pi / 2, with an error of 1e-7, by its series."""
    square = x * x
    series = np.float32(-1 / 39916800) * square + np.float32(1 / 362880)
    series = series * square + np.float32(-1 / 5040)
    series = series * square + np.float32(1 / 120)
    series = series * square + np.float32(-1 / 6)
    return x * (series * square + _ONE)


@compiled_part
def cosine(x):
    """cos(x) for x from -pi / 2 to pi / 2, with an error of 1e-7, by its series."""
    square = x * x
    series = np.float32(1 / 479001600) * square + np.float32(-1 / 3628800)
    series = series * square + np.float32(1 / 40320)
    series = series * square + np.float32(-1 / 720)
    series = series * square + np.float32(1 / 24)
    series = series * square + np.float32(-0.5)
    return series * square + _ONE
