"""Dropout whose choice follows from a seed and the element's place alone, so that nothing of it need be kept."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 65536  # elements chosen at a time: their random bits stay in the cache
PER_COUNTER = 8  # 32-bit numbers that Philox makes of one value of its counter


@dataclass(frozen=True, slots=True)
class Dropout:
    """Sets elements to 0 with probability p, and multiplies the others by 1 / (1 - p).

    Element i, in C order of the indices, depends on the i-th 32-bit number of the counter-based generator Philox 4x64
    (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) with the key `seed`.
    """

    p: float
    seed: int

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array itself, changed in place; its memory may have any order."""
        if not self.p:
            return array
        factor = 0.0 if self.p == 1 else 1 / (1 - self.p)
        rows = array.reshape(-1) if array.flags.c_contiguous else array
        per_row = array.size // max(len(rows), 1)
        step = max(1, BLOCK // max(per_row, 1))
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            kept = self._kept(begin * per_row, part.size).reshape(part.shape)
            with np.errstate(over="ignore", invalid="ignore"):
                part[...] = np.where(kept, part.astype(np.float64) * factor, 0)
        return array

    def _kept(self, begin: int, count: int) -> NDArray[np.bool_]:
        """The choice for elements [begin, begin + count)."""
        first, skipped = divmod(begin, PER_COUNTER)
        words = -(-(skipped + count) // PER_COUNTER) * (PER_COUNTER // 2)
        bits = np.random.Philox(key=self.seed, counter=first).random_raw(words).astype("<u8", copy=False).view("<u4")
        return np.asarray(bits[skipped : skipped + count] >= round(self.p * 2**32))


@cache
def warn_of_variance_shift() -> None:
    """Once a process, at the line that called nbnorm."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("nbnorm."):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        "dropout before batch norm: in training its zeros and its factor raise the variance that the running "
        "statistics learn, and in evaluation, without dropout, they normalize with a variance that is too large; put "
        "dropout behind the last batch norm",
        stacklevel=level,
    )
