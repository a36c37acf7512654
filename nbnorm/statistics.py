"""Moments that merge to those of the whole, within rounding.

The merge is the pairwise update of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances" (1979), the parallel form of Welford's method. The mean carries a residual, the part
below float64's last place: at mean 1e8 and standard deviation 1 a float64 mean alone is known to 1e-8, and the
product of that error with the distance of two means would leave the merged variance about nine digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm.arrays import float_view
from nbnorm.checks import check_number

Float64s = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of one or many sets of numbers.

    Immutable; a commutative monoid under `merge`, with count 0 as the identity.

    Parameters
    ----------
    count : int or array of int
        Elements behind each statistic, broadcastable to `mean`.
    mean : array of float64
    m2 : array of float64, like `mean`
        Sum of squared deviations from the mean.
    residual : array of float64, like `mean`
        ``mean + residual`` is the mean to more than float64 precision.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.arange(6.0)
    >>> a, b = nbnorm.moments(x[:2], axis=0), nbnorm.moments(x[2:], axis=0)
    >>> whole = a.merge(b)
    >>> int(whole.count), float(whole.mean), float(whole.var(ddof=1))
    (6, 2.5, 3.5)
    """

    count: Any
    mean: Float64s
    m2: Float64s
    residual: Any = 0.0  # after construction an array like mean

    def __post_init__(self) -> None:
        count = np.asarray(self.count)
        if count.dtype.kind not in "iu":
            raise TypeError(f"count must be whole numbers; got dtype {count.dtype}")
        if (count < 0).any():
            raise ValueError(f"count must not be negative; got {self.count!r}")
        mean, m2 = np.asarray(self.mean, np.float64), np.asarray(self.m2, np.float64)
        if mean.shape != m2.shape:
            raise ValueError(f"mean and m2 must have one shape; got {mean.shape} and {m2.shape}")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "m2", m2)
        residual = np.asarray(self.residual, np.float64)
        if residual.shape != mean.shape:
            residual = np.broadcast_to(residual, mean.shape)
        object.__setattr__(self, "residual", residual)

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of both sets. Cost: a few operations per statistic.

        Parameters
        ----------
        other : Moments
            Of the same shape.

        Returns
        -------
        Moments
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other must be Moments; got {type(other).__name__}")
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"other must have shape {self.mean.shape} as these moments have; got {other.mean.shape}")
        count = np.add(self.count, other.count)
        share = np.divide(other.count, count, out=np.zeros(np.shape(count)), where=count != 0)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf in the data stay NaN and Inf, in silence
            distance = (other.mean - self.mean) + np.subtract(other.residual, self.residual)
            m2 = self.m2 + other.m2 + distance * distance * (share * self.count)
            step = self.residual + distance * share
            mean = self.mean + step
            residual = _rounding_error(self.mean, step, mean)

        def pick(mine: Float64s, theirs: Float64s, merged: Float64s) -> Float64s:
            """Count 0 is the identity, to the last bit."""
            return np.where(np.equal(self.count, 0), theirs, np.where(np.equal(other.count, 0), mine, merged))

        return Moments(
            count,
            pick(self.mean, other.mean, mean),
            pick(self.m2, other.m2, m2),
            pick(self.residual, other.residual, residual),
        )

    def var(self, ddof: int = 0) -> Float64s:
        """Variance, ``m2 / (count - ddof)``: NaN where there are not more than `ddof` elements."""
        freedom = np.asarray(np.subtract(self.count, ddof), np.float64)
        return np.asarray(np.divide(self.m2, freedom, out=np.full(self.m2.shape, np.nan), where=freedom > 0))

    def std(self, ddof: int = 0) -> Float64s:
        """Standard deviation, the square root of `var`."""
        return np.asarray(np.sqrt(self.var(ddof)))

    def update(self, running_mean: Any, running_var: Any, momentum: float = 0.1) -> tuple[Any, Any]:
        """Running statistics after one more batch, as new arrays; nothing is written.

        ``new = (1 - momentum) * old + momentum * batch`` in float64, with the batch's mean and its unbiased
        variance, PyTorch's convention. Leading axes that the running arrays lack (the instances of instance norm)
        are averaged. A channel without elements keeps both values; one with a single element keeps its variance.

        Parameters
        ----------
        running_mean, running_var : arrays of one shape, the trailing axes of `mean`
        momentum : float
            Weight of the new batch.

        Returns
        -------
        (running_mean, running_var) : arrays of the kind and dtype of the inputs.
        """
        mean_kind, mean, _ = float_view(running_mean, "running_mean")
        var_kind, var, _ = float_view(running_var, "running_var")
        new_mean, new_var = self.blend(mean, var, momentum)
        return mean_kind.wrap(new_mean, running_mean), var_kind.wrap(new_var, running_var)

    def blend(
        self, running_mean: NDArray[Any], running_var: NDArray[Any], momentum: float
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """`update` for NumPy arrays, in their own dtype (native byte order)."""
        if running_mean.shape != running_var.shape:
            shapes = f"{running_mean.shape} and {running_var.shape}"
            raise ValueError(f"running_mean and running_var must have one shape; got {shapes}")
        momentum = check_number("momentum", momentum)
        if np.ndim(self.count) == 0 and self.count > 1 and self.mean.shape == running_mean.shape:
            var = self.m2 / (self.count - 1)  # all is known: what follows would come to the same, in 25 us more
            return _weighed(running_mean, self.mean, momentum), _weighed(running_var, var, momentum)
        batch, known = self.per_channel(running_mean.shape, ddof=1)
        mean, var = (
            _blend(old, new, there, momentum)
            for old, new, there in zip((running_mean, running_var), batch, known, strict=True)
        )
        return mean, var

    def per_channel(self, shape: tuple[int, ...], ddof: int) -> tuple[Float64s, NDArray[np.bool_]]:
        """What a batch gives to running statistics of `shape`: (mean and variance, which of them are known).

        Both are of shape ``(2, *shape)``. Leading axes that `shape` lacks are averaged over, where known: a mean takes
        one element, a variance two.
        """
        if self.mean.shape[self.mean.ndim - len(shape) :] != shape:
            had = self.mean.shape[-1:]
            raise ValueError(f"running statistics must have shape {had}, as the moments have; got {shape}")
        count = np.broadcast_to(self.count, self.mean.shape)
        known = np.array((count > 0, count > 1))
        values = np.where(known, (self.mean, self.var(ddof)), 0.0)
        leading = tuple(range(1, 1 + self.mean.ndim - len(shape)))
        if not leading:
            return values, known
        parts = known.sum(axis=leading)
        with np.errstate(over="ignore", invalid="ignore"):  # NaN and Inf in the data stay, in silence
            return np.asarray(values.sum(axis=leading) / np.maximum(parts, 1)), np.asarray(parts > 0)


def _blend(old: NDArray[Any], new: Float64s, known: NDArray[np.bool_], momentum: float) -> NDArray[Any]:
    """(1 - momentum) * old + momentum * new where that is known, in the dtype of `old`."""
    return np.where(known, _weighed(old, new, momentum), old)


def _weighed(old: NDArray[Any], new: Float64s, momentum: float) -> NDArray[Any]:
    """(1 - momentum) * old + momentum * new, in float64; what old's dtype cannot hold becomes Inf, in silence."""
    with np.errstate(over="ignore", invalid="ignore"):
        blended = (1.0 - momentum) * old.astype(np.float64) + momentum * new
        return np.asarray(blended).astype(old.dtype.newbyteorder("="))


def _rounding_error(a: Float64s, b: Any, total: Float64s) -> Float64s:
    """What ``total = a + b`` lost, exactly (Knuth's TwoSum)."""
    back = total - a
    error = (a - (total - back)) + (b - back)
    return np.where(np.isfinite(total), error, 0.0)


def from_statistics(mean: Any, var: Any, count: Any) -> Moments:
    """Moments from a mean, a biased variance and a count."""
    mean64, var64 = np.asarray(mean, np.float64), np.asarray(var, np.float64)
    counts = np.asarray(count)
    if mean64.shape != var64.shape:
        raise ValueError(f"mean and var must have one shape; got {mean64.shape} and {var64.shape}")
    if (var64 < 0).any():
        raise ValueError(f"var must not be negative; got {float(var64.min())}")
    with np.errstate(invalid="ignore"):
        return Moments(counts, mean64, var64 * counts)
