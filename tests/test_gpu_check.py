"""`gpu_check`: what it says without a GPU, and its part for one on a device that is this machine's processor."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nbnorm
import oracle
from nbnorm.errors import BackendError
from nbnorm.peers import EPS, ROW_NORMS, Case, tensor

pytest.importorskip("typer", reason="typer is not installed (it comes with the cli extra)")
from rich.console import Console

from nbnorm_backends.numba_cuda import checks, cubins, gpu_command, gpu_device, gpu_measure
from nbnorm_backends.numba_cuda.backend import CudaBackend
from nbnorm_backends.numba_cuda.checks import DEVICE, SMALL, Check, Error, errors, exact
from nbnorm_backends.numba_cuda.gpu_measure import Budget, Goal, traffic
from nbnorm_backends.numba_cuda.launch import FACTORIES, KINDS, Variant, variants_of

MODULE = "nbnorm_backends.numba_cuda.gpu_check"
NEEDED = "is not installed (it comes with the cuda-check extra)"


def command(*arguments: str | Path, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after some code."""
    code = f"import sys\n{before}\nfrom {MODULE} import main\nif __name__ == '__main__': main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture
def compiler() -> None:
    pytest.importorskip("numba_cuda", reason=f"numba-cuda {NEEDED}")
    pathfinder = pytest.importorskip("cuda.pathfinder", reason=f"cuda-pathfinder {NEEDED}")
    if pathfinder.find_nvidia_binary_utility("nvdisasm") is None:
        pytest.skip(f"nvdisasm {NEEDED}")
    pytest.importorskip("greenlet", reason=f"greenlet {NEEDED}")


# ---- the command without a GPU ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_dry_and_quick_cuda(tmp_path: Path) -> None:
    before = os.times()
    result = command("--dry", "--quick", "--out", tmp_path)
    after = os.times()
    assert result.returncode == 0, result.stderr + result.stdout
    # Of the processors, as every change has to wait for it: 25 to 60, as they are clocked and shared.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 80
    lines = result.stdout.splitlines()
    assert lines[0].split()[:6] == ["variant", "arch", "regs", "ld128", "st128", "shuffles"]
    families = {variant.family for variant in gpu_command.variants()}
    assert len(gpu_command.samples()) == len(families) == sum("sm_90" in line for line in lines)
    report = json.loads((tmp_path / gpu_command.FILE).read_text())
    assert {name.split()[0] for name in (each["name"] for each in report["checks"])} == {case.op for case in SMALL}
    for each in report["checks"]:
        assert any(each["name"] in line for line in lines)
        assert all(error["error"] <= error["bound"] for error in each["errors"].values())
    assert report["failed"] == []


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_dry_in_full_cuda() -> None:
    result = command("--dry")
    assert result.returncode == 0, result.stderr + result.stdout
    assert result.stdout.count(" sm_80 ") + result.stdout.count(" sm_90 ") > 250


@pytest.mark.usefixtures("compiler")
def test_an_error_is_found_cuda(tmp_path: Path) -> None:
    """A kernel that divides by one too many; nothing is compiled."""
    before = (
        "from nbnorm_backends.numba_cuda import compile_check, launch, totals\n"
        "make = totals.make_finish_gradient\n"
        "def planted(cuda, P, vector):\n"
        "    kernel = make(cuda, P, vector)\n"
        "    def finish_gradient(part_weight, part_bias, weight, weight_wide, valid, k1, k2, dweight, dbias,\n"
        "                        samples, groups, channels, splits, count, first, last, flags):\n"
        "        kernel(part_weight, part_bias, weight, weight_wide, valid, k1, k2, dweight, dbias,\n"
        "               samples, groups, channels, splits, count + 1, first, last, flags)\n"
        "    return finish_gradient\n"
        "launch.FACTORIES['finish_gradient'] = planted\n"
        "compile_check.check = lambda *_: 0\n"
    )
    result = command("--dry", "--quick", "--out", tmp_path, before=before)
    assert result.returncode == 1, result.stderr + result.stdout
    assert "MISSED" in result.stdout
    failed = json.loads((tmp_path / gpu_command.FILE).read_text())["failed"]
    assert any(name.startswith("batch_norm") for name in failed)
    assert not any("eval" in name for name in failed)


