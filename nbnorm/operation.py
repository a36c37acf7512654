"""What an operation is: a function that checks its arguments and prepares a call, which can be run, differentiated, or
explained without being run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol

from nbnorm import dispatch
from nbnorm.backend import Grads
from nbnorm.repeat import key_of, recall, remember, remember_vjp

P = ParamSpec("P")


class Prepared(Protocol):
    """A call whose arguments were checked."""

    def forward(self) -> Any: ...
    def vjp(self) -> tuple[Any, Callable[[Any], Grads]]: ...
    def explain(self) -> dispatch.Decision: ...


PREPARATIONS: dict[Callable[..., Any], Callable[..., Prepared]] = {}  # by the public function


def operation(result: str) -> Callable[[Callable[P, Prepared]], Callable[P, Any]]:
    """Make of a function that checks and prepares the public one that runs what it prepared, with `result` for the
    annotation of what comes back; `vjp` and `explain` find the former through the latter."""

    def decorate(prepare: Callable[P, Prepared]) -> Callable[P, Any]:
        @functools.wraps(prepare)
        def run(*args: P.args, **kwargs: P.kwargs) -> Any:
            key = key_of(run, args, kwargs)
            found = recall(key)
            if found is not None:
                result = found(args, kwargs)
                if result is not None:
                    return result
            call = prepare(*args, **kwargs)
            result = call.forward()
            remember(key, run, args, kwargs, call)
            return result

        run.__annotations__ = {**prepare.__annotations__, "return": result}
        run.__signature__ = inspect.signature(prepare).replace(return_annotation=result)  # type: ignore[attr-defined]
        PREPARATIONS[run] = prepare
        return run

    return decorate


def vjp(op: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Callable[[Any], Grads]]:
    """Run a norm and return its result with the function that takes gradients back through it.

    Parameters
    ----------
    op : one of the norms, such as `nbnorm.batch_norm`
    *args, **kwargs
        Its arguments. `out` must not overlap x or residual.

    Returns
    -------
    (result, pullback)
        What `op` returns, and a function of dy that gives `Grads`. The inputs must not change before it runs.

    Raises
    ------
    ValueError, TypeError, BackendError
        As `op` does; TypeError when `op` is not a norm.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x, w = np.array([[1.0, 2.0, 4.0]]), np.ones(3)
    >>> y, pullback = nbnorm.vjp(nbnorm.layer_norm, x, 3, weight=w)
    >>> grads = pullback(np.array([[1.0, 0.0, 0.0]]))
    >>> grads.weight.round(4).tolist(), grads.bias
    ([-1.069, 0.0, 0.0], None)
    """
    prepare = preparation(op)
    key = key_of((vjp, op), args, kwargs)
    found, call = recall(key), None
    if found is None:
        call = prepare(*args, **kwargs)
        found = remember_vjp(key, op, prepare, args, kwargs, call)
    ran: tuple[Any, Callable[[Any], Grads]] | None = None if found is None else found(args, kwargs)
    if ran is not None:
        return ran
    return (call or prepare(*args, **kwargs)).vjp()


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> dispatch.Decision:
    """Which backend would run a call, from which source, and why the others would not; nothing is run.

    Parameters
    ----------
    op : one of the norms, such as `nbnorm.batch_norm`, or `nbnorm.moments`
    *args, **kwargs
        Its arguments, which are checked as in a call.

    Returns
    -------
    Decision

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.zeros((4, 3), np.float32)
    >>> print(nbnorm.explain(nbnorm.layer_norm, x, 3, backend="numpy"))
    layer_norm on cpu, float32: numpy (named by backend=)
    """
    return prepared(op, args, kwargs).explain()


def prepared(op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prepared:
    """The call of an operation, with its arguments checked."""
    return preparation(op)(*args, **kwargs)


def preparation(op: Callable[..., Any]) -> Callable[..., Prepared]:
    """What checks the arguments of an operation."""
    prepare = PREPARATIONS.get(op) if callable(op) else None
    if prepare is None:
        known = ", ".join(sorted(f"nbnorm.{run.__name__}" for run in PREPARATIONS))
        raise TypeError(f"op must be one of {known}; got {op!r}")
    return prepare
