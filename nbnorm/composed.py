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
    plain = _plain(saved)
    u, dz = plain.x, dy
    if epilogue.after is not None:
        z = _before_activation(backend, u, saved.mean, saved.rstd, saved.weight, saved.bias, epilogue)
        dz = _chain(epilogue.after, z, dy, u.dtype)
    if mask is not None:
        dz = np.where(mask, dz, dz.dtype.type(0))
    grads = backend.backward(read_only(dz.astype(u.dtype, order="C", copy=False)), plain)
    dx = grads.x
    if epilogue.before is not None:
        dx = _chain(epilogue.before, saved.x, dx, dx.dtype)
    if mask is not None:
        dx = np.where(mask, dx, dx.dtype.type(0))
    residual = None if epilogue.residual is None else np.array(dz, saved.x.dtype, order="C")
    return grads._replace(x=np.asarray(dx.astype(saved.x.dtype, order="C")), residual=residual)


def second_backward(backend: Backend, dy: View, saved: Saved, cotangents: Grads) -> tuple[View, Grads]:
    """The gradients of sum(cotangents * gradients) with respect to dy, x and the weight; 0 for bias and residual.

    Of a norm without an activation. With P(v) = v - mean(v) - xhat * mean(v * xhat), its gradients are dx = rstd *
    P(weight * dy), dweight = sum(dy * xhat) and dbias = sum(dy); P is its own adjoint, and the derivative of xhat is
    rstd * P. Without centring there is no mean(v); given statistics leave P(v) = v.
    """
    mask, plain = saved.mask, _plain(saved)
    dy = _normalized(dy, mask, plain.epilogue)
    vx = None if cotangents.x is None else _normalized(cotangents.x, mask, plain.epilogue)
    vw, vb = (None if v is None else v.astype(np.float64) for v in cotangents[1:3])
    with np.errstate(over="ignore", invalid="ignore"):
        h = np.zeros_like(dy) if vw is None else dy * vw
        projected = None if vx is None else _project(backend, vx, plain)
        ddy = np.zeros(dy.shape) if projected is None else projected * (1.0 if saved.weight is None else saved.weight)
        if vw is not None:
            ddy = ddy + backend.apply(plain.x, plain.mean, plain.rstd, vw, None, out=None)
        for direct in (vb, cotangents.residual):
            ddy = ddy if direct is None else ddy + direct
        tilt = None
        if vx is not None and not saved.fixed:
            g = dy if saved.weight is None else dy * saved.weight
            h, tilt = _curvature(backend, g, vx, h, plain)
        dx = _project(backend, h, plain, tilt)
        dweight = dbias = None
        if saved.param_shape is not None:
            lacking = tuple(axis for axis in range(5) if saved.param_shape[axis] == 1)
            dbias = np.zeros(saved.param_shape)
            dweight = dbias if projected is None else np.sum(projected * dy.astype(np.float64), lacking, keepdims=True)
    residual = None if saved.epilogue.residual is None else np.zeros(dy.shape, saved.x.dtype)
    return _like(saved.x, ddy, mask), type(cotangents)(_like(saved.x, dx, mask), dweight, dbias, residual)


def _plain(saved: Saved) -> Saved:
    """The same norm of what it was applied to, with nothing joined to it."""
    x = _normalized(saved.x, saved.mask, saved.epilogue)
    return replace(saved, x=x, mask=None, epilogue=type(saved.epilogue)())


def _like(x: View, found: View, mask: View | None) -> View:
    """A result of x's size as x is, 0 where the mask is."""
    if mask is not None:
        found = np.where(mask, found, 0)
    return np.asarray(found.astype(x.dtype, order="C"))


def _means(backend: Backend, v: View, plain: Saved) -> tuple[Stats, Stats]:
    """mean(v), 0 without centring, and mean(v * xhat)."""
    count = np.maximum(plain.count, 1)
    s1, s2, _, _ = backend.backward_sums(_read(v, plain), plain.x, plain.mean, plain.rstd, None, None)
    return (np.zeros_like(s1) if plain.mean is None else s1 / count), s2 / count


def _project(backend: Backend, v: View, plain: Saved, tilt: Stats | None = None) -> View:
    """rstd * (P(v) - xhat * tilt), and rstd * v with given statistics."""
    k1, k2 = (None, None) if plain.fixed else _means(backend, v, plain)
    k2 = k2 if tilt is None or k2 is None else k2 + tilt
    found: View = backend.backward_apply(_read(v, plain), plain.x, plain.mean, plain.rstd, None, k1, k2)
    return found


def _curvature(backend: Backend, g: View, vx: View, h: View, plain: Saved) -> tuple[View, Stats]:
    """How sum(vx * rstd * P(g)) + sum(h * xhat) bends with x: (q, tilt), whose projection is its gradient."""
    (mean_v, tilt_v), (mean_g, tilt_g) = _means(backend, vx, plain), _means(backend, g, plain)
    product = np.sum(vx.astype(np.float64) * g, axis=REDUCED) / np.maximum(plain.count, 1)
    q = h - _on_x(plain.rstd) * (_on_x(tilt_v) * g + _on_x(tilt_g) * vx)
    return q, plain.rstd * (product - mean_v * mean_g - tilt_v * tilt_g)


def _read(v: View, plain: Saved) -> View:
    """A gradient as backends take it."""
    return read_only(np.asarray(v.astype(plain.x.dtype, order="C", copy=False)))


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
