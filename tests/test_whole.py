"""Local response normalization and division by a p-norm: against slice loops, PyTorch and finite differences."""

from __future__ import annotations

import itertools
import tracemalloc
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from nbnorm.dispatch import registry
from nbnorm_backends.numba_cpu.pool import Pool, Prange
from nbnorm_backends.numpy_ref import NumpyBackend

Wide = np.longdouble
INF, NAN = float("inf"), float("nan")
# |y - exact| relative to max(1, |exact|): computed in float64 and rounded once, to a half type by way of float32.
BOUND = {"float64": 1e-13, "float32": 6e-8, "float16": 5e-4, "bfloat16": 4e-3}
ORDERS = (2.0, 1.0, 0.0, INF, -INF, 3.0, 1.5, 0.5, -1.0, -2.5)
# size, alpha, beta, k: odd and even windows, wider than the channels, the powers that are roots and one that is not
RESPONSES = (
    (5, 0.3, 0.75, 1.0),
    (4, 0.5, 0.5, 2.0),
    (1, 1.0, 1.0, 0.5),
    (2, -0.1, 0.3, 3.0),
    (3, 0.7, 0.0, 0.5),
    (30, 0.2, 1.7, 1.5),
    (31, 4.0, 0.75, 0.1),
)
# shape, channel axis: rows that are joined and rows that are not, inner axes of length 1, samples that share a buffer
SHAPES = [((2, 5, 3, 2), 1), ((3, 4, 7), -1), ((40, 6), 1), ((5, 3, 2), 0), ((2, 9, 70), 1), ((2, 1, 4), 1)]
# shape, axes of the norm: runs, columns, several axes, all, one element, the only axis, axes apart
AXES = [
    ((4, 7), 1),
    ((3, 6, 5), 1),
    ((6, 3, 5), (0, 1)),
    ((2, 3, 4), (-1, 0, 1)),
    ((5, 1, 3), 1),
    ((9,), 0),
    ((3, 4, 2, 5), (1, 3)),
]
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype",
    ["float32", *(pytest.param(name, marks=pytest.mark.slow("numba")) for name in ("float64", "float16", "bfloat16"))],
)
HALF_AXES = {"float16": AXES[1:2], "bfloat16": AXES[:1]}  # each case costs a compilation; they differ in load and store


# ---- what the operations should give, by slice loops -----------------------------------------------------------------


def response(
    x: Any, size: int, alpha: float, beta: float, k: float, dy: Any = None, *, channel_axis: int = 1
) -> tuple[Any, Any]:
    """y, and with dy the gradient, channel by channel: each gives to itself and to every channel of its window."""
    x = np.moveaxis(np.asarray(x).astype(Wide), channel_axis, 0)
    dy = None if dy is None else np.moveaxis(np.asarray(dy).astype(Wide), channel_axis, 0)
    y, dx, share = np.empty_like(x), np.zeros_like(x), Wide(alpha) / size
    for c in range(len(x)):
        window = range(max(0, c - size // 2), min(len(x), c + (size - 1) // 2 + 1))
        energy = k + share * sum(x[j] * x[j] for j in window)
        y[c] = x[c] / energy ** Wide(beta)
        if dy is not None:
            dx[c] += dy[c] / energy ** Wide(beta)
            for j in window:
                dx[j] -= dy[c] * x[c] * beta * energy ** (-Wide(beta) - 1) * share * 2 * x[j]
    return np.moveaxis(y, 0, channel_axis), np.moveaxis(dx, 0, channel_axis)


def divided(x: Any, p: float, axis: Any, eps: float, dy: Any = None) -> tuple[Any, Any]:
    """y, and with dy the gradient, norm by norm: the quotient rule, with PyTorch's derivative of the norm at 0."""
    x = np.asarray(x).astype(Wide)
    axes = {a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))}
    y, dx = np.empty_like(x), np.empty_like(x)
    kept = [range(x.shape[a]) if a not in axes else [slice(None)] for a in range(x.ndim)]
    with np.errstate(all="ignore"):
        for index in itertools.product(*kept):
            values, size = x[index], np.abs(x[index])
            norm, slope = _norm_and_slope(size, Wide(p))
            bound = max(norm, Wide(eps))
            y[index] = values / bound
            if dy is not None:
                given = np.asarray(dy).astype(Wide)[index]
                dx[index] = given / bound
                if norm >= eps:
                    dx[index] -= np.sign(values) * slope * (given * values).sum() / bound**2
    return y, dx


