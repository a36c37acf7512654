"""The kernels of the CUDA backend, run thread by thread in the simulator, beside the oracle.

The simulator has exact elementary functions, so what a device's approximations add to errors is not in here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import special

import nbnorm
import oracle
import test_options as options
from bounds import backward, forward, multiple
from cases import Norm, batch, data, group, has_bias, instance, layer
from nbnorm import activations, layout
from nbnorm.backend import ACTIVATIONS, ORDERS
from nbnorm.engine import view_like, view_mask, view_param

pytest.importorskip("greenlet", reason="greenlet is not installed (it comes with the test extra)")
from nbnorm_backends.numba_cuda import columns, functions, launch, plans, rows, simulated, simulator, totals

EPS = 1e-5

CASES = [
    layer("layer", nbnorm.layer_norm, (6, 11), 1),
    layer("layer, vectors", nbnorm.layer_norm, (5, 64), 1),
    layer("layer, a warp", nbnorm.layer_norm, (5, 264), 1),
    layer("layer, a block", nbnorm.layer_norm, (2, 1032), 1),
    layer("layer, two blocks of sums", nbnorm.layer_norm, (40, 8), 1),
    layer("layer, odd", nbnorm.layer_norm, (3, 131), 1),
    layer("layer, odd, a block", nbnorm.layer_norm, (2, 1029), 1),
    layer("layer over one value", nbnorm.layer_norm, (5, 1), 1),
    layer("rms", nbnorm.rms_norm, (6, 11), 1),
    layer("rms, a warp", nbnorm.rms_norm, (5, 264), 1),
    batch("batch 2-D", (7, 5)),
    batch("batch 2-D, vectors", (37, 16)),
    batch("batch NCHW", (3, 6, 4, 5)),
    batch("batch NCHW, vectors", (3, 4, 4, 6)),
    batch("batch NCHW, large planes", (2, 2, 20, 40)),
    batch("batch NHWC", (3, 4, 5, 6), -1),
    batch("batch NHWC, vectors", (3, 4, 5, 16), -1),
    batch("batch NHWC, tall", (2, 16, 17, 8), -1),
    batch("batch, one channel", (6, 1, 5)),
    batch("batch, one sample", (1, 6, 3, 8)),
    group("group NCHW", (3, 6, 4, 5), 3),
    group("group NCHW, vectors", (3, 6, 4, 4), 3),
    group("group NHWC", (3, 4, 5, 6), 2, -1),
    group("group NHWC, vectors", (2, 7, 8, 16), 4, -1),
    group("group 2-D", (4, 6), 2),
    instance("instance NCHW", (3, 4, 5, 6)),
    instance("instance NCHW, vectors", (3, 4, 4, 6)),
    instance("instance NHWC", (3, 5, 6, 4), 3),
]
NAMED = {case.name: case for case in CASES}
OTHER_TYPES = [
    "layer",
    "layer, a warp",
    "rms, a warp",
    "batch NCHW",
    "batch NCHW, vectors",
    "batch NHWC",
    "batch NHWC, vectors",
    "group NCHW, vectors",
    "group NHWC, vectors",
    "instance NCHW",
]


class Run(NamedTuple):
    """A norm on the simulator: how the caller's axes lie in kernels, what is asked for, and the inputs, flat."""

    case: Norm
    axes: layout.Axes
    placed: layout.Plan
    norm: plans.Norm
    inputs: dict[str, Any]
    seed: int = 0

    def flat(self, array: Any) -> Any:
        """An array of x's shape as it lies in memory."""
        return np.array(view_like(array, self.axes, self.placed)).reshape(-1)

    def back(self, found: Any) -> Any:
        """A result of x's size in the caller's axes."""
        lengths = [self.axes.shape[axis] for axis in self.placed.order]
        return found.reshape(lengths).transpose(layout.inverse(self.placed.order)).reshape(self.case.shape)

    def forward(self, **inputs: Any) -> dict[str, Any]:
        return simulated.execute(plans.forward(self.norm), {**self.inputs, **inputs}, seed=self.seed)

    def backward(self, dy: Any, found: dict[str, Any], **inputs: Any) -> dict[str, Any]:
        kept = {name: found[name] for name in ("mean_high", "mean_low", "rstd", "valid", "total") if name in found}
        given = {**self.inputs, "dy": self.flat(dy), **kept, **inputs}
        return simulated.execute(plans.backward(self.norm), given, seed=self.seed)


