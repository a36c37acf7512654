"""Properties of the five norms that hold for every shape, layout and mask, on cases that Hypothesis draws.

The plain run draws the same cases every time, and on Numba few combinations of options: each compiles kernels for
seconds. The slow run draws at random from all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.special import erfc

import nbnorm
from nbnorm.backend import ACTIVATIONS, ORDERS, Backend
from nbnorm.statistics import Moments
from nbnorm_backends.numba_cpu import make as make_numba
from nbnorm_backends.numpy_ref import make as make_numpy
from oracle import Wide, norm, slices

pytestmark = pytest.mark.filterwarnings("error")  # NaN, infinities and empty groups raise no warnings either
PLAIN_AND_SLOW = pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.slow)])

OPS = (nbnorm.batch_norm, nbnorm.instance_norm, nbnorm.group_norm, nbnorm.layer_norm, nbnorm.rms_norm)
EPS = 1e-2
# Allowed error, relative to max(1, |expected|). Gradients are differences of values of up to 10 or so, times up to
# 1/sqrt(EPS) = 10; the largest errors seen in 20 000 cases are a quarter to a half of these. Half types are computed in
# float32.
TOLERANCE = {"float64": 1e-13, "float32": 2e-5, "float16": 2e-3}


class Options(NamedTuple):
    """What the Numba backend compiles anew for."""

    dtype: str
    activation: str | None
    order: str
    masked: bool
    residual: bool
    free: bool  # any layout of x in memory, any axes for a layer norm, axes of length 1 in the mask


FEW = Options("float32", "silu", "norm_act", True, True, False)  # of the plain run


def drawn_options(backend: str, wide: bool) -> st.SearchStrategy[Options]:
    if backend == "numba" and not wide:
        return st.just(FEW)
    activations = st.none() | st.sampled_from(ACTIVATIONS)
    dtypes, orders = st.sampled_from(tuple(TOLERANCE)), st.sampled_from(ORDERS)
    return st.builds(Options, dtypes, activations, orders, *[st.booleans()] * 3)


def explore(body: Callable[[Any], None], drawn: st.SearchStrategy[Any], backend: str, wide: bool) -> None:
    """Run `body` on what is drawn; in the plain run that is the same every time."""
    profile = settings(
        max_examples={"numba": 40 if wide else 12, "numpy": 500 if wide else 100}[backend],
        derandomize=not wide,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],  # the first examples compile
    )
    profile(given(drawn)(body))()


# ---- activations, from their definitions -----------------------------------------------------------------------------


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


def normal(z: Any) -> Any:
    """The distribution function of the standard normal; in float64, as SciPy has no other."""
    return erfc(-np.asarray(z, float) / np.sqrt(2)) / 2


def bend(z: Any) -> Any:
    """The tanh that stands for the normal distribution in gelu_tanh."""
    return np.tanh(np.sqrt(2 / Wide(np.pi)) * (z + Wide(0.044715) * z**3))


def silu_slope(z: Any) -> Any:
    return sigmoid(z) * (1 + z * sigmoid(-z))


def gelu_tanh_slope(z: Any) -> Any:
    inner = np.sqrt(2 / Wide(np.pi)) * (1 + 3 * Wide(0.044715) * z * z)
    return (1 + bend(z)) / 2 + z * (1 - bend(z) ** 2) * inner / 2


# name: (function, derivative)
DEFINITIONS: dict[str | None, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.where(z > 0, z, 0), lambda z: np.where(z > 0, 1, 0)),
    "leaky_relu": (lambda z: np.where(z > 0, z, Wide(0.01) * z), lambda z: np.where(z > 0, 1, Wide(0.01))),
    "silu": (lambda z: z * sigmoid(z), silu_slope),
    "gelu": (lambda z: z * normal(z), lambda z: normal(z) + z * np.exp(-z * z / 2) / np.sqrt(2 * Wide(np.pi))),
    "gelu_tanh": (lambda z: z * (1 + bend(z)) / 2, gelu_tanh_slope),
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    "tanh": (np.tanh, lambda z: 1 / np.cosh(z) ** 2),
}


def assume_no_kink(options: Options, z: Any) -> None:
    """Drop a case where rounding decides on which side of a kink an element lies."""
    if options.activation in ("relu", "leaky_relu") and options.order == "norm_act":
        margin = 1e-2 if options.dtype == "float16" else 1e-4
        assume(not ((z != 0) & (np.abs(z) < margin)).any())


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of a norm with its cotangent, and which elements share a statistic or a parameter."""

    op: Any
    options: Options
    keys: dict[str, Any]
    layout: dict[str, Any]  # as oracle.slices takes it
    param_axes: tuple[int, ...]
    dy: Any
    arrays: dict[str, Any]  # x, weight, bias, residual and mask, of which all but x may be None
    running: dict[str, Any]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis prints."""
        call = f"{self.op.__name__} {self.keys} {self.options}"
        printer.text(f"{call}: {described(self.arrays)} {list(self.running)}")

    @property
    def valid(self) -> Any:
        mask = self.arrays["mask"]
        return np.broadcast_to(True if mask is None else mask, self.dy.shape)

    def arguments(self) -> dict[str, Any]:
        """Of a call; the running statistics are copies."""
        running = {name: array.copy() for name, array in self.running.items()}
        return self.arrays | self.keys | running | {"eps": EPS, **activated(self.options)}

    def results(self, backend: str | Backend, *, dy: Any = None, **changed: Any) -> dict[str, Any]:
        """y, the gradients as dx, dweight and so on, and the running statistics after the call."""
        arguments = self.arguments() | changed
        found = both(self.op, self.dy if dy is None else dy, backend=backend, **arguments)
        return found | {name: arguments[name] for name in self.running}

    def spread(self, name: str) -> Any:
        """weight or bias at every element; None without one."""
        param = self.arrays.get(name)
        if param is None:
            return None
        shape = [n if axis in self.param_axes else 1 for axis, n in enumerate(self.dy.shape)]
        return np.broadcast_to(param.reshape(shape), self.dy.shape)


def described(arrays: dict[str, Any]) -> str:
    """Shapes and strides; the values follow from the seed that was drawn."""
    present = {name: array for name, array in arrays.items() if array is not None}
    return ", ".join(f"{name} {array.shape} strides {array.strides}" for name, array in present.items())


def activated(options: Options) -> dict[str, Any]:
    return {"activation": options.activation, "order": options.order}


def both(op: Any, dy: Any, **arguments: Any) -> dict[str, Any]:
    """y, and the gradients as dx, dweight and so on."""
    y, pullback = nbnorm.vjp(op, **arguments)
    return {"y": y} | {f"d{name}": gradient for name, gradient in pullback(dy)._asdict().items()}


@st.composite
def drawn_cases(draw: st.DrawFn, options: st.SearchStrategy[Options], *, fixed: bool = True) -> Case:
    """Any norm on 1 to 6 elements along each of 2 to 4 axes; `fixed`: at times with given statistics."""
    op, chosen = draw(st.sampled_from(OPS)), draw(options)
    ndim = draw(st.integers(3 if op is nbnorm.instance_norm else 2, 4))
    shape = tuple(draw(st.lists(st.integers(1, 6 if ndim < 4 else 4), min_size=ndim, max_size=ndim)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    keys, layout, axes = draw(drawn_axes(op, shape, chosen.free))
    params = [shape[axis] for axis in axes]
    arrange = draw(arrangements(ndim)) if chosen.free else np.copy
    spread, offset = draw(st.sampled_from([(1, 0), (2, 3), (0, 3)]))

    def numbers(lengths: Any, spread: float = 1, offset: float = 0) -> Any:
        return (rng.normal(size=lengths) * spread + offset).astype(chosen.dtype)

    arrays = {
        "x": arrange(numbers(shape, spread, offset)),
        "residual": arrange(numbers(shape)) if chosen.residual else None,
        "mask": draw(masks(shape, rng, chosen.free)) if chosen.masked else None,
    }
    for name in ("weight",) if op is nbnorm.rms_norm else ("weight", "bias"):
        arrays[name] = numbers(params) if draw(st.booleans()) else None
    running: dict[str, Any] = {}
    if op in (nbnorm.batch_norm, nbnorm.instance_norm):
        given = fixed and draw(st.booleans())
        keys["training" if op is nbnorm.batch_norm else "use_input_stats"] = not given
        assume(given or chosen.masked or any(x.size > 1 for x in groups(op, arrays["x"], layout)))
        kind = "float64" if chosen.dtype == "float64" else "float32"
        if given or draw(st.booleans()):
            mean, var = rng.normal(size=params), rng.uniform(0.5, 2, size=params)
            running = {"running_mean": mean.astype(kind), "running_var": var.astype(kind)}
    return Case(op, chosen, keys, layout, axes, arrange(numbers(shape)), arrays, running)


def groups(op: Any, x: Any, layout: dict[str, Any]) -> list[Any]:
    return [x[index] for _, index in slices(x, op.__name__, **layout)]


@st.composite
def drawn_axes(
    draw: st.DrawFn, op: Any, shape: tuple[int, ...], free: bool
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The norm's own arguments, what they are to oracle.slices, and the parameters' axes."""
    ndim = len(shape)
    if op in (nbnorm.layer_norm, nbnorm.rms_norm):
        trailing = st.integers(0, ndim - 1).map(lambda first: range(first, ndim))
        axes = tuple(sorted(draw(st.sets(st.integers(0, ndim - 1), min_size=1) if free else trailing)))
        return {"axis": axes}, {"axes": axes}, axes
    channel = draw(st.integers(0 if op is nbnorm.batch_norm else 1, ndim - 1))
    layout = {"channel_axis": channel}
    if op is nbnorm.group_norm:
        layout["num_groups"] = draw(st.sampled_from([n for n in range(1, 7) if shape[channel] % n == 0]))
    return layout | {"channel_axis": channel - draw(st.sampled_from([0, ndim]))}, layout, (channel,)


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...], rng: np.random.Generator, free: bool) -> Any:
    """A mask of the shape, or one that broadcasts to it; at times False wherever the index along some axis is 0."""
    full = [1 if free and draw(st.booleans()) else n for n in shape]
    mask = rng.random(full) < draw(st.sampled_from([0.6, 0.9, 1.0, 0.0]))
    blank = draw(st.none() | st.integers(0, len(shape) - 1))
    if blank is not None:
        np.moveaxis(mask, blank, 0)[0] = False
    leading = next((axis for axis, n in enumerate(full) if n > 1), len(full))
    return mask.reshape(full[draw(st.integers(0, leading)) :])


