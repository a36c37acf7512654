"""Array kinds: the same kind, dtype and memory format back; no copy on the way in; what cannot be seen is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

import nbnorm
from nbnorm import arrays


def address(view: np.ndarray[Any, Any]) -> int:
    return view.__array_interface__["data"][0]


def expected_norm(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = x.astype(np.float64)
    mean, var = wide.mean(axis=(0, 2, 3), keepdims=True), wide.var(axis=(0, 2, 3), keepdims=True)
    return (wide - mean) / np.sqrt(var + 1e-5)


@pytest.fixture
def x() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(4, 3, 5, 6)).astype("f4")


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_torch(torch: Any, x: Any, dtype: str, memory_format: str, backend: str) -> None:
    tensor = torch.from_numpy(x).to(getattr(torch, dtype)).contiguous(memory_format=getattr(torch, memory_format))
    weight, bias = torch.ones(3, dtype=tensor.dtype), torch.zeros(3, dtype=tensor.dtype)
    mean, var = torch.zeros(3), torch.ones(3)
    y, pullback = nbnorm.vjp(nbnorm.batch_norm, tensor, mean, var, weight, bias, True, backend=backend)
    grads = pullback(torch.ones_like(tensor))
    for result in (y, grads.x):
        assert type(result) is torch.Tensor
        assert result.dtype == tensor.dtype
        assert result.stride() == tensor.stride()
    assert grads.weight.dtype == weight.dtype
    bound = {"float64": 1e-12, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(y.double().numpy(), expected_norm(tensor.double().numpy()), atol=bound)
    np.testing.assert_allclose(mean.numpy(), 0.1 * tensor.double().mean(dim=(0, 2, 3)).numpy(), rtol=1e-5, atol=1e-7)


def test_torch_agrees_with_torch(torch: Any, x: Any, backend: str) -> None:
    """Forward, gradients and running statistics of the real thing."""
    tensor = torch.from_numpy(x).double()
    weight, bias, dy = torch.randn(3).double(), torch.randn(3).double(), torch.randn(x.shape).double()
    ours, theirs = (torch.zeros(3).double(), torch.ones(3).double()), (torch.zeros(3).double(), torch.ones(3).double())
    y, pullback = nbnorm.vjp(nbnorm.batch_norm, tensor, *ours, weight, bias, True, 0.3, backend=backend)
    grads = pullback(dy)
    leaves = [t.clone().requires_grad_() for t in (tensor, weight, bias)]
    reference = torch.nn.functional.batch_norm(leaves[0], *theirs, *leaves[1:], True, 0.3)
    reference.backward(dy)
    for found, expected in zip(
        (y, *grads[:3], *ours), (reference.detach(), *(leaf.grad for leaf in leaves), *theirs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_torch_is_not_copied_in(torch: Any, x: Any, dtype: str, memory_format: str) -> None:
    tensor = torch.from_numpy(x).to(getattr(torch, dtype)).contiguous(memory_format=getattr(torch, memory_format))
    adapter, view, _ = arrays.float_view(tensor, "x")
    assert address(view) == tensor.data_ptr()
    assert nbnorm.explain(nbnorm.batch_norm, tensor, training=True).copies == ()
    assert adapter.wrap(view, tensor).data_ptr() == tensor.data_ptr()


def test_torch_backend_sees_the_tensors_memory(torch: Any) -> None:
    """The view that reaches a backend lies at the tensor's own address, in both memory formats."""
    from nbnorm_backends.numpy_ref import NumpyBackend

    seen = []

    class Spy(NumpyBackend):
        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(address(x))
            return super().forward(x, *args, **kwargs)

    tensor = torch.randn(2, 3, 4, 5)
    for array in (tensor, tensor.contiguous(memory_format=torch.channels_last), tensor.to(torch.bfloat16)):
        nbnorm.batch_norm(array, training=True, backend=Spy())
        assert seen.pop() == array.data_ptr()


def test_torch_grad_is_never_dropped_in_silence(torch: Any, x: Any) -> None:
    tensor = torch.from_numpy(x).requires_grad_()
    with pytest.raises(TypeError, match=r"x requires grad.*nbnorm\.vjp"):
        nbnorm.batch_norm(tensor, training=True)
    with pytest.raises(TypeError, match="weight requires grad"):
        nbnorm.layer_norm(tensor.detach(), 6, torch.nn.Parameter(torch.ones(6)))
    with torch.no_grad():
        assert not nbnorm.batch_norm(tensor, training=True).requires_grad
        nbnorm.layer_norm(tensor, 6, torch.nn.Parameter(torch.ones(6)))