def _norm_and_slope(size: Any, p: Any) -> tuple[Any, Any]:
    """The norm of non-negative numbers and its derivative by each."""
    if p == 0:
        return Wide((size != 0).sum()), np.zeros_like(size)
    if np.isinf(p):
        norm = size.max() if p > 0 else size.min()
        return norm, (size == norm) / Wide((size == norm).sum())
    norm = (size**p).sum() ** (1 / p)
    return norm, np.where(size == 0, 0, size ** (p - 1)) * norm ** (1 - p)


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def data(shape: tuple[int, ...], dtype: str = "float64") -> tuple[Any, Any]:
    """x, with zeros and ties, and dy."""
    rng = np.random.default_rng(7)
    x, dy = rng.normal(size=(2, *shape))
    return (x * 2).round(1).astype(dtype_of(dtype)), dy.astype(dtype_of(dtype))


def without_zeros(x: Any) -> Any:
    """Where powers below 0 and finite differences have a value; no ties either."""
    return np.where(x == 0, 0.7, x) * (1 + 1e-3 * np.arange(x.size).reshape(x.shape))


def close(found: Any, expected: Any, dtype: str, scale: float = 1.0) -> None:
    found = np.asarray(found)
    assert found.dtype == dtype_of(dtype)
    assert found.shape == expected.shape
    error = np.abs(found.astype(Wide) - expected) / np.maximum(scale, np.abs(expected))
    assert error.max(initial=0) <= BOUND[dtype]


# ---- against the loops -----------------------------------------------------------------------------------------------


@EVERY_DTYPE
def test_local_response_norm(dtype: str, backend: str) -> None:
    for (shape, axis), args in itertools.product(SHAPES, RESPONSES if dtype == "float64" else RESPONSES[:2]):
        x, dy = data(shape, dtype)
        keys = {"channel_axis": axis, "backend": backend}
        y, pullback = nbnorm.vjp(nbnorm.local_response_norm, x, *args, **keys)
        expected, gradient = response(x, *args, dy, channel_axis=axis)
        close(y, expected, dtype)
        close(pullback(dy).x, gradient, dtype, max(1.0, float(np.abs(gradient).max())))
        np.testing.assert_array_equal(nbnorm.local_response_norm(x, *args, **keys), y)


@EVERY_DTYPE
def test_normalize(dtype: str, backend: str) -> None:
    cases = HALF_AXES.get(dtype, AXES)
    for (shape, axis), p in itertools.product(cases, ORDERS if dtype == "float64" else (2.0, INF, 1.5)):
        x, dy = data(shape, dtype)
        y, pullback = nbnorm.vjp(nbnorm.normalize, x, p, axis, 1e-3, backend=backend)
        expected, gradient = divided(x, p, axis, 1e-3, dy)
        largest = float(np.abs(gradient).max())
        close(y, expected, dtype)
        close(pullback(dy).x, gradient, dtype, max(1.0, largest))
        np.testing.assert_array_equal(nbnorm.normalize(x, p, axis, 1e-3, backend=backend), y)


def test_defaults(backend: str) -> None:
    x, _ = data((3, 4, 5))
    close(nbnorm.local_response_norm(x, 3, backend=backend), response(x, 3, 1e-4, 0.75, 1.0)[0], "float64")
    close(nbnorm.normalize(x, backend=backend), divided(x, 2.0, 1, 1e-12)[0], "float64")
    np.testing.assert_array_equal(
        nbnorm.normalize(x, 3, [0, -1], backend=backend), nbnorm.normalize(x, 3.0, (2, 0), backend=backend)
    )


