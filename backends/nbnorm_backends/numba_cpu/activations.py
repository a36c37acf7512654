"""Activations and their slopes inside a kernel's loop, as straight-line arithmetic that LLVM turns into vectors.

Calls of libm would keep a loop scalar, so exp, tanh and erf are written out here: in float32 for float32 and half
types, with the errors that docs/numerics.md lists, and in float64 for float64. An activation reaches a kernel as a tag
whose Numba type is the activation's name: each is compiled into the loop that uses it, and the identity costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from nbnorm.backend import LEAK
from nbnorm_backends.numba_cpu.elements import fuses_multiply_add

I32, I64 = ir.IntType(32), ir.IntType(64)
F32, F64 = ir.FloatType(), ir.DoubleType()


# ---- arithmetic, as Python writes it ---------------------------------------------------------------------------------


class Real:
    """A value of one loop iteration while its code is being built: float32 or float64, by its type."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def of(self, number: Any) -> Any:
        """`number` as a value of this type."""
        return number.value if isinstance(number, Real) else _constant(self.builder, self.value.type, float(number))

    def _join(self, name: str, a: Any, b: Any) -> Real:
        return Real(self.builder, getattr(self.builder, name)(a, b, flags=("contract",)))

    def __add__(self, other: Any) -> Real:
        return self._join("fadd", self.value, self.of(other))

    def __sub__(self, other: Any) -> Real:
        return self._join("fsub", self.value, self.of(other))

    def __rsub__(self, other: Any) -> Real:
        return self._join("fsub", self.of(other), self.value)

    def __mul__(self, other: Any) -> Real:
        return self._join("fmul", self.value, self.of(other))

    def __neg__(self) -> Real:
        return Real(self.builder, self.builder.fneg(self.value))

    def __rtruediv__(self, other: Any) -> Real:
        return self._join("fdiv", self.of(other), self.value)

    def __truediv__(self, other: Any) -> Real:
        return self._join("fdiv", self.value, self.of(other))

    __radd__, __rmul__ = __add__, __mul__

    def fused(self, factor: Any, addend: Any) -> Real:
        """self * factor + addend, rounded once."""
        return Real(self.builder, self.builder.fma(self.value, self.of(factor), self.of(addend)))

    def where(self, comparison: str, bound: Any, chosen: Any, other: Any) -> Real:
        """`chosen` where self compares so with `bound`, else `other`; a NaN compares with nothing."""
        test = self.builder.fcmp_ordered(comparison, self.value, self.of(bound))
        return Real(self.builder, self.builder.select(test, self.of(chosen), self.of(other)))

    def bits(self, change: Callable[[Any, Callable[[int], Any]], Any]) -> Real:
        """What `change` makes of the bits; its second argument makes integer constants."""
        word = I32 if self.value.type == F32 else I64
        changed = change(self.builder.bitcast(self.value, word), lambda number: ir.Constant(word, number))
        return Real(self.builder, self.builder.bitcast(changed, self.value.type))


def _constant(builder: Any, real: Any, number: float) -> Any:
    """A number for a loop, loaded from a variable that nothing changes.

    Vectors of a constant proper are made anew in each iteration, with an address each, where they are many; a load goes
    in front of the loop.
    """
    constant = ir.Constant(real, number)
    if number in (0.0, 1.0):
        return constant
    name = f"nbnorm.constant.{real}.{float.hex(number)}"
    variable = builder.module.globals.get(name)
    if variable is None:
        variable = ir.GlobalVariable(builder.module, real, name)
        variable.linkage = "weak"  # could be replaced when it is linked, for all that LLVM knows, so loads stay loads
        variable.initializer = constant
    loaded = builder.load(variable)
    loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
    return loaded


