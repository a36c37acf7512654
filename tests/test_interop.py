"""The norms inside compiled functions: bits of the public ones, values of the oracle, and errors before any write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit, prange
from numba.core.errors import TypingError
from numba.core.runtime import _nrt_python, rtsys

import bounds
import nbnorm
import nbnorm.interop.numba as norms
from oracle import norm

EPS = 1e-3
GROUPS = 3


@dataclass
class Results:
    """What one forward and one backward write."""

    y: Any
    mean: Any
    rstd: Any
    dx: Any
    dweight: Any
    dbias: Any


def data(op: str, shape: tuple[int, ...], dtype: str) -> tuple[Any, Any, Any, Any]:
    """x, weight, bias, dy."""
    rng = np.random.default_rng(3)
    x, dy = rng.normal(size=(2, *shape))
    weight, bias = rng.normal(size=(2, shape[-1] if op in ("layer_norm", "rms_norm") else shape[1]))
    return tuple((a * 2 + 1).astype(dtype) for a in (x, weight, bias, dy))  # type: ignore[return-value]


def statistics_shape(op: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    per_sample = {"group_norm": GROUPS, "instance_norm": shape[1] if len(shape) > 1 else 1}
    if op in per_sample:
        return shape[0], per_sample[op]
    return (shape[1],) if op == "batch_norm" else shape[:-1] or (1,)


def embedded(op: str, x: Any, weight: Any, bias: Any, dy: Any, running: Any = None) -> Results:
    """By the functions under test, whose signatures are spelled out here. `running` is not None, to be one type."""
    found = Results(*(np.empty_like(x), *np.empty((2, *statistics_shape(op, x.shape)))), np.empty_like(x), None, None)
    found.dweight = None if weight is None else np.empty_like(weight)
    found.dbias = None if bias is None else np.empty_like(bias)
    y, mean, rstd, dx, dweight, dbias = vars(found).values()
    if op == "batch_norm":
        running = (np.zeros(x.shape[1], "f4"), np.ones(x.shape[1], "f4")) if running is None else running
        norms.batch_norm(x, *running, weight, bias, True, 0.3, EPS, y, mean, rstd)
        norms.batch_norm_backward(dy, x, weight, True, mean, rstd, dx, dweight, dbias)
    elif op == "group_norm":
        norms.group_norm(x, GROUPS, weight, bias, EPS, y, mean, rstd)
        norms.group_norm_backward(dy, x, GROUPS, weight, mean, rstd, dx, dweight, dbias)
    elif op == "rms_norm":
        norms.rms_norm(x, weight, EPS, y, rstd)
        norms.rms_norm_backward(dy, x, weight, rstd, dx, dweight)
    else:
        getattr(norms, op)(x, weight, bias, EPS, y, mean, rstd)
        getattr(norms, f"{op}_backward")(dy, x, weight, mean, rstd, dx, dweight, dbias)
    return found


def public(op: str, x: Any, weight: Any, bias: Any, dy: Any, running: Any = (None, None)) -> tuple[Any, nbnorm.Grads]:
    """By nbnorm itself, on the Numba backend."""
    keys: dict[str, Any] = {"weight": weight, "eps": EPS, "backend": "numba"}
    keys |= {} if op == "rms_norm" else {"bias": bias}
    keys |= {
        "batch_norm": {"running_mean": running[0], "running_var": running[1], "training": True, "momentum": 0.3},
        "group_norm": {"num_groups": GROUPS},
        "instance_norm": {},
    }.get(op, {"normalized_shape": x.shape[-1]})
    y, pullback = nbnorm.vjp(getattr(nbnorm, op), x, **keys)
    return y, pullback(dy)


def assert_same_bits(found: Any, expected: Any) -> None:
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


def check_bits(op: str, x: Any, weight: Any, bias: Any, dy: Any) -> Results:
    found = embedded(op, x, weight, bias, dy)
    y, grads = public(op, x, weight, bias, dy)
    assert_same_bits(found.y, y)
    assert_same_bits(found.dx, grads.x)
    if weight is not None:
        assert_same_bits(found.dweight, grads.weight)
    if bias is not None and op != "rms_norm":
        assert_same_bits(found.dbias, grads.bias)
    return found


def check_oracle(op: str, x: Any, weight: Any, bias: Any, dy: Any, found: Results) -> None:
    rows = op in ("layer_norm", "rms_norm")
    keys = {"axes": (-1,)} if rows else {"num_groups": GROUPS}
    expected = norm(op, x, weight, None if op == "rms_norm" else bias, EPS, dy, **keys)
    dbias = None if op == "rms_norm" else found.dbias
    assert bounds.forward(found.y, expected) <= 1
    assert bounds.backward(nbnorm.Grads(found.dx, found.dweight, dbias), expected) <= 1
    if op != "rms_norm":
        np.testing.assert_allclose(found.mean.ravel(), [*map(float, expected.mean.values())], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        found.rstd.ravel() ** -2 - EPS, [*map(float, expected.var.values())], rtol=1e-6, atol=1e-12
    )


@pytest.mark.slow
def test_batch_norm_of_two_axes() -> None:
    """The public norm's kernels would take as long again to compile: its bits are a test of their own."""
    for shape in (7, 5), (1000, 7):
        x, weight, bias, dy = data("batch_norm", shape, "float32")
        running = np.full(shape[1], 0.5, "f4"), np.full(shape[1], 2.0, "f4")
        check_oracle("batch_norm", x, weight, bias, dy, embedded("batch_norm", x, weight, bias, dy, running))
        np.testing.assert_allclose(running[0], 0.7 * 0.5 + 0.3 * x.mean(axis=0, dtype="f8"), rtol=1e-6)
        np.testing.assert_allclose(running[1], 0.7 * 2.0 + 0.3 * x.var(axis=0, dtype="f8", ddof=1), rtol=1e-6)

        y, mean, rstd = np.empty_like(x), *np.empty((2, shape[1]))
        norms.batch_norm(x, *running, weight, bias, False, 0.3, EPS, y, mean, rstd)
        np.testing.assert_allclose(y, (x - running[0]) / np.sqrt(running[1] + EPS) * weight + bias, atol=1e-5)
        dx, dweight, dbias = np.empty_like(x), np.empty_like(weight), np.empty_like(bias)
        norms.batch_norm_backward(dy, x, weight, False, mean, rstd, dx, dweight, dbias)
        np.testing.assert_allclose(dx, dy * weight / np.sqrt(running[1] + EPS), rtol=1e-5)
        np.testing.assert_allclose(dbias, dy.sum(axis=0, dtype="f8"), rtol=1e-5)


