"""The gate of asv_bench: what it says of planted slowdowns, and how it compares."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    loader = SourceFileLoader(name, str(ROOT / "asv_bench" / f"{name}.py"))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = sys.modules[name] = module_from_spec(spec)
    loader.exec_module(module)
    return module


gate = load("gate")
COUNT, RATIO = "track_instructions_forward(layer_norm, numba)", "track_ratio_numpy_forward(layer_norm, numba)"


@pytest.mark.parametrize(
    ("name", "base", "head", "verdict", "code"),
    [
        (COUNT, 1000, 1000, "same", 0),
        (COUNT, 1000, 1020, "same", 0),
        (COUNT, 1000, 1021, "slower", 1),
        (COUNT, 1000, 970, "faster", 0),
        (RATIO, 0.2, 0.25, "same", 0),  # noise
        (RATIO, 0.2, 0.27, "slower", 1),
        (RATIO, 0.2, 0.15, "faster", 0),
        (RATIO, None, 0.2, "new", 0),
        (RATIO, 0.2, None, "missing", 2),
        (RATIO, None, None, "missing", 2),
    ],
)
def test_verdicts(name: str, base: float | None, head: float | None, verdict: str, code: int) -> None:
    rows = gate.compare(*({} if value is None else {name: value} for value in (base, head)), [name])
    assert [row.verdict for row in rows] == [verdict]
    assert gate.exit_code(rows) == code


def test_a_slowdown_that_a_commit_names_is_accepted(repository: Path) -> None:
    def commit(message: str) -> None:
        command = ["git", "-C", str(repository), *AUTHOR, "commit", "-q", "--allow-empty", "-m", message]
        subprocess.run(command, check=True)

    commit("More work in layer norm\n\nIt checks more.\n\nSlower: forward.layer_norm\nSlower: call.explain")
    assert gate.accepted_slowdowns("HEAD", "HEAD", repository) == []
    patterns = gate.accepted_slowdowns("HEAD^", "HEAD", repository)
    assert [pattern.pattern for pattern in patterns] == ["forward.layer_norm", "call.explain"]
    other = COUNT.replace("layer_norm", "rms_norm")
    rows = gate.compare({COUNT: 1000, other: 1000}, {COUNT: 1100, other: 1000}, [], patterns)
    assert [row.verdict for row in rows] == ["accepted", "same"]
    assert gate.exit_code(rows) == 0
    assert gate.exit_code(gate.compare({other: 1000}, {other: 1100}, [], patterns)) == 1
    commit(f"A name as the table has it\n\nSlower: {COUNT}")
    assert gate.matches(gate.accepted_slowdowns("HEAD^", "HEAD", repository), COUNT)
    commit("A name that cannot be read\n\nSlower: (")
    with pytest.raises(gate.GateError, match="trailer Slower is no regular expression"):
        gate.accepted_slowdowns("HEAD^", "HEAD", repository)


def test_what_only_the_base_has_is_missing() -> None:
    """Of a backend that is not built in nothing is expected but what there was."""
    rows = gate.compare({"track_ratio_numpy_forward(layer_norm, mine)": 1.0}, {RATIO: 1.0}, [RATIO])
    assert [row.verdict for row in rows] == ["new", "missing"]
    assert gate.exit_code(rows) == 2


def test_a_missing_benchmark_outweighs_a_slower_one_and_none_at_all_is_an_error() -> None:
    rows = gate.compare({COUNT: 1.0, RATIO: 1.0}, {COUNT: 2.0}, [COUNT, RATIO])
    assert gate.exit_code(rows) == 2
    assert gate.exit_code([]) == 2


def run_gate(repository: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "asv_bench/gate.py", *arguments]
    return subprocess.run(
        command, cwd=repository, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_errors_end_with_2_and_say_what_exists(repository: Path) -> None:
    unknown = run_gate(repository, "no-such-revision")
    assert unknown.returncode == 2
    assert "'no-such-revision' is no revision" in unknown.stdout
    pattern = run_gate(repository, "HEAD", "--only", "(")
    assert pattern.returncode == 2
    assert "no regular expression" in pattern.stderr


@pytest.mark.slow
def test_an_unmatched_pattern_lists_what_exists(repository: Path) -> None:
    nothing = run_gate(repository, "HEAD", "--only", "no_such_norm")
    assert nothing.returncode == 2
    assert RATIO in nothing.stdout.replace("\n", "")


@pytest.mark.slow
def test_without_valgrind_it_fails_in_ci_and_warns_elsewhere(repository: Path, tmp_path: Path) -> None:
    for tool in ("git", "python3"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    strict = run_gate(repository, "HEAD", "--only", "call", PATH=str(tmp_path), NBNORM_CI_STRICT="1")
    assert strict.returncode == 2
    assert "valgrind, which is not installed" in strict.stdout
    wanted = "(instructions|numpy)_forward.rms_norm, numba"
    lax = run_gate(repository, "HEAD", "--only", wanted, PATH=str(tmp_path), NBNORM_CI_STRICT="", CI="")
    assert (lax.returncode, "warning: instructions are counted by valgrind" in lax.stdout) == (0, True), lax.stdout
    assert "1 benchmarks: nothing is slower" in lax.stdout


@pytest.mark.slow
def test_a_removed_benchmark_is_missing_unless_a_commit_names_it(repository: Path) -> None:
    plant(repository / "asv_bench" / "benchmarks" / "cases.py", '    "rms_norm": Case("rms_norm"),\n', "")
    arguments = "--quick", "--only", "ratio_numpy_forward.(rms|layer)_norm, numpy"
    done = run_gate(repository, "HEAD", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"track_ratio_numpy_forward\(rms_norm, numpy\) .*missing", done.stdout)
    message = "No RMS norm\n\nSlower: track_ratio_numpy_forward(rms_norm, numpy)"
    subprocess.run(["git", "-C", str(repository), *AUTHOR, "commit", "-aqm", message], check=True)
    done = run_gate(repository, "HEAD^", *arguments)
    assert (done.returncode, "1 benchmarks: nothing is slower" in done.stdout) == (0, True), done.stdout


@pytest.mark.slow
def test_a_plugin_is_compared_by_name(repository: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    shutil.copytree(ROOT / "tests" / "plugin_package", tmp_path / "source")
    subprocess.run([*pip, "--target", str(tmp_path / "plugin"), str(tmp_path / "source")], check=True)
    done = run_gate(
        repository,
        *("HEAD", "--quick", "--only", "ratio_numpy_forward.layer_norm, longdouble"),
        PYTHONPATH=str(tmp_path / "plugin"),
        NBNORM_BENCH_BACKENDS="longdouble",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 benchmarks: nothing is slower" in done.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The working tree, as the one commit of a repository."""
    folder = tmp_path / "repository"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():  # not one that was removed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in (["init", "-q"], ["add", "-A"], [*AUTHOR, "commit", "-q", "-m", "base"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


