"""The benchmarks of asv_bench: that each runs here, what it does elsewhere, and that counts repeat."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ASV_BENCH = Path(__file__).parents[1] / "asv_bench"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ASV_BENCH))


@pytest.mark.usefixtures("benchmarks")
def test_every_case_runs_on_numpy() -> None:
    from benchmarks import cases

    for kind, names in {"forward": cases.FORWARD, "backward": cases.BACKWARD}.items():
        for name in names:
            if not name.endswith(" large"):
                assert cases.runner(kind, name, "numpy")() is not None


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "batch_norm channels_last", "weight_standardization"])
def test_the_numpy_norm_beside_a_case_is_that_norm(name: str) -> None:
    from benchmarks import cases, ratios

    case = cases.CASES[name]
    for kind in ("forward", "backward"):
        ours = cases.runner(kind, name, "numpy")()
        theirs = ratios.numpy_norm(kind, case)()
        ours = ours.x if kind == "backward" else ours
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("name", ["remembered", "checked", "preferred", "vjp", "explain", "make_plan", "planned"])
def test_every_call_runs(name: str) -> None:
    from benchmarks.calls import call

    call(name, "numpy")()


@pytest.mark.usefixtures("benchmarks")
def test_what_a_version_lacks_is_not_implemented(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import cases

    import nbnorm

    monkeypatch.delattr(nbnorm, "batch_renorm")
    cases.runner.cache_clear()
    with pytest.raises(NotImplementedError, match="has no batch_renorm"):
        cases.runner("forward", "batch_renorm", "numpy")
    monkeypatch.setitem(cases.CASES, "new", cases.Case("layer_norm", options={"invented": 1}))
    with pytest.raises(NotImplementedError, match=r"layer_norm of nbnorm .* has no invented"):
        cases.runner("forward", "new", "numpy")


@pytest.mark.usefixtures("benchmarks")
def test_a_figure_of_a_plugin_with_a_hyphen() -> None:
    from benchmarks import gated

    found = gated._parts("track_ratio_numpy_forward(layer_norm small, my-backend)")
    assert found == ("ratio_numpy", "forward", "layer_norm small", "my-backend")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ASV_BENCH)} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_backends_that_are_not_installed_are_an_error_that_lists_those_that_are() -> None:
    done = run_python("import benchmarks.cases", NBNORM_BENCH_BACKENDS="numpy, absent")
    assert done.returncode
    assert "NBNORM_BENCH_BACKENDS names absent; installed are" in done.stderr
    assert "numba, numpy" in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_counts_repeat_to_the_instruction() -> None:
    from benchmarks import callgrind

    reason = callgrind.absence()
    if reason:
        pytest.skip(reason)
    figures = [f"{kind}|layer_norm|{backend}" for kind in ("forward", "backward") for backend in ("numba", "numpy")]
    figures += ["call|checked|numba", "call|explain|numpy", "call|vjp|numba"]
    first, second = (callgrind.count(figures) for _ in range(2))
    assert set(first[0]) == set(figures)
    assert first == second


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_a_case_that_fails_is_told_and_the_others_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import callgrind

    reason = callgrind.absence()
    if reason:
        pytest.skip(reason)
    found, failed = callgrind.count(["forward|no_such_case|numpy", "call|explain|numpy"])
    assert set(found) == {"call|explain|numpy"}
    assert failed == {"forward|no_such_case|numpy": "KeyError: 'no_such_case'"}


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_ratios_are_told_by_figure() -> None:
    from benchmarks import ratios

    found, failed = ratios.measure(["numpy|forward|layer_norm|numba", "numpy|forward|no_such_case|numpy"], pairs=3)
    assert 0 < found["numpy|forward|layer_norm|numba"] < 10
    assert failed == {"numpy|forward|no_such_case|numpy": "KeyError: 'no_such_case'"}


def test_every_version_has_results() -> None:
    released = re.findall(r"^## (\d+\.\d+\.\d+) ", (ASV_BENCH.parent / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(list(ASV_BENCH.glob("results/epyc-2core/*-*.json"))) >= len(released) - 1 >= 2  # the last is not run yet


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("path", sorted(ASV_BENCH.glob("results/epyc-2core/*-*.json")), ids=lambda path: path.name[:8])
def test_results_that_were_kept_have_benchmarks_and_parameters_that_still_exist(path: Path) -> None:
    kept = json.loads(path.read_text())
    assert {"cpu", "num_cpu", "ram", "numba", "numpy"} <= kept["params"].keys()
    for name, row in kept["results"].items():
        module, *attributes = name.split(".")
        found: Any = import_module(f"benchmarks.{module}")
        for attribute in attributes:
            owner, found = found, getattr(found, attribute)
        now = [[repr(value) for value in values] for values in getattr(owner, "params", ())]
        before = dict(zip(kept["result_columns"], row))["params"]
        assert all(set(values) <= set(known) for values, known in zip(before, now, strict=True)), name
