"""Every norm against the oracle: values and gradients, over layouts, dtypes and the ways an array may lie in memory."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

import nbnorm
from cases import NORMS, Norm, data, dtype_of, has_bias
from oracle import norm

# |y - exact| relative to max(1, |exact|). A result in a half type is rounded once to float32 and once to the type.
BOUND = {"float64": 1e-13, "float32": 4e-7, "float16": 1e-3, "bfloat16": 8e-3}
# Gradients of parameters are sums, rounded once to the parameter's type.
GRAD_BOUND = {"float64": 1e-12, "float32": 4e-7, "float16": 1e-3, "bfloat16": 8e-3}

BY_NAME = pytest.mark.parametrize("case", NORMS, ids=lambda case: case.name)


def close(found: Any, expected: Any, bound: float, size: Any = 1.0) -> None:
    found = np.asarray(found).astype(np.longdouble)
    assert found.shape == expected.shape
    error = np.abs(found - expected) / np.maximum(size, np.abs(expected))
    assert error.max(initial=0) <= bound


def check(case: Norm, dtype: str, x: Any, weight: Any, bias: Any, dy: Any, backend: str, eps: float = 1e-3) -> Any:
    """Forward and backward of one call against the oracle; returns y and the gradients."""
    params = {"weight": weight} | ({"bias": bias} if has_bias(case) else {})
    y, pullback = nbnorm.vjp(case.op, x, **params, eps=eps, backend=backend, **case.call)
    grads = pullback(dy)
    expected = norm(case.op.__name__, x, weight, params.get("bias"), eps, dy, **case.oracle)
    assert y.dtype == x.dtype
    assert grads.x.dtype == x.dtype
    close(y, expected.y, BOUND[dtype], expected.y_size)
    close(grads.x, expected.dx, GRAD_BOUND[dtype], expected.dx_size)
    for grad, reference, param in ((grads.weight, expected.dweight, weight), (grads.bias, expected.dbias, bias)):
        if param is None or (param is bias and not has_bias(case)):
            assert grad is None
        else:
            assert grad.dtype == param.dtype
            close(grad, reference.reshape(param.shape), GRAD_BOUND[dtype] * max(1, float(np.abs(reference).max())))
    return y, grads


def is_slow(dtype: str, place: int) -> bool:
    """Of the half types each is in the plain run with a quarter of the cases: each is a compilation of its own."""
    return dtype in ("float16", "bfloat16") and place % 4 != 2 * (dtype == "float16")


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        pytest.param(dtype, case, marks=[pytest.mark.slow] * is_slow(dtype, place), id=f"{dtype}-{case.name}")
        for dtype in BOUND
        for place, case in enumerate(NORMS)
    ],
)
def test_against_oracle(case: Norm, dtype: str, backend: str) -> None:
    check(case, dtype, *data(case, dtype), backend)


@BY_NAME
def test_without_parameters(case: Norm, backend: str) -> None:
    x, weight, bias, dy = data(case)
    check(case, "float64", x, None, None, dy, backend)
    check(case, "float64", x, weight, None, dy, backend)
    if has_bias(case):
        check(case, "float64", x, None, bias, dy, backend)


@BY_NAME
def test_gradients_against_finite_differences(case: Norm, backend: str) -> None:
    """Every entry of x, weight and bias, by central differences of the forward in float64."""
    x, weight, bias, dy = data(case)
    inputs = {"x": x, "weight": weight} | ({"bias": bias} if has_bias(case) else {})

    def loss(**changed: Any) -> float:
        return float((case.op(**(inputs | changed), eps=1e-2, backend=backend, **case.call) * dy).sum())

    rest = {name: value for name, value in inputs.items() if name != "x"}
    _, pullback = nbnorm.vjp(case.op, x, **rest, eps=1e-2, backend=backend, **case.call)
    grads = pullback(dy)
    step = 1e-5
    for name, value in inputs.items():
        numeric = np.empty(value.shape)
        for index in np.ndindex(value.shape):
            high, low = value.copy(), value.copy()
            high[index] += step
            low[index] -= step
            numeric[index] = (loss(**{name: high}) - loss(**{name: low})) / (2 * step)
        np.testing.assert_allclose(getattr(grads, name), numeric, rtol=1e-6, atol=1e-7, err_msg=name)


def layouts(x: Any) -> dict[str, Any]:
    """The same values, lying in memory in every way that NumPy knows."""
    padded = np.zeros((x.shape[0] * 2, *x.shape[1:], 3), x.dtype)
    sliced = padded[::2, ..., 1]
    sliced[...] = x
    every_other = np.repeat(x, 2, axis=-1)[..., ::2]
    unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    backward = np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    read_only = x.copy()
    read_only.flags.writeable = False
    found = {
        "Fortran order": np.asfortranarray(x),
        "spread out": sliced,
        "every other element": every_other,
        "unaligned": unaligned,
        "negative stride": backward,
        "read-only": read_only,
        "broadcast": np.broadcast_to(x[:1], x.shape),
    }
    if x.ndim > 1:
        wide = np.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)[..., 1:-2]
        wide[...] = x
        found["sliced rows"] = wide
    if x.ndim > 2:
        found["last axis second"] = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 1)), 1, -1)
        found["second axis last"] = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
        found["axes reversed"] = np.ascontiguousarray(x.transpose()).transpose()
        found["outer axes swapped"] = np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)
    if x.dtype.kind == "f" and x.dtype.itemsize > 1:
        found["swapped bytes"] = x.astype(x.dtype.newbyteorder())
    return found


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        pytest.param(dtype, case, marks=[pytest.mark.slow] * (place % 8 > 0 or narrow), id=f"{dtype}-{case.name}")
        for dtype, narrow in (("float32", False), ("bfloat16", True))
        for place, case in enumerate(NORMS)
    ],
)
def test_memory_layouts(case: Norm, dtype: str, backend: str) -> None:
    x, weight, bias, dy = data(case, dtype)
    for name, array in layouts(x).items():
        gradient = layouts(dy)[name] if name != "broadcast" else dy
        try:
            y, grads = check(case, dtype, array, weight, bias, gradient, backend)
        except AssertionError as error:
            raise AssertionError(f"{name}, strides {array.strides}: {error}") from error
        assert y.dtype == array.dtype, name
        assert grads.x.dtype == array.dtype, name


@pytest.mark.parametrize("swap", [(0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)])
def test_output_lies_as_the_input_does(swap: tuple[int, ...], backend: str) -> None:
    """A dense array comes back in its own memory order, and is not copied on the way in."""
    x = np.random.default_rng(0).normal(size=(4, 3, 5, 6)).astype("f4")
    turned = np.ascontiguousarray(x.transpose(swap)).transpose(np.argsort(swap))
    assert nbnorm.explain(nbnorm.batch_norm, turned, training=True).copies == ()
    y = nbnorm.batch_norm(turned, training=True, backend=backend)
    assert y.strides == turned.strides
    np.testing.assert_allclose(y, nbnorm.batch_norm(x, training=True, backend=backend), atol=1e-6)


def test_copies_are_counted() -> None:
    x = np.zeros((4, 3, 10, 10), "f4")
    copied = {
        "collapse into no five-axis view": x[:, :, ::2, ::2],
        "byte order": x.astype(">f4"),
        "unaligned": np.zeros(x.nbytes + 1, np.uint8)[1:].view("f4").reshape(x.shape),
    }
    for reason, array in copied.items():
        decision = nbnorm.explain(nbnorm.batch_norm, array, training=True)
        assert len(decision.copies) == 1
        assert reason in decision.copies[0]
        assert reason in str(decision)
    assert nbnorm.explain(nbnorm.layer_norm, np.zeros((4, 30), "f4")[:, :20], 20).copies == ()


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("part", [np.s_[:], np.s_[:, :, :128], np.s_[:, ::2], np.s_[:, :, ::2], np.s_[::-1]])
def test_no_copy_is_hidden(part: Any, axis: Any) -> None:
    """What is allocated beside the result: a copy of x only where `explain` tells of it."""
    pytest.importorskip("numba")
    x = np.zeros((64, 128, 130), "f4")[part]
    keys: dict[str, Any] = {"axis": axis, "backend": "numba"}
    copies = len(nbnorm.explain(nbnorm.layer_norm, x, **keys).copies)
    nbnorm.layer_norm(x, **keys)
    tracemalloc.start()
    try:
        y = nbnorm.layer_norm(x, **keys)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    statistics = 100 * x.size // math.prod(x.shape[a] for a in np.atleast_1d(axis))
    assert peak <= (1 + copies) * y.nbytes + statistics + 2**18


@pytest.mark.parametrize("op", [nbnorm.batch_norm, nbnorm.instance_norm])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", list(BOUND))
def test_eval_uses_running_statistics(op: Any, axis: int, dtype: str, backend: str) -> None:
    rng = np.random.default_rng(3)
    kind = dtype_of(dtype)
    x, dy = rng.normal(size=(2, 3, 4, 5, 4)).astype(kind)
    weight, bias, mean = rng.normal(size=(3, 4)).astype(kind)
    var = rng.uniform(0.5, 2, size=4).astype(kind)
    before = mean.copy(), var.copy()
    switch = {"training": False} if op is nbnorm.batch_norm else {"use_input_stats": False}
    y, pullback = nbnorm.vjp(op, x, mean, var, weight, bias, **switch, channel_axis=axis, backend=backend)
    grads = pullback(dy)
    expected = norm(op.__name__, x, weight, bias, 1e-5, dy, channel_axis=axis, fixed=before)
    close(y, expected.y, BOUND[dtype], expected.y_size)
    close(grads.x, expected.dx, GRAD_BOUND[dtype], expected.dx_size)
    scale = GRAD_BOUND[dtype] * float(np.abs(expected.dweight).max() + np.abs(expected.dbias).max())
    close(grads.weight, expected.dweight, scale)
    close(grads.bias, expected.dbias, scale)
    assert mean.tobytes() == before[0].tobytes()
    assert var.tobytes() == before[1].tobytes()


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("stats_dtype", ["float32", "float64"])
def test_running_statistics(axis: int, stats_dtype: str, backend: str) -> None:
    """Batch norm blends the mean and the unbiased variance; instance norm the averages of the instances'."""
    x = (np.random.default_rng(5).normal(size=(3, 4, 5, 4)) * 3 + 2).astype("f4")
    channels_first = np.moveaxis(x.astype("f8"), axis, 1).reshape(3, 4, -1)
    expected = {
        nbnorm.batch_norm: (channels_first.mean(axis=(0, 2)), channels_first.var(axis=(0, 2), ddof=1)),
        nbnorm.instance_norm: (channels_first.mean(axis=2).mean(0), channels_first.var(axis=2, ddof=1).mean(0)),
    }
    for op, (new_mean, new_var) in expected.items():
        mean, var = np.full(4, 0.5, stats_dtype), np.full(4, 2.0, stats_dtype)
        switch = {"training": True} if op is nbnorm.batch_norm else {}
        op(x, mean, var, momentum=0.25, channel_axis=axis, backend=backend, **switch)
        np.testing.assert_allclose(mean, 0.75 * 0.5 + 0.25 * new_mean, rtol=1e-6)
        np.testing.assert_allclose(var, 0.75 * 2.0 + 0.25 * new_var, rtol=1e-6)


