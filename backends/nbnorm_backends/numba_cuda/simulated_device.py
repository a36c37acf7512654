"""A device whose kernels run in the simulator, or are only recorded: for tests, and for looking at what would run."""

from __future__ import annotations

import ctypes
import functools
import inspect
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nbnorm.devices import DeviceArray, Library
from nbnorm_backends.numba_cuda import simulator
from nbnorm_backends.numba_cuda.device import HostMemory
from nbnorm_backends.numba_cuda.launch import POINTERS, REALS, VECTOR_BYTES, Variant

NOWHERE = 2**60  # no processor has such addresses: whoever reads one on the host is found at once
GRID, THREADS = 2**31 - 1, 1024  # the most that CUDA starts


class Block:
    """Memory at an address of the device; `array` holds what lies there, once it is asked for."""

    def __init__(self, pointer: int, size: int, dtype: np.dtype[Any], zero: bool) -> None:
        self.pointer, self.size, self._dtype, self._zero = pointer, size, dtype, zero

    @functools.cached_property
    def array(self) -> NDArray[Any]:
        return np.zeros(self.size, self._dtype) if self._zero else simulator.empty(self.size, self._dtype)


class SimulatedMemory(HostMemory, Library):
    """Of a simulated device; as an array library, it computes with NumPy. New memory begins `shift` bytes behind a
    multiple of 256."""

    current = 7  # the stream

    def __init__(self, ordinal: int) -> None:
        self.device, self.shift = f"cuda:{ordinal}", 0
        self._next = NOWHERE * (ordinal + 1)

    def stream(self) -> int:
        return self.current

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike, *, zero: bool = False) -> DeviceArray:
        dtype = np.dtype(dtype)
        block = Block(self._next, math.prod(shape) + self.shift // dtype.itemsize, dtype, zero)
        self._next += -(-(block.size * dtype.itemsize + 1) // 256) * 256
        return DeviceArray.of(self, block, block.pointer + self.shift, shape, None, dtype)

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        made = self.empty(array.shape, array.dtype)
        made.owner.array = np.concatenate((np.zeros(self.shift // array.itemsize, array.dtype), array.reshape(-1)))
        return made

    def host(self, array: DeviceArray) -> NDArray[Any]:
        return self.native(array).copy()

    def native(self, array: DeviceArray) -> NDArray[Any]:
        flat = array.owner.array
        begin = array.pointer - array.owner.pointer
        return np.ndarray(array.shape, array.dtype, np.asarray(flat).view(np.uint8), begin, array.strides)

    def converted(self, array: DeviceArray, dtype: DTypeLike) -> DeviceArray:
        return self.upload(np.array(self.native(array), dtype, order="C"))

    def assign(self, target: DeviceArray, source: DeviceArray) -> None:
        self.native(target)[...] = self.native(source)

    def sum(self, array: DeviceArray, other: DeviceArray | float) -> DeviceArray:
        addend = self.native(other) if isinstance(other, DeviceArray) else other
        return self.upload(np.ascontiguousarray(self.native(array) + addend))


class Record(NamedTuple):
    """A launch."""

    variant: Variant
    grid: int
    block: int
    args: dict[str, Any]
    stream: int


class SimulatedDevice:
    """What `device.Device` says. Each launch is checked as CUDA would, kept in `launches`, and run unless `run` is
    False."""

    def __init__(
        self, ordinal: int = 0, *, capability: int = 90, multiprocessors: int = 1, run: bool = True, seed: int = 0
    ) -> None:
        self.name = f"simulated (cuda:{ordinal})"
        self.capability, self.multiprocessors = capability, multiprocessors
        self.memory = SimulatedMemory(ordinal)
        self.launches: list[Record] = []
        self._run, self._seed = run, seed

    def prepare(self, variant: Variant) -> None:
        _factory(variant)

    def launch(self, variant: Variant, grid: int, block: int, args: dict[str, Any], stream: int) -> None:
        factory, names = _factory(variant)
        assert set(names) == set(args), (variant.name, set(names) ^ set(args))
        assert 0 < grid <= GRID, (variant.name, grid)
        assert 0 < block <= min(THREADS, variant.bounds[0]), (variant.name, block)
        for name in names:
            value = args[name]
            if name not in POINTERS:
                assert isinstance(value, int | float), (name, value)
                assert abs(value) < 2**63, (name, value)
            elif value is not None:
                most = VECTOR_BYTES if variant.vector and POINTERS[name] == "element" else value.itemsize
                assert value.flags.c_contiguous, (variant.name, name)
                assert value.pointer % most == 0, (variant.name, name, value.pointer)
        self.launches.append(Record(variant, grid, block, args, stream))
        if self._run:
            real = np.float64 if variant.kind == "float64" else np.float32
            memory: dict[int, NDArray[Any]] = {}
            given = [real(args[name]) if name in REALS else _given(args[name], memory) for name in names]
            simulator.launch(factory, grid, block, given, seed=self._seed)


@functools.lru_cache
def _factory(variant: Variant) -> tuple[Any, tuple[str, ...]]:
    P = simulator.primitives(variant.kind)

    def factory(cuda: Any) -> Any:
        return variant.make(cuda, P)

    one = simulator.Index(1, 1)
    return factory, tuple(inspect.signature(factory(simulator.Cuda(one, one))).parameters)


def _given(value: Any, memory: dict[int, NDArray[Any]]) -> Any:
    """What the simulator takes for an argument: of host memory that stands for a device's an array at the address."""
    if not isinstance(value, DeviceArray):
        return value
    if isinstance(value.owner, Block):
        return simulator.Pointer(value.owner.array, (value.pointer - value.owner.pointer) // value.itemsize)
    past = value.pointer % VECTOR_BYTES  # the simulator counts from where an array begins
    found = memory.get(value.pointer)
    if found is None:
        buffer = (ctypes.c_char * (past + value.nbytes)).from_address(value.pointer - past)
        lies = memoryview(buffer).cast("B")
        found = memory[value.pointer] = np.ndarray(past // value.itemsize + value.size, value.dtype, lies)
    return simulator.Pointer(found, past // value.itemsize)
