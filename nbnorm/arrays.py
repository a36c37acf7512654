"""Array kinds: how to see each as a NumPy array without a copy, and how to give a result back as the same kind.

A new kind is one small class with `accepts`, `view` and `wrap` (and `written`, if it counts writes), added to `KINDS`.
The class is found once per type and cached; no framework is imported, because an array of its kind can only come from
a program that has it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = Any  # an array of any supported kind
HALF = ("float16", "bfloat16")
DTYPES = ("float32", "float64", *HALF)
_dtype_names: dict[np.dtype[Any], str] = {}


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """One kind of view for backends to compile for, and a guard against writing to an input."""
    view = array.view()
    view.flags.writeable = False
    return view


def overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays share an element's memory."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]  # NumPy's stubs know only 0 and -1
    except np.exceptions.TooHardError:
        return True  # undecided within the work allowed: strides as tangled as that are refused


class NumpyArrays:
    """numpy.ndarray and numpy.memmap. The other kinds derive from this one."""

    kind = "numpy"

    def accepts(self, cls: type) -> bool:
        return cls in (np.ndarray, np.memmap)

    def view(self, array: Array, name: str) -> NDArray[Any]:
        """The same memory as a NumPy array; TypeError where there is no such view."""
        found: NDArray[Any] = array
        return found

    def wrap(self, result: NDArray[Any], like: Array) -> Array:
        """`result` as an array of the kind of `like`, without a copy where the kind allows it."""
        return result

    def written(self, array: Array) -> None:
        """Called after the view of an array was written to, for kinds that keep count of it."""


class TorchTensors(NumpyArrays):
    """torch.Tensor and torch.nn.Parameter in host memory."""

    kind = "torch"

    def accepts(self, cls: type) -> bool:
        return any((base.__module__, base.__name__) == ("torch", "Tensor") for base in cls.__mro__)

    def view(self, array: Array, name: str) -> NDArray[Any]:
        torch = sys.modules["torch"]
        if type(array) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"{name} must be a plain tensor; got {_describe(type(array))}, which may hold no memory")
        if array.device.type != "cpu":
            raise TypeError(f"{name} must lie in host memory; got a torch tensor on {array.device}")
        if array.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor; got layout {array.layout}")
        if array.is_neg():
            raise TypeError(f"{name} must hold its own values; got a lazily negated tensor: pass .resolve_neg()")
        if array.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} requires grad, and nbnorm does not record on torch's tape: call it under torch.no_grad() "
                "or with .detach(), and take gradients with nbnorm.vjp"
            )
        if array.dtype is torch.bfloat16:
            bits: NDArray[Any] = array.detach().view(torch.int16).numpy()
            return bits.view(bfloat16(name))
        found: NDArray[Any] = array.detach().numpy()
        return found

    def wrap(self, result: NDArray[Any], like: Array) -> Array:
        torch = sys.modules["torch"]
        if dtype_name(result.dtype) == "bfloat16":
            return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.asarray(result))

    def written(self, array: Array) -> None:
        """Let autograd notice that a tensor it may have saved has changed; inference tensors it never saves."""
        if not array.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(array)


class JaxArrays(NumpyArrays):
    """Concrete jax.Array on one CPU device; immutable, so nothing is written to them."""

    kind = "jax"

    def accepts(self, cls: type) -> bool:
        return cls.__module__.partition(".")[0] in ("jax", "jaxlib") and any(
            base.__name__ in ("ArrayImpl", "Tracer") for base in cls.__mro__
        )

    def view(self, array: Array, name: str) -> NDArray[Any]:
        if any(base.__name__ == "Tracer" for base in type(array).__mro__):
            raise TypeError(
                f"{name} is a traced JAX array ({type(array).__name__}): call nbnorm outside jit, grad and vmap, "
                "on concrete arrays"
            )
        devices = array.devices()
        if len(devices) != 1 or next(iter(devices)).platform != "cpu":
            raise TypeError(f"{name} must lie on one CPU device; got {sorted(map(str, devices))}")
        found: NDArray[Any] = np.asarray(array)
        return found

    def wrap(self, result: NDArray[Any], like: Array) -> Array:
        jax = sys.modules["jax"]
        with jax.enable_x64(bool(result.dtype.itemsize == 8)):  # else float64 would come back as float32
            return jax.device_put(result, like.sharding)


class DLPackArrays(NumpyArrays):
    """Anything in host memory that speaks DLPack, and whose library can read it back."""

    kind = "dlpack"

    def accepts(self, cls: type) -> bool:
        return hasattr(cls, "__dlpack__") and hasattr(cls, "__dlpack_device__") and not issubclass(cls, np.ndarray)

    def view(self, array: Array, name: str) -> NDArray[Any]:
        device_type = int(array.__dlpack_device__()[0])
        if device_type != 1:  # kDLCPU of the DLPack specification
            raise TypeError(f"{name} must lie in host memory; got DLPack device type {device_type}")
        self._from_dlpack(array, name)
        try:
            return np.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{name} cannot be read through DLPack: {error}") from error

    def wrap(self, result: NDArray[Any], like: Array) -> Array:
        return self._from_dlpack(like, "x")(result)

    def _from_dlpack(self, array: Array, name: str) -> Any:
        """The reader of the array's own library: its array-API namespace, else its top-level package."""
        namespace = getattr(array, "__array_namespace__", None)
        library = namespace() if namespace else sys.modules.get(type(array).__module__.partition(".")[0])
        reader = getattr(library, "from_dlpack", None)
        if reader is None:
            raise TypeError(
                f"{name} is a {type(array).__module__}.{type(array).__qualname__}, whose library has no from_dlpack: "
                "its results could not be given back as the same kind. Pass numpy.from_dlpack(array) instead"
            )
        return reader


