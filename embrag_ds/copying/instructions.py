"""Instructions that compilers do not find by themselves, parts of the loop along a stretch."""

from __future__ import annotations

from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic

ir: Any = cgutils.ir  # that of llvmlite, which numba depends on
_intrinsic: Any = intrinsic  # whose types do not say that it hides the first parameter
_EIGHT = ir.VectorType(ir.FloatType(), 8)


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
def add_row(typing_context: Any, into: Any, row: Any, values: Any, place: Any) -> Any:
    """Add row ``place`` of ``values`` to row ``row`` of ``into``, both contiguous float32 [n, 8], as one vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(ir.IntType(64), 0)
        vectors = []
        for array, given, number in ((into, *arguments[:2]), (values, *arguments[2:])):
            address = _address(context, builder, array, given, [_wide(builder, number), zero])
            vectors.append(builder.bitcast(address, _EIGHT.as_pointer()))
        loaded = [builder.load(vector, align=4) for vector in vectors]
        builder.store(builder.fadd(*loaded), vectors[0], align=4)
        return context.get_dummy_value()

    return types.none(into, row, values, place), generate


def _wide(builder: Any, number: Any) -> Any:
    """A number of any width as 64 bits; it is not negative."""
    return builder.zext(number, ir.IntType(64)) if number.type.width < 64 else number


def _address(context: Any, builder: Any, array: Any, value: Any, places: Any) -> Any:
    """Address of an element of an array."""
    found = context.make_array(array)(context, builder, value)
    return cgutils.get_item_pointer(context, builder, array, found, places, wraparound=False)