AUTHOR = ["-c", "user.name=gate", "-c", "user.email=gate@example.org"]


def plant(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


FEW = r"(instructions|ratio_numpy)_(forward.layer_norm, numba|call.(checked|explain), numba)"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.parametrize(
    ("path", "old", "new", "slower"),
    [
        pytest.param(
            "backends/nbnorm_backends/numba_cpu/kernels.py",
            "    if center and not s * shift <= farthest(x) * (q - s * shift):\n",
            "    if center:\n",
            COUNT,
            id="a kernel that walks memory twice",
        ),
        pytest.param(
            "nbnorm/dispatch.py",
            "    decision = decide(request, backend, copies)\n    for collected",
            "    registry.rescan()\n    decision = decide(request, backend, copies)\n    for collected",
            "track_instructions_call(checked, numba)",
            id="a dispatch that scans entry points anew",
        ),
        pytest.param(
            "nbnorm/dispatch.py",
            '    """The decision for one request, without running anything."""\n',
            '    """The decision for one request; nothing is run."""\n',
            None,
            id="no change",
        ),
    ],
)
def test_planted_slowdowns_fail_and_are_named(
    repository: Path, path: str, old: str, new: str, slower: str | None
) -> None:
    plant(repository / path, old, new)
    done = run_gate(repository, "HEAD", "--quick", "--only", FEW)
    assert done.returncode == (0 if slower is None else 1), done.stdout + done.stderr
    if slower is None:
        assert "4 benchmarks: nothing is slower" in done.stdout
        assert "track_instructions" not in done.stdout
    else:
        assert any(slower in line and "slower" in line for line in done.stdout.splitlines()), done.stdout