def test_torch_elsewhere_is_refused(torch: Any) -> None:
    with pytest.raises(TypeError, match="x must lie in host memory or on a CUDA device; got a torch tensor on meta"):
        nbnorm.layer_norm(torch.empty(2, 3, device="meta"), 3)
    with pytest.raises(TypeError, match="x must be a dense tensor"):
        nbnorm.layer_norm(torch.eye(3).to_sparse(), 3)
    with pytest.raises(TypeError, match="x must hold its own values; got a lazily negated tensor"):
        nbnorm.layer_norm(torch.randn(4, 3, dtype=torch.complex64).conj().imag, 3)
    with pytest.raises(TypeError, match=r"x must be of dtype.*int64"):
        nbnorm.layer_norm(torch.ones(2, 3, dtype=torch.int64), 3)


def test_torch_out_and_mixed_kinds(torch: Any, x: Any, backend: str) -> None:
    tensor, weight = torch.from_numpy(x), np.full(3, 2, "f4")
    out = torch.empty_like(tensor)
    assert nbnorm.batch_norm(tensor, weight=weight, training=True, out=out, backend=backend) is out
    np.testing.assert_allclose(out.numpy(), 2 * expected_norm(x), atol=2e-6)
    _, pullback = nbnorm.vjp(nbnorm.batch_norm, tensor, weight=weight, training=True, backend=backend)
    grads = pullback(np.ones_like(x))
    assert isinstance(grads.x, torch.Tensor)
    assert isinstance(grads.weight, np.ndarray)


def test_torch_autograd_notices_what_was_written(torch: Any) -> None:
    """A tensor that autograd saved and nbnorm then wrote to must not give a wrong gradient in silence."""
    for write in (
        lambda saved: nbnorm.layer_norm(saved, 5, out=saved),
        lambda saved: nbnorm.batch_norm(torch.randn(6, 5), saved[0], torch.ones(5), training=True),
    ):
        leaf = torch.randn(4, 5, requires_grad=True)
        saved = leaf.exp()
        with torch.no_grad():
            write(saved)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()


def test_torch_inference_mode(torch: Any) -> None:
    with torch.inference_mode():
        x, mean, var = torch.randn(6, 5), torch.zeros(5), torch.ones(5)
        assert nbnorm.batch_norm(x, mean, var, training=True, out=x) is x
        assert mean.any()


