"""Calls that are made again and again: checked once, and then found by what their checks depend on.

Remembered is a call of a norm with nothing to it but arrays of NumPy's, or of a library's on a device: x, weight, bias,
running statistics and out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm import arrays, dispatch, engine
from nbnorm.backend import Backend, Epilogue, Grads, apart, may_write
from nbnorm.devices import DeviceArray, on_host
from nbnorm.engine import Call, Operand, Pullback, Ran, ran_before
from nbnorm.layout import Plan

STATISTICS = ("running_mean", "running_var")
# Types whose values stay as they are, and of whose equal values nobody can tell which was given.
CONSTANT = {int, float, bool, str, type(None), np.int64, np.float32, np.float64}
MOST = 1024  # calls that are remembered; then they are forgotten, and remembered anew
Again = Callable[..., Any]
Place = int | str | None  # of an argument: its position, its keyword, or not given
Allowed = Callable[..., bool]  # (out, x, weight, ...): whether `out` may be written


class Remembered:
    """How to run a call again, and where its arrays stand among the arguments."""

    def __init__(self, again: Again, places: tuple[Place, ...], allowed: Allowed) -> None:
        self._again, self._allowed = again, allowed
        self._x, self._weight, self._bias, self._out = places

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result; None where the call must be checked after all."""
        x = _given(self._x, args, kwargs)
        weight, bias = _given(self._weight, args, kwargs), _given(self._bias, args, kwargs)
        out = _given(self._out, args, kwargs)
        return self._again(x, weight, bias, out) if out is None or self._allowed(out, x, weight, bias) else None


class RememberedWithStatistics(Remembered):
    """The same of a call with running statistics."""

    def __init__(self, again: Again, places: tuple[Place, ...], allowed: Allowed, mean: Place, var: Place) -> None:
        super().__init__(again, places, allowed)
        self._mean, self._var = mean, var

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = self._x, self._weight, self._bias, self._mean, self._var, self._out
        *inputs, out = (_given(place, args, kwargs) for place in places)
        return self._again(*inputs, out) if out is None or self._allowed(out, *inputs) else None


class RememberedVjp:
    """How to run again a call whose gradient is asked for."""

    def __init__(self, remembered: Remembered, prepare: Callable[..., Call], call: Call, backend: Backend) -> None:
        self._remembered, self._prepare, self._backend = remembered, prepare, backend
        self._shape, self._dtype = call.x.view.shape, call.x.view.dtype

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Pullback] | None:
        """What `nbnorm.vjp` returns; None where the call must be checked after all."""
        ran = self._remembered(args, kwargs)
        if ran is None:
            return None
        y, gradient, statistics = ran
        return y, RepeatedPullback(self, args, kwargs, gradient, statistics)

    def fits(self, dy: Any) -> bool:
        """Whether dy needs no check, and no conversion."""
        if dy.__class__ is not np.ndarray or dy.shape != self._shape or dy.dtype != self._dtype:
            return False
        flags = dy.flags
        return bool(flags.c_contiguous and flags.aligned)

    def checked(self, args: tuple[Any, ...], kwargs: dict[str, Any], stats: tuple[Any, Any]) -> tuple[Call, Ran]:
        """The call, its arguments checked once more but for `out`, and what a forward leaves that found these
        statistics."""
        call = self._prepare(*args, **{name: arg for name, arg in kwargs.items() if name != "out"})
        return call, ran_before(call, self._backend, stats)


class RepeatedPullback(Pullback):
    """A pullback of a remembered call: what a plain dy does not need is made when it is asked for."""

    def __init__(
        self,
        remembered: RememberedVjp,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        gradient: Callable[[Any], Grads],
        statistics: Callable[[], tuple[Any, Any]],
    ) -> None:
        self._remembered, self._args, self._kwargs = remembered, args, kwargs
        self._gradient, self._statistics = gradient, statistics
        self._late: tuple[Call, Ran] | None = None

    def __call__(self, dy: Any) -> Grads:
        return self._gradient(dy) if self._remembered.fits(dy) else super().__call__(dy)

    def _parts(self) -> tuple[Call, Ran]:
        if self._late is None:
            self._late = self._remembered.checked(self._args, self._kwargs, self._statistics())
        return self._late


