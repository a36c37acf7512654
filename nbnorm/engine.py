"""From a validated call to a result: choose a backend, view, run, view back. The only module that runs backends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm import composed, dispatch, layout
from nbnorm.arrays import Array, NumpyArrays, float_view, overlap, read_only
from nbnorm.backend import PLAIN, Backend, DeviceMoments, Epilogue, Grads, Request, Saved, fixed_stats, masked_rstd
from nbnorm.devices import broadcast, contiguous, copied, device_type, empty_like, on_host, zeros_like
from nbnorm.dropout import Dropout, warn_of_variance_shift
from nbnorm.layout import Axes, Plan
from nbnorm.statistics import Moments

PARAM_AXES = ((layout.R, "r"), (layout.G, "g"), (layout.C, "c"))


@dataclass(slots=True)
class Operand:
    """An array of the caller's: what came, and the NumPy view of it, or on a device the `DeviceArray`."""

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


def check_like(other: Operand, array: Array, name: str, *, as_: str = "x") -> Operand:
    """An array of the shape and dtype of another, x if not named; ValueError, where it is not."""
    adapter, view, _ = float_view(array, name)
    check_beside(other, adapter, view, name, as_=as_)
    shape, dtype = other.view.shape, other.view.dtype
    if view.shape != shape or view.dtype.newbyteorder("=") != dtype.newbyteorder("="):
        raise ValueError(f"{name} must have {as_}'s shape {shape} and dtype {dtype}; got {view.shape} and {view.dtype}")
    return Operand(array, adapter, view)


def check_beside(other: Operand, adapter: NumpyArrays, view: NDArray[Any], name: str, *, as_: str = "x") -> None:
    """TypeError, where an array lies on another device than `other`, or there belongs to another library, which would
    run on another stream."""
    where, here = other.view.device, view.device
    if where != here:
        raise TypeError(f"{name} must lie on {where}, as {as_} does; got an array on {here}")
    if where != "cpu" and adapter is not other.adapter:
        raise TypeError(f"{name} must be of {other.adapter.kind} on {where}, as {as_} is; got one of {adapter.kind}")


@dataclass(slots=True)
class Running:
    """Running statistics, checked, of one shape."""

    mean: Operand
    var: Operand
    momentum: float


@dataclass(slots=True)
class Renorm:
    """Batch renormalization: the running statistics that the batch's are drawn to, and how far they may differ."""

    mean: Operand
    var: Operand
    r_max: float
    d_max: float


@dataclass(slots=True)
class Call:
    """One call, checked: everything the engine needs to run it."""

    op: str
    x: Operand
    dtype: str
    axes: Axes
    weight: Operand | None = None
    weight_offset: float = 0.0
    bias: Operand | None = None
    eps: float = 1e-5
    center: bool = True
    mask: NDArray[np.bool_] | None = None  # with as many axes as x, each 1 or full
    activation: str | None = None
    order: str = "norm_act"
    residual: Operand | None = None
    addend: Operand | None = None  # x + addend is normalized, and returned too
    fixed: tuple[Operand, Operand] | None = None  # (mean, var) that normalize instead of x's own
    running: Running | None = None  # updated after success
    renorm: Renorm | None = None
    dropout: Dropout | None = None  # of the result
    dropped: Dropout | None = None  # of x, before anything else
    out: Operand | None = None
    return_moments: bool = False
    backend: str | Backend | None = None

    def forward(self) -> Any:
        """y; (y, total) where x is added to; with the moments last where the call asks for them."""
        return _run(self)[0]

    def vjp(self) -> tuple[Any, Pullback]:
        """The result of `forward`, and the function that maps its gradient to those of the inputs."""
        if self.op == "moments":
            raise TypeError("op must be a norm to be differentiated; got nbnorm.moments")
        self.check_inputs_survive()
        result, ran = _run(self._with_statistics_kept())
        return result, Pullback(self, ran)

    def _with_statistics_kept(self) -> Call:
        """The call with copies of given statistics that lie on a device: a later call may update them before the
        pullback of this one runs. Those on the host are copied in any case."""
        if self.fixed is None or on_host(self.x.view):
            return self
        mean, var = (replace(operand, view=copied(operand.view)) for operand in self.fixed)
        return replace(self, fixed=(mean, var))

    def check_inputs_survive(self) -> None:
        """ValueError where `out` would overwrite what the gradient needs."""
        for name, operand in (("x", self.x), ("residual", self.residual)):
            if self.out is not None and operand is not None and overlap(self.out.view, operand.view):
                raise ValueError(f"out must not overlap {name} under vjp: the gradient needs {name} as it was")

    def explain(self) -> dispatch.Decision:
        """The decision for the call, without running it."""
        placed = place(self)
        return dispatch.decide(request(self, placed.plan), self.backend, placed.copies)


