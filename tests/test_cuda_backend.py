"""The CUDA backend from the public functions down to its launches, on a device whose kernels run in the simulator."""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nbnorm
import oracle
from bounds import backward, forward
from cases import NORMS, Norm, batch, data, dtype_of, group, has_bias, layer
from nbnorm import arrays, dispatch, engine
from nbnorm.devices import DeviceArray, allocates

pytest.importorskip("greenlet", reason="greenlet is not installed (it comes with the test extra)")
from nbnorm_backends.numba_cuda import again, cubins, device, launch, plans
from nbnorm_backends.numba_cuda import backend as cuda_backend
from nbnorm_backends.numba_cuda.simulated_device import LENT, SimulatedDevice, SimulatedMemory, Tensor, Tensors

EPS = 1e-5


class TensorMemory(SimulatedMemory):
    """The memory of `Tensor`, which counts the blocks that were taken."""

    taken = 0

    def block(self, size: int, *, zero: bool = False) -> Any:
        self.taken += 1
        return super().block(size, zero=zero)


class Machine:
    """A computer with simulated GPUs."""

    def __init__(self, **keys: Any) -> None:
        self.devices = {ordinal: SimulatedDevice(ordinal, **keys) for ordinal in (0, 1)}
        for ordinal, simulated in self.devices.items():
            simulated.memory = TensorMemory(ordinal)
        self.backend = cuda_backend.CudaBackend(self.devices.__getitem__)

    @property
    def launches(self) -> list[Any]:
        return self.devices[0].launches

    def tensor(self, array: Any, ordinal: int = 0) -> Tensor | None:
        """A copy on the device, with the strides of the array."""
        return None if array is None else self.devices[ordinal].memory.tensor(array)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """In place of this one's GPUs; arrays on it are those of `Tensor`."""
    return install(monkeypatch, Machine())


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """What was decided of a machine of a test's is not of the next. What its results are compared with needs no kernels
    of the CPU: to compile those took a fifth of the time of these tests."""
    with nbnorm.use_backend("numpy"):
        yield
    dispatch.registry._forget()


def install(monkeypatch: pytest.MonkeyPatch, machine: Machine, kind: Any = None) -> Machine:
    monkeypatch.setattr(arrays, "KINDS", [kind or Tensors(), *arrays.KINDS])
    monkeypatch.setattr(arrays, "by_type", {})
    monkeypatch.setitem(dispatch.registry._loaded, "cuda", machine.backend)
    dispatch.registry._forget()
    return machine


# ---- every norm, in every layout and type ----------------------------------------------------------------------------

# Weights along an axis that lies, in memory, outside of one that is kept.
REFUSED = ("layer over channels", "rms over channels", "layer over outer axes", "layer over alternate axes")
TAKEN = [case for case in NORMS if case.name not in REFUSED]
MORE = [
    layer("layer, vectors", nbnorm.layer_norm, (5, 64), 1),
    layer("rms, a warp", nbnorm.rms_norm, (3, 264), 1),
    batch("batch NCHW, vectors", (3, 4, 4, 6)),
    batch("batch NHWC, vectors", (3, 4, 5, 16), -1),
    group("group NHWC, vectors", (2, 7, 8, 16), 4, -1),
]
FEW = [case for case in TAKEN + MORE if case.name in ("layer", "rms", "batch NCHW", "group NHWC", "instance NCHW")]


def check(machine: Machine, case: Norm, dtype: str, *, host: bool = False, params: str = "") -> None:
    x, weight, bias, dy = data(case, dtype)
    weight, bias = (param.astype(dtype_of(params or dtype)) for param in (weight, bias))
    exact = oracle.norm(case.op.__name__, x, weight, bias if has_bias(case) else None, EPS, dy, **case.oracle)
    put: Any = np.asarray if host else machine.tensor
    keys: dict[str, Any] = case.call | ({"bias": put(bias)} if has_bias(case) else {})
    y, pullback = nbnorm.vjp(
        case.op, put(x), weight=put(weight), eps=EPS, **keys, **({"backend": "cuda"} if host else {})
    )
    grads = pullback(put(dy))
    if not host:
        y, grads = y.numpy(), nbnorm.Grads._make(each and each.numpy() for each in grads)
    assert type(y) is np.ndarray
    assert (y.dtype, grads.x.dtype, grads.weight.dtype) == (x.dtype, x.dtype, weight.dtype)
    assert forward(y, exact) <= 1
    assert backward(grads, exact) <= 1
    assert machine.launches


@pytest.mark.parametrize("case", TAKEN + MORE, ids=lambda case: case.name)
def test_arrays_on_a_device_are_normalized_there(machine: Machine, case: Norm) -> None:
    check(machine, case, "float32")


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_every_type_on_a_device(machine: Machine, case: Norm, dtype: str) -> None:
    check(machine, case, dtype)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_parameters_beside_half_types(machine: Machine, case: Norm, dtype: str) -> None:
    check(machine, case, dtype, params="float32")


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_host_arrays_are_copied_there_and_back(machine: Machine, case: Norm, dtype: str) -> None:
    check(machine, case, dtype, host=True)


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_kernels_lack_are_refused(machine: Machine, name: str) -> None:
    case = next(case for case in NORMS if case.name == name)
    x, weight, _, _ = map(machine.tensor, data(case, "float32"))
    with pytest.raises(nbnorm.BackendError, match="no kernels for weights along an axis"):
        case.op(x, weight=weight, **case.call)
    y = case.op(x, **case.call)  # without them there are
    np.testing.assert_allclose(y.numpy(), case.op(x.numpy(), **case.call), rtol=1e-5, atol=1e-6)


# ---- what calls have beside weights ----------------------------------------------------------------------------------


