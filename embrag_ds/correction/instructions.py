"""Instructions that compilers do not find by themselves, parts of the loop over tiles."""

from __future__ import annotations

from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic

ir: Any = cgutils.ir  # that of llvmlite, which numba depends on
_intrinsic: Any = intrinsic  # whose types do not say that it hides the first parameter
ROWS, COLUMNS = 4, 16
"""Rows and columns of a product that are computed at once."""
_LANES = 8
_VECTOR = ir.VectorType(ir.FloatType(), _LANES)
_FIRST = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
_FUSED = ("contract",)


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
        count = COLUMNS // _LANES
        sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(count)] for _ in range(ROWS)]
        for place in (each for row in sums for each in row):
            builder.store(ir.Constant(_VECTOR, [0.0] * _LANES), place)
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


@_intrinsic
def bits_of(typing_context: Any, number: Any) -> Any:
    """The bits of a float32, as an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@_intrinsic
def from_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 that has the bits of an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@_intrinsic
def quotient(typing_context: Any, dividend: Any, divisor: Any) -> Any:
    """``dividend / divisor``, both float32, without a test for 0, which a loop of vectors could not have."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fdiv(*arguments)

    return types.float32(types.float32, types.float32), generate


def _element(context: Any, builder: Any, kind: Any, value: Any, row: Any, column: Any) -> tuple[Any, Any]:
    """Address of an element of an array, and how many elements a row of it has."""
    array = context.make_array(kind)(context, builder, value)
    width = cgutils.unpack_tuple(builder, array.shape, 2)[1]
    return builder.gep(array.data, [builder.add(builder.mul(row, width), column)]), width


def _vector_at(builder: Any, start: Any, number: int) -> Any:
    """Address of the vector so many vectors behind an element."""
    return builder.bitcast(builder.gep(start, [_number(_LANES * number)]), _VECTOR.as_pointer())


def _repeated(builder: Any, value: Any) -> Any:
    """A vector of one value."""
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), _FIRST)


def _number(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)
