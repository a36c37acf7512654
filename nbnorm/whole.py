"""Operations that are not one mean and one variance: local response normalization, and division by a p-norm.

A backend has them or refuses them. It sees x as three axes (outer, axis, inner), in the order of its memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from nbnorm import dispatch, engine, layout
from nbnorm.arguments import check_axes, check_axis, check_backend, check_out, check_x
from nbnorm.arrays import Array
from nbnorm.backend import Backend, Grads, Request
from nbnorm.checks import check_length, check_number
from nbnorm.devices import device_type
from nbnorm.engine import Call, Placed, check_like
from nbnorm.operation import operation


@operation("Array")
def local_response_norm(
    x: Array,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    channel_axis: int = 1,
    out: Array | None = None,
    backend: str | Backend | None = None,
) -> WholeCall:
    """Divide by the energy of neighbouring channels: ``x / (k + alpha / size * sum(x*x))**beta``.

    The sum runs over `size` channels, of which ``size // 2`` lie before the channel itself; channels that do not exist
    count as zeros.

    Parameters
    ----------
    x : array (N, C, ...), or with the channels on `channel_axis`; float32, float64, float16 or bfloat16
    size : int
        Channels in the sum; may exceed C.
    alpha, beta, k : float
    channel_axis : int
        Axis of the channels; negative counts from the end.
    out : array like x
        Where to write the result; x itself, or memory apart from it.
    backend : str or Backend
        The one backend to use; BackendError where it refuses.

    Returns
    -------
    y : array
        Of x's kind, dtype, shape and memory order.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came; nothing has been written.
    BackendError
        If no backend takes the request.

    Notes
    -----
    Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks" (2012), whose
    alpha is alpha / size here, as in PyTorch. Computed in float64: the square of a float64 beyond 1e154 is infinite.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.array([[1.0, 2.0, 4.0]])
    >>> nbnorm.local_response_norm(x, 3, alpha=3.0, beta=1.0).round(4).tolist()  # 1 / (1 + 1 + 4), ...
    [[0.1667, 0.0909, 0.1905]]
    """
    operand, dtype = check_x(x, least=2)
    channel = check_axis("channel_axis", channel_axis, operand.view)
    axes = layout.over(operand.view.shape, (channel,), params=False)
    call = Call("local_response_norm", operand, dtype, axes, backend=check_backend(backend))
    length = check_length("size", size)
    share = check_number("alpha", alpha) / length
    args = (length // 2, (length - 1) // 2), share, check_number("beta", beta), check_number("k", k)
    return WholeCall(_with_out(call, out), args)


@operation("Array")
def normalize(
    x: Array,
    p: float = 2.0,
    axis: int | Sequence[int] = 1,
    eps: float = 1e-12,
    *,
    out: Array | None = None,
    backend: str | Backend | None = None,
) -> WholeCall:
    """Divide by the p-norm over `axis`: ``x / max(norm, eps)``.

    Parameters
    ----------
    x : array; float32, float64, float16 or bfloat16
    p : float
        The order of the norm, ``sum(abs(x)**p)**(1/p)``: any number; for 0 the count of elements that are not 0, for
        inf and -inf the largest and the smallest of ``abs(x)``.
    axis : int or ints
        The axes of one norm.
    eps : float
        The least divisor, not negative: zeros stay zeros.
    out, backend
        As for `local_response_norm`.

    Returns
    -------
    y : array
        Of x's kind, dtype, shape and memory order.

    Raises
    ------
    ValueError, TypeError, BackendError
        As for `local_response_norm`.

    Notes
    -----
    Gradients are PyTorch's: where the norm is below eps it counts as constant; elements that share the largest
    ``abs(x)`` for p = inf share its gradient; at 0 the slope of ``abs(x)**p`` counts as 0, also for p = 1 and below.
    Sums of powers are scaled where they would leave float64's range.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.normalize(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    >>> nbnorm.normalize(np.array([[3.0, 4.0]]), p=1, axis=(0, 1)).round(4).tolist()
    [[0.4286, 0.5714]]
    """
    operand, dtype = check_x(x, least=1)
    axes = layout.over(operand.view.shape, check_axes(axis, operand.view), params=False)
    call = Call("normalize", operand, dtype, axes, backend=check_backend(backend))
    least = check_number("eps", eps)
    if least < 0:
        raise ValueError(f"eps must not be negative; got {least}")
    return WholeCall(_with_out(call, out), (_check_order(p), least))


def _check_order(p: Any) -> float:
    """The order of a norm: any real number, and infinity."""
    if isinstance(p, float | np.floating) and np.isinf(p):
        return float(p)
    if isinstance(p, float | np.floating) and np.isnan(p):
        raise ValueError(f"p must be a number, inf or -inf; got {p}")
    return check_number("p", p)


def _with_out(call: Call, out: Array | None) -> Call:
    call.out = None if out is None else check_out(call.x, out, {})
    return call


@dataclass(slots=True)
class WholeCall:
    """One call, checked: its operands, and the arguments of the backend's method."""

    call: Call
    args: tuple[Any, ...]

    def forward(self) -> Any:
        """y, of the caller's kind, or `out` where it was given."""
        return self._run()[0]

    def vjp(self) -> tuple[Any, WholePullback]:
        """y, and the function that maps dy to the gradient."""
        self.call.check_inputs_survive()
        result, placed, backend, x = self._run()
        return result, WholePullback(self, placed, backend, x)

    def explain(self) -> dispatch.Decision:
        """The decision for the call, without running it."""
        return dispatch.decide(self._request(), self.call.backend, _place(self.call).copies)

    def _request(self) -> Request:
        return Request(
            self.call.op, device_type(self.call.x.view), self.call.dtype, center=True, param_axes=(), split=False
        )

    def _run(self) -> tuple[Any, Placed, Backend, NDArray[Any] | None]:
        """The result, and for the gradient the view of x; None for an empty one."""
        call = self.call
        placed = _place(call)
        backend = dispatch.select(self._request(), call.backend, placed.copies)
        x = placed.five_axes().reshape(_three_axes(placed)) if call.x.view.size else None
        y = np.empty(call.x.view.shape, call.x.view.dtype) if x is None else self._forward(placed, backend, x)
        if call.out is None:
            return call.x.wrap(y), placed, backend, x
        call.out.write(y)
        return call.out.given, placed, backend, x

    def _forward(self, placed: Placed, backend: Backend, x: NDArray[Any]) -> NDArray[Any]:
        """y in the caller's shape; the view of `out` itself, where the backend wrote there."""
        call, out = self.call, None
        if call.out is not None:
            out = engine.view_like(call.out.view, call.axes, placed.plan, copy=False)
        if out is not None:
            out = out.reshape(x.shape)
        y: NDArray[Any] = getattr(backend, call.op)(x, *self.args, out=out)
        if call.out is not None and y is out:
            return call.out.view
        return _logical(y, call, placed)


