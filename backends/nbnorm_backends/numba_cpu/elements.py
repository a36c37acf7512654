"""Load and store one element of an array, in the type it is computed in.

Numba has no 16-bit floats on the CPU, so kernels see float16 as uint16 and bfloat16 as int16: the integer type says
which it is. A load converts to the type of the computation, a store to the array's, rounding to nearest, ties to even.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array
from numpy.typing import NDArray

from nbnorm_backends.numba_cpu.inner import Inner

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()

LINE = 64  # bytes of a cache line
# What only kernels call needs no way in from Python or C, without which compilation takes three quarters of its time,
# and no machine code of its own.
INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": Inner}
# Nor does it count references to arrays, which are the caller's, unless it makes or returns one: to count those of a
# slice takes 5 ns, even where nobody owns it, and a row has thirty.
COUNTED, UNCOUNTED = ({**INNER, "_nrt": counts} for counts in (True, False))
CARRIERS = {"float16": np.uint16, "bfloat16": np.int16}


def carried(array: NDArray[Any]) -> NDArray[Any]:
    """The array as kernels take it: half types as the integers that carry them."""
    return array if array.dtype.itemsize > 2 else array.view(CARRIERS[array.dtype.name])


def converts_float16() -> bool:
    """Whether one instruction converts float16: on x86 F16C has it.

    Where none does, LLVM calls a library function that is not linked, and the process dies: so bits are converted.
    """
    return _instructions("f16c")


def fuses_multiply_add() -> bool:
    """Whether a * b + c rounded once is one instruction, and not a call."""
    return _instructions("fma")


def widens_to_512_bits() -> bool:
    """Whether `widest_vectors` makes vectors wider than 256 bits; on AArch64, of which that is not known, too."""
    return _instructions("avx512f")


def _instructions(name: str) -> bool:
    """Whether Numba makes code with this extension of x86; AArch64 has what it stands for, others count as without."""
    triple = llvmlite.binding.get_default_triple()
    if not triple.startswith(("x86_64", "i686")):
        return bool(triple.startswith(("aarch64", "arm64")))
    if config.CPU_NAME or config.CPU_FEATURES is not None:  # a processor named by the user: only what is spelled out
        return f"+{name}" in (config.CPU_FEATURES or "")
    return bool(llvmlite.binding.get_host_cpu_features().get(name, False))


@intrinsic
def load(typing_context: Any, array: Any, index: Any) -> Any:
    """float64(array[index]); index is not negative."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _loaded(context, builder, array, args[0], args[1], types.float64)

    return types.float64(array, types.intp), generate


