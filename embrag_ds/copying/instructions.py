"""Instructions that compilers do not find by themselves, parts of the loop along a stretch."""

from __future__ import annotations

from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic

ir: Any = cgutils.ir  # that of llvmlite, which numba depends on
_intrinsic: Any = intrinsic  # whose types do not say that it hides the first parameter
_EIGHT = ir.VectorType(ir.FloatType(), 8)
_FOUR = ir.VectorType(ir.FloatType(), 4)
_FIRST = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8)
_TWICE = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0, 1, 2, 3] * 2)
_FUSED = ("contract",)
LANES = 4
"""Target haplotypes that are copied at once. A row of states has those of the slow model and then of the fast one."""
ROWS, COLUMNS = 4, 16
"""Rows and columns of a product that are computed at once."""


@_intrinsic
def fetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Let the processor load element ``index``, at least 0, of a one-dimensional array, and do not wait for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, array, arguments[0], [_wide(builder, arguments[1])])
        bytes_ = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [bytes_, *[ir.IntType(32)] * 3])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        numbers = [ir.Constant(ir.IntType(32), number) for number in (0, 3, 1)]
        builder.call(function, [builder.bitcast(address, bytes_), *numbers])
        return context.get_dummy_value()

    return types.none(array, index), generate


@_intrinsic
def take(typing_context: Any, taken: Any, number: Any) -> Any:
    """Add an int64 to the element of ``taken`` int64 [1], as other threads do; returns what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, taken, arguments[0], [ir.Constant(ir.IntType(64), 0)])
        return builder.atomic_rmw("add", address, arguments[1], "monotonic")

    return types.int64(taken, types.int64), generate


@_intrinsic
def add_row(typing_context: Any, into: Any, row: Any, values: Any, place: Any) -> Any:
    """Add row ``place`` of ``values`` to row ``row`` of ``into``, both contiguous float32 [n, 8], as one vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _add_rows(context, builder, (into, row, values, place), arguments, _EIGHT)
        return context.get_dummy_value()

    return types.none(into, row, values, place), generate


@_intrinsic
def add_to_four(typing_context: Any, into: Any, row: Any, values: Any, place: Any) -> Any:
    """Add row ``place`` of ``values`` to row ``row`` of ``into``, both contiguous float32 [n, 4], as one vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _add_rows(context, builder, (into, row, values, place), arguments, _FOUR)
        return context.get_dummy_value()

    return types.none(into, row, values, place), generate


@_intrinsic
def add_product(typing_context: Any, into: Any, row: Any, states: Any, place: Any, prior: Any) -> Any:
    """Add row ``place`` of ``states`` times that of ``prior`` to row ``row`` of ``into``.

    ``states`` and ``into`` are contiguous float32 [n, 8]; ``prior`` float32 [n, 4] is that of both models.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, number, given, other, priors = arguments
        state = _load(context, builder, (states, given, other))
        of_both = _both(context, builder, (prior, priors, other))
        _add(context, builder, (into, to, number), builder.fmul(state, of_both, flags=_FUSED))
        return context.get_dummy_value()

    return types.none(into, row, states, place, prior), generate


@_intrinsic
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
        come = builder.fmul(added, of_both, flags=_FUSED)
        new = builder.fadd(builder.fmul(gain, state, flags=_FUSED), come, flags=_FUSED)
        builder.store(new, _row(context, builder, (into, to, number)), align=4)
        return context.get_dummy_value()

    return types.none(into, states, place, factors, row, prior), generate


@_intrinsic
def return_row(typing_context: Any, into: Any, states: Any, place: Any, factors: Any, row: Any) -> Any:
    """Set row ``place`` of ``into`` to that of ``states`` times factors, plus others, as :func:`forward_row` does."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, given, number, by_row, of = arguments
        state = _load(context, builder, (states, given, number))
        gain = _load(context, builder, (factors, by_row, of), width=16)
        added = _load(context, builder, (factors, by_row, of), width=16, first=8)
        new = builder.fadd(builder.fmul(gain, state, flags=_FUSED), added, flags=_FUSED)
        builder.store(new, _row(context, builder, (into, to, number)), align=4)
        return context.get_dummy_value()

    return types.none(into, states, place, factors, row), generate


@_intrinsic
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
            return builder.fadd(builder.fmul(product, behind, flags=_FUSED), summand, flags=_FUSED)

        come = builder.fmul(of_both, line(f[2], f[3]), flags=_FUSED)
        found = builder.fadd(builder.fmul(state, line(f[0], f[1]), flags=_FUSED), come, flags=_FUSED)
        above = builder.bitcast(builder.fcmp_ordered(">", found, limits), ir.IntType(8))
        both = builder.or_(above, builder.lshr(above, ir.Constant(ir.IntType(8), LANES)))
        lanes = builder.and_(both, ir.Constant(ir.IntType(8), (1 << LANES) - 1))
        builder.store(lanes, _address(context, builder, flags, to, [_wide(builder, number)]))
        return context.get_dummy_value()

    return types.none(flags, place, saved, beta, prior, factors, row, limit), generate


@_intrinsic
def zeros_below(typing_context: Any, word: Any) -> Any:
    """How many bits of a uint64, not 0, lie below the lowest that is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@_intrinsic