def axes_of(case: Norm) -> layout.Axes:
    name, keys, ndim = case.op.__name__, case.oracle, len(case.shape)
    if name in ("layer_norm", "rms_norm"):
        return layout.over(case.shape, tuple(axis % ndim for axis in keys["axes"]))
    axis = keys["channel_axis"] % ndim
    if name == "group_norm":
        return layout.group(case.shape, keys["num_groups"], axis)
    return (layout.batch if name == "batch_norm" else layout.instance)(case.shape, axis)


def run_of(case: Norm, x: Any, weight: Any, bias: Any, *, seed: int = 0, **keys: Any) -> Run:
    axes = axes_of(case)
    placed = layout.logical_plan(axes)
    assert placed.param_shape[1] == 1, "weights along r"
    kind = x.dtype.name
    center = case.op is not nbnorm.rms_norm
    asked = plans.Norm(
        kind, placed.layout, center=center, weight=weight is not None, bias=bias is not None, multiprocessors=1, **keys
    )
    run = Run(case, axes, placed, asked, {}, seed)
    run.inputs["x"] = run.flat(x)
    for name, param in (("weight", weight), ("bias", bias)):
        if param is not None:
            wide = param.dtype != x.dtype
            run.inputs[f"{name}_wide" if wide else name] = view_param(param, axes, placed).reshape(-1)
    return run


def params_of(case: Norm, dtype: str) -> tuple[Any, ...]:
    x, weight, bias, dy = data(case, dtype)
    return x, weight, bias if has_bias(case) else None, dy


class Found(NamedTuple):
    """Gradients in the caller's axes."""

    x: Any
    weight: Any
    bias: Any


def grads_of(run: Run, found: dict[str, Any]) -> Found:
    bias = found["dbias"] if "bias" in run.inputs or "bias_wide" in run.inputs else None
    dx = run.back(found["dx"])
    return Found(dx, found.get("dweight"), bias)


def check(case: Norm, dtype: str, x: Any, weight: Any, bias: Any, dy: Any, *, bound: float, **keys: Any) -> None:
    """Forward and backward, each within `bound` times what the CPU is allowed."""
    run = run_of(case, x, weight, bias, **keys)
    exact = oracle.norm(case.op.__name__, x, weight, bias, EPS, dy, **case.oracle)
    found = run.forward()
    assert forward(run.back(found["y"]), exact) <= bound
    grads = grads_of(run, run.backward(dy, found))
    if weight is not None:
        shape = exact.dweight.shape
        grads = grads._replace(
            weight=grads.weight.reshape(shape), bias=None if bias is None else grads.bias.reshape(shape)
        )
    else:
        grads = grads._replace(weight=None, bias=None)
    assert backward(grads, exact) <= bound


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_norms_cuda(case: Norm) -> None:
    check(case, "float32", *params_of(case, "float32"), bound=1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", OTHER_TYPES)
def test_types_cuda(name: str, dtype: str) -> None:
    check(NAMED[name], dtype, *params_of(NAMED[name], dtype), bound=1)


@pytest.mark.parametrize("name", ["layer", "batch NHWC", "group NCHW", "rms"])
@pytest.mark.parametrize("given", ["none", "weight", "bias"])
def test_weights_may_be_missing_cuda(name: str, given: str) -> None:
    x, weight, bias, dy = params_of(NAMED[name], "float32")
    if given == "bias" and bias is None:
        pytest.skip("RMS norm has no bias")
    weight, bias = weight if given == "weight" else None, bias if given == "bias" else None
    case, run = NAMED[name], run_of(NAMED[name], x, weight, bias)
    exact = oracle.norm(case.op.__name__, x, weight, bias, EPS, dy, **case.oracle)
    found = run.forward()
    assert forward(run.back(found["y"]), exact) <= 1
    grads = run.backward(dy, found)
    assert multiple(run.back(grads["dx"]), exact.dx, exact.dx_size, exact.dx_far) <= 1
    assert ("dbias" in grads) == (given != "none")
    if given == "bias":
        assert multiple(grads["dbias"], exact.dbias, np.maximum(exact.dbias_size, 1), None) <= 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["layer, a warp", "layer", "batch NCHW, vectors", "group NHWC, vectors"])
def test_single_weights_beside_half_types_cuda(name: str, dtype: str) -> None:
    x, _, _, dy = params_of(NAMED[name], dtype)
    _, weight, bias, _ = params_of(NAMED[name], "float32")
    check(NAMED[name], dtype, x, weight, bias, dy, bound=1, wide=True)


# ---- activations, residuals and masks --------------------------------------------------------------------------------

