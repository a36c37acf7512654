"""Array kinds: how to see each without a copy, as a NumPy array or a `DeviceArray`, and how to give a result back as
the same kind.

A new kind is one small class with `accepts`, `view` and `wrap` (and `written`, if it counts writes), added to `KINDS`.
The class is found once per type and cached; no framework is imported, because an array of its kind can only come from
a program that has it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from operator import methodcaller
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nbnorm.devices import DeviceArray, Library, allocates, no_memory

Array = Any  # an array of any supported kind
HALF = ("float16", "bfloat16")
DTYPES = ("float32", "float64", *HALF)
_dtype_names: dict[np.dtype[Any], str] = {}


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """One kind of view for backends to compile for, and a guard against writing to an input."""
    if isinstance(array, DeviceArray):
        return array
    view = array.view()
    view.flags.writeable = False
    return view


def overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays share an element's memory; on a device, whether they may."""
    if isinstance(a, DeviceArray):
        return isinstance(b, DeviceArray) and a.overlaps(b)
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
        """The same memory as a NumPy array, or as a `DeviceArray`; TypeError where there is no such view."""
        found: NDArray[Any] = array
        return found

    def wrap(self, result: NDArray[Any], like: Array) -> Array:
        """`result` as an array of the kind of `like`, without a copy where the kind allows it."""
        return result

    def written(self, array: Array) -> None:
        """Called after the view of an array was written to, for kinds that keep count of it."""

    def key(self, array: Array) -> tuple[Any, ...] | None:
        """Of an array on a device all that `view` and the checks of a call depend on, but its memory; the shape comes
        first. None for others, and for those that `view` refuses."""
        return None


class TorchTensors(NumpyArrays):
    """torch.Tensor and torch.nn.Parameter, in host memory or on a CUDA device."""

    kind = "torch"

    def accepts(self, cls: type) -> bool:
        return any((base.__module__, base.__name__) == ("torch", "Tensor") for base in cls.__mro__)

    def view(self, array: Array, name: str) -> NDArray[Any]:
        torch = sys.modules["torch"]
        if type(array) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"{name} must be a plain tensor; got {_describe(type(array))}, which may hold no memory")
        if array.device.type not in ("cpu", "cuda"):
            raise TypeError(f"{name} must lie in host memory or on a CUDA device; got a torch tensor on {array.device}")
        if array.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor; got layout {array.layout}")
        if array.is_neg():
            raise TypeError(f"{name} must hold its own values; got a lazily negated tensor: pass .resolve_neg()")
        if array.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} requires grad, and nbnorm does not record on torch's tape: call it under torch.no_grad() "
                "or with .detach(), and take gradients with nbnorm.vjp"
            )
        if array.device.type == "cuda":
            on_device: NDArray[Any] = torch_memory(array.device.index).view(array.detach(), name)
            return on_device
        if array.dtype is torch.bfloat16:
            bits: NDArray[Any] = array.detach().view(torch.int16).numpy()
            return bits.view(bfloat16(name))
        found: NDArray[Any] = array.detach().numpy()
        return found

    def wrap(self, result: NDArray[Any], like: Array) -> Array:
        if isinstance(result, DeviceArray):
            return result.native()
        torch = sys.modules["torch"]
        if dtype_name(result.dtype) == "bfloat16":
            return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.asarray(result))

    def written(self, array: Array) -> None:
        """Let autograd notice that a tensor it may have saved has changed; inference tensors it never saves."""
        if not array.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(array)

    def key(self, array: Array) -> tuple[Any, ...] | None:
        if not array.is_cuda or array.layout is not sys.modules["torch"].strided or array.is_neg():
            return None
        if array.requires_grad and sys.modules["torch"].is_grad_enabled():
            return None
        # To see that strides follow from the shape takes half of the time of asking for them.
        return array.shape, array.is_contiguous() or array.stride(), array.dtype, array.get_device()


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
            raise TypeError(
                f"{name} must lie in host memory; got DLPack device type {device_type}: pass "
                "torch.from_dlpack(array) or cupy.from_dlpack(array), whose arrays are taken on a GPU"
            )
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


