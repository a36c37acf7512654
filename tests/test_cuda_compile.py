"""The CUDA kernels compile without a GPU, and within their budgets: registers, no spills, 128-bit access, shuffles."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nbnorm
from nbnorm_backends.numba_cuda import cubins, device, launch
from nbnorm_backends.numba_cuda.compile_check import INSTRUCTION, Facts, broken, check, disassemble, facts_of, main
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
    compiler = importlib.import_module("nbnorm_backends.numba_cuda.compiler")
    capabilities = launch.CAPABILITIES[since > 80 :]
    for capability, compiled in zip(capabilities, compiler.compile_for_each(variant, capabilities), strict=True):
        assert broken(facts_of(compiled), budget_of(variant, capability)) == []


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
    monkeypatch.setitem(launch.BUDGETS, "spilling", Budget())
    monkeypatch.setitem(launch.REGISTERS, "spilling", (255,) * 6)
    assert check([Variant("spilling", "float32", True, RowClass(1024, 96, 1024))], [(9, 0)]) == 1
    table = capsys.readouterr().out
    assert "spills: " in table
    assert "local: " in table


@compiles
def test_registers_below_the_bounds_of_a_launch_are_found_cuda(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three blocks of 128 threads leave 168 for each."""
    monkeypatch.setitem(launch.FACTORIES, "row_forward", make_spilling)
    monkeypatch.setitem(launch.BUDGETS, "row_forward", Budget())
    assert check([Variant("row_forward", "float32", True, RowClass(128, 112, 128))], [(9, 0)]) == 1
    errors = capsys.readouterr().out.splitlines()[1].split("  ")[-1]
    assert re.search(r"\d+ registers, over 120$", errors)
    assert "spills" not in errors


def test_each_family_has_registers_for_what_it_is_compiled_for_cuda() -> None:
    for variant in variants():
        for capability in launch.CAPABILITIES[variant.rows is not None and variant.rows.since > 80 :]:
            assert 0 < budget_of(variant, capability).registers <= 255


@compiles
def test_code_for_several_capabilities_is_that_for_each_cuda() -> None:
    compiler = importlib.import_module("nbnorm_backends.numba_cuda.compiler")
    for capability, found in zip(launch.CAPABILITIES, compiler.compile_for_each(SUMS, launch.CAPABILITIES)):
        alone = compiler.compile_variant(SUMS, capability)
        assert found.names == alone.names
        code, expected = (INSTRUCTION.findall(disassemble(each.cubin)) for each in (found, alone))
        assert code == expected


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
    monkeypatch.setitem(launch.REGISTERS, "sum_columns", (1,) * 6)
    assert main(arguments) == 1


@pytest.mark.parametrize(
    ("only", "message"),
    [("typo", "no variant has 'typo' in its name"), ("(", "a regular expression expected, got '('")],
)
def test_names_that_no_variant_has_are_refused_cuda(
    only: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--only", only])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_named_cuda() -> None:
    """In a process that finds no CUDA package."""
    hide = "import sys; sys.modules['numba_cuda'] = None"
    code = f"{hide}; from nbnorm_backends.numba_cuda.compile_check import main; sys.exit(main([]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert 'pip install "nbnorm[cuda-check]"' in result.stderr


# ---- the cache of compiled variants, and what cuda.core takes --------------------------------------------------------

SUMS = Variant("sum_columns", "float32", vector=False)
FETCH = """
import hashlib, sys
from nbnorm_backends.numba_cuda.cubins import kernel_of
from nbnorm_backends.numba_cuda.launch import Variant
kernel = kernel_of(Variant("sum_columns", "float32", vector=False), (9, 0))
print(hashlib.sha256(kernel.cubin).hexdigest(), kernel.entry, *kernel.names, "numba" in sys.modules)
"""


@compiles
def test_a_second_process_loads_what_the_first_compiled_cuda(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    environment = {**os.environ, "NBNORM_CACHE_DIR": str(folder)}

    def fetch() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", FETCH], env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.split()

    *compiled, imported = fetch()
    assert imported == "True"
    assert compiled[2:] == ["part_weight", "part_bias", "dweight", "dbias", "parts", "length"]
    (file,) = folder.iterdir()
    sound = file.read_bytes()
    assert fetch() == [*compiled, "False"]
    for damaged in (sound[:-1], sound[:100] + bytes([sound[100] ^ 1]) + sound[101:], b""):
        file.write_bytes(damaged)
        assert fetch() == [*compiled, "True"]
        assert file.read_bytes() == sound
    assert [each.name for each in folder.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), (8, 0)), ((8, 9), (8, 0)), ((9, 0), (9, 0)), ((12, 0), (12, 0))]
)
def test_what_is_compiled_for_a_device_cuda(capability: tuple[int, int], expected: tuple[int, int]) -> None:
    assert cubins.target(capability) == expected