def test_torch_subclasses_are_refused(torch: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(2, 3)
        with pytest.raises(TypeError, match=r"x must be a plain tensor; got .*FakeTensor"):
            nbnorm.layer_norm(fake, 3)


# ---- JAX -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jax() -> Any:
    return pytest.importorskip("jax", reason="jax is not installed (it comes with the test-all extra)")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_jax(jax: Any, x: Any, dtype: str, backend: str) -> None:
    array = jax.numpy.asarray(x, dtype)
    y, pullback = nbnorm.vjp(nbnorm.batch_norm, array, weight=jax.numpy.ones(3, dtype), training=True, backend=backend)
    grads = pullback(jax.numpy.ones_like(array))
    for result in (y, grads.x, grads.weight):
        assert isinstance(result, jax.Array)
        assert result.dtype == array.dtype
    bound = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(np.asarray(y, "f8"), expected_norm(np.asarray(array)), atol=bound)


def test_jax_float64(jax: Any, x: Any) -> None:
    with jax.enable_x64(True):
        array = jax.numpy.asarray(x, "float64")
    assert nbnorm.layer_norm(array, 6).dtype == np.float64


def test_jax_is_not_copied_in(jax: Any, x: Any) -> None:
    array = jax.numpy.asarray(x)
    _, view, _ = arrays.float_view(array, "x")
    assert address(view) == array.unsafe_buffer_pointer()


def test_jax_running_statistics_are_returned(jax: Any, x: Any) -> None:
    array = jax.numpy.asarray(x)
    mean, var = jax.numpy.zeros(3), jax.numpy.ones(3)
    with pytest.raises(TypeError, match=r"running_mean cannot be written.*return_moments=True.*moments\.update"):
        nbnorm.batch_norm(array, mean, var, training=True)
    _, moments = nbnorm.batch_norm(array, mean, var, training=True, return_moments=True)
    new_mean, new_var = moments.update(mean, var, 0.1)
    assert isinstance(new_mean, jax.Array)
    np.testing.assert_allclose(new_mean, 0.1 * x.mean(axis=(0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(new_var, 0.9 + 0.1 * x.var(axis=(0, 2, 3), ddof=1), atol=1e-6)


def test_jax_traced_arrays_are_refused(jax: Any, x: Any) -> None:
    with pytest.raises(TypeError, match="x is a traced JAX array"):
        jax.jit(lambda a: nbnorm.layer_norm(a, 6))(x)


# ---- DLPack ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dlpack(x: Any, dtype: str, backend: str) -> None:
    array = array_api_strict.asarray(x.astype(dtype))
    y, pullback = nbnorm.vjp(nbnorm.batch_norm, array, training=True, backend=backend)
    grads = pullback(y)
    assert type(y) is type(array)
    assert type(grads.x) is type(array)
    assert y.dtype == array.dtype
    np.testing.assert_allclose(np.from_dlpack(y), expected_norm(x.astype(dtype)), atol=1e-6)


def test_dlpack_is_not_copied_in(x: Any) -> None:
    array = array_api_strict.asarray(x)
    _, view, _ = arrays.float_view(array, "x")
    assert address(view) == address(np.from_dlpack(array))


class Elsewhere:
    """An array of a library that is not there to read a result back."""

    def __init__(self, array: Any, device: int = 1) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **keywords: Any) -> Any:
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0


def test_dlpack_without_a_way_back_is_refused(x: Any) -> None:
    with pytest.raises(TypeError, match=r"x is a .*Elsewhere, whose library has no from_dlpack"):
        nbnorm.layer_norm(Elsewhere(x), 6)
    with pytest.raises(TypeError, match="x must lie in host memory; got DLPack device type 2"):
        nbnorm.layer_norm(Elsewhere(x, device=2), 6)


# ---- NumPy -----------------------------------------------------------------------------------------------------------


def test_numpy_is_not_copied(x: Any) -> None:
    """The result is a new array; the input reaches the backend at its own address."""
    _, view, _ = arrays.float_view(x, "x")
    assert view is x


def test_memmap(tmp_path: Any, x: Any, backend: str) -> None:
    x.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", "f4", "r", shape=x.shape)
    np.testing.assert_allclose(
        nbnorm.batch_norm(mapped, training=True, backend=backend), expected_norm(x), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([[1.0, 2.0]], "got list"),
        (1.5, "got float"),
        (None, "got NoneType"),
        (np.float64(3), r"got numpy\.float64"),
        (np.ma.masked_array([[1.0, 2.0]], [[0, 1]]), "masked arrays have no single meaning"),
        (np.matrix([[1.0, 2.0]]), "a subclass whose meaning would be lost"),
        (np.array([[1, 2]]), "dtype float32, float64, float16, bfloat16; got int64"),
        (np.array([[True, False]]), "got bool"),
        (np.array([[1j, 2]]), "got complex128"),
        (np.array([[1.0, 2]], object), "got object"),
        (np.array([[1.0, 2]], np.longdouble), "got float128|got longdouble"),
        (np.array([["a", "b"]]), "got <U1"),
        (np.zeros((1, 2), ml_dtypes.float8_e4m3), "got float8_e4m3"),
        (np.zeros((1, 2), [("a", "f4")]), r"got \[\('a'"),
    ],
)
def test_what_is_no_float_array_is_refused(array: Any, message: str) -> None:
    for call in (
        lambda: nbnorm.layer_norm(array, 2),
        lambda: nbnorm.rms_norm(array, 2),
        lambda: nbnorm.group_norm(array, 1),
        lambda: nbnorm.batch_norm(array, training=True),
        lambda: nbnorm.instance_norm(array),
        lambda: nbnorm.moments(array),
    ):
        with pytest.raises(TypeError, match=rf"^x must be.*({message})"):
            call()


def test_a_new_kind_is_one_small_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Boxed:
        def __init__(self, inside: Any) -> None:
            self.inside = inside

    class BoxedArrays(arrays.NumpyArrays):
        kind = "boxed"

        def accepts(self, cls: type) -> bool:
            return cls is Boxed

        def view(self, array: Any, name: str) -> Any:
            return array.inside

        def wrap(self, result: Any, like: Any) -> Any:
            return Boxed(result)

    monkeypatch.setattr(arrays, "KINDS", [*arrays.KINDS, BoxedArrays()])
    y = nbnorm.layer_norm(Boxed(np.array([[1.0, 3.0]])), 2, eps=1e-9)
    assert isinstance(y, Boxed)
    np.testing.assert_allclose(y.inside, [[-1, 1]], rtol=1e-6)


def test_adapters_are_looked_up_once_per_type(monkeypatch: pytest.MonkeyPatch, x: Any) -> None:
    found = arrays.adapter_of(x, "x")
    monkeypatch.setattr(arrays, "KINDS", [])
    assert arrays.adapter_of(x[:2], "x") is found


def test_no_framework_is_imported_unless_its_array_is_given() -> None:
    program = """
import sys, numpy as np, nbnorm
nbnorm.layer_norm(np.ones((2, 3), "f4"), 3, backend="numpy")
nbnorm.layer_norm(np.ones((2, 3), "f2"), 3, backend="numpy")
print(sorted({"torch", "jax", "ml_dtypes", "numba", "cupy", "dask"} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