@st.composite
def arrangements(draw: st.DrawFn, ndim: int) -> Callable[[Any], Any]:
    """A function that lays an array's axes out in another order in memory, and at times backwards or apart."""
    order, axis = draw(st.permutations(range(ndim))), draw(st.integers(0, ndim - 1))
    step = draw(st.sampled_from([1, 2, -1]))

    def arrange(array: Any) -> Any:
        ordered = array.transpose(order)
        shape, index = list(ordered.shape), [slice(None)] * ndim
        shape[axis] *= abs(step)
        index[axis] = slice(None, None, step)
        view = np.zeros(shape, array.dtype)[tuple(index)]
        view[...] = ordered
        return view.transpose(np.argsort(order))

    return arrange


def assert_close(found: dict[str, Any], expected: dict[str, Any], dtype: str) -> None:
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            bound = TOLERANCE[dtype]
            result = found[name].astype(Wide)
            np.testing.assert_allclose(result, np.asarray(value, Wide), rtol=bound, atol=bound, err_msg=name)


def assert_same_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            np.testing.assert_array_equal(as_bits(found[name]), as_bits(value), err_msg=name)


def as_bits(array: Any) -> Any:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


# ---- a mask ----------------------------------------------------------------------------------------------------------


def gathered(case: Case, one: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What `one` makes of the valid elements of each group, as arrays of one axis, put back where they were."""
    shape, x, residual = case.dy.shape, case.arrays["x"], case.arrays["residual"]
    sources = {"x": x, "weight": case.spread("weight"), "bias": case.spread("bias"), "residual": residual}
    total = {"y": np.zeros(shape, Wide)}
    total |= {f"d{name}": None if array is None else np.zeros(shape, Wide) for name, array in sources.items()}
    for _, index in slices(x, case.op.__name__, **case.layout):
        chosen = case.valid[index]
        if not chosen.any():
            continue
        parts = {name: None if array is None else array[index][chosen] for name, array in sources.items()}
        for name, value in one(**parts, dy=case.dy[index][chosen]).items():
            if total[name] is not None:
                total[name][index][chosen] = value
    others = tuple(axis for axis in range(len(shape)) if axis not in case.param_axes)
    for name in ("dweight", "dbias"):
        total[name] = None if total[name] is None else total[name].sum(axis=others)
    return total


def defined(case: Case, x: Any, weight: Any, bias: Any, residual: Any, dy: Any) -> dict[str, Any]:
    """One group, from the definitions."""
    kind = "rms_norm" if case.op is nbnorm.rms_norm else "layer_norm"
    act, slope = DEFINITIONS[case.options.activation]
    before, x = case.options.order == "act_norm", x.astype(Wide)
    u = act(x) if before else x
    z = norm(kind, u, weight, bias, EPS, axes=(0,)).y + (0 if residual is None else residual)
    if not before:
        assume_no_kink(case.options, z)
    dz = dy if before else dy * slope(z)
    found = norm(kind, u, weight, bias, EPS, dz, axes=(0,))
    dx = found.dx * slope(x) if before else found.dx
    y = z if before else act(z)
    return {"y": y, "dx": dx, "dweight": found.dweight, "dbias": found.dbias, "dresidual": dz}


def itself(case: Case, backend: str, dy: Any, **arrays: Any) -> dict[str, Any]:
    """One group, by the library; with parameters of a half type in float32, or each element's gradient is rounded."""
    op = nbnorm.layer_norm
    for name in ("weight", "bias"):
        if arrays[name] is not None and arrays[name].itemsize == 2:
            arrays[name] = arrays[name].astype("float32")
    if case.op is nbnorm.rms_norm:
        op = nbnorm.rms_norm
        del arrays["bias"]
    return both(op, dy, **arrays, axis=0, eps=EPS, backend=backend, **activated(case.options))


@pytest.mark.slow("numba")
@PLAIN_AND_SLOW
def test_masked_equals_gathered(backend: str, wide: bool) -> None:
    def body(case: Case) -> None:
        found = case.results(backend)
        assert_close(found, gathered(case, lambda **parts: defined(case, **parts)), case.options.dtype)
        assert_close(found, gathered(case, lambda **parts: itself(case, backend, **parts)), case.options.dtype)
        _, moments = case.op(**case.arguments(), return_moments=True, backend=backend)
        counts = np.broadcast_to(moments.count, moments.mean.shape)
        for stat, index in slices(case.dy, case.op.__name__, **case.layout):
            assert counts[stat] == np.count_nonzero(case.valid[index])

    drawn = drawn_options(backend, wide).map(lambda options: options._replace(masked=True))
    explore(body, drawn_cases(drawn, fixed=False), backend, wide)


@pytest.mark.slow("numba")
@PLAIN_AND_SLOW
def test_masked_values_change_no_bits(backend: str, wide: bool) -> None:
    def body(drawn: tuple[Case, int]) -> None:
        case, seed = drawn
        rng, limits, hidden = np.random.default_rng(seed), np.finfo(case.options.dtype), ~case.valid
        junk = [np.nan, np.inf, -np.inf, limits.max, -limits.max, limits.smallest_subnormal, -0.0, 1.0]
        expected = case.results(backend)
        for name in ("y", "dx", "dresidual"):
            assert expected[name] is None or not expected[name][hidden].any(), name
        for array in (case.arrays["x"], case.arrays["residual"], case.dy):
            if array is not None:
                array[hidden] = rng.choice(junk, size=np.count_nonzero(hidden))
        assert_same_bits(case.results(backend), expected)

    drawn = drawn_options(backend, wide).map(lambda options: options._replace(masked=True))
    explore(body, st.tuples(drawn_cases(drawn), st.integers(0, 2**32)), backend, wide)


# ---- fused, composed, and apart --------------------------------------------------------------------------------------


class Composed(Backend):
    """The four required methods of another backend; all else as the base class composes it."""

    def __init__(self, inner: Backend) -> None:
        self.name, self._inner = f"composed of {inner.name}", inner

    def moments(self, x: Any, *, center: bool) -> Moments:
        return self._inner.moments(x, center=center)

    def apply(self, *args: Any, out: Any) -> Any:
        return self._inner.apply(*args, out=out)

    def backward_sums(self, *args: Any) -> Any:
        return self._inner.backward_sums(*args)

    def backward_apply(self, *args: Any) -> Any:
        return self._inner.backward_apply(*args)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("inner", "wide"),
    [("numpy", False), pytest.param("numpy", True, marks=SLOW), pytest.param("numba", True, marks=SLOW)],
)
def test_fused_equals_composed(inner: str, wide: bool) -> None:
    composed = Composed({"numba": make_numba, "numpy": make_numpy}[inner]())

    def body(case: Case) -> None:
        if case.options.activation is not None:
            assume_no_kink(case.options, case.results(composed, activation=None)["y"])
        assert_close(case.results("numba"), case.results(composed), case.options.dtype)

    explore(body, drawn_cases(drawn_options("numba", wide)), "numba", wide)