# ---- elementary functions --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Constants:
    """What depends on the precision."""

    ln2: tuple[float, float]  # high and low part
    mantissa: int  # bits
    round: (
        float  # 1.5 * 2**mantissa + bias of the exponent: adding it leaves the nearest integer + bias in the last bits
    )
    sign: int  # the bit of the sign, as a signed integer
    lowest: float  # -bias * ln(2): exp of it is 0 in place of a denormal
    flat: float  # tanh(x / 2) of more rounds to 1
    exp: tuple[float, ...]  # (exp(r) - 1 - r) / r**2 for |r| <= ln(2) / 2
    mills: tuple[tuple[float, ...], tuple[float, ...]]  # exp(z*z/2) * (1 - Phi(z)), a quotient
    farthest: float  # where exp(-z*z/2) has become 0
    bell: tuple[float, ...] | None  # `exp` in one term less, where that is precise enough
    low_bits: int  # cleared in the factor of a square that shall be exact


# Largest relative errors before rounding: exp 3e-9 and 7e-18, mills 5e-9 and 5e-17, bell 1e-7. Those of SINGLE are
# fitted by docs/coefficients.py; of DOUBLE exp is interpolated at Chebyshev nodes in 50 digits.
SINGLE = _Constants(
    (0.693359375, -2.12194440e-4),
    23,
    12582912.0 + 127,
    -(1 << 31),
    -88.029691,
    18.1,
    (0.4999999344774544, 0.16666520630984757, 0.04166838805282392, 0.008368716966515042, 0.001381459859218528),
    ((49.195796842669836, 42.96980345978871, 17.911745390723564, 3.95796178556309, 0.3989468355880281),
     (98.39159317505438, 164.44477672203493, 117.8352200659538, 45.88272586019897, 9.921796691118848, 1.0)),
    13.26,
    (0.49999231490556556, 0.16667114650455256, 0.04189015749165247, 0.008312520329420585),
    12,
)  # fmt: skip
DOUBLE = _Constants(
    (6.93147180369123816490e-01, 1.90821492927058770002e-10),
    52,
    6755399441055744.0 + 1023,
    -(1 << 63),
    -709.08956571282405,
    38.2,
    (0.5000000000000006, 0.1666666666666667, 0.04166666666657239, 0.008333333333326084, 0.0013888888932751,
     0.0001984126987500228, 2.4801504014426906e-05, 2.755725517000089e-06, 2.7626495546432196e-07,
     2.5105312729622103e-08),
    ((0.5, 0.7747130141438154, 0.5938135376197936, 0.28916666042841094, 0.09762496742488122, 0.023599734021299557,
      0.004084500983056383, 0.0004897223967237555, 3.7191126839424384e-05, 1.3828979142410137e-06),
     (1.0, 2.3473105890904864, 2.5605099536842815, 1.7136309064019941, 0.7815688939811647, 0.2547613688074918,
      0.06037638018679486, 0.010331549970627471, 0.0012310184175635783, 9.322433009890726e-05,
      3.466411012775339e-06)),
    37.66,
    None,
    27,
)  # fmt: skip
LOG2_E, LN2 = 1.4426950408889634, 0.6931471805599453
SINGLE_LN2 = 0.6931471824645996  # in float32; `mills` makes up for the difference


def _constants(x: Real) -> _Constants:
    return SINGLE if x.value.type == F32 else DOUBLE


def _polynomial(x: Real, square: Real, coefficients: tuple[float, ...]) -> Real:
    """By pairs c + d * x, which do not wait for each other, and Horner's rule in `square`, x * x."""
    pairs: list[Any] = [x * d + c for c, d in zip(coefficients[::2], coefficients[1::2], strict=False)]
    if len(coefficients) % 2:
        pairs.append(coefficients[-1])
    total: Real = pairs.pop()
    while pairs:
        total = square * total + pairs.pop()
    return total


def _reduced(x: Real) -> tuple[Real, Real]:
    """(r, 2**k) with exp(x) = 2**k * exp(r) and |r| at most ln(2) / 2."""
    with_ = _constants(x)
    shifted = x * LOG2_E + with_.round
    k = shifted - with_.round
    r = (x - k * with_.ln2[0]) - k * with_.ln2[1]
    return r, _power(shifted)


def _power(shifted: Real) -> Real:
    """2**k, from k in the last bits of a sum with `round`."""
    mantissa = _constants(shifted).mantissa
    return shifted.bits(lambda word, of: shifted.builder.shl(word, of(mantissa)))