class WholePullback:
    """Maps the gradient of a result to that of x. Holds a reference to x, or the copy that `nbnorm.explain` tells of:
    x must not change before it is called."""

    def __init__(self, whole: WholeCall, placed: Placed, backend: Backend, x: NDArray[Any] | None) -> None:
        self._whole, self._placed, self._backend, self._x = whole, placed, backend, x

    def __call__(self, dy: Array) -> Grads:
        """Gradient for one cotangent.

        Parameters
        ----------
        dy : array of x's shape and dtype, of any supported kind

        Returns
        -------
        Grads
            With x alone, of its kind, dtype and shape.
        """
        whole, x, call = self._whole, self._x, self._whole.call
        view = check_like(call.x, dy, "dy").view
        if x is None:
            return Grads(call.x.wrap(np.zeros(view.shape, call.x.view.dtype)))
        cotangent = engine.view_input(view, call.axes, self._placed.plan).reshape(x.shape)
        dx = getattr(self._backend, f"{call.op}_backward")(cotangent, x, *whole.args)
        return Grads(call.x.wrap(_logical(dx, call, self._placed)))

    def vjp(self, dy: Array) -> NoReturn:
        """Refused: these operations have no second derivatives here."""
        raise TypeError(f"pullback.vjp must be of a plain norm; {self._whole.call.op} has no second derivatives here")


def _place(call: Call) -> Placed:
    """The engine's view, which has three axes beside those of length 1; where the axes of one norm lie apart in memory,
    a copy with them innermost."""
    placed = engine.place(call)
    if not _apart(placed):
        return placed
    x, axes = call.x.view, call.axes
    order = layout.memory_order(x.shape, x.strides)
    order = tuple(axis for axis in order if axis in axes.kept) + tuple(axis for axis in order if axis not in axes.kept)
    plan = layout.plan(axes, order)
    assert plan is not None, axes  # kept, then reduced: always a view
    reduced = tuple(axis for axis in range(x.ndim) if axis not in axes.kept)
    return Placed(x.transpose(order), plan, True, (f"x ({x.nbytes} bytes): axes {reduced} lie apart in memory",))


def _apart(placed: Placed) -> bool:
    return placed.plan.layout.r > 1 and placed.plan.layout.s > 1


def _three_axes(placed: Placed) -> tuple[int, int, int]:
    """(outer, axis, inner): what is reduced lies on r or on s."""
    n, r, g, c, s = placed.plan.layout
    return (n * g, math.prod((r, c, s)), 1) if r == 1 else (n, r, g)


def _logical(y: NDArray[Any], call: Call, placed: Placed) -> NDArray[Any]:
    """A three-axis result in x's shape and memory order."""
    logical = engine.from_five_axes(y, call, placed.plan)
    if not placed.copied:
        return logical
    result = np.empty_like(call.x.view)
    if result.strides == logical.strides:
        return logical
    result[...] = logical  # the copy was in another order
    return result
