"""Instructions that compilers do not find by themselves, parts of the loop over tiles."""

from __future__ import annotations

from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic

ir: Any = cgutils.ir  # that of llvmlite, which numba depends on
_intrinsic: Any = intrinsic  # whose types do not say that it hides the first parameter


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