def test_return_moments_writes_nothing(backend: str) -> None:
    x = np.random.default_rng(5).normal(size=(6, 4, 3)).astype("f4")
    mean, var = np.zeros(4, "f4"), np.ones(4, "f4")
    y, moments = nbnorm.batch_norm(x, mean, var, training=True, return_moments=True, backend=backend)
    assert not mean.any()
    assert (var == 1).all()
    assert moments.count == 18
    np.testing.assert_allclose(moments.mean, x.astype("f8").mean(axis=(0, 2)), rtol=1e-12)
    np.testing.assert_allclose(moments.var(), x.astype("f8").var(axis=(0, 2)), rtol=1e-12)
    new_mean, new_var = moments.update(mean, var, 0.1)
    again = nbnorm.batch_norm(x, mean, var, training=True, backend=backend)
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(new_mean, mean)
    np.testing.assert_array_equal(new_var, var)
    for op, shape, args in (
        (nbnorm.layer_norm, (6, 4), (3,)),
        (nbnorm.group_norm, (6, 2), (2,)),
        (nbnorm.instance_norm, (6, 4), ()),
    ):
        assert op(x, *args, return_moments=True, backend=backend)[1].mean.shape == shape
    about_zero = nbnorm.rms_norm(x, 3, return_moments=True, backend=backend)[1]
    np.testing.assert_allclose(about_zero.m2, (x.astype("f8") ** 2).sum(axis=2), rtol=1e-12)


