"""Decorators of the functions that a compiled loop calls, and parts that all may call."""

from __future__ import annotations

from typing import Any

import numba

from embrag_ds.compiled.instructions import COLUMNS, ROWS, multiply

_njit: Any = numba.njit  # whose types lack an option
_FAST = {"reassoc", "contract", "nsz", "arcp"}

_WITHIN = {"inline": "never", "fastmath": _FAST, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Options of all. Only compiled functions may call a part: what Python would call takes a third of the time to compile,
and where Python calls one all the same, the process dies. Tests go through compiled functions of their own.
"""

compiled_part = _njit(**_WITHIN, _nrt=False)
"""Decorator of a function that a loop calls; it is kept on the disk as a part of that loop.

It makes no arrays. So it need not count who uses those that it is given, which takes longer than many a call itself.
"""
making_part = _njit(**_WITHIN, _nrt=True)
"""The same for a function that makes arrays. It says so, because numba would take over the option of a caller."""


@compiled_part
def assign(into, values):
    """Copy values to an array of one dimension. An assignment to a slice would make an array of its own for them."""
    for n in range(len(values)):
        into[n] = values[n]


@compiled_part
def product(into, left, right, rows, columns):
    """Fill ``into`` with the product of ``left`` and ``right``: so many of its rows and columns, in whole tiles.

    Columns of ``left`` beyond the rows of ``right`` do not count.
    """
    depth = len(right)
    for c in range(0, columns, COLUMNS):
        for r in range(0, rows, ROWS):
            multiply(into, left, right, (r, c, r, 0, 0, c), depth)
