"""Activations and their slopes inside a kernel's loop, as straight-line arithmetic that LLVM turns into vectors.

Calls of libm would keep a loop scalar, so exp, tanh and erf are written out here: in float32 for float32 and half
types, to about two units in the last place, and in float64 for float64. An activation reaches a kernel as a tag whose
Numba type is the activation's name: each is compiled into the loop that uses it, and the identity costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from nbnorm.backend import LEAK

I32, I64 = ir.IntType(32), ir.IntType(64)
F32, F64 = ir.FloatType(), ir.DoubleType()


# ---- arithmetic, as Python writes it ---------------------------------------------------------------------------------


class Real:
    """A value of one loop iteration while its code is being built: float32 or float64, by its type."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def of(self, number: Any) -> Any:
        """`number` as a constant of this type."""
        return number.value if isinstance(number, Real) else ir.Constant(self.value.type, float(number))

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

    def __rtruediv__(self, other: Any) -> Real:
        return self._join("fdiv", self.of(other), self.value)

    def __truediv__(self, other: Any) -> Real:
        return self._join("fdiv", self.value, self.of(other))

    __radd__, __rmul__ = __add__, __mul__

    def where(self, comparison: str, bound: Any, chosen: Any, other: Any) -> Real:
        """`chosen` where self compares so with `bound`, else `other`; a NaN compares with nothing."""
        test = self.builder.fcmp_ordered(comparison, self.value, self.of(bound))
        return Real(self.builder, self.builder.select(test, self.of(chosen), self.of(other)))

    def bits(self, change: Callable[[Any, Callable[[int], Any]], Any]) -> Real:
        """What `change` makes of the bits; its second argument makes integer constants."""
        word = I32 if self.value.type == F32 else I64
        changed = change(self.builder.bitcast(self.value, word), lambda number: ir.Constant(word, number))
        return Real(self.builder, self.builder.bitcast(changed, self.value.type))


# ---- elementary functions --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Constants:
    """What depends on the precision. The polynomials interpolate at Chebyshev nodes, in 50 digits."""

    ln2: tuple[float, float]  # high and low part
    round: float  # 1.5 * 2**(mantissa bits): adding it leaves the nearest integer in the last bits
    mantissa: int
    bias: int  # of the exponent
    lowest: float  # exp of less is taken as 0: it is at most a denormal
    flat: float  # tanh(x / 2) of more rounds to 1
    expm1: tuple[float, ...]  # (exp(r) - 1) / r for |r| <= ln(2) / 2
    tail: tuple[float, ...]  # exp(z*z/2) * (1 - Phi(z)) / t, in t - middle, with t = 1 / (1 + spread * z)
    middle: float
    spread: float
    low_bits: int  # cleared in the factor of a square that shall be exact


# Largest relative errors: exp 4e-9 and 7e-18, tail 4e-9 (z <= 14) and 4e-17 (z <= 39), before rounding.
SINGLE = _Constants(
    (0.693359375, -2.12194440e-4),
    12582912.0,
    23,
    127,
    -87.0,
    18.1,
    (1.0000000108364155, 0.500000001353873, 0.1666650461303261, 0.04166646419740569, 0.008369220291803607,
     0.0013933730715792083),
    (0.25605668113908314, 0.39999135171033434, 0.40951635912580897, 0.22566642390457706, -0.010977927025531322,
     -0.09073902256619054, -0.009501848253256975, 0.04422017363696387, 0.0022791622726938137, -0.020914359728848045),
    0.59375,
    0.3,
    12,
)  # fmt: skip
DOUBLE = _Constants(
    (6.93147180369123816490e-01, 1.90821492927058770002e-10),
    6755399441055744.0,
    52,
    1023,
    -708.0,
    38.2,
    (1.0, 0.5000000000000006, 0.1666666666666667, 0.04166666666657239, 0.008333333333326084, 0.0013888888932751,
     0.0001984126987500228, 2.4801504014426906e-05, 2.755725517000089e-06, 2.7626495546432196e-07,
     2.5105312729622103e-08),
    (0.20395910557973604, 0.34280238791434514, 0.4428395012416081, 0.4195431998402547, 0.25370475804455284,
     0.04232199245910802, -0.07202006823102634, -0.046680451617275104, 0.020664237550084313, 0.027233505207262004,
     -0.009320865244937278, -0.015650646695643134, 0.007259468175564833, 0.008811253473957819, -0.007018964184411782,
     -0.004047329877954156, 0.006559167296043307, 0.0005348238516015956, -0.0052246646752672765, 0.0013329804934481156,
     0.003098803043231505, -0.0010819807203622366, -0.0010122350213441524),
    0.546875,
    0.25,
    27,
)  # fmt: skip
LOG2_E = 1.4426950408889634


