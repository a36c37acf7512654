"""Arrays on a GPU as the front end sees them: shape, strides and address of memory that is never read here."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from types import EllipsisType, SimpleNamespace
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nbnorm.errors import BackendError

F = TypeVar("F", bound=Callable[..., Any])


class Memory(ABC):
    """Memory of one device, in the order of one stream."""

    device: str  # "cuda:0"

    @functools.cached_property
    def ordinal(self) -> int:
        return int(self.device.partition(":")[2])

    @abstractmethod
    def stream(self) -> int:
        """Handle of the stream."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: DTypeLike, *, zero: bool = False) -> DeviceArray:
        """A C-contiguous array."""

    @abstractmethod
    def host(self, array: DeviceArray) -> NDArray[Any]:
        """A copy in host memory, for which the host waits."""


def allocates(method: F) -> F:
    """Of a method of `Memory`: whatever an allocator raises, as one error that names the device."""

    @functools.wraps(method)
    def checked(self: Memory, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except BackendError:
            raise
        except Exception as error:
            raise no_memory(self.device, error) from error

    return cast(F, checked)


def no_memory(device: str, error: Exception) -> BackendError:
    """The error of an allocator that gave nothing."""
    return BackendError(f"{device} gave no memory: {error}. Free memory there, or pass fewer samples at a time")


class Library(Memory):
    """Memory as an array library allocates and copies it, on the stream that is current in the library."""

    @abstractmethod
    def address(self, array: Any) -> int:
        """Where an array of the library's begins."""

    @abstractmethod
    def like(self, array: Any) -> Any:
        """A new array of the library's: the shape, dtype and order in memory of one that has no gaps."""

    @abstractmethod
    def block(self, size: int, *, zero: bool = False) -> tuple[Any, int]:
        """So many bytes, as long as somebody holds the first of what is returned, and their address."""

    def used(self, arrays: Iterable[DeviceArray]) -> None:
        """Tell the library that these are read on the stream that is current now, which may be another than that on
        which they were made: their memory is not given away before. Nothing, where a library has no means for it."""

    @abstractmethod
    def native(self, array: DeviceArray) -> Any:
        """The same elements as an array of the library's, without a copy."""

    @abstractmethod
    def converted(self, array: DeviceArray, dtype: DTypeLike) -> DeviceArray:
        """A C-contiguous copy of this dtype."""

    @abstractmethod
    def assign(self, target: DeviceArray, source: DeviceArray) -> None:
        """target[...] = source"""

    @abstractmethod
    def sum(self, array: DeviceArray, other: DeviceArray | float) -> DeviceArray:
        """array + other, of the array's dtype, C-contiguous."""


class DeviceArray:
    """What the engine and the backends need of an array on a device; of a NumPy array it has the parts used there.

    NumPy works out shapes and strides, on an array at the device's address that nobody reads: it stays in here, and
    whatever would have NumPy read this one is a TypeError.
    """

    __slots__ = ("_at", "memory", "owner", "pointer")

    def __init__(self, memory: Memory, owner: Any, at: NDArray[Any], pointer: int) -> None:
        self.memory, self.owner, self._at = memory, owner, at
        self.pointer = pointer  # no view begins elsewhere; NumPy takes 1 us to tell, and a launch asks for 20

    @classmethod
    def of(
        cls,
        memory: Memory,
        owner: Any,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        dtype: np.dtype[Any],
    ) -> DeviceArray:
        """The array at an address that `owner` keeps alive; strides in bytes, None where it is C-contiguous."""
        bits = f"<u{dtype.itemsize}"  # bfloat16 has no code of its own
        interface = {"version": 3, "data": (pointer, False), "shape": shape, "strides": strides, "typestr": bits}
        return cls(memory, owner, np.asarray(SimpleNamespace(__array_interface__=interface)).view(dtype), pointer)

    @property
    def device(self) -> str:
        return self.memory.device

    @property
    def shape(self) -> tuple[int, ...]:
        return self._at.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self._at.strides

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._at.dtype

    @property
    def ndim(self) -> int:
        return self._at.ndim

    @property
    def size(self) -> int:
        return self._at.size

    @property
    def itemsize(self) -> int:
        return self._at.itemsize

    @property
    def nbytes(self) -> int:
        return self._at.nbytes

    @property
    def flags(self) -> Any:
        return self._at.flags

    @property
    def ctypes(self) -> Any:
        return self._at.ctypes

    def reshape(self, *shape: Any, copy: bool | None = None) -> DeviceArray:
        """As NumPy's: a view, or else a copy, or a ValueError where `copy` is False."""
        try:
            return self._view(self._at.reshape(*shape, copy=False))
        except ValueError:
            if copy is False or self.flags.c_contiguous:
                raise
        return self.copy().reshape(*shape)

    def transpose(self, *axes: Any) -> DeviceArray:
        return self._view(self._at.transpose(*axes))

    def broadcast_to(self, shape: tuple[int, ...]) -> DeviceArray:
        return self._view(np.broadcast_to(self._at, shape))

    def overlaps(self, other: DeviceArray) -> bool:
        return bool(np.may_share_memory(self._at, other._at))

    def astype(self, dtype: DTypeLike) -> DeviceArray:
        return self.library.converted(self, dtype)

    def copy(self) -> DeviceArray:
        """C-contiguous."""
        return self.library.converted(self, self.dtype)

    def native(self) -> Any:
        return self.library.native(self)

    def host(self) -> NDArray[Any]:
        """A copy in host memory, for which the host waits."""
        return self.memory.host(self)

    def __add__(self, other: DeviceArray | float) -> DeviceArray:
        return self.library.sum(self, other)

    def __setitem__(self, index: EllipsisType, value: DeviceArray) -> None:
        self.library.assign(self, value)

    @property
    def library(self) -> Library:
        assert isinstance(self.memory, Library), f"memory of {type(self.memory).__name__} is no array library's"
        return self.memory

    def _view(self, at: NDArray[Any]) -> DeviceArray:
        return DeviceArray(self.memory, self.owner, at, self.pointer)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"an array on {self.device} cannot be read by NumPy, which computes this: the five norms, add_layer_norm, "
            "add_rms_norm and moments take arrays on a GPU"
        )

    __array__ = __array_ufunc__ = __array_function__ = __bool__ = __float__ = __len__ = __iter__ = _refuse