def apart(case: Case, backend: str) -> dict[str, Any]:
    """The norm by the library, and the activation and the residual by NumPy."""
    act, slope = DEFINITIONS[case.options.activation]
    x, residual = case.arrays["x"], case.arrays["residual"]
    dtype, added, without = x.dtype, 0 if residual is None else residual, {"activation": None, "residual": None}
    if case.options.order == "act_norm":
        wide = x.astype(Wide)
        found = case.results(backend, x=act(wide).astype(dtype), **without)
        y, dx, dz = found["y"] + added, found["dx"] * slope(wide), case.dy
    else:
        z = case.results(backend, **without)["y"].astype(Wide) + added
        assume_no_kink(case.options, z)
        dz = (case.dy * slope(z)).astype(dtype)
        found = case.results(backend, dy=dz, **without)
        y, dx = act(z), found["dx"]
    dresidual = None if residual is None else np.where(case.valid, dz, 0)
    return found | {"y": np.where(case.valid, y, 0), "dx": dx, "dresidual": dresidual}


@PLAIN_AND_SLOW
def test_orders_equal_the_steps_apart(backend: str, wide: bool) -> None:
    """Not of half types, to which each step apart is rounded."""

    def body(case: Case) -> None:
        assert_close(case.results(backend), apart(case, backend), case.options.dtype)

    def suited(options: Options) -> bool:
        return options.activation is not None and options.dtype != "float16"

    explore(body, drawn_cases(drawn_options(backend, wide).filter(suited)), backend, wide)


