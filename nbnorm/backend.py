"""The contract between nbnorm and its backends. A plugin implements `Backend` and names it in the entry-point
group ``nbnorm.backends``; see the guide "Writing a backend"."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbnorm import composed
from nbnorm.arrays import overlap, read_only
from nbnorm.devices import added
from nbnorm.statistics import Moments

API_VERSION = 1
ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh")
LEAK = 0.01  # slope of leaky_relu below zero, the default of PyTorch
ORDERS = ("norm_act", "act_norm")
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
    order: str | None = None  # "norm_act" or "act_norm"; None without an activation
    residual: bool = False
    mask: bool = False


class Epilogue(NamedTuple):
    """What is joined to a norm: y = activation(norm(x) + residual) in the order "norm_act", and norm(activation(x)) +
    residual in the order "act_norm"."""

    activation: str | None = None
    order: str = "norm_act"
    residual: View | None = None  # of x's dtype, five axes, C-contiguous, read-only

    @property
    def before(self) -> str | None:
        """The activation that is applied to x."""
        return self.activation if self.order == "act_norm" else None

    @property
    def after(self) -> str | None:
        """The activation that is applied to the norm."""
        return self.activation if self.order == "norm_act" else None


PLAIN = Epilogue()


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
    mask: View | None = None
    epilogue: Epilogue = PLAIN
    valid: Any = None  # elements that count in each group (n, g); None: all

    @property
    def count(self) -> Any:
        """Elements behind each statistic: one number, or (n, g) under a mask."""
        _, r, _, c, s = self.x.shape
        return r * c * s if self.valid is None else self.valid


class DeviceMoments(ABC):
    """Moments (n, g) that lie on a device, as the kernels of its backend keep them: what that returns for `Moments`."""

    count: Any  # elements behind each: one number, or (n, g) under a mask
    mean: Stats
    ready: Any = None  # what `Backend.ready` gave before the forward

    @abstractmethod
    def host(self) -> Moments:
        """The same in host memory, for which the host waits."""

    @abstractmethod
    def commit(self) -> None:
        """Move the running statistics of `ready` on the device, in its order of work, as `Moments.update` does."""


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
    takes_host: ClassVar[bool] = False  # copies host arrays to its device and back, where a call names it

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

    # ---- what the engine calls: composed here, and overridden by backends that fuse ---------------------------------

    def ready(self, x: View, running_mean: View, running_var: View, momentum: float, *, masked: bool) -> Any:
        """Of arrays on a device, before the forward of x: what may fail of moving running statistics (g,), done, for
        `DeviceMoments.commit`. A backend that gives such moments has to have it."""
        raise NotImplementedError(f"{type(self).__name__}.ready, for running statistics on a device")

    def fixed_stats(self, mean: View, var: View, eps: float, n: int) -> tuple[Stats, Stats]:
        """`stats` for `forward` from given statistics (g,), which may change later."""
        return fixed_stats(mean, var, eps, n)

    def fuses(self, request: Request) -> bool:
        """Whether the request runs in one pass over memory, or else is composed from the methods above and NumPy."""
        joined = request.mask or request.residual or request.activation is not None
        return not joined and request.op not in ("add_layer_norm", "add_rms_norm")

    def statistics(self, x: View, *, center: bool, mask: View | None = None, epilogue: Epilogue = PLAIN) -> Moments:
        """`moments` of the elements that count, after the activation where that comes first."""
        if mask is None and epilogue.before is None:
            return self.moments(x, center=center)
        return composed.statistics(self, x, center, mask, epilogue)

    def forward(
        self,
        x: View,
        weight: View | None,
        bias: View | None,
        eps: float,
        *,
        center: bool,
        stats: tuple[Stats | None, Stats] | None = None,
        mask: View | None = None,
        epilogue: Epilogue = PLAIN,
        out: View | None = None,
    ) -> tuple[View, Moments | None, Stats]:
        """(y, moments, rstd); with `stats` = (mean, rstd) given, the moments are None."""
        found = None
        if stats is None:
            found = self.statistics(x, center=center, mask=mask, epilogue=epilogue)
            stats = found.mean if center else None, masked_rstd(found, eps)
        mean, rstd = stats
        if mask is None and epilogue.activation is None and epilogue.residual is None:
            return self.apply(x, mean, rstd, weight, bias, out=out), found, rstd
        return composed.apply(self, x, mean, rstd, weight, bias, mask, epilogue, out), found, rstd

    def repeated(
        self,
        x: View,
        weight: View | None,
        bias: View | None,
        eps: float,
        *,
        center: bool,
        epilogue: Epilogue = PLAIN,
        shape: tuple[int, ...],
        bound: bool = False,
    ) -> Callable[..., Any]:
        """`forward` with less to do, for calls like this one: a function (x, weight, bias, out) that returns y; with
        `bound` a function (x, out), for weight and bias as they are when it is called.

        It takes C-contiguous arrays of these sizes and dtypes, in shapes of the caller's, and None where there is none;
        `shape` is that of x, y and `out`. With `bound` it returns None, and has done nothing, where `out` is neither x
        nor memory apart from the inputs, or an array is not aligned.

        Of arrays on a device it is a function of addresses, (x, weight, bias, y, own=), that is never `bound`: it
        returns True, or False and has done nothing, where y is neither x nor apart from the inputs; with `own` y is
        memory that nobody else has. None in place of a function, where such calls are not to be remembered.
        """
        five, param_shape = x.shape, shape_of_params(weight, bias)

        def again(x: Any, weight: Any, bias: Any, out: Any) -> Any:
            w, b = (None if param is None else param.reshape(param_shape) for param in (weight, bias))
            keys: dict[str, Any] = {"epilogue": epilogue, "out": None if out is None else out.reshape(five)}
            y, _, _ = self.forward(read_only(x.reshape(five)), w, b, eps, center=center, **keys)
            return y.reshape(shape) if out is None else out

        def again_if_apart(x: Any, out: Any) -> Any:
            if out is not None:
                others = weight, bias, None if out.ctypes.data == x.ctypes.data else x
                if not out.flags.aligned or any(other is not None and overlap(out, other) for other in others):
                    return None
            return again(x, weight, bias, out) if x.flags.aligned else None

        return again_if_apart if bound else again

    def repeated_with_statistics(
        self,
        x: View,
        weight: View | None,
        bias: View | None,
        statistics: tuple[Stats, Stats],
        eps: float,
        *,
        momentum: float | None,
        epilogue: Epilogue = PLAIN,
        shape: tuple[int, ...],
    ) -> Callable[..., Any]:
        """The same for a call with running statistics (g,): a function (x, weight, bias, mean, var, out) that
        normalizes with them where `momentum` is None, else with x's own, by which they move, in place.

        It returns None, and has done nothing, where statistics that would move may overlap each other or an input. Of
        arrays on a device, it is one of addresses as well: (x, weight, bias, mean, var, y, own=).
        """
        five, param_shape = x.shape, shape_of_params(weight, bias)

        def again(x: Any, weight: Any, bias: Any, mean: Any, var: Any, out: Any) -> Any:
            if momentum is not None and not apart((mean, var), x, weight, bias):
                return None
            w, b = (None if param is None else param.reshape(param_shape) for param in (weight, bias))
            stats = fixed_stats(mean, var, eps, five[0]) if momentum is None else None
            keys: dict[str, Any] = {"stats": stats, "epilogue": epilogue}
            keys["out"] = None if out is None else out.reshape(five)
            y, found, _ = self.forward(read_only(x.reshape(five)), w, b, eps, center=True, **keys)
            if momentum is not None and found is not None:
                batch = found if five[0] > 1 else Moments(found.count, found.mean[0], found.m2[0], found.residual[0])
                mean[...], var[...] = batch.blend(mean, var, momentum)
            return y.reshape(shape) if out is None else out

        return again

    def repeated_vjp(
        self,
        x: View,
        weight: View | None,
        bias: View | None,
        eps: float,
        *,
        center: bool,
        epilogue: Epilogue = PLAIN,
        shape: tuple[int, ...],
        statistics: tuple[Stats, Stats] | None = None,
        momentum: float | None = None,
    ) -> Callable[..., Any] | None:
        """The same for a call whose gradient is asked for: what `repeated` returns, or with `statistics`
        `repeated_with_statistics`, but that it returns (y, gradient, statistics) in place of y. None, where there is no
        such function.

        `gradient` takes a C-contiguous dy like x, and returns the `Grads` of x, weight and bias in their own shapes and
        dtypes; `statistics` takes nothing, and returns (mean, rstd) as `forward` takes them.
        """
        return None

    def add_forward(
        self,
        x: View,
        addend: View,
        weight: View | None,
        bias: View | None,
        eps: float,
        *,
        center: bool,
        out: View | None = None,
    ) -> tuple[View, View, Moments, Stats]:
        """(y, total, moments, rstd): total = x + addend in x's dtype, and y its norm."""
        total = added(x, addend)
        y, found, rstd = self.forward(read_only(total), weight, bias, eps, center=center, out=out)
        assert found is not None
        return y, total, found, rstd

    def backward(self, dy: View, saved: Saved, *, addend: View | None = None) -> Grads:
        """Gradients as five-axis views; those of weight and bias in float64, of shape `saved.param_shape`. `addend` is
        added to that of x."""
        if addend is not None:
            grads = self.backward(dy, saved)
            with np.errstate(over="ignore", invalid="ignore"):
                return grads._replace(x=np.add(grads.x, addend, out=grads.x))
        epilogue = saved.epilogue
        if saved.mask is not None or epilogue.activation is not None or epilogue.residual is not None:
            return composed.backward(self, dy, saved)
        args = dy, saved.x, saved.mean, saved.rstd, saved.weight
        if saved.fixed and saved.param_shape is None:
            return Grads(self.backward_apply(*args, None, None))
        s1, s2, dweight, dbias = self.backward_sums(*args, saved.param_shape)
        count = np.maximum(saved.count, 1)
        k1 = None if saved.fixed or saved.mean is None else s1 / count
        k2 = None if saved.fixed else s2 / count
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


