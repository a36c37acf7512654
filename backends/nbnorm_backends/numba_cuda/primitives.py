"""What kernels do that depends on the element type: loads and stores, and elementary functions. The device's side.

float16 and bfloat16 lie in memory as uint16 and are computed in float32. 16 bytes are one access only where LLVM sees a
vector of four words: arrays, records and unrolled scalars all compiled to scalar loads.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llvmlite import ir
from numba import cuda
from numba.cuda import libdevice, types
from numba.cuda.extending import intrinsic

I16, I32 = ir.IntType(16), ir.IntType(32)
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()

ELEMENTS = {"float32": types.float32, "float64": types.float64, "float16": types.uint16, "bfloat16": types.uint16}


def real_type(kind: str) -> Any:
    """The type that elements of this kind are computed in."""
    return types.float64 if kind == "float64" else types.float32


def _decode(builder: Any, word: Any, kind: str) -> Any:
    """A half type's 16 bits as float32."""
    if kind == "float16":
        return builder.fpext(builder.bitcast(word, F16), F32)
    return builder.bitcast(builder.shl(builder.zext(word, I32), I32(16)), F32)


def _decode_pair(builder: Any, word: Any, kind: str) -> list[Any]:
    """Two elements of a half type from 32 bits."""
    if kind == "bfloat16":  # a mask in place of two shifts for the upper one
        halves = builder.shl(word, I32(16)), builder.and_(word, I32(0xFFFF0000))
        return [builder.bitcast(half, F32) for half in halves]
    return [_decode(builder, builder.trunc(part, I16), kind) for part in (word, builder.lshr(word, I32(16)))]


def _encode_pair(builder: Any, low: Any, high: Any, kind: str) -> Any:
    """Two float32 rounded to nearest, ties to even, in one instruction."""
    name = "f16x2" if kind == "float16" else "bf16x2"
    signature = ir.FunctionType(I32, [F32, F32])
    return builder.call(ir.InlineAsm(signature, f"cvt.rn.{name}.f32 $0, $1, $2;", "=r,f,f"), [high, low])


def _encode(builder: Any, value: Any, kind: str) -> Any:
    return builder.trunc(_encode_pair(builder, value, value, kind), I16)


def _slot(context: Any, builder: Any, array_type: Any, array: Any, index: Any, step: int = 0) -> Any:
    data = context.make_array(array_type)(context, builder, value=array).data
    return builder.gep(data, [builder.add(index, ir.Constant(index.type, step))])


def primitives(kind: str) -> Any:
    """The primitives of "float32", "float64", "float16" or "bfloat16"; see `nbnorm_backends.numba_cuda.simulator`."""
    half, double = kind in ("float16", "bfloat16"), kind == "float64"
    size = 8 if half else 2 if double else 4  # elements of a vector
    lane, lanes = (F64, 2) if double else (I32 if half else F32, 4)
    vector = ir.VectorType(lane, lanes)
    real = real_type(kind)

    @intrinsic
    def ld(typing_context: Any, pointer: Any, k: Any, array: Any, offset: Any) -> Any:
        """array[offset : offset + V] = the k-th vector behind the pointer"""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source = builder.gep(builder.bitcast(args[0], vector.as_pointer()), [args[1]])
            loaded = builder.load(source, align=16)
            values: list[Any] = []
            for i in range(lanes):
                part = builder.extract_element(loaded, I32(i))
                values += _decode_pair(builder, part, kind) if half else [part]
            for i, value in enumerate(values):
                builder.store(value, _slot(context, builder, array, args[2], args[3], i))
            return context.get_dummy_value()

        return types.void(pointer, types.intp, array, types.intp), generate

    @intrinsic
    def st(typing_context: Any, pointer: Any, k: Any, array: Any, offset: Any) -> Any:
        """The k-th vector behind the pointer = array[offset : offset + V]"""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = [builder.load(_slot(context, builder, array, args[2], args[3], i)) for i in range(size)]
            if half:
                values = [_encode_pair(builder, values[i], values[i + 1], kind) for i in range(0, size, 2)]
            packed = ir.Constant(vector, ir.Undefined)
            for i, value in enumerate(values):
                packed = builder.insert_element(packed, value, I32(i))
            target = builder.gep(builder.bitcast(args[0], vector.as_pointer()), [args[1]])
            builder.store(packed, target, align=16)
            return context.get_dummy_value()

        return types.void(pointer, types.intp, array, types.intp), generate

    @intrinsic
    def ld1(typing_context: Any, pointer: Any, i: Any) -> Any:
        """The i-th element behind the pointer"""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loaded = builder.load(builder.gep(args[0], [args[1]]))
            return _decode(builder, loaded, kind) if half else loaded

        return real(pointer, types.intp), generate

    @intrinsic
    def st1(typing_context: Any, pointer: Any, i: Any, value: Any) -> Any:
        """The i-th element behind the pointer = value"""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = _encode(builder, args[2], kind) if half else args[2]
            builder.store(value, builder.gep(args[0], [args[1]]))
            return context.get_dummy_value()

        return types.void(pointer, types.intp, real), generate

    @intrinsic
    def atomic_add(typing_context: Any, pointer: Any, i: Any, value: Any) -> Any:
        """What the i-th int32 was, to which the value is added"""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), args[2], "monotonic")

        return types.int32(pointer, types.intp, types.int32), generate

    return SimpleNamespace(
        atomic_add=atomic_add,
        V=size,
        ld=ld,
        st=st,
        ld1=ld1,
        st1=st1,
        dev=cuda.jit(device=True, inline="always"),
        **_functions(double),
    )


def _functions(double: bool) -> dict[str, Any]:
    """A fast float32 division takes 48 instructions of a kernel where the exact one takes 168."""
    if double:
        names = "rsqrt", "exp", "tanh", "erf", "fma", "sqrt", "fmax", "fmin"

        def fdiv(a: Any, b: Any) -> Any:
            return a / b

        division = cuda.jit(device=True, inline="always")(fdiv)
    else:
        names = "rsqrtf", "fast_expf", "tanhf", "erff", "fmaf", "sqrtf", "fmaxf", "fminf"
        division = libdevice.fast_fdividef
    keys = "rsqrt", "exp", "tanh", "erf", "fma", "sqrt", "maximum", "minimum"
    return {"fdiv": division, **{key: getattr(libdevice, name) for key, name in zip(keys, names, strict=True)}}