OPTIONS = [
    batch("batch NCL", (3, 4, 5)),
    batch("batch NCL, vectors", (2, 3, 8)),
    batch("batch NLC", (3, 5, 4), 2),
    group("group", (2, 6, 5), 2),
    group("group NLC", (2, 5, 6), 3, 2),
    instance("instance", (3, 2, 7)),
    layer("layer", nbnorm.layer_norm, (3, 4, 5), 1),
    layer("layer, vectors", nbnorm.layer_norm, (3, 2, 8), 1),
    layer("rms", nbnorm.rms_norm, (3, 4, 5), 2),
]
MASKS = ["no mask", "dense", "lengths", "last axis"]


def defined(case: Norm) -> options.Case:
    """The case as the definitions in test_options take it."""
    axis = {"channel_axis": case.oracle["channel_axis"] % len(case.shape)} if "channel_axis" in case.oracle else {}
    return options.Case(case.name, case.op, case.shape, case.params, {}, {**case.oracle, **axis})


def joined() -> list[Any]:
    """Every activation in both orders with and without masks, spread over the norms."""
    found = []
    for i, (activation, order) in enumerate((a, o) for a in (*ACTIVATIONS, None) for o in ORDERS):
        for j in range(2):
            case, mask = OPTIONS[(2 * i + 5 * j) % len(OPTIONS)], MASKS[(i + 2 * j) % len(MASKS)]
            residual = (i + j) % 3 > 0
            label = f"{case.name}-{activation}-{order}-{mask}-{'residual' if residual else 'alone'}"
            found.append(pytest.param(case, activation, order, mask, residual, id=label))
    return found + [
        pytest.param(case, None, "norm_act", mask, False, id=f"{case.name}-{mask}")
        for i, case in enumerate(OPTIONS)
        for mask in (MASKS[1 + i % 3], MASKS[1 + (i + 1) % 3])
    ]


@pytest.mark.parametrize(("case", "activation", "order", "mask_name", "residual"), joined())
def test_options_cuda(case: Norm, activation: str | None, order: str, mask_name: str, residual: bool) -> None:
    """Against a forward from the definitions, and its central differences; what the mask hides is NaN and infinite."""
    arrays = {name: a.astype(np.float32) for name, a in options.inputs(defined(case)).items()}
    if not residual:
        del arrays["residual"]
    mask = options.masks(case.shape)[mask_name]
    dy = np.random.default_rng(3).normal(size=case.shape).astype(np.float32)
    valid = np.ones(case.shape, bool) if mask is None else np.broadcast_to(mask, case.shape)
    hidden = {name: options.spoilt(a, mask) if a.shape == case.shape else a for name, a in arrays.items()}
    hidden = {name: a.astype(np.float32) for name, a in hidden.items()}
    axes = axes_of(case)
    placed = layout.logical_plan(axes)
    five = None
    if mask is not None:
        five = view_mask(
            np.array(mask).reshape((1,) * (len(case.shape) - np.ndim(mask)) + np.shape(mask)), axes, placed
        )
    keys: dict[str, Any] = {"activation": activation, "order": order, "eps": 1e-2, "residual": residual}
    keys["mask"] = None if five is None else five.shape
    run = run_of(case, hidden["x"], arrays["weight"], arrays.get("bias"), **keys)
    if five is not None:
        run.inputs["mask"] = five.reshape(-1).view(np.uint8)
    if residual:
        run.inputs["residual"] = run.flat(hidden["residual"])
    reference = {"mask": mask, "activation": activation, "order": order}
    names = ("x", "weight", "bias", "residual")

    found = run.forward()
    y = run.back(found["y"])
    expected = options.reference(defined(case), *(arrays.get(name) for name in names), **reference).astype(float)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=2e-6)
    assert not y[~valid].any()

    made = run.backward(options.spoilt(dy, mask).astype(np.float32), found)
    grads = {"x": run.back(made["dx"]), "weight": made["dweight"], "bias": made.get("dbias")}
    if residual:
        grads["residual"] = run.back(made["dz"])
    counted = np.where(valid, dy, 0).astype(oracle.Wide)
    for name, value in arrays.items():
        numeric = differences(defined(case), arrays, name, counted, reference)
        found_grad = grads[name].reshape(value.shape)
        np.testing.assert_allclose(found_grad, numeric, rtol=2e-5, atol=2e-5, err_msg=name)
        if value.shape == case.shape:
            assert not found_grad[~valid].any()


