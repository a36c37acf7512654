"""The backend: from five-axis views to plans, and from plans to launches on the stream of the caller's library.

Host arrays, which come only where a call names the backend, are copied to the device and the results back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from nbnorm.backend import PLAIN, Backend, DeviceMoments, Epilogue, Grads, Request, Saved, shape_of_params
from nbnorm.devices import DeviceArray, contiguous, on_host
from nbnorm.layout import Layout
from nbnorm.statistics import Moments
from nbnorm_backends.numba_cuda import again, device, plans
from nbnorm_backends.numba_cuda.device import Device, Start
from nbnorm_backends.numba_cuda.launch import VECTOR_BYTES, real_kind
from nbnorm_backends.numba_cuda.plans import Norm, Plan

View = Any  # a NumPy array, or a DeviceArray
HOST_ONLY = ("batch_renorm",)  # what NumPy computes between two kernels

remembered = lru_cache(maxsize=1024)
forward_of, backward_of, statistics_of = map(remembered, (plans.forward, plans.backward, plans.statistics))
sums_of, gradient_of, commit_of = remembered(plans.sums), remembered(plans.gradient), remembered(plans.commit)


class Pair(NamedTuple):
    """A mean (n, g) as high + low."""

    high: DeviceArray
    low: DeviceArray


class Variance(NamedTuple):
    """Given variances (g,), in place of a rstd (n, g)."""

    var: DeviceArray
    eps: float


class CudaBackend(Backend):
    """The norms and their gradients on a GPU.

    Parameters
    ----------
    open_device : callable
        Makes the `Device` of an ordinal, once for each; a real one, if not given.
    """

    name = "cuda"
    device = "cuda"
    takes_host = True

    def __init__(self, open_device: Callable[[int], Device] | None = None) -> None:
        self._open = open_device or device.CudaDevice
        self._problem = device.problem if open_device is None else lambda: None
        self._devices: dict[int, Device] = {}
        self._lock = threading.Lock()
        self._process = 0  # that opened the first device

    def reject(self, request: Request) -> str | None:
        if "r" in request.param_axes:
            return "has no kernels for weights along an axis that lies, in memory, outside of one that is kept"
        if request.device == "cuda" and request.op in HOST_ONLY:
            return f"computes {request.op} in part on the host: it takes host arrays alone"
        if self._process not in (0, os.getpid()):
            return device.FORKED
        return self._problem()

    def fuses(self, request: Request) -> bool:
        return True

    def device_of(self, ordinal: int) -> Device:
        """The device, opened at its first use; BackendError, where that fails."""
        found = self._devices.get(ordinal)
        if found is None:
            with self._lock:
                found = self._devices.get(ordinal)
                if found is None:
                    found = self._devices[ordinal] = self._open(ordinal)
                    self._process = os.getpid()
        return found

    def _run(self, x: View) -> Run:
        if on_host(x):
            device = self.device_of(0)
            return Run(device, device.memory, host=True)
        return Run(self.device_of(x.memory.ordinal), x.memory, host=False)

    # ---- what the engine calls ---------------------------------------------------------------------------------------

    def fixed_stats(self, mean: View, var: View, eps: float, n: int) -> tuple[Any, Any]:
        """On a device the given arrays themselves."""
        return super().fixed_stats(mean, var, eps, n) if on_host(mean) else (mean, Variance(var, eps))

    def ready(self, x: View, running_mean: View, running_var: View, momentum: float, *, masked: bool) -> Ready:
        """The kernel bound, and the running statistics in the type that it takes."""
        run, kind, (n, r, g, c, s) = self._run(x), x.dtype.name, x.shape
        for name, array in zip(again.MOVED, (running_mean, running_var), strict=True):
            run.put(name, array, real_kind(kind))
        plan = commit_of(kind, n, g, r * c * s, momentum, masked=masked)
        return Ready(run, plan, run.device.bind(plan.launches), (running_mean, running_var))

    def statistics(self, x: View, *, center: bool, mask: View | None = None, epilogue: Epilogue = PLAIN) -> Any:
        run = self._run(x)
        norm = run.norm(x, center=center, mask=mask, epilogue=epilogue._replace(residual=None))
        return run.moments(norm, run.execute(statistics_of(norm)))

    def forward(
        self,
        x: View,
        weight: View | None,
        bias: View | None,
        eps: float,
        *,
        center: bool,
        stats: tuple[Any, Any] | None = None,
        mask: View | None = None,
        epilogue: Epilogue = PLAIN,
        out: View | None = None,
    ) -> tuple[View, Any, Any]:
        run = self._run(x)
        keys: dict[str, Any] = {"eps": eps, "stats": stats, "mask": mask, "epilogue": epilogue}
        norm = run.norm(x, weight, bias, center=center, out=out, **keys)
        found = run.execute(forward_of(norm))
        y = run.result(found["y"], x.shape, out)
        if stats is not None:
            return y, None, stats[1]
        return y, run.moments(norm, found), run.statistic(found["rstd"], norm)

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
    ) -> Any:
        keys: dict[str, Any] = {"center": center, "epilogue": epilogue}
        if on_host(x):
            return super().repeated(x, weight, bias, eps, **keys, shape=shape, bound=bound)
        return self._again(x, weight, bias, (), eps, **keys)

    def repeated_with_statistics(
        self,
        x: View,
        weight: View | None,
        bias: View | None,
        statistics: tuple[Any, Any],
        eps: float,
        *,
        momentum: float | None,
        epilogue: Epilogue = PLAIN,
        shape: tuple[int, ...],
    ) -> Any:
        keys: dict[str, Any] = {"momentum": momentum, "epilogue": epilogue}
        if on_host(x):
            return super().repeated_with_statistics(x, weight, bias, statistics, eps, **keys, shape=shape)
        return self._again(x, weight, bias, statistics, eps, center=True, **keys)

    def _again(
        self,
        x: View,
        weight: View | None,
        bias: View | None,
        statistics: tuple[()] | tuple[View, View],
        eps: float,
        *,
        center: bool,
        epilogue: Epilogue,
        momentum: float | None = None,
    ) -> Callable[..., bool] | None:
        """What runs the forward again; None where an array must be of another type for the kernels."""
        run, moves = self._run(x), momentum is not None
        stats = self.fixed_stats(*statistics, eps, 1) if statistics and not moves else None
        norm = run.norm(x, weight, bias, center=center, eps=eps, stats=stats, epilogue=epilogue)
        names = ["x", *(f"{name}_wide" if norm.wide else name for name in ("weight", "bias"))]
        if statistics:
            names += again.MOVED if moves else ("mean_high", "rstd")
            for name, statistic in zip(again.MOVED if moves else (), statistics):
                run.put(name, statistic, norm.real)
        arrays = x, weight, bias, *statistics
        if not all(array is None or run.has(name, array) for name, array in zip(names, arrays, strict=True)):
            return None
        sizes = {name: array.nbytes for name, array in zip(names, arrays, strict=True) if array is not None}

        def plan_of(aligned: bool) -> Plan:
            plan = forward_of(replace(norm, aligned=aligned, bare=not moves))
            if momentum is None:
                return plan
            n, _, g, _, _ = norm.layout
            moved = commit_of(norm.kind, n, g, norm.count, momentum)
            return replace(plan, launches=(*plan.launches, *moved.launches))

        return again.repeated(run.device, x.memory, norm.kind, plan_of, (*names, "y"), {**sizes, "y": x.nbytes})

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
    ) -> tuple[View, View, Any, Any]:
        if x.shape[1] > 1:  # kernels add to rows alone
            return super().add_forward(x, addend, weight, bias, eps, center=center, out=out)
        run = self._run(x)
        norm = run.norm(x, weight, bias, center=center, eps=eps, added=addend, out=out)
        results = run.execute(forward_of(norm))
        y, total = run.result(results["y"], x.shape, out), run.result(results["total"], x.shape)
        return y, total, run.moments(norm, results), run.statistic(results["rstd"], norm)

    def backward(self, dy: View, saved: Saved, *, addend: View | None = None) -> Grads:
        run = self._run(saved.x)
        norm = run.norm_of(saved, dy, addend)
        found = run.execute(backward_of(norm))
        residual = None if saved.epilogue.residual is None else run.result(found["dz"], dy.shape)
        return Grads(run.result(found["dx"], dy.shape), *run.parameters(found, saved.param_shape), residual)

    # ---- one half at a time, for host arrays -------------------------------------------------------------------------

    def moments(self, x: View, *, center: bool) -> Any:
        return self.statistics(x, center=center)

    def apply(
        self, x: View, mean: Any, rstd: Any, weight: View | None, bias: View | None, *, out: View | None = None
    ) -> View:
        return self.forward(x, weight, bias, 0.0, center=mean is not None, stats=(mean, rstd), out=out)[0]

    def backward_sums(
        self, dy: View, x: View, mean: Any, rstd: Any, weight: View | None, param_shape: tuple[int, ...] | None
    ) -> tuple[Any, Any, View | None, View | None]:
        run, saved = self._run(x), Saved(x, mean, rstd, weight, param_shape, fixed=False)
        norm = run.norm_of(saved, dy)
        found = run.execute(sums_of(norm))
        s1, s2 = (run.statistic(found[name], norm).astype(np.float64) * norm.count for name in ("k1", "k2"))
        return s1, s2, *run.parameters(found, param_shape)

    def backward_apply(self, dy: View, x: View, mean: Any, rstd: Any, weight: View | None, k1: Any, k2: Any) -> View:
        fixed = k1 is None and k2 is None
        run = self._run(x)
        norm = run.norm_of(Saved(x, mean, rstd, weight, None, fixed), dy)
        if not fixed:
            for name, k in (("k1", k1), ("k2", k2)):
                run.put(name, np.zeros(rstd.shape) if k is None else k, norm.real)
        return run.result(run.execute(gradient_of(norm))["dx"], dy.shape)


class Ready(NamedTuple):
    """A kernel that is to move running statistics, and these as they were given."""

    run: Run
    plan: Plan
    start: Start
    given: tuple[View, View]


class Run:
    """One call on the device of x: its inputs there, by the names that plans have for them."""

    def __init__(self, device: Device, memory: Any, *, host: bool) -> None:
        self.device, self._memory, self._host = device, memory, host
        self._inputs: dict[str, DeviceArray | None] = {}

    def take(self, **inputs: DeviceArray | None) -> None:
        """Have arrays of the device among the inputs, as they are; None for those that kernels do not look at."""
        self._inputs |= inputs

    def put(self, name: str, array: View, dtype: Any = None) -> None:
        """Have an array among the inputs, of this dtype; copied to the device where it is not there."""
        if dtype is not None and array.dtype != dtype:
            array = array.astype(dtype)
        given: Any = contiguous(array)
        self._inputs[name] = self.device.memory.upload(given) if self._host else given

    def has(self, name: str, array: View) -> bool:
        """Whether this very array is among the inputs, and not a copy."""
        return self._inputs[name] is array

    def norm(
        self,
        x: View,
        weight: View | None = None,
        bias: View | None = None,
        *,
        center: bool,
        eps: float = 0.0,
        stats: tuple[Any, Any] | None = None,
        fixed: bool = True,
        mask: View | None = None,
        epilogue: Epilogue = PLAIN,
        added: View | None = None,
        out: View | None = None,
        **more: View | None,
    ) -> Norm:
        """What is asked for; the arrays are put among the inputs. `added` is added to x; `stats` are given ones, or
        those of a forward if not `fixed`; `more` are inputs by their names."""
        layout = Layout(*x.shape)
        shape = shape_of_params(weight, bias)
        assert shape is None or shape == (1, 1, layout.g, layout.c, 1), f"parameters {shape} of {layout}"
        wide = x.itemsize == 2 and any(param is not None and param.dtype != x.dtype for param in (weight, bias))
        norm = Norm(x.dtype.name, layout, center, weight is not None, bias is not None, wide, eps=eps)
        for name, param in (("weight", weight), ("bias", bias)):
            if param is not None:
                self.put(f"{name}_wide" if wide else name, param, norm.real if wide else x.dtype)
        inputs = {"x": x, "mask": mask, "residual": epilogue.residual if added is None else added, **more}
        for name, array in inputs.items():
            if array is not None:
                self.put(name, array)
        variance = stats is not None and self._put_statistics(*stats, norm)
        if isinstance(out, DeviceArray):
            self.take(y=out)
        return replace(
            norm,
            eps=stats[1].eps if stats is not None and variance else eps,
            activation=epilogue.activation,
            order=epilogue.order,
            residual=epilogue.residual is not None,
            total=added is not None,
            addend="addend" in self._inputs,
            mask=None if mask is None else mask.shape,
            fixed=stats is not None and fixed,
            shared=variance,
            variance=variance,
            aligned=all(array is None or array.pointer % VECTOR_BYTES == 0 for array in self._inputs.values()),
            capability=self.device.capability,
            multiprocessors=self.device.multiprocessors,
        )

    def norm_of(self, saved: Saved, dy: View, addend: View | None = None) -> Norm:
        """What the gradient is asked of."""
        if saved.valid is not None:
            self.put("valid", saved.valid, np.int64)
        weight = saved.weight
        if weight is None and saved.bias is None and saved.param_shape is not None:
            weight = np.ones(saved.param_shape, saved.x.dtype)  # kernels sum for weights that there are
        keys: dict[str, Any] = {"stats": (saved.mean, saved.rstd), "fixed": saved.fixed, "mask": saved.mask}
        keys |= {"epilogue": saved.epilogue, "dy": dy, "addend": addend}
        norm = self.norm(saved.x, weight, saved.bias, center=saved.mean is not None, **keys)
        if not self._host:
            self._memory.used(array for array in self._inputs.values() if array is not None)
        return norm

    def _put_statistics(self, mean: Any, rstd: Any, norm: Norm) -> bool:
        """Whether they are variances, one for each group."""
        variance = isinstance(rstd, Variance)
        self.put("rstd", rstd.var if isinstance(rstd, Variance) else rstd, norm.real)
        if isinstance(mean, Pair):
            self.take(mean_high=mean.high, mean_low=mean.low)
        elif mean is None or variance:
            self.take(mean_high=None, mean_low=None)
            if mean is not None:
                self.put("mean_high", mean, norm.real)
        else:
            high = mean.astype(norm.real)
            self.put("mean_high", high)
            self.put("mean_low", mean - high, norm.real)
        return variance

    def execute(self, plan: Plan, start: Start | None = None) -> Mapping[str, Any]:
        """Start the kernels, unless they were bound before; all that they need is there before the first."""
        start = start or self.device.bind(plan.launches)
        found: dict[str, DeviceArray | None] = dict(self._inputs)
        x = self._inputs.get("x")
        dtypes = {"element": None if x is None else x.dtype, "int32": np.int32, "int64": np.int64}
        for name, buffer in plan.buffers.items():
            if name not in found:
                dtype = dtypes.get(buffer.type) or plan.launches[0].variant.real
                found[name] = self._memory.empty((buffer.size,), dtype, zero=buffer.zero)
        start(self._memory.stream(), {name: 0 if array is None else array.pointer for name, array in found.items()})
        return found

    # ---- results -----------------------------------------------------------------------------------------------------

    def result(self, array: DeviceArray, shape: tuple[int, ...], out: View | None = None) -> View:
        """An array of five axes, where x lies; `out`, if it was given."""
        if not self._host:
            return array.reshape(shape) if out is None else out
        found = array.host().reshape(shape)
        if out is None:
            return found
        out[...] = found
        return out

    def statistic(self, array: DeviceArray, norm: Norm) -> Any:
        """(n, g)"""
        return self.result(array, (norm.layout.n, norm.layout.g))

    def parameters(self, found: Mapping[str, Any], shape: tuple[int, ...] | None) -> tuple[View | None, View | None]:
        """dweight and dbias."""
        if shape is None:
            return None, None
        return self.result(found["dweight"], shape), self.result(found["dbias"], shape)

    def moments(self, norm: Norm, found: Mapping[str, Any]) -> Any:
        kept = Found(norm, found)
        return kept.host() if self._host else kept


class Found(DeviceMoments):
    """Moments that a plan found, where it found them."""

    def __init__(self, norm: Norm, found: Mapping[str, Any]) -> None:
        self._norm = norm
        self._shape = norm.layout.n, norm.layout.g
        self._m2, self._valid = found["m2"], found.get("valid") if norm.mask is not None else None
        self.mean = Pair(found["mean_high"], found["mean_low"])
        self.count = norm.count if self._valid is None else self._valid.reshape(self._shape)

    def host(self) -> Moments:
        """In float64; the mean with what its float32 has left over."""
        m2 = self._m2.host().astype(np.float64).reshape(self._shape)
        mean = np.zeros(self._shape)
        if self._norm.center:
            mean = sum(part.host().astype(np.float64) for part in self.mean).reshape(self._shape)
        return Moments(self.count if self._valid is None else self.count.host(), mean, m2)

    def commit(self) -> None:
        """By a kernel, which leaves out a batch with a statistic that is not finite."""
        run, plan, start, given = self.ready
        run.take(mean_high=self.mean.high, m2=self._m2, valid=self._valid)
        found = run.execute(plan, start)
        for name, target in zip(again.MOVED, given, strict=True):
            if found[name] is not target:
                target[...] = found[name].reshape(target.shape)
