"""A device whose kernels run in the simulator, or are only recorded: for tests, and for looking at what would run."""

from __future__ import annotations

import ctypes
import functools
import inspect
import math
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nbnorm import arrays
from nbnorm.devices import DeviceArray, Library, allocates
from nbnorm_backends.numba_cuda import simulator
from nbnorm_backends.numba_cuda.device import HostMemory, Start
from nbnorm_backends.numba_cuda.launch import GRID, POINTERS, REALS, VECTOR_BYTES, Variant
from nbnorm_backends.numba_cuda.plans import Launch

NOWHERE = 2**60  # no processor has such addresses: whoever reads one on the host is found at once
LENT: dict[int, int] = {}  # host memory that stands for a device's: addresses and bytes, the newest last
THREADS = 1024  # of a block, the most that CUDA starts


class Block:
    """Bytes at an address of the device; they are there once they are asked for."""

    def __init__(self, pointer: int, size: int, *, zero: bool = False) -> None:
        self.pointer, self.size, self._zero = pointer, size, zero

    @functools.cached_property
    def content(self) -> NDArray[np.uint8]:
        return np.full(self.size, 0 if self._zero else 255, np.uint8)

    @functools.cached_property
    def unwritten(self) -> NDArray[np.bool_]:
        """Which bytes hold nothing."""
        return np.full(self.size, not self._zero)

    def fill(self, content: NDArray[np.uint8]) -> None:
        self.content, self.unwritten = content, np.zeros(self.size, bool)

    def part(self, begin: int, end: int, dtype: np.dtype[Any]) -> simulator.Fresh:
        """The elements between two addresses, as the simulator takes them."""
        inside = slice(begin - self.pointer, begin - self.pointer + (end - begin) // dtype.itemsize * dtype.itemsize)
        found: simulator.Fresh = self.content[inside].view(dtype).view(simulator.Fresh)
        found.unwritten = self.unwritten[inside][:: dtype.itemsize]
        return found


class Tensor:
    """An array of a library that has its memory on a simulated device: nothing but its adapter reads it."""

    def __init__(self, at: DeviceArray) -> None:
        self.at = at

    def numpy(self) -> NDArray[Any]:
        return self.at.host()


class Tensors(arrays.NumpyArrays):
    """The adapter of `Tensor`."""

    kind = "simulated"

    def accepts(self, cls: type) -> bool:
        return cls is Tensor

    def view(self, array: Any, name: str) -> Any:
        return array.at

    def wrap(self, result: Any, like: Any) -> Any:
        assert isinstance(result, DeviceArray), "a result that does not lie on the device"
        return Tensor(result)

    def key(self, array: Any) -> Any:
        return array.at.shape, array.at.strides, array.at.dtype, array.at.device


arrays.KINDS.append(Tensors())


class SimulatedMemory(HostMemory, Library):
    """Of a simulated device; as an array library, whose arrays are `Tensor`, it computes with NumPy. New arrays
    begin `shift` bytes, or as many whole elements, behind a multiple of 256."""

    current = 7  # the stream

    def __init__(self, ordinal: int) -> None:
        self.device, self.shift = f"cuda:{ordinal}", 0
        self._next = NOWHERE * (ordinal + 1)
        self._blocks: WeakValueDictionary[int, Block] = WeakValueDictionary()
        self._lock = threading.Lock()

    def stream(self) -> int:
        return self.current

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """A copy, with the strides of the array."""
        order = np.argsort([-abs(step) for step in array.strides], kind="stable")
        lies = self.upload(np.ascontiguousarray(array.transpose(order)))
        return Tensor(lies.transpose(np.argsort(order)))

    def address(self, array: Any) -> int:
        """Of what a plan has copied only the block is kept."""
        return array.at.pointer if isinstance(array, Tensor) else array.pointer + self.shift

    def like(self, array: Any) -> Any:
        array = array.at
        order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        made = self.empty(array.transpose(order).shape, array.dtype)
        return Tensor(made.transpose(np.argsort(order)))

    @allocates
    def block(self, size: int, *, zero: bool = False) -> tuple[Block, int]:
        with self._lock:
            block = self._blocks[self._next] = Block(self._next, size, zero=zero)
            self._next += -(-(size + 1) // 256) * 256
        return block, block.pointer

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike, *, zero: bool = False) -> DeviceArray:
        dtype = np.dtype(dtype)
        shift = self.shift // dtype.itemsize * dtype.itemsize
        block, pointer = self.block(math.prod(shape) * dtype.itemsize + shift, zero=zero)
        return DeviceArray.of(self, block, pointer + shift, shape, None, dtype)

    def at(self, pointer: int, dtype: np.dtype[Any], others: Iterable[int]) -> DeviceArray:
        """The array at an address, which goes on until the next of the others, or until the end of its block."""
        with self._lock:
            blocks = list(self._blocks.values())
        block = next((each for each in blocks if each.pointer <= pointer < each.pointer + each.size), None)
        if block is None:
            begin, size = next(item for item in reversed(LENT.items()) if 0 <= pointer - item[0] < max(item[1], 1))
            past = begin % VECTOR_BYTES  # the simulator counts from where an array begins
            block = Block(begin - past, past + size)
            lies = (ctypes.c_char * block.size).from_address(block.pointer)
            block.fill(np.frombuffer(memoryview(lies).cast("B"), np.uint8))
        end = min((each for each in others if each > pointer), default=block.pointer + block.size)
        size = (min(end, block.pointer + block.size) - pointer) // dtype.itemsize
        return DeviceArray.of(self, block, pointer, (size,), None, dtype)

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        made = self.empty(array.shape, array.dtype)
        made.owner.fill(
            np.concatenate((np.zeros(made.owner.size - array.nbytes, np.uint8), array.reshape(-1).view(np.uint8)))
        )
        return made

    def host(self, array: DeviceArray) -> NDArray[Any]:
        return self.native(array).copy()

    def native(self, array: DeviceArray) -> NDArray[Any]:
        begin = array.pointer - array.owner.pointer
        return np.ndarray(array.shape, array.dtype, array.owner.content, begin, array.strides)

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
        self._lock = threading.RLock()

    def bind(self, launches: tuple[Launch, ...]) -> Start:
        made = [(launch, *_factory(launch.variant)) for launch in launches]

        def start(stream: int, at: Mapping[str, int]) -> None:
            with self._lock:  # kernels of one stream run one after another
                for launch, factory, names in made:
                    self._start(launch, factory, names, stream, at)

        return start

    def _start(self, launch: Launch, factory: Any, names: tuple[str, ...], stream: int, at: Mapping[str, int]) -> None:
        variant, grid, block = launch.variant, launch.grid, launch.block
        assert set(names) == set(launch.args), (variant.name, set(names) ^ set(launch.args))
        assert 0 < grid <= GRID, (variant.name, grid)
        assert 0 < block <= min(THREADS, variant.bounds[0]), (variant.name, block)
        args: dict[str, Any] = {}
        for name in names:
            value = launch.args[name]
            if name not in POINTERS:
                assert isinstance(value, int | float), (name, value)
                assert abs(value) < 2**63, (name, value)
            elif value is not None:
                address, dtype = at[value], _dtype(variant, name)
                most = VECTOR_BYTES if variant.vector and POINTERS[name] == "element" else dtype.itemsize
                assert address % most == 0, (variant.name, name, address)
                value = self.memory.at(address, dtype, at.values()) if address else None
            args[name] = value
        self.launches.append(Record(variant, grid, block, args, stream))
        if self._run:
            real = np.float64 if variant.kind == "float64" else np.float32
            parts: dict[int, simulator.Pointer] = {}
            given = [real(args[name]) if name in REALS else _given(args[name], parts) for name in names]
            simulator.launch(factory, grid, block, given, seed=self._seed)


def _dtype(variant: Variant, name: str) -> np.dtype[Any]:
    """Of what an argument points to."""
    kind = {"element": variant.kind, "real": variant.real}.get(POINTERS[name], POINTERS[name])
    return arrays.bfloat16() if kind == "bfloat16" else np.dtype(kind)


@functools.lru_cache
def _factory(variant: Variant) -> tuple[Any, tuple[str, ...]]:
    P = simulator.primitives(variant.kind)

    def factory(cuda: Any) -> Any:
        return variant.make(cuda, P)

    one = simulator.Index(1, 1)
    return factory, tuple(inspect.signature(factory(simulator.Cuda(one, one))).parameters)


def _given(value: Any, parts: dict[int, simulator.Pointer]) -> Any:
    """What the simulator takes for an argument; one address is one array."""
    if not isinstance(value, DeviceArray):
        return value
    found = parts.get(value.pointer)
    if found is None:
        past = value.pointer % VECTOR_BYTES  # the simulator counts from where an array begins
        begin, end = value.pointer - past, value.pointer + value.nbytes
        part = value.owner.part(begin, end, value.dtype)
        found = parts[value.pointer] = simulator.Pointer(part, past // value.itemsize)
    return found