@dataclass(slots=True)
class Placed:
    """x with its axes in the plan's order, not yet collapsed to five; `copies` says why it must be copied, if so."""

    ordered: NDArray[Any]
    plan: Plan
    copied: bool
    copies: tuple[str, ...]  # of x and of the arrays of its size

    def five_axes(self) -> NDArray[Any]:
        """What the backend gets: a read-only view of x, or of its copy."""
        if self.copied:
            return read_only(copied(self.ordered).reshape(self.plan.layout))
        return read_only(self.ordered.reshape(self.plan.layout))


def place(call: Call) -> Placed:
    """Find the view of x in the order of its memory, and whether it needs a copy; nothing is copied here."""
    x, axes = call.x.view, call.axes
    split = x.reshape(axes.shape)
    plan = None if plain(x) else layout.plan(axes, layout.memory_order(split.shape, split.strides))
    plan = plan or layout.logical_plan(axes)
    ordered = split.transpose(plan.order)
    reason = ""
    if not x.dtype.isnative:
        reason = f"byte order {x.dtype.byteorder!r}"
    elif not x.flags.aligned:
        reason = "unaligned elements"
    else:
        n, r, g, c, s = plan.layout
        try:
            five = ordered.reshape(plan.layout, copy=False)
            if s == 1 and r > 1:  # then (g, c) are the columns of one row
                five.reshape(n, r, g * c, copy=False)
        except ValueError:
            reason = f"strides {x.strides} of shape {x.shape} collapse into no five-axis view"
    if not (reason or on_host(x) or plain(ordered)):
        reason = f"strides {x.strides} of shape {x.shape} leave gaps, and kernels on a GPU have none for that"
    copies = [f"x ({x.nbytes} bytes): {reason}"] if reason else []
    if call.dropped is not None:
        copies.append(f"x ({x.nbytes} bytes): elements are dropped from it before the norm")
    for name, operand in (("residual", call.residual), ("residual", call.addend)):
        if operand is not None and not plain(_ordered(operand.view, axes, plan.order)):
            copies.append(f"{name} ({x.nbytes} bytes): it does not lie in memory as x does")
    return Placed(ordered, plan, bool(reason), tuple(copies))


def plain(array: NDArray[Any]) -> bool:
    return array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative


def view_like(array: NDArray[Any], axes: Axes, plan: Plan, *, copy: bool = True) -> NDArray[Any] | None:
    """`array`, of x's shape, as a C-contiguous five-axis view in the plan's order; without `copy`, None for no view."""
    ordered = _ordered(array, axes, plan.order)
    if plain(ordered):
        return ordered.reshape(plan.layout)
    if not copy:
        return None
    return copied(ordered).reshape(plan.layout)


def view_param(param: NDArray[Any], axes: Axes, plan: Plan) -> NDArray[Any]:
    """weight or bias as a C-contiguous five-axis array, each axis 1 or full."""
    ordered = param.reshape(axes.param_shape).transpose(plan.param_order)
    return contiguous(ordered).reshape(plan.param_shape)


def view_input(array: NDArray[Any], axes: Axes, plan: Plan) -> NDArray[Any]:
    """An input of x's shape besides x, as backends read it."""
    view = view_like(array, axes, plan)
    assert view is not None
    return read_only(view)


