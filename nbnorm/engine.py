"""From a validated call to a result: choose a backend, view, run, view back. The only module that runs backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm import dispatch, layout
from nbnorm.arrays import Array, NumpyArrays, float_view
from nbnorm.backend import Backend, Grads, Request, Saved, reciprocal_std
from nbnorm.layout import Axes, Plan
from nbnorm.statistics import Moments

PARAM_AXES = ((layout.R, "r"), (layout.G, "g"), (layout.C, "c"))


@dataclass(slots=True)
class Operand:
    """An array of the caller's: what came, and the NumPy view of it."""

    given: Array
    adapter: NumpyArrays
    view: NDArray[Any]

    def wrap(self, result: NDArray[Any]) -> Array:
        return self.adapter.wrap(result, self.given)

    def write(self, value: NDArray[Any]) -> None:
        """Write to the caller's memory, unless `value` lies there already."""
        if value is not self.view:
            self.view[...] = value
        self.adapter.written(self.given)


@dataclass(slots=True)
class Running:
    """Running statistics, checked, of one shape."""

    mean: Operand
    var: Operand
    momentum: float


@dataclass(slots=True)
class Call:
    """One call, checked: everything the engine needs to run it."""

    op: str
    x: Operand
    dtype: str
    axes: Axes
    weight: Operand | None = None
    bias: Operand | None = None
    eps: float = 1e-5
    center: bool = True
    activation: str | None = None
    fixed: tuple[Operand, Operand] | None = None  # (mean, var) that normalize instead of x's own
    running: Running | None = None  # updated after success
    out: Operand | None = None
    return_moments: bool = False
    backend: str | Backend | None = None


@dataclass(slots=True)
class Placed:
    """x with its axes in the plan's order, not yet collapsed to five; `copies` says why it must be copied, if so."""

    ordered: NDArray[Any]
    plan: Plan
    copies: tuple[str, ...]

    def five_axes(self) -> NDArray[Any]:
        """What the backend gets: a read-only view of x, or of its copy."""
        if self.copies:
            dtype = self.ordered.dtype.newbyteorder("=")
            return _read_only(np.array(self.ordered, dtype, order="C").reshape(self.plan.layout))
        return _read_only(self.ordered.reshape(self.plan.layout))


def place(call: Call) -> Placed:
    """Find the view of x in the order of its memory, and whether it needs a copy; nothing is copied here."""
    x, axes = call.x.view, call.axes
    plain = x.flags.c_contiguous and x.flags.aligned and x.dtype.isnative
    split = x.reshape(axes.shape)
    plan = None if plain else layout.plan(axes, layout.memory_order(split.shape, split.strides))
    plan = plan or layout.logical_plan(axes)
    ordered = split.transpose(plan.order)
    reason = ""
    if not x.dtype.isnative:
        reason = f"byte order {x.dtype.byteorder!r}"
    elif not x.flags.aligned:
        reason = "unaligned elements"
    else:
        try:
            ordered.reshape(plan.layout, copy=False)
        except ValueError:
            reason = f"strides {x.strides} of shape {x.shape} collapse into no five-axis view"
    return Placed(ordered, plan, (f"x ({x.nbytes} bytes): {reason}",) if reason else ())


def view_like(array: NDArray[Any], axes: Axes, plan: Plan, *, copy: bool = True) -> NDArray[Any] | None:
    """`array`, of x's shape, as a C-contiguous five-axis view in the plan's order; without `copy`, None for no view."""
    ordered = _ordered(array, axes, plan.order)
    if ordered.flags.c_contiguous and ordered.flags.aligned and ordered.dtype.isnative:
        return ordered.reshape(plan.layout)
    if not copy:
        return None
    return np.array(ordered, ordered.dtype.newbyteorder("="), order="C").reshape(plan.layout)


def view_param(param: NDArray[Any], axes: Axes, plan: Plan) -> NDArray[Any]:
    """weight or bias as a C-contiguous five-axis array, each axis 1 or full."""
    ordered = param.reshape(axes.param_shape).transpose(plan.param_order)
    return np.array(ordered, ordered.dtype.newbyteorder("="), order="C", copy=None).reshape(plan.param_shape)


