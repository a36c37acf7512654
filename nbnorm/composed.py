"""Masks, activations and residuals for backends that do not fuse them: composed from the required methods and NumPy.

For host arrays. Every step makes temporaries of x's size, in float32 at least: what stands between a norm and its
activation is not rounded to a half type.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbnorm.arrays import read_only
from nbnorm.statistics import Moments

if TYPE_CHECKING:
    from nbnorm.backend import Backend, Epilogue, Grads, Saved

View = NDArray[Any]
Stats = NDArray[np.float64]
REDUCED = (1, 3, 4)


def statistics(backend: Backend, x: View, center: bool, mask: View | None, epilogue: Epilogue) -> Moments:
    """Moments of the elements that count, after the activation where that comes first."""
    u = _normalized(x, mask, epilogue)
    return backend.moments(u, center=center) if mask is None else _masked_moments(u, mask, center)


def apply(
    backend: Backend,
    x: View,
    mean: Stats | None,
    rstd: Stats,
    weight: View | None,
    bias: View | None,
    mask: View | None,
    epilogue: Epilogue,
    out: View | None,
) -> View:
    """y from given statistics, in x's dtype."""
    z = _before_activation(backend, _normalized(x, mask, epilogue), mean, rstd, weight, bias, epilogue)
    y = z if epilogue.after is None else _activate(epilogue.after, z)
    if mask is not None:
        y = np.where(mask, y, 0)
    if out is None:
        return np.asarray(y.astype(x.dtype, order="C"))
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = y
    return out


def backward(backend: Backend, dy: View, saved: Saved) -> Grads:
    """Gradients of x, weight, bias and residual."""
    epilogue, mask = saved.epilogue, saved.mask
    u = _normalized(saved.x, mask, epilogue)
    dz = dy
    if epilogue.after is not None:
        z = _before_activation(backend, u, saved.mean, saved.rstd, saved.weight, saved.bias, epilogue)
        dz = _chain(epilogue.after, z, dy, u.dtype)
    if mask is not None:
        dz = np.where(mask, dz, dz.dtype.type(0))
    plain = replace(saved, x=u, mask=None, epilogue=type(epilogue)())
    grads = backend.backward(read_only(dz.astype(u.dtype, order="C", copy=False)), plain)
    dx = grads.x
    if epilogue.before is not None:
        dx = _chain(epilogue.before, saved.x, dx, dx.dtype)
    if mask is not None:
        dx = np.where(mask, dx, dx.dtype.type(0))
    residual = None if epilogue.residual is None else np.array(dz, saved.x.dtype, order="C")
    return grads._replace(x=np.asarray(dx.astype(saved.x.dtype, order="C")), residual=residual)


def _normalized(x: View, mask: View | None, epilogue: Epilogue) -> View:
    """What the norm is applied to: float32 or float64, and 0 where the mask is."""
    u = x.astype(np.float32) if x.dtype.itemsize == 2 else x
    if epilogue.before is not None:
        u = _activate(epilogue.before, u).astype(u.dtype)
    if mask is not None:
        u = np.where(mask, u, u.dtype.type(0))
    return read_only(u)


def _before_activation(
    backend: Backend,
    u: View,
    mean: Stats | None,
    rstd: Stats,
    weight: View | None,
    bias: View | None,
    epilogue: Epilogue,
) -> View:
    z: View = backend.apply(u, mean, rstd, weight, bias, out=None)
    if epilogue.residual is None:
        return z
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(z + epilogue.residual.astype(z.dtype))


def _masked_moments(u: View, mask: View, center: bool) -> Moments:
    """Two passes about the first element that counts, the second corrected by what the first one's rounding left."""
    valid = np.broadcast_to(mask, u.shape)
    count = np.count_nonzero(valid, axis=REDUCED)
    wide = u.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        if not center:
            return Moments(count, np.zeros(count.shape), np.sum(wide * wide, axis=REDUCED))
        first = _first_valid(wide, valid)
        divisor = np.maximum(count, 1)
        deviation = np.where(valid, wide - _on_x(first), 0.0)
        mean = deviation.sum(axis=REDUCED) / divisor
        deviation = np.where(valid, deviation - _on_x(mean), 0.0)
        rest = deviation.sum(axis=REDUCED) / divisor
        m2 = np.sum(deviation * deviation, axis=REDUCED) - count * rest * rest
        step = mean + rest
        total = first + step
        return Moments(count, total, np.maximum(m2, 0.0), (first - total) + step)


def _first_valid(wide: View, valid: NDArray[np.bool_]) -> Stats:
    """The first element that counts of each group (n, g); 0 where none does."""
    n, _, g, _, _ = wide.shape
    flags, values = (array.swapaxes(1, 2).reshape(n, g, -1) for array in (valid, wide))
    first = np.take_along_axis(values, flags.argmax(axis=2)[..., None], 2)[..., 0]
    return np.where(flags.any(axis=2), first, 0.0)


def _on_x(stat: Stats) -> Stats:
    """(n, g) -> (n, 1, g, 1, 1)"""
    return np.expand_dims(stat, REDUCED)


def _activate(name: str, z: View) -> View:
    """In float64."""
    from nbnorm.activations import activate  # noqa: PLC0415  imports scipy.special, which few calls need

    return activate(name, z)


def _chain(name: str, z: View, dy: View, dtype: np.dtype[Any]) -> View:
    """dy times the activation's derivative at z."""
    from nbnorm.activations import derivative  # noqa: PLC0415  as above

    with np.errstate(all="ignore"):
        return np.asarray((dy.astype(np.float64) * derivative(name, z)).astype(dtype))