@pytest.mark.slow
def test_batch_norm_of_two_axes_has_the_public_bits() -> None:
    for shape in (7, 5), (1000, 7), (3000, 300):
        check("batch_norm", shape, "float32")
    check_extreme_data((400, 5))
    check_running_statistics_and_evaluation((400, 5))


# Functions are compiled for each type, number of axes, and argument that is None: the quick cases share those of the
# other tests here, and of the examples in the documentation. Large shapes are cut in chunks, tiles and shares.
QUICK = [
    ("group_norm", "float32", [(2, 6, 20), (40, 6, 1000)]),
    ("instance_norm", "float32", [(2, 3, 50), (50, 4, 1640)]),
]
SLOW = [
    ("layer_norm", "float32", [(300,), (7, 5), (700, 300), (7, 100, 300)]),
    ("layer_norm", "float64", [(2, 3, 40), (200, 100, 6)]),
    ("rms_norm", "float32", [(7, 5), (700, 300), (3, 2, 40)]),
    ("rms_norm", "float64", [(3, 2, 40)]),
    ("group_norm", "float32", [(5, 12), (3, 6, 5, 4), (300, 24, 7, 7)]),
    ("group_norm", "float64", [(5, 12), (2, 6, 20), (40, 6, 1000), (2, 6, 2, 3, 4)]),
    ("instance_norm", "float64", [(2, 3, 6, 4)]),
    ("batch_norm", "float32", [(5, 6, 40, 41)]),
    ("batch_norm", "float64", [(7, 5), (3000, 300), (128, 1100), (2, 6, 2, 3, 4)]),
]