@pytest.mark.usefixtures("compiler")
def test_a_kernel_over_budget_is_a_failure_cuda() -> None:
    before = (
        "from nbnorm_backends.numba_cuda import checks, cubins, gpu_command, launch\n"
        "launch.REGISTERS['sum_columns'] = (1,) * 6\n"
        "gpu_command.samples = lambda: (launch.Variant('sum_columns', 'float32', vector=False),)\n"
        "checks.dry_checks = lambda quick: []\n"
    )
    result = command("--dry", "--quick", "--jobs", "1", before=before)
    assert result.returncode == 1, result.stderr
    assert "registers, over 1" in result.stdout


NO_DRIVER = "from nbnorm_backends.numba_cuda import device\ndevice.problem = lambda: 'no NVIDIA driver: install it'"


def test_without_a_driver_cuda(tmp_path: Path) -> None:
    """An earlier file of results stays."""
    (tmp_path / gpu_command.FILE).write_text("earlier")
    result = command("--out", tmp_path, before=NO_DRIVER)
    assert (tmp_path / gpu_command.FILE).read_text() == "earlier"
    assert result.returncode == 2
    assert result.stderr.splitlines()[:2] == ["no GPU to check on this machine:", "  no NVIDIA driver: install it"]
    assert "--dry" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_the_cuda_extra_cuda() -> None:
    result = command(before="sys.modules['numba_cuda'] = None")
    assert result.returncode == 2
    assert 'pip install "nbnorm[cuda]"' in result.stderr