@intrinsic
def store(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value; index is not negative. Nothing where the array is None."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not isinstance(array, types.NoneType):
            _store(context, builder, array, *args)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def increase(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] += value, for a float32 or float64 array; nothing where it is None."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not isinstance(array, types.NoneType):
            target, position, term = args
            old = _loaded(context, builder, array, target, position, array.dtype)
            total = builder.fadd(old, _converted(builder, term, old.type), flags=("contract",))
            _store(context, builder, array, target, position, total)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def put(typing_context: Any, stream: Any, array: Any, index: Any, value: Any) -> Any:
    """`store`; unless `stream` is None, past the caches: for whole rows of whole cache lines that nobody reads soon.

    An ordinary store reads the line that it overwrites. The alignment of 64 bytes is that of the vectors which LLVM
    makes of the loop, and takes from here; it is not that of single elements.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not isinstance(array, types.NoneType):
            streaming = not isinstance(stream, types.NoneType)
            _store(context, builder, array, *args[1:], streaming=streaming)
        return context.get_dummy_value()

    return types.void(stream, array, types.intp, value), generate


@intrinsic
def borrowed(typing_context: Any, array: Any) -> Any:
    """The same array, or tuple of arrays, of whose slices nobody counts references: for arguments, which the caller
    keeps alive, and which a kernel hands to functions that count.

    Counting is atomic and takes 10 ns or more a slice, and 100 where threads count one array: without it rows of 3 are
    divided 9 times faster, of 16, 5 times, and batch norm channels last is applied 1.8 times faster.
    """

    def lent(context: Any, builder: Any, kind: Any, value: Any) -> Any:
        if isinstance(kind, types.BaseTuple):
            values = zip(kind, cgutils.unpack_tuple(builder, value), strict=True)
            return context.make_tuple(builder, kind, [lent(context, builder, *each) for each in values])
        found = context.make_array(kind)(context, builder, value)
        found.meminfo = cgutils.get_null_value(found.meminfo.type)
        found.parent = cgutils.get_null_value(found.parent.type)
        return found._getvalue()

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if isinstance(array, types.NoneType):
            return context.get_dummy_value()
        return lent(context, builder, array, args[0])

    return array(array), generate


def _slice(array: Any) -> Any:
    """The type of a row of an array."""
    layout = "C" if array.layout == "C" else "A"
    return types.Array(array.dtype, 1, layout, readonly=not array.mutable, aligned=array.aligned)


def _view(context: Any, builder: Any, kind: Any, like: Any, data: Any, size: Any, stride: Any) -> Any:
    """A row at that address, which owns nothing and is owned by nobody."""
    view = context.make_array(kind)(context, builder)
    parts = {"shape": [size], "strides": [stride], "itemsize": like.itemsize, "meminfo": None}
    populate_array(view, data=builder.bitcast(data, view.data.type), **parts)
    return view._getvalue()


@intrinsic
def row_at(typing_context: Any, array: Any, index: Any) -> Any:
    """array[index], a row along the last axis; None of None. Without wrapping around, and nobody counts references."""
    if isinstance(array, types.NoneType):
        return array(array, index), lambda context, builder, signature, args: context.get_dummy_value()

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = context.make_array(array)(context, builder, args[0])
        strides = cgutils.unpack_tuple(builder, source.strides)
        data = builder.bitcast(source.data, I8.as_pointer())
        for place, stride in zip(cgutils.unpack_tuple(builder, args[1]), strides, strict=False):
            data = builder.gep(data, [builder.mul(place, stride)])
        size = cgutils.unpack_tuple(builder, source.shape)[-1]
        return _view(context, builder, signature.return_type, source, data, size, strides[-1])

    return _slice(array)(array, index), generate


@intrinsic
def span(typing_context: Any, array: Any, begin: Any, end: Any) -> Any:
    """array[begin:end] of a row; None of None. As `row_at`."""
    if isinstance(array, types.NoneType):
        return array(array, begin, end), lambda context, builder, signature, args: context.get_dummy_value()

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = context.make_array(array)(context, builder, args[0])
        (stride,) = cgutils.unpack_tuple(builder, source.strides)
        data = builder.gep(builder.bitcast(source.data, I8.as_pointer()), [builder.mul(args[1], stride)])
        return _view(context, builder, signature.return_type, source, data, builder.sub(args[2], args[1]), stride)

    return _slice(array)(array, types.intp, types.intp), generate


# ---- operands that may be None, one number, or an array: compiled for what they are ---------------------------------


@intrinsic
def at(typing_context: Any, operand: Any, index: Any) -> Any:
    """The number itself, or the array's element, as float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _loaded(context, builder, operand, args[0], args[1], types.float64)

    return types.float64(operand, types.intp), generate


@intrinsic
def at_like(typing_context: Any, like: Any, operand: Any, index: Any) -> Any:
    """`at` in the type that a loop computes in: that of `like`, float32 or float64, one number or an array of them."""
    real = like.dtype if isinstance(like, types.Array) else like

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _loaded(context, builder, operand, args[1], args[2], real)

    return real(like, operand, types.intp), generate


@intrinsic
def element(typing_context: Any, like: Any, array: Any, i: Any, k: Any, j: Any) -> Any:
    """array[i, k, j] in the type of the array `like`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _loaded(context, builder, array, args[1], args[2:], like.dtype)

    return like.dtype(like, array, types.intp, types.intp, types.intp), generate


@intrinsic
def plus(typing_context: Any, value: Any, operand: Any, index: Any) -> Any:
    """value + operand; value alone where the operand is None."""
    return value(value, operand, types.intp), _joined("fadd", value, operand)


@intrinsic
def minus(typing_context: Any, value: Any, operand: Any, index: Any) -> Any:
    """value - operand; value alone where the operand is None."""
    return value(value, operand, types.intp), _joined("fsub", value, operand)


@intrinsic
def times(typing_context: Any, value: Any, operand: Any, index: Any) -> Any:
    """value * operand; value alone where the operand is None."""
    return value(value, operand, types.intp), _joined("fmul", value, operand)


def _joined(operation: str, real: Any, operand: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, other, index = args
        if isinstance(operand, types.NoneType):
            return value
        other = _loaded(context, builder, operand, other, index, real)
        return getattr(builder, operation)(value, other, flags=("contract",))

    return generate


@intrinsic
def keep(typing_context: Any, mask: Any, index: Any, value: Any) -> Any:
    """The value where the mask is None or not 0 there, else 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        flags, index, value = args
        if isinstance(mask, types.NoneType):
            return value
        flag = builder.load(_pointer(context, builder, mask, flags, index))
        valid = builder.icmp_unsigned("!=", flag, ir.Constant(flag.type, 0))
        return builder.select(valid, value, ir.Constant(value.type, 0.0))

    return value(mask, types.intp, value), generate


@intrinsic(prefer_literal=True)
def touch(typing_context: Any, array: Any, index: Any, size: Any) -> Any:
    """Ask for the cache lines of array[index : index + size], in all caches, and go on; `size` is a literal."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = builder.bitcast(_pointer(context, builder, array, *args[:2]), I8.as_pointer())
        prefetch = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [I8.as_pointer()], prefetch)
        for offset in range(0, size.literal_value * array.dtype.bitwidth // 8, LINE):
            # For reading, locality 3 of 0..3, data.
            builder.call(function, [builder.gep(first, [I32(offset)]), I32(0), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp, size), generate


@intrinsic
def widest_vectors(typing_context: Any) -> Any:
    """Let the function that calls this use vectors of 512 bits, where the processor has them, and keep those that no
    register has room for at whole cache lines: norms with gelu take 0.98 of their time."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for attribute in ('"prefer-vector-width"="512"', '"min-legal-vector-width"="512"', '"stackrealign"'):
            set.add(builder.function.attributes, attribute)  # llvmlite's own `add` knows no pairs
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def interleaved(typing_context: Any, function: Any, count: Any, vectors: Any, begin: Any, operands: Any) -> Any:
    """function(begin + i, *operands) for every i below `count`, so many vectors in turn; both numbers are literals.

    LLVM takes one vector after the other where a step is long, and reads the constants of an activation with each, for
    which there are not registers enough.
    """
    called = function.get_call_type(typing_context, (types.intp, *operands.types), {})

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = args[3]
        end = builder.add(first, first.type(count.literal_value))
        _loop(context, builder, (function, called), (first, end), args[4], "interleave.count", vectors.literal_value)
        return context.get_dummy_value()

    return types.void(function, count, vectors, begin, operands), generate


@intrinsic(prefer_literal=True)
def summed(typing_context: Any, function: Any, lanes: Any, begin: Any, end: Any, operands: Any) -> Any:
    """The sums over [begin, end), never empty, of both results of function(i, *operands), in any order, by vectors
    of so many elements: LLVM would take as many as the widest type that occurs has in a register."""
    called = function.get_call_type(typing_context, (types.intp, *operands.types), {})

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bounds, lanes_wanted = (args[2], args[3]), lanes.literal_value
        sums = _loop(context, builder, (function, called), bounds, args[4], "vectorize.width", lanes_wanted)
        return cgutils.pack_array(builder, sums)

    return called.return_type(function, lanes, begin, end, operands), generate


def _loop(
    context: Any, builder: Any, function: tuple[Any, Any], bounds: tuple[Any, Any], operands: Any, hint: str, value: int
) -> list[Any]:
    """A loop of calls with metadata llvm.loop.`hint`, which Numba has no way to write; the sums of what they return."""
    step, (first, end), module = context.get_function(*function), bounds, builder.module
    context.add_linking_libs(step.libs)
    before, loop, behind = builder.block, *(builder.append_basic_block(name) for name in ("loop", "behind"))
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(first.type)
    returned = function[1].return_type
    sums = [builder.phi(context.get_value_type(real)) for real in (() if returned == types.none else returned)]
    found = step(builder, (i, *cgutils.unpack_tuple(builder, operands)))
    terms = cgutils.unpack_tuple(builder, found) if sums else []
    totals = [builder.fadd(s, t, flags=("reassoc", "contract", "nsz")) for s, t in zip(sums, terms, strict=True)]
    following = builder.add(i, first.type(1))
    for phi, begin, again in ((i, first, following), *((s, s.type(0.0), t) for s, t in zip(sums, totals, strict=True))):
        phi.add_incoming(begin, before)
        phi.add_incoming(again, builder.block)
    back = builder.cbranch(builder.icmp_signed("<", following, end), loop, behind)
    wanted = module.add_metadata([ir.MetaDataString(module, f"llvm.loop.{hint}"), I32(value)])
    own = module.add_metadata([wanted, wanted])
    own.operands = own, wanted  # the metadata of a loop hold themselves, by which LLVM knows them
    back.set_metadata("llvm.loop", own)
    builder.position_at_end(behind)
    return totals


def chosen(choose: Callable[..., Callable[..., Any]] | None = None, *, counted: bool = False) -> Callable[..., Any]:
    """A function for kernels, compiled as the one that `choose` returns for the types of its arguments.

    An ``if`` in one function would not do: Numba types both branches. `counted`: it makes or returns an array. (Numba
    refuses that otherwise, unless the array is an argument or in a tuple: its owner would be told once too often that
    nobody needs it.)
    """
    if choose is None:
        return partial(chosen, counted=counted)

    def stub(*_: Any) -> Any:
        raise NotImplementedError("for kernels")

    options = COUNTED if counted else UNCOUNTED
    overload(stub, jit_options={"error_model": "numpy", "forceinline": True, **options})(choose)
    return stub


def optional(
    nothing: Callable[..., Any], *, counted: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for kernels; where its first argument is None, compile `nothing`, of the same parameters."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def choose(first: Any, *_: Any) -> Callable[..., Any]:
            return nothing if isinstance(first, types.NoneType) else function

        choose.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return chosen(choose, counted=counted)

    return decorate


# ---- the code that they make -----------------------------------------------------------------------------------------


def _loaded(context: Any, builder: Any, operand: Any, value: Any, index: Any, real: Any) -> Any:
    """The element of an array, or the number itself, as a `real`."""
    if isinstance(operand, types.Array):
        value = builder.load(_pointer(context, builder, operand, value, index))
        if operand.dtype == types.uint16:
            value = _from_float16(builder, value)
        elif operand.dtype == types.int16:
            value = builder.bitcast(builder.shl(builder.zext(value, I32), ir.Constant(I32, 16)), F32)
    return _converted(builder, value, F32 if real == types.float32 else F64)


def _converted(builder: Any, value: Any, real: Any) -> Any:
    """float32 or float64 as the other, or as it is."""
    if value.type == real:
        return value
    return builder.fpext(value, F64) if real == F64 else builder.fptrunc(value, F32)


def _store(
    context: Any, builder: Any, array: Any, target: Any, index: Any, value: Any, *, streaming: bool = False
) -> None:
    value = _converted(builder, value, F64 if array.dtype == types.float64 else F32)
    if array.dtype == types.uint16:
        value = _float16_bits(builder, value)
    elif array.dtype == types.int16:
        value = _bfloat16_bits(builder, value)
    pointer = _pointer(context, builder, array, target, index)
    if streaming:
        stored = builder.store(value, pointer, align=LINE)
        stored.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
    else:
        builder.store(value, pointer)


def _pointer(context: Any, builder: Any, array: Any, value: Any, index: Any) -> Any:
    view = context.make_array(array)(context, builder, value)
    indices = list(index) if isinstance(index, tuple | list) else [index]
    return cgutils.get_item_pointer(context, builder, array, view, indices, wraparound=False)


def _from_float16(builder: Any, half: Any) -> Any:
    """The float32 that is equal to a float16, from its bits: exponents are 112 higher, mantissas 13 bits longer.

    Every case is computed and one selected, so that loops stay vectors. No float32 on the way is denormal: a program
    may have them count as zero.
    """
    if converts_float16():
        return builder.fpext(builder.bitcast(half, F16), F32)
    word = builder.zext(half, I32)
    size = builder.and_(word, I32(0x7FFF))
    longer = builder.shl(size, I32(13))
    normal = builder.add(longer, I32(112 << 23))
    special = builder.or_(longer, I32(0x7F800000))  # infinity and NaN
    denormal = builder.bitcast(builder.fmul(builder.sitofp(size, F32), F32(2.0**-24)), I32)
    found = builder.select(builder.icmp_unsigned("<", size, I32(0x7C00)), normal, special)
    found = builder.select(builder.icmp_unsigned("<", size, I32(0x0400)), denormal, found)
    sign = builder.shl(builder.and_(word, I32(0x8000)), I32(16))
    return builder.bitcast(builder.or_(found, sign), F32)


def _float16_bits(builder: Any, value: Any) -> Any:
    """The bits of a float32 rounded to float16, to nearest, ties to even; a NaN becomes the quiet one of its sign."""
    if converts_float16():
        return builder.bitcast(builder.fptrunc(value, F16), I16)
    word = builder.bitcast(value, I32)
    size = builder.and_(word, I32(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(word, I32(13)), I32(1))
    normal = builder.lshr(builder.add(size, builder.sub(odd, I32((112 << 23) - 0xFFF))), I32(13))
    # Behind 1/2 the last place of a float32 is that of denormal halves. "nsz" is without effect: instructions with no
    # flag of their own get those of the kernel, of which "contract" would round a product before it only here.
    rounded = builder.fadd(builder.bitcast(size, F32), F32(0.5), flags=("nsz",))
    denormal = builder.sub(builder.bitcast(rounded, I32), I32(0x3F000000))
    found = builder.select(builder.icmp_unsigned("<", size, I32(113 << 23)), denormal, normal)
    found = builder.select(builder.icmp_unsigned("<", size, I32(143 << 23)), found, I32(0x7C00))
    found = builder.select(builder.icmp_unsigned(">", size, I32(0x7F800000)), I32(0x7E00), found)
    sign = builder.and_(builder.lshr(word, I32(16)), I32(0x8000))
    return builder.trunc(builder.or_(found, sign), I16)


def _bfloat16_bits(builder: Any, value: Any) -> Any:
    """The upper half of a float32, rounded to nearest, ties to even; a NaN becomes the quiet one of its sign.

    It is lowered to that first, so that rounding does not carry into the sign: arithmetic leaves none that is less.
    """
    bits = builder.bitcast(value, I32)
    for quiet, order in ((0x7FC00000, builder.icmp_signed), (0xFFC00000, builder.icmp_unsigned)):
        bits = builder.select(order("<", bits, I32(quiet)), bits, I32(quiet))
    odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    rounded = builder.add(bits, builder.add(odd, I32(0x7FFF)))
    return builder.trunc(builder.lshr(rounded, I32(16)), I16)