def differences(case: Any, arrays: dict[str, Any], name: str, dy: Any, keys: dict[str, Any]) -> Any:
    """Central differences of sum(y * dy) for each element of one input."""
    step = oracle.Wide(1e-5)
    numeric = np.empty(arrays[name].shape)
    for index in np.ndindex(numeric.shape):
        sides = []
        for sign in (1, -1):
            moved = arrays[name].astype(oracle.Wide)
            moved[index] += sign * step
            given = {**arrays, name: moved}
            y = options.reference(case, *(given.get(each) for each in ("x", "weight", "bias", "residual")), **keys)
            sides.append((y * dy).sum())
        numeric[index] = (sides[0] - sides[1]) / (2 * step)
    return numeric


def test_gelu_and_its_slope_cuda() -> None:
    """The definition of gelu in the differences is in float64: here with its derivative from scipy."""
    z = np.linspace(-9, 9, 181)
    activate, slope = functions.make_activations(simulator.primitives("float32"))
    code = functions.CODES["gelu"]
    exact = special.ndtr(z) + z * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    found = [(activate(code, np.float32(each)), slope(code, np.float32(each))) for each in z]
    np.testing.assert_allclose([pair[0] for pair in found], z * special.ndtr(z), atol=1e-6)
    np.testing.assert_allclose([pair[1] for pair in found], exact, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_far_out_are_those_of_the_cpu_cuda(name: str, dtype: str) -> None:
    """Beyond the root of the largest number and at infinity, wherever the CPU's is a number: silu there has none."""
    real = np.dtype(dtype).type
    z = np.array([5, 100, 2e19, 3e38, np.inf, 1e155 if dtype == "float64" else 1], dtype)
    z = np.concatenate([z, -z])
    functions_of = functions.make_activations(simulator.primitives(dtype))
    code = functions.CODES[name]
    for found, exact in zip(functions_of, (activations.activate, activations.derivative), strict=True):
        with np.errstate(all="ignore"):
            values, expected = np.array([found(code, real(each)) for each in z]), exact(name, z).astype(dtype)
        number = ~np.isnan(expected)
        assert number[np.isfinite(z)].all()
        np.testing.assert_allclose(values[number], expected[number], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("length", [11, 264])
def test_the_sum_with_another_array_is_rounded_and_normalized_cuda(length: int, dtype: str) -> None:
    case = layer("layer", nbnorm.layer_norm, (4, length), 1)
    x, weight, bias, dy = params_of(case, dtype)
    other = np.random.default_rng(1).normal(size=case.shape).astype(x.dtype)
    total = x + other
    run = run_of(case, x, weight, bias, total=True)
    run.inputs["residual"] = run.flat(other)
    found = run.forward()
    exact = oracle.norm("layer_norm", total, weight, bias, EPS, dy, axes=(1,))
    np.testing.assert_array_equal(run.back(found["total"]), total)
    assert forward(run.back(found["y"]), exact) <= 1
    addend = np.random.default_rng(2).normal(size=case.shape).astype(x.dtype)
    pulled = run_of(case, total, weight, bias, addend=True)
    made = pulled.backward(dy, found, addend=pulled.flat(addend))
    dx = exact.dx + addend.astype(oracle.Wide)
    assert multiple(run.back(made["dx"]), dx, exact.dx_size + abs(dx), exact.dx_far) <= 1


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [NAMED["batch NCHW"], NAMED["batch NHWC, vectors"]], ids=lambda case: case.name)
@pytest.mark.parametrize("variance", [True, False])
def test_given_statistics_cuda(case: Norm, variance: bool) -> None:
    x, weight, bias, dy = params_of(case, "float32")
    channels = case.params[0]
    rng = np.random.default_rng(5)
    mean, var = rng.normal(size=channels).astype(np.float32), rng.uniform(1, 2, size=channels).astype(np.float32)
    run = run_of(case, x, weight, bias, fixed=True, shared=True, variance=variance)
    rstd = var if variance else (1 / np.sqrt(var.astype(float) + EPS)).astype(np.float32)
    given = {"mean_high": mean, "mean_low": np.zeros_like(mean), "rstd": rstd}
    found = run.forward(**given)
    exact = oracle.norm("batch_norm", x, weight, bias, EPS, dy, fixed=(mean, var), **case.oracle)
    assert forward(run.back(found["y"]), exact) <= 1
    assert backward(grads_of(run, run.backward(dy, found, **given)), exact) <= 1


@pytest.mark.parametrize("name", ["layer", "layer, vectors", "group NCHW, vectors", "group NHWC, vectors"])
def test_statistics_of_each_sample_may_be_given_cuda(name: str) -> None:
    case = NAMED[name]
    x, weight, bias, dy = params_of(case, "float32")
    own = run_of(case, x, weight, bias)
    exact = oracle.norm(case.op.__name__, x, weight, bias, EPS, dy, **case.oracle)
    found = own.forward()
    given = {key: found[key] for key in ("mean_high", "mean_low", "rstd")}
    run = run_of(case, x, weight, bias, fixed=True)
    assert forward(run.back(run.forward(**given)["y"]), exact) <= 1
    made = run.backward(dy, found)
    expected = dy * options.spread(defined(case), weight, x) * scales(case, x)
    np.testing.assert_allclose(run.back(made["dx"]), expected.astype(float), rtol=1e-5, atol=1e-6)
    for key, total in (("dweight", exact.dweight), ("dbias", exact.dbias)):
        np.testing.assert_allclose(made[key], total.reshape(-1).astype(float), rtol=1e-5, atol=1e-5)


def scales(case: Norm, x: Any) -> Any:
    """1 / sqrt(var + eps) for each element of x."""
    found = np.empty(x.shape)
    for _, index in oracle.slices(x, case.op.__name__, **case.oracle):
        found[index] = 1 / np.sqrt(x[index].astype(float).var() + EPS)
    return found


FAR = ["layer, a warp", "layer, odd", "batch NCHW, vectors", "batch NHWC, tall", "group NHWC, vectors", "instance NCHW"]


@pytest.mark.parametrize("name", FAR)
def test_an_offset_costs_no_digits_cuda(name: str) -> None:
    """At offset 1e6 with a standard deviation of 1: what docs/numerics.md allows at every offset."""
    case = NAMED[name]
    _, weight, bias, dy = params_of(case, "float32")
    far = (np.random.default_rng(9).normal(size=case.shape) + 1e6).astype(np.float32)
    check(case, "float32", far, weight, bias, dy, bound=1)
    run = run_of(case, far, None, None)
    exact = oracle.norm(case.op.__name__, far, eps=EPS, **case.oracle)
    assert np.max(abs(run.back(run.forward()["y"]) - exact.y)) <= 1e-5


@pytest.mark.parametrize("name", [*FAR, "layer, a block"])
@pytest.mark.parametrize("value", [1e10 / 3, 0.1])
def test_equal_values_have_no_variance_cuda(name: str, value: float) -> None:
    case = NAMED[name]
    run = run_of(case, np.full(case.shape, value, np.float32), None, None)
    for found in (run.forward(), simulated.execute(plans.statistics(run.norm), run.inputs)):
        assert not found["m2"].any()
        np.testing.assert_array_equal(found["mean_high"], np.float32(value))
        assert not found["mean_low"].any()


@pytest.mark.parametrize("name", [*FAR, "layer, a block"])
def test_equal_values_give_zero_for_any_positive_eps_cuda(name: str) -> None:
    """Of 1e-46 nothing is left in float32."""
    case = NAMED[name]
    run = run_of(case, np.full(case.shape, 3, np.float32), None, None, eps=1e-46)
    assert not run.forward()["y"].any()
    x = params_of(case, "float32")[0]
    y = run_of(case, x, None, None, eps=1e-46).forward()["y"]
    np.testing.assert_array_equal(y, run_of(case, x, None, None, eps=0.0).forward()["y"])


@pytest.mark.parametrize("name", ["layer, a warp", "batch NCHW, vectors", "batch NHWC, tall"])
@pytest.mark.parametrize("scale", [2.0**-61, 2.0**55])
def test_the_range_that_is_documented_cuda(name: str, scale: float) -> None:
    """Standard deviations from 4e-19 to 4e16."""
    case = NAMED[name]
    x = params_of(case, "float32")[0]
    expected = run_of(case, x, None, None, eps=0.0).forward()["y"]
    found = run_of(case, x * np.float32(scale), None, None, eps=0.0).forward()["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["layer, a warp", "batch NCHW, vectors", "batch NHWC, tall"])
def test_above_the_range_the_variance_is_infinite_cuda(name: str) -> None:
    case = NAMED[name]
    x = np.where(np.random.default_rng(7).random(case.shape) < 0.5, np.float32(-1e19), np.float32(1e19))
    run = run_of(case, x, None, None)
    assert (simulated.execute(plans.statistics(run.norm), run.inputs)["m2"] == np.inf).all()
    assert not run.forward()["y"].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_stays_infinite_cuda(sign: int) -> None:
    add = functions.make_add(simulator.primitives("float32"))
    total = rest = np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        for term in (1e38, 2e38, 3e38, 1e38, 1, np.inf):
            total, rest = add(total, rest, np.float32(sign * term))
    assert total == sign * np.inf
    assert rest == 0


def test_equal_squares_of_many_sets_are_not_rounded_to_one_side_cuda() -> None:
    merge, _ = functions.make_merge(None, simulator.primitives("float32"))
    mean = np.float32(3)
    found: Any = 0, mean, np.float32(0), np.float32(0), np.float32(0)
    for _ in range(200):
        found = merge(*found, 5, mean, np.float32(0), LOST)
    assert found[:3] == (1000, mean, 0)
    assert found[3] == pytest.approx(np.float64(LOST) * 200, rel=1.5e-7)


@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.name)
def test_statistics_cuda(case: Norm) -> None:
    x = params_of(case, "float32")[0]
    run = run_of(case, x, None, None)
    found = simulated.execute(plans.statistics(run.norm), run.inputs)
    exact = oracle.norm(case.op.__name__, x, eps=EPS, **case.oracle)
    count = run.norm.count
    mean = np.array([exact.mean[stat] for stat in exact.mean], float)
    var = np.array([exact.var[stat] for stat in exact.var], float)
    kept = found["mean_high"].astype(float) + found["mean_low"]
    # Layer norm lists its statistics as the axes lie, and so do these.
    np.testing.assert_allclose(kept, mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found["m2"] / count, var, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found["rstd"], 1 / np.sqrt(var + EPS), rtol=1e-6)
    np.testing.assert_array_equal(found["valid"], count)


# Sums of it are rounded down again and again while they are 64 to 256 times as large: 200 of them were off by 2e-6. Its
# root has a square of which the same holds.
LOST = np.float32(1 + 2**-18 - 2**-23)
ROOT_LOST = np.float32(1 + 2**-19 - 2**-23)


def squeezed(plan: plans.Plan, block: int, **args: int) -> plans.Plan:
    """The first launch in one block of so many threads, without splits."""
    first, *rest = plan.launches
    variant = first.variant
    if variant.rows is not None:
        variant = replace(variant, rows=variant.rows._replace(threads=block, block=block))
    given = {name: 1 for name in ("splits", "slabs") if name in first.args} | args
    first = replace(first, variant=variant, grid=1, block=block, args=first.args | given)
    others = [replace(each, args=each.args | {n: 1 for n in ("splits", "parts") if n in each.args}) for each in rest]
    return replace(plan, launches=(first, *others))


@pytest.mark.parametrize(
    ("family", "sizes", "aligned", "block"),
    [
        ("row_backward", (200, 1, 1, 8, 1), True, 8),
        ("columns_sums", (1, 200, 32, 1, 1), False, 32),
        ("planes_sums", (1, 1, 1, 1, 200 * 256), False, 256),
    ],
)
def test_equal_gradients_are_not_rounded_to_one_side_cuda(
    family: str, sizes: tuple[int, ...], aligned: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rows, columns):  # so that many sums meet, with their rests
        monkeypatch.setattr(module, "FOLD", 2)
    shape = layout.Layout(*sizes)
    norm = plans.Norm("float32", shape, weight=True, bias=True, aligned=aligned, multiprocessors=1)
    plan = squeezed(plans.backward(norm), block)
    assert plan.launches[0].variant.family == family
    n, _, g, c, _ = shape
    size = int(np.prod(shape))
    x = np.random.default_rng(2).normal(size=size).astype(np.float32)
    statistics = np.zeros(n * g, np.float32)
    inputs = {"x": x, "dy": np.full(size, LOST), "mean_high": statistics, "mean_low": statistics}
    inputs |= {"rstd": statistics + np.float32(1), "weight": np.ones(g * c, np.float32), "bias": np.ones(g * c, "f4")}
    made = simulated.execute(plan, inputs)
    np.testing.assert_allclose(made["dbias"], np.float64(LOST) * (size // (g * c)), rtol=1.5e-7)


@pytest.mark.parametrize(
    ("family", "sizes", "block"),
    [
        ("long_row_forward", (1, 1, 1, 1, 200 * 128), 32),
        ("columns_statistics", (1, 800, 32, 1, 1), 32),
        ("planes_statistics", (1, 1, 1, 1, 200 * 32 * 4), 32),
    ],
)
def test_equal_squares_are_not_rounded_to_one_side_cuda(
    family: str, sizes: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = layout.Layout(*sizes)
    norm = plans.Norm("float32", shape, center=False, aligned=family == "long_row_forward", multiprocessors=1)
    if family == "long_row_forward":
        monkeypatch.setattr(plans, "FEW_ROWS", 0)
    plan = squeezed((plans.forward if family == "long_row_forward" else plans.statistics)(norm), block)
    assert plan.launches[0].variant.family == family
    x = np.full(int(np.prod(shape)), ROOT_LOST)
    found = simulated.execute(plan, {"x": x})
    np.testing.assert_allclose(found["m2"], np.float64(ROOT_LOST) ** 2 * norm.count, rtol=1.5e-7)


@pytest.mark.parametrize("case", [layer("layer, many rows", nbnorm.layer_norm, (150, 8), 1), NAMED["batch NHWC, tall"]])
def test_gradients_are_added_in_pieces_cuda(case: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, columns):
        monkeypatch.setattr(module, "FOLD", 2)
    check(case, "float32", *params_of(case, "float32"), bound=1)


@pytest.mark.parametrize("family", ["finish_gradient", "sum_columns", "commit"])
def test_equal_parts_are_not_rounded_to_one_side_cuda(family: str) -> None:
    parts = 200 * {"finish_gradient": 32, "sum_columns": totals.LINES, "commit": 1}[family]
    given = {name: np.full(parts, LOST) for name in ("part_weight", "part_bias", "mean_high", "m2")}
    found = {name: np.zeros(1, np.float32) for name in ("dweight", "dbias", "running_mean", "running_var")}
    given |= found
    counts = {"parts": parts, "length": 1, "samples": 1, "groups": 1, "channels": 1, "splits": parts, "first": 1}
    counts |= {"last": 2, "count": 2, "flags": 0, "momentum": np.float32(1)}
    if family == "commit":
        counts["samples"] = parts
    P = simulator.primitives("float32")
    kernel = launch.Variant(family, "float32", vector=False)
    block = {"finish_gradient": 32, "sum_columns": 32 * totals.LINES, "commit": 32}[family]
    names = simulated._factory(kernel)[1]
    args = [given.get(name, counts.get(name)) for name in names]
    simulator.launch(lambda cuda: kernel.make(cuda, P), 1, block, args)
    for name, sum_of in (("dweight", parts), ("dbias", parts), ("running_mean", 1), ("running_var", 1)):
        if name in names:
            np.testing.assert_allclose(found[name], np.float64(LOST) * sum_of, rtol=1.5e-7, err_msg=name)


def committed(found: dict[str, Any], old: tuple[Any, Any], *shape: int, masked: bool = False) -> tuple[Any, Any]:
    mean, var = (np.array(each, np.float32) for each in old)
    names = ("mean_high", "m2", *(["valid"] if masked else []))
    inputs = {name: found[name] for name in names} | {"running_mean": mean, "running_var": var}
    samples, channels, count = shape
    plan = plans.commit("float32", samples, channels, count, 0.1, masked=masked)
    simulated.execute(plan, inputs, element=np.dtype(np.float32))
    return mean, var


def test_running_statistics_cuda() -> None:
    """The unbiased variance, averaged over samples."""
    mean = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    m2 = np.array([[8.0, 4.0], [12.0, 0.0]], np.float32)
    found = {"mean_high": mean.ravel(), "m2": m2.ravel()}
    new_mean, new_var = committed(found, ([0.5, 0.5], [2.0, 2.0]), 2, 2, 5)
    np.testing.assert_allclose(new_mean, [0.45 + 0.1 * 2, 0.45 + 0.1 * 3], rtol=1e-6)
    np.testing.assert_allclose(new_var, [1.8 + 0.1 * 2.5, 1.8 + 0.1 * 0.5], rtol=1e-6)


def test_running_statistics_of_valid_elements_cuda() -> None:
    """One channel full, one with a single element, one with none."""
    found = {"mean_high": np.array([1, 2, 0], np.float32), "m2": np.array([6, 0, 0], np.float32)}
    found["valid"] = np.array([4, 1, 0], np.int64)
    mean, var = committed(found, ([0.5] * 3, [2.0] * 3), 1, 3, 4, masked=True)
    np.testing.assert_allclose(mean, [0.55, 0.65, 0.5], rtol=1e-6)
    np.testing.assert_allclose(var, [2.0, 2.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["mean_high", "m2"])
def test_a_batch_that_is_not_finite_is_skipped_cuda(name: str, value: float) -> None:
    found = {"mean_high": np.arange(300, dtype=np.float32), "m2": np.ones(300, np.float32)}
    found[name][299] = value
    mean, var = committed(found, (np.zeros(300), np.ones(300)), 1, 300, 5)
    assert not mean.any()
    np.testing.assert_array_equal(var, 1)


# ---- how work is cut, and where arrays begin -------------------------------------------------------------------------

CUT = [
    "layer, two blocks of sums",
    "layer, a block",
    "batch NCHW, large planes",
    "batch NHWC, tall",
    "group NHWC, vectors",
]


@pytest.mark.parametrize("name", CUT)
def test_same_bits_in_any_order_cuda(name: str) -> None:
    """Blocks merge what they have in a fixed order, whichever ends first."""
    x, weight, bias, dy = params_of(NAMED[name], "float32")
    results = []
    for seed in range(4):
        run = run_of(NAMED[name], x, weight, bias, seed=seed)
        run = run._replace(norm=replace(run.norm, multiprocessors=8))
        found = run.forward()
        results.append({**found, **run.backward(dy, found)})
    grids = [launch.grid for plan in (plans.forward(run.norm), plans.backward(run.norm)) for launch in plan.launches]
    assert max(grids) > 1
    for other in results[1:]:
        for key, value in results[0].items():
            if not key.startswith(("part_", "counters")):
                np.testing.assert_array_equal(value, other[key], err_msg=key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["layer, a warp", "batch NCHW, vectors", "batch NHWC, vectors"])
def test_arrays_may_begin_anywhere_cuda(name: str, dtype: str) -> None:
    case = NAMED[name]
    x, weight, bias, dy = params_of(case, dtype)
    aligned = run_of(case, x, weight, bias)
    shifted = np.concatenate([np.zeros(1, x.dtype), aligned.inputs["x"]])
    run = aligned._replace(norm=replace(aligned.norm, aligned=False))
    given = {"x": simulator.Pointer(shifted, 1)}
    found = simulated.execute(plans.forward(run.norm), {**run.inputs, **given}, element=x.dtype)
    exact = oracle.norm(case.op.__name__, x, weight, bias, EPS, dy, **case.oracle)
    assert forward(run.back(found["y"]), exact) <= 1
    with pytest.raises(simulator.SimulatorError, match="misaligned vector"):
        simulated.execute(plans.forward(aligned.norm), {**run.inputs, **given}, element=x.dtype)


@pytest.mark.parametrize("shape", [(3, 64), (2, 37)])
def test_rows_too_long_for_registers_cuda(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "row_classes", lambda *_: (None,))
    case = layer("layer", nbnorm.layer_norm, shape, 1)
    run = run_of(case, *params_of(case, "float32")[:3])
    assert {launch.variant.family for launch in plans.backward(run.norm).launches} >= {"planes_sums", "columns_sums"}
    check(case, "float32", *params_of(case, "float32"), bound=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_longest_rows_in_registers_cuda(dtype: str) -> None:
    case = layer("layer", nbnorm.layer_norm, (2, 4104), 1)
    run = run_of(case, *params_of(case, dtype)[:3])
    assert plans.backward(run.norm).launches[0].variant.name == f"row_backward_{dtype}_vector_512x16"
    check(case, dtype, *params_of(case, dtype), bound=1)


def test_few_long_rows_are_split_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    case = layer("layer", nbnorm.layer_norm, (2, 2**17), 1)
    norm = plans.Norm("float32", layout.Layout(2, 1, 1, 2**17, 1), weight=True, bias=True)
    families = [launch.variant.family for launch in plans.forward(norm).launches]
    assert families == ["planes_statistics", "columns_apply"]
    monkeypatch.setattr(plans, "_rows_forward", lambda norm: None)
    case = layer("layer", nbnorm.layer_norm, (3, 1032), 1)
    check(case, "float32", *params_of(case, "float32"), bound=1)


def test_every_family_is_planned_cuda() -> None:
    """For some case above, which runs it: those that a mask or a weight leads to are there by their own."""
    families = {"commit"}
    for case in CASES:
        x, weight, bias, _ = params_of(case, "float32")
        norm = run_of(case, x, weight, bias).norm
        for plan in (plans.forward(norm), plans.backward(norm), plans.statistics(norm)):
            families |= {each.variant.family for each in plan.launches}
    assert families == set(launch.FACTORIES)


def test_plans_launch_what_is_listed_cuda() -> None:
    known = set(launch.variants())
    for kind in launch.KINDS:
        for sizes in (
            (64, 1, 1, 4096, 1),
            (8, 1, 32, 8, 196),
            (1, 32, 64, 1, 3136),
            (1, 6272, 64, 1, 1),
            (2, 49, 8, 4, 1),
        ):
            for keys in ({}, {"aligned": False}, {"activation": "gelu", "order": "act_norm"}):
                norm = plans.Norm(kind, layout.Layout(*sizes), weight=True, bias=True, **keys)
                for plan in (plans.forward(norm), plans.backward(norm), plans.statistics(norm)):
                    assert {each.variant for each in plan.launches} <= known
    assert len(known) < 150