def test_without_a_device_or_torch_for_it_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")

    def none(ordinal: int) -> None:
        raise BackendError("cuda:0: CUDA_ERROR_NO_DEVICE: no GPU is visible")

    monkeypatch.setattr(gpu_device.device, "problem", lambda: None)
    monkeypatch.setattr(gpu_device.device, "CudaDevice", none)
    assert gpu_device.missing() == ["cuda:0: CUDA_ERROR_NO_DEVICE: no GPU is visible"]
    monkeypatch.setattr(gpu_device.device, "CudaDevice", lambda ordinal: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "sees no GPU" in gpu_device.missing()[0]
    monkeypatch.setattr(gpu_device, "find_spec", lambda name: None)
    assert gpu_device.missing()[0].startswith("torch is not installed")


@pytest.mark.parametrize("hidden", ["numba_cuda", "greenlet"])
def test_dry_without_what_compiles_cuda(hidden: str) -> None:
    result = command("--dry", before=f"sys.modules[{hidden!r}] = None")
    assert result.returncode == 2
    assert 'pip install "nbnorm[cuda-check]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_without_the_command_line_extra_cuda() -> None:
    """Behind the driver, where that is missing too."""
    result = command(before=f"{NO_DRIVER}\nsys.modules['typer'] = None")
    assert result.returncode == 2
    problem, needs = result.stderr.splitlines()
    assert problem == "no NVIDIA driver: install it"
    assert needs == 'gpu_check needs typer: pip install "nbnorm[cli,cuda,torch]"'
    result = command("--dry", before="sys.modules['typer'] = None")
    assert result.returncode == 2
    assert result.stderr == 'gpu_check needs typer: pip install "nbnorm[cuda-check]"\n'


def test_numbers_that_are_not_finite_are_json_cuda(tmp_path: Path) -> None:
    gpu_command._save({"checks": [{"error": float("nan"), "bound": (1.5, float("inf"))}]}, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    assert found == {"checks": [{"error": "nan", "bound": [1.5, "inf"]}]}


@pytest.mark.parametrize("arguments", [["--quick"], ["--out", "/no/such/folder"], ["--jobs", "0"], ["--budget", "-1"]])
def test_bad_options_cuda(arguments: list[str]) -> None:
    result = command(*arguments)
    assert result.returncode == 2
    assert arguments[0] in result.stderr


# ---- exact results and their bounds ----------------------------------------------------------------------------------


EXACT = [check for check in checks.plain_checks(SMALL) if check.case.dtype == "float64"]


@pytest.mark.parametrize("check", EXACT, ids=lambda check: check.name)
def test_exact_results_are_those_of_the_oracle_cuda(check: Check) -> None:
    """Values and sizes; the oracle loops over slices."""
    check = replace(check, mean=3.0)
    case, given = check.case, check.inputs()
    fixed = None if case.training else (given["running_mean"], given["running_var"])
    keys: dict[str, Any] = {"channel_axis": case.channel, "num_groups": case.num_groups or 1}
    if case.op in ROW_NORMS:
        keys = {"axes": (case.channel,)}
    bias = None if case.op == "rms_norm" else given["bias"]
    expected = oracle.norm(case.op, given["x"], given["weight"], bias, EPS, given["dy"], fixed=fixed, **keys)
    found = exact(check, given)
    close = {"rtol": 1e-15, "atol": 1e-15}
    np.testing.assert_allclose(found["y"].value, expected.y, **close)
    np.testing.assert_allclose(found["y"].size, expected.y_size, **close)
    np.testing.assert_allclose(found["dx"].value, expected.dx, **close)
    np.testing.assert_allclose(found["dx"].size, expected.dx_size, **close)
    np.testing.assert_allclose(found["dx"].far, expected.dx_far, **close)
    np.testing.assert_allclose(found["dweight"].value, expected.dweight, **close)
    np.testing.assert_allclose(found["dweight"].far, expected.dweight_far, **close)
    if bias is not None:
        np.testing.assert_allclose(found["dbias"].value, expected.dbias, **close)


@pytest.mark.parametrize("check", list(checks.option_checks(SMALL)), ids=lambda check: check.name)
def test_exact_results_with_options_are_those_of_numpy_cuda(check: Check) -> None:
    """Of float64; the NumPy backend is checked against definitions and differences by its own tests."""
    check = replace(check, case=replace(check.case, dtype="float64"))
    given = check.inputs()
    expected = exact(check, given)
    with nbnorm.use_backend("numpy"):
        found = checks.run(check, given, np.copy)
    assert set(expected) <= set(found)
    off = errors(check, expected, found, DEVICE)
    assert all(error.within for error in off.values()), off


def test_errors_are_of_the_worst_element_cuda() -> None:
    check = Check(Case("layer_norm", (2, 3)))
    value = np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]], np.longdouble)
    size = np.array([[1.0, 1.0, 100.0], [1.0, 1.0, 1.0]], np.longdouble)
    expected = {"y": checks.Exact(value, size, size)}
    found = value.astype(np.float32)
    assert errors(check, expected, {"y": found}, 1e-6)["y"] == Error(0.0, pytest.approx(1e-6))
    found[0, 2] += np.float32(5e-5)
    found[1, 1] = 2e-6
    worst = errors(check, expected, {"y": found}, 1e-6)["y"]
    assert worst == (pytest.approx(2e-6), pytest.approx(1e-6))
    assert not worst.within
    found[0, 0] = np.nan
    assert not errors(check, expected, {"y": found}, 1e-6)["y"].within


# ---- bytes and fractions, by hand ------------------------------------------------------------------------------------

L2 = 50 << 20  # of an H100
IMAGES = (64, 256, 64, 64)  # 2**26 elements, 256 MiB of float32
TENSOR = 256 << 20


