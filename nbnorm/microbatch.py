"""Batch norm of a batch that comes in parts: two passes forward and two backward, as exact as of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm.arguments import check_axis
from nbnorm.arrays import Array, adapter_of
from nbnorm.backend import Backend
from nbnorm.checks import check_index
from nbnorm.engine import Call, GivenNorm, check_like
from nbnorm.operation import prepared
from nbnorm.ops import batch_norm, moments
from nbnorm.statistics import Moments


class MicroBatchNorm:
    """Training-mode batch norm of one batch in parts, which need not be in memory together.

    The statistics of a batch are known after all of it was seen, and so are the sums that its gradient needs. So each
    direction takes two passes over the parts: `measure` all, then `normalize` each; `measure_gradient` all, then
    `gradient` of each. Results are those of the whole batch, within rounding; gradient accumulation over parts that
    normalize themselves is another function of other gradients.

    Parameters
    ----------
    weight, bias : arrays (C,) or None
    eps : float
    channel_axis : int
    backend : str or Backend
        As for `batch_norm`.

    Attributes
    ----------
    moments : Moments or None
        Of all parts so far; `Moments.update` takes them into running statistics.

    Notes
    -----
    x is read once in each pass. What synchronized batch norm does over processes: Peng et al., "MegDet: A Large
    Mini-Batch Object Detector" (2018).

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> parts = np.array([[1.0], [2.0]]), np.array([[6.0]])
    >>> norm = nbnorm.MicroBatchNorm(np.ones(1), eps=1e-9)
    >>> for x in parts:
    ...     norm.measure(x)
    >>> [norm.normalize(x).round(3).tolist() for x in parts]
    [[[-0.926], [-0.463]], [[1.389]]]
    >>> dys = np.array([[1.0], [0.0]]), np.array([[0.0]])
    >>> for x, dy in zip(parts, dys):
    ...     norm.measure_gradient(x, dy)
    >>> [norm.gradient(x, dy).round(3).tolist() for x, dy in zip(parts, dys)]
    [[[0.176], [-0.22]], [[0.044]]]
    >>> norm.grads["weight"].round(3).tolist()
    [-0.926]
    """

    def __init__(
        self,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-5,
        *,
        channel_axis: int = 1,
        backend: str | Backend | None = None,
    ) -> None:
        self._params = weight, bias
        self._keys: dict[str, Any] = {"eps": eps, "channel_axis": channel_axis, "backend": backend}
        self._channel_axis = check_index("channel_axis", channel_axis)
        self.moments: Moments | None = None
        self._sums: list[NDArray[np.float64]] | None = None
        self._phase = "measure"

    def measure(self, x: Array) -> None:
        """The first pass forward: let the statistics of a part join.

        Parameters
        ----------
        x : array (N, C, ...), or with the channels on `channel_axis`
        """
        self._enter("measure")
        found = moments(x, axes_but(x, self._channel_axis), backend=self._keys["backend"])
        self.moments = found if self.moments is None else self.moments.merge(found)

    def normalize(self, x: Array) -> Array:
        """The second pass forward: y of a part, by the statistics of all.

        Raises
        ------
        RuntimeError
            If nothing was measured.
        ValueError
            If all parts together have one value per channel.
        """
        self._enter("normalize")
        return self._call(x).forward()

    def measure_gradient(self, x: Array, dy: Array) -> None:
        """The first pass backward: let the sums of a part join; after `gradient`, those of another gradient begin.

        Parameters
        ----------
        x : array
            The part, as it was.
        dy : array like x
        """
        self._enter("measure_gradient")
        call = self._call(x)
        cotangent = check_like(call.x, dy, "dy").view
        found = GivenNorm(call).sums(cotangent) if cotangent.size else np.zeros((4, *call.axes.kept_shape))
        if self._sums is None:
            self._sums = [np.array(each) for each in found]
        else:
            for total, each in zip(self._sums, found, strict=True):
                total += each

    def gradient(self, x: Array, dy: Array) -> Array:
        """The second pass backward: dx of a part.

        Raises
        ------
        RuntimeError
            If no gradient was measured.
        """
        self._enter("gradient")
        assert self._sums is not None
        assert self.moments is not None
        call = self._call(x)
        cotangent = check_like(call.x, dy, "dy").view
        if not cotangent.size:
            return call.x.wrap(np.zeros_like(call.x.view))
        k1, k2 = (total / self.moments.count for total in self._sums[:2])
        return call.x.wrap(GivenNorm(call).gradient(cotangent, k1, k2))

    @property
    def grads(self) -> dict[str, Array]:
        """Gradients of weight and bias, of all parts whose gradient was measured."""
        found = {}
        for name, param, place in zip(("weight", "bias"), self._params, (2, 3)):
            if param is not None and self._sums is not None:
                adapter = adapter_of(param, name)
                found[name] = adapter.wrap(self._sums[place].astype(adapter.view(param, name).dtype), param)
        return found

    def _enter(self, step: str) -> None:
        """RuntimeError unless the passes before this one are done; only a gradient may be begun again."""
        if step == "measure" and self._phase != "measure":
            raise RuntimeError("measure must come before all else, for all parts; begin a new MicroBatchNorm")
        if step != "measure" and self.moments is None:
            raise RuntimeError(f"{step} needs measure of all parts before it")
        if step == "gradient" and self._sums is None:
            raise RuntimeError("gradient needs measure_gradient of all parts before it")
        if step == "measure_gradient" and self._phase == "gradient":
            self._sums = None
        self._phase = step

    def _call(self, x: Array) -> Call:
        assert self.moments is not None
        if int(np.max(self.moments.count)) == 1:
            raise ValueError("the parts must have more than 1 value per channel, to have a variance; got 1")
        mean, var = self.moments.mean, self.moments.var()
        if not self.moments.count:
            mean, var = np.zeros_like(mean), np.ones_like(mean)
        call = prepared(batch_norm, (x, mean, var, *self._params), self._keys)
        assert isinstance(call, Call)
        return call


def axes_but(x: Array, channel_axis: int) -> tuple[int, ...]:
    """All axes of x but that of the channels."""
    view = adapter_of(x, "x").view(x, "x")
    channel = check_axis("channel_axis", channel_axis, view)
    return tuple(axis for axis in range(view.ndim) if axis != channel)
