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


def test_backend_conforms(backend: str) -> None:
    report = testing.check_backend(registry.load(backend))
    assert report.refused == ()
    usual = sum(not case.unusual for case in testing.CASES)
    assert report.checked > 2 * 4 * usual


def test_one_dtype_is_tried_with_everything() -> None:
    report = testing.check_backend(NumpyBackend(), dtypes=("float64",))
    trials = sum(len(trial.cases) for trial in testing.TRIALS)
    assert report.checked == 2 * (len(testing.CASES) + trials + len(testing.ADDED)) + 7 + len(testing.WHOLE)


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
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        return super().backward(dy, replace(saved, fixed=False), **keys)


class ForgetsWeightInSums(NumpyBackend):
    def backward_sums(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, param_shape: Any) -> Any:
        return super().backward_sums(dy, x, mean, rstd, None, param_shape)


class SwapsParameterGradients(NumpyBackend):
    def backward_sums(self, *args: Any) -> Any:
        s1, s2, dweight, dbias = super().backward_sums(*args)
        return s1, s2, dbias, dweight


class IgnoresActivation(NumpyBackend):
    def forward(self, *args: Any, epilogue: Any = PLAIN, **kwargs: Any) -> Any:
        return super().forward(*args, epilogue=epilogue._replace(activation=None), **kwargs)


class IgnoresActivationBackward(NumpyBackend):
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        kept = saved.epilogue._replace(activation=None)
        return super().backward(dy, replace(saved, epilogue=kept), **keys)


class CountsMaskedElements(NumpyBackend):
    def statistics(self, x: Any, *, mask: Any = None, **keys: Any) -> Moments:
        found = super().statistics(x, mask=mask, **keys)
        return found if mask is None else Moments(x[0, :, 0].size, found.mean, found.m2)


class IgnoresMaskInStatistics(NumpyBackend):
    def statistics(self, x: Any, *, mask: Any = None, **keys: Any) -> Moments:
        return super().statistics(x, **keys)


class LeaksFromUnderTheMask(NumpyBackend):
    def forward(self, x: Any, *args: Any, mask: Any = None, **keys: Any) -> Any:
        y, moments, rstd = super().forward(x, *args, mask=mask, **keys)
        if mask is not None:
            y = np.where(np.isnan(x.astype("f4")), y * x, y).astype(x.dtype)
        return y, moments, rstd


class IgnoresMaskInBackward(NumpyBackend):
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        return super().backward(dy, replace(saved, mask=None, valid=None), **keys)


class DropsResidual(NumpyBackend):
    def forward(self, *args: Any, epilogue: Any = PLAIN, **keys: Any) -> Any:
        return super().forward(*args, epilogue=epilogue._replace(residual=None), **keys)


class DropsResidualGradient(NumpyBackend):
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        return super().backward(dy, saved, **keys)._replace(residual=None)


class ActivatesBehindWhereAskedBefore(NumpyBackend):
    def forward(self, *args: Any, epilogue: Any = PLAIN, **keys: Any) -> Any:
        return super().forward(*args, epilogue=epilogue._replace(order="norm_act"), **keys)


class SumIsNotRounded(NumpyBackend):
    def add_forward(self, x: Any, addend: Any, *args: Any, **keys: Any) -> Any:
        y, total, _, rstd = super().add_forward(x, addend, *args, **keys)
        wide = x.astype("f8") + addend.astype("f8")
        return y, total, self.moments(wide, center=keys["center"]), rstd


class DropsAddend(NumpyBackend):
    def backward(self, dy: Any, saved: Any, *, addend: Any = None) -> Grads:
        return super().backward(dy, saved)


class RoundsParameters(NumpyBackend):
    def apply(self, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, *, out: Any) -> Any:
        weight = None if weight is None else weight.astype("f2")
        return super().apply(x, mean, rstd, weight, bias, out=out)


class LosesTheQuotientRule(NumpyBackend):
    def normalize_backward(self, dy: Any, x: Any, p: float, eps: float) -> Any:
        return self.normalize(dy, p, eps)


class ShiftsTheWindow(NumpyBackend):
    def local_response_norm(self, x: Any, window: Any, *args: Any, **keys: Any) -> Any:
        return super().local_response_norm(x, window[::-1], *args, **keys)


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
        (ForgetsWeightInSums, "backward_sums, s1: off by"),
        (SwapsParameterGradients, "dweight: off by"),
        (IgnoresActivation, "forward, .*: off by"),
        (IgnoresActivationBackward, "backward, .*: off by"),
        (CountsMaskedElements, "statistics, count .* is not"),
        (IgnoresMaskInStatistics, "statistics, (mean|m2): off by"),
        (LeaksFromUnderTheMask, "under the mask"),
        (IgnoresMaskInBackward, "backward, x is not 0 under the mask"),
        (DropsResidual, "forward: off by"),
        (DropsResidualGradient, "backward, residual: there is none"),
        (ActivatesBehindWhereAskedBefore, "before.*: forward"),
        (SumIsNotRounded, "add_forward, moments, (mean|m2): off by"),
        (DropsAddend, "backward, addend: off by"),
        (RoundsParameters, "off by"),
        (LosesTheQuotientRule, "normalize_backward: off by"),
        (ShiftsTheWindow, "local_response_norm: off by"),
        (ForwardIgnoresOutWithoutWeight, "forward, out: off by"),
        (FailsBackwards, "layer, backwards"),
        (RefusesInSilence, "refused without a reason"),
        (RefusesAll, "numpy refuses everything: not today"),
    ],
)
def test_kit_catches(broken: type[NumpyBackend], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_backend(broken(), dtypes=("float32",))