@BY_NAME
def test_out(case: Norm, backend: str) -> None:
    x, weight, _, _ = data(case, "float32")
    expected = case.op(x, weight=weight, backend=backend, **case.call)
    for out in (np.empty_like(x), np.asfortranarray(np.empty_like(x)), np.empty((*x.shape, 2), "f4")[..., 0], x):
        result = case.op(x if out is not x else x.copy(), weight=weight, out=out, backend=backend, **case.call)
        assert result is out
        np.testing.assert_array_equal(out, expected)
    x, weight, _, _ = data(case, "float32")
    assert case.op(x, weight=weight, out=x, backend=backend, **case.call) is x
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (3, 0, 5), (0, 0, 0)])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    """An empty array gives an empty result, zero gradients, and leaves the running statistics alone."""
    x = np.empty(shape, "f4")
    channels = shape[1]
    mean, var = np.full(channels, 3, "f4"), np.full(channels, 5, "f4")
    weight = np.ones(channels, "f4")
    calls = [
        (nbnorm.batch_norm, (mean, var, weight, weight, True)),
        (nbnorm.batch_norm, (mean, var, weight, weight, False)),
        (nbnorm.instance_norm, (mean, var, weight, weight)),
    ]
    if channels:
        calls.append((nbnorm.group_norm, (2, weight, weight)))
    for op, args in calls:
        y, pullback = nbnorm.vjp(op, x, *args, backend=backend)
        grads = pullback(x)
        assert y.shape == x.shape
        assert grads.x.shape == x.shape
        assert grads.weight.shape == weight.shape
        assert not grads.weight.any()
    last = np.ones(shape[2], "f4")
    y, pullback = nbnorm.vjp(nbnorm.layer_norm, x, shape[2], last, last, backend=backend)
    assert y.shape == shape
    assert not pullback(y).weight.any()
    assert (mean == 3).all()
    assert (var == 5).all()


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_with_float32_parameters(half: str, backend: str) -> None:
    """Mixed precision: gradients come back in each parameter's own dtype."""
    kind = dtype_of(half)
    rng = np.random.default_rng(1)
    x, dy = rng.normal(size=(2, 6, 32)).astype(kind)
    weight, bias = rng.normal(size=(2, 32)).astype("f4")
    y, pullback = nbnorm.vjp(nbnorm.layer_norm, x, 32, weight, bias, backend=backend)
    grads = pullback(dy)
    expected = norm("layer_norm", x, weight, bias, 1e-5, dy, axes=(1,))
    assert (y.dtype, grads.weight.dtype, grads.bias.dtype) == (kind, np.float32, np.float32)
    close(y, expected.y, BOUND[half])
    close(grads.weight, expected.dweight, 1e-6)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_every_half_value_passes_exactly(half: str, backend: str) -> None:
    """With statistics 0 and 1 and eps 0, every finite 16-bit value comes out as it went in."""
    values = np.arange(65536, dtype=np.uint16).view(dtype_of(half))
    finite = values[np.isfinite(values.astype("f4"))]
    x = np.repeat(finite[:, None], 1, axis=1)
    y = nbnorm.batch_norm(x, np.zeros(1, "f4"), np.ones(1, "f4"), eps=0.0, backend=backend)
    np.testing.assert_array_equal(y.astype("f4"), x.astype("f4"))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_rounds_to_nearest_even(half: str, backend: str) -> None:
    """Scaled by 1 + 2^-7 and shifted, results fall between values; NumPy's own conversion from float32 is the judge."""
    kind = dtype_of(half)
    x = np.random.default_rng(0).normal(size=(4096, 1)).astype(kind)
    weight = np.full(1, 1 + 2**-7, "f4")
    y = nbnorm.batch_norm(x, np.zeros(1, "f4"), np.ones(1, "f4"), weight, eps=0.0, backend=backend)
    np.testing.assert_array_equal(y, (x.astype("f4") * weight).astype(kind))


