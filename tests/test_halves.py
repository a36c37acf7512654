"""float16 and bfloat16 on the Numba backend: conversion of every value, by the processor's instructions and from bits,
and the norms on a processor that has no such instructions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numba import njit

from nbnorm_backends.numba_cpu import elements
from nbnorm_backends.numba_cpu.elements import at_like, carried, store

HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# A processor of x86 without any extension, whatever this one is: no F16C, no FMA, vectors of 128 bits.
BARE = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}

Converter = Callable[[Any, Any], Any]


def converter() -> Converter:
    """target[...] = source, of a half type and float32; compiled anew, since the way of converting is compiled in."""

    @njit
    def convert(source, target):  # type: ignore[no-untyped-def]  # compiled
        for i in range(source.size):
            store(target, i, at_like(np.float32(0.0), source, i))

    def converted(source: Any, dtype: Any) -> Any:
        target = np.empty(source.size, dtype)
        convert(carried(source), carried(target))
        return target

    return converted


@pytest.fixture(params=["instructions", "bits"])
def convert(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Converter:
    if request.param == "bits":
        monkeypatch.setattr(elements, "converts_float16", lambda: False)
    elif not elements.converts_float16():
        pytest.skip("this processor has no instructions for float16")
    return converter()


def check_loads(convert: Converter, half: str) -> None:
    """Every half: its float32 has the same value and sign; NaN is NaN."""
    values = np.arange(65536, dtype=np.uint16).view(HALVES[half])
    same_numbers(convert(values, np.float32), values.astype(np.float32))


def check_stores(convert: Converter, half: str) -> None:
    """The half that is nearest, the even one of two, by NumPy's conversion or ml_dtypes'; NaN becomes a quiet NaN."""
    values = float32_values(half)
    with np.errstate(over="ignore", invalid="ignore"):
        if half == "bfloat16":
            values *= np.float32(1)  # all that is stored is a result of arithmetic, which leaves no signalling NaN
        expected = values.astype(HALVES[half])
    found = convert(values, HALVES[half])
    same_numbers(found, expected)
    quiet = {"float16": 0x200, "bfloat16": 0x40}[half]
    assert (found.view(np.uint16)[np.isnan(values)] & quiet).all()


def float32_values(half: str) -> Any:
    """Where conversion to a half may go wrong: halves and the middles between neighbours, one float32 up and down from
    each; the ends of both types; 10^6 random patterns of bits, NaN of all kinds among them."""
    halves = np.sort(np.arange(65536, dtype=np.uint16).view(HALVES[half]).astype(np.float32))
    finite = halves[np.isfinite(halves)]
    middles = (finite[:-1].astype("f8") / 2 + finite[1:].astype("f8") / 2).astype("f4")
    limit = np.linspace(65503, 65537, 34 * 128 + 1, dtype="f4")
    ends = np.array([2.0**-149, 2.0**-126, 2.0**-25, 2.0**-24, 2.0**-14, 65504, 65519.996, 65520, 65536, 3.4028235e38])
    some = np.concatenate([halves, middles, limit, ends.astype("f4"), np.geomspace(1e-45, 3e38, 100_000).astype("f4")])
    with np.errstate(over="ignore"):
        near = [np.nextafter(some, np.float32(end)) for end in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    denormal = rng.integers(0, 1 << 23, 10_000, dtype=np.uint32).view("f4")
    signalling = np.array([0x7F800001, 0xFF800001, 0x7FBFFFFF, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view("f4")
    patterns = rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint32).view("f4")
    positive = np.concatenate([some, *near, denormal])
    return np.concatenate([positive, -positive, signalling, patterns])


def same_numbers(found: Any, expected: Any) -> None:
    """NaN in the same places, and all other bits alike."""
    integers = np.dtype(f"u{found.itemsize}")
    nan = np.isnan(expected)
    assert (np.isnan(found) == nan).all()
    assert (found.view(integers)[~nan] == expected.view(integers)[~nan]).all()


@pytest.mark.parametrize("half", HALVES)
def test_loads(half: str, convert: Converter) -> None:
    check_loads(convert, half)


@pytest.mark.parametrize("half", HALVES)
def test_stores(half: str, convert: Converter) -> None:
    check_stores(convert, half)


def test_conversion_where_denormals_count_as_zero(convert: Converter) -> None:
    """As a program may set the processor, torch's `set_flush_denormal` for one: those of float16 stay numbers."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    normal = halves.astype(np.float32)
    convert(convert(halves[:1], np.float32), np.float16)  # compile both before
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        loaded, stored = convert(halves, np.float32), convert(normal, np.float16)
    finally:
        torch.set_flush_denormal(False)
    same_numbers(loaded, normal)
    same_numbers(stored, halves)


# ---- a processor without instructions for halves ---------------------------------------------------------------------


def on_a_bare_processor(code: str) -> str:
    """What `code` prints in a process that compiles for one; it may import from the tests."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("this processor is no x86")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}"]
    done = subprocess.run(command, env=os.environ | BARE, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_conversion_on_a_bare_processor() -> None:
    assert on_a_bare_processor("import test_halves; test_halves.check_conversion()") == "converted"


def check_conversion() -> None:
    assert not elements.converts_float16()
    assert not elements.fuses_multiply_add()
    convert = converter()
    for half in HALVES:
        check_loads(convert, half)
        check_stores(convert, half)
    print("converted")


@pytest.mark.slow
def test_norms_on_a_bare_processor() -> None:
    """float16, forward and backward, in both families of kernels, and an activation."""
    code = "import test_halves; test_halves.check_norms('batch NHWC', 'layer')"
    assert on_a_bare_processor(code) == "numba ran 2"


@pytest.mark.slow
def test_all_norms_on_a_bare_processor() -> None:
    code = "import test_halves, cases; test_halves.check_norms(*(case.name for case in cases.NORMS))"
    assert on_a_bare_processor(code) == "numba ran 30"


def check_norms(*names: str) -> None:
    import nbnorm
    from cases import NORMS, data
    from test_activations import test_halves_are_rounded_once
    from test_norms import check

    cases = [case for case in NORMS if case.name in names]
    for case in cases:
        x, *rest = data(case, "float16")
        check(case, "float16", x, *rest, "numba")
        chosen = nbnorm.explain(case.op, x, **case.call).chosen
    test_halves_are_rounded_once("gelu", "numba")
    print(chosen, "ran", len(cases))


@pytest.mark.slow
def test_kit_on_a_bare_processor() -> None:
    """Every case of the conformance kit in float16, with all activations, masks and residuals."""
    code = """
from nbnorm.testing import check_backend
from nbnorm_backends.numba_cpu import make
report = check_backend(make(), dtypes=("float16",))
print(report.checked > 70, report.refused)
"""
    assert on_a_bare_processor(code) == "True ()"
