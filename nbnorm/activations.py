"""Activations that may follow a norm, with their derivatives: float64 in, float64 out, on host arrays.

What backends that do not fuse them are composed with. Imported on first use, because scipy.special takes 0.1 s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

from nbnorm.backend import LEAK

Float64s = NDArray[np.float64]


def _sigmoid_slope(z: Float64s) -> Float64s:
    s = expit(z)
    return np.asarray(s * (1 - s))


def _silu_slope(z: Float64s) -> Float64s:
    s = expit(z)
    return np.asarray(s * (1 + z * (1 - s)))


def _gelu_slope(z: Float64s) -> Float64s:
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    return np.asarray(ndtr(z) + z * density)


def _gelu_tanh_inner(z: Float64s) -> Float64s:
    """Twice the argument of the tanh that stands for the normal distribution (Hendrycks and Gimpel, 2016): half of
    1 + tanh(u) is the sigmoid of 2u, which does not cancel."""
    return np.asarray(np.sqrt(8 / np.pi) * (z + 0.044715 * z**3))


def _gelu_tanh_slope(z: Float64s) -> Float64s:
    s = expit(_gelu_tanh_inner(z))
    flat = s * expit(-_gelu_tanh_inner(z))
    bend = z * flat * np.sqrt(8 / np.pi) * (1 + 3 * 0.044715 * z * z)
    return np.asarray(s + np.where(flat == 0, 0.0, bend))  # far out 0 * inf would be NaN


_FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: np.where(z > 0, 1.0, 0.0)),
    "leaky_relu": (lambda z: np.where(z > 0, z, LEAK * z), lambda z: np.where(z > 0, 1.0, LEAK)),
    "silu": (lambda z: z * expit(z), _silu_slope),
    "gelu": (lambda z: z * ndtr(z), _gelu_slope),
    "gelu_tanh": (lambda z: z * expit(_gelu_tanh_inner(z)), _gelu_tanh_slope),
    "sigmoid": (expit, _sigmoid_slope),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
}


def activate(name: str, z: NDArray[Any]) -> Float64s:
    """The activation of z, computed in float64."""
    with np.errstate(all="ignore"):
        return np.asarray(_FUNCTIONS[name][0](z.astype(np.float64)))


def derivative(name: str, z: NDArray[Any]) -> Float64s:
    """The derivative of the activation at z."""
    with np.errstate(all="ignore"):
        return np.asarray(_FUNCTIONS[name][1](z.astype(np.float64)))
