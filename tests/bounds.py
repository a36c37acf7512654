"""How far results are from the exact ones, as multiples of the errors that docs/numerics.md allows.

With float32's rounding error of 6e-8, float32 results may be off by 4e-7 of the terms that they are sums of, or of 1
where those are smaller; a half type by a unit in its last place more. float64 has four units in the last place of such
terms, the mean among them. The exact results are those of the oracle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import nbnorm
from cases import Norm, batch, dtype_of, group, has_bias, instance, layer, over
from oracle import Result, norm

VARIANCE = 1.2e-7  # of the statistics of float32 and half types, relative
SINGLE = 4e-7
DOUBLE = 4 * 2.0**-52
EPS = 1e-5

# The five norms on groups of 256 elements and more, in both families of kernels: elements of one statistic, and of
# many, are neighbours.
CASES = {
    "layer_norm": (
        layer("layer", nbnorm.layer_norm, (32, 512), 1),
        over("layer over channels", nbnorm.layer_norm, (4, 256, 6, 6), (1,)),
    ),
    "rms_norm": (
        layer("rms", nbnorm.rms_norm, (32, 512), 1),
        over("rms over channels", nbnorm.rms_norm, (4, 256, 6, 6), (1,)),
    ),
    "batch_norm": (batch("batch NCHW", (4, 16, 14, 17)), batch("batch NHWC", (4, 14, 17, 16), -1)),
    "group_norm": (group("group NCHW", (4, 16, 14, 17), 4), group("group NHWC", (4, 14, 17, 16), 4, -1)),
    "instance_norm": (instance("instance NCHW", (4, 16, 16, 17)), instance("instance NHWC", (4, 16, 17, 16), -1)),
}
ALL = tuple(case for cases in CASES.values() for case in cases)

# (mean, standard deviation) of normal data. Where float16 begins to round such a mean, all values with a standard
# deviation of 1 are one; with 32 there are a few.
SPREADS = {
    "float32": ((0.0, 1.0), (1e4, 1.0), (1e6, 1.0), (1e8, 100.0)),
    "float64": ((0.0, 1.0), (1e4, 1.0), (1e6, 1.0), (1e8, 100.0)),
    "float16": ((0.0, 1.0), (1e4, 1.0), (1e4, 32.0)),
    "bfloat16": ((0.0, 1.0), (1e4, 256.0)),
}


class Example(NamedTuple):
    """A call, and what it should give."""

    case: Norm
    x: Any
    params: dict[str, Any]
    dy: Any
    eps: float
    exact: Result

    def errors(self, backend: str) -> tuple[float, float]:
        """Of y, and the largest of the gradients."""
        y, grads = self.run(backend)
        return forward(y, self.exact), backward(grads, self.exact)

    def run(self, backend: str) -> tuple[Any, Any]:
        keys = {**self.params, **self.case.call, "eps": self.eps, "backend": backend}
        y, pullback = nbnorm.vjp(self.case.op, self.x, **keys)
        return y, pullback(self.dy)


def example(case: Norm, x: Any, *, eps: float = EPS, gain: float = 1.0, seed: int = 1) -> Example:
    """A call on x with random parameters and dy, of its dtype; dy times `gain`."""
    rng = np.random.default_rng(seed)
    dy = (rng.normal(size=case.shape) * gain).astype(x.dtype)
    params = {"weight": rng.normal(size=case.params).astype(x.dtype)}
    if has_bias(case):
        params["bias"] = rng.normal(size=case.params).astype(x.dtype)
    exact = norm(case.op.__name__, x, params["weight"], params.get("bias"), eps, dy, **case.oracle)
    return Example(case, x, params, dy, eps, exact)


def normal(case: Norm, dtype: str, mean: float, std: float, seed: int = 0) -> Any:
    return (np.random.default_rng(seed).normal(size=case.shape) * std + mean).astype(dtype_of(dtype))


def forward(y: Any, exact: Result) -> float:
    """The largest error of y."""
    return multiple(y, exact.y, exact.y_size, exact.y_far)


def backward(grads: Any, exact: Result) -> float:
    """The largest error of the gradients of x, weight and bias."""
    found = [multiple(grads.x, exact.dx, exact.dx_size, exact.dx_far)]
    for grad, expected, size, far in (
        (grads.weight, exact.dweight, exact.dweight_size, exact.dweight_far),
        (grads.bias, exact.dbias, exact.dbias_size, exact.dbias_size),
    ):
        if grad is not None:
            found.append(multiple(grad, *(part.reshape(grad.shape) for part in (expected, np.maximum(size, 1), far))))
    return max(found)


def multiple(found: Any, exact: Any, size: Any, far: Any) -> float:
    """The largest error, as a multiple of what is allowed for its dtype."""
    assert found.shape == exact.shape
    if found.dtype.name == "float64":
        allowed = DOUBLE * far
    else:
        allowed = SINGLE * size
        if found.dtype.itemsize == 2:
            allowed = allowed + np.spacing(np.abs(exact).astype(found.dtype)).astype(np.longdouble)
    error = np.abs(found.astype(np.longdouble) - exact)
    return float(np.max(error / np.where(error == 0, 1, allowed)))
