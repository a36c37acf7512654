"""Headers of .npy files, which are believed only where the file's size agrees.

The format is NEP 1's (https://numpy.org/neps/nep-0001-npy-format.html); NumPy itself reads the header.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np

MAX_HEADER = 10_000  # characters, as in numpy.load: an ordinary header has about 100
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True, slots=True)
class Header:
    """What a .npy file says of its array. `start` is the offset in bytes of the first element."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    start: int


def read_header(file: BinaryIO, size: int) -> Header:
    """The header of a .npy file of `size` bytes that begins at offset 0; ValueError where it is none.

    Its shape is then known to fill the file; no memory is taken for the array before.
    """
    version = np.lib.format.read_magic(file)
    if version not in _READERS:  # version 3 is for names of fields, which an array of numbers has not
        raise ValueError(f"version of the .npy format must be 1.0 or 2.0; got {'.'.join(map(str, version))}")
    try:
        shape, fortran_order, dtype = _READERS[version](file, max_header_size=MAX_HEADER)
    except (IndexError, KeyError, MemoryError, RecursionError, SyntaxError, TokenError, TypeError) as error:
        raise ValueError(f"header of the .npy file cannot be read: {error}") from error  # from NumPy's own parsing
    if any(length < 0 for length in shape):
        raise ValueError(f"shape must not be negative; got {shape}")
    start = file.tell()
    expected = start + math.prod(shape) * dtype.itemsize
    if size != expected:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} must fill {expected} bytes; the file has {size}")
    return Header(shape, fortran_order, dtype, start)