@pytest.mark.parametrize("args", RESPONSES)
def test_gradient_of_local_response_norm_by_finite_differences(args: tuple[Any, ...], backend: str) -> None:
    x, dy = data((2, 6, 3))
    _, pullback = nbnorm.vjp(nbnorm.local_response_norm, x, *args, backend=backend)
    numeric = differences(lambda x: nbnorm.local_response_norm(x, *args, backend=backend), x, dy)
    np.testing.assert_allclose(pullback(dy).x, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("p", ORDERS)
def test_gradient_of_normalize_by_finite_differences(p: float, backend: str) -> None:
    x, dy = data((3, 5, 2))
    x = without_zeros(x)
    x[0, :, 0] *= 1e-3 if p else 1.0  # a norm below eps
    for axis, eps in itertools.product((1, 2, (0, 2)), (0.5, 0.0)):
        _, pullback = nbnorm.vjp(nbnorm.normalize, x, p, axis, eps, backend=backend)
        found = pullback(dy).x
        numeric = differences(lambda x, axis=axis, eps=eps: nbnorm.normalize(x, p, axis, eps, backend=backend), x, dy)
        np.testing.assert_allclose(found, numeric, rtol=1e-5, atol=1e-7 * np.abs(found).max())


def differences(op: Any, x: Any, dy: Any) -> Any:
    """Central differences of ``sum(op(x) * dy)``."""
    numeric = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        step = 1e-6 * max(1e-3, abs(x[index]))
        high, low = x.copy(), x.copy()
        high[index] += step
        low[index] -= step
        numeric[index] = ((op(high) - op(low)) * dy).sum() / (2 * step)
    return numeric


# ---- against PyTorch -------------------------------------------------------------------------------------------------


def by_torch(op: Any, x: Any, dy: Any) -> tuple[Any, Any]:
    import torch

    tensor = torch.tensor(x, requires_grad=True)
    y = op(tensor)
    y.backward(torch.tensor(dy))
    return y.detach().numpy(), tensor.grad.numpy()


def test_local_response_norm_is_that_of_torch(backend: str) -> None:
    torch = pytest.importorskip("torch")
    for shape, size in itertools.product(((2, 7, 3), (2, 4, 3, 2), (1, 40, 2)), (1, 2, 3, 4, 5, 6, 13, 90)):
        x, dy = data(shape)
        for alpha, beta, k in ((1e-4, 0.75, 1.0), (2.0, 0.75, 0.2), (0.4, 0.5, 1.5), (0.4, 1.0, 2.0), (0.4, -0.3, 1.0)):
            args = size, alpha, beta, k
            expected = by_torch(lambda x, args=args: torch.nn.functional.local_response_norm(x, *args), x, dy)
            y, pullback = nbnorm.vjp(nbnorm.local_response_norm, x, *args, backend=backend)
            for found, reference in zip((y, pullback(dy).x), expected, strict=True):
                np.testing.assert_allclose(found, reference, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("p", ORDERS)
def test_normalize_is_that_of_torch(p: float, backend: str) -> None:
    """With zeros, ties of the extremes, rows of zeros and rows below eps."""
    torch = pytest.importorskip("torch")
    for shape, axis in (((4, 6), 1), ((3, 6, 2), 1), ((2, 3, 4), (0, 2)), ((2, 3, 4), (1, 2))):
        x, dy = data(shape)
        x[0] = np.sign(x[0]) * 2.0
        x[-1, ..., :2] = 0.0
        for factor, eps in ((1.0, 1e-12), (1.0, 3.0), (1e-14, 1e-12), (0.0, 1e-12), (1.0, 0.0)):
            scaled = x * factor if eps else without_zeros(x)
            keys = {"p": p, "eps": eps}
            expected = by_torch(
                lambda x, keys=keys, axis=axis: torch.nn.functional.normalize(x, dim=axis, **keys), scaled, dy
            )
            y, pullback = nbnorm.vjp(nbnorm.normalize, scaled, axis=axis, backend=backend, **keys)
            for found, reference in zip((y, pullback(dy).x), expected, strict=True):
                np.testing.assert_allclose(found, reference, rtol=1e-11, atol=1e-12 * np.abs(reference).max())


@pytest.mark.parametrize("p", ORDERS)
def test_normalize_of_nan_and_inf_is_that_of_torch(p: float, backend: str) -> None:
    torch = pytest.importorskip("torch")
    dy = np.array([[1.0, 2.0, 3.0]])
    for row in ([1, NAN, 2], [1, INF, 2], [-INF, INF, 1], [INF, INF, -INF], [NAN, 0, 0], [NAN, INF, 0], [INF, 0, 0]):
        x = np.array([row], np.float64)
        expected = by_torch(lambda x: torch.nn.functional.normalize(x, p), x, dy)
        for axis in (0, 1):
            turned, cotangent = (x, dy) if axis else (np.repeat(x.T, 2, 1), np.repeat(dy.T, 2, 1))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                y, pullback = nbnorm.vjp(nbnorm.normalize, turned, p, axis, backend=backend)
                dx = pullback(cotangent).x
            for found, reference in zip((y, dx), expected, strict=True):
                np.testing.assert_allclose(
                    found, reference if axis else np.repeat(reference.T, 2, 1), rtol=1e-12, err_msg=f"{row}, {axis}"
                )


def test_local_response_norm_of_nan_and_inf_is_that_of_torch(backend: str) -> None:
    torch = pytest.importorskip("torch")
    for row, args in itertools.product(([1, NAN, 2, 3, 4], [1, INF, 2, 3, 4]), RESPONSES[:2]):
        x, dy = np.array(row, np.float64).reshape(1, 5, 1), np.ones((1, 5, 1))
        expected = by_torch(lambda x, args=args: torch.nn.functional.local_response_norm(x, *args), x, dy)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y, pullback = nbnorm.vjp(nbnorm.local_response_norm, x, *args, backend=backend)
            found = y, pullback(dy).x
        np.testing.assert_allclose(found, expected, rtol=1e-12)


# ---- range -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "factor"), [("float32", 3e38), ("float32", 1e-44), ("float64", 1e200), ("float64", 1e-200)]
)
@pytest.mark.parametrize("p", [2.0, 1.0, 10.0, 0.5, -7.0, INF])
def test_normalize_does_not_overflow(dtype: str, factor: float, p: float, backend: str) -> None:
    for shape, axis in (((2, 40), 1), ((2, 5, 3), 1)):
        x, dy = np.random.default_rng(0).uniform(0.5, 1.0, size=(2, *shape)).astype(dtype)
        x = (x * np.float64(factor)).astype(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y, pullback = nbnorm.vjp(nbnorm.normalize, x, p, axis, 0.0, backend=backend)
            dx = pullback(dy).x
        expected, gradient = divided(x, p, axis, 0.0, dy)
        np.testing.assert_allclose(y.astype(Wide), expected, rtol=1e-6 if dtype == "float32" else 1e-12)
        limit = float(np.finfo(dtype).max)
        scale = 1e-6 * np.abs(gradient).max() + float(np.finfo(dtype).tiny)
        np.testing.assert_allclose(
            np.clip(dx, -limit, limit).astype(Wide), np.clip(gradient, -limit, limit), 1e-6, scale
        )


def test_local_response_norm_does_not_overflow(backend: str) -> None:
    x = np.array([[3e38, 1e30, -1.0, 0.0]], "f4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, pullback = nbnorm.vjp(nbnorm.local_response_norm, x, 3, 1.0, 0.5, backend=backend)
        dx = pullback(np.ones_like(x)).x
    expected, gradient = response(x, 3, 1.0, 0.5, 1.0, np.ones(x.shape))
    np.testing.assert_allclose(y, expected.astype("f4"), rtol=1e-6)
    np.testing.assert_allclose(dx, gradient.astype("f4"), rtol=1e-6, atol=1e-7)


def test_a_large_channel_leaves_the_windows_without_it_alone(backend: str) -> None:
    """A running sum would keep the rounding of 1e16 when it has left the window."""
    x = np.ones((1, 8, 2))
    x[:, 1] = 1e16
    y = nbnorm.local_response_norm(x, 3, 3.0, 1.0, 0.0, backend=backend)
    np.testing.assert_allclose(y[:, 4:7], 1 / 3, rtol=1e-15)


def test_zeros_stay_zeros_and_warn_of_nothing(backend: str) -> None:
    x = np.zeros((3, 70, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for p, axis in itertools.product(ORDERS, (0, 1, 2)):
            y, pullback = nbnorm.vjp(nbnorm.normalize, x, p, axis, 1e-3, backend=backend)
            assert not y.any()
            np.testing.assert_allclose(pullback(np.ones_like(x)).x, 1e3)
        y, pullback = nbnorm.vjp(nbnorm.local_response_norm, x, 5, backend=backend)
    assert not y.any()
    np.testing.assert_array_equal(pullback(np.ones_like(x)).x, 1.0)


def test_gradients_have_a_value_where_powers_have_none(backend: str) -> None:
    """A norm below eps is a constant, whatever its slope; 0**0 is 1, and so is a constant."""
    tiny, dy = np.full((2, 3), 1e-200), np.ones((2, 3))
    for axis in (0, 1):
        _, pullback = nbnorm.vjp(nbnorm.normalize, tiny, -2.5, axis, 0.5, backend=backend)
        np.testing.assert_array_equal(pullback(dy).x, 2.0)
    far_apart, zeros = np.array([[1e-300, 1e200]]), np.zeros((2, 3))
    for turned, axis in ((far_apart, 1), (np.repeat(far_apart.T, 2, 1), 0)):
        _, pullback = nbnorm.vjp(nbnorm.normalize, turned, 0.5, axis, backend=backend)
        assert not pullback(np.zeros(turned.shape)).x.any()
    y, pullback = nbnorm.vjp(nbnorm.local_response_norm, zeros, 3, 1.0, 0.0, 0.0, backend=backend)
    assert not y.any()
    np.testing.assert_array_equal(pullback(dy).x, 1.0)


# ---- memory ----------------------------------------------------------------------------------------------------------


def layouts(x: Any) -> dict[str, Any]:
    """The same values, lying in memory in many ways."""
    spread = np.zeros((x.shape[0] * 2, *x.shape[1:], 3), x.dtype)[::2, ..., 1]
    spread[...] = x
    wide = np.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)[..., 1:-2]
    wide[...] = x
    unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    found = {
        "Fortran order": np.asfortranarray(x),
        "channels last": np.ascontiguousarray(np.moveaxis(x, 1, -1)),
        "spread out": spread,
        "padded rows": wide,
        "negative strides": np.ascontiguousarray(x[::-1, ..., ::-1])[::-1, ..., ::-1],
        "unaligned": unaligned,
        "read-only": read_only,
        "broadcast": np.broadcast_to(x[:1], x.shape),
        "swapped bytes": x.astype(x.dtype.newbyteorder()) if x.dtype.kind == "f" else x,
    }
    found["channels last"] = np.moveaxis(found["channels last"], -1, 1)
    return found


@pytest.mark.parametrize("dtype", ["float64", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.slow("numba")
def test_memory_layouts(dtype: str, backend: str) -> None:
    x, dy = data((3, 6, 4, 2), dtype)
    axes = (0, 1, 3) if dtype == "float64" else (1,)
    calls = [(nbnorm.local_response_norm, {"size": 4, "alpha": 0.5, "channel_axis": axis}) for axis in axes]
    calls += [(nbnorm.normalize, {"axis": axis}) for axis in (*axes, (2, 3), (0, 2))]
    for op, keys in calls:
        for name, array in layouts(x).items():
            given = layouts(dy)[name] if name != "broadcast" else dy
            y, pullback = nbnorm.vjp(op, array, backend=backend, **keys)
            if op is nbnorm.normalize:
                expected = divided(array, 2.0, keys["axis"], 1e-12, given)
            else:
                expected = response(array, 4, 0.5, 0.75, 1.0, given, channel_axis=keys["channel_axis"])
            for found, reference in zip((y, pullback(given).x), expected, strict=True):
                assert found.dtype == array.dtype, name
                error = np.abs(found.astype(Wide) - reference) / np.maximum(1, np.abs(reference))
                assert error.max() <= BOUND[dtype], (name, op, keys)


@pytest.mark.parametrize("swap", [(0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)])
def test_output_lies_as_the_input_does(swap: tuple[int, ...], backend: str) -> None:
    """Dense arrays are copied only where axes of one norm lie apart, and come back in their own memory order."""
    x, dy = data((4, 3, 5, 6))
    turned = np.ascontiguousarray(x.transpose(swap)).transpose(np.argsort(swap))
    for op, keys in (
        (nbnorm.local_response_norm, {"size": 3}),
        (nbnorm.normalize, {}),
        (nbnorm.normalize, {"axis": swap[1:3]}),
        (nbnorm.normalize, {"axis": (swap[0], swap[3])}),
    ):
        copies = nbnorm.explain(op, turned, **keys).copies
        assert copies == (
            (f"x ({x.nbytes} bytes): axes {tuple(sorted(keys['axis']))} lie apart in memory",)
            if keys.get("axis") == (swap[0], swap[3])
            else ()
        )
        y, pullback = nbnorm.vjp(op, turned, backend=backend, **keys)
        assert y.strides == turned.strides
        assert pullback(dy).x.strides == turned.strides
        np.testing.assert_allclose(y, op(x, backend=backend, **keys), rtol=1e-14)


def test_copies_are_counted() -> None:
    x = np.zeros((4, 3, 10, 10), "f4")
    for op, keys in ((nbnorm.local_response_norm, {"size": 3}), (nbnorm.normalize, {})):
        for reason, array in (("strides", x[:, :, ::2, ::2]), ("byte order", x.astype(">f4"))):
            (copy,) = nbnorm.explain(op, array, **keys).copies
            assert reason in copy
        assert nbnorm.explain(op, x[:, :2], **keys).copies == ()


def test_out(backend: str) -> None:
    for shape, axis in (((3, 5, 4), 1), ((3, 4, 70), 1), ((3, 70), 1), ((4, 3, 2), 0)):
        x, dy = data(shape, "float32")
        for op, keys in (
            (nbnorm.local_response_norm, {"size": 3, "channel_axis": axis}),
            (nbnorm.normalize, {"axis": axis}),
        ):
            expected = op(x, backend=backend, **keys)
            for out in (np.empty_like(x), np.empty_like(x, order="F"), np.empty((*shape, 2), "f4")[..., 1], x.copy()):
                assert op(x, out=out, backend=backend, **keys) is out
                np.testing.assert_array_equal(out, expected)
            y, pullback = nbnorm.vjp(op, x, out=out, backend=backend, **keys)
            assert y is out
            assert pullback(dy).x.dtype == x.dtype
            assert op(x, out=x, backend=backend, **keys) is x
            np.testing.assert_array_equal(x, expected)


def test_torch_tensors_come_back(backend: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last)
    for op, reference, args in (
        (nbnorm.local_response_norm, torch.nn.functional.local_response_norm, (4,)),
        (nbnorm.normalize, torch.nn.functional.normalize, ()),
    ):
        y, pullback = nbnorm.vjp(op, x, *args, backend=backend)
        assert isinstance(y, torch.Tensor)
        assert y.stride() == x.stride()
        assert isinstance(pullback(x).x, torch.Tensor)
        torch.testing.assert_close(y, reference(x, *args))
        half = x.bfloat16()
        assert op(half, *args, backend=backend).dtype is torch.bfloat16
        before = half._version
        op(half, *args, out=half, backend=backend)
        assert half._version > before


def test_empty(backend: str) -> None:
    for shape in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        x = np.empty(shape, "f4")
        for op, args in ((nbnorm.local_response_norm, (3,)), (nbnorm.normalize, ())):
            y, pullback = nbnorm.vjp(op, x, *args, backend=backend)
            assert y.shape == pullback(x).x.shape == shape


# ---- the Numba backend's promises ------------------------------------------------------------------------------------


def everything(x: Any, dy: Any) -> list[Any]:
    """Results and gradients along each axis of arrays of more than one chunk."""
    found = []
    for axis in range(x.ndim):
        for op, keys in (
            (nbnorm.local_response_norm, {"size": 5, "channel_axis": axis}),
            (nbnorm.normalize, {"axis": axis}),
            (nbnorm.normalize, {"axis": axis, "p": 3}),
        ):
            y, pullback = nbnorm.vjp(op, x, backend="numba", **keys)
            found += [y.tobytes(), pullback(dy).x.tobytes()]
    return found


def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = registry.load("numba")
    x, dy = np.random.default_rng(0).normal(size=(2, 40, 70, 90))
    monkeypatch.setattr(numba, "scheduler", Pool(1))
    alone = everything(x, dy)
    for threads in (2, 5):
        monkeypatch.setattr(numba, "scheduler", Pool(threads))
        assert everything(x, dy) == alone, threads


def test_prange_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    numba, prange = registry.load("numba"), Prange(2)
    if reason := prange.refusal():
        pytest.skip(reason)
    x = np.random.default_rng(0).normal(size=(40, 70, 90))
    pooled = [nbnorm.normalize(x, backend="numba"), nbnorm.local_response_norm(x, 5, backend="numba")]
    monkeypatch.setattr(numba, "scheduler", prange)
    found = [nbnorm.normalize(x, backend="numba"), nbnorm.local_response_norm(x, 5, backend="numba")]
    assert [a.tobytes() for a in found] == [a.tobytes() for a in pooled]


def test_samples_do_not_depend_on_their_batch() -> None:
    x = np.random.default_rng(0).normal(size=(300, 24, 40)).astype("f4")
    for op, keys in (
        (nbnorm.local_response_norm, {"size": 5}),
        (nbnorm.local_response_norm, {"size": 5, "channel_axis": 2}),
        (nbnorm.normalize, {}),
        (nbnorm.normalize, {"axis": 2}),
        (nbnorm.normalize, {"axis": (1, 2)}),
    ):
        whole = op(x, backend="numba", **keys)
        for part in (slice(0, 1), slice(7, 8), slice(100, 299)):
            np.testing.assert_array_equal(op(x[part], backend="numba", **keys), whole[part])


def test_memory_stays_small() -> None:
    x, dy = np.random.default_rng(0).normal(size=(2, 8, 32, 4000)).astype("f4")
    for op, keys in (
        (nbnorm.local_response_norm, {"size": 5}),
        (nbnorm.normalize, {}),
        (nbnorm.normalize, {"axis": 2}),
    ):
        _, pullback = nbnorm.vjp(op, x, backend="numba", **keys)
        pullback(dy)
        tracemalloc.start()
        dx = pullback(dy).x
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.1 * dx.nbytes


# ---- dispatch and errors ---------------------------------------------------------------------------------------------


class NormsOnly(NumpyBackend):
    name = "norms_only"
    whole_ops = frozenset({"normalize"})


def test_whole_ops_are_had_or_refused(backend: str) -> None:
    x = np.ones((2, 3, 4))
    assert registry.load(backend).whole_ops == {"local_response_norm", "normalize"}
    with nbnorm.trace() as decisions:
        nbnorm.normalize(x, backend=backend)
        nbnorm.local_response_norm(x, 3, backend=NumpyBackend())
    assert [(d.request.op, d.chosen) for d in decisions] == [("normalize", backend), ("local_response_norm", "numpy")]
    nbnorm.normalize(x, backend=NormsOnly())
    with pytest.raises(nbnorm.BackendError, match="norms_only: does not have local_response_norm"):
        nbnorm.local_response_norm(x, 3, backend=NormsOnly())
    decision = nbnorm.explain(nbnorm.local_response_norm, x, 3, backend=NormsOnly())
    assert decision.chosen is None


class Strict(NumpyBackend):
    """Checks that it gets what the contract says."""

    name = "strict"

    def normalize(self, x: Any, p: float, eps: float, *, out: Any = None) -> Any:
        assert out is None or (out.flags.c_contiguous and out.flags.writeable and out.shape == x.shape)
        return super().normalize(self.checked(x), p, eps, out=out)

    def normalize_backward(self, dy: Any, x: Any, p: float, eps: float) -> Any:
        assert self.checked(dy).flags.c_contiguous
        assert dy.shape == x.shape
        return super().normalize_backward(dy, self.checked(x), p, eps)

    def checked(self, array: Any) -> Any:
        assert array.ndim == 3
        assert array.dtype.isnative
        assert array.flags.aligned
        assert not array.flags.writeable
        return array


def test_backends_get_what_the_contract_says() -> None:
    x, dy = data((3, 6, 4, 2))
    for axis, (name, array) in itertools.product((1, (0, 3), (2, 3)), layouts(x).items()):
        out = np.empty_like(array) if name != "broadcast" else None
        y, pullback = nbnorm.vjp(nbnorm.normalize, array, axis=axis, out=out, backend=Strict())
        dx = pullback(layouts(dy)[name]).x
        assert y.shape == dx.shape == x.shape


X = np.random.default_rng(0).normal(size=(4, 6, 5)).astype("f4")


def lrn(*args: Any, x: Any = X, **keys: Any) -> Any:
    return lambda op=nbnorm.local_response_norm: nbnorm.vjp(op, x, *args, **keys)


def unit(*args: Any, x: Any = X, **keys: Any) -> Any:
    return lambda op=nbnorm.normalize: nbnorm.vjp(op, x, *args, **keys)


READ_ONLY = X.copy()
READ_ONLY.flags.writeable = False
BUFFER = np.zeros(X.size + 5, "f4")
ERRORS = [
    (lrn(0), ValueError, "size must be at least 1; got 0"),
    (lrn(2.0), TypeError, "size must be an integer; got 2.0"),
    (lrn(True), TypeError, "size must be an integer; got True"),
    (lrn(3, NAN), ValueError, "alpha must be finite; got nan"),
    (lrn(3, 1.0, INF), ValueError, "beta must be finite; got inf"),
    (lrn(3, 1.0, 1.0, "1"), TypeError, "k must be a number; got '1'"),
    (lrn(3, channel_axis=3), ValueError, r"channel_axis must be an axis of x \(4, 6, 5\), from -3 to 2; got 3"),
    (lrn(3, channel_axis=1.0), TypeError, "channel_axis must be an integer; got 1.0"),
    (lrn(3, x=X[0, 0]), ValueError, r"x must have at least 2 axes; got shape \(5,\)"),
    (lrn(3, x=np.ones((2, 3), int)), TypeError, "x must be of dtype float32, float64, float16, bfloat16; got int64"),
    (lrn(3, x=[[1.0]]), TypeError, "x must be an array"),
    (
        lrn(3, out=np.empty((4, 6), "f4")),
        ValueError,
        r"out must have x's shape \(4, 6, 5\) and dtype float32; got \(4, 6\)",
    ),
    (lrn(3, out=READ_ONLY), ValueError, "out must be writable; got a read-only array"),
    (lrn(3, out=X), ValueError, "out must not overlap x under vjp"),
    (lrn(3, backend=1), TypeError, "backend must be a name or a Backend; got 1"),
    (lrn(3, backend="none"), nbnorm.BackendError, "backend 'none': not installed"),
    (unit("2"), TypeError, "p must be a number; got '2'"),
    (unit(NAN), ValueError, "p must be a number, inf or -inf; got nan"),
    (unit(True), TypeError, "p must be a number; got True"),
    (unit(2, 3), ValueError, r"axis must be an axis of x \(4, 6, 5\), from -3 to 2; got 3"),
    (unit(2, (1, -2)), ValueError, r"axis must name each axis once; got \(1, -2\)"),
    (unit(2, ()), ValueError, "axis must name at least one axis; got none"),
    (unit(2, 1.5), TypeError, "axis must be an integer; got 1.5"),
    (unit(2, 1, -1.0), ValueError, r"eps must not be negative; got -1\.0"),
    (unit(2, 1, NAN), ValueError, "eps must be finite; got nan"),
    (unit(x=np.float32(1) + np.zeros((), "f4")), TypeError, "x must be an array"),
    (unit(x=np.zeros((), "f4")), ValueError, r"x must have at least 1 axes; got shape \(\)"),
    (unit(x=X.astype(complex)), TypeError, "x must be of dtype float32, float64, float16, bfloat16; got complex128"),
    (unit(out=np.empty(X.shape)), ValueError, "out must have x's shape .* and dtype float32; got .* and float64"),
    (unit(out=np.broadcast_to(np.zeros(1, "f4"), X.shape)), ValueError, "out must be writable"),
    (unit(out=X), ValueError, "out must not overlap x under vjp"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_bad_input(call: Any, error: type, message: str) -> None:
    before = X.copy()
    with pytest.raises(error, match=message):
        call()
    np.testing.assert_array_equal(X, before)


def test_bad_input_writes_nothing(backend: str) -> None:
    out = np.full_like(X, 7.0)
    for call in (
        lambda: nbnorm.local_response_norm(X, 0, out=out, backend=backend),
        lambda: nbnorm.normalize(X, NAN, out=out, backend=backend),
        lambda: nbnorm.normalize(X, 2, 9, out=out, backend=backend),
    ):
        with pytest.raises(ValueError, match="must"):
            call()
    assert (out == 7.0).all()
    x, shifted = BUFFER[: X.size].reshape(X.shape), BUFFER[5:].reshape(X.shape)
    for op, args in ((nbnorm.local_response_norm, (3,)), (nbnorm.normalize, ())):
        with pytest.raises(ValueError, match="out must be x itself or memory apart from it"):
            op(x, *args, out=shifted, backend=backend)
    assert not BUFFER.any()


def test_pullback_checks_its_argument(backend: str) -> None:
    for op, args in ((nbnorm.local_response_norm, (3,)), (nbnorm.normalize, ())):
        _, pullback = nbnorm.vjp(op, X, *args, backend=backend)
        for dy in (X[:2], X.astype("f8")):
            with pytest.raises(ValueError, match=r"dy must have x's shape \(4, 6, 5\) and dtype float32; got"):
                pullback(dy)
        assert pullback(X)._replace(x=None) == nbnorm.Grads(None)