@pytest.mark.parametrize(
    ("case", "tensors"),
    [
        (Case("layer_norm", (2**14, 4096)), 2),
        (Case("layer_norm", (2**14, 4096), backward=True), 3),
        (Case("rms_norm", (2**14, 4096), backward=True), 3),
        (Case("batch_norm", IMAGES), 3),
        (Case("batch_norm", IMAGES, training=False), 2),
        (Case("batch_norm", IMAGES, backward=True), 5),
        (Case("batch_norm", (64, 64, 64, 256), channel_axis=-1), 3),
        (Case("group_norm", IMAGES, num_groups=32), 2),
        (Case("group_norm", (64, 64, 64, 256), channel_axis=-1, num_groups=32), 3),
        (Case("instance_norm", IMAGES), 2),
    ],
    ids=lambda value: gpu_measure.name_of(value) if isinstance(value, Case) else str(value),
)
def test_bytes_that_must_be_moved_cuda(case: Case, tensors: int) -> None:
    assert traffic(case, L2) == tensors * TENSOR


def test_what_the_cache_holds_is_read_once_cuda() -> None:
    case = Case("batch_norm", (16, 64, 64, 64))  # 16 MiB
    assert traffic(case, L2) == 2 * (16 << 20)
    assert traffic(replace(case, backward=True), L2) == 3 * (16 << 20)
    assert traffic(replace(case, backward=True), 31 << 20) == 5 * (16 << 20)
    assert traffic(replace(case, dtype="bfloat16"), 8 << 20) == 2 * (8 << 20)


def test_goals_are_of_the_size_that_is_asked_for_cuda() -> None:
    found = gpu_measure.goals(256 << 20)
    assert {goal.case.dtype for goal in found} == {"float32", "bfloat16"}
    for goal in found:
        itemsize = 4 if goal.case.dtype == "float32" else 2
        assert np.prod(goal.case.shape) * itemsize == 256 << 20
    assert len({goal.name for goal in found}) == len(found)
    trained = [goal for goal in found if goal.case.op == "batch_norm" and goal.case.training and not goal.case.backward]
    assert {(goal.case.channel, goal.fraction, goal.ratio) for goal in trained} == {(1, 0.85, 1.5), (3, 0.85, 1.0)}


# ---- the part for a GPU, on the host ---------------------------------------------------------------------------------