def reciprocal_std(var: NDArray[np.float64], eps: float) -> NDArray[np.float64]:
    """1 / sqrt(var + eps); inf or NaN where that has no value, in silence, as IEEE 754 says."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1.0 / np.sqrt(var + eps))


def fixed_stats(mean: NDArray[Any], var: NDArray[Any], eps: float, n: int) -> tuple[Stats, Stats]:
    """(mean, rstd) on (n, g) of given statistics (g,): every one of the n samples has the same.

    Copies: a later call may update the running statistics before the pullback of this one runs.
    """
    rstd = reciprocal_std(var.astype(np.float64), eps)
    return np.tile(mean.astype(np.float64), (n, 1)), np.tile(rstd, (n, 1))


def masked_rstd(found: Moments, eps: float) -> NDArray[np.float64]:
    """`reciprocal_std` of moments; 0 for a group without elements."""
    rstd = reciprocal_std(found.m2 / np.maximum(found.count, 1), eps)
    return np.where(np.equal(found.count, 0), 0.0, rstd)


def shape_of_params(weight: View | None, bias: View | None) -> tuple[int, ...] | None:
    """The shape of both, where there is one."""
    return next((param.shape for param in (weight, bias) if param is not None), None)


def apart(written: tuple[NDArray[Any], ...], *inputs: NDArray[Any] | None) -> bool:
    """Whether arrays that will be written lie apart from each other and from the inputs."""
    pairs = [(array, other) for array in written for other in inputs if other is not None]
    # The owners of memory need no look at addresses, which takes 2 us, and 15 where the caches hold other things.
    return not any(
        a is b or (not (a.flags.owndata and b.flags.owndata) and np.may_share_memory(a, b))
        for a, b in (*pairs, *itertools.combinations(written, 2))
    )


def may_write(out: NDArray[Any], x: NDArray[Any], *inputs: NDArray[Any] | None) -> bool:
    """Whether `out` is x itself or lies apart from it, and lies apart from the other inputs."""
    return apart((out,), *inputs) and (out is x or apart((out,), x))
