"""The CUDA kernels compile without a GPU, and within their budgets: registers, no spills, 128-bit access, shuffles."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from nbnorm_backends.numba_cuda import launch
from nbnorm_backends.numba_cuda.compile_check import Facts, broken, check, facts_of, main
from nbnorm_backends.numba_cuda.launch import Budget, RowClass, Variant, budget_of, variants

NEEDED = "is not installed (it comes with the cuda-check extra)"
compiles = pytest.mark.usefixtures("compiler")


@pytest.fixture(scope="module")
def compiler() -> None:
    pytest.importorskip("numba_cuda", reason=f"numba-cuda {NEEDED}")
    pytest.importorskip("cuda.bindings.nvjitlink", reason=f"cuda-bindings {NEEDED}")
    pathfinder = pytest.importorskip("cuda.pathfinder", reason=f"cuda-pathfinder {NEEDED}")
    if pathfinder.find_nvidia_binary_utility("nvdisasm") is None:
        pytest.skip(f"nvdisasm {NEEDED}")


def facts(variant: Variant, capability: tuple[int, int]) -> Facts:
    compiler = importlib.import_module("nbnorm_backends.numba_cuda.compiler")
    return facts_of(compiler.compile_variant(variant, capability))


def is_sample(variant: Variant) -> bool:
    """One of each kind of work, for the plain run."""
    return variant in (
        Variant("row_forward", "bfloat16", True, RowClass(128, 16, 128)),
        Variant("planes_statistics", "float32"),
        Variant("columns_backward", "float16"),
        Variant("sum_columns", "float32", vector=False),
    )


ALL = [pytest.param(each, id=each.name, marks=() if is_sample(each) else pytest.mark.slow) for each in variants()]


def test_the_samples_are_listed_cuda() -> None:
    assert sum(map(is_sample, variants())) == 4


@compiles
@pytest.mark.parametrize("variant", ALL)
def test_within_budget_cuda(variant: Variant) -> None:
    since = 80 if variant.rows is None else variant.rows.since
    for capability in launch.CAPABILITIES[since > 80 :]:
        assert broken(facts(variant, capability), budget_of(variant)) == [], capability


def make_spilling(cuda: Any, P: Any, vector: bool, threads: int, elements: int, block: int) -> Any:
    """96 numbers of a thread at the same time, where 1024 threads of a block have 64 registers each."""
    ld, st = P.ld, P.st
    steps = elements // 4

    def spilling(x, y, length):  # type: ignore[no-untyped-def]  # compiled
        r = cuda.local.array(elements, np.float32)
        for j in range(steps):
            ld(x, j * length, r, j * 4)
        total = np.float32(0)
        for e in range(elements):
            total += r[e]
        for e in range(elements):
            r[e] *= total
        for j in range(steps):
            st(y, j * length, r, j * 4)

    return spilling


@compiles
def test_a_spill_is_found_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(launch.FACTORIES, "spilling", make_spilling)
    monkeypatch.setitem(launch.BUDGETS, "spilling", Budget(255))
    assert check([Variant("spilling", "float32", True, RowClass(1024, 96, 1024))], [(9, 0)]) == 1
    table = capsys.readouterr().out
    assert "spills: " in table
    assert "local: " in table


@compiles
def test_each_budget_is_looked_at_cuda() -> None:
    variant = Variant("planes_apply", "float32")
    found = facts(variant, (9, 0))
    assert found.loads >= 2
    assert found.stores >= 1
    assert broken(found, Budget(found.registers - 1)) == [f"{found.registers} registers, over {found.registers - 1}"]
    assert broken(found, Budget(255, loads=99)) == [f"{found.loads} loads, under 99"]
    assert broken(found, Budget(255, stores=99)) == [f"{found.stores} stores, under 99"]
    assert broken(found, Budget(255, shuffles=1)) == ["0 shuffles, under 1"]
    assert broken(found._replace(float64=3), Budget(255)) == ["3 float64 instructions"]
    assert broken(found._replace(stack=8), Budget(255)) == ["stack: 8"]


@compiles
def test_the_command_prints_a_table_cuda(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--only", "^sum_columns_float32", "--arch", "90"]
    assert main(arguments) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["variant", "arch", "regs"]
    assert row.split()[:2] == ["sum_columns_float32_scalar", "sm_90"]
    monkeypatch.setitem(launch.BUDGETS, "sum_columns", Budget(1))
    assert main(arguments) == 1


def test_what_is_missing_is_named_cuda() -> None:
    """In a process that finds no CUDA package."""
    hide = "import sys; sys.modules['numba_cuda'] = None"
    code = f"{hide}; from nbnorm_backends.numba_cuda.compile_check import main; sys.exit(main([]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert 'pip install "nbnorm[cuda-check]"' in result.stderr