class Host:
    """This machine's processor in a GPU's place: torch's tensors in host memory, and the host's clock."""

    torch_name = "cpu"
    l2_bytes = 0
    capability = (9, 0)

    def facts(self) -> dict[str, Any]:
        return {"name": "host"}

    def put(self, array: Any) -> Any:
        return tensor(array.copy())

    def get(self, result: Any) -> Any:
        torch = sys.modules["torch"]
        if result.dtype is torch.bfloat16:
            return result.view(torch.int16).numpy().view(gpu_device.dtype_of("bfloat16"))
        return result.numpy()

    def seconds(self, call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def wait(self) -> None:
        pass

    def copy(self, size: int) -> Callable[[], Any]:
        source = np.zeros(size, np.uint8)
        target = np.empty_like(source)
        return lambda: np.copyto(target, source)

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        result = call()
        tensors = [result.x] if hasattr(result, "x") else [result]
        for each in tensors:
            each.fill_(float("nan"))

        def replay() -> None:
            made = call()
            for old, new in zip(tensors, [made.x] if hasattr(made, "x") else [made], strict=True):
                old.copy_(new)

        return replay, result


@pytest.fixture
def host() -> Iterator[Host]:
    pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    with nbnorm.use_backend("numpy"):
        yield Host()


SOME = SMALL[0], SMALL[2], SMALL[5], SMALL[7]
TIMED = [
    Goal(Case("layer_norm", (64, 256)), 0.92),
    Goal(Case("batch_norm", (4, 8, 8, 8), "bfloat16"), 0.85, ratio=1.5),
    Goal(Case("batch_norm", (4, 8, 8, 8), backward=True), 0.82),
]
SMALL_RUN: dict[str, Any] = {"cases": SOME, "goals": TIMED, "copied": 1 << 20, "pairs": 3, "tools": (), "jobs": 1}
SMALL_RUN["graphs"] = (Case("layer_norm", (8, 64)), Case("layer_norm", (8, 64), backward=True))


def report_of(host: Host, seconds: float = 600.0, **keys: Any) -> dict[str, Any]:
    report: dict[str, Any] = {"versions": {}}
    gpu_command.measure(Console(quiet=True), report, host, Budget(seconds), **SMALL_RUN | keys)
    return json.loads(json.dumps(report))  # type: ignore[no-any-return]


def test_the_part_for_a_gpu_cuda(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    report = report_of(host, goals=[TIMED[0]._replace(compiled=True), *TIMED[1:]])
    assert report["failed"] == report["skipped"] == []
    expected = [*checks.plain_checks(SOME), *checks.far_checks(SOME), *checks.option_checks(SOME)]
    assert [each["name"] for each in report["checks"]] == [check.name for check in expected]
    for each in report["checks"]:
        assert each["passed"]
        assert each["same_bits"]
        assert {"y", "dx", "dweight"} <= set(each["errors"])
        assert all(0 <= error["error"] <= error["bound"] for error in each["errors"].values())
    assert [each["name"] for each in report["times"]] == [goal.name for goal in TIMED]
    for each, goal in zip(report["times"], TIMED, strict=True):
        assert each["bytes"] == traffic(goal.case, 0)
        assert each["fraction"] == pytest.approx(
            each["bytes"] / each["seconds"] / report["copy"]["bytes_per_second"], rel=1e-12
        )
        assert each["met"] == (each["fraction"] >= goal.fraction)
        assert each["torch"]["met"] == (each["torch"]["ratios"][1] >= goal.ratio)
    compiled = report["compiled"][0]
    assert compiled["name"] == TIMED[0].name
    assert "no-such-compiler" in compiled["unavailable"]
    assert [each["same_bits"] for each in report["graphs"]] == [True, True]
    (launch,) = report["launch"]
    assert launch["met"] == (launch["call"] <= launch["goal"] == 5e-6)
    assert min(launch["call"], launch["plan"], launch["torch"]) > 0
    tables = list(gpu_command.tables(report))
    assert [table.row_count for table in tables] == [3, 2]
    assert any("goal 5 us" in line for line in gpu_command.remarks(report))


def test_what_there_is_no_time_for_is_named_cuda(host: Host) -> None:
    report = report_of(host, 0.0, tools=("memcheck",))
    assert report["checks"] == report["times"] == report["graphs"] == []
    assert "launch" in report["skipped"]
    assert "memcheck" in report["skipped"]
    assert f"time of {TIMED[0].name}" in report["skipped"]
    assert report["copy"]["bytes"] == 1 << 20
    assert "skipped, for want of time: memcheck" in list(gpu_command.remarks(report))


def test_a_budget_runs_out_cuda() -> None:
    times = iter([10.0, 11.0, 14.9, 15.0])
    budget = Budget(5.0, clock=lambda: next(times))
    assert budget.run((name, lambda name=name: {"name": name}) for name in "abc") == [{"name": "a"}, {"name": "b"}]
    assert budget.skipped == ["c"]


class Broken(Host):
    error: type[BaseException] = RuntimeError

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        raise self.error("the device is gone")


def test_one_error_does_not_end_the_rest_cuda(host: Host) -> None:
    report = report_of(Broken())
    assert report["failed"] == [f"graph of {gpu_measure.name_of(case)}" for case in SMALL_RUN["graphs"]]
    assert len(report["times"]) == len(TIMED)
    assert next(gpu_command.tables(report)).row_count == len(TIMED)
    assert any("RuntimeError: the device is gone" in line for line in gpu_command.remarks(report))


def test_what_was_found_before_an_interrupt_is_kept_cuda(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_device, "missing", list)
    monkeypatch.setattr(gpu_device, "Gpu", Broken)
    monkeypatch.setattr(Broken, "error", KeyboardInterrupt)
    small = partial(gpu_command.measure, **{name: value for name, value in SMALL_RUN.items() if name != "jobs"})
    monkeypatch.setattr(gpu_command, "measure", small)
    assert gpu_command.app(["--out", str(tmp_path), "--jobs", "1"], standalone_mode=False) == 130  # as a shell tells it
    report = json.loads((tmp_path / gpu_command.FILE).read_text())
    assert report["checks"]
    assert "times" not in report


def test_kernels_are_compiled_by_processes_and_kept_cuda(
    compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBNORM_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    chosen = [Variant("sum_columns", "float32", vector=False), Variant("commit", "float32", vector=False)]
    monkeypatch.setattr(gpu_measure, "variants", lambda: chosen)
    assert gpu_measure.compile_all((9, 0), 2, Budget(600.0))["compiled"] == 2
    monkeypatch.setattr(cubins, "_compiled", None)  # nothing is compiled again
    assert cubins.kernel_of(chosen[0], (9, 0)).cubin


def sleeping(variant: Variant, capability: tuple[int, int]) -> None:
    time.sleep(0.2)


def failing(variant: Variant, capability: tuple[int, int]) -> None:
    raise RuntimeError("Unsupported .version 9.5")


def test_what_cannot_be_compiled_in_time_is_left_cuda(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_measure, "ProcessPoolExecutor", lambda jobs, context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(cubins, "kernel_of", sleeping)
    begin = time.monotonic()
    found = gpu_measure.compile_all((9, 0), 1, Budget(0.1))
    assert found["compiled"] < found["of"]
    assert time.monotonic() - begin < 30
    monkeypatch.setattr(cubins, "kernel_of", failing)
    report = report_of(host, jobs=2)
    assert report["failed"] == ["kernels"]
    assert "Unsupported .version 9.5" in report["kernels"][0]["error"]


class Wrong(Host):
    """Gives back one element a little off."""

    def get(self, result: Any) -> Any:
        found = super().get(result).copy()
        found.flat[-1] = found.flat[-1] * 1.25 + found.dtype.type(0.25)
        return found


def test_a_wrong_result_fails_cuda(host: Host) -> None:
    report = report_of(Wrong())
    assert {each["passed"] for each in report["checks"]} == {False}
    assert TIMED[0].name in report["failed"]
    assert SOME[0].op in report["failed"][0]


class Unsteady(Host):
    def __init__(self) -> None:
        self.calls = 0

    def get(self, result: Any) -> Any:
        self.calls += 1
        found = super().get(result).copy()
        if self.calls > 6:  # results of the first run
            found.flat[0] = np.nextafter(found.flat[0], np.inf, dtype=found.dtype)
        return found


def test_other_bits_in_a_second_run_fail_cuda(host: Host) -> None:
    device = Unsteady()
    first = Check(replace(SMALL[4], dtype="float32"))
    found = gpu_measure.correctness(first, device.put, device.get)
    assert device.calls == 12
    assert all(error["error"] <= error["bound"] for error in found["errors"].values())
    assert not found["same_bits"]
    assert not found["passed"]


class Timed(Host):
    """Whose calls take 1 ms and 2 ms in turn."""

    def __init__(self) -> None:
        self.calls = 0

    def seconds(self, call: Callable[[], Any]) -> float:
        call()
        self.calls += 1
        return 1e-3 if self.calls % 2 else 2e-3


def test_fractions_by_hand_cuda(host: Host) -> None:
    goal = Goal(Case("layer_norm", (256, 1024)), 0.5, ratio=2.5)
    found = gpu_measure.timing(Timed(), goal, 4e9, pairs=3)
    assert found["bytes"] == 2 * 256 * 1024 * 4
    assert found["bytes_per_second"] == pytest.approx(2.097152e9)
    assert found["fraction"] == pytest.approx(0.524288)
    assert found["met"]
    assert found["torch"] == {"seconds": 2e-3, "ratios": (2.0, 2.0, 2.0), "goal": 2.5, "met": False}


def test_copy_bandwidth_by_hand_cuda() -> None:
    found = gpu_measure.copy_bandwidth(Timed(), 1_000_000)
    # 26 of 51 copies take 1 ms: two million bytes moved in each.
    assert found["bytes_per_second"] == pytest.approx(2e9)
    assert found["quartiles"] == pytest.approx([1e9, 2e9, 2e9])


# ---- the sanitizer ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A program of the sanitizer's name."""

    def install(body: str) -> None:
        script = tmp_path / gpu_measure.SANITIZER
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


def test_what_the_sanitizer_finds_cuda(sanitizer: Callable[[str], None]) -> None:
    sanitizer('echo "$@" "caching=$PYTORCH_NO_CUDA_MEMORY_CACHING"; exit 77')
    found = gpu_measure.sanitize("memcheck", Budget(10))
    assert not found["passed"]
    assert found["exit_status"] == 77
    assert found["output"].startswith("--tool memcheck --error-exitcode 77 ")
    assert found["output"].endswith(f"-m {MODULE} --subset caching=1\n")
    sanitizer("exit 0")
    assert gpu_measure.sanitize("racecheck", Budget(10))["passed"]


def test_a_slow_or_absent_sanitizer_cuda(sanitizer: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    sanitizer("sleep 10; true")
    begin = time.monotonic()
    assert gpu_measure.sanitize("memcheck", Budget(0.2))["unavailable"] == "not done after 0 s"
    assert time.monotonic() - begin < 5  # sleep, which holds the pipe, has ended too
    monkeypatch.setattr(gpu_measure, "SANITIZER", "no-such-sanitizer")
    assert "not on the PATH" in gpu_measure.sanitize("memcheck", Budget(1))["unavailable"]


def planned(chosen: Iterable[Check]) -> set[Variant]:
    """The kernels that checks start on an H100."""
    simulated = pytest.importorskip("nbnorm_backends.numba_cuda.simulated_device", reason=f"greenlet {NEEDED}")
    device = simulated.SimulatedDevice(capability=90, multiprocessors=132, run=False)
    backend = CudaBackend(lambda ordinal: device)

    def same(array: Any) -> Any:
        return array

    for check in chosen:
        inputs = {name: simulated.Tensor(device.memory.empty(*each)) for name, each in check.arrays.items()}
        checks.run(check, inputs, same, same, backend)
    return {each.variant for each in device.launches}


def test_every_kernel_is_run_on_a_gpu_cuda() -> None:
    found = planned(chain(checks.plain_checks(checks.LARGE), checks.option_checks(checks.LARGE)))
    assert found == set(variants_of(KINDS, 90))


def test_arrays_of_a_check_are_its_inputs_cuda() -> None:
    for check in (*checks.plain_checks(SMALL), *checks.option_checks(SMALL)):
        found = {name: (array.shape, array.dtype) for name, array in check.inputs().items()}
        assert found == check.arrays


def test_the_subset_reaches_every_family_cuda() -> None:
    assert {variant.family for variant in planned(gpu_command.subset_checks())} == set(FACTORIES)
    assert {check.case.op for check in gpu_command.subset_checks()} == {case.op for case in SMALL}
    assert {check.case.training for check in gpu_command.subset_checks()} == {True, False}


@pytest.mark.usefixtures("compiler")
def test_running_statistics_move_by_the_kernel_in_a_dry_run_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host arrays would have NumPy do it."""
    monkeypatch.setattr(gpu_command.compile_check, "check", lambda *_: 0)
    device = importlib.import_module(gpu_command.SIMULATED_DEVICE).SimulatedDevice()
    monkeypatch.setattr(gpu_command, "CudaBackend", lambda make: CudaBackend(lambda ordinal: device))
    batch = Check(replace(SMALL[4], dtype="float32"))
    monkeypatch.setattr(checks, "dry_checks", lambda quick: [batch])
    report: dict[str, Any] = {}
    gpu_command._dry(Console(quiet=True), report, quick=True, jobs=1)
    assert report["failed"] == []
    assert "commit" in {each.variant.family for each in device.launches}
