"""Bad input: a ValueError or TypeError that names the argument, what was expected and what came; nothing written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nbnorm

X = np.random.default_rng(0).normal(size=(4, 6, 5)).astype("f4")
C6, C5 = np.ones(6, "f4"), np.ones(5, "f4")
NAN, INF = float("nan"), float("inf")


def bn(*args: Any, x: Any = X, training: bool = True, **kwargs: Any) -> Any:
    return nbnorm.batch_norm(x, *args, training=training, **kwargs)


def case(name: str, call: Any, error: type, message: str) -> Any:
    return pytest.param(call, error, message, id=name)


def number_cases() -> list[Any]:
    """eps and momentum, wherever they are taken."""
    ops = {
        "batch_norm": lambda **k: nbnorm.batch_norm(X, training=True, **k),
        "instance_norm": lambda **k: nbnorm.instance_norm(X, **k),
        "group_norm": lambda **k: nbnorm.group_norm(X, 2, **k),
        "layer_norm": lambda **k: nbnorm.layer_norm(X, 5, **k),
        "rms_norm": lambda **k: nbnorm.rms_norm(X, 5, **k),
    }
    found = []
    for op, call in ops.items():
        names = ["eps", "momentum"] if op in ("batch_norm", "instance_norm") else ["eps"]
        for name in names:
            for value in (NAN, INF, -INF):
                found.append(
                    case(
                        f"{op} {name}={value}",
                        lambda call=call, name=name, value=value: call(**{name: value}),
                        ValueError,
                        rf"{name} must be finite; got {value}",
                    )
                )
            for value in ("1e-5", True, 1j, [1.0]):
                found.append(
                    case(
                        f"{op} {name}={value!r}",
                        lambda call=call, name=name, value=value: call(**{name: value}),
                        TypeError,
                        rf"{name} must be a number; got",
                    )
                )
    return found


CASES = [
    *number_cases(),
    case("weight shape", lambda: bn(weight=C5), ValueError, r"weight must have shape \(6,\).*got \(5,\)"),
    case(
        "bias shape", lambda: bn(bias=np.ones((6, 1), "f4")), ValueError, r"bias must have shape \(6,\).*got \(6, 1\)"
    ),
    case("weight dtype", lambda: bn(weight=C6.astype("f8")), TypeError, "weight must be of dtype float32.*got float64"),
    case("weight half", lambda: bn(weight=C6.astype("f2")), TypeError, "weight must be of dtype float32.*got float16"),
    case("weight int", lambda: bn(weight=np.ones(6, int)), TypeError, "weight must be of dtype.*got int64"),
    case("bias list", lambda: bn(bias=[0.0] * 6), TypeError, "bias must be an array.*got list"),
    case("bias masked", lambda: bn(bias=np.ma.masked_array(C6)), TypeError, "bias must be an array.*masked"),
    case(
        "half x, double weight", lambda: bn(x=X.astype("f2"), weight=C6.astype("f8")), TypeError, "float16 or float32"
    ),
    case(
        "group weight shape", lambda: nbnorm.group_norm(X, 2, np.ones(2, "f4")), ValueError, r"weight.*\(6,\).*\(2,\)"
    ),
    case(
        "layer weight shape", lambda: nbnorm.layer_norm(X, (6, 5), np.ones(30, "f4")), ValueError, r"\(6, 5\).*\(30,\)"
    ),
    case("mean shape", lambda: bn(C5, C5), ValueError, r"running_mean must have shape \(6,\).*got \(5,\)"),
    case("var shape", lambda: bn(C6.copy(), C5), ValueError, r"running_var must have shape \(6,\).*got \(5,\)"),
    case("mean int", lambda: bn(np.zeros(6, int), C6), TypeError, "running_mean must be of dtype.*got int64"),
    case("mean half", lambda: bn(C6.astype("f2"), C6), TypeError, "running_mean must be of dtype.*got float16"),
    case("mean alone", lambda: bn(C6.copy()), ValueError, "given together; running_var is missing"),
    case("var alone", lambda: bn(None, C6.copy()), ValueError, "given together; running_mean is missing"),
    case(
        "eval without",
        lambda: bn(training=False),
        ValueError,
        "without training=True needs running_mean and running_var",
    ),
    case(
        "instance eval without",
        lambda: nbnorm.instance_norm(X, use_input_stats=False),
        ValueError,
        "without use_input_stats=True needs running_mean",
    ),
    case("same running", lambda: bn(C6, C6), ValueError, "running_mean and running_var must not overlap"),
    case("weight is mean", lambda: bn(C6, C6 + 1, C6), ValueError, "running_mean must not overlap weight"),
    case("bias is var", lambda: bn(C6 + 1, C6, None, C6), ValueError, "running_var must not overlap bias"),
    case("training a number", lambda: bn(training=0.1), TypeError, "training must be True or False; got 0.1"),
    case(
        "use_input_stats a number",
        lambda: nbnorm.instance_norm(X, use_input_stats=1),
        TypeError,
        "use_input_stats must be True or False; got 1",
    ),
    case("return_moments", lambda: bn(return_moments=X), TypeError, "return_moments must be True or False"),
    case("activation array", lambda: bn(activation=X), ValueError, "activation must be one of relu"),
    case("eps too large", lambda: bn(eps=10**400), ValueError, "eps must be finite; got inf"),
    case("layer dtype", lambda: nbnorm.BatchNorm(4, dtype=int), TypeError, "dtype must be float32.*got int64"),
    case("layer features", lambda: nbnorm.BatchNorm(4.0), TypeError, "num_features must be an integer; got 4.0"),
    case("layer none", lambda: nbnorm.BatchNorm(0), ValueError, "num_features must be at least 1; got 0"),
    case("layer shape", lambda: nbnorm.LayerNorm(-3), ValueError, "normalized_shape must be at least 1; got -3"),
    case("layer no shape", lambda: nbnorm.LayerNorm(()), ValueError, "normalized_shape must have at least one length"),
    case("layer channels", lambda: nbnorm.GroupNorm(2, -4), ValueError, "num_channels must be at least 1; got -4"),
    case("layer affine", lambda: nbnorm.BatchNorm(2, affine="x"), TypeError, "affine must be True or False; got 'x'"),
    case("layer mode", lambda: nbnorm.BatchNorm(2).train("no"), TypeError, "mode must be True or False; got 'no'"),
    case("layer eps", lambda: nbnorm.LayerNorm(4, eps=NAN), ValueError, "eps must be finite"),
    case("layer groups", lambda: nbnorm.GroupNorm(3, 4), ValueError, "num_groups must divide num_channels 4; got 3"),
    case("unhashable op", lambda: nbnorm.vjp([], X), TypeError, r"op must be one of .*; got \[\]"),
    case(
        "one value", lambda: bn(x=X[:1, :, :1]), ValueError, r"x must have more than 1 value per channel.*\(1, 6, 1\)"
    ),
    case(
        "instance one value",
        lambda: nbnorm.instance_norm(X[:, :, :1]),
        ValueError,
        "x must have more than 1 value per channel with use_input_stats=True",
    ),
    case("eps zero in training", lambda: bn(eps=0), ValueError, "eps must be positive with training=True; got 0.0"),
    case("1-D batch", lambda: bn(x=X[0, 0]), ValueError, r"x must have at least 2 axes; got shape \(5,\)"),
    case("2-D instance", lambda: nbnorm.instance_norm(X[0]), ValueError, "x must have at least 3 axes"),
    case(
        "channel axis",
        lambda: bn(channel_axis=3),
        ValueError,
        r"channel_axis must be an axis of x .* from -3 to 2; got 3",
    ),
    case("channel axis type", lambda: bn(channel_axis=1.0), TypeError, "channel_axis must be an integer; got 1.0"),
    case("channel axis bool", lambda: bn(channel_axis=True), TypeError, "channel_axis must be an integer; got True"),
    case("group batch axis", lambda: nbnorm.group_norm(X, 2, channel_axis=0), ValueError, "must not be the batch axis"),
    case("groups", lambda: nbnorm.group_norm(X, 4), ValueError, r"num_groups must divide the 6 channels.*got 4"),
    case("groups zero", lambda: nbnorm.group_norm(X, 0), ValueError, "num_groups must divide.*got 0"),
    case("groups negative", lambda: nbnorm.group_norm(X, -2), ValueError, "num_groups must divide.*got -2"),
    case("groups float", lambda: nbnorm.group_norm(X, 2.0), TypeError, "num_groups must be an integer; got 2.0"),
    case("normalized shape", lambda: nbnorm.layer_norm(X, 6), ValueError, r"normalized_shape.*\(4, 6, 5\); got \(6,\)"),
    case("normalized shape long", lambda: nbnorm.layer_norm(X, (1, 4, 6, 5)), ValueError, "normalized_shape must be"),
    case("normalized shape empty", lambda: nbnorm.layer_norm(X, ()), ValueError, r"normalized_shape must be.*got \(\)"),
    case("normalized shape float", lambda: nbnorm.rms_norm(X, 5.0), TypeError, "normalized_shape must be an integer"),
    case("neither", lambda: nbnorm.layer_norm(X), ValueError, "give one of normalized_shape and axis; got neither"),
    case(
        "both", lambda: nbnorm.layer_norm(X, 5, axis=-1), ValueError, "give one of normalized_shape and axis; got both"
    ),
    case("axis twice", lambda: nbnorm.layer_norm(X, axis=(1, -2)), ValueError, "axis must name each axis once"),
    case("axis none", lambda: nbnorm.layer_norm(X, axis=()), ValueError, "axis must name at least one axis"),
    case("axis beyond", lambda: nbnorm.rms_norm(X, axis=7), ValueError, "axis must be an axis of x"),
    case("out shape", lambda: bn(out=np.empty((4, 6, 4), "f4")), ValueError, r"out must have x's shape.*\(4, 6, 4\)"),
    case("out dtype", lambda: bn(out=np.empty(X.shape)), ValueError, "out must have x's shape.*float64"),
    case("out list", lambda: bn(out=[1]), TypeError, "out must be an array"),
    case("out read-only", lambda: bn(out=np.broadcast_to(np.float32(0), X.shape)), ValueError, "out must be writable"),
    case("backend type", lambda: bn(backend=3), TypeError, "backend must be a name or a Backend; got 3"),
    case(
        "vjp op",
        lambda: nbnorm.vjp(np.sin, X),
        TypeError,
        r"op must be one of nbnorm\.add_layer_norm.*got <ufunc 'sin'>",
    ),
    case("explain op", lambda: nbnorm.explain("layer_norm", X), TypeError, "op must be one of"),
    case("unknown keyword", lambda: bn(epsilon=1), TypeError, "epsilon"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": C5},
        {"bias": C6.astype("f8")},
        {"eps": NAN},
        {"eps": -1.0},
        {"momentum": INF},
        {"out": np.empty(3, "f4")},
        {"backend": "nothing of that name"},
        {"channel_axis": 9},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
@pytest.mark.parametrize("op", [nbnorm.batch_norm, nbnorm.instance_norm])
def test_running_statistics_survive_errors(op: Any, wrong: dict[str, Any]) -> None:
    mean, var = np.random.default_rng(1).normal(size=(2, 6)).astype("f4")
    before = mean.tobytes(), var.tobytes()
    switch = {"training": True} if op is nbnorm.batch_norm else {}
    with pytest.raises((ValueError, TypeError, nbnorm.BackendError)):
        op(X, mean, var, **switch, **wrong)
    assert (mean.tobytes(), var.tobytes()) == before


def test_running_statistics_survive_a_failing_backend() -> None:
    from nbnorm_backends.numpy_ref import NumpyBackend

    class Failing(NumpyBackend):
        def apply(self, *args: Any, **kwargs: Any) -> Any:
            raise MemoryError("planted")

    mean, var = np.zeros(6, "f4"), np.ones(6, "f4")
    with pytest.raises(MemoryError, match="planted"):
        nbnorm.batch_norm(X, mean, var, training=True, backend=Failing())
    assert not mean.any()
    assert (var == 1).all()


def test_read_only_running_statistics_are_refused_as_a_pair() -> None:
    mean, var = np.zeros(6, "f4"), np.ones(6, "f4")
    var.flags.writeable = False
    with pytest.raises(TypeError, match="running_var cannot be written in place"):
        nbnorm.batch_norm(X, mean, var, training=True)
    assert not mean.any()
    nbnorm.batch_norm(X, mean, var)


def test_out_overlaps() -> None:
    memory = np.zeros(X.size + 4, "f4")
    x = memory[: X.size].reshape(X.shape)
    x[...] = X
    with pytest.raises(ValueError, match="out must be x itself or memory apart from it"):
        nbnorm.batch_norm(x, training=True, out=memory[4:].reshape(X.shape))
    with pytest.raises(ValueError, match="out must be x itself"):
        nbnorm.layer_norm(x[:4, :4, :4], 4, out=x[:4, :4, :4].transpose(1, 0, 2))
    np.testing.assert_array_equal(x, X)
    interleaved = np.zeros((*X.shape, 2), "f4")
    interleaved[..., 0] = X
    nbnorm.layer_norm(interleaved[..., 0], 5, out=interleaved[..., 1])
    np.testing.assert_array_equal(interleaved[..., 0], X)
    flat = np.zeros((6, 6), "f4")
    with pytest.raises(ValueError, match="out must not overlap weight"):
        nbnorm.layer_norm(np.ones((6, 6), "f4"), 6, flat[2], out=flat)
    with pytest.raises(ValueError, match="out must not overlap running_var"):
        nbnorm.batch_norm(np.ones((6, 6), "f4"), C6.copy(), flat[2], training=True, out=flat)
    with pytest.raises(ValueError, match="out must not overlap x under vjp"):
        nbnorm.vjp(nbnorm.layer_norm, flat, 6, out=flat)


def test_out_with_one_memory_for_many_elements() -> None:
    out = np.lib.stride_tricks.as_strided(np.zeros(30, "f4"), X.shape, (0, 20, 4), writeable=True)
    with pytest.raises(ValueError, match="out must have memory of its own for each element"):
        nbnorm.layer_norm(X, 5, out=out)


def test_written_arrays_need_memory_of_their_own() -> None:
    """Rows that overlap each other, and one element that stands for all channels."""
    rows = np.lib.stride_tricks.as_strided(np.zeros(100, "f4"), (4, 6), (8, 4), writeable=True)
    with pytest.raises(ValueError, match="out must have memory of its own for each element"):
        nbnorm.layer_norm(np.ones((4, 6), "f4"), 6, out=rows)
    one = np.lib.stride_tricks.as_strided(np.zeros(1, "f4"), (6,), (0,), writeable=True)
    with pytest.raises(ValueError, match="running_mean must have memory of its own for each element"):
        nbnorm.batch_norm(X, one, C6.copy(), training=True)


def test_in_place_whatever_the_strides_of_axes_of_one() -> None:
    x = np.ones((1, 6, 4), "f4") * np.arange(4, dtype="f4")
    out = np.lib.stride_tricks.as_strided(x, x.shape, (4, *x.strides[1:]), writeable=True)
    expected = nbnorm.layer_norm(x, 4)
    assert nbnorm.layer_norm(x, 4, out=out) is out
    np.testing.assert_array_equal(x, expected)


def test_dy_is_checked(backend: str) -> None:
    _, pullback = nbnorm.vjp(nbnorm.layer_norm, X, 5, backend=backend)
    with pytest.raises(ValueError, match=r"dy must have x's shape \(4, 6, 5\) and dtype float32; got \(4, 6\)"):
        pullback(X[..., 0])
    with pytest.raises(ValueError, match=r"dy must have x's shape.*float64"):
        pullback(X.astype("f8"))
    with pytest.raises(TypeError, match="dy must be an array"):
        pullback(1.0)


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_layer_norms_take_any_finite_eps(eps: float, backend: str) -> None:
    """As PyTorch: values, or NaN where the root has none; never an error."""
    y = nbnorm.layer_norm(X, 5, eps=eps, backend=backend)
    with np.errstate(invalid="ignore"):
        wide = X.astype("f8")
        expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + eps)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
