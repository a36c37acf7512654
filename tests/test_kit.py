"""The conformance kit passes on both backends, and catches planted defects of every kind it looks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nbnorm import testing
from nbnorm.backend import ACTIVATIONS, PLAIN, Grads
from nbnorm.dispatch import registry
from nbnorm.statistics import Moments
from nbnorm_backends.numpy_ref import NumpyBackend

UNUSUAL = sum(case.unusual for case in testing.CASES)
TRIALS = sum(len(trial.cases) for trial in testing.TRIALS)
ONCE = len(ACTIVATIONS) + len(testing.WHOLE)  # those that are not tried with centring and without


@pytest.mark.parametrize("name", ["numpy", pytest.param("numba", marks=pytest.mark.slow)])  # two minutes of compilation
def test_backend_conforms(name: str) -> None:
    """In four dtypes, which take turns: two have a strided view, two have parameters along r, and each has a sum."""
    report = testing.check_backend(registry.load(name))
    assert report.refused == ()
    assert report.checked == 2 * (4 * (len(testing.CASES) - UNUSUAL) + 2 * UNUSUAL + TRIALS + 4) + ONCE


def test_one_dtype_is_tried_with_everything() -> None:
    report = testing.check_backend(NumpyBackend(), dtypes=("float64",))
    assert report.checked == 2 * (len(testing.CASES) + TRIALS + len(testing.ADDED)) + ONCE


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


class ForwardIgnoresOutWithoutWeight(NumpyBackend):
    def forward(self, x: Any, weight: Any, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        return super().forward(x, weight, *args, out=None if weight is None else out, **kwargs)


class FailsBackwards(NumpyBackend):
    def apply(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return super().apply(x if min(x.strides) >= 0 else np.abs(x), *args, **kwargs)


class GivesAResidualUnasked(NumpyBackend):
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        return super().backward(dy, saved, **keys)._replace(residual=dy)


class NaiveStatistics(NumpyBackend):
    def statistics(self, x: Any, **keys: Any) -> Moments:
        found = super().statistics(x, **keys)
        return Moments(found.count, found.mean.astype("f4"), found.m2)


class IsNotSureWhatItFuses(NumpyBackend):
    def fuses(self, request: Any) -> Any:
        return None


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
        (ForwardIgnoresOutWithoutWeight, "forward, out: off by"),
        (FailsBackwards, "layer, backwards"),
        (GivesAResidualUnasked, "backward, residual: was not asked for"),
        (NaiveStatistics, "statistics, mean: off by"),
        (IsNotSureWhatItFuses, "fuses gave None, not a bool"),
        (RefusesInSilence, "refused without a reason"),
        (RefusesAll, "numpy refuses everything: not today"),
    ],
)
def test_kit_catches(broken: type[NumpyBackend], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_backend(broken(), dtypes=("float32",))


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_plain_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more norms without options than it takes to count a dtype as taken: they cost most of the time."""
    monkeypatch.setattr(testing, "CASES", (testing.BY_NAME["group, channels first"],))


class IgnoresActivation(NumpyBackend):
    def forward(self, *args: Any, epilogue: Any = PLAIN, **keys: Any) -> Any:
        return super().forward(*args, epilogue=epilogue._replace(activation=None), **keys)


class IgnoresActivationBackward(NumpyBackend):
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        kept = saved.epilogue._replace(activation=None)
        return super().backward(dy, replace(saved, epilogue=kept), **keys)


class OverflowsFarOut(NumpyBackend):
    def forward(self, *args: Any, epilogue: Any = PLAIN, **keys: Any) -> Any:
        y, *rest = super().forward(*args, epilogue=epilogue, **keys)
        return np.where(y > 500, np.nan if epilogue.after == "silu" else y, y).astype(y.dtype), *rest


class ActivatesInTheOtherOrder(NumpyBackend):
    def forward(self, *args: Any, epilogue: Any = PLAIN, **keys: Any) -> Any:
        return super().forward(*args, epilogue=epilogue._replace(order="norm_act"), **keys)


class ActivatesInTheOtherOrderBackward(NumpyBackend):
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        kept = saved.epilogue._replace(order="norm_act")
        return super().backward(dy, replace(saved, epilogue=kept), **keys)


