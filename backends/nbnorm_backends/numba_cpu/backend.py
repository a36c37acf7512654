"""The backend itself: which family of kernels a view goes to, what is allocated, who runs the chunks."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numba.core.compiler_lock import global_compiler_lock
from numpy.typing import NDArray

from nbnorm.backend import PLAIN, Backend, Epilogue, Grads, Request, Saved
from nbnorm.dispatch import hold_over_fork
from nbnorm.parallel import thread_count
from nbnorm.statistics import Moments
from nbnorm_backends.numba_cpu import again, columns, outputs, runs
from nbnorm_backends.numba_cpu.kernels import RSTD
from nbnorm_backends.numba_cpu.options import NOTHING_JOINED, Joined, Options, options_of
from nbnorm_backends.numba_cpu.pool import Pool, Prange, Scheduler
from nbnorm_backends.numba_cpu.tables import moments_of, table_of
from nbnorm_backends.numba_cpu.tuning import TUNING
from nbnorm_backends.numba_cpu.whole import WholeOps

Array = NDArray[Any]
OPTIONLESS = options_of(None, PLAIN)

# Numba compiles under one process-wide lock. A fork while another thread compiles leaves it locked in the child for
# ever (6 of 6 children hung); holding it during the fork does not (0 of 6).
hold_over_fork(global_compiler_lock)
hold_over_fork(outputs.recycler.lock)  # likewise, for a moment, while memory changes hands


class NumbaBackend(WholeOps, Backend):
    """Fused forward and backward on the CPU. The four smaller methods run the same kernels, one half at a time."""

    name = "numba"

    def __init__(self) -> None:
        self.scheduler = _scheduler()

    def reject(self, request: Request) -> str | None:
        return self.scheduler.refusal() if isinstance(self.scheduler, Prange) else None

    def fuses(self, request: Request) -> bool:
        return True

    def statistics(self, x: Array, *, center: bool, mask: Array | None = None, epilogue: Epilogue = PLAIN) -> Moments:
        table = table_of(x)
        self._forward(x, None, None, 0.0, options_of(mask, epilogue._replace(residual=None)), center, True, table)
        return moments_of(x.shape, table, mask)

    def forward(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        *,
        center: bool,
        stats: tuple[Array | None, Array] | None = None,
        mask: Array | None = None,
        epilogue: Epilogue = PLAIN,
        out: Array | None = None,
    ) -> tuple[Array, Moments | None, Array]:
        y = outputs.empty(x.shape, x.dtype) if out is None else out
        table = table_of(x, stats)
        find = stats is None
        self._forward(x, weight, bias, eps, options_of(mask, epilogue), center, find, table, y=y)
        return y, moments_of(x.shape, table, mask) if find else None, table[RSTD].reshape(x.shape[0], x.shape[2])

    def repeated(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        *,
        center: bool,
        epilogue: Epilogue = PLAIN,
        shape: tuple[int, ...],
        bound: bool = False,
    ) -> Callable[..., Any]:
        keys: dict[str, Any] = {"center": center, "shape": shape}
        if bound and x.size <= TUNING.serial and _family(x) is runs:
            found = again.bound(x, weight, bias, options_of(None, epilogue), eps=eps, **keys)
            if found is not None:
                return found
        normalize = None if bound else self._normalizes(x, weight, bias, epilogue, eps=eps, **keys)
        if normalize is not None:
            return again.repeated(normalize, x.shape[0] * x.shape[2])
        return super().repeated(x, weight, bias, eps, epilogue=epilogue, bound=bound, **keys)

    def repeated_with_statistics(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        statistics: tuple[Array, Array],
        eps: float,
        *,
        momentum: float | None,
        epilogue: Epilogue = PLAIN,
        shape: tuple[int, ...],
    ) -> Callable[..., Any]:
        n, g = x.shape[0], x.shape[2]
        if _one_table(n, statistics, momentum):
            normalize = self._normalizes(x, weight, bias, epilogue, center=True, eps=eps, shape=shape)
            if normalize is not None:
                return again.repeated_with_statistics(normalize, n * g, statistics, eps, momentum)
        keys: dict[str, Any] = {"momentum": momentum, "epilogue": epilogue, "shape": shape}
        return super().repeated_with_statistics(x, weight, bias, statistics, eps, **keys)

    def repeated_vjp(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        *,
        center: bool,
        epilogue: Epilogue = PLAIN,
        shape: tuple[int, ...],
        statistics: tuple[Array, Array] | None = None,
        momentum: float | None = None,
    ) -> Callable[..., Any] | None:
        n, g = x.shape[0], x.shape[2]
        if statistics is not None and not _one_table(n, statistics, momentum):
            return None
        keys: dict[str, Any] = {"center": center, "shape": shape}
        normalize = self._normalizes(x, weight, bias, epilogue, eps=eps, **keys)
        if normalize is None:
            return None
        assert isinstance(self.scheduler, Pool)
        options, fixed = options_of(None, epilogue), statistics is not None and momentum is None
        differentiates = again.differentiates_columns if _family(x) is columns else again.differentiates_runs
        differentiate = differentiates(self.scheduler, x, weight, bias, options, fixed=fixed, **keys)
        if statistics is None:
            return again.repeated(normalize, n * g, differentiate)
        return again.repeated_with_statistics(normalize, n * g, statistics, eps, momentum, differentiate)

    def _normalizes(
        self, x: Array, weight: Array | None, bias: Array | None, epilogue: Epilogue, **keys: Any
    ) -> again.Normalize | None:
        """What runs a call again with less to do; None where nothing does, or a subclass has steps of its own."""
        own = type(self).forward is NumbaBackend.forward and type(self).backward is NumbaBackend.backward
        if not (own and isinstance(self.scheduler, Pool)):
            return None
        options = options_of(None, epilogue)
        if _family(x) is columns:
            if columns.lie_along_r(weight, bias):
                return None
            return again.normalizes_columns(self.scheduler, x, weight, bias, options, **keys)
        return again.normalizes_runs(self.scheduler, x, weight, bias, options, **keys)

    def add_forward(
        self,
        x: Array,
        addend: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        *,
        center: bool,
        out: Array | None = None,
    ) -> tuple[Array, Array, Moments, Array]:
        y = outputs.empty(x.shape, x.dtype) if out is None else out
        total = outputs.empty(x.shape, x.dtype)
        sealed = total.view()
        sealed.flags.writeable = False
        table, joined = table_of(x), Joined(x, addend, total)
        self._forward(sealed, weight, bias, eps, options_of(None, PLAIN), center, True, table, joined, y)
        return y, total, moments_of(x.shape, table), table[RSTD].reshape(x.shape[0], x.shape[2])

    def backward(self, dy: Array, saved: Saved, *, addend: Array | None = None) -> Grads:
        x, epilogue = saved.x, saved.epilogue
        dx = outputs.empty(x.shape, x.dtype)
        dz = None if epilogue.residual is None else outputs.empty(x.shape, x.dtype)
        _, dweight, dbias = self._backward(
            dy,
            x,
            saved.weight,
            saved.bias,
            options_of(saved.mask, epilogue),
            stats=table_of(x, (saved.mean, saved.rstd), saved.count),
            center=saved.mean is not None,
            fixed=saved.fixed,
            find=not saved.fixed or saved.param_shape is not None,
            param_shape=saved.param_shape,
            addend=addend,
            dz=dz,
            dx=dx,
        )
        return Grads(dx, dweight, dbias, dz)

    def moments(self, x: Array, *, center: bool) -> Moments:
        return self.statistics(x, center=center)

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
        sums, dweight, dbias = self._backward(
            dy, x, weight, None, OPTIONLESS, stats=table_of(x, (mean, rstd), 1), param_shape=param_shape, dx=_nothing(x)
        )
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
        dx = outputs.empty(x.shape, x.dtype)
        table = table_of(x, (mean, rstd))
        self._backward(dy, x, weight, None, OPTIONLESS, stats=table, find=False, coefficients=given, dx=dx)
        return dx

    def _forward(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        options: Options,
        center: bool,
        find: bool,
        stats: Array,
        joined: Joined = NOTHING_JOINED,
        y: Array | None = None,
    ) -> None:
        """Fill `stats` where `find` asks, and y if it is given."""
        target = _nothing(x) if y is None else y
        keys = {
            "center": center,
            "eps": eps,
            "find": find,
            "stats": stats,
            "joined": joined,
            "y": target,
        }
        _family(x).forward(self.scheduler, x, weight, bias, options, **keys)

    def _backward(
        self,
        dy: Array,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        options: Options,
        *,
        stats: Array,
        center: bool = True,
        fixed: bool = False,
        find: bool = True,
        coefficients: Array | None = None,
        param_shape: tuple[int, ...] | None = None,
        addend: Array | None = None,
        dz: Array | None = None,
        dx: Array,
    ) -> tuple[Array, Array | None, Array | None]:
        """Coefficients (2, n, g), found or given; dweight; dbias. dx is written unless it is empty."""
        found = np.zeros((2, x.shape[0], x.shape[2])) if coefficients is None else coefficients
        dweight, dbias = _family(x).backward(
            self.scheduler,
            dy,
            x,
            weight,
            bias,
            options,
            stats=stats,
            center=center,
            fixed=fixed,
            find=find,
            coefficients=found.reshape(2, -1),
            param_shape=param_shape,
            addend=addend,
            dz=dz,
            dx=dx,
        )
        return found, dweight, dbias


def _scheduler() -> Scheduler:
    """NBNORM_SCHEDULER: "pool" (the default) or "prange"."""
    wanted = os.environ.get("NBNORM_SCHEDULER", "").strip() or "pool"
    if wanted not in ("pool", "prange"):
        raise ValueError(f"NBNORM_SCHEDULER must be pool or prange; got {wanted!r}")
    return Pool(thread_count()) if wanted == "pool" else Prange(thread_count())


def _one_table(n: int, statistics: tuple[Array, Array], momentum: float | None) -> bool:
    """Whether compiled code takes given statistics, or moves them, by the table of n samples."""
    return (n == 1 or momentum is None) and statistics[0].itemsize > 2


def _family(x: Array) -> ModuleType:
    """By what is innermost in memory: elements of one statistic, or of many."""
    return columns if x.shape[1] > 1 and x.shape[4] == 1 else runs


def _nothing(x: Array) -> Array:
    """What kernels do not write to."""
    return np.empty((0, 0, 0, 0, 0), x.dtype)