# ---- rows in a batch -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """x (N, T, ...) to be normalized over axes behind T, as the valid part of longer padded sequences."""

    op: Any
    options: Options
    params: dict[str, Any]
    padded: dict[str, Any]  # x, residual if there is one, and dy
    lengths: list[int]
    size: tuple[int, int]  # N and T
    one: tuple[int, int]
    axes: tuple[int, ...]  # from the end

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        sizes = f"size {self.size}, lengths {self.lengths}, one {self.one}"
        printer.text(f"{self.op.__name__} {self.options}: {described(self.padded | self.params)}, {sizes}")

    def results(self, backend: str, index: Any, **mask: Any) -> dict[str, Any]:
        """y and the gradients of x and residual for a part of the padded arrays."""
        arrays = {name: np.ascontiguousarray(array[index]) for name, array in self.padded.items()}
        call = arrays | self.params | mask | activated(self.options) | {"axis": self.axes, "backend": backend}
        found = both(self.op, call.pop("dy"), **call)
        return {name: found[name] for name in ("y", "dx", "dresidual") if found[name] is not None}

    def mask(self) -> Any:
        x = self.padded["x"]
        mask = nbnorm.lengths_to_mask(self.lengths, x.shape[1])
        return mask.reshape(mask.shape + (1,) * (x.ndim - 2))