def _exp(x: Real, low: Real | float = 0.0) -> Real:
    """exp(x + low) for small `low` and x from `lowest`, where it is 0, to ln(2) - lowest, where it is infinite."""
    r, power = _reduced(x)
    r = r + low if isinstance(low, Real) else r
    return power * _polynomial(r, r * r, (1.0, 1.0, *_constants(x).exp))


def _bell(x: Real) -> tuple[Real, Real | float]:
    """exp(-x * x / 2) for x from 0 to `farthest`, but for the part of it that `mills` has: as two factors, of which the
    second, a power of two, is there first."""
    with_ = _constants(x)
    high, low = _square(x)
    if with_.bell is None:
        return _exp(high * -0.5, low * -0.5), 1.0
    if not fuses_multiply_add():
        return _exp(high * -0.5, low * -0.5 + high * (0.5 * (SINGLE_LN2 / LN2 - 1.0))), 1.0
    shifted = high * (-0.5 * LOG2_E) + with_.round
    k = shifted - with_.round
    r = k.fused(2.0 * SINGLE_LN2, high) + low  # -2 times what is left of the exponent
    coefficients = tuple(c * (-0.5) ** power for power, c in enumerate((1.0, 1.0, *with_.bell)))
    return _polynomial(r, r * r, coefficients), _power(shifted)


def _absolute(x: Real) -> Real:
    sign = _constants(x).sign
    return x.bits(lambda word, of: x.builder.and_(word, of(~sign)))


def _clamped(x: Real, low: float, high: float) -> Real:
    """x from `low` to `high`; a NaN stays one."""
    x = x.where(">", high, high, x)
    return x.where("<", low, low, x)


def _decay(x: Real) -> Real:
    """exp(-abs(x))"""
    sign, lowest = _constants(x).sign, _constants(x).lowest
    down = x.bits(lambda word, of: x.builder.or_(word, of(sign)))
    return _exp(down.where("<", lowest, lowest, down))


def _square(x: Real) -> tuple[Real, Real]:
    """x * x as (high, low): rounding it would cost exp(-x * x / 2) up to x * x / 2 units in the last place."""
    if fuses_multiply_add():
        high = x * x
        return high, x.fused(x, -high)
    cleared = -(1 << _constants(x).low_bits)
    head = x.bits(lambda word, of: x.builder.and_(word, of(cleared)))
    return head * head, (x + head) * (x - head)  # the first is exact: half of the bits are 0


def _exp_minus(x: Real) -> Real:
    """exp(-x) for any x, rounded to 0 and infinity a little early."""
    lowest = _constants(x).lowest
    return _exp(-_clamped(x, lowest - LN2, -lowest))


def _sigmoid(x: Real) -> Real:
    return 1.0 / (1.0 + _exp_minus(x))


def _logistic(x: Real) -> tuple[Real, Real]:
    """The sigmoid and its derivative, neither by a difference of nearly equal numbers."""
    e = _decay(x)
    d = 1.0 / (1.0 + e)
    small = e * d
    return x.where("<", 0.0, small, d), small * d


def _tanh(x: Real) -> Real:
    """By exp(2x) - 1, which keeps small x accurate."""
    with_ = _constants(x)
    r, power = _reduced(_clamped(x, -with_.flat / 2.0, with_.flat / 2.0) * 2.0)
    grown = power * (r * r * _polynomial(r, r * r, with_.exp) + r) + (power - 1.0)
    return grown / (grown + 2.0)


def _tanh_slope(x: Real) -> Real:
    return 4.0 * _logistic(x * 2.0)[1]


def _normal_tail(x: Real) -> tuple[Real, Real, Real | float, Real]:
    """abs(x), e, p, m: the upper tail of the standard normal there is e * p * m, to full relative accuracy, and the
    density e * p / sqrt(2 * pi)."""
    with_ = _constants(x)
    far = _absolute(x)
    far = far.where(">", with_.farthest, with_.farthest, far)
    above, below = (_polynomial(far, far * far, part) for part in with_.mills)
    return far, *_bell(far), above / below