class StatisticsWithoutActivation(NumpyBackend):
    def statistics(self, x: Any, *, epilogue: Any = PLAIN, **keys: Any) -> Moments:
        return super().statistics(x, **keys)


class StatisticsWithoutMask(NumpyBackend):
    def statistics(self, x: Any, *, mask: Any = None, **keys: Any) -> Moments:
        return super().statistics(x, **keys)


class CountsWhatIsMasked(NumpyBackend):
    def statistics(self, x: Any, **keys: Any) -> Moments:
        found = super().statistics(x, **keys)
        return Moments(x[0, :, 0].size, found.mean, found.m2)


class CountsTheMaskOnly(NumpyBackend):
    """As if the mask were of x's shape."""

    def statistics(self, x: Any, *, mask: Any = None, **keys: Any) -> Moments:
        found = super().statistics(x, mask=mask, **keys)
        count = found.count if mask is None else np.count_nonzero(mask, axis=(1, 3, 4))
        return Moments(count, found.mean, found.m2)


class NaiveMaskedVariance(NumpyBackend):
    def statistics(self, x: Any, *, center: bool, mask: Any = None, **keys: Any) -> Moments:
        found = super().statistics(x, center=center, mask=mask, **keys)
        if mask is None or not center or keys["epilogue"].before:
            return found
        squares = np.sum(np.where(mask, x, 0).astype("f8") ** 2, axis=(1, 3, 4))
        return Moments(found.count, found.mean, np.maximum(squares - found.count * found.mean**2, 0))


class KeepsRstdOfEmptyGroups(NumpyBackend):
    def forward(self, x: Any, weight: Any, bias: Any, eps: float, **keys: Any) -> Any:
        y, moments, rstd = super().forward(x, weight, bias, eps, **keys)
        return y, moments, np.where(rstd == 0, eps**-0.5, rstd)


class LeavesWhatIsMasked(NumpyBackend):
    def forward(self, x: Any, *args: Any, mask: Any = None, **keys: Any) -> Any:
        y, *rest = super().forward(x, *args, mask=mask, **keys)
        return y if mask is None else np.where(mask, y, x), *rest


class LeaksFromUnderTheMask(NumpyBackend):
    def forward(self, x: Any, *args: Any, **keys: Any) -> Any:
        y, *rest = super().forward(x, *args, **keys)
        return np.where(np.isnan(x), x, y), *rest


class MultipliesByTheMask(NumpyBackend):
    def statistics(self, x: Any, *, mask: Any = None, **keys: Any) -> Moments:
        found = super().statistics(x, mask=mask, **keys)
        with np.errstate(invalid="ignore"):
            leak = 0.0 if mask is None else np.sum(x * np.float64(0), axis=(1, 3, 4))
            return Moments(found.count, found.mean + leak, found.m2)


class LeaksIntoParameters(NumpyBackend):
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        found = super().backward(dy, saved, **keys)
        with np.errstate(invalid="ignore"):
            return found if found.bias is None else found._replace(bias=found.bias + np.sum(dy * np.float64(0)))


class LeavesTheGradientOfWhatIsMasked(NumpyBackend):
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        return super().backward(dy, replace(saved, mask=None), **keys)


class IgnoresCounts(NumpyBackend):
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        return super().backward(dy, replace(saved, valid=None), **keys)


class DropsResidual(NumpyBackend):
    def forward(self, *args: Any, epilogue: Any = PLAIN, **keys: Any) -> Any:
        return super().forward(*args, epilogue=epilogue._replace(residual=None), **keys)


class DropsResidualGradient(NumpyBackend):
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        return super().backward(dy, saved, **keys)._replace(residual=None)


class ResidualPastTheActivation(NumpyBackend):
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        found = super().backward(dy, saved, **keys)
        passed = dy if saved.mask is None else np.where(saved.mask, dy, np.float32(0))
        return found if found.residual is None else found._replace(residual=passed)


class GivesWideResults(NumpyBackend):
    def forward(self, x: Any, weight: Any, *args: Any, **keys: Any) -> Any:
        y, *rest = super().forward(x, weight, *args, **keys)
        return y if weight is None else y.astype(np.result_type(y, weight)), *rest


