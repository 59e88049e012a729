"""Instructions that compilers do not find by themselves, for compiled loops."""

from __future__ import annotations

from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic

ir: Any = cgutils.ir  # that of llvmlite, which numba depends on
as_intrinsic: Any = intrinsic  # whose types do not say that it hides the first parameter
EIGHT = ir.VectorType(ir.FloatType(), 8)
FUSED = ("contract",)
ROWS, COLUMNS = 4, 16
"""Rows and columns of a product that are computed at once."""
_FIRST = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8)


@as_intrinsic
def fetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Let the processor load element ``index``, at least 0, of a one-dimensional array, and do not wait for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = address_of(context, builder, array, arguments[0], [wide(builder, arguments[1])])
        bytes_ = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [bytes_, *[ir.IntType(32)] * 3])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        numbers = [ir.Constant(ir.IntType(32), number) for number in (0, 3, 1)]
        builder.call(function, [builder.bitcast(address, bytes_), *numbers])
        return context.get_dummy_value()

    return types.none(array, index), generate


@as_intrinsic
def take(typing_context: Any, taken: Any, number: Any) -> Any:
    """Add an int64 to the element of ``taken`` int64 [1], as other threads do; returns what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = address_of(context, builder, taken, arguments[0], [ir.Constant(ir.IntType(64), 0)])
        return builder.atomic_rmw("add", address, arguments[1], "monotonic")

    return types.int64(taken, types.int64), generate


@as_intrinsic
def zeros_below(typing_context: Any, word: Any) -> Any:
    """How many bits of a uint64, not 0, lie below the lowest that is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@as_intrinsic
def zeros_above(typing_context: Any, word: Any) -> Any:
    """How many bits of a uint64, not 0, lie above the highest that is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@as_intrinsic
def bits_of(typing_context: Any, number: Any) -> Any:
    """The bits of a float32, as an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@as_intrinsic
def from_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 that has the bits of an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@as_intrinsic
def quotient(typing_context: Any, dividend: Any, divisor: Any) -> Any:
    """``dividend / divisor``, both float32, without a test for 0, which a loop of vectors could not have."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fdiv(*arguments)

    return types.float32(types.float32, types.float32), generate


@as_intrinsic
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
        count = COLUMNS // EIGHT.count
        sums = [[cgutils.alloca_once(builder, EIGHT) for _ in range(count)] for _ in range(ROWS)]
        for place in (each for row in sums for each in row):
            builder.store(ir.Constant(EIGHT, [0.0] * EIGHT.count), place)
        with cgutils.for_range(builder, arguments[4]) as loop:
            here = builder.gep(columns, [builder.mul(loop.index, column_width)])
            vectors = [builder.load(_vector_at(builder, here, n), align=4) for n in range(count)]
            for m in range(ROWS):
                of_row = builder.add(builder.mul(_number(m), row_width), loop.index)
                factor = _repeated(builder, builder.load(builder.gep(rows, [of_row])))
                for n in range(count):
                    product = builder.fmul(factor, vectors[n], flags=FUSED)
                    builder.store(builder.fadd(builder.load(sums[m][n]), product, flags=FUSED), sums[m][n])
        for m in range(ROWS):
            row = builder.gep(to, [builder.mul(_number(m), width)])
            for n in range(count):
                builder.store(builder.load(sums[m][n]), _vector_at(builder, row, n), align=4)
        return context.get_dummy_value()

    return types.none(into, left, right, places, depth), generate


def wide(builder: Any, number: Any) -> Any:
    """A number of any width as 64 bits; it is not negative."""
    return builder.zext(number, ir.IntType(64)) if number.type.width < 64 else number


def address_of(context: Any, builder: Any, array: Any, value: Any, places: Any) -> Any:
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
    return builder.bitcast(builder.gep(start, [_number(EIGHT.count * number)]), EIGHT.as_pointer())


def _repeated(builder: Any, value: Any) -> Any:
    """A vector of one value."""
    first = builder.insert_element(ir.Constant(EIGHT, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, ir.Constant(EIGHT, ir.Undefined), _FIRST)


def _number(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)