def from_five_axes(y: NDArray[Any], call: Call, plan: Plan) -> NDArray[Any]:
    """A five-axis result in the shape of x, laid out in memory as the plan's order says."""
    lengths = tuple(call.axes.shape[axis] for axis in plan.order)
    logical = y.reshape(lengths).transpose(layout.inverse(plan.order)).reshape(call.x.view.shape)
    return logical if y.dtype == call.x.view.dtype else logical.astype(call.x.view.dtype)


def _ordered(array: NDArray[Any], axes: Axes, order: tuple[int, ...]) -> NDArray[Any]:
    return array.reshape(axes.shape).transpose(order)


def _read_only(view: NDArray[Any]) -> NDArray[Any]:
    """One kind of view for backends to compile for, and a guard against writing to an input."""
    view = view.view()
    view.flags.writeable = False
    return view


def request(call: Call, plan: Plan) -> Request:
    """What a backend may refuse on."""
    sizes = plan.layout
    carrying = tuple(name for axis, name in PARAM_AXES if plan.param_shape[axis] > 1)
    params = carrying if _has_params(call) else ()
    return Request(call.op, "cpu", call.dtype, call.center, params, sizes.r > 1 and sizes.s > 1, call.activation)


def explain(call: Call) -> dispatch.Decision:
    """The decision for a call, without running it."""
    placed = place(call)
    return dispatch.decide(request(call, placed.plan), call.backend, placed.copies)


def forward(call: Call) -> Any:
    """y, or (y, Moments) where the call asks for both; running statistics are written last, after all succeeded."""
    return _run(call)[0]


def moments(call: Call) -> Moments:
    """The moments of x over the call's axes."""
    placed = place(call)
    backend = dispatch.select(request(call, placed.plan), call.backend, placed.copies)
    if not call.x.view.size:
        return _no_moments(call.axes)
    return _logical_moments(backend.moments(placed.five_axes(), center=True), call.axes, placed.plan)


def vjp(call: Call) -> tuple[Any, Pullback]:
    """The forward result and the function that maps dy to gradients."""
    result, plan, backend, saved = _run(call)
    return result, Pullback(call, plan, backend, saved)


def _run(call: Call) -> tuple[Any, Plan, Backend, Saved | None]:
    """Forward, the Saved for its backward (None for an empty x), and the commit of the running statistics."""
    placed = place(call)
    plan = placed.plan
    backend = dispatch.select(request(call, plan), call.backend, placed.copies)
    if call.x.view.size:
        y, found, saved = _forward(call, placed, backend)
    else:
        y, found, saved = np.empty(call.x.view.shape, call.x.view.dtype), None, None
    if call.out is None:
        result = call.x.wrap(y)
    else:
        call.out.write(y)
        result = call.out.given
    if call.running is None and not call.return_moments:
        return result, plan, backend, saved
    batch = _no_moments(call.axes) if saved is None else None
    if found is not None:
        batch = _logical_moments(found, call.axes, plan)
    if call.running is not None and batch is not None:
        _commit(call.running, batch)
    return (result, batch) if call.return_moments else result, plan, backend, saved


def _forward(call: Call, placed: Placed, backend: Backend) -> tuple[NDArray[Any], Moments | None, Saved]:
    """y in the caller's shape (the view of `out` itself, where the backend wrote there), the moments, the Saved."""
    axes, plan = call.axes, placed.plan
    weight = None if call.weight is None else view_param(call.weight.view, axes, plan)
    bias = None if call.bias is None else view_param(call.bias.view, axes, plan)
    stats = None if call.fixed is None else _fixed_stats(call, plan)
    out = None if call.out is None else view_like(call.out.view, axes, plan, copy=False)
    x = placed.five_axes()
    y, found, rstd = backend.forward(
        x, weight, bias, call.eps, center=call.center, stats=stats, activation=call.activation, out=out
    )
    mean = stats[0] if stats is not None else found.mean if found is not None and call.center else None
    param_shape = plan.param_shape if _has_params(call) else None
    saved = Saved(x, mean, rstd, weight, param_shape, stats is not None, bias, call.activation)
    if out is not None and call.out is not None and y is out:
        return call.out.view, found, saved
    return from_five_axes(y, call, plan), found, saved


