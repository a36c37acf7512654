"""Activations and their slopes inside a kernel's loop, as straight-line arithmetic that LLVM turns into vectors.

Calls of libm would keep a loop scalar, so exp, tanh and erf are written out here: in float32 for float32 and half
types, with the errors that docs/numerics.md lists, and in float64 for float64. An activation reaches a kernel as a tag
whose Numba type is the activation's name: each is compiled into the loop that uses it, and the identity costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def bits(self, change: Callable[..., Any], *others: Real) -> Real:
        """What `change` makes of the bits, and of those of the others; its first argument makes integer constants."""
        word = I32 if self.value.type == F32 else I64
        words = [self.builder.bitcast(one.value, word) for one in (self, *others)]
        changed = change(lambda number: ir.Constant(word, number), *words)
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
    round: float  # 1.5 * 2**mantissa: adding it leaves the nearest integer in the last bits
    bias: int  # of the exponent
    sign: int  # the bit of the sign, as a signed integer
    lowest: float  # -bias * ln(2): exp of it is 0 in place of a denormal
    flat: float  # tanh(x / 2) of more rounds to 1
    coth: tuple[float, ...]  # r * coth(r / 2) for |r| <= ln(2) / 2, in r**2
    farthest: float  # the normal tail counts as 0 from there on
    low_bits: int  # cleared in the factor of a square that shall be exact


# Largest relative errors before rounding of exp: 4e-10 and 2e-18. SINGLE.coth, BELL and MILLS are fitted
# by docs/coefficients.py; DOUBLE.coth is the power series.
SINGLE = _Constants(
    (0.693359375, -2.12194440e-4), 23, 12582912.0, 127, -(1 << 31), -88.029691, 18.1,
    (2.0000000125045614, 0.16666583462064324, -0.0027639195334174097),
    13.0, 12,
)  # fmt: skip
DOUBLE = _Constants(
    (6.93147180369123816490e-01, 1.90821492927058770002e-10), 52, 6755399441055744.0, 1023, -(1 << 63),
    -709.08956571282405, 38.2,
    (2.0, 1 / 6, -1 / 360, 1 / 15120, -1 / 604800, 1 / 23950080, -691 / 653837184000),
    37.5, 27,
)  # fmt: skip
LOG2_E, LN2 = 1.4426950408889634, 0.6931471805599453
SINGLE_LN2 = 0.6931471824645996  # in float32
PHI_0 = 0.3989422804014327  # the density of the standard normal at 0
# In float32 exp(z*z/2) * (1 - Phi(z)) is MILLS_SCALE * p / q, with an error of 1.5e-8, where w = z * (z + a),
# p = (w + b) * (w - z + c) + e and q = z * ((w + f) * (w - z + g) + h) + i: 4 multiplications in place of 8. It makes
# up for SINGLE_LN2. BELL is exp(-r / 2) for |r| <= ln(2), with an error of 1e-7, times MILLS_SCALE.
MILLS_SCALE = 0.3989410835745915
MILLS = (
    (5.195220013075018, 4.202345618155022, 14.790964035395358, 41.12663326521694),
    (-0.0951205984299861, 20.084565763322484, 143.04016521143802, 82.40796277555964),
)
BELL = tuple(
    MILLS_SCALE * c * (-0.5) ** power
    for power, c in enumerate(
        (1.0, 1.0, 0.49999231490556556, 0.16667114650455256, 0.04189015749165247, 0.008312520329420585)
    )
)
# In float64 the coefficients of numerator and denominator, with an error of 5e-17.
DOUBLE_MILLS = (
    (0.5, 0.7747130141438154, 0.5938135376197936, 0.28916666042841094, 0.09762496742488122, 0.023599734021299557,
     0.004084500983056383, 0.0004897223967237555, 3.7191126839424384e-05, 1.3828979142410137e-06),
    (1.0, 2.3473105890904864, 2.5605099536842815, 1.7136309064019941, 0.7815688939811647, 0.2547613688074918,
     0.06037638018679486, 0.010331549970627471, 0.0012310184175635783, 9.322433009890726e-05,
     3.466411012775339e-06),
)  # fmt: skip


def _constants(x: Real) -> _Constants:
    return SINGLE if x.value.type == F32 else DOUBLE


def _polynomial(x: Real, square: Real, coefficients: tuple[float, ...]) -> Real:
    """By pairs c + d * x, which do not wait for each other, and Horner's rule in `square`, x * x."""
    pairs: list[Any] = [x * d + c for c, d in zip(coefficients[::2], coefficients[1::2], strict=False)]
    if len(coefficients) % 2:
        pairs.append(coefficients[-1])
    return _horner(square, pairs)


def _horner(x: Real, coefficients: Sequence[Any]) -> Real:
    total: Real = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        total = x * total + coefficient
    return total


def _nearest(x: Real, factor: float, exponent: int = 0) -> tuple[Real, Real]:
    """The integer k next to x * factor, and a number with k + exponent in its last bits."""
    shift = _constants(x).round + exponent
    shifted = x * factor + shift
    return shifted - shift, shifted


def _power(shifted: Real) -> Real:
    """The power of two whose biased exponent is in the last bits: 0 where that is 0, infinite for the largest."""
    mantissa = _constants(shifted).mantissa
    return shifted.bits(lambda of, word: shifted.builder.shl(word, of(mantissa)))


def _scaled(x: Real, shifted: Real) -> Real:
    """x * 2**k, by a sum of exponents: neither may be denormal, but 0 may be multiplied by 1."""
    mantissa, build = _constants(x).mantissa, x.builder
    return x.bits(lambda of, word, power: build.add(word, build.shl(power, of(mantissa))), shifted)