def on_host(array: Any) -> bool:
    """Whether a view is a NumPy array, and not a `DeviceArray`."""
    return isinstance(array, np.ndarray)


# What the engine does with arrays of both kinds: where it says NDArray, a DeviceArray may stand.


def contiguous(array: NDArray[Any]) -> NDArray[Any]:
    """A C-contiguous array of native byte order: this one, where it is."""
    if isinstance(array, DeviceArray):
        return array if array.flags.c_contiguous else array.copy()
    return np.array(array, array.dtype.newbyteorder("="), order="C", copy=None)


def copied(array: NDArray[Any]) -> NDArray[Any]:
    """A C-contiguous copy of native byte order."""
    if isinstance(array, DeviceArray):
        return array.copy()
    return np.array(array, array.dtype.newbyteorder("="), order="C")


def broadcast(array: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    return array.broadcast_to(tuple(shape)) if isinstance(array, DeviceArray) else np.broadcast_to(array, shape)


def added(x: NDArray[Any], addend: NDArray[Any]) -> NDArray[Any]:
    """x + addend, C-contiguous; overflow is no warning."""
    if isinstance(x, DeviceArray):
        return x + addend
    with np.errstate(over="ignore", invalid="ignore"):
        total: NDArray[Any] = np.add(x, addend, order="C")
    return total


def device_type(array: NDArray[Any]) -> str:
    """ "cpu" or "cuda"."""
    return array.device.partition(":")[0]


def empty_like(array: NDArray[Any]) -> NDArray[Any]:
    return array.memory.empty(array.shape, array.dtype) if isinstance(array, DeviceArray) else np.empty_like(array)


def zeros_like(array: NDArray[Any]) -> NDArray[Any]:
    if isinstance(array, DeviceArray):
        return array.memory.empty(array.shape, array.dtype, zero=True)
    return np.zeros_like(array)