def _constants(x: Real) -> _Constants:
    return SINGLE if x.value.type == F32 else DOUBLE


def _polynomial(x: Real, coefficients: tuple[float, ...]) -> Real:
    """Horner's rule."""
    total = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total = total * x + coefficient
    return total


def _reduced(x: Real, low: Real | None = None) -> tuple[Real, Real]:
    """(r, 2**k) with exp(x + low) = 2**k * exp(r) and |r| at most ln(2) / 2; `low` is small."""
    with_ = _constants(x)
    shifted = x * LOG2_E + with_.round
    k = shifted - with_.round
    r = (x - k * with_.ln2[0]) - k * with_.ln2[1]
    builder = x.builder
    power = shifted.bits(lambda word, of: builder.shl(builder.add(word, of(with_.bias)), of(with_.mantissa)))
    return (r if low is None else r + low), power


def _exp(x: Real, low: Real | None = None) -> Real:
    """exp(x + low) for x <= 0."""
    with_ = _constants(x)
    r, power = _reduced(x.where("<", with_.lowest, with_.lowest, x), low)
    return x.where("<", with_.lowest, 0.0, power * (1.0 + r * _polynomial(r, with_.expm1)))


def _absolute(x: Real) -> Real:
    return x.where("<", 0.0, 0.0 - x, x)


def _logistic(x: Real) -> tuple[Real, Real]:
    """The sigmoid and its derivative, neither by a difference of nearly equal numbers."""
    e = _exp(0.0 - _absolute(x))
    d = 1.0 / (1.0 + e)
    small = e * d
    return x.where("<", 0.0, small, d), small * d


def _tanh(x: Real) -> tuple[Real, Real]:
    """tanh and its derivative, by exp(2x) - 1, which keeps small x accurate."""
    with_ = _constants(x)
    doubled = _absolute(x) * 2.0
    r, power = _reduced(doubled.where(">", with_.flat, with_.flat, doubled))
    grown = power * (r * _polynomial(r, with_.expm1)) + (power - 1.0)
    d = 1.0 / (grown + 2.0)
    t = grown * d
    slope = doubled.where(">", with_.flat, 4.0 * _exp(0.0 - doubled), (4.0 * (grown + 1.0)) * d * d)
    return x.where("<", 0.0, 0.0 - t, t), slope


def _normal(x: Real) -> tuple[Real, Real]:
    """Distribution and density of the standard normal; the lower tail has full relative accuracy."""
    with_ = _constants(x)
    builder, far = x.builder, _absolute(x)
    # x * x = high * high, exactly, + (x + high) * (x - high): rounding the square would cost the tail x * x / 2 ulps
    high = x.bits(lambda word, of: builder.and_(word, of(-(1 << with_.low_bits))))
    bell = _exp(high * high * -0.5, (x + high) * (x - high) * -0.5)
    t = 1.0 / (1.0 + with_.spread * far)
    tail = bell * (t * _polynomial(t - with_.middle, with_.tail))
    return x.where("<", 0.0, tail, 1.0 - tail), bell * 0.3989422804014327


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
    "silu": (lambda z: z * _logistic(z)[0], lambda z: _product_slope(z, *_logistic(z))),
    "gelu": (lambda z: z * _normal(z)[0], lambda z: _product_slope(z, *_normal(z))),
    "gelu_tanh": (lambda z: z * _logistic(_gelu_tanh_inner(z)[0])[0], _gelu_tanh_slope),
    "sigmoid": (lambda z: _logistic(z)[0], lambda z: _logistic(z)[1]),
    "tanh": (lambda z: _tanh(z)[0], lambda z: _tanh(z)[1]),
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
        self._numba_type_ = ActivationType(name)  # where Numba looks for the type of an object that it does not know


IDENTITY = Tag("identity")
TAGS: dict[str | None, Tag] = {None: IDENTITY} | {name: Tag(name) for name in FUNCTIONS}

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
                return ir.Constant(F64, 1.0) if which else value
            wide = like.dtype == types.float64
            z = Real(builder, value if wide else builder.fptrunc(value, F32))
            found = FUNCTIONS[tag.activation][which](z).value
            return found if wide else builder.fpext(found, F64)

        return types.float64(tag, like, types.float64), generate

    return typed


activate = intrinsic(
    _of_tag(0)
)  # activate(tag, like, z): the function of z, a float64, computed as precisely as `like`
slope = intrinsic(_of_tag(1))  # slope(tag, like, z): its derivative
