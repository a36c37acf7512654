"""Running statistics as one value: what they are, how a batch enters them, and what is known of their history."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nbnorm.arrays import read_only
from nbnorm.checks import check_index, check_number
from nbnorm.errors import StateError
from nbnorm.statistics import Float64s, Moments

UNKNOWN = math.nan


@dataclass(frozen=True, slots=True, eq=False)
class RunningStatistics:
    """A mean and a variance for each channel, in float64, and what is known of how they came about.

    Immutable: `update` returns new ones, so a failure leaves those before it as they were.

    Parameters
    ----------
    mean, var : arrays (C,)
    ddof : 0 or 1
        Whether `var` is made of biased or of unbiased variances of batches.
    batches : int or array of int, broadcastable to (2, C)
        Batches that have entered each mean and each variance.
    initial_weight : float or array, broadcastable to (2, C)
        Weight that the initial mean 0 and variance 1 still have; NaN where that is not known.
    elements_per_batch : int, inf or None
        Elements of each channel in every batch, where there was one such number; None where there was not, or it is not
        known. Infinity for the statistics of a whole data set: its variance is the same by either `ddof`.

    Raises
    ------
    ValueError
        If shapes differ, a number is not finite, or a variance or a count is negative.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> start = nbnorm.RunningStatistics.initial(1)
    >>> batch = nbnorm.moments(np.array([[1.0], [3.0]]), axis=0)
    >>> after = start.update(batch, momentum=0.1)
    >>> after.mean.tolist(), after.var.tolist(), after.num_batches_tracked, after.initial_weight[0].tolist()
    ([0.2], [1.1], 1, [0.9])
    """

    mean: Float64s
    var: Float64s
    ddof: int = 1
    batches: Any = 0  # after construction an array (2, C), as is initial_weight
    initial_weight: Any = UNKNOWN
    elements_per_batch: float | None = None

    def __post_init__(self) -> None:
        mean, var = np.array(self.mean, np.float64), np.array(self.var, np.float64)
        if mean.ndim != 1 or mean.shape != var.shape:
            raise ValueError(f"mean and var must have one shape (channels,); got {mean.shape} and {var.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
            _refuse(mean, var)
        if check_index("ddof", self.ddof) not in (0, 1):
            raise ValueError(f"ddof must be 0 or 1; got {self.ddof}")
        batches, weight = np.asarray(self.batches), np.asarray(self.initial_weight, np.float64)
        if batches.dtype.kind not in "iu" or (batches < 0).any():
            raise ValueError(f"batches must be whole numbers from 0; got {self.batches!r}")
        if ((weight < 0) | (weight > 1)).any():
            raise ValueError(f"initial_weight must be from 0 to 1, or NaN; got {self.initial_weight!r}")
        check_elements(self.elements_per_batch)
        object.__setattr__(self, "mean", read_only(mean))
        object.__setattr__(self, "var", read_only(var))
        object.__setattr__(self, "batches", read_only(_full(batches.astype(np.int64, copy=False), mean)))
        object.__setattr__(self, "initial_weight", read_only(_full(weight, mean)))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # copied arrays could be written to

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def initial(cls, channels: int, ddof: int = 1) -> Self:
        """Mean 0 and variance 1, before the first batch."""
        return cls(np.zeros(channels), np.ones(channels), ddof, initial_weight=1.0)

    @classmethod
    def of(cls, moments: Moments, ddof: int = 1, batches: int = 1) -> Self:
        """The statistics of a whole data set, seen in so many batches.

        The variance is that of the data set itself, ``m2 / count``, whatever `ddof` later batches have.

        Parameters
        ----------
        moments : Moments of shape (C,), each of two elements or more
        """
        mean_and_var, known = moments.per_channel(moments.mean.shape, ddof=0)
        if not known.all():
            few = np.flatnonzero(~known.all(axis=0)).tolist()
            raise ValueError(f"moments must have at least 2 elements in each channel; channels {few} have fewer")
        mean, var = mean_and_var
        return cls(mean, var, ddof, batches, 0.0, math.inf)

    @classmethod
    def mixture(cls, parts: Sequence[RunningStatistics], weights: Sequence[float] | None = None) -> RunningStatistics:
        """Statistics of a mixture of populations: the variance has that of the means in it.

        Parameters
        ----------
        parts : RunningStatistics of one number of channels and one ddof
        weights : numbers from 0, or None
            Share of each; without them by batches, channel by channel.
        """
        if not parts:
            raise ValueError("parts must have at least one RunningStatistics; got none")
        first = parts[0]
        if any(part.mean.shape != first.mean.shape or part.ddof != first.ddof for part in parts):
            came = [(part.mean.size, part.ddof) for part in parts]
            raise ValueError(f"parts must agree in channels and ddof; got {came}")
        if weights is None:
            shares = np.stack([part.batches for part in parts]).astype(np.float64)
        else:
            given = np.array([check_number("weights", weight) for weight in weights])
            if given.shape != (len(parts),) or (given < 0).any() or not given.any():
                raise ValueError(f"weights must be {len(parts)} numbers from 0, not all 0; got {list(weights)}")
            shares = np.broadcast_to(given[:, None, None], (len(parts), *first.batches.shape))
        total = shares.sum(axis=0)
        shares = np.divide(shares, total, out=np.full(shares.shape, 1.0 / len(parts)), where=total > 0)
        means = np.stack([part.mean for part in parts])
        mean = (shares[:, 0] * means).sum(axis=0)
        var = (shares[:, 1] * (np.stack([part.var for part in parts]) + (means - mean) ** 2)).sum(axis=0)
        initial = np.stack([part.initial_weight for part in parts])
        initial = np.where(shares > 0, shares * initial, 0.0).sum(axis=0).clip(0, 1)
        return cls(mean, var, first.ddof, np.sum([part.batches for part in parts], axis=0), initial)

    @property
    def num_batches_tracked(self) -> int:
        """Batches that have entered."""
        return int(self.batches.max(initial=0))

    def update(self, batch: Moments, momentum: float | None = 0.1, *, zero_debias: bool = False) -> Self:
        """The statistics after one more batch.

        Parameters
        ----------
        batch : Moments of shape (C,), or (N, C) for instances, which are averaged
            A channel without elements keeps both values; one with a single element keeps its variance.
        momentum : float from 0 to 1, or None
            Weight of the new batch; None for the plain average of all batches.
        zero_debias : bool
            Leave the initial values no weight: after t batches the newest weighs momentum / (1 - (1 - momentum)**t), as
            in Adam (Kingma and Ba, 2015).

        Raises
        ------
        ValueError
            If a sum of squares is negative, or a result would not be finite.
        """
        if (batch.m2 < 0).any():
            raise ValueError(f"batch must have m2 of at least 0; got {float(batch.m2.min())}")
        found, known = batch.per_channel(self.mean.shape, self.ddof)
        batches = self.batches + known
        step = np.where(known, _step(check_momentum(momentum), batches, zero_debias), 0.0)
        old = np.array((self.mean, self.var))
        with np.errstate(over="ignore", invalid="ignore"):  # a result that is not finite is refused
            new = np.where(known, (1.0 - step) * old + step * found, old)
        weight = self.initial_weight * (1.0 - step)
        count = self.elements_per_batch
        if known[1].any():
            common = _common_count(batch)
            fresh = (self.initial_weight[1] == 1).all()
            count = common if fresh or common == count else None
        mean, var = new
        return type(self)(mean, var, self.ddof, batches, weight, count)

    def with_ddof(self, ddof: int, elements_per_batch: float | None = None) -> Self:
        """The statistics as they would be with biased (0) or unbiased (1) variances of the same batches.

        Parameters
        ----------
        ddof : 0 or 1
        elements_per_batch : int or None
            Elements of each channel in every batch, where the statistics do not know it.

        Raises
        ------
        StateError
            If what is needed for an exact result is not known: one number of elements for all batches, and the weight
            that the initial variance still has.
        """
        if ddof == self.ddof:
            return self
        count = self.elements_per_batch
        if count is None:
            count = check_elements(elements_per_batch)
        elif elements_per_batch not in (None, count):
            raise StateError(f"elements_per_batch must be {count}, as the statistics know; got {elements_per_batch}")
        exact = f"var of ddof {self.ddof} has no exact one of ddof {ddof}"
        initial = self.initial_weight[1]  # times the initial variance, which is 1
        if not (initial == 1).all() and count is None:
            raise StateError(
                f"{exact}: elements_per_batch is missing, a number from 2 (batches were of different sizes, or it was "
                f"not recorded); got {count}"
            )
        if not np.isfinite(initial).all():
            raise StateError(f"{exact}: the weight of its initial value is missing, which follows from num_batches")
        bessel = 1.0 if count in (None, math.inf) else count / (count - 1)
        factor = bessel if ddof else 1.0 / bessel
        return replace(self, var=np.maximum((self.var - initial) * factor + initial, 0.0), ddof=ddof)

    def history(self) -> dict[str, str]:
        """Everything but mean and variance, as text; JSON numbers, or lists where channels differ."""
        return {
            "ddof": str(self.ddof),
            "batches": _text(self.batches),
            "initial_weight": _text(self.initial_weight),
            "elements_per_batch": json.dumps(self.elements_per_batch),
        }

    @classmethod
    def from_history(cls, mean: NDArray[Any], var: NDArray[Any], batches: Any, history: Mapping[str, str]) -> Self:
        """The inverse of `history`; what it lacks is not known.

        Raises
        ------
        ValueError
        """
        read = {name: _parsed(name, history[name]) for name in HISTORY if name in history}
        made = cls(mean, var, **({"batches": batches} | read))
        if (np.asarray(batches) != made.num_batches_tracked).any():
            raise ValueError(
                f"num_batches_tracked must be {made.num_batches_tracked}, as its history says; got {batches}"
            )
        return made


HISTORY = ("ddof", "batches", "initial_weight", "elements_per_batch")


def check_momentum(momentum: float | None) -> float | None:
    """A weight from 0 to 1, or None for the average of all batches."""
    if momentum is not None and not 0 <= check_number("momentum", momentum) <= 1:
        raise ValueError(f"momentum must be from 0 to 1, or None; got {momentum}")
    return momentum


def check_elements(count: float | None) -> float | None:
    """A number of elements that has a variance: whole, from 2; infinity, or None."""
    if count is not None and count != math.inf and check_index("elements_per_batch", count) < 2:
        raise ValueError(f"elements_per_batch must be at least 2, or None; got {count}")
    return count


def _step(momentum: float | None, batches: NDArray[np.int64], zero_debias: bool) -> Any:
    """The weight of the newest of so many batches."""
    if momentum is None:
        return 1.0 / np.maximum(batches, 1)
    if not zero_debias or momentum in (0, 1):
        return momentum
    return np.minimum(momentum / -np.expm1(np.maximum(batches, 1) * math.log1p(-momentum)), 1.0)


def _common_count(batch: Moments) -> int | None:
    """Elements of each variance in the batch, where there is one number."""
    counts = np.asarray(batch.count)
    counts = counts[counts > 1]
    return int(counts[0]) if counts.size and (counts == counts[0]).all() else None


def _full(values: NDArray[Any], mean: Float64s) -> NDArray[Any]:
    """As an array (2, C), for the mean and the variance."""
    return values if values.shape == (2, *mean.shape) else np.broadcast_to(values, (2, *mean.shape))


def _refuse(mean: Float64s, var: Float64s) -> None:
    for name, values in (("mean", mean), ("var", var)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite; got {_first(values, ~np.isfinite(values))}")
    raise ValueError(f"var must not be negative; got {_first(var, var < 0)}")


def _first(values: Float64s, where: NDArray[np.bool_]) -> str:
    channel = int(np.flatnonzero(where)[0])
    return f"{float(values[channel])} in channel {channel}"


def _text(values: NDArray[Any]) -> str:
    distinct = np.unique(values)  # in which NaN counts as one
    return json.dumps(distinct[0].item() if distinct.size == 1 else values.tolist())


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be JSON; got {text!r}") from error
