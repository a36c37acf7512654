"""What a call may add to a norm, in the form that both families of kernels take it from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbnorm.arrays import read_only
from nbnorm.backend import Epilogue
from nbnorm_backends.numba_cpu.activations import TAGS, Tag

Array = NDArray[Any]


class Options(NamedTuple):
    """Arrays have five axes; those of the mask are 1 or full."""

    residual: Array | None
    mask: Array | None  # uint8
    before: Tag
    after: Tag


class Joined(NamedTuple):
    """total = source + addend, made on the way to the norm of the total; three times None where nothing is added."""

    source: Array | None
    addend: Array | None
    total: Array | None


NOTHING_JOINED = Joined(None, None, None)


def options_of(mask: Array | None, epilogue: Epilogue) -> Options:
    flags = None if mask is None else read_only(mask.view(np.uint8))
    return Options(epilogue.residual, flags, TAGS[epilogue.before], TAGS[epilogue.after])


def with_rows(mask: Array | None, size: int) -> tuple[Array, Array] | None:
    """A mask as kernels take it: beside it, where its rows hold for `size` elements, a row of zeros and one of ones."""
    if mask is None:
        return None
    constant = np.zeros((2, size if mask.shape[-1] != size else 0), np.uint8)
    constant[1] = 1
    return mask, constant