def _commit(running: Running, batch: Moments) -> None:
    """Both new values first, then both writes: an error leaves the running statistics as they were."""
    mean, var = batch.blend(running.mean.view, running.var.view, running.momentum)
    running.mean.write(mean)
    running.var.write(var)


def _has_params(call: Call) -> bool:
    return call.weight is not None or call.bias is not None


def _fixed_stats(call: Call, plan: Plan) -> tuple[NDArray[Any], NDArray[Any]]:
    """The given per-channel statistics on (n, g); channels lie on g, and every sample has the same.

    Copies: a later call may update the running statistics before the pullback of this one runs.
    """
    assert call.fixed is not None
    mean, var = (stat.view.astype(np.float64).reshape(1, -1) for stat in call.fixed)
    shape = plan.layout.n, plan.layout.g
    rstd = reciprocal_std(var, call.eps)
    return np.array(np.broadcast_to(mean, shape), order="C"), np.array(np.broadcast_to(rstd, shape), order="C")


def _logical_moments(found: Moments, axes: Axes, plan: Plan) -> Moments:
    """Moments on (n, g) as moments on the kept axes, in the caller's order."""
    lengths = tuple(axes.kept_shape[axis] for axis in plan.kept_order)
    back = layout.inverse(plan.kept_order)

    def logical(stat: NDArray[Any]) -> NDArray[Any]:
        return stat.reshape(lengths).transpose(back)

    return Moments(found.count, logical(found.mean), logical(found.m2), logical(found.residual))


def _no_moments(axes: Axes) -> Moments:
    zeros = np.zeros(axes.kept_shape)
    return Moments(0, zeros, zeros)


class Pullback:
    """Maps the gradient of a result to the gradients of its inputs; made by `nbnorm.vjp`.

    Holds references to the inputs and the statistics, and no new tensor of x's size but the copy of x that
    `nbnorm.explain` tells of, if there is one: the inputs must not change before it is called.
    """

    def __init__(self, call: Call, plan: Plan, backend: Backend, saved: Saved | None) -> None:
        self._call, self._plan, self._backend, self._saved = call, plan, backend, saved

    def __call__(self, dy: Array) -> Grads:
        """Gradients for one cotangent.

        Parameters
        ----------
        dy : array of x's shape and dtype, of any supported kind

        Returns
        -------
        Grads
            Each gradient of the kind, dtype and shape of what it belongs to; None where there is nothing.
        """
        call = self._call
        _, view, dtype = float_view(dy, "dy")
        if view.shape != call.x.view.shape or dtype != call.dtype:
            raise ValueError(
                f"dy must have x's shape {call.x.view.shape} and dtype {call.dtype}; got {view.shape} and {dtype}"
            )
        if self._saved is None:
            return self._empty()
        dy5 = view_like(view, call.axes, self._plan)
        found = self._backend.backward(_read_only(np.asarray(dy5)), self._saved)
        dx = call.x.wrap(from_five_axes(found.x, call, self._plan))
        return Grads(dx, self._param_grad(call.weight, found.weight), self._param_grad(call.bias, found.bias))

    def _param_grad(self, param: Operand | None, found: NDArray[Any] | None) -> Array | None:
        if param is None:
            return None
        assert found is not None, "the backend returned no gradient for a parameter"
        axes, plan = self._call.axes, self._plan
        lengths = tuple(axes.param_shape[axis] for axis in plan.param_order)
        logical = found.reshape(lengths).transpose(layout.inverse(plan.param_order)).reshape(param.view.shape)
        return param.wrap(np.ascontiguousarray(logical, param.view.dtype))

    def _empty(self) -> Grads:
        call = self._call

        def zeros(operand: Operand | None) -> Array | None:
            return None if operand is None else operand.wrap(np.zeros(operand.view.shape, operand.view.dtype))

        return Grads(zeros(call.x), zeros(call.weight), zeros(call.bias))