@pytest.mark.parametrize(
    ("op", "dtype", "shapes"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda value: value if isinstance(value, str) else f"{len(value[0])}-axes",
)
def test_bits_of_the_public_norms_and_values_of_the_oracle(op: str, dtype: str, shapes: list[tuple[int, ...]]) -> None:
    for shape in shapes:
        check(op, shape, dtype)


def check(op: str, shape: tuple[int, ...], dtype: str) -> None:
    x, weight, bias, dy = data(op, shape, dtype)
    found = check_bits(op, x, weight, bias, dy)
    if x.size < 10_000:
        check_oracle(op, x, weight, bias, dy, found)


def test_batch_norm_of_three_axes() -> None:
    for shape in (9, 4, 30), (5, 6, 1640):
        check("batch_norm", shape, "float32")
    check_extreme_data((40, 5, 30))
    check_running_statistics_and_evaluation((4, 5, 30))


def test_without_parameters() -> None:
    x, _, _, dy = data("layer_norm", (2, 3, 12), "float32")
    check_oracle("layer_norm", x, None, None, dy, embedded("layer_norm", x, None, None, dy))


@pytest.mark.slow
@pytest.mark.parametrize("which", [(), (0,), (1,)], ids=["neither", "weight", "bias"])
def test_bits_with_one_parameter_or_none(which: tuple[int, ...]) -> None:
    for op, shape in ("layer_norm", (2, 3, 12)), ("instance_norm", (2, 3, 6, 4)), ("batch_norm", (20, 5)):
        x, weight, bias, dy = data(op, shape, "float64")
        given = [param if place in which else None for place, param in enumerate((weight, bias))]
        check_oracle(op, x, *given, dy, check_bits(op, x, *given, dy))


@pytest.mark.slow
def test_one_element_where_bits_may_differ() -> None:
    """A length of 1 has another view in the engine: values are the same within rounding."""
    shapes = (
        ("batch_norm", (300, 1)),
        ("batch_norm", (9, 1, 5, 6)),
        ("rms_norm", (300, 1)),
        ("group_norm", (30, 12, 1, 1)),
    )
    for op, shape in shapes:
        x, weight, bias, dy = data(op, shape, "float32")
        check_oracle(op, x, weight, bias, dy, embedded(op, x, weight, bias, dy))


def check_extreme_data(shape: tuple[int, ...]) -> None:
    """What the engine does about it, twice over: constant, far, huge, tiny and missing values, and gradients that
    overflow float32."""
    x, weight, bias, dy = data("batch_norm", shape, "float32")
    scale = np.array([0.0, 1.0, 1e30, 1e-30, 1.0], "f4").reshape(5, *(1,) * (len(shape) - 2))
    x *= scale
    x[:, 1] += np.float32(1e7)
    dy[:, 2] *= np.float32(1e36)
    check_bits("batch_norm", x, weight, bias, dy)
    x[3, 4] = np.nan
    check_bits("batch_norm", x, weight, bias, dy)


def check_running_statistics_and_evaluation(shape: tuple[int, ...]) -> None:
    x, weight, bias, dy = data("batch_norm", shape, "float32")
    running = np.full(5, 0.5, "f4"), np.full(5, 2.0, "f4")
    expected = running[0].copy(), running[1].copy()
    embedded("batch_norm", x, weight, bias, dy, running)
    public("batch_norm", x, weight, bias, dy, expected)
    assert_same_bits(running[0], expected[0])
    assert_same_bits(running[1], expected[1])

    y, dx, dweight, dbias = np.empty_like(x), np.empty_like(x), np.empty_like(weight), np.empty_like(bias)
    mean, rstd = np.empty((2, 5))
    norms.batch_norm(x, *running, weight, bias, False, 0.3, EPS, y, mean, rstd)
    norms.batch_norm_backward(dy, x, weight, False, mean, rstd, dx, dweight, dbias)
    keys = {"weight": weight, "bias": bias, "eps": EPS, "backend": "numba"}
    y0, pullback = nbnorm.vjp(nbnorm.batch_norm, x, *expected, **keys)
    for found, reference in zip((y, dx, dweight, dbias, *running), (y0, *pullback(dy)[:3], *expected), strict=True):
        assert_same_bits(found, reference)


def test_in_place() -> None:
    x, weight, bias, dy = data("instance_norm", (1, 7, 5), "float32")
    expected = embedded("instance_norm", x, weight, bias, dy)
    y, mean, rstd = x.copy(), np.empty((1, 7)), np.empty((1, 7))
    norms.instance_norm(y, weight, bias, EPS, y, mean, rstd)
    dx, dweight, dbias = dy.copy(), np.empty_like(weight), np.empty_like(bias)
    norms.instance_norm_backward(dx, x, weight, mean, rstd, dx, dweight, dbias)
    assert_same_bits(y, expected.y)
    assert_same_bits(dx, expected.dx)


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (4, 0, 5)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    """Nothing is normalized: gradients of parameters are zero, running statistics stay."""
    for op in "instance_norm", "batch_norm":
        x, weight, bias, dy = data(op, shape, "float32")
        running = np.full(shape[1], 3.0, "f4"), np.full(shape[1], 4.0, "f4")
        found = embedded(op, x, weight, bias, dy, running)
        assert (found.mean == 0).all()
        assert (found.dweight == 0).all()
        assert (found.dbias == 0).all()
        assert (running[0] == 3).all()
        assert (running[1] == 4).all()


# ---- callers ---------------------------------------------------------------------------------------------------------


@njit(nogil=True)
def constant_shapes(source):  # type: ignore[no-untyped-def]  # compiled
    """A caller of which LLVM knows all lengths."""
    x, y, weight = np.empty((7, 2, 5), np.float32), np.empty((7, 2, 5), np.float32), np.ones(2, np.float32)
    for index in np.ndindex(x.shape):
        x[index] = source[index]
    norms.instance_norm(x, weight, weight, EPS, y)
    return y


@njit(parallel=True, nogil=True)
def in_parallel(x, weight, dy, y, dx):  # type: ignore[no-untyped-def]  # compiled
    for i in prange(x.shape[0]):
        mean, rstd, dweight = np.empty(x[i].shape[:2]), np.empty(x[i].shape[:2]), np.empty_like(weight)
        norms.instance_norm(x[i], weight, weight, EPS, y[i], mean, rstd)
        norms.instance_norm_backward(dy[i], x[i], weight, mean, rstd, dx[i], dweight, dweight)


@pytest.mark.slow
def test_lengths_that_the_caller_knows_change_no_bit() -> None:
    x, weight = data("instance_norm", (7, 2, 5), "float32")[0], np.ones(2, "f4")
    expected = nbnorm.instance_norm(x, weight=weight, bias=weight, eps=EPS, backend="numba")
    assert_same_bits(constant_shapes(x), expected)


def test_in_the_body_of_a_prange_loop() -> None:
    x, weight, _, dy = data("instance_norm", (8, 7, 3, 5), "float32")
    weight = np.linspace(1, 2, 3, dtype="f4")
    parts = [public("instance_norm", *pair[:1], weight, weight, pair[1]) for pair in zip(x, dy, strict=True)]
    y, grads = np.stack([part for part, _ in parts]), np.stack([part.x for _, part in parts])
    found, dx = np.empty_like(x), np.empty_like(x)
    in_parallel(x, weight, dy, found, dx)
    assert_same_bits(found, y)
    assert_same_bits(dx, grads)


def test_threads_at_once_and_nothing_leaks() -> None:
    """Compiled without the GIL, from Python threads; work arrays are freed."""
    x, weight, bias, dy = data("instance_norm", (20, 30, 400), "float32")
    expected = embedded("instance_norm", x, weight, bias, dy)
    _nrt_python.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats()
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: embedded("instance_norm", x, weight, bias, dy), range(16)):
                assert_same_bits(found.dx, expected.dx)
                assert_same_bits(found.dweight, expected.dweight)
        after = rtsys.get_allocation_stats()
    finally:
        _nrt_python.memsys_disable_stats()
    assert after.alloc - before.alloc == after.free - before.free > 0


