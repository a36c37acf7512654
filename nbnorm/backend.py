"""The contract between nbnorm and its backends. A plugin implements `Backend` and names it in the entry-point
group ``nbnorm.backends``; see the guide "Writing a backend"."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbnorm.statistics import Moments

API_VERSION = 1
ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh")
WHOLE_OPS = ("local_response_norm", "normalize")
View = Any  # a five-axis array (n, r, g, c, s), native to the backend's device
Stats = Any  # float64 (n, g); on a device, whatever its kernels keep


class Request(NamedTuple):
    """What `Backend.reject` decides on. Sizes are not part of it: a backend's thresholds are its own affair."""

    op: str
    device: str
    dtype: str
    center: bool  # False for RMS statistics
    param_axes: tuple[str, ...]  # which of "r", "g", "c" carry weight and bias; () where there are none
    split: bool  # the reduction lies on both sides of the statistics axis g: r > 1 and s > 1
    activation: str | None = None


class Grads(NamedTuple):
    """Gradients by the name of what they belong to; None where there is nothing to differentiate."""

    x: Any
    weight: Any = None
    bias: Any = None
    residual: Any = None


@dataclass(frozen=True, slots=True)
class Saved:
    """What a forward leaves for its backward: references and statistics, no new tensor of x's size."""

    x: View
    mean: Stats | None
    rstd: Stats
    weight: View | None
    param_shape: tuple[int, ...] | None  # shape of the gradients of weight and bias; None: not wanted
    fixed: bool  # the statistics were given (eval): no gradient flows through them
    bias: View | None = None  # only to find again what the activation was applied to
    activation: str | None = None

    @property
    def count(self) -> int:
        _, r, _, c, s = self.x.shape
        return int(r * c * s)