def _gelu(z: Real) -> Real:
    """max(z, 0) - abs(z) * tail"""
    far, bell, power, mills = _normal_tail(z)
    return z.where("<", 0.0, 0.0, z) - bell * (power * far) * mills


def _gelu_slope(z: Real) -> Real:
    _, bell, power, mills = _normal_tail(z)
    bell = bell * power
    tail = bell * mills
    return _product_slope(z, z.where("<", 0.0, tail, 1.0 - tail), bell * 0.3989422804014327)


def _gelu_tanh_inner(z: Real) -> tuple[Real, Real]:
    """2u and its derivative: half of 1 + tanh(u) is the sigmoid of 2u."""
    square = z * z
    k = 1.5957691216057308  # 2 * sqrt(2 / pi)
    return z * (k + k * 0.044715 * square), k + 3 * k * 0.044715 * square


def _product_slope(z: Real, s: Real, slope: Real) -> Real:
    """The derivative of z * s(z); where s is flat the second term is 0, not 0 * inf."""
    return s + slope.where("==", 0.0, 0.0, z * slope)


def _gelu_tanh_slope(z: Real) -> Real:
    inner, rate = _gelu_tanh_inner(z)
    s, slope = _logistic(inner)
    return s + slope.where("==", 0.0, 0.0, z * rate * slope)


# name: (function, derivative)
FUNCTIONS: dict[str, tuple[Callable[[Real], Real], Callable[[Real], Real]]] = {
    "relu": (lambda z: z.where("<=", 0.0, 0.0, z), lambda z: z.where(">", 0.0, 1.0, 0.0)),
    "leaky_relu": (lambda z: z.where("<=", 0.0, z * LEAK, z), lambda z: z.where(">", 0.0, 1.0, LEAK)),
    "silu": (lambda z: z / (1.0 + _exp_minus(z)), lambda z: _product_slope(z, *_logistic(z))),
    "gelu": (_gelu, _gelu_slope),
    "gelu_tanh": (lambda z: z / (1.0 + _exp_minus(_gelu_tanh_inner(z)[0])), _gelu_tanh_slope),
    "sigmoid": (_sigmoid, lambda z: _logistic(z)[1]),
    "tanh": (_tanh, _tanh_slope),
}


# ---- tags and intrinsics ---------------------------------------------------------------------------------------------


class ActivationType(types.Type):
    """The Numba type of a tag: one for each name, so that a kernel is compiled for each."""

    def __init__(self, name: str) -> None:
        self.activation = name
        super().__init__(f"Activation({name})")


class Tag:
    """An activation, or the identity, as an argument of a kernel."""

    def __init__(self, name: str) -> None:
        self.activation = name
        self._numba_type_ = ActivationType(name)  # where Numba looks for the type of an object that it does not know


IDENTITY = Tag("identity")
TAGS: dict[str | None, Tag] = {None: IDENTITY} | {name: Tag(name) for name in FUNCTIONS}


def curved(*tags: ActivationType) -> bool:
    """Whether one of them is a polynomial: too much code to be unrolled, and too slow for conversions to matter."""
    return any(tag.activation not in ("identity", "relu", "leaky_relu") for tag in tags)


register_model(ActivationType)(models.OpaqueModel)


@unbox(ActivationType)
def _unbox(typ: Any, tag: Any, c: Any) -> Any:
    return NativeValue(c.context.get_dummy_value())


def _of_tag(which: int) -> Callable[..., Any]:
    """Intrinsic body that computes function `which` of the tag's pair, in the precision of the array `like`."""

    def typed(typing_context: Any, tag: Any, like: Any, z: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = args[2]
            if tag.activation == "identity":
                return ir.Constant(value.type, 1.0) if which else value
            narrow = z == types.float64 and like.dtype != types.float64
            argument = Real(builder, builder.fptrunc(value, F32) if narrow else value)
            found = FUNCTIONS[tag.activation][which](argument).value
            return builder.fpext(found, F64) if narrow else found

        return z(tag, like, z), generate

    return typed


activate = intrinsic(_of_tag(0))  # activate(tag, like, z): the function of z, computed as precisely as the array `like`
slope = intrinsic(_of_tag(1))  # slope(tag, like, z): its derivative
