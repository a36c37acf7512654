"""The conformance kit passes on both backends, and catches planted defects of every kind it looks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nbnorm import testing
from nbnorm.backend import PLAIN, Grads
from nbnorm.dispatch import registry
from nbnorm.statistics import Moments
from nbnorm_backends.numpy_ref import NumpyBackend


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_backend_conforms(backend: str, dtype: str) -> None:
    report = testing.check_backend(registry.load(backend), dtypes=(dtype,))
    assert report.refused == ()
    assert report.checked == 2 * len(testing.CASES)


class Float32Statistics(NumpyBackend):
    def moments(self, x: Any, *, center: bool) -> Moments:
        found = super().moments(x, center=center)
        return Moments(found.count, found.mean.astype("f4"), found.m2)


class WrongCount(NumpyBackend):
    def moments(self, x: Any, *, center: bool) -> Moments:
        found = super().moments(x, center=center)
        return Moments(found.count + 1, found.mean, found.m2)


class NaiveVariance(NumpyBackend):
    def moments(self, x: Any, *, center: bool) -> Moments:
        found = super().moments(x, center=center)
        if not center:
            return found
        wide = x.astype("f8")
        m2 = (wide**2).sum(axis=(1, 3, 4)) - found.count * wide.mean(axis=(1, 3, 4)) ** 2
        return Moments(found.count, found.mean, m2)


class ForgetsBias(NumpyBackend):
    def apply(self, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, *, out: Any) -> Any:
        return super().apply(x, mean, rstd, weight, None, out=out)


class IgnoresOut(NumpyBackend):
    def apply(self, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, *, out: Any) -> Any:
        return super().apply(x, mean, rstd, weight, bias, out=None)


class WrongDtype(NumpyBackend):
    def apply(self, *args: Any, **kwargs: Any) -> Any:
        return super().apply(*args, **kwargs).astype("f8")


class SpreadsNan(NumpyBackend):
    def apply(self, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, *, out: Any) -> Any:
        rstd = rstd + (np.nan if np.isnan(rstd).any() else 0.0)
        return super().apply(x, mean, rstd, weight, bias, out=out)


class TreatsFixedAsBatch(NumpyBackend):
    def backward(self, dy: Any, saved: Any) -> Grads:
        return super().backward(dy, replace(saved, fixed=False))


class ForgetsWeightInSums(NumpyBackend):
    def backward_sums(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, param_shape: Any) -> Any:
        return super().backward_sums(dy, x, mean, rstd, None, param_shape)


class SwapsParameterGradients(NumpyBackend):
    def backward_sums(self, *args: Any) -> Any:
        s1, s2, dweight, dbias = super().backward_sums(*args)
        return s1, s2, dbias, dweight


class IgnoresActivation(NumpyBackend):
    def forward(self, *args: Any, epilogue: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class IgnoresActivationBackward(NumpyBackend):
    def backward(self, dy: Any, saved: Any) -> Grads:
        return super().backward(dy, replace(saved, epilogue=PLAIN))


class ForwardIgnoresOutWithoutWeight(NumpyBackend):
    def forward(self, x: Any, weight: Any, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        return super().forward(x, weight, *args, out=None if weight is None else out, **kwargs)


class FailsBackwards(NumpyBackend):
    def apply(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return super().apply(x if min(x.strides) >= 0 else np.abs(x), *args, **kwargs)


class RefusesInSilence(NumpyBackend):
    def reject(self, request: Any) -> Any:
        return ""


class RefusesAll(NumpyBackend):
    def reject(self, request: Any) -> Any:
        return "not today"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Float32Statistics, "moments, mean: off by"),
        (WrongCount, "moments, count 41 is not 40"),
        (NaiveVariance, "m2|offset: off by|constant group"),
        (ForgetsBias, "forward: off by"),
        (IgnoresOut, "forward, out: off by"),
        (WrongDtype, "dtype float64 is not float32"),
        (SpreadsNan, "a NaN changed another group"),
        (TreatsFixedAsBatch, "backward: off by"),
        (ForgetsWeightInSums, "backward: off by"),
        (SwapsParameterGradients, "dweight: off by"),
        (IgnoresActivation, "forward, .*: off by"),
        (IgnoresActivationBackward, "backward, .*: off by"),
        (ForwardIgnoresOutWithoutWeight, "forward, out: off by"),
        (FailsBackwards, "layer, backwards"),
        (RefusesInSilence, "refused without a reason"),
        (RefusesAll, "numpy refuses everything: not today"),
    ],
)
def test_kit_catches(broken: type[NumpyBackend], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_backend(broken(), dtypes=("float32",))