class Backend(ABC):
    """One way to compute every norm. Four methods are required; `forward` and `backward` are composed from them
    and may be overridden by a backend that fuses.

    x, dy, y, dx are five-axis views (n, r, g, c, s), aligned and of native byte order. x may have any strides, dy is
    C-contiguous, and so must be what is returned. x and dy come read-only, also where `out` is x's memory. weight and
    bias are five-axis arrays or None, each axis 1 or full, both of one shape. mean (None without centring) and rstd
    are (n, g).
    """

    api_version: ClassVar[int] = API_VERSION
    name: str
    device: Literal["cpu", "cuda"] = "cpu"

    def reject(self, request: Request) -> str | None:
        """Why this backend cannot serve the request, or None. Pure and cheap: its answers are cached."""
        return None

    @abstractmethod
    def moments(self, x: View, *, center: bool) -> Moments:
        """Statistics over (r, c, s), each (n, g); with ``center=False`` the mean is 0 and m2 is sum(x*x).

        Take deviations from an element of the group first: equal values must give m2 = 0, exactly.
        """

    @abstractmethod
    def apply(
        self, x: View, mean: Stats | None, rstd: Stats, weight: View | None, bias: View | None, *, out: View | None
    ) -> View:
        """y = (x - mean) * rstd * weight + bias, in x's dtype, written to `out` when given (it may be x itself)."""

    @abstractmethod
    def backward_sums(
        self,
        dy: View,
        x: View,
        mean: Stats | None,
        rstd: Stats,
        weight: View | None,
        param_shape: tuple[int, ...] | None,
    ) -> tuple[Stats, Stats, View | None, View | None]:
        """(s1, s2, dweight, dbias): s1 = sum(weight*dy) and s2 = sum(weight*dy*xhat), each (n, g); dweight =
        sum(dy*xhat) and dbias = sum(dy) over the axes where `param_shape` is 1, in float64; both None where it is."""

    @abstractmethod
    def backward_apply(
        self,
        dy: View,
        x: View,
        mean: Stats | None,
        rstd: Stats,
        weight: View | None,
        k1: Stats | None,
        k2: Stats | None,
    ) -> View:
        """dx = rstd * (weight*dy - k1 - xhat*k2), in x's dtype; k1 and k2 are (n, g), None for zero."""

    def forward(
        self,
        x: View,
        weight: View | None,
        bias: View | None,
        eps: float,
        *,
        center: bool,
        stats: tuple[Stats | None, Stats] | None = None,
        activation: str | None = None,
        out: View | None = None,
    ) -> tuple[View, Moments | None, Stats]:
        """(y, moments, rstd), with y = activation(norm(x)); with `stats` = (mean, rstd) given, the moments are None."""
        found = None
        if stats is None:
            found = self.moments(x, center=center)
            stats = found.mean if center else None, reciprocal_std(found.m2 / found.count, eps)
        mean, rstd = stats
        if activation is None:
            return self.apply(x, mean, rstd, weight, bias, out=out), found, rstd
        from nbnorm.activations import activate  # noqa: PLC0415  imports scipy.special, which few calls need

        z = self.apply(_single(x), mean, rstd, weight, bias, out=out if x.dtype.itemsize > 2 else None)
        return activate(activation, z, x.dtype, out=out), found, rstd

    def backward(self, dy: View, saved: Saved) -> Grads:
        """Gradients as five-axis views; those of weight and bias in float64, of shape `saved.param_shape`."""
        if saved.activation is not None:
            from nbnorm.activations import gradient  # noqa: PLC0415  imports scipy.special, which few calls need

            x = _single(saved.x)
            z = self.apply(x, saved.mean, saved.rstd, saved.weight, saved.bias, out=None)
            grads = self.backward(gradient(saved.activation, z, dy), replace(saved, x=x, activation=None))
            return grads._replace(x=grads.x.astype(dy.dtype, copy=False))
        args = dy, saved.x, saved.mean, saved.rstd, saved.weight
        if saved.fixed and saved.param_shape is None:
            return Grads(self.backward_apply(*args, None, None))
        s1, s2, dweight, dbias = self.backward_sums(*args, saved.param_shape)
        k1 = None if saved.fixed or saved.mean is None else s1 / saved.count
        k2 = None if saved.fixed else s2 / saved.count
        return Grads(self.backward_apply(*args, k1, k2), dweight, dbias)

    # ---- whole ops: no norm of one mean and one variance, so a backend has them or has not ------------------------
    # Views of three axes (outer, axis, inner); x and dy read-only, of native byte order and not empty, x of any
    # strides, dy C-contiguous. Results are C-contiguous, of x's dtype, computed in float64.

    whole_ops: ClassVar[frozenset[str]] = frozenset()  # those of WHOLE_OPS that it has

    def local_response_norm(
        self, x: View, window: tuple[int, int], alpha: float, beta: float, k: float, *, out: View | None = None
    ) -> View:
        """y = x / (k + alpha * sum(x*x))**beta, the sum over `window` = (before, after) neighbours along the axis."""
        raise NotImplementedError

    def local_response_norm_backward(
        self, dy: View, x: View, window: tuple[int, int], alpha: float, beta: float, k: float
    ) -> View:
        """dx of `local_response_norm`."""
        raise NotImplementedError

    def normalize(self, x: View, p: float, eps: float, *, out: View | None = None) -> View:
        """y = x / max(norm, eps), with the p-norm along the axis."""
        raise NotImplementedError

    def normalize_backward(self, dy: View, x: View, p: float, eps: float) -> View:
        """dx of `normalize`."""
        raise NotImplementedError


def _single(x: View) -> View:
    """A half type as float32, so that what stands between a norm and its activation is not rounded to half."""
    if x.dtype.itemsize > 2:
        return x
    wide = x.astype(np.float32, order="C")
    wide.flags.writeable = False
    return wide


def reciprocal_std(var: NDArray[np.float64], eps: float) -> NDArray[np.float64]:
    """1 / sqrt(var + eps); inf or NaN where that has no value, in silence, as IEEE 754 says."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1.0 / np.sqrt(var + eps))