PROGRAM = """
import numpy as np
from numba import njit
import nbnorm.interop.numba as norms

@njit(cache=True)
def caller(x, weight, y, dx, mean, rstd, dweight):
    norms.instance_norm(x, weight, weight, 1e-3, y, mean, rstd)
    norms.instance_norm_backward(y, x, weight, mean, rstd, dx, dweight, dweight)

x, weight = np.linspace(1, 2, 12, dtype="f4").reshape(1, 3, 4), np.ones(3, "f4")
y, dx, mean, rstd = np.empty_like(x), np.empty_like(x), np.empty((1, 3)), np.empty((1, 3))
caller(x, weight, y, dx, mean, rstd, np.empty_like(weight))
print(sum(caller.stats.cache_hits.values()), y.tobytes().hex(), dx.tobytes().hex())
"""


def test_a_caller_kept_by_numba(tmp_path: Path) -> None:
    """`cache=True` of the caller: a second process loads it, to the same bits."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(tmp_path / "program.py")]
    runs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout.split()
        for _ in range(2)
    ]
    assert [hits for hits, *_ in runs] == ["0", "1"]
    x, weight = np.linspace(1, 2, 12, dtype="f4").reshape(1, 3, 4), np.ones(3, "f4")
    y, pullback = nbnorm.vjp(nbnorm.instance_norm, x, weight=weight, bias=weight, eps=EPS, backend="numba")
    expected = [y.tobytes().hex(), pullback(y).x.tobytes().hex()]
    assert [bits for _, *bits in runs] == [expected, expected]


def test_import_leaves_numba_alone() -> None:
    code = "import nbnorm, nbnorm.interop, sys; assert not {'numba', 'nbnorm.interop.numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- errors ----------------------------------------------------------------------------------------------------------

X = np.ones((4, 6, 5), "f4")
Y = np.zeros_like(X)
W, C, S = np.ones(5, "f4"), np.ones(6, "f4"), np.ones((4, 6))
R, V = np.ones(6, "f4"), np.ones(6, "f4")
M, D = np.ones(6), np.ones(6)
READ_ONLY = np.zeros_like(X)
READ_ONLY.flags.writeable = False

SHAPES = {
    "weight must have as many elements": (norms.instance_norm, X, W, C, EPS, Y, S, S),
    "bias must have as many elements": (norms.instance_norm, X, C, W, EPS, Y, S, S),
    "out must have the shape of x": (norms.instance_norm, X, C, C, EPS, Y[1:], S, S),
    "out must be x itself or memory apart from it": (norms.instance_norm, X[1:], C, C, EPS, X[:-1], S[1:], S[1:]),
    "mean must have one element": (norms.instance_norm, X, C, C, EPS, Y, S[1:], S),
    "rstd must have one element": (norms.instance_norm, X, C, C, EPS, Y, S, S[1:]),
    "dy must have the shape of x": (norms.instance_norm_backward, X[1:], X, C, S, S, Y, C, C),
    "dx must have the shape of x": (norms.instance_norm_backward, X, X, C, S, S, Y[1:], C, C),
    "dx must be x or dy itself": (norms.instance_norm_backward, Y[1:], X[1:], C, S[1:], S[1:], X[:-1], C, C),
    "dweight must have": (norms.instance_norm_backward, X, X, C, S, S, Y, W, C),
    "dbias must have": (norms.instance_norm_backward, X, X, C, S, S, Y, C, W),
    "num_groups must divide": (norms.group_norm, X, 4, C, C, EPS, Y, S, S),
    "running_mean and running_var must be given where training is False": (
        *(norms.batch_norm, X, None, None, C, C, False, 0.1, EPS, Y, M, D),
    ),
    "eps must be positive": (norms.batch_norm, X, R, V, C, C, True, 0.1, 0.0, Y, M, D),
    "eps must be finite": (norms.instance_norm, X, C, C, np.nan, Y, S, S),
    "momentum must be finite": (norms.batch_norm, X, R, V, C, C, True, np.inf, EPS, Y, M, D),
    "running_mean must have": (norms.batch_norm, X, R[1:], V, C, C, True, 0.1, EPS, Y, M, D),
    "running_var must have": (norms.batch_norm, X, R, V[1:], C, C, True, 0.1, EPS, Y, M, D),
    "x must have more than 1 value": (
        *(norms.batch_norm, X[:1, :, :1].copy(), R, V, C, C, True, 0.1, EPS, Y[:1, :, :1].copy(), M, D),
    ),
}


@pytest.mark.parametrize("message", SHAPES, ids=lambda message: "-".join(message.split()[:3]))
def test_wrong_shapes(message: str) -> None:
    """Before anything is written."""
    function, *args = SHAPES[message]
    Y[:] = 0.0
    with pytest.raises(ValueError, match=message):
        function(*args)
    assert (Y == 0.0).all()
    for array in X, W, C, S, R, V, M, D:
        assert (array == 1.0).all()


TYPES: dict[str, tuple[Callable[..., None], Any]] = {
    "x must be a C-contiguous array of float32 or float64 with at least 1 axis; got array(int64, 3d, C)": (
        norms.layer_norm,
        (X.astype("i8"), None, None, EPS, Y),
    ),
    "x must be a C-contiguous array of float32 or float64 with at least 2 axes; got array(float32, 1d, C)": (
        norms.group_norm,
        (X[0, 0], 1, None, None, EPS, Y[0, 0]),
    ),
    "x must be a C-contiguous array of float32 or float64 with at least 3 axes; got array(float32, 2d, C)": (
        norms.instance_norm,
        (X[0], None, None, EPS, Y[0]),
    ),
    "weight must be a C-contiguous array of one axis and x's float32, or None; got array(float64, 1d, C)": (
        norms.rms_norm,
        (X, W.astype("f8"), EPS, Y),
    ),
    "out must be a C-contiguous array of 3 axes and x's float32, not read-only; got array(float32, 3d, A)": (
        norms.layer_norm,
        (X, None, None, EPS, Y[:, ::2]),
    ),
    "x's float32, not read-only; got readonly array(float32, 3d, C)": (
        norms.layer_norm,
        (X, None, None, EPS, READ_ONLY),
    ),
    "eps must be a number; got none": (norms.layer_norm, (X, None, None, None, Y)),
    "mean must be a C-contiguous array of float64, not read-only, or None; got array(float32, 1d, C)": (
        norms.layer_norm,
        (X, None, None, EPS, Y, W),
    ),
    "mean must be a C-contiguous array of float64; got none": (norms.layer_norm_backward, (X, X, None, None, S, Y)),
    "num_groups must be an integer; got float64": (norms.group_norm, (X, 2.0, None, None, EPS, Y)),
    "running_mean and running_var must be given together; running_var is missing": (
        norms.batch_norm,
        (X, C, None, None, None, True, 0.1, EPS, Y),
    ),
    "training must be True or False; got int64": (norms.batch_norm, (X, None, None, None, None, 1, 0.1, EPS, Y)),
}


@pytest.mark.parametrize("message", TYPES, ids=lambda message: "-".join(message.split()[:3]))
def test_wrong_types(message: str) -> None:
    function, args = TYPES[message]
    with pytest.raises(TypingError) as caught:
        function(*args)
    assert message in str(caught.value)


@njit
def calls_with_wrong_types(x, y):  # type: ignore[no-untyped-def]  # compiled
    norms.batch_norm(x, None, None, None, None, True, 0.1, EPS, y)


def test_wrong_types_from_a_compiled_caller() -> None:
    with pytest.raises(TypingError, match="out must be a C-contiguous array of 3 axes and x's float32, not read-only"):
        calls_with_wrong_types(X, Y.astype("f8"))


# ---- compiled for itself ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_values_of_the_oracle_with_weights_along_rows() -> None:
    for op, shape in (
        ("layer_norm", (2, 3, 40)),
        ("layer_norm", (5, 50, 30)),
        ("rms_norm", (3, 2, 40)),
        ("group_norm", (5, 12)),
    ):
        x, weight, bias, dy = data(op, shape, "float32")
        check_oracle(op, x, weight, bias, dy, embedded(op, x, weight, bias, dy))