def test_backends_agree() -> None:
    """The two backends give the same answers, to rounding, on arrays large enough for many chunks."""
    rng = np.random.default_rng(2)
    x, dy = rng.normal(size=(2, 8, 24, 31, 33)).astype("f4")
    weight, bias = rng.normal(size=(2, 24)).astype("f4")
    for op, args in (
        (nbnorm.batch_norm, (None, None)),
        (nbnorm.group_norm, (4,)),
        (nbnorm.instance_norm, (None, None)),
    ):
        for axis, array, cotangent in ((1, x, dy), (-1, np.moveaxis(x, 1, -1).copy(), np.moveaxis(dy, 1, -1).copy())):
            extra = {"training": True} if op is nbnorm.batch_norm else {}
            results = []
            for name in ("numpy", "numba"):
                y, pullback = nbnorm.vjp(
                    op, array, *args, weight=weight, bias=bias, channel_axis=axis, backend=name, **extra
                )
                results.append((y, *pullback(cotangent)[:3]))
            for ours, reference in zip(*results, strict=True):
                np.testing.assert_allclose(ours, reference, rtol=2e-6, atol=2e-6)


def test_dy_of_another_layout(backend: str) -> None:
    x, dy = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    _, pullback = nbnorm.vjp(nbnorm.batch_norm, x, training=True, backend=backend)
    expected = pullback(dy).x
    for other in (np.asfortranarray(dy), dy.astype(dy.dtype.newbyteorder()), dy.repeat(2, 2)[..., ::2]):
        np.testing.assert_allclose(pullback(other).x, expected, rtol=1e-12)