def view_mask(mask: NDArray[np.bool_], axes: Axes, plan: Plan) -> NDArray[np.bool_]:
    """The mask as a C-contiguous five-axis array, each axis 1 or full; copied where only a part of an axis is full."""
    shape = list(mask.shape)
    if axes.split is not None:
        at = axes.split
        shape[at : at + 1] = axes.shape[at : at + 2] if shape[at] > 1 else (1, 1)
    ordered = mask.reshape(shape).transpose(plan.order)
    lengths = [axes.shape[axis] for axis in plan.order]
    full, five, axis = list(ordered.shape), [1] * 5, 0
    for slot, size in enumerate(plan.layout):
        begin, covered = axis, 1
        while covered < size:
            covered *= lengths[axis]
            axis += 1
        if any(length > 1 for length in ordered.shape[begin:axis]):
            full[begin:axis], five[slot] = lengths[begin:axis], size
    return contiguous(broadcast(ordered, full)).reshape(five)


def from_five_axes(y: NDArray[Any], call: Call, plan: Plan) -> NDArray[Any]:
    """A five-axis result in the shape of x, laid out in memory as the plan's order says."""
    lengths = tuple(call.axes.shape[axis] for axis in plan.order)
    logical = y.reshape(lengths).transpose(layout.inverse(plan.order)).reshape(call.x.view.shape)
    return logical if y.dtype == call.x.view.dtype else logical.astype(call.x.view.dtype)


def _ordered(array: NDArray[Any], axes: Axes, order: tuple[int, ...]) -> NDArray[Any]:
    return array.reshape(axes.shape).transpose(order)


def request(call: Call, plan: Plan) -> Request:
    """What a backend may refuse on."""
    sizes = plan.layout
    carrying = tuple(name for axis, name in PARAM_AXES if plan.param_shape[axis] > 1)
    params = carrying if _has_params(call) else ()
    order = None if call.activation is None else call.order
    split = sizes.r > 1 and sizes.s > 1
    extras = call.activation, order, call.residual is not None, call.mask is not None
    return Request(call.op, device_type(call.x.view), call.dtype, call.center, params, split, *extras)


def moments(call: Call) -> Moments:
    """The moments of x over the call's axes."""
    placed = place(call)
    backend = dispatch.select(request(call, placed.plan), call.backend, placed.copies)
    if not call.x.view.size:
        return _no_moments(call.axes)
    found: Any = backend.statistics(placed.five_axes(), center=True, mask=_mask(call, placed.plan))
    return logical_moments(found.host() if isinstance(found, DeviceMoments) else found, call.axes, placed.plan)


def _run(call: Call) -> tuple[Any, Ran]:
    """Forward, what its pullback needs, and the commit of the running statistics."""
    y, total, batch, ran = compute(begin(call))
    return finish(call, y, total, batch), ran


def begin(call: Call) -> Call:
    """The call with x as it is normalized: its elements dropped where that comes first, in a copy."""
    if call.dropped is None:
        return call
    if call.dropped.p and call.fixed is None and call.op in ("batch_norm", "batch_renorm"):
        warn_of_variance_shift()
    return replace(call, x=Operand(call.x.given, call.x.adapter, call.dropped(np.array(call.x.view))))


def compute(call: Call) -> tuple[NDArray[Any], NDArray[Any], Any, Ran]:
    """y and x + addend (x itself without one) in the caller's shape, the `Moments` where they are x's own and called
    for (`DeviceMoments`, where it is for running statistics on a device), and what a pullback needs. Nothing of the
    caller's is written but `out`."""
    placed = place(call)
    backend = dispatch.select(request(call, placed.plan), call.backend, placed.copies)
    ran = Ran(call, placed.plan, backend)
    wanted = call.fixed is None and (call.running is not None or call.return_moments)
    if not call.x.view.size:
        batch = _no_moments(call.axes) if wanted else None
        return empty_like(call.x.view), empty_like(call.x.view), batch, ran
    y, total, found = _forward(call, placed, ran)
    if not wanted or found is None:
        return y, total, None, ran
    if isinstance(found, DeviceMoments):
        if not call.return_moments:
            return y, total, found, ran
        found = found.host()
    return y, total, logical_moments(found, call.axes, placed.plan), ran