@st.composite
def drawn_rows(draw: st.DrawFn, options: st.SearchStrategy[Options]) -> Rows:
    op, chosen = draw(st.sampled_from([nbnorm.layer_norm, nbnorm.rms_norm])), draw(options)
    n, t, more, longer = (draw(st.integers(least, 4)) for least in (1, 1, 0, 0))
    rest = draw(st.tuples(st.integers(1, 300)) | st.tuples(st.integers(1, 20), st.integers(1, 20)))
    axes = draw(st.sampled_from([tuple(range(-len(rest), 0)), (-len(rest),)]))  # the last ones, or that behind T
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = [*draw(st.lists(st.integers(0, t), min_size=n, max_size=n)), *[t] * more]
    names = ("x", "dy", "residual") if chosen.residual else ("x", "dy")
    padded = {name: rng.normal(size=(n + more, t + longer, *rest)).astype(chosen.dtype) for name in names}
    params = {}
    for name in ("weight",) if op is nbnorm.rms_norm else ("weight", "bias"):
        if draw(st.booleans()):
            params[name] = rng.normal(size=rest[: len(axes)]).astype(chosen.dtype)
    one = draw(st.integers(0, n - 1)), draw(st.integers(0, t - 1))
    return Rows(op, chosen, params, padded, lengths, (n, t), one, axes)


def at(results: dict[str, Any], index: Any) -> dict[str, Any]:
    return {name: value[index] for name, value in results.items()}


@pytest.mark.slow("numba")
@PLAIN_AND_SLOW
def test_neither_batch_nor_padding_changes_bits(backend: str, wide: bool) -> None:
    def body(rows: Rows) -> None:
        (n, t), mask = rows.size, rows.mask()
        batch = rows.results(backend, np.s_[:n, :t])
        assert_same_bits(rows.results(backend, rows.one), at(batch, rows.one))
        masked = rows.results(backend, np.s_[:n, :t], mask=mask[:n, :t])
        padded = rows.results(backend, np.s_[:], mask=mask)
        for i, length in enumerate(rows.lengths[:n]):
            valid = np.s_[i, :length]
            assert_same_bits(at(padded, valid), at(masked, valid))
            # NumPy rounds float16 to float32 first under a mask; Numba sums columns in blocks only without one.
            if rows.axes[-1] == -1 if backend == "numba" else rows.options.dtype != "float16":
                assert_same_bits(at(masked, valid), at(batch, valid))

    explore(body, drawn_rows(drawn_options(backend, wide)), backend, wide)