class GivesWideGradients(NumpyBackend):
    def backward(self, dy: Any, saved: Any, **keys: Any) -> Grads:
        found = super().backward(dy, saved, **keys)
        return found if saved.weight is None else found._replace(x=found.x * saved.weight.dtype.type(1))


# ---- sums ------------------------------------------------------------------------------------------------------------


class ForgetsToAdd(NumpyBackend):
    def add_forward(self, x: Any, addend: Any, *args: Any, **keys: Any) -> Any:
        return super().add_forward(x, np.zeros_like(addend), *args, **keys)


class GivesAWideTotal(NumpyBackend):
    def add_forward(self, *args: Any, **keys: Any) -> Any:
        y, total, *rest = super().add_forward(*args, **keys)
        return y, total.astype("f8"), *rest


class NormOfTheUnroundedTotal(NumpyBackend):
    def add_forward(self, x: Any, addend: Any, *args: Any, out: Any = None, **keys: Any) -> Any:
        _, total, *rest = super().add_forward(x, addend, *args, **keys)
        y = self.forward(x.astype("f8") + addend, *args, **keys)[0]
        return y.astype(x.dtype), total, *rest


class MomentsOfX(NumpyBackend):
    def add_forward(self, x: Any, *args: Any, center: bool, **keys: Any) -> Any:
        y, total, _, rstd = super().add_forward(x, *args, center=center, **keys)
        return y, total, self.moments(x, center=center), rstd


class AddsWithoutOut(NumpyBackend):
    def add_forward(self, *args: Any, out: Any = None, **keys: Any) -> Any:
        return super().add_forward(*args, **keys)


class DropsAddend(NumpyBackend):
    def backward(self, dy: Any, saved: Any, *, addend: Any = None) -> Grads:
        return super().backward(dy, saved)


# ---- whole ops -------------------------------------------------------------------------------------------------------


class WholeWithoutOut(NumpyBackend):
    def normalize(self, x: Any, p: float, eps: float, *, out: Any = None) -> Any:
        return super().normalize(x, p, eps)


class HoldsTheNormConstant(NumpyBackend):
    def normalize_backward(self, dy: Any, x: Any, p: float, eps: float) -> Any:
        norm = np.abs(x).max(1, keepdims=True) if p == np.inf else np.sum(np.abs(x) ** p, 1, keepdims=True) ** (1 / p)
        return (dy / np.maximum(norm, eps)).astype(x.dtype)


class ForgetsEpsInTheGradient(NumpyBackend):
    def normalize_backward(self, dy: Any, x: Any, p: float, eps: float) -> Any:
        return super().normalize_backward(dy, x, p, 1e-30)


class OneOfTiesTakesAll(NumpyBackend):
    def normalize_backward(self, dy: Any, x: Any, p: float, eps: float) -> Any:
        return super().normalize_backward(dy, x + np.float32(1e-4) * (x == 8) if p == np.inf else x, p, eps)


class CountsZeros(NumpyBackend):
    def normalize(self, x: Any, p: float, eps: float, *, out: Any = None) -> Any:
        return super().normalize(np.where(x == 0, np.float32(1e-9), x) if p == 0 else x, p, eps, out=out)


class MirrorsTheWindow(NumpyBackend):
    def local_response_norm(self, x: Any, window: Any, *args: Any, **keys: Any) -> Any:
        return super().local_response_norm(x, window[::-1], *args, **keys)


class ForgetsTheNeighbours(NumpyBackend):
    def local_response_norm_backward(self, dy: Any, x: Any, window: Any, alpha: float, beta: float, k: float) -> Any:
        return self.local_response_norm(x, window, alpha, beta, k) / x * dy


