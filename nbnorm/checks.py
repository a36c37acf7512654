"""Checks of plain arguments: each names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
from importlib.util import find_spec
from typing import Any

import numpy as np


def check_number(name: str, value: Any) -> float:
    """A finite real number, as a float."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite; got {number}")
    return number


def check_index(name: str, value: Any) -> int:
    """A whole number, as an int."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; got {value!r}") from None


def check_length(name: str, value: Any) -> int:
    """A length of an axis: a whole number above zero."""
    length = check_index(name, value)
    if length < 1:
        raise ValueError(f"{name} must be at least 1; got {length}")
    return length


def check_flag(name: str, value: Any) -> bool:
    """True or False, and nothing that merely counts as one: a misplaced argument would pass."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def check_installed(package: str, extra: str, user: str) -> None:
    """ImportError that says which extra brings a package, unless it is there; `user` needs it, in words with a verb."""
    if find_spec(package) is None:
        raise ImportError(f"{user} the package {package}: pip install 'nbnorm[{extra}]'")