def test_pullback_can_run_twice(backend: str) -> None:
    x, dy = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    _, pullback = nbnorm.vjp(nbnorm.group_norm, x, 2, backend=backend)
    first, second = pullback(dy), pullback(dy)
    np.testing.assert_array_equal(first.x, second.x)


def test_inputs_are_not_written(backend: str) -> None:
    for case, dtype in itertools.product(NORMS, ("float32", "float16")):
        arrays = data(case, dtype)
        before = [a.tobytes() for a in arrays]
        check(case, dtype, *arrays, backend)
        assert [a.tobytes() for a in arrays] == before, case.name


def test_every_shape_has_a_view() -> None:
    """Axes of length 0, 1 and 2 in every place, for every op: a view is found, and the call runs."""
    calls = 0
    for ndim in (1, 2, 3, 4):
        for shape in itertools.product((0, 1, 2), repeat=ndim):
            x = np.ones(shape, "f4")
            for axis in range(ndim):
                nbnorm.layer_norm(x, axis=axis, weight=np.ones(shape[axis], "f4"), backend="numpy")
                nbnorm.moments(x, axis=axis, backend="numpy")
                stats = np.zeros(shape[axis], "f4"), np.ones(shape[axis], "f4")
                if ndim > 1:
                    nbnorm.batch_norm(x, *stats, channel_axis=axis, backend="numpy")
                if ndim > 1 and axis:
                    for groups in (1, 2):
                        if shape[axis] % groups == 0:
                            y = nbnorm.group_norm(x, groups, stats[0], channel_axis=axis, backend="numpy")
                            assert y.shape == shape
                if ndim > 2 and axis:
                    nbnorm.instance_norm(x, *stats, use_input_stats=False, channel_axis=axis, backend="numpy")
                calls += 1
    assert calls == 3 + 2 * 9 + 3 * 27 + 4 * 81


def test_one_group_channels_last_in_memory_is_not_copied() -> None:
    x = np.ascontiguousarray(np.ones((2, 4, 5, 3), "f4")).transpose(0, 3, 1, 2)
    assert nbnorm.explain(nbnorm.group_norm, x, 1).copies == ()
    assert nbnorm.group_norm(x, 1).strides == x.strides


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_of_an_eval_call_are_its_own(dtype: str, backend: str) -> None:
    """A training call between an eval call and its pullback changes the running statistics, not the gradient."""
    x, dy = np.random.default_rng(0).normal(size=(2, 8, 3, 5)).astype(dtype)
    mean, var = np.zeros(3, dtype), np.ones(3, dtype)
    _, pullback = nbnorm.vjp(nbnorm.batch_norm, x, mean, var, weight=np.ones(3, dtype), backend=backend)
    before = pullback(dy)
    nbnorm.batch_norm(x * 3 + 7, mean, var, training=True, backend=backend)
    after = pullback(dy)
    np.testing.assert_array_equal(after.x, before.x)
    np.testing.assert_array_equal(after.weight, before.weight)


def test_out_is_written_whatever_the_backend_does() -> None:
    from nbnorm_backends.numpy_ref import NumpyBackend

    class IgnoresOut(NumpyBackend):
        def apply(self, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, *, out: Any) -> Any:
            return super().apply(x, mean, rstd, weight, bias, out=None)

    x, out = np.array([[1.0, 3.0]]), np.zeros((1, 2))
    assert nbnorm.layer_norm(x, 2, eps=1e-12, out=out, backend=IgnoresOut()) is out
    np.testing.assert_allclose(out, [[-1, 1]])
