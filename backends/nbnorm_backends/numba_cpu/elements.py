"""Load and store one element of an array, in the type it is computed in.

Numba has no 16-bit floats on the CPU, so kernels see float16 as uint16 and bfloat16 as int16: the integer type says
which it is. A load widens to float64, a store narrows to the array's type, rounding to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic
from numpy.typing import NDArray

I16, I32 = ir.IntType(16), ir.IntType(32)
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()

CARRIERS = {"float16": np.uint16, "bfloat16": np.int16}


def carried(array: NDArray[Any]) -> NDArray[Any]:
    """The array as kernels take it: half types as the integers that carry them."""
    return array if array.dtype.itemsize > 2 else array.view(CARRIERS[array.dtype.name])


def converts_float16() -> bool:
    """Whether the machine code that Numba makes here can convert float16: x86 needs the F16C instructions.

    Without them LLVM calls a library function that is not linked, and the process dies.
    """
    if not llvmlite.binding.get_default_triple().startswith(("x86_64", "i686")):
        return True
    if config.CPU_NAME or config.CPU_FEATURES is not None:  # a processor named by the user: only what is spelled out
        return "+f16c" in (config.CPU_FEATURES or "")
    return bool(llvmlite.binding.get_host_cpu_features().get("f16c", False))


@intrinsic
def load(typing_context: Any, array: Any, index: Any) -> Any:
    """float64(array[index]); index is not negative."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_pointer(context, builder, signature, args))
        if array.dtype == types.uint16:
            value = builder.fpext(builder.bitcast(value, F16), F32)
        elif array.dtype == types.int16:
            value = builder.bitcast(builder.shl(builder.zext(value, I32), ir.Constant(I32, 16)), F32)
        return value if array.dtype == types.float64 else builder.fpext(value, F64)

    return types.float64(array, types.intp), generate


@intrinsic
def store(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value, a float64; index is not negative."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[2]
        if array.dtype != types.float64:
            value = builder.fptrunc(value, F32)
        if array.dtype == types.uint16:
            value = builder.bitcast(builder.fptrunc(value, F16), I16)
        elif array.dtype == types.int16:
            value = _bfloat16_bits(builder, value)
        builder.store(value, _pointer(context, builder, signature, args))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float64), generate


def _pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array_type = signature.args[0]
    array = context.make_array(array_type)(context, builder, args[0])
    return cgutils.get_item_pointer(context, builder, array_type, array, [args[1]], wraparound=False)


def _bfloat16_bits(builder: Any, value: Any) -> Any:
    """The upper half of a float32, rounded to nearest, ties to even; a NaN stays one."""
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(I32, 0x7FFF)))
    quiet = builder.or_(bits, ir.Constant(I32, 0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, ir.Constant(I32, 16)), I16)
