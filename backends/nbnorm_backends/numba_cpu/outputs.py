"""Arrays for results: they begin with a cache line, and large ones take the memory that earlier results have left."""

from __future__ import annotations

import math
import os
import platform
import threading
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from nbnorm_backends.numba_cpu.elements import LINE, widens_to_512_bits

Array = NDArray[Any]

SMALL = 1 << 14  # bytes below which NumPy's own alignment, 16, does: an aligned array costs 1 us more
LARGE = 1 << 20  # bytes from which memory is kept
# Bytes from which results go past the caches. What a third-level cache of 32 MB holds together with x is better left
# there: times through it, over times past it, of results of 8, 12, 16, 20, 24 MiB, are
# alone, 0.71, 0.87, 0.88, 0.90, 1.23 (layer norm), of 16, 20, 24 MiB 1.11, 1.23, 1.35 (batch norm);
# with torch.relu_ of the result, 0.56, 0.62, 0.99, 0.80, 1.08 (layer norm), 0.93, 1.05, 1.09 (batch norm)
# on a processor of family 26, with vectors of 512 bits. On one of family 25, with 256, a cache of the same size holds
# less, as others use it too: of 4, 6, 8, 12, 16 MiB alone 1.00, 1.08, 1.14, 1.13, 1.16 (layer norm), of 12, 16 MiB
# 1.58, 1.24 (batch norm); with TUNING.far and torch.relu_, of 4, 8, 12, 16 MiB 0.80, 1.09, 1.18, 1.27 (layer norm).
STREAM_RUNS = (20 if widens_to_512_bits() else 8) << 20
# of 8, 12, 16, 24, 128 MiB:
STREAM_RUNS_BACKWARD = 8 << 20  # 1.12, 1.02, 1.15, 1.16, 1.34
# 0.76, 0.86, 0.93, 1.03, 1.07 to 1.18 with 512 bits; with 256, of 8, 12, 16, 18 MiB 0.95, 1.01, 1.10, 1.07
STREAM_COLUMNS = (24 if widens_to_512_bits() else 16) << 20
STREAM_COLUMNS_BACKWARD = 12 << 20  # 0.94, 1.21, 1.16, 1.14, 1.10
KEPT = 256 << 20  # bytes of free memory that are kept, at most, unless NBNORM_RECYCLE_BYTES says otherwise
# `elements.put` tells LLVM more about addresses than is true of single elements; how it takes that was looked at here.
STREAMING = numba.__version__.startswith("0.68.") and platform.machine().lower() in ("x86_64", "amd64")


class Block:
    """Memory of so many bytes behind the beginning of a cache line, as NumPy reads it: to ask for its address anew
    would take as long as all else that an array of it needs, 1 us."""

    __slots__ = ("_memory", "interface", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = np.empty(size + LINE, np.uint8)
        begin = self._memory.__array_interface__["data"][0]  # `ctypes` is imported late, which fails at the very end
        self.interface = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (begin + -begin % LINE, False)}


class Recycler:
    """Free blocks of memory, the latest given back last; at most so many bytes of them."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self.free: list[Block] = []
        self.lock = threading.RLock()  # a collection of garbage may give a block back while one is taken

    def take(self, size: int) -> Block:
        """A block of so many bytes."""
        with self.lock:
            for block in reversed(self.free):
                if block.size == size:
                    self._size -= size
                    self.free.remove(block)
                    return block
        return Block(size)

    def give_back(self, block: Block) -> None:
        with self.lock:
            self._size += block.size
            self.free.append(block)
            while self.free and self._size > self._most:
                self._size -= self.free[0].size  # no call between the two, in which another block may come back
                del self.free[0]


class Lease:
    """What owns an array in recycled memory: when the last view of it is gone, so is this, and the block is free.

    No array itself, or NumPy would have views keep the block in its place.
    """

    __slots__ = ("__array_interface__", "_block", "_give_back")

    def __init__(self, block: Block) -> None:
        self._block, self._give_back = block, recycler.give_back  # the module may go first when the interpreter ends
        self.__array_interface__ = block.interface

    def __del__(self) -> None:
        self._give_back(self._block)


def _kept_bytes() -> int:
    """NBNORM_RECYCLE_BYTES: how much free memory is kept at most; 0 for none."""
    wanted = os.environ.get("NBNORM_RECYCLE_BYTES", "").strip()
    if not wanted:
        return KEPT
    if not wanted.isdecimal():
        raise ValueError(f"NBNORM_RECYCLE_BYTES must be a whole number of bytes; got {wanted!r}")
    return int(wanted)


recycler = Recycler(_kept_bytes())


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that is not initialised."""
    size = math.prod(shape) * dtype.itemsize
    if size < SMALL:
        return np.empty(shape, dtype)
    if size < LARGE:
        return aligned(shape, dtype)
    return np.ndarray(shape, dtype, np.asarray(Lease(recycler.take(size))))


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The same in memory of its own, whatever its size."""
    block = np.empty(math.prod(shape) * dtype.itemsize + LINE, np.uint8)
    return np.ndarray(shape, dtype, block, -block.ctypes.data % LINE)


def streams(y: Array, row: int, least: int) -> bool:
    """Whether y, written in rows of so many elements, shall go past the caches: whole lines can, and arrays of `least`
    bytes gain.

    An ordinary store reads the line that it overwrites.
    """
    return STREAMING and y.nbytes >= least and row * y.itemsize % LINE == 0 and y.ctypes.data % LINE == 0