def like_the_host(machine: Machine, op: Any, x: Any, *args: Any, dy: Any = None, **keys: Any) -> None:
    """A call with arrays on the device gives what the NumPy backend gives for those on the host."""
    tolerance: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5} if x.dtype.itemsize > 2 else {"rtol": 2e-2, "atol": 2e-2}
    put = {name: machine.tensor(value) if isinstance(value, np.ndarray) else value for name, value in keys.items()}
    expected, back = nbnorm.vjp(op, x, *args, **keys, backend="numpy")
    found, pullback = nbnorm.vjp(op, machine.tensor(x), *args, **put)
    pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
    dys = [np.asarray(y) for _, y in pairs]  # the results themselves, as gradients
    there = tuple(map(machine.tensor, dys))
    wanted = back(dys[0] if len(dys) == 1 else tuple(dys))
    grads = pullback(there[0] if len(there) == 1 else there)
    pairs += [(mine, theirs) for mine, theirs in zip(grads, wanted, strict=True) if theirs is not None]
    for mine, theirs in pairs:
        assert (mine.at.shape, mine.at.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(mine.numpy().astype(float), theirs.astype(float), **tolerance)


def normal(*shape: int, dtype: str = "float32", seed: int = 3) -> Any:
    return np.random.default_rng(seed).normal(1, 2, shape).astype(dtype_of(dtype))


@pytest.mark.parametrize(("order", "activation"), [("norm_act", "gelu"), ("act_norm", "relu")])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_epilogues_and_masks(
    machine: Machine, case: Norm, order: str, activation: str, residual: bool, masked: bool
) -> None:
    x, weight, bias, _ = data(case, "float32")
    keys = case.call | {"weight": weight, "activation": activation, "order": order}
    keys |= {"bias": bias} if has_bias(case) else {}
    if residual:
        keys["residual"] = normal(*x.shape)
    if masked:
        keys["mask"] = np.random.default_rng(1).random(x.shape[:2] + (1,) * (x.ndim - 2)) < 0.7
    like_the_host(machine, case.op, x, **keys)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", [nbnorm.add_layer_norm, nbnorm.add_rms_norm])
def test_sums_are_normalized(machine: Machine, op: Any, dtype: str) -> None:
    x, residual, weight = normal(5, 24, dtype=dtype), normal(5, 24, dtype=dtype, seed=4), normal(24, dtype=dtype)
    like_the_host(machine, op, x, residual=residual, normalized_shape=24, weight=weight)


@pytest.mark.parametrize("op", [nbnorm.add_layer_norm, nbnorm.add_rms_norm])
def test_sums_over_outer_axes_are_normalized(machine: Machine, op: Any) -> None:
    like_the_host(machine, op, normal(5, 6, 8), residual=normal(5, 6, 8, seed=4), axis=(0, 1))


def test_weights_that_registers_do_not_hold_are_loaded_again(machine: Machine) -> None:
    x, residual, weight, bias = normal(3, 4104), normal(3, 4104, seed=4), normal(4104, seed=5), normal(4104, seed=6)
    like_the_host(machine, nbnorm.layer_norm, x, 4104, weight=weight, bias=bias, residual=residual, activation="silu")
    assert "row_backward_float32_vector_512x16" in names(machine)


def test_an_offset_is_added_to_the_weight(machine: Machine) -> None:
    for dtype in ("float32", "bfloat16"):
        x, weight = normal(5, 24, dtype=dtype), normal(24, dtype=dtype)
        like_the_host(machine, nbnorm.rms_norm, x, 24, weight=weight, weight_offset=1.0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("shape", [(6, 5), (4, 8, 3, 3)])
@pytest.mark.parametrize("op", [nbnorm.batch_norm, nbnorm.instance_norm])
def test_given_statistics_normalize(machine: Machine, op: Any, shape: tuple[int, ...], dtype: str) -> None:
    if op is nbnorm.instance_norm and len(shape) == 2:
        pytest.skip("no axis of space")
    x, weight, bias, mean = normal(*shape, dtype=dtype), *(normal(shape[1], dtype=dtype, seed=s) for s in (5, 6, 7))
    var = abs(normal(shape[1], dtype=dtype, seed=8))
    keys = {} if op is nbnorm.batch_norm else {"use_input_stats": False}
    like_the_host(machine, op, x, running_mean=mean, running_var=var, weight=weight, bias=bias, **keys)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("params", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
@pytest.mark.parametrize("op", [nbnorm.batch_norm, nbnorm.instance_norm])
def test_given_statistics_under_a_mask(machine: Machine, op: Any, params: tuple[str, ...], last: bool) -> None:
    """Nothing has counted what is valid."""
    x, mean, var = normal(3, 4, 6), normal(4, seed=7), abs(normal(4, seed=8))
    mask = np.random.default_rng(1).random((3, 1, 6)) < 0.6
    x[np.broadcast_to(~mask, x.shape)] = np.nan
    if last:
        x, mask = (np.ascontiguousarray(array.transpose(0, 2, 1)) for array in (x, mask))
    keys: dict[str, Any] = {} if op is nbnorm.batch_norm else {"use_input_stats": False}
    keys |= {name: normal(4, seed=seed) for seed, name in enumerate(params)} | {"channel_axis": -1 if last else 1}
    like_the_host(machine, op, x, running_mean=mean, running_var=var, mask=mask, **keys)
    _, pullback = nbnorm.vjp(op, x, mean, var, mask=mask, **keys, backend="cuda")
    assert np.isfinite(pullback(np.ones_like(x)).x).all()


@pytest.mark.parametrize(("dtype", "kept"), [("float32", "float32"), ("float64", "float64"), ("bfloat16", "float32"),
                                         ("bfloat16", "bfloat16"), ("float32", "float64")])  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("op", [nbnorm.batch_norm, nbnorm.instance_norm])
def test_running_statistics_move_on_the_device(machine: Machine, op: Any, masked: bool, dtype: str, kept: str) -> None:
    x, mean, var = normal(4, 8, 3, 3, dtype=dtype), normal(8, dtype=kept), abs(normal(8, dtype=kept))
    keys = {"training": True} if op is nbnorm.batch_norm else {}
    mask = np.random.default_rng(1).random((4, 1, 3, 3)) < 0.5 if masked else None
    x_there, mean_there, var_there, mask_there = map(machine.tensor, (x, mean, var, mask))
    y = op(x_there, mean_there, var_there, momentum=0.3, mask=mask_there, **keys)
    expected = op(x, mean, var, momentum=0.3, mask=mask, **keys, backend="numpy")  # moves mean and var
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if x.dtype.itemsize > 2 else {"rtol": 1e-2, "atol": 1e-2}
    for found, wanted in ((y, expected), (mean_there, mean), (var_there, var)):
        np.testing.assert_allclose(found.numpy().astype(float), wanted.astype(float), **tolerance)
    assert machine.launches[-1].variant.family == "commit"


def test_a_batch_that_is_not_finite_moves_nothing(machine: Machine) -> None:
    x = normal(4, 8)
    x[1, 2] = np.nan
    mean, var = machine.tensor(np.zeros(8, np.float32)), machine.tensor(np.ones(8, np.float32))
    nbnorm.batch_norm(machine.tensor(x), mean, var, training=True)
    assert not mean.numpy().any()
    assert (var.numpy() == 1).all()


def test_moments_come_to_the_host(machine: Machine) -> None:
    x = normal(4, 6, 5)
    mask = np.random.default_rng(1).random((4, 1, 5)) < 0.5
    calls: list[Any] = [
        lambda put: nbnorm.moments(put(x), axis=(0, 2)),
        lambda put: nbnorm.moments(put(x), axis=(0, 2), mask=put(mask)),
        lambda put: nbnorm.batch_norm(put(x), training=True, return_moments=True)[1],
        lambda put: nbnorm.group_norm(put(x), 3, return_moments=True)[1],
        lambda put: nbnorm.rms_norm(put(x), 5, return_moments=True)[1],
    ]
    for call in calls:
        found, expected = call(machine.tensor), call(np.asarray)
        np.testing.assert_array_equal(found.count, expected.count)
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-6)
        assert found.mean.dtype == np.float64


def test_the_mean_is_kept_to_more_than_float32(machine: Machine) -> None:
    x = (normal(8, 6) + 1e6).astype(np.float32)
    found = nbnorm.moments(machine.tensor(x), axis=0)
    np.testing.assert_allclose(found.mean, x.astype(float).mean(0), rtol=1e-12)


def test_a_pullback_keeps_the_statistics_of_its_call(machine: Machine) -> None:
    x, dy = normal(4, 8), normal(4, 8, seed=9)
    there, mean, var = (
        machine.tensor(x),
        machine.tensor(np.zeros(8, np.float32)),
        machine.tensor(np.ones(8, np.float32)),
    )
    _, pullback = nbnorm.vjp(nbnorm.batch_norm, there, mean, var)
    before = pullback(machine.tensor(dy)).x.numpy()
    nbnorm.batch_norm(there, mean, var, training=True)
    assert (pullback(machine.tensor(dy)).x.numpy() == before).all()


def test_results_go_to_out(machine: Machine) -> None:
    x, weight = normal(5, 24), normal(24)
    expected = nbnorm.layer_norm(x, 24, weight)
    out, there = machine.tensor(np.zeros_like(x)), machine.tensor(x)
    assert nbnorm.layer_norm(there, 24, machine.tensor(weight), out=out) is out
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-5)
    nbnorm.layer_norm(there, 24, machine.tensor(weight), out=there)
    np.testing.assert_allclose(there.numpy(), expected, rtol=1e-5, atol=1e-5)
    on_host = np.zeros_like(x)
    assert nbnorm.layer_norm(x, 24, weight, out=on_host, backend="cuda") is on_host
    np.testing.assert_allclose(on_host, expected, rtol=1e-5, atol=1e-5)
    strided = machine.tensor(np.zeros((24, 5), np.float32))
    strided.at = strided.at.transpose()
    nbnorm.layer_norm(machine.tensor(x), 24, machine.tensor(weight), out=strided)
    np.testing.assert_allclose(strided.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_empty_arrays(machine: Machine) -> None:
    x = machine.tensor(np.zeros((0, 8), np.float32))
    y, pullback = nbnorm.vjp(nbnorm.layer_norm, x, 8, machine.tensor(np.ones(8, np.float32)))
    grads = pullback(y)
    assert y.at.shape == grads.x.at.shape == (0, 8)
    assert not grads.weight.numpy().any()
    assert not machine.launches


def test_host_arrays_have_second_derivatives_and_batch_renorm(machine: Machine) -> None:
    x, dy, weight = normal(6, 8), normal(6, 8, seed=5), normal(8)
    for op, args in ((nbnorm.layer_norm, (8,)), (nbnorm.rms_norm, (8,))):
        both = []
        for backend in ("cuda", "numpy"):
            _, pullback = nbnorm.vjp(op, x, *args, weight=weight, backend=backend)
            _, again = pullback.vjp(dy)
            ddy, grads = again(nbnorm.Grads(normal(6, 8, seed=6), normal(8, seed=7)))
            both.append((ddy, grads.x, grads.weight))
        for found, expected in zip(*both, strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    renormed = []
    for backend in ("cuda", "numpy"):
        mean, var = np.zeros(8, np.float32), np.ones(8, np.float32)
        renormed.append((nbnorm.batch_renorm(x, mean, var, weight, training=True, backend=backend), mean, var))
    for found, expected in zip(*renormed, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    ghosts = [nbnorm.batch_norm(x, training=True, ghost_batch_size=4, backend=name) for name in ("cuda", "numpy")]
    np.testing.assert_allclose(*ghosts, rtol=1e-5, atol=1e-5)


# ---- calls that are made again ---------------------------------------------------------------------------------------


def statistics_of(machine: Machine, channels: int) -> dict[str, Any]:
    pair = np.linspace(-1, 1, channels, dtype="f4"), np.linspace(1, 2, channels, dtype="f4")
    return dict(zip(("running_mean", "running_var"), map(machine.tensor, pair), strict=True))


AGAIN: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "layer": (nbnorm.layer_norm, {"axis": -1, "eps": 1e-3, "activation": "silu"}, False),
    "rms": (nbnorm.rms_norm, {"axis": -1}, False),
    "group": (nbnorm.group_norm, {"num_groups": 2, "activation": "relu", "order": "act_norm"}, False),
    "instance": (nbnorm.instance_norm, {}, False),
    "batch": (nbnorm.batch_norm, {"training": True}, False),
    "batch, moving": (nbnorm.batch_norm, {"training": True, "momentum": 0.3}, True),
    "batch, given": (nbnorm.batch_norm, {"eps": 1e-2}, True),
    "instance, moving": (nbnorm.instance_norm, {"momentum": 0.3}, True),
}


def no_checks(*_: Any) -> Any:
    raise AssertionError("checked anew")


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", AGAIN)
def test_later_calls_are_not_checked_and_give_the_same_bits(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str, last: bool
) -> None:
    op, keys, tracked = AGAIN[name]
    lengths = (3, 4, 6, 8)

    def drawn(seed: int) -> Tensor:
        array = normal(*lengths, seed=seed)
        found = machine.tensor(
            np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if last else array
        )
        assert found is not None
        return found

    if last and op in (nbnorm.layer_norm, nbnorm.rms_norm):
        keys = {**keys, "axis": 1}
    size = 4 if last or "axis" not in keys else 8

    def arguments(seed: int) -> dict[str, Any]:
        given = {"weight": machine.tensor(normal(size, seed=seed))}
        if op is not nbnorm.rms_norm:
            given["bias"] = machine.tensor(normal(size, seed=seed + 1))
        return given | (statistics_of(machine, 4) if tracked else {})

    op(drawn(4), **keys, **arguments(7))  # from here on the kind of these arrays is known
    x, first = drawn(1), arguments(2)
    expected = op(x, **keys, **first).numpy()
    moved = [first[each].numpy() for each in ("running_mean", "running_var") if tracked]
    made = machine.devices[0].memory.taken
    assert len(dispatch.registry.calls) == 1
    monkeypatch.setattr(engine, "compute", no_checks)
    again = arguments(2)
    y = op(x, **keys, **again)
    assert y.at.strides == x.at.strides
    assert y.numpy().tobytes() == expected.tobytes()
    assert machine.devices[0].memory.taken - made <= 2 + 3 + 2  # new parameters, y, and two blocks
    assert [again[each].numpy().tobytes() for each in ("running_mean", "running_var") if tracked] == [
        each.tobytes() for each in moved
    ]
    plan = nbnorm.plan(op, drawn(4), **keys, **arguments(2))
    assert plan(x).numpy().tobytes() == expected.tobytes()


def test_later_calls_with_out_are_checked_for_overlaps(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = machine.devices[0].memory
    whole = memory.upload(np.linspace(0.5, 2, 256, dtype="f4"))

    def at(begin: int, *shape: int) -> Tensor:
        return Tensor(DeviceArray.of(memory, whole.owner, whole.pointer + 4 * begin, shape, None, np.dtype("f4")))

    x, weight, out = at(0, 4, 8), at(40, 8), at(64, 4, 8)
    mean, var = at(48, 8), at(56, 8)
    keys: dict[str, Any] = {"running_mean": mean, "running_var": var, "weight": weight, "training": True}
    for _ in range(2):
        nbnorm.batch_norm(x, **keys, out=out)
    before = whole.host()
    for wrong, message in (
        ({"out": at(8, 4, 8)}, "overlaps x in part"),
        ({"out": at(12, 4, 8)}, "overlaps x in part"),
        ({"out": at(36, 4, 8)}, "out must not overlap weight"),
        ({"out": at(52, 4, 8)}, "out must not overlap running_mean"),
        ({"running_mean": at(20, 8)}, "running_mean must not overlap x"),
        ({"running_var": at(52, 8)}, "running_mean and running_var must not overlap"),
    ):
        with pytest.raises(ValueError, match=message):
            nbnorm.batch_norm(x, **keys | {"out": out} | wrong)
    assert whole.host().tobytes() == before.tobytes()
    monkeypatch.setattr(engine, "compute", no_checks)
    assert nbnorm.batch_norm(x, **keys, out=x) is x


def test_later_calls_see_alignment_streams_and_devices(machine: Machine) -> None:
    memory = machine.devices[0].memory
    x, weight = normal(5, 64), normal(64)
    expected = nbnorm.layer_norm(machine.tensor(x), 64, machine.tensor(weight)).numpy()
    memory.shift, memory.current = 4, 0x7F00
    off = nbnorm.layer_norm(machine.tensor(x), 64, machine.tensor(weight))
    memory.shift = 0
    nbnorm.layer_norm(machine.tensor(x), 64, machine.tensor(weight))
    assert [name.split("_")[-2] for name in names(machine)] == ["vector", "scalar", "vector"]
    assert [record.stream for record in machine.launches] == [7, 0x7F00, 0x7F00]
    np.testing.assert_allclose(off.numpy(), expected, rtol=1e-5, atol=1e-5)
    y = nbnorm.layer_norm(machine.tensor(x, 1), 64, machine.tensor(weight, 1))
    assert (y.at.device, len(machine.launches), len(machine.devices[1].launches)) == ("cuda:1", 3, 1)
    with pytest.raises(TypeError, match="weight must lie on cuda:1"):
        nbnorm.layer_norm(machine.tensor(x, 1), 64, machine.tensor(weight))


@pytest.mark.parametrize("off", ["x", "weight", "bias"])
def test_later_calls_see_the_alignment_of_each_array(machine: Machine, off: str) -> None:
    memory, given = machine.devices[0].memory, {"x": normal(5, 64), "weight": normal(64), "bias": normal(64, seed=4)}
    for moved in (None, None, off):
        there = {}
        for name, array in given.items():
            memory.shift = 4 if name == moved else 0
            there[name] = machine.tensor(array)
        memory.shift = 0
        y = nbnorm.layer_norm(there["x"], 64, there["weight"], there["bias"])
    assert [name.split("_")[-2] for name in names(machine)] == ["vector", "vector", "scalar"]
    np.testing.assert_allclose(y.numpy(), nbnorm.layer_norm(given["x"], 64, *list(given.values())[1:]), atol=1e-5)


THREADS = 4


def in_threads(call: Any) -> list[Any]:
    """What it gives to several threads that begin together, for their numbers."""
    together = threading.Barrier(THREADS)

    def begin(i: int) -> Any:
        together.wait()
        return call(i)

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(begin, range(THREADS)))


def test_threads_may_call_and_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first call on, which opens the device, to those that are remembered."""
    opened: list[int] = []
    machine = install(monkeypatch, Machine())

    def slowly(ordinal: int) -> SimulatedDevice:
        opened.append(ordinal)
        time.sleep(0.05)
        return machine.devices[ordinal]

    machine.backend._open = slowly
    weight, xs = normal(64), [normal(5, 64, seed=i) for i in range(THREADS)]
    expected = [nbnorm.layer_norm(x, 64, weight) for x in xs]
    there = [(machine.tensor(x), machine.tensor(weight)) for x in xs]

    def calls(i: int) -> list[Any]:
        x, w = there[i]
        return [nbnorm.layer_norm(x, 64, w).numpy() for _ in range(3)]

    for found, wanted in zip(in_threads(calls), expected, strict=True):
        for y in found:
            np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    assert opened == [0]
    assert len(dispatch.registry.calls) == 2  # the host's too
    plan = nbnorm.plan(nbnorm.layer_norm, there[0][0], 64, there[0][1])
    for y, wanted in zip(in_threads(lambda i: plan(there[i][0]).numpy()), expected, strict=True):
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    assert len(machine.launches) == 4 * THREADS


def test_a_kernel_is_compiled_once_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def slowly(variant: Any, capability: Any) -> cubins.Kernel:
        compiled.append(variant)
        time.sleep(0.05)
        return cubins.Kernel(b"", variant.name, ())

    monkeypatch.setattr(cubins, "_kernels", {})
    monkeypatch.setattr(cubins, "_read", lambda *_: None)
    monkeypatch.setattr(cubins, "_compiled", slowly)
    found = in_threads(lambda i: cubins.kernel_of(SUMS, (9, 0)))
    assert all(each is found[0] for each in found)
    assert compiled == [SUMS]


# ---- strides, alignment, streams, devices ----------------------------------------------------------------------------


def names(machine: Machine) -> list[str]:
    return [record.variant.name for record in machine.launches]


def test_arrays_with_gaps_are_copied_by_their_library(machine: Machine) -> None:
    x, weight = normal(5, 48), normal(24)
    lies = machine.tensor(x)
    there = DeviceArray.of(lies.at.memory, lies.at.owner, lies.at.pointer, (5, 24), (192, 8), x.dtype)
    call = nbnorm.layer_norm, Tensor(there), 24, machine.tensor(weight)
    assert "strides (192, 8) of shape (5, 24) leave gaps" in str(nbnorm.explain(*call))
    y = call[0](*call[1:])
    np.testing.assert_allclose(y.numpy(), nbnorm.layer_norm(x[:, ::2], 24, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "keys"), [(nbnorm.batch_norm, {"training": True}), (nbnorm.group_norm, {"num_groups": 2})]
)
def test_channels_that_lie_last_are_normalized_as_they_lie(machine: Machine, op: Any, keys: dict[str, Any]) -> None:
    x, dy = (normal(3, 4, 5, 8, seed=seed).transpose(0, 3, 1, 2) for seed in (1, 2))
    there = machine.tensor(x)
    assert there.at.strides == x.strides
    assert nbnorm.explain(op, there, **keys).copies == ()
    y, pullback = nbnorm.vjp(op, there, **keys)
    grads = pullback(machine.tensor(np.ascontiguousarray(dy)))  # which lies otherwise, and is copied
    expected, back = nbnorm.vjp(op, x, **keys)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads.x.numpy(), back(dy).x, rtol=1e-5, atol=1e-5)
    assert y.at.strides == grads.x.at.strides == x.strides
    assert all("columns" in name or "finish" in name for name in names(machine)), names(machine)


def test_arrays_off_sixteen_bytes_go_to_scalar_kernels(machine: Machine) -> None:
    for case in FEW:
        machine.devices[0].memory.shift = 4
        check(machine, case, "float32")
        assert not any("vector" in name for name in names(machine)), names(machine)
    machine.devices[0].memory.shift = 0
    check(machine, layer("layer", nbnorm.layer_norm, (5, 64), 1), "float32")
    assert "row_forward_float32_vector_8x16" in names(machine)


def test_a_stream_is_no_argument(machine: Machine) -> None:
    with pytest.raises(TypeError, match="stream"):
        nbnorm.layer_norm(machine.tensor(normal(4, 8)), 8, stream=7)  # type: ignore[call-arg]


def test_kernels_go_to_the_stream_that_is_current(machine: Machine) -> None:
    x, mean, var = (machine.tensor(array) for array in (normal(4, 8), np.zeros(8, np.float32), np.ones(8, np.float32)))
    machine.devices[0].memory.current = 0x7F00
    nbnorm.batch_norm(x, mean, var, training=True)
    assert {record.stream for record in machine.launches} == {0x7F00}
    assert len(machine.launches) == 3


def test_what_counts_blocks_is_zero_at_the_begin_and_at_the_end(machine: Machine) -> None:
    nbnorm.batch_norm(machine.tensor(normal(64, 8)), training=True)
    counters = machine.launches[0].args["counters"]
    assert counters is not None
    assert not counters.host().any()


def test_each_device_runs_its_own_arrays(machine: Machine) -> None:
    x = machine.tensor(normal(4, 8), 1)
    y = nbnorm.layer_norm(x, 8)
    assert y.at.device == "cuda:1"
    assert not machine.devices[0].launches
    assert len(machine.devices[1].launches) == 1


@pytest.mark.parametrize(
    ("name", "shape"), [("weight", (8,)), ("bias", (8,)), ("mask", (4, 8)), ("residual", (4, 8)), ("out", (4, 8)),
                    ("running_mean", (8,)), ("running_var", (8,))]
)  # fmt: skip
def test_arrays_elsewhere_are_refused_by_name(machine: Machine, name: str, shape: tuple[int, ...]) -> None:
    there = {key: machine.tensor(np.ones(8, np.float32)) for key in ("running_mean", "running_var")}
    array = np.ones(shape, bool if name == "mask" else np.float32)
    for ordinal, where in ((1, "cuda:1"), (None, "cpu")):
        other = array if ordinal is None else machine.tensor(array, ordinal)
        with pytest.raises(TypeError, match=f"{name} must lie on cuda:0, as x does; got an array on {where}"):
            nbnorm.batch_norm(machine.tensor(normal(4, 8)), **there | {name: other})
    host = {key: np.ones(8, np.float32) for key in there}
    with pytest.raises(TypeError, match=f"{name} must lie on cpu, as x does; got an array on cuda:0"):
        nbnorm.batch_norm(normal(4, 8), **host | {name: machine.tensor(array)})
    assert not machine.launches


def test_a_gradient_elsewhere_is_refused_by_name(machine: Machine) -> None:
    _, pullback = nbnorm.vjp(nbnorm.layer_norm, machine.tensor(normal(4, 8)), 8)
    with pytest.raises(TypeError, match="dy must lie on cuda:0, as x does; got an array on cpu"):
        pullback(normal(4, 8))


def test_host_arrays_go_to_a_device_by_the_call_alone(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(4, 8)
    with nbnorm.use_backend("cuda"):
        decision = nbnorm.explain(nbnorm.layer_norm, x, 8)
        nbnorm.layer_norm(x, 8)
    assert decision.chosen == "numba"
    assert "backend='cuda' on the call copies it" in str(decision)
    monkeypatch.setattr(dispatch, "_environment", ("cuda",))
    nbnorm.layer_norm(x, 8)
    assert not machine.launches
    assert nbnorm.explain(nbnorm.layer_norm, x, 8, backend="cuda").chosen == "cuda"


SIZES = [
    (nbnorm.layer_norm, (2**20, 4096), {"axis": 1}),
    (nbnorm.rms_norm, (3, 2**31 + 8), {"axis": 1}),
    (nbnorm.batch_norm, (2**26, 64), {"training": True}),
    (nbnorm.batch_norm, (64, 32, 2048, 2048), {"training": True}),
    (nbnorm.group_norm, (16, 64, 2048, 2048), {"num_groups": 8}),
    (nbnorm.instance_norm, (2**31 // 64 + 1, 2, 64), {}),
]


@pytest.mark.parametrize(("op", "shape", "keys"), SIZES, ids=lambda value: str(getattr(value, "__name__", "")))
def test_arrays_of_more_than_two_to_the_31(
    monkeypatch: pytest.MonkeyPatch, op: Any, shape: tuple[int, ...], keys: dict[str, Any]
) -> None:
    """Nothing is run, nor is memory taken: grids fit, and workspaces are small."""
    machine = install(monkeypatch, Machine(run=False, multiprocessors=132))
    memory = machine.devices[0].memory
    x = Tensor(memory.empty(shape, np.float16))
    assert x.at.size > 2**31
    y, pullback = nbnorm.vjp(op, x, **keys)
    pullback(y)
    assert len(machine.launches) >= 2
    own = [value for record in machine.launches for value in record.args.values() if isinstance(value, DeviceArray)]
    small = [array for array in own if array.size != x.at.size]
    statistics = max(x.at.size // 64, 1)
    assert all(array.size <= max(statistics, 132 * 8 * 4096 * 4) for array in small)


def test_a_larger_device_is_given_larger_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    for multiprocessors in (1, 132):
        machine = install(monkeypatch, Machine(run=False, multiprocessors=multiprocessors))
        nbnorm.layer_norm(Tensor(machine.devices[0].memory.empty((2**16, 1024), np.float32)), 1024)
        grids.append(machine.launches[0].grid)
    assert grids[1] == 132 * grids[0]


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_too_little_memory(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    x, mean, var = (machine.tensor(array) for array in (normal(4, 8), np.zeros(8, np.float32), np.ones(8, np.float32)))

    def empty(*_: Any, **__: Any) -> Any:
        raise MemoryError("out of memory: tried to allocate 16.00 GiB")

    monkeypatch.setattr(TensorMemory, "block", allocates(empty))
    message = "cuda:0 gave no memory: out of memory: tried to allocate 16.00 GiB. Free memory there, or pass fewer"
    with pytest.raises(nbnorm.BackendError, match=message):
        nbnorm.batch_norm(x, mean, var, training=True)
    with pytest.raises(nbnorm.BackendError, match=message):
        nbnorm.layer_norm(normal(4, 8), 8, backend="cuda")
    assert not machine.launches
    assert not mean.numpy().any()


@pytest.mark.parametrize("failing", ["columns_statistics", "columns_apply", "commit"])
def test_a_launch_that_fails_writes_no_statistics(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    x, mean, var = (machine.tensor(array) for array in (normal(4, 8), np.zeros(8, np.float32), np.ones(8, np.float32)))
    start = machine.devices[0]._start

    def failing_start(launch: Any, *args: Any) -> None:
        if launch.variant.family == failing:
            raise nbnorm.BackendError("no")
        start(launch, *args)

    monkeypatch.setattr(machine.devices[0], "_start", failing_start)
    with pytest.raises(nbnorm.BackendError, match="no"):
        nbnorm.batch_norm(x, mean, var, training=True)
    assert not mean.numpy().any()
    assert (var.numpy() == 1).all()


@pytest.mark.parametrize("failing", ["bind", "convert"])
def test_what_moves_statistics_fails_before_anything_is_written(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    x, out = machine.tensor(normal(4, 8)), machine.tensor(np.zeros((4, 8), np.float32))
    mean, var = (machine.tensor(np.zeros(8, np.float64 if failing == "convert" else np.float32)) for _ in range(2))

    def no(*_: Any) -> Any:
        raise nbnorm.BackendError("no")

    if failing == "convert":
        monkeypatch.setattr(TensorMemory, "converted", no)
    else:
        bind = machine.devices[0].bind
        monkeypatch.setattr(
            machine.devices[0], "bind", lambda each: no() if each[0].variant.family == "commit" else bind(each)
        )
    with pytest.raises(nbnorm.BackendError, match="no"):
        nbnorm.batch_norm(x, mean, var, training=True, out=out)
    assert not machine.launches
    assert not out.numpy().any()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: nbnorm.normalize(x),
        lambda x: nbnorm.local_response_norm(x, 3),
        lambda x: nbnorm.batch_norm(x, training=True, ghost_batch_size=2),
        lambda x: nbnorm.vjp(nbnorm.layer_norm, x, 8)[1].vjp(x),
        lambda x: np.add(x.at, 1),
        lambda x: np.concatenate([x.at, x.at]),
        lambda x: np.asarray(x.at),
        lambda x: bool(x.at),
    ],
)
def test_what_the_host_computes_is_refused(machine: Machine, call: Any) -> None:
    with pytest.raises((TypeError, nbnorm.BackendError), match="cuda"):
        call(machine.tensor(normal(4, 8)))
    assert len(machine.launches) <= 2  # the gradient's own, before its derivative is refused


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "problem", lambda: "no NVIDIA driver")
    monkeypatch.setattr(dispatch.registry, "_decided", {})
    monkeypatch.setitem(dispatch.registry._loaded, "cuda", cuda_backend.CudaBackend())
    decision = nbnorm.explain(nbnorm.layer_norm, normal(4, 8), 8, backend="cuda")
    assert (decision.chosen, decision.rejected) == (None, (("cuda", "no NVIDIA driver"),))
    with pytest.raises(nbnorm.BackendError, match="not cuda: no NVIDIA driver"):
        nbnorm.layer_norm(normal(4, 8), 8, backend="cuda")


def versioned(version: Any) -> Any:
    """The driver's bindings, where it is of this version."""

    def driver_version() -> Any:
        if isinstance(version, Exception):
            raise version
        return 0, version

    return SimpleNamespace(cuDriverGetVersion=driver_version)


@pytest.mark.parametrize(
    ("missing", "version", "message"),
    [
        (["numba_cuda", "cuda.core"], 13000, 'numba-cuda and cuda-core not installed: pip install "nbnorm[cuda]"'),
        (["cuda.core"], 13000, 'cuda-core not installed: pip install "nbnorm[cuda]"'),
        ([], RuntimeError("libcuda.so.1: not found"), "no NVIDIA driver was found: install the NVIDIA driver 580"),
        ([], 12040, "the driver is for CUDA 12.4, too old by 13.0: install the NVIDIA driver 580 or later"),
        ([], 13000, None),
    ],
)
def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, missing: list[str], version: Any, message: str | None
) -> None:
    monkeypatch.setattr(device, "_is_there", lambda module: module not in missing)
    monkeypatch.setattr(device, "import_module", lambda name: versioned(version))
    monkeypatch.setattr(device, "_release", lambda package: None)
    found = device.problem.__wrapped__()
    assert found is None if message is None else str(found).startswith(message)


@pytest.mark.parametrize(
    ("compiler", "linker", "refused"),
    [
        ("13.5.40", "13.0.88", True),
        ("13.0.88", "13.0.39", False),
        ("13.0.88", "13.5.40", False),
        (None, "13.0.88", False),
    ],
)
def test_a_compiler_newer_than_the_linker_is_said(
    monkeypatch: pytest.MonkeyPatch, compiler: str | None, linker: str, refused: bool
) -> None:
    def version(package: str) -> str:
        found = {"nvidia-nvvm": compiler, "nvidia-nvjitlink": linker}[package]
        if found is None:
            raise device.PackageNotFoundError
        return found

    monkeypatch.setattr(device, "_is_there", lambda module: True)
    monkeypatch.setattr(device, "import_module", lambda name: versioned(13000))
    monkeypatch.setattr(device, "version", version)
    message = (
        "nvidia-nvvm 13.5 is newer than nvidia-nvjitlink 13.0, which refuses what it makes: "
        'pip install "cuda-toolkit==13.0.*"'
    )
    assert device.problem.__wrapped__() == (message if refused else None)


def test_a_forked_child_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    nbnorm.layer_norm(normal(4, 8), 8, backend="cuda")
    monkeypatch.setattr(machine.backend, "_process", machine.backend._process + 1)
    dispatch.registry._forget()  # as a child does
    with pytest.raises(nbnorm.BackendError, match="CUDA does not survive a fork"):
        nbnorm.layer_norm(normal(4, 8), 8, backend="cuda")


def test_a_plan_is_refused_in_a_forked_child(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    x = machine.tensor(normal(4, 8))
    plan = nbnorm.plan(nbnorm.layer_norm, x, 8)
    plan(x)
    started = len(machine.launches)
    monkeypatch.setattr(again.os, "getpid", lambda: 0)
    with pytest.raises(nbnorm.BackendError, match="CUDA does not survive a fork"):
        plan(x)
    assert len(machine.launches) == started


def test_more_blocks_than_cuda_starts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = install(monkeypatch, Machine(run=False, multiprocessors=132))
    x = Tensor(machine.devices[0].memory.empty((2**31, 1, 3), np.float16))
    y, pullback = nbnorm.vjp(nbnorm.instance_norm, x, weight=Tensor(machine.devices[0].memory.empty((1,), np.float16)))
    started = len(machine.launches)
    with pytest.raises(
        nbnorm.BackendError,
        match=r"x, seen as \d.* takes \d+ blocks of the kernel .*, and CUDA starts 2147483647 at most",
    ):
        pullback(y)
    assert len(machine.launches) == started


# ---- torch -----------------------------------------------------------------------------------------------------------


def lent(address: int, size: int) -> int:
    """The address of host memory that stands for a device's."""
    LENT.pop(address, None)
    LENT[address] = size
    return address


class HostTorch(arrays.TorchMemory):
    """torch's memory, where its tensors on the host stand for those on a GPU."""

    def __init__(self) -> None:
        super().__init__(0)
        self.place = "cpu"

    def stream(self) -> int:
        return 0

    def used(self, arrays: Any) -> None:
        self.recorded = [array.owner.data_ptr() for array in arrays]

    def address(self, array: Any) -> int:
        return lent(array.data_ptr(), array.untyped_storage().nbytes() - array.storage_offset() * array.element_size())


class HostTensors(arrays.TorchTensors):
    """Sees them so. The simulator works on the memory that torch allocated."""

    memory = HostTorch()

    def view(self, array: Any, name: str) -> Any:
        super().view(array, name)  # for its checks
        return self.memory.view(array.detach(), name)

    def key(self, array: Any) -> Any:
        return super().key(OnDevice(array))


class OnDevice:
    """A tensor that says it were on a device."""

    is_cuda = True

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    install(monkeypatch, Machine(), HostTensors())
    return torch


def drawn(torch: Any, *shape: int, dtype: str, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))


def test_a_tensor_of_no_axes_is_a_number(torch: Any) -> None:
    """Of another value it makes another call, though nothing else of it differs."""
    x = drawn(torch, 3, 8, 4, dtype="float32")
    expected = {groups: nbnorm.group_norm(x, groups) for groups in (2, 4)}
    for groups, wanted in expected.items():
        assert torch.equal(nbnorm.group_norm(x, torch.tensor(groups)), wanted)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_tensors_of_torch(torch: Any, dtype: str) -> None:
    x, dy = (drawn(torch, 3, 4, 5, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    x, dy = (tensor.permute(0, 3, 1, 2) for tensor in (x, dy))  # channels last
    weight, bias = (drawn(torch, 8, dtype=dtype, seed=seed) for seed in (3, 4))
    mean, var = torch.zeros(8, dtype=torch.float32), torch.ones(8, dtype=torch.float32)
    y, pullback = nbnorm.vjp(nbnorm.batch_norm, x, mean, var, weight, bias, training=True)
    grads = pullback(dy)
    leaves = [tensor.double().clone().requires_grad_() for tensor in (x, weight, bias)]
    their_mean, their_var = torch.zeros(8).double(), torch.ones(8).double()
    expected = torch.nn.functional.batch_norm(leaves[0], their_mean, their_var, *leaves[1:], training=True)
    expected.backward(dy.double())
    tolerance = {"float32": 2e-6, "float64": 1e-12, "float16": 4e-3, "bfloat16": 4e-2}[dtype]
    for found, wanted in ((y, expected), (grads.x, leaves[0].grad), (grads.weight, leaves[1].grad),
                          (grads.bias, leaves[2].grad)):  # fmt: skip
        assert type(found) is torch.Tensor
        assert found.dtype is x.dtype
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=tolerance, atol=tolerance)
    assert y.stride() == grads.x.stride() == x.stride()
    torch.testing.assert_close(mean.double(), their_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), their_var, rtol=1e-6, atol=1e-6)


def test_tensors_with_gaps_and_off_sixteen_bytes(torch: Any) -> None:
    x = drawn(torch, 5, 49, dtype="float32")
    expected = torch.nn.functional.layer_norm(x[:, 1:], (48,))
    torch.testing.assert_close(nbnorm.layer_norm(x[:, 1:], 48), expected, rtol=1e-5, atol=1e-5)
    flat = x.reshape(-1)[1:241].reshape(5, 48)
    torch.testing.assert_close(nbnorm.layer_norm(flat, 48), torch.nn.functional.layer_norm(flat, (48,)))


def test_masks_and_sums_of_torch(torch: Any) -> None:
    x, residual, weight = (drawn(torch, *shape, dtype="bfloat16") for shape in ((5, 24), (5, 24), (24,)))
    mask = torch.tensor([True, False, True, True, False])[:, None]
    y = nbnorm.layer_norm(x, 24, weight, mask=mask)
    assert not y[~mask[:, 0]].any()
    y, total = nbnorm.add_rms_norm(x, residual, 24, weight.float())
    torch.testing.assert_close(total, x + residual)
    wanted = torch.nn.functional.rms_norm(total.float(), (24,), weight.float())
    torch.testing.assert_close(y.float(), wanted, rtol=1e-2, atol=1e-2)
    offset = nbnorm.rms_norm(x, 24, weight, weight_offset=1.0)
    wanted = torch.nn.functional.rms_norm(x.float(), (24,), 1 + weight.float())
    torch.testing.assert_close(offset.float(), wanted, rtol=1e-2, atol=1e-2)


def test_torch_is_told_what_a_pullback_reads(torch: Any) -> None:
    x, dy, weight = (drawn(torch, *shape, dtype="float32") for shape in ((5, 24), (5, 24), (24,)))
    _, pullback = nbnorm.vjp(nbnorm.layer_norm, x, 24, weight)
    HostTensors.memory.recorded = []
    pullback(dy)
    recorded = HostTensors.memory.recorded
    assert {x.data_ptr(), weight.data_ptr(), dy.data_ptr()} < set(recorded)
    assert len(set(recorded)) == 3 + 3  # and the mean, in two parts, and rstd


def test_torch_notices_what_was_written(torch: Any) -> None:
    x, out = drawn(torch, 5, 24, dtype="float32"), torch.zeros(5, 24)
    mean, var = torch.zeros(24), torch.ones(24)
    nbnorm.batch_norm(x, mean, var, training=True, out=out)
    assert [tensor._version for tensor in (out, mean, var)] == [1, 1, 1]


def test_tensors_that_require_grad_are_refused(torch: Any) -> None:
    x = torch.zeros(5, 24, requires_grad=True)
    for _ in range(2):
        with pytest.raises(TypeError, match="x requires grad"):
            nbnorm.layer_norm(x, 24)
        with torch.no_grad():
            nbnorm.layer_norm(x, 24)
    assert len(dispatch.registry.calls) == 1


def test_later_calls_of_torch(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, other = (drawn(torch, 3, 4, 5, 8, dtype="float32", seed=seed).permute(0, 3, 1, 2) for seed in (1, 2))
    weight = torch.nn.Parameter(torch.linspace(0.5, 2, 8), requires_grad=False)
    mean, var = torch.zeros(8), torch.ones(8)
    for _ in range(2):
        expected = nbnorm.batch_norm(other, mean.clone(), var.clone(), weight, training=True)
    plan = nbnorm.plan(nbnorm.batch_norm, x, mean, var, weight, training=True)
    monkeypatch.setattr(engine, "compute", no_checks)
    out = torch.empty_like(x)
    for y in (nbnorm.batch_norm(other, mean, var, weight, training=True), plan(other), plan(other, out=out)):
        assert type(y) is torch.Tensor
        assert y.stride() == x.stride()
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert [tensor._version for tensor in (out, mean, var, weight)] == [1, 3, 3, 0]
    with pytest.raises(TypeError, match="x must"):
        plan(other.numpy())


def test_what_torch_calls_a_device(torch: Any) -> None:
    """Tensors without memory are all that torch has of a GPU here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        memory = arrays.torch_memory(1)
        tensor = torch.empty(3, 4, device="cuda:1")
        assert (memory.device, memory.ordinal) == (str(tensor.device), tensor.device.index)
        assert torch.empty(2, device=memory.place).device == tensor.device
        with pytest.raises(TypeError, match="x must be a plain tensor"):
            arrays.TorchTensors().view(tensor, "x")


# ---- CuPy ------------------------------------------------------------------------------------------------------------


class HostCupy(arrays.CupyMemory):
    """CuPy's memory, where its arrays are made on the host's."""

    def stream(self) -> int:
        return 0

    def address(self, array: Any) -> int:
        return lent(array.data.ptr, array.nbytes)

    def empty(self, shape: tuple[int, ...], dtype: Any, *, zero: bool = False) -> DeviceArray:
        return self.view(self.made(np.zeros(shape, dtype)))

    def made(self, array: Any) -> Any:
        import cupy

        lies = cupy.cuda.UnownedMemory(array.ctypes.data, array.nbytes, array, device_id=0)
        return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(lies, 0), array.strides)


def read(array: Any) -> Any:
    """What lies there."""
    raw = (ctypes.c_char * array.nbytes).from_address(array.data.ptr)
    return np.ndarray(array.shape, array.dtype, raw, 0, array.strides)


def test_calls_of_unaligned_arrays_of_cupy_are_not_remembered() -> None:
    """A kernel cannot read them: they are copied each time."""
    pytest.importorskip("cupy", reason="cupy is not installed (it comes with the test-all extra)")
    array = HostCupy(0).made(np.zeros(100, np.uint8))
    key = arrays.CupyArrays().key
    assert key(array[1:97].view("f4")) is None
    assert key(array[4:100].view("f4")) == ((24,), (4,), np.float32, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_arrays_of_cupy(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    cupy = pytest.importorskip("cupy", reason="cupy is not installed (it comes with the test-all extra)")
    memory = HostCupy(0)
    monkeypatch.setattr(arrays, "cupy_memory", lambda ordinal: memory)
    install(monkeypatch, Machine(), arrays.CupyArrays())
    x, dy = (normal(3, 5, 4, 8, dtype=dtype, seed=seed).transpose(0, 3, 1, 2) for seed in (1, 2))
    weight, bias = (normal(8, dtype="float32" if dtype == "float16" else dtype, seed=seed) for seed in (3, 4))
    y, pullback = nbnorm.vjp(nbnorm.group_norm, memory.made(x), 2, memory.made(weight), memory.made(bias))
    grads = pullback(memory.made(dy))
    expected, back = nbnorm.vjp(nbnorm.group_norm, x, 2, weight, bias)
    tolerance = 1e-2 if dtype == "float16" else 2e-5
    for found, wanted in ((y, expected), *zip(grads[:3], back(dy)[:3], strict=True)):
        assert type(found) is cupy.ndarray
        assert (found.dtype, found.strides) == (wanted.dtype, wanted.strides)
        np.testing.assert_allclose(read(found).astype(float), wanted.astype(float), rtol=tolerance, atol=tolerance)


# ---- the real device, on a driver that only notes what it is asked ---------------------------------------------------


class Driver:
    """The functions of `cuda.bindings.driver` that are used, and of `cuda.core`: the contexts that are current, and
    what was started in which. That the real packages have them by these names is seen in test_cuda_compile.py."""

    def __init__(self) -> None:
        self.contexts: list[int] = [99]
        self.launched: list[Any] = []
        self.error: Any = 0
        self.failing: Exception | None = None
        self.LEGACY_DEFAULT_STREAM = "legacy"
        self.Stream = SimpleNamespace(from_handle=lambda handle: f"stream {handle}")
        self.ObjectCode = SimpleNamespace(
            from_cubin=lambda cubin, name: SimpleNamespace(get_kernel=lambda e: (name, e))
        )
        self.LaunchConfig = lambda grid, block: (grid, block)

    def module(self, name: str) -> Driver:
        assert name in ("cuda.bindings.driver", "cuda.core")
        return self

    def cuInit(self, flags: int) -> Any:
        return (self.error,)

    def cuDeviceGet(self, ordinal: int) -> Any:
        return self.error, ordinal

    def cuDevicePrimaryCtxRetain(self, handle: int) -> Any:
        return 0, 1000 + handle

    def cuCtxPushCurrent(self, context: int) -> Any:
        self.contexts.append(context)
        return (0,)

    def cuCtxPopCurrent(self) -> Any:
        return 0, self.contexts.pop()

    def cuCtxGetCurrent(self) -> Any:
        return 0, self.contexts[-1]

    def Device(self, ordinal: int) -> Any:
        def set_current() -> None:
            self.contexts[-1] = 1000 + ordinal

        properties = SimpleNamespace(multiprocessor_count=132)
        return SimpleNamespace(
            name="NVIDIA H100",
            compute_capability=(9, 0),
            properties=properties,
            set_current=set_current,
            create_stream=lambda: SimpleNamespace(handle=5),
        )

    def launch(self, stream: Any, config: Any, kernel: Any, *values: Any) -> None:
        if self.failing is not None:
            raise self.failing
        self.launched.append((self.contexts[-1], stream, config, kernel, values))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(device, "import_module", found.module)
    monkeypatch.setattr(device, "_config", device._config.__wrapped__)
    kernel = cubins.Kernel(b"", "entry", ("part_weight", "part_bias", "dweight", "dbias", "parts", "length"))
    monkeypatch.setattr(cubins, "kernel_of", lambda variant, capability: kernel)
    return found


SUMS = launch.Variant("sum_columns", "float32", vector=False)
COMMIT = launch.Variant("commit", "float32", vector=False)
ADDRESSES = {"part_weight": 1 << 60, "part_bias": 2 << 60, "dweight": 3 << 60}


def launch_sums(opened: Any, stream: int = 0) -> None:
    args = {name: name for name in ADDRESSES} | {"dbias": None, "parts": 2**33, "length": 8}
    opened.bind((plans.Launch(SUMS, 3, 256, args),))(stream, ADDRESSES)


def test_launches_run_in_the_context_of_their_device(driver: Driver) -> None:
    opened = device.CudaDevice(1)
    assert driver.contexts == [99]
    assert (opened.name, opened.capability, opened.multiprocessors) == ("NVIDIA H100 (cuda:1)", 90, 132)
    launch_sums(opened)
    driver.contexts[-1] = 1001  # its own: nothing is pushed
    launch_sums(opened, stream=0x7F00)
    assert driver.contexts == [1001]
    (first, second), kernel = driver.launched, (SUMS.name, "entry")
    assert first[:4] == (1001, "legacy", (3, 256), kernel)
    assert second[:4] == (1001, f"stream {0x7F00}", (3, 256), kernel)
    assert first[4] == (*ADDRESSES.values(), 0, 2**33, 8)


def test_no_visible_gpu_is_said_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class CUDAError(Exception):  # cuda.core's is no RuntimeError
        pass

    def get_all_devices() -> Any:
        raise CUDAError("CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected")

    core = SimpleNamespace(Device=SimpleNamespace(get_all_devices=get_all_devices))
    monkeypatch.setattr(device, "import_module", lambda name: core)
    assert device.names().startswith("CUDA_ERROR_NO_DEVICE")


def test_errors_name_the_device(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = device.CudaDevice(1)
    driver.failing = RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")
    message = (
        r"NVIDIA H100 \(cuda:1\): the kernel sum_columns_float32_scalar could not be started: CUDA_ERROR_LAUNCH_OUT_O"
    )
    with pytest.raises(nbnorm.BackendError, match=message):
        launch_sums(opened)
    assert driver.contexts == [99]

    class Error(int):
        name = "CUDA_ERROR_NO_DEVICE"

    def failing(*_: Any) -> Any:
        raise RuntimeError("Unsupported .version 9.5; current version is '9.0'")

    monkeypatch.setattr(cubins, "kernel_of", failing)
    message = r"NVIDIA H100 \(cuda:1\): the kernel commit_float32_scalar could not be compiled or loaded: Unsupported"
    with pytest.raises(nbnorm.BackendError, match=message):
        opened.bind((plans.Launch(launch.Variant("commit", "float32", vector=False), 1, 256, {}),))

    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")

    monkeypatch.setattr(cubins, "kernel_of", out_of_memory)
    with pytest.raises(
        nbnorm.BackendError, match="OUT_OF_MEMORY: out of memory: free memory there, or pass fewer"
    ) as e:
        opened.bind((plans.Launch(launch.Variant("commit", "float32", vector=False), 1, 256, {}),))
    assert "pip install" not in str(e.value)

    driver.error = Error(100)
    with pytest.raises(
        nbnorm.BackendError, match="cuda:2: CUDA_ERROR_NO_DEVICE: no GPU is visible; look at nvidia-smi"
    ):
        device.CudaDevice(2)


def test_a_context_that_cannot_be_asked_for_is_an_error(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    class Error(int):
        name = "CUDA_ERROR_NOT_INITIALIZED"

    opened = device.CudaDevice(1)
    monkeypatch.setattr(Driver, "cuCtxGetCurrent", lambda self: (Error(3), None))
    with pytest.raises(nbnorm.BackendError, match="CUDA_ERROR_NOT_INITIALIZED: CUDA does not survive a fork"):
        launch_sums(opened)


def test_a_device_that_cannot_be_opened_is_an_error(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    class CUDAError(Exception):  # cuda.core's is no RuntimeError
        pass

    def create_stream() -> Any:
        raise CUDAError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")

    opened = SimpleNamespace(**vars(driver.Device(0)) | {"create_stream": create_stream})
    monkeypatch.setattr(driver, "Device", lambda ordinal: opened)
    message = r"NVIDIA H100 \(cuda:0\) could not be opened: CUDA_ERROR_OUT_OF_MEMORY: out of memory; look at nvidia-smi"
    with pytest.raises(nbnorm.BackendError, match=message):
        device.CudaDevice(0)
    assert driver.contexts == [99]


def test_what_was_written_is_said(driver: Driver) -> None:
    opened = device.CudaDevice(0)
    args = {name: name for name in ADDRESSES} | {"dbias": None, "parts": 8, "length": 8}
    first = plans.Launch(SUMS, 3, 256, args)
    launches = []

    def launch(*values: Any) -> None:
        launches.append(values)
        if len(launches) == 2:
            raise RuntimeError("no")

    driver.launch = launch  # type: ignore[method-assign]
    with pytest.raises(nbnorm.BackendError, match="The results, and `out`, are not to be used"):
        opened.bind((first, first))(0, ADDRESSES)
    launches[:] = [()]
    with pytest.raises(nbnorm.BackendError, match="Nothing was written"):
        opened.bind((first,))(0, ADDRESSES)
    launches[:] = [()]
    commit = plans.Launch(COMMIT, 3, 256, args)
    with pytest.raises(nbnorm.BackendError, match="running statistics are as they were"):
        opened.bind((commit,))(0, ADDRESSES)


def test_what_is_copied_to_a_device_lives_until_that_is_done(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = SimpleNamespace(handle=4096)
    opened = SimpleNamespace(**vars(driver.Device(0)) | {"allocate": lambda size, stream: buffer})
    monkeypatch.setattr(driver, "Device", lambda ordinal: opened)
    monkeypatch.setattr(driver, "cuMemcpyHtoDAsync", lambda *_: (0,), raising=False)
    memory = device.CudaDevice(0).memory
    array = np.ones(8, np.float32)
    alive = weakref.ref(array)
    target = memory.upload(array)
    del array
    assert alive() is not None
    del target
    assert alive() is None


def test_an_old_device_is_refused(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(**vars(driver.Device(0)) | {"name": "Tesla V100", "compute_capability": (7, 0)})
    monkeypatch.setattr(driver, "Device", lambda ordinal: old)
    with pytest.raises(
        nbnorm.BackendError, match=r"Tesla V100 \(cuda:0\) has compute capability 7.0; its kernels need 8.0"
    ):
        device.CudaDevice(0)
