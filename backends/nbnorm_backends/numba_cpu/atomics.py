"""Atomic counters."""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ORDER = "seq_cst"
I64 = ir.IntType(64)


@intrinsic
def add(typing_context: Any, counters: Any, index: Any, value: Any) -> Any:
    """counters[index] += value; returns what was there before. int64, as below."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(context, builder, counters, *args[:2]), args[2], ORDER)

    return types.int64(counters, types.intp, types.int64), generate


@intrinsic
def get(typing_context: Any, counters: Any, index: Any) -> Any:
    """counters[index]"""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, counters, *args), ORDER, 8)

    return types.int64(counters, types.intp), generate


@intrinsic
def add_at(typing_context: Any, address: Any, value: Any) -> Any:
    """The same to the int64 at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), args[1], ORDER)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def fence(typing_context: Any) -> Any:
    """What was stored before, past the caches too, is seen by whoever sees a later atomic store."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence(ORDER)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def pause(typing_context: Any) -> Any:
    """Let the core's other thread go first, where the processor has an instruction for that; about 40 cycles."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if llvmlite.binding.get_default_triple().startswith(("x86_64", "i686")):
            hint = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, hint, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


def _pointer(context: Any, builder: Any, counters: Any, value: Any, index: Any) -> Any:
    view = context.make_array(counters)(context, builder, value)
    return cgutils.get_item_pointer(context, builder, counters, view, [index], wraparound=False)