class TorchMemory(Library):
    """A CUDA device's memory as torch's caching allocator gives it; while a CUDA graph is captured, from its pool."""

    def __init__(self, ordinal: int) -> None:
        self.device = self.place = f"cuda:{ordinal}"  # what torch calls it

    def view(self, tensor: Array, name: str) -> Any:
        dtype = self._numpy_dtype(tensor.dtype, name)
        strides = tuple(step * dtype.itemsize for step in tensor.stride())
        return DeviceArray.of(self, tensor, self.address(tensor), tuple(tensor.shape), strides, dtype)

    def stream(self) -> int:
        torch = sys.modules["torch"]
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # what Triton asks: it makes no object of a stream
        return int(torch.cuda.current_stream(self.device).cuda_stream if raw is None else raw(self.ordinal))

    # Asked of each array of a call, and in half of the time of a method.
    address = staticmethod(methodcaller("data_ptr"))  # type: ignore[assignment]

    def like(self, array: Array) -> Array:
        try:  # `allocates` takes half as long as torch
            return sys.modules["torch"].empty_like(array)
        except Exception as error:
            raise no_memory(self.device, error) from error

    @allocates
    def block(self, size: int, *, zero: bool = False) -> tuple[Any, int]:
        torch = sys.modules["torch"]
        made = (torch.zeros if zero else torch.empty)(size, dtype=torch.uint8, device=self.place)
        return made, self.address(made)

    @allocates
    def empty(self, shape: tuple[int, ...], dtype: DTypeLike, *, zero: bool = False) -> DeviceArray:
        torch = sys.modules["torch"]
        make, dtype = torch.zeros if zero else torch.empty, np.dtype(dtype)
        return self._made(make(shape, dtype=getattr(torch, dtype.name), device=self.place), dtype)

    def used(self, arrays: Iterable[DeviceArray]) -> None:
        stream = sys.modules["torch"].cuda.current_stream(self.device)
        for array in arrays:
            array.owner.record_stream(stream)  # nothing, where it is that of the tensor

    def native(self, array: DeviceArray) -> Any:
        tensor, size = array.owner, array.itemsize
        first = tensor.storage_offset() + (array.pointer - tensor.data_ptr()) // size
        return tensor.as_strided(array.shape, [step // size for step in array.strides], first)

    @allocates
    def converted(self, array: DeviceArray, dtype: DTypeLike) -> DeviceArray:
        torch, dtype = sys.modules["torch"], np.dtype(dtype)
        wanted = getattr(torch, dtype.name)
        return self._made(self.native(array).to(wanted, copy=True, memory_format=torch.contiguous_format), dtype)

    def assign(self, target: DeviceArray, source: DeviceArray) -> None:
        self.native(target).copy_(self.native(source))

    @allocates
    def sum(self, array: DeviceArray, other: DeviceArray | float) -> DeviceArray:
        addend = self.native(other) if isinstance(other, DeviceArray) else other
        return self._made((self.native(array) + addend).contiguous(), array.dtype)

    def host(self, array: DeviceArray) -> NDArray[Any]:
        return np.asarray(self.native(array).cpu().numpy())

    def _made(self, tensor: Any, dtype: np.dtype[Any]) -> DeviceArray:
        return DeviceArray.of(self, tensor, self.address(tensor), tuple(tensor.shape), None, dtype)

    def _numpy_dtype(self, dtype: Any, name: str) -> np.dtype[Any]:
        """Of elements that a norm takes, and of masks."""
        named = str(dtype).removeprefix("torch.")
        if named == "bfloat16":
            return bfloat16(name)
        if named not in (*DTYPES, "bool"):
            raise TypeError(f"{name} must be of dtype {', '.join(DTYPES)}, a mask of bool; got {dtype}")
        return np.dtype(named)


class CupyArrays(NumpyArrays):
    """cupy.ndarray, whose library has no bfloat16."""

    kind = "cupy"

    def accepts(self, cls: type) -> bool:
        return cls.__module__.partition(".")[0] == "cupy" and cls.__name__ == "ndarray"

    def view(self, array: Array, name: str) -> Any:
        return cupy_memory(array.device.id).view(array)

    def wrap(self, result: Any, like: Array) -> Array:
        return result.native()

    def key(self, array: Array) -> tuple[Any, ...] | None:
        if array.data.ptr % array.itemsize:  # elements that must be copied first
            return None
        return array.shape, array.strides, array.dtype, array.data.device_id


class CupyMemory(Library):
    """A CUDA device's memory as CuPy's pool gives it."""

    def __init__(self, ordinal: int) -> None:
        self.device = f"cuda:{ordinal}"

    def view(self, array: Array) -> DeviceArray:
        return DeviceArray.of(self, array, self.address(array), array.shape, array.strides, array.dtype)

    def stream(self) -> int:
        return int(sys.modules["cupy"].cuda.get_current_stream(self.ordinal).ptr)

    def address(self, array: Array) -> int:
        return array.data.ptr  # type: ignore[no-any-return]

    @allocates
    def like(self, array: Array) -> Array:
        with self._current() as cupy:
            return cupy.empty_like(array)

    @allocates
    def block(self, size: int, *, zero: bool = False) -> tuple[Any, int]:
        with self._current() as cupy:
            made = (cupy.zeros if zero else cupy.empty)(size, np.uint8)
        return made, self.address(made)

    @allocates
    def empty(self, shape: tuple[int, ...], dtype: DTypeLike, *, zero: bool = False) -> DeviceArray:
        with self._current() as cupy:
            return self.view((cupy.zeros if zero else cupy.empty)(shape, dtype))

    def native(self, array: DeviceArray) -> Any:
        begin = array.owner.data + (array.pointer - array.owner.data.ptr)
        return sys.modules["cupy"].ndarray(array.shape, array.dtype, begin, array.strides)

    @allocates
    def converted(self, array: DeviceArray, dtype: DTypeLike) -> DeviceArray:
        with self._current() as cupy:
            return self.view(cupy.array(self.native(array), dtype, order="C"))

    def assign(self, target: DeviceArray, source: DeviceArray) -> None:
        with self._current():
            self.native(target)[...] = self.native(source)

    @allocates
    def sum(self, array: DeviceArray, other: DeviceArray | float) -> DeviceArray:
        with self._current() as cupy:
            addend = self.native(other) if isinstance(other, DeviceArray) else array.dtype.type(other)
            return self.view(cupy.ascontiguousarray(self.native(array) + addend))

    def host(self, array: DeviceArray) -> NDArray[Any]:
        with self._current() as cupy:
            return np.asarray(cupy.asnumpy(self.native(array)))

    @contextmanager
    def _current(self) -> Iterator[Any]:
        """CuPy, with this device current, as it allocates and computes on that one."""
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(self.ordinal):
            yield cupy


torch_memory, cupy_memory = lru_cache(TorchMemory), lru_cache(CupyMemory)
KINDS: list[NumpyArrays] = [NumpyArrays(), TorchTensors(), JaxArrays(), CupyArrays(), DLPackArrays()]
by_type: dict[type, NumpyArrays] = {}


def adapter_of(array: Array, name: str) -> NumpyArrays:
    """The adapter of the array's kind; TypeError when there is none."""
    cls = type(array)
    found = by_type.get(cls)
    if found is None:
        found = next((kind for kind in KINDS if kind.accepts(cls)), None)
        if found is None:
            raise TypeError(f"{name} must be an array ({_known()}); got {_describe(cls)}")
        by_type[cls] = found
    return found


def _known() -> str:
    return "NumPy, torch, JAX, CuPy or any with __dlpack__"


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
