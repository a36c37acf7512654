"""The streaming accumulator: moments of batches, merged as they come."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbnorm.ops import moments
from nbnorm.statistics import Float64s, Moments, from_statistics


class Welford:
    """Streaming mean and variance over batches of any size; merging loses no accuracy.

    Each batch's moments come from a backend (float64, shifted sums) and join by the pairwise merge.

    Parameters
    ----------
    moments : Moments
        What has been seen before, such as `nbnorm.state.read_moments` gives; nothing without it.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> w = nbnorm.Welford()
    >>> for batch in np.split(np.arange(12.0).reshape(6, 2), [1, 3]):
    ...     w.update(batch)
    >>> w.count, w.mean.tolist(), w.var().tolist()
    (6, [5.0, 6.0], [11.666666666666666, 11.666666666666666])
    """

    def __init__(self, moments: Moments | None = None) -> None:
        if moments is not None and not isinstance(moments, Moments):
            raise TypeError(f"moments must be Moments; got {type(moments).__name__}")
        self._moments = moments

    @classmethod
    def from_moments(cls, mean: Any, var: Any, count: int) -> Welford:
        """An accumulator that has already seen `count` samples of the given mean and biased variance.

        Examples
        --------
        >>> import nbnorm
        >>> nbnorm.Welford.from_moments([1.0], [4.0], 10).var(ddof=1).tolist()
        [4.444444444444445]
        """
        return cls(from_statistics(mean, var, count))

    @property
    def moments(self) -> Moments | None:
        """The moments so far; None before the first batch."""
        return self._moments

    @property
    def count(self) -> int:
        """Samples seen."""
        return 0 if self._moments is None else int(np.max(self._moments.count))

    @property
    def mean(self) -> Float64s:
        """Mean over the samples seen, of the shape of one sample."""
        return self._seen().mean

    def var(self, ddof: int = 0) -> Float64s:
        """Variance over the samples seen; see `Moments.var`."""
        return self._seen().var(ddof)

    def update(self, batch: Any) -> None:
        """Add a batch: samples lie along axis 0; an empty one changes nothing."""
        self._join(moments(batch, axis=0))

    def merge(self, other: Welford) -> None:
        """Add everything that `other` has seen."""
        if not isinstance(other, Welford):
            raise TypeError(f"other must be a Welford; got {type(other).__name__}")
        if other._moments is not None:
            self._join(other._moments)

    def _join(self, new: Moments) -> None:
        self._moments = new if self._moments is None else self._moments.merge(new)

    def _seen(self) -> Moments:
        if self._moments is None:
            raise ValueError("no batch yet: call update first")
        return self._moments