def _plus(x: Real, k: Real, parts: Sequence[float]) -> Real:
    """x + k * (the sum of the parts), nearly exact: of two parts the first has bits to spare."""
    for part in parts:
        x = k.fused(part, x) if fuses_multiply_add() else x + k * part
    return x


def _ln2(x: Real) -> Sequence[float]:
    """ln(2) for `_plus`, in float32 as SINGLE_LN2."""
    if x.value.type == F64:
        return DOUBLE.ln2
    high = SINGLE.ln2[0]
    return (SINGLE_LN2,) if fuses_multiply_add() else (high, SINGLE_LN2 - high)


def _middle(r: Real, unit: float) -> Real:
    """a with exp(r / unit) = (a + r) / (a - r), for |r| of at most unit * ln(2) / 2."""
    return _horner(r * r, [c * unit ** (1 - 2 * power) for power, c in enumerate(_constants(r).coth)])


def _exp_minus(x: Real) -> tuple[Real, Real]:
    """(above, below) with exp(-x) = above / below, for x from `lowest` - ln(2), where it is infinite, to -`lowest`,
    where it is 0."""
    with_ = _constants(x)
    k, shifted = _nearest(x, -LOG2_E, with_.bias)
    r = _plus(x, k, with_.ln2)
    a = _middle(r, 1.0)
    return _power(shifted) * (a - r), a + r


def _absolute(x: Real) -> Real:
    sign = _constants(x).sign
    return x.bits(lambda of, word: x.builder.and_(word, of(~sign)))


def _at_most(x: Real, high: float) -> Real:
    """x, or `high` where that is less; a NaN stays one."""
    return x.where(">", high, high, x)


def _at_least(x: Real, low: float) -> Real:
    return x.where("<", low, low, x)


def _square(x: Real) -> tuple[Real, Real]:
    """x * x as (high, low): rounding it would cost exp(-x * x / 2) up to x * x / 2 units in the last place."""
    if fuses_multiply_add():
        high = x * x
        return high, x.fused(x, -high)
    cleared = -(1 << _constants(x).low_bits)
    head = x.bits(lambda of, word: x.builder.and_(word, of(cleared)))
    return head * head, (x + head) * (x - head)  # the first is exact: half of the bits are 0


def _sigmoid(x: Real) -> Real:
    lowest = _constants(x).lowest
    above, below = _exp_minus(_at_least(_at_most(x, -lowest), lowest - LN2))
    return below / (above + below)


def _logistic(x: Real) -> tuple[Real, Real]:
    """The sigmoid and its derivative, neither by a difference of nearly equal numbers."""
    above, below = _exp_minus(_at_most(_absolute(x), -_constants(x).lowest))
    each = 1.0 / (above + below)
    small, large = above * each, below * each
    return x.where("<", 0.0, small, large), small * large


def _tanh(x: Real) -> Real:
    """t / (t + 1) with t = (exp(2x) - 1) / 2, of the sign of x: t is precise for small x, as 2**k - 1 is exact."""
    with_, build = _constants(x), x.builder
    far = _at_most(_absolute(x), with_.flat / 2.0)
    k, shifted = _nearest(far, 2.0 * LOG2_E, with_.bias - 1)
    r = _plus(far, k, [-0.5 * part for part in _ln2(x)])
    a, half = _middle(r, 0.5), _power(shifted)
    t = (half - 0.5) * a + (half + 0.5) * r
    return (t / (t + (a - r))).bits(lambda of, word, of_x: build.or_(word, build.and_(of_x, of(with_.sign))), x)


def _tanh_slope(x: Real) -> Real:
    return 4.0 * _logistic(x * 2.0)[1]


def _normal_tail(x: Real) -> tuple[Real, Real, Real, Real, float]:
    """far, bell, k, mills, scale: the upper tail of the standard normal at far = abs(x) is bell * 2**k * mills, to full
    relative accuracy, and the density bell * 2**k * scale; k as for `_scaled`.
    """
    far = _at_most(_absolute(x), _constants(x).farthest)
    square, (high, low) = far * far, _square(far)
    k, shifted = _nearest(square, -0.5 * LOG2_E)
    r = _plus(high, k, [2.0 * part for part in _ln2(x)]) + low  # -2 times what is left of the exponent
    if x.value.type == F64:
        half = _middle(r, 2.0)
        above, below = (_polynomial(far, square, part) for part in DOUBLE_MILLS)
        return far, (half - r) / (half + r), shifted, above / below, PHI_0
    (a, b, c, e), (f, g, h, i) = MILLS
    w = far * (far + a)
    less = w - far
    quotient = ((w + b) * (less + c) + e) / (far * ((w + f) * (less + g) + h) + i)
    return far, _polynomial(r, r * r, BELL), shifted, quotient, PHI_0 / MILLS_SCALE


def _near(far: Real, value: Real) -> Real:
    """The value; 0 where the normal tail counts as 0."""
    return far.where(">=", _constants(far).farthest, 0.0, value)


def _gelu(z: Real) -> Real:
    """max(z, 0) - abs(z) * tail"""
    far, bell, shifted, mills, _ = _normal_tail(z)
    return z.where("<", 0.0, 0.0, z) - _near(far, bell * _scaled(far, shifted) * mills)


def _gelu_slope(z: Real) -> Real:
    far, bell, shifted, mills, scale = _normal_tail(z)
    bell = _near(far, _scaled(bell, shifted))
    small = bell * mills - far * (bell * scale)
    return z.where("<", 0.0, small, 1.0 - small)


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
    "silu": (lambda z: z * _sigmoid(z), lambda z: _product_slope(z, *_logistic(z))),
    "gelu": (_gelu, _gelu_slope),
    "gelu_tanh": (lambda z: z * _sigmoid(_gelu_tanh_inner(z)[0]), _gelu_tanh_slope),
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
