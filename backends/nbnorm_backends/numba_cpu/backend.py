"""The backend itself: which family of kernels a view goes to, what is allocated, who runs the chunks."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import numpy as np
from numba.core.compiler_lock import global_compiler_lock
from numpy.typing import NDArray

from nbnorm.backend import Backend, Grads, Request, Saved
from nbnorm.dispatch import hold_over_fork
from nbnorm.statistics import Moments
from nbnorm_backends.numba_cpu import columns, runs
from nbnorm_backends.numba_cpu.elements import converts_float16
from nbnorm_backends.numba_cpu.kernels import M2, MEAN, RESIDUAL, RSTD
from nbnorm_backends.numba_cpu.pool import Pool, Prange, Scheduler
from nbnorm_backends.numba_cpu.threads import thread_count

Array = NDArray[Any]

# Numba compiles under one process-wide lock. A fork while another thread compiles leaves it locked in the child for
# ever (6 of 6 children hung); holding it during the fork does not (0 of 6).
hold_over_fork(global_compiler_lock)


class NumbaBackend(Backend):
    """Fused forward and backward on the CPU. The four smaller methods run the same kernels, one half at a time."""

    name = "numba"

    def __init__(self) -> None:
        self.scheduler = _scheduler()
        self._float16 = converts_float16()

    def reject(self, request: Request) -> str | None:
        if isinstance(self.scheduler, Prange) and (reason := self.scheduler.refusal()):
            return reason
        if request.dtype == "float16" and not self._float16:
            return "float16 needs the F16C instructions, which this processor (or NUMBA_CPU_NAME) lacks"
        if "r" in request.param_axes and (len(request.param_axes) > 1 or request.split):
            return "weight and bias lie on both sides of the kept axes in memory, which is not fused"
        return None

    def forward(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        *,
        center: bool,
        stats: tuple[Array | None, Array] | None = None,
        activation: str | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Moments | None, Array]:
        if activation is not None:  # not fused yet: composed, in one more pass
            return super().forward(x, weight, bias, eps, center=center, stats=stats, activation=activation, out=out)
        y = np.empty(x.shape, x.dtype) if out is None else out
        table = _table(x, stats)
        find = stats is None
        _family(x).forward(self.scheduler, x, weight, bias, center=center, eps=eps, find=find, stats=table, y=y)
        return y, _moments(x, table) if find else None, table[RSTD].reshape(x.shape[0], x.shape[2])

    def backward(self, dy: Array, saved: Saved) -> Grads:
        if saved.activation is not None:
            return super().backward(dy, saved)
        x, stats = saved.x, (saved.mean, saved.rstd)
        find = not saved.fixed or saved.param_shape is not None
        divisors = np.full(2, 0 if saved.fixed else saved.count, np.float64)
        if saved.mean is None:
            divisors[0] = 0.0
        dx = np.empty(x.shape, x.dtype)
        _, dweight, dbias = self._backward(dy, x, stats, saved.weight, find, divisors, saved.param_shape, dx)
        return Grads(dx, dweight, dbias)

    def moments(self, x: Array, *, center: bool) -> Moments:
        table = _table(x, None)
        _family(x).forward(self.scheduler, x, None, None, center=center, eps=0.0, find=True, stats=table, y=_nothing(x))
        return _moments(x, table)

    def apply(
        self, x: Array, mean: Array | None, rstd: Array, weight: Array | None, bias: Array | None, *, out: Array | None
    ) -> Array:
        return self.forward(x, weight, bias, 0.0, center=mean is not None, stats=(mean, rstd), out=out)[0]

    def backward_sums(
        self,
        dy: Array,
        x: Array,
        mean: Array | None,
        rstd: Array,
        weight: Array | None,
        param_shape: tuple[int, ...] | None,
    ) -> tuple[Array, Array, Array | None, Array | None]:
        sums, dweight, dbias = self._backward(dy, x, (mean, rstd), weight, True, np.ones(2), param_shape, _nothing(x))
        return sums[0], sums[1], dweight, dbias

    def backward_apply(
        self,
        dy: Array,
        x: Array,
        mean: Array | None,
        rstd: Array,
        weight: Array | None,
        k1: Array | None,
        k2: Array | None,
    ) -> Array:
        given = np.stack([np.zeros(rstd.shape) if k is None else k for k in (k1, k2)])
        dx = np.empty(x.shape, x.dtype)
        self._backward(dy, x, (mean, rstd), weight, False, np.zeros(2), None, dx, given)
        return dx

    def _backward(
        self,
        dy: Array,
        x: Array,
        stats: tuple[Array | None, Array],
        weight: Array | None,
        find: bool,
        divisors: Array,
        param_shape: tuple[int, ...] | None,
        dx: Array,
        given: Array | None = None,
    ) -> tuple[Array, Array | None, Array | None]:
        """Coefficients (2, n, g), found or given; dweight; dbias. dx is written unless it is empty."""
        shape = 2, x.shape[0], x.shape[2]
        coefficients = np.zeros(shape) if given is None else given
        dweight, dbias = _family(x).backward(
            self.scheduler,
            dy,
            x,
            weight,
            stats=_table(x, stats),
            find=find,
            divisors=divisors,
            coefficients=coefficients.reshape(2, -1),
            param_shape=param_shape,
            dx=dx,
        )
        return coefficients, dweight, dbias


def _scheduler() -> Scheduler:
    """NBNORM_SCHEDULER: "pool" (the default) or "prange"."""
    wanted = os.environ.get("NBNORM_SCHEDULER", "").strip() or "pool"
    if wanted not in ("pool", "prange"):
        raise ValueError(f"NBNORM_SCHEDULER must be pool or prange; got {wanted!r}")
    return Pool(thread_count()) if wanted == "pool" else Prange(thread_count())


def _family(x: Array) -> ModuleType:
    """By what is innermost in memory: elements of one statistic, or of many."""
    return columns if x.shape[1] > 1 and x.shape[4] == 1 else runs


def _table(x: Array, stats: tuple[Array | None, Array] | None) -> Array:
    """The kernels' array of statistics (4, n*g), with what is given."""
    table = np.zeros((4, x.shape[0] * x.shape[2]))
    if stats is not None:
        mean, rstd = stats
        table[MEAN] = 0.0 if mean is None else mean.reshape(-1)
        table[RSTD] = rstd.reshape(-1)
    return table


def _moments(x: Array, table: Array) -> Moments:
    n, r, g, c, s = x.shape
    mean, residual, m2 = (table[row].reshape(n, g) for row in (MEAN, RESIDUAL, M2))
    return Moments(r * c * s, mean, m2, residual)


def _nothing(x: Array) -> Array:
    """What kernels do not write to."""
    return np.empty((0, 0, 0, 0, 0), x.dtype)