class HasMoreThanThereIs(NumpyBackend):
    whole_ops = frozenset({"softmax"})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (IgnoresActivation, "sigmoid before: forward, moments, mean: off by"),
        (IgnoresActivationBackward, "sigmoid before: backward, x: off by"),
        (OverflowsFarOut, "silu: forward: off by nan"),
        (ActivatesInTheOtherOrder, "sigmoid before: forward, moments, mean: off by"),
        (ActivatesInTheOtherOrderBackward, "sigmoid before: backward, x: off by"),
        (StatisticsWithoutActivation, "sigmoid before: statistics, mean: off by"),
        (StatisticsWithoutMask, "mask over nrgcs: statistics, mean: off by"),
        (CountsWhatIsMasked, "mask over nrgcs: statistics, count 40 is not"),
        (CountsTheMaskOnly, "mask over (nr|gc|s): statistics, count"),
        (NaiveMaskedVariance, "statistics, equal values have m2 .*, not 0"),
        (KeepsRstdOfEmptyGroups, "mask over nrgcs: forward, rstd: off by"),
        (LeavesWhatIsMasked, "mask over nrgcs: forward is not 0 under the mask"),
        (LeaksFromUnderTheMask, "forward, y depends on what lies under the mask"),
        (MultipliesByTheMask, "forward, mean depends on what lies under the mask"),
        (LeaksIntoParameters, "backward, bias depends on what lies under the mask"),
        (LeavesTheGradientOfWhatIsMasked, "backward, x is not 0 under the mask"),
        (IgnoresCounts, "mask over nrgcs: backward, x: off by"),
        (DropsResidual, "residual, sigmoid before: forward: off by"),
        (DropsResidualGradient, "backward, residual: there is none"),
        (ResidualPastTheActivation, "residual, tanh, mask over nrgcs: backward, residual: off by"),
        (GivesWideResults, "float64 weight and bias: forward: dtype float64 is not float32"),
        (GivesWideGradients, "float64 weight and bias: backward, x: dtype float64 is not float32"),
        (ForgetsToAdd, "the total is not x \\+ addend as float32 rounds it"),
        (GivesAWideTotal, "the total has dtype float64, not float32"),
        (NormOfTheUnroundedTotal, "x \\+ addend: add_forward: off by"),
        (MomentsOfX, "add_forward, moments, mean: off by"),
        (AddsWithoutOut, "add_forward, out: off by"),
        (DropsAddend, "backward, addend: off by"),
        (WholeWithoutOut, "normalize, out: off by"),
        (HoldsTheNormConstant, "p=2: normalize_backward: off by"),
        (ForgetsEpsInTheGradient, "p=2: normalize_backward: off by"),
        (OneOfTiesTakesAll, "p=inf: normalize_backward: off by"),
        (CountsZeros, "p=0: normalize: off by"),
        (MirrorsTheWindow, "local_response_norm: off by"),
        (ForgetsTheNeighbours, "local_response_norm_backward: off by"),
        (HasMoreThanThereIs, "whole_ops names \\['softmax'\\]"),
    ],
)
@pytest.mark.usefixtures("one_plain_norm")
def test_kit_catches_options(broken: type[NumpyBackend], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_backend(broken(), dtypes=("float32",))


class SquaresWithoutScale(NumpyBackend):
    def normalize(self, x: Any, p: float, eps: float, *, out: Any = None) -> Any:
        if p != 2:
            return super().normalize(x, p, eps, out=out)
        with np.errstate(over="ignore"):
            y = x / np.maximum(np.sqrt(np.sum(x * x, axis=1, keepdims=True)), eps)
        if out is not None:
            out[...] = y
        return y


@pytest.mark.usefixtures("one_plain_norm")
def test_kit_catches_overflow() -> None:
    with pytest.raises(AssertionError, match="large: normalize: off by"):
        testing.check_backend(SquaresWithoutScale(), dtypes=("float64",))


class RefusesMasks(NumpyBackend):
    whole_ops = frozenset()

    def statistics(self, x: Any, *, mask: Any = None, **keys: Any) -> Moments:
        assert mask is None
        return super().statistics(x, **keys)

    def reject(self, request: Any) -> str | None:
        return "has no masks" if request.mask else None


@pytest.mark.usefixtures("one_plain_norm")
def test_what_is_refused_is_not_tried() -> None:
    report = testing.check_backend(RefusesMasks(), dtypes=("float32",))
    masked = 2 * sum(len(trial.cases) for trial in testing.TRIALS if trial.mask)
    assert [reason for _, reason in report.refused] == ["has no masks"] * masked
    assert all(case.endswith("masked") for case, _ in report.refused)
    assert report.checked == 2 * (1 + TRIALS + len(testing.ADDED)) + len(ACTIVATIONS) - masked