def finish(call: Call, y: NDArray[Any], total: NDArray[Any], batch: Any) -> Any:
    """What the caller gets; `out` and the running statistics are written."""
    if call.dropout is not None:
        y = call.dropout(y)
    result: Any = call.x.wrap(y) if call.out is None else call.out.given
    if call.out is not None:
        call.out.write(y)
    if call.addend is not None:
        result = result, call.x.wrap(total)
    if call.running is not None and batch is not None:
        _commit(call.running, batch)
    return (result, batch) if call.return_moments else result


def _forward(call: Call, placed: Placed, ran: Ran) -> tuple[NDArray[Any], NDArray[Any], Any]:
    """y in the caller's shape (the view of `out` itself, where the backend wrote there), x + addend (x itself without
    one), and the moments; `ran` takes the Saved."""
    axes, plan, backend, center = call.axes, placed.plan, ran.backend, call.center
    weight, bias = _weight(call, plan), None if call.bias is None else view_param(call.bias.view, axes, plan)
    mask, epilogue = _mask(call, plan), _epilogue(call, plan)
    fixed = call.fixed
    stats = None if fixed is None else backend.fixed_stats(fixed[0].view, fixed[1].view, call.eps, plan.layout.n)
    out = None if call.out is None else view_like(call.out.view, axes, plan, copy=False)
    x, total = placed.five_axes(), call.x.view
    found: Any = None
    ready = None
    if call.running is not None and not on_host(x):
        given = call.running.mean.view, call.running.var.view
        ready = backend.ready(x, *given, call.running.momentum, masked=mask is not None)
    if call.renorm is not None:
        found = backend.statistics(x, center=True, mask=mask, epilogue=epilogue)
        stats = found.mean, masked_rstd(found, call.eps)
        ran.factors = _renorm_factors(call.renorm, plan, found, call.eps)
        weight, bias = _renormalized(ran.factors, weight, bias)
    if call.addend is None:
        keys: dict[str, Any] = {"stats": stats, "mask": mask, "epilogue": epilogue}
        y, fresh, rstd = backend.forward(x, weight, bias, call.eps, center=center, out=out, **keys)
        found = found or fresh
    else:
        addend = view_input(call.addend.view, axes, plan)
        y, sums, found, rstd = backend.add_forward(x, addend, weight, bias, call.eps, center=center, out=out)
        x, total = read_only(sums), from_five_axes(sums, call, plan)
    if isinstance(found, DeviceMoments):
        found.ready = ready
    mean = None if not center else found.mean if found is not None else stats[0] if stats else None
    valid = None if mask is None or found is None else found.count
    param_shape = plan.param_shape if _has_params(call) else None
    ran.saved = Saved(x, mean, rstd, weight, param_shape, call.fixed is not None, bias, mask, epilogue, valid)
    if out is not None and call.out is not None and y is out:
        return call.out.view, total, found
    return from_five_axes(y, call, plan), total, found


def _commit(running: Running, batch: Moments | DeviceMoments) -> None:
    """Both new values first, then both writes: an error leaves the running statistics as they were."""
    mean, var = running.mean.view, running.var.view
    if isinstance(batch, DeviceMoments):
        batch.commit()
    else:
        mean, var = batch.blend(mean, var, running.momentum)
    running.mean.write(mean)
    running.var.write(var)


def _has_params(call: Call) -> bool:
    return call.weight is not None or call.bias is not None


def _weight(call: Call, plan: Plan) -> NDArray[Any] | None:
    """The factor that is applied: the weight, with its offset added in float64."""
    if call.weight is None:
        return None
    weight = view_param(call.weight.view, call.axes, plan)
    return weight.astype(np.float64) + call.weight_offset if call.weight_offset else weight


def _mask(call: Call, plan: Plan) -> NDArray[np.bool_] | None:
    return None if call.mask is None else view_mask(call.mask, call.axes, plan)


def _epilogue(call: Call, plan: Plan) -> Epilogue:
    if call.activation is None and call.residual is None:
        return PLAIN
    residual = None if call.residual is None else view_input(call.residual.view, call.axes, plan)
    return Epilogue(call.activation, call.order, residual)