KINDS: list[NumpyArrays] = [NumpyArrays(), TorchTensors(), JaxArrays(), DLPackArrays()]
_by_type: dict[type, NumpyArrays] = {}


def adapter_of(array: Array, name: str) -> NumpyArrays:
    """The adapter of the array's kind; TypeError when there is none."""
    cls = type(array)
    found = _by_type.get(cls)
    if found is None:
        found = next((kind for kind in KINDS if kind.accepts(cls)), None)
        if found is None:
            raise TypeError(f"{name} must be an array ({_known()}); got {_describe(cls)}")
        _by_type[cls] = found
    return found


def _known() -> str:
    return "NumPy, torch, JAX or any with __dlpack__"


def _describe(cls: type) -> str:
    described = f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")
    if issubclass(cls, np.ma.MaskedArray):
        return f"{described}: masked arrays have no single meaning here; pass .filled(...) or the valid elements"
    if issubclass(cls, np.ndarray):
        return f"{described}, a subclass whose meaning would be lost; pass numpy.asarray(array)"
    return described


def dtype_name(dtype: np.dtype[Any]) -> str:
    """ "float32", "bfloat16" and so on, whatever the byte order; "" for a dtype that no norm takes."""
    found = _dtype_names.get(dtype)
    if found is None:
        found = _dtype_names[dtype] = dtype.name if dtype.name in DTYPES else ""
    return found


def bfloat16(name: str = "x") -> np.dtype[Any]:
    """NumPy's bfloat16, which the ml_dtypes package brings."""
    try:
        import ml_dtypes  # noqa: PLC0415  takes 0.3 s and only bfloat16 needs it
    except ImportError as error:
        raise TypeError(
            f"{name} is bfloat16, which NumPy reads only with the ml_dtypes package: pip install ml_dtypes"
        ) from error
    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def float_view(array: Array, name: str) -> tuple[NumpyArrays, NDArray[Any], str]:
    """(adapter, NumPy view, dtype name) of a floating-point array; TypeError for every other dtype."""
    adapter = adapter_of(array, name)
    found = adapter.view(array, name)
    dtype = dtype_name(found.dtype)
    if not dtype:
        raise TypeError(f"{name} must be of dtype {', '.join(DTYPES)}; got {found.dtype}")
    return adapter, found, dtype
