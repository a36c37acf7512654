"""Statistics and normalization of .npy files larger than memory, in blocks of the file's own order.

Blocks are read into one buffer. A memory map would do without it, but its pages count as the process's memory, and a
disk that fails ends the process in place of an exception.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nbnorm.arrays import DTYPES, bfloat16, dtype_name
from nbnorm.checks import check_index
from nbnorm.npy import read_header
from nbnorm.ops import batch_norm, moments
from nbnorm.statistics import Float64s, Moments

BLOCK_BYTES = 4 << 20  # a file of 1 GiB in the page cache takes 0.26, 0.13, 0.12, 0.12, 0.19 s with 1, 4, 8, 16, 32 MiB
MAX_CHANNELS = 1 << 17  # six statistics of each are in memory, and as many again while two blocks merge

Advance = Callable[[int], object]  # is told how many bytes are done


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """The array in a .npy file, seen as (outer, channels, inner) in C order.

    An array in Fortran order is the transposed one in C order: the same channels, on the axis that many from the end.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    view: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self, file: BinaryIO) -> Iterator[tuple[slice, NDArray[Any]]]:
        """(its channels, a block of shape (outer, channels, inner)), in the order of the file.

        The memory of a block is that of the next one.
        """
        buffer = np.empty(max(BLOCK_BYTES // self.dtype.itemsize, 1), self.dtype)
        file.seek(self.start)
        for channels, shape in block_shapes(self.view, buffer.size):
            block = buffer[: math.prod(shape)]
            read_whole(file, block.view(np.uint8).data)
            yield channels, block.reshape(shape)


def open_array(path: Path, channel_axis: int, plain_is_bfloat16: bool = False) -> ArrayFile:
    """Read and check the header. NumPy writes bfloat16 as two plain bytes, and such are refused unless told.

    Raises
    ------
    ValueError
        If the file is no .npy file of its stated size, its dtype is not one that norms take, or it has no such axis.
    OSError
    """
    if path.exists() and not path.is_file():  # a pipe has no size, and cannot be read twice
        raise ValueError(f"{path} must be a regular file")
    with path.open("rb") as file:
        try:
            header = read_header(file, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    axis = check_index("channel_axis", channel_axis)
    if not -len(header.shape) <= axis < len(header.shape):
        raise ValueError(f"channel axis must be one of the axes of {path}, of shape {header.shape}; got {channel_axis}")
    shape, axis = header.shape, axis % len(header.shape)
    if header.fortran_order:
        shape, axis = shape[::-1], len(shape) - 1 - axis
    if shape[axis] > MAX_CHANNELS:
        raise ValueError(f"channel axis must have at most {MAX_CHANNELS} channels; got {shape[axis]}: is it the batch?")
    view = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    return ArrayFile(path, header.shape, _float_dtype(path, header.dtype, plain_is_bfloat16), header.start, view)


def _float_dtype(path: Path, stored: np.dtype[Any], plain_is_bfloat16: bool) -> np.dtype[Any]:
    if stored.str == "|V2":
        if not plain_is_bfloat16:
            raise ValueError(f"{path} has elements of two plain bytes; if they are bfloat16, say --bfloat16")
        return bfloat16(str(path))
    if not dtype_name(stored):
        raise ValueError(f"{path} must be of dtype {', '.join(DTYPES)}; got {stored}: convert it first")
    return stored


def block_shapes(view: tuple[int, int, int], size: int) -> Iterator[tuple[slice, tuple[int, int, int]]]:
    """Cut (outer, channels, inner) into runs of at most `size` elements, each a box: (its channels, its shape).

    As many whole outer steps as fit; where not even one does, as many channels of it; else pieces of one channel.
    """
    outer, channels, inner = view
    if not outer * channels * inner:
        return
    if channels * inner <= size:
        for run in _runs(outer, size // (channels * inner)):
            yield slice(0, channels), (len(run), channels, inner)
    elif inner <= size:
        for _, run in itertools.product(range(outer), _runs(channels, size // inner)):
            yield slice(run.start, run.stop), (1, len(run), inner)
    else:
        for _, channel, run in itertools.product(range(outer), range(channels), _runs(inner, size)):
            yield slice(channel, channel + 1), (1, 1, len(run))


def _runs(length: int, most: int) -> list[range]:
    return [range(begin, min(begin + most, length)) for begin in range(0, length, most)]


def read_whole(file: BinaryIO, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        if not count:
            raise ValueError(f"{file.name} ended early: somebody has cut it while it was read")
        done += count


# ---- statistics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Of each channel, (C,). Extremes are NaN where an element is, and Inf and -Inf where there is none."""

    moments: Moments
    least: Float64s
    most: Float64s
    nonfinite: NDArray[np.int64]  # how many elements are NaN or Inf


def channel_statistics(source: ArrayFile, advance: Advance) -> ChannelStatistics:
    """Statistics of each channel, in one pass: those of the blocks, merged in their order."""
    channels = source.view[1]
    parts: list[NDArray[Any]] = [np.zeros(channels, np.int64), *(np.zeros(channels) for _ in range(3))]  # of Moments
    least, most = np.full(channels, np.inf), np.full(channels, -np.inf)
    nonfinite = np.zeros(channels, np.int64)
    wide = np.dtype(np.float64 if source.dtype.itemsize == 8 else np.float32)  # NumPy's extremes of half types are slow
    with source.path.open("rb", buffering=0) as file:
        for there, block in source.blocks(file):
            values = block.astype(wide, copy=False)
            found = moments(values, axis=(0, 2))
            whole = Moments(*(part[there] for part in parts)).merge(found)
            for part, merged in zip(parts, (whole.count, whole.mean, whole.m2, whole.residual), strict=True):
                part[there] = merged
            least[there] = np.minimum(least[there], values.min(axis=0).min(axis=1))
            most[there] = np.maximum(most[there], values.max(axis=0).max(axis=1))
            if not np.isfinite(found.mean).all():
                nonfinite[there] += np.count_nonzero(~np.isfinite(values), axis=(0, 2))
            advance(block.nbytes)
    return ChannelStatistics(Moments(*parts), least, most, nonfinite)


# ---- normalization ---------------------------------------------------------------------------------------------------


def check_statistics(source: ArrayFile, stats: Moments, eps: float) -> None:
    """ValueError where the statistics cannot normalize the file's channels."""
    if stats.mean.shape != source.view[1:2]:
        raise ValueError(
            f"statistics must be those of {source.view[1]} channels, as {source.path} has; got shape {stats.mean.shape}"
        )
    if not np.all(stats.count):
        raise ValueError(
            f"statistics of channel {int(np.argmin(stats.count))} must have elements behind them; got none"
        )
    if eps == 0 and not stats.m2.all():
        raise ValueError(f"eps must be above 0, as the variance of channel {int(np.argmin(stats.m2))} is 0; got 0")


def normalize(source: ArrayFile, target: BinaryIO, stats: Moments, eps: float, advance: Advance) -> None:
    """Write ``(x - mean) / sqrt(var + eps)`` as a .npy file of the same header, with the biased variance.

    The statistics are such as `check_statistics` lets pass.
    """
    mean, var = stats.mean, stats.var()
    result = np.empty(0, source.dtype)
    with source.path.open("rb", buffering=0) as file:
        target.write(file.read(source.start))
        for there, block in source.blocks(file):
            if result.size < block.size:
                result = np.empty(block.size, source.dtype)
            y = result[: block.size].reshape(block.shape)
            batch_norm(block, mean[there], var[there], eps=eps, out=y)
            target.write(y.view(np.uint8).data)
            advance(block.nbytes)