def test_keys_tell_variants_devices_and_versions_apart_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {cubins._key(variant, capability) for variant in variants() for capability in launch.CAPABILITIES}
    assert len(keys) == 2 * len(variants())
    before = cubins._key(SUMS, (9, 0))
    monkeypatch.setattr(cubins, "_versions", lambda: ("another",))
    assert cubins._key(SUMS, (9, 0)) != before


def test_arguments_lie_in_memory_as_kernels_read_them_cuda() -> None:
    handler = pytest.importorskip("cuda.core._kernel_arg_handler", reason=f"cuda-core {NEEDED}")
    names = ("x", "mask", "valid", "rows", "eps", "flags")
    given = {"x": "x", "mask": None, "valid": "counts"}
    given |= {"rows": 2**40 + 3, "eps": 1e-5, "flags": 5}
    for kind, real in (("bfloat16", ctypes.c_float), ("float64", ctypes.c_double)):
        values, given_later = device.arguments(Variant("row_forward", kind), names, given)
        assert given_later == [(0, "x"), (2, "counts")]
        values[0], values[2] = 2**47 + 16, 32
        holder = handler.ParamHolder(tuple(values))
        places = ctypes.cast(holder.ptr, ctypes.POINTER(ctypes.c_void_p))
        types = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64, real, ctypes.c_int32)
        found = [ctypes.cast(places[i], ctypes.POINTER(each))[0] for i, each in enumerate(types)]
        assert found == [2**47 + 16, 0, 32, 2**40 + 3, real(1e-5).value, 5]


def test_the_real_packages_have_what_is_used_cuda() -> None:
    core = pytest.importorskip("cuda.core", reason=f"cuda-core {NEEDED}")
    driver = pytest.importorskip("cuda.bindings.driver", reason=f"cuda-bindings {NEEDED}")
    source = Path(device.__file__).read_text()
    used = set(re.findall(r"driver\.(cu\w+)", source))
    assert len(used) >= 8
    assert [name for name in used if not hasattr(driver, name)] == []
    used = set(re.findall(r'(?:_core|"cuda\.core"\))\.(\w+)', source))
    assert used == {"Device", "LaunchConfig", "ObjectCode", "Stream", "LEGACY_DEFAULT_STREAM", "launch"}
    assert [name for name in used if not hasattr(core, name)] == []
    methods = {
        core.Device: (
            "set_current",
            "get_all_devices",
            "allocate",
            "create_stream",
            "properties",
            "compute_capability",
        ),
        core.ObjectCode: ("from_cubin", "get_kernel"),
        core.Stream: ("from_handle", "handle", "sync"),
        core.Buffer: ("fill", "handle"),
    }
    assert [name for each, found in methods.items() for name in found if not hasattr(each, name)] == []
    config = core.LaunchConfig(grid=2**31 - 1, block=128)
    assert (config.grid, config.block) == ((2**31 - 1, 1, 1), (128, 1, 1))


@pytest.mark.skipif(device.problem() is None, reason="there is a driver")
def test_without_a_driver_the_call_says_so_cuda() -> None:
    x = np.ones((4, 8), np.float32)
    with pytest.raises(nbnorm.BackendError, match=r"not cuda: .*(no NVIDIA driver was found|not installed|too old)"):
        nbnorm.layer_norm(x, 8, backend="cuda")
