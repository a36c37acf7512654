"""A backend for nbnorm as a third party writes one: the four required methods, in NumPy's longest float."""

import numpy as np

from nbnorm import Backend, Moments

REDUCED = (1, 3, 4)
in_silence = np.errstate(invalid="ignore", over="ignore")  # NaN and Inf pass through as IEEE 754 says


class LongDoubleBackend(Backend):
    name = "longdouble"

    def reject(self, request):
        if request.dtype not in ("float32", "float64"):
            return f"computes for float32 and float64, not for {request.dtype}"
        return None

    @in_silence
    def moments(self, x, *, center):
        count = x.shape[1] * x.shape[3] * x.shape[4]
        deviation = x.astype(np.longdouble)
        mean = np.zeros((x.shape[0], x.shape[2]), np.longdouble)
        if center:
            mean += deviation[:, 0, :, 0, 0]
            deviation -= on_x(mean)  # the first element as origin: a group of equal values comes out exact
            step = deviation.sum(REDUCED) / count
            deviation -= on_x(step)
            mean += step
        rounded = mean.astype(np.float64)
        return Moments(count, rounded, inner(deviation, deviation), mean - rounded)

    @in_silence
    def apply(self, x, mean, rstd, weight, bias, *, out):
        y = xhat(x, mean, rstd) * factor(weight)
        if bias is not None:
            y = y + bias
        if out is None:
            return y.astype(x.dtype, order="C")
        out[...] = y
        return out

    @in_silence
    def backward_sums(self, dy, x, mean, rstd, weight, param_shape):
        normalized, weighted = xhat(x, mean, rstd), dy * factor(weight)
        dweight = dbias = None
        if param_shape is not None:
            shared = tuple(axis for axis, length in enumerate(param_shape) if length == 1)
            dweight = (dy * normalized).sum(shared, keepdims=True).astype(np.float64)
            dbias = dy.sum(shared, keepdims=True, dtype=np.float64)
        return weighted.sum(REDUCED).astype(np.float64), inner(weighted, normalized), dweight, dbias

    @in_silence
    def backward_apply(self, dy, x, mean, rstd, weight, k1, k2):
        dx = dy * factor(weight)
        if k1 is not None:
            dx -= on_x(k1)
        if k2 is not None:
            dx -= xhat(x, mean, rstd) * on_x(k2)
        return (dx * on_x(rstd)).astype(x.dtype, order="C")


def on_x(stat):
    """A statistic (n, g) as the axes of x see it: (n, 1, g, 1, 1)."""
    return np.expand_dims(stat, REDUCED)


def inner(a, b):
    """sum(a * b) over the reduced axes, (n, g)."""
    return np.einsum("nrgcs,nrgcs->ng", a, b).astype(np.float64)


def factor(weight):
    return np.longdouble(1) if weight is None else weight.astype(np.longdouble)


def xhat(x, mean, rstd):
    deviation = x.astype(np.longdouble)
    return (deviation if mean is None else deviation - on_x(mean)) * on_x(rstd)
