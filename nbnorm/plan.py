"""A call that is checked once, in the open, to be run on other arrays, whatever its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nbnorm.arguments import check_apart, check_out_of, check_writable
from nbnorm.engine import Call, check_like
from nbnorm.operation import prepared
from nbnorm.repeat import bound


class Plan:
    """One call of a norm, checked, to be run on other arrays; made by `nbnorm.plan`."""

    def __init__(self, call: Call) -> None:
        self._call = call
        x = call.x.view
        self._shape, self._strides, self._dtype = x.shape, x.strides, x.dtype
        self._key, self._kind = call.x.adapter.key, type(call.x.given)
        self._seen = self._key(call.x.given)  # None, where x is in host memory
        self._again = bound(call)

    def __call__(self, x: Any, *, out: Any = None) -> Any:
        """Run the call on another x.

        Parameters
        ----------
        x : array of the shape, dtype and kind of the one that the plan was made with
        out : array like x
            Where to write the result; x itself, or memory apart from it.

        Returns
        -------
        What the norm returns.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what was expected and what came; nothing has been written.
        """
        again = self._again
        if again is not None and self._fits(x) and (out is None or self._may_take(out)):
            y = again(x, out)
            if y is not None:
                return y
        return self._checked(x, out).forward()

    def _fits(self, array: Any) -> bool:
        if array.__class__ is not self._kind:
            return False
        if self._seen is not None:
            return bool(self._key(array) == self._seen)
        return bool(array.shape == self._shape and array.dtype == self._dtype and array.strides == self._strides)

    def _may_take(self, out: Any) -> bool:
        return self._fits(out) and (self._seen is not None or out.flags.writeable)

    def _checked(self, x: Any, out: Any) -> Call:
        """The call with these arrays."""
        first = self._call
        operand = check_like(first.x, x, "x", as_="the first x")
        if operand.adapter is not first.x.adapter:
            raise TypeError(f"x must be an array as the plan was made with, {first.x.adapter.kind}; got {type(x)}")
        call = replace(first, x=operand)
        if call.running is not None:
            check_writable(call, (call.running.mean, call.running.var))
        if out is not None:
            check_out_of(call, out)
            given = call.running or call.renorm
            statistics = call.fixed if given is None else (given.mean, given.var)
            if statistics is not None:
                check_apart(call, statistics)
        return call


def plan(op: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Plan:
    """Check the arguments of a norm once, to run it on other arrays of x's shape and dtype with little more than its
    kernel.

    Parameters
    ----------
    op : one of the norms, such as `nbnorm.batch_norm`
    x : array
        Like those that the plan will run on. It is not computed with.
    *args, **kwargs
        The norm's other arguments, but `out`, which the plan takes. They are kept, not copied: the plan sees what is
        written to weight and bias later, and updates running statistics in each run.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError, TypeError, BackendError
        As `op` does; TypeError where `op` has no plan.

    Notes
    -----
    For layer, RMS and other norms along the last axes of small NumPy arrays the Numba backend compiles a function of
    its own, once for each dtype and number of axes: about 2 s, or 0.2 s from its cache on disk.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]])
    >>> normalize = nbnorm.plan(nbnorm.layer_norm, x, 2, eps=1e-9)
    >>> out = np.empty_like(x)
    >>> normalize(x * 5, out=out) is out
    True
    >>> out.round(6).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """
    if "out" in kwargs:
        raise TypeError("out must be given to the plan, plan(x, out=...), not to nbnorm.plan")
    call = prepared(op, (x, *args), kwargs)
    if not isinstance(call, Call) or call.op == "moments" or call.out is not None:
        raise TypeError(f"op must be a norm of one result for a plan; got {op!r} with {', '.join(kwargs) or 'x'}")
    return Plan(call)
