"""Instructions for rows of states, parts of the loop along a stretch."""

from __future__ import annotations

from typing import Any

from numba.core import types

from embrag_ds.compiled.instructions import EIGHT, FUSED, address_of, as_intrinsic, ir, wide

_FOUR = ir.VectorType(ir.FloatType(), 4)
_TWICE = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0, 1, 2, 3] * 2)
LANES = 4
"""Target haplotypes that are copied at once. A row of states has those of the slow model and then of the fast one."""


@as_intrinsic
def add_row(typing_context: Any, into: Any, row: Any, values: Any, place: Any) -> Any:
    """Add row ``place`` of ``values`` to row ``row`` of ``into``, both contiguous float32 [n, 8], as one vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _add_rows(context, builder, (into, row, values, place), arguments, EIGHT)
        return context.get_dummy_value()

    return types.none(into, row, values, place), generate


@as_intrinsic
def add_to_four(typing_context: Any, into: Any, row: Any, values: Any, place: Any) -> Any:
    """Add row ``place`` of ``values`` to row ``row`` of ``into``, both contiguous float32 [n, 4], as one vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _add_rows(context, builder, (into, row, values, place), arguments, _FOUR)
        return context.get_dummy_value()

    return types.none(into, row, values, place), generate


@as_intrinsic
def add_product(typing_context: Any, into: Any, row: Any, states: Any, place: Any, prior: Any) -> Any:
    """Add row ``place`` of ``states`` times that of ``prior`` to row ``row`` of ``into``.

    ``states`` and ``into`` are contiguous float32 [n, 8]; ``prior`` float32 [n, 4] is that of both models.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, number, given, other, priors = arguments
        state = _load(context, builder, (states, given, other))
        of_both = _both(context, builder, (prior, priors, other))
        _add(context, builder, (into, to, number), builder.fmul(state, of_both, flags=FUSED))
        return context.get_dummy_value()

    return types.none(into, row, states, place, prior), generate


@as_intrinsic
def forward_row(typing_context: Any, into: Any, states: Any, place: Any, factors: Any, row: Any, prior: Any) -> Any:
    """Set row ``place`` of ``into`` to that of ``states`` times factors, plus that of ``prior`` times others.

    ``into`` and ``states`` are contiguous float32 [n, 8], and ``prior`` float32 [n, 4] is that of both models. Row
    ``row`` of ``factors`` float32 [m, 16] has the 8 of the states and those of the prior.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, given, number, by_row, of, priors = arguments
        state = _load(context, builder, (states, given, number))
        gain = _load(context, builder, (factors, by_row, of), width=16)
        added = _load(context, builder, (factors, by_row, of), width=16, first=8)
        of_both = _both(context, builder, (prior, priors, number))
        come = builder.fmul(added, of_both, flags=FUSED)
        new = builder.fadd(builder.fmul(gain, state, flags=FUSED), come, flags=FUSED)
        builder.store(new, _row(context, builder, (into, to, number)), align=4)
        return context.get_dummy_value()

    return types.none(into, states, place, factors, row, prior), generate


@as_intrinsic
def return_row(typing_context: Any, into: Any, states: Any, place: Any, factors: Any, row: Any) -> Any:
    """Set row ``place`` of ``into`` to that of ``states`` times factors, plus others, as :func:`forward_row` does."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, given, number, by_row, of = arguments
        state = _load(context, builder, (states, given, number))
        gain = _load(context, builder, (factors, by_row, of), width=16)
        added = _load(context, builder, (factors, by_row, of), width=16, first=8)
        new = builder.fadd(builder.fmul(gain, state, flags=FUSED), added, flags=FUSED)
        builder.store(new, _row(context, builder, (into, to, number)), align=4)
        return context.get_dummy_value()

    return types.none(into, states, place, factors, row), generate


@as_intrinsic
def flag_row(
    typing_context: Any,
    flags: Any,
    place: Any,
    saved: Any,
    beta: Any,
    prior: Any,
    factors: Any,
    row: Any,
    limit: Any,
) -> Any:
    """Set element ``place`` of ``flags`` uint8 to the lanes, as bits, where a bound is above a limit.

    With a row a of ``saved`` and b of ``beta``, contiguous float32 [n, 8], and p of ``prior`` float32 [n, 4], it is
    a (b f0 + f1) + p (b f2 + f3) in the slow or the fast model. Row ``row`` of ``factors`` float32 [m, 32] has those f,
    eight of each, and ``limit`` is float32 [1, 8].
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, number, given, other, priors, bounds, of, least = arguments
        state = _load(context, builder, (saved, given, number))
        behind = _load(context, builder, (beta, other, number))
        of_both = _both(context, builder, (prior, priors, number))
        f = [_load(context, builder, (factors, bounds, of), width=32, first=8 * n) for n in range(4)]
        limits = _load(context, builder, (limit, least, ir.Constant(ir.IntType(64), 0)))

        def line(product: Any, summand: Any) -> Any:
            return builder.fadd(builder.fmul(product, behind, flags=FUSED), summand, flags=FUSED)

        come = builder.fmul(of_both, line(f[2], f[3]), flags=FUSED)
        found = builder.fadd(builder.fmul(state, line(f[0], f[1]), flags=FUSED), come, flags=FUSED)
        above = builder.bitcast(builder.fcmp_ordered(">", found, limits), ir.IntType(8))
        both = builder.or_(above, builder.lshr(above, ir.Constant(ir.IntType(8), LANES)))
        lanes = builder.and_(both, ir.Constant(ir.IntType(8), (1 << LANES) - 1))
        builder.store(lanes, address_of(context, builder, flags, to, [wide(builder, number)]))
        return context.get_dummy_value()

    return types.none(flags, place, saved, beta, prior, factors, row, limit), generate


def _row(context: Any, builder: Any, given: Any, kind: Any = EIGHT, width: int = 0, first: int = 0) -> Any:
    """Address of a vector in an array's row, from element ``first`` on; ``given`` are type, array and row.

    The array is contiguous, and a row has ``width`` elements, those of the vector by default. An array's own strides
    would take registers, of which there are too few for all arrays of a loop.
    """
    array, value, row = given
    data = context.make_array(array)(context, builder, value).data
    start = builder.mul(wide(builder, row), ir.Constant(ir.IntType(64), width or kind.count))
    element = builder.add(start, ir.Constant(ir.IntType(64), first))
    return builder.bitcast(builder.gep(data, [element]), kind.as_pointer())


def _load(context: Any, builder: Any, given: Any, kind: Any = EIGHT, width: int = 0, first: int = 0) -> Any:
    """That vector."""
    return builder.load(_row(context, builder, given, kind, width, first), align=4)


def _add(context: Any, builder: Any, into: Any, vector: Any, kind: Any = EIGHT) -> None:
    """Add a vector to an array's row."""
    address = _row(context, builder, into, kind)
    builder.store(builder.fadd(builder.load(address, align=4), vector), address, align=4)


def _add_rows(context: Any, builder: Any, kinds: Any, arguments: Any, kind: Any) -> None:
    """Add an array's row to another's; ``kinds`` and ``arguments`` are those of :func:`add_row`."""
    into, _, values, _ = kinds
    to, number, given, other = arguments
    _add(context, builder, (into, to, number), _load(context, builder, (values, given, other), kind), kind)


def _both(context: Any, builder: Any, given: Any) -> Any:
    """The four numbers of an array's row, twice."""
    row = _load(context, builder, given, _FOUR)
    return builder.shuffle_vector(row, ir.Constant(_FOUR, ir.Undefined), _TWICE)