def _renorm_factors(renorm: Renorm, plan: Plan, found: Moments, eps: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """r and d of every channel, of the parameters' shape: they turn the batch's xhat into one about the running
    statistics."""
    mean, var = (operand.view.astype(np.float64) for operand in (renorm.mean, renorm.var))
    batch_mean, batch_var = found.mean[0], (found.m2 / np.maximum(found.count, 1))[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        std = np.sqrt(var + eps)
        r = np.clip(np.sqrt(batch_var + eps) / std, 1 / renorm.r_max, renorm.r_max)
        d = np.clip((batch_mean - mean) / std, -renorm.d_max, renorm.d_max)
    return r.reshape(plan.param_shape), d.reshape(plan.param_shape)


def _renormalized(
    factors: tuple[NDArray[Any], NDArray[Any]], weight: NDArray[Any] | None, bias: NDArray[Any] | None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """weight * r and weight * d + bias: batch renormalization is a norm with these."""
    r, d = factors
    w = 1.0 if weight is None else weight.astype(np.float64)
    b = 0.0 if bias is None else bias.astype(np.float64)
    return w * r, w * d + b


def logical_moments(found: Moments, axes: Axes, plan: Plan) -> Moments:
    """Moments on (n, g) as moments on the kept axes, in the caller's order."""
    lengths = tuple(axes.kept_shape[axis] for axis in plan.kept_order)
    back = layout.inverse(plan.kept_order)

    def logical(stat: NDArray[Any]) -> NDArray[Any]:
        return stat.reshape(lengths).transpose(back)

    count = logical(found.count) if np.ndim(found.count) else found.count
    return Moments(count, logical(found.mean), logical(found.m2), logical(found.residual))


def _no_moments(axes: Axes) -> Moments:
    zeros = np.zeros(axes.kept_shape)
    return Moments(0, zeros, zeros)


@dataclass(slots=True)
class Ran:
    """A forward that ran, and what its gradients need. They are NumPy arrays in the caller's shapes: those of x and
    residual of x's dtype, those of weight and bias in float64."""

    call: Call
    plan: Plan
    backend: Backend
    saved: Saved | None = None  # None for an empty x
    factors: tuple[NDArray[Any], NDArray[Any]] | None = None  # r and d of a batch renormalization

    def gradients(self, dy: NDArray[Any], dtotal: NDArray[Any] | None) -> Grads:
        if self.saved is None:
            return self._zeros()
        addend = None if dtotal is None else self._five_axes(dtotal)
        return self._logical(self.backend.backward(self._five_axes(dy), self.saved, addend=addend))

    def second(self, dy: NDArray[Any], cotangents: Grads) -> tuple[NDArray[Any], Grads]:
        """Gradients with respect to dy, and to what the first gradients depend on, of their product with cotangents."""
        if self.saved is None:
            return np.zeros_like(dy), self._zeros()
        x, residual = (None if v is None else self._five_axes(v) for v in (cotangents.x, cotangents.residual))
        weight, bias = (None if v is None else view_param(v, self.call.axes, self.plan) for v in cotangents[1:3])
        given = Grads(x, weight, bias, residual)
        ddy, found = composed.second_backward(self.backend, self._five_axes(dy), self.saved, given)
        return from_five_axes(ddy, self.call, self.plan), self._logical(found)

    def _five_axes(self, array: NDArray[Any]) -> NDArray[Any]:
        return view_input(array, self.call.axes, self.plan)

    def _logical(self, found: Grads) -> Grads:
        weight, bias = found.weight, found.bias
        if self.factors is not None and weight is not None:
            r, d = self.factors
            weight = r * weight + d * bias
        dx = from_five_axes(found.x, self.call, self.plan)
        dresidual = dx if self.call.addend is not None else None
        if found.residual is not None:
            dresidual = from_five_axes(found.residual, self.call, self.plan)
        params = (self._param(self.call.weight, weight), self._param(self.call.bias, bias))
        return Grads(dx, *params, dresidual)

    def _param(self, param: Operand | None, found: NDArray[Any] | None) -> NDArray[Any] | None:
        if param is None:
            return None
        assert found is not None, "the backend returned no gradient for a parameter"
        lengths = tuple(self.call.axes.param_shape[axis] for axis in self.plan.param_order)
        back = layout.inverse(self.plan.param_order)
        return found.reshape(lengths).transpose(back).reshape(param.view.shape)

    def _zeros(self) -> Grads:
        call = self.call
        operands = call.x, call.weight, call.bias, call.residual or call.addend
        return Grads._make(None if operand is None else zeros_like(operand.view) for operand in operands)


def ran_before(call: Call, backend: Backend, stats: tuple[Any, Any]) -> Ran:
    """What `compute` leaves of a plain norm with an activation at most, which the backend ran before, with these
    statistics."""
    placed = place(call)
    axes, plan = call.axes, placed.plan
    bias = None if call.bias is None else view_param(call.bias.view, axes, plan)
    param_shape = plan.param_shape if _has_params(call) else None
    given = placed.five_axes(), *stats, _weight(call, plan), param_shape, call.fixed is not None, bias
    return Ran(call, plan, backend, Saved(*given, epilogue=_epilogue(call, plan)))


class GivenNorm:
    """A checked batch norm with given statistics, for a gradient that flows through them all the same.

    The statistics are those of more than x, and so are the sums that dx needs. Each is (C,), in float64.
    """

    def __init__(self, call: Call) -> None:
        placed = place(call)
        self._call, self._plan = call, placed.plan
        self._backend = dispatch.select(request(call, placed.plan), call.backend, placed.copies)
        assert call.fixed is not None
        mean, rstd = fixed_stats(call.fixed[0].view, call.fixed[1].view, call.eps, placed.plan.layout.n)
        self._inputs = placed.five_axes(), mean, rstd, _weight(call, placed.plan)

    def sums(self, dy: NDArray[Any]) -> tuple[NDArray[np.float64], ...]:
        """sum(weight * dy), sum(weight * dy * xhat), sum(dy * xhat) and sum(dy) of each channel."""
        shape = self._call.axes.kept_shape
        found = self._backend.backward_sums(self._five_axes(dy), *self._inputs, self._plan.param_shape)
        return tuple(np.asarray(stat, np.float64).reshape(shape) for stat in found)

    def gradient(self, dy: NDArray[Any], k1: NDArray[np.float64], k2: NDArray[np.float64]) -> NDArray[Any]:
        """dx = rstd * (weight * dy - k1 - xhat * k2)"""
        stats = tuple(np.ascontiguousarray(k.reshape(self._inputs[1].shape)) for k in (k1, k2))
        return from_five_axes(
            self._backend.backward_apply(self._five_axes(dy), *self._inputs, *stats), self._call, self._plan
        )

    def _five_axes(self, dy: NDArray[Any]) -> NDArray[Any]:
        return view_input(dy, self._call.axes, self._plan)


class Pullback:
    """Maps the gradient of a result to the gradients of its inputs; made by `nbnorm.vjp`.

    Holds references to the inputs and the statistics, and no new tensor of x's size but the copies that
    `nbnorm.explain` tells of, if there are any: the inputs must not change before it is called.
    """

    def __init__(self, call: Call, ran: Any) -> None:
        self._made = call, ran

    def _parts(self) -> tuple[Call, Any]:
        """The call, and what its forward left."""
        return self._made

    @property
    def _call(self) -> Call:
        return self._parts()[0]

    @property
    def _ran(self) -> Any:
        return self._parts()[1]

    def __call__(self, dy: Any) -> Grads:
        """Gradients for one cotangent.

        Parameters
        ----------
        dy : array of x's shape and dtype, of any supported kind
            For a norm that returns the sum too, the pair of both gradients; None stands for zeros in the second.

        Returns
        -------
        Grads
            Each gradient of the kind, dtype and shape of what it belongs to; None where there is nothing. Where x and
            residual are added before the norm, their gradients are one array.
        """
        call, dtotal = self._call, None
        if call.addend is not None:
            if not isinstance(dy, tuple) or len(dy) != 2:
                raise TypeError(f"dy must be the pair (dy, dh), as the result is (y, h); got {type(dy).__name__}")
            dy, dtotal = dy[0], None if dy[1] is None else self._checked(dy[1], "dh")
        view = self._checked(dy, "dy")
        if call.dropout is not None:
            view = call.dropout(np.array(view))
        return self._given_back(self._ran.gradients(view, dtotal))

    def vjp(self, dy: Any) -> tuple[Grads, SecondPullback]:
        """The gradients for one cotangent, and the function that takes gradients back through them.

        Parameters
        ----------
        dy : array of x's shape and dtype

        Returns
        -------
        (grads, pullback)
            What the call returns, and a `SecondPullback`. dy must not change before that runs.

        Raises
        ------
        TypeError
            With an activation or dropout, for the norm of a sum and for batch renormalization, whose second derivatives
            are not here. An activation can be differentiated apart from the norm.

        Examples
        --------
        >>> import numpy as np, nbnorm
        >>> x, dy = np.array([[1.0, 2.0, 4.0]]), np.array([[1.0, 0.0, 0.0]])
        >>> _, pullback = nbnorm.vjp(nbnorm.layer_norm, x, 3)
        >>> grads, pullback2 = pullback.vjp(dy)
        >>> ddy, second = pullback2(nbnorm.Grads(np.array([[0.0, 1.0, 0.0]])))
        >>> ddy.round(4).tolist(), second.x.round(4).tolist()
        ([[-0.3436, 0.5154, -0.1718]], [[-0.18, 0.0982, 0.0818]])
        """
        call = self._call
        for present, what in (
            (call.activation is not None, f"activation={call.activation!r}"),
            (call.addend is not None, "the norm of a sum"),
            (call.dropout is not None or call.dropped is not None, "dropout"),
            (call.renorm is not None, "batch renormalization"),
            (not on_host(call.x.view), f"an array on {call.x.view.device}"),
        ):
            if present:
                raise TypeError(f"pullback.vjp must be of a norm alone; {what} has no second derivatives")
        view = self._checked(dy, "dy")
        return self._given_back(self._ran.gradients(view, None)), SecondPullback(self, view)

    def second(self, dy: NDArray[Any], cotangents: Grads) -> tuple[Array, Grads]:
        """What `SecondPullback` returns."""
        given: list[NDArray[Any] | None] = []
        for name, operand, cotangent in zip(Grads._fields, self._operands(), cotangents, strict=True):
            if cotangent is None:
                given.append(None)
            elif operand is None:
                raise ValueError(f"cotangents.{name} must be None, as there is no {name}")
            else:
                given.append(check_like(operand, cotangent, f"cotangents.{name}", as_=name).view)
        ddy, found = self._ran.second(dy, Grads(*given))
        return self._call.x.wrap(ddy), self._given_back(found)

    def _operands(self) -> tuple[Operand | None, ...]:
        call = self._call
        return call.x, call.weight, call.bias, call.residual or call.addend

    def _checked(self, dy: Array, name: str) -> NDArray[Any]:
        return check_like(self._call.x, dy, name).view

    def _given_back(self, found: Grads) -> Grads:
        """Each gradient as its operand's kind and dtype."""
        if self._call.dropped is not None:
            found = found._replace(x=self._call.dropped(found.x))
        with np.errstate(over="ignore", invalid="ignore"):
            grads = Grads._make(
                None if operand is None else operand.wrap(_as_dtype(gradient, operand.view.dtype))
                for operand, gradient in zip(self._operands(), found, strict=True)
            )
        return grads if self._call.addend is None else grads._replace(residual=grads.x)


def _as_dtype(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    return array if array.dtype == dtype else array.astype(dtype)


class SecondPullback:
    """Maps the gradients of a norm's gradients to the gradients of what those came from; made by `Pullback.vjp`."""

    def __init__(self, pullback: Pullback, dy: NDArray[Any]) -> None:
        self._pullback, self._dy = pullback, dy

    def __call__(self, cotangents: Grads) -> tuple[Array, Grads]:
        """Gradients for one cotangent of the gradients. Costs about four passes over x and dy, with temporaries.

        Parameters
        ----------
        cotangents : Grads
            The gradient of a loss with respect to each of the gradients; None stands for zeros.

        Returns
        -------
        (ddy, Grads)
            With respect to dy, and to the inputs of the norm; zeros for the bias and the residual.
        """
        if not isinstance(cotangents, Grads):
            raise TypeError(f"cotangents must be Grads; got {type(cotangents).__name__}")
        return self._pullback.second(self._dy, cotangents)