def _given(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if place is None:
        return None
    return args[place] if isinstance(place, int) else kwargs[place]


def key_of(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """All that the checks of a call, and the choice of its backend, depend on: of arrays of NumPy's not the content.

    None where that is more than can be seen: an argument that may change without becoming another, such as a list, or
    an array of no axes that stands for a number.
    """
    key: list[Any] = [op, dispatch.preferred()]
    key += kwargs
    for arg in (*args, *kwargs.values()):
        kind = arg.__class__
        if kind is np.ndarray:
            if not arg.ndim:
                return None
            flags = arg.flags
            key += arg.shape, arg.strides, arg.dtype, flags.aligned, flags.writeable
        elif kind is tuple:
            if not CONSTANT.issuperset(map(type, arg)):
                return None
            key += tuple, arg, *map(type, arg)  # (3,) == (3.0,)
        elif kind in CONSTANT:
            key += kind, arg
        elif (adapter := arrays.by_type.get(kind)) is not None:
            seen = adapter.key(arg)
            if seen is None or not seen[0]:
                return None
            key += kind, seen
        elif isinstance(arg, Backend):
            key += kind, arg
        else:
            return None
    return tuple(key)


def recall(key: tuple[Any, ...] | None) -> Any:
    """The `Remembered` or `RememberedVjp` under a key, if there is one, unless a trace wants to see the decision."""
    return None if key is None or dispatch.traced() else dispatch.registry.calls.get(key)


def remember(
    key: tuple[Any, ...] | None, op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: Any
) -> None:
    """Keep how to run a call again that has just run, if it is of the kind."""
    if key is None or not isinstance(call, Call) or dispatch.traced():
        return
    again = repeated(call) if _statistics(call) is None else repeated_with_statistics(call)
    if again is not None:
        allowed = may_write if on_host(call.x.view) else _checked_behind
        _keep(key, _remembered(again, allowed, op, args, kwargs, call))


def remember_vjp(
    key: tuple[Any, ...] | None,
    op: Callable[..., Any],
    prepare: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    call: Any,
) -> RememberedVjp | None:
    """The same of a call whose gradient is asked for, which has not run yet: what it is to be run by."""
    if key is None or not isinstance(call, Call) or call.op == "moments" or dispatch.traced():
        return None
    again, backend = repeated_vjp(call) if on_host(call.x.view) else (None, None)
    if again is None or backend is None:
        _keep(key, _not_repeated)
        return None
    found = RememberedVjp(_remembered(again, _lies_apart, op, args, kwargs, call), prepare, call, backend)
    _keep(key, found)
    return found


def _not_repeated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What is remembered of a call of which it is known that it must be checked: to find that out costs 30 us."""


def _keep(key: tuple[Any, ...], found: Callable[..., Any]) -> None:
    calls = dispatch.registry.calls
    if len(calls) >= MOST:
        calls.clear()
    calls[key] = found


def _remembered(
    again: Again, allowed: Allowed, op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: Call
) -> Remembered:
    """How `again` finds its arrays among such arguments."""
    names = list(inspect.signature(op).parameters)

    def place(name: str) -> Place:
        return names.index(name) if name in names[: len(args)] else name if name in kwargs else None

    # x is called weight in weight_standardization, which has no parameters
    others = (place(name) if getattr(call, name) is not None else None for name in ("weight", "bias", "out"))
    places = place(names[0]), *others
    if _statistics(call) is None:
        return Remembered(again, places, allowed)
    return RememberedWithStatistics(again, places, allowed, *map(place, STATISTICS))


def _lies_apart(out: NDArray[Any], *inputs: NDArray[Any] | None) -> bool:
    """Whether `out` overwrites nothing that a gradient needs."""
    return apart((out,), *inputs)


def repeated(call: Call, *, bound: bool = False) -> Again | None:
    """A function (x, weight, bias, out) that does what the call does, for arrays as it had; with `bound` of (x, out),
    for weight and bias as they will be. None where there is more to the call than these; it has no statistics."""
    ready = _ready(call, (call.x, call.weight, call.bias, call.out))
    if ready is None:
        return None
    placed, backend, epilogue = ready
    weight, bias = _params(call, placed.plan)
    keys: dict[str, Any] = {"center": call.center, "epilogue": epilogue, "shape": call.x.view.shape, "bound": bound}
    return _of_library(call, backend.repeated(placed.five_axes(), weight, bias, call.eps, **keys))


def repeated_with_statistics(call: Call) -> Again | None:
    """A function (x, weight, bias, running_mean, running_var, out) that does what a call with these does, as
    `Backend.repeated_with_statistics` says; None where there is more to it."""
    statistics = _statistics(call)
    if statistics is None:
        return None
    ready = _ready(call, (call.x, call.weight, call.bias, call.out, *statistics))
    if ready is None:
        return None
    placed, backend, epilogue = ready
    mean, var = (stat.view for stat in statistics)
    momentum = None if call.running is None else call.running.momentum
    again = backend.repeated_with_statistics(
        placed.five_axes(),
        *_params(call, placed.plan),
        (mean, var),
        call.eps,
        momentum=momentum,
        epilogue=epilogue,
        shape=call.x.view.shape,
    )
    return _of_library(call, again)


def repeated_vjp(call: Call) -> tuple[Again | None, Backend | None]:
    """The same of either kind, for a call whose gradient is asked for, as `Backend.repeated_vjp` says, and the backend
    that does it."""
    statistics = _statistics(call)
    ready = _ready(call, (call.x, call.weight, call.bias, call.out, *(statistics or ())))
    if ready is None:
        return None, None
    placed, backend, epilogue = ready
    keys: dict[str, Any] = {"center": call.center, "epilogue": epilogue, "shape": call.x.view.shape}
    if statistics is not None:
        keys["statistics"] = tuple(stat.view for stat in statistics)
        keys["momentum"] = None if call.running is None else call.running.momentum
    return backend.repeated_vjp(placed.five_axes(), *_params(call, placed.plan), call.eps, **keys), backend


def bound(call: Call) -> Again | None:
    """A function (x, out) that does what the call does, for weight, bias and statistics as they will be, or returns
    None and has done nothing; None where there is more to the call than these."""
    statistics = _statistics(call)
    host = on_host(call.x.view)
    if statistics is None and host:
        return repeated(call, bound=True)
    again = repeated(call) if statistics is None else repeated_with_statistics(call)
    if again is None:
        return None
    operands = call.weight, call.bias, *(statistics or ())
    if not host:
        kept = [None if operand is None else operand.view.owner for operand in operands]
        return lambda x, out: again(x, *kept, out)
    given = [None if operand is None else operand.view for operand in operands]

    def bound_again(x: NDArray[Any], out: NDArray[Any] | None) -> Any:
        fits = out is None or (out.flags.aligned and may_write(out, x, *given))
        return again(x, *given, out) if fits and x.flags.aligned else None

    return bound_again


def _statistics(call: Call) -> tuple[Operand, Operand] | None:
    """The running statistics of a call, be they given or to be moved."""
    return call.fixed if call.running is None else (call.running.mean, call.running.var)


def _params(call: Call, plan: Plan) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """weight and bias on five axes."""
    weight, bias = (
        None if param is None else param.view.reshape(plan.param_shape) for param in (call.weight, call.bias)
    )
    return weight, bias


def _ready(call: Call, operands: tuple[Operand | None, ...]) -> tuple[engine.Placed, Backend, Epilogue] | None:
    """What runs a call of nothing but these operands, arrays that lie as kernels want them; None for others."""
    more = call.mask, call.residual, call.addend, call.renorm, call.dropout, call.dropped
    if any(part is not None for part in more) or call.return_moments or call.weight_offset or not call.x.view.size:
        return None
    placed = engine.place(call)
    if placed.copied or not all(operand is None or _lies_well(operand, call, placed.plan) for operand in operands):
        return None
    decision = dispatch.decide(engine.request(call, placed.plan), call.backend)
    if decision.chosen is None:
        return None
    return placed, dispatch.backend_of(decision, call.backend), Epilogue(call.activation, call.order)


def _lies_well(operand: Operand, call: Call, plan: Plan) -> bool:
    """Whether kernels see an array that was given as it lies: one of NumPy's in C order, on a device in the plan's."""
    view = operand.view
    if on_host(view):
        plain = engine.plain(view) and plan.order == tuple(range(len(plan.order)))
        return plain and type(operand.given) is np.ndarray
    if operand.adapter.key(operand.given) is None or plan.param_order != tuple(range(len(plan.param_order))):
        return False
    of_x = operand is call.x or operand is call.out
    return engine.view_like(view, call.axes, plan, copy=False) is not None if of_x else engine.plain(view)


def _of_library(call: Call, run: Again | None) -> Again | None:
    """Of what a backend repeats on addresses a function of a library's arrays; of another, that one itself."""
    x = call.x.view
    if run is None or not isinstance(x, DeviceArray):
        return run
    address, like, note = x.library.address, x.library.like, call.x.adapter.written
    moves = call.running is not None

    def again(x: Any, *inputs: Any) -> Any:
        *inputs, out = inputs
        y = like(x) if out is None else out
        given = [None if array is None else address(array) for array in inputs]
        if not run(address(x), *given, address(y), own=out is None):
            return None
        if out is not None:
            note(out)
        if moves:
            note(inputs[2])
            note(inputs[3])
        return y

    return again


def _checked_behind(*_: Any) -> bool:
    """Of arrays on a device the backend looks at the addresses, which it needs in any case."""
    return True