def zeros_above(typing_context: Any, word: Any) -> Any:
    """How many bits of a uint64, not 0, lie above the highest that is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@_intrinsic
def multiply(typing_context: Any, into: Any, left: Any, right: Any, places: Any, depth: Any) -> Any:
    """Set 4 x 16 elements of ``into`` to the product of ``depth`` columns of ``left`` and rows of ``right``.

    All are contiguous float32 with two dimensions. ``places`` are six int64: row and column of the first element of
    each. The sums stay in the processor's registers until they are complete.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places_of = cgutils.unpack_tuple(builder, arguments[3], 6)
        (to, width), (rows, row_width), (columns, column_width) = (
            _element(context, builder, kind, value, *places_of[2 * n : 2 * n + 2])
            for n, (kind, value) in enumerate(zip((into, left, right), arguments[:3], strict=True))
        )
        count = COLUMNS // _EIGHT.count
        sums = [[cgutils.alloca_once(builder, _EIGHT) for _ in range(count)] for _ in range(ROWS)]
        for place in (each for row in sums for each in row):
            builder.store(ir.Constant(_EIGHT, [0.0] * _EIGHT.count), place)
        with cgutils.for_range(builder, arguments[4]) as loop:
            here = builder.gep(columns, [builder.mul(loop.index, column_width)])
            vectors = [builder.load(_vector_at(builder, here, n), align=4) for n in range(count)]
            for m in range(ROWS):
                of_row = builder.add(builder.mul(_number(m), row_width), loop.index)
                factor = _repeated(builder, builder.load(builder.gep(rows, [of_row])))
                for n in range(count):
                    product = builder.fmul(factor, vectors[n], flags=_FUSED)
                    builder.store(builder.fadd(builder.load(sums[m][n]), product, flags=_FUSED), sums[m][n])
        for m in range(ROWS):
            row = builder.gep(to, [builder.mul(_number(m), width)])
            for n in range(count):
                builder.store(builder.load(sums[m][n]), _vector_at(builder, row, n), align=4)
        return context.get_dummy_value()

    return types.none(into, left, right, places, depth), generate


def _row(context: Any, builder: Any, given: Any, kind: Any = _EIGHT, width: int = 0, first: int = 0) -> Any:
    """Address of a vector in an array's row, from element ``first`` on; ``given`` are type, array and row.

    The array is contiguous, and a row has ``width`` elements, those of the vector by default. An array's own strides
    would take registers, of which there are too few for all arrays of a loop.
    """
    array, value, row = given
    data = context.make_array(array)(context, builder, value).data
    start = builder.mul(_wide(builder, row), ir.Constant(ir.IntType(64), width or kind.count))
    element = builder.add(start, ir.Constant(ir.IntType(64), first))
    return builder.bitcast(builder.gep(data, [element]), kind.as_pointer())


def _load(context: Any, builder: Any, given: Any, kind: Any = _EIGHT, width: int = 0, first: int = 0) -> Any:
    """That vector."""
    return builder.load(_row(context, builder, given, kind, width, first), align=4)


def _add(context: Any, builder: Any, into: Any, vector: Any, kind: Any = _EIGHT) -> None:
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


def _wide(builder: Any, number: Any) -> Any:
    """A number of any width as 64 bits; it is not negative."""
    return builder.zext(number, ir.IntType(64)) if number.type.width < 64 else number


def _address(context: Any, builder: Any, array: Any, value: Any, places: Any) -> Any:
    """Address of an element of an array."""
    found = context.make_array(array)(context, builder, value)
    return cgutils.get_item_pointer(context, builder, array, found, places, wraparound=False)


def _element(context: Any, builder: Any, kind: Any, value: Any, row: Any, column: Any) -> tuple[Any, Any]:
    """Address of an element of an array, and how many elements a row of it has."""
    array = context.make_array(kind)(context, builder, value)
    width = cgutils.unpack_tuple(builder, array.shape, 2)[1]
    return builder.gep(array.data, [builder.add(builder.mul(row, width), column)]), width


def _vector_at(builder: Any, start: Any, number: int) -> Any:
    """Address of the vector so many vectors behind an element."""
    return builder.bitcast(builder.gep(start, [_number(_EIGHT.count * number)]), _EIGHT.as_pointer())


def _repeated(builder: Any, value: Any) -> Any:
    """A vector of one value."""
    first = builder.insert_element(ir.Constant(_EIGHT, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, ir.Constant(_EIGHT, ir.Undefined), _FIRST)


def _number(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)
