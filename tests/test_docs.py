"""The documentation: every example in docstrings and pages runs, its figures are fresh, and the site builds."""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import itertools
import re
import runpy
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nbnorm

DOCS = Path(__file__).parents[1] / "docs"
PACKAGE = Path(nbnorm.__file__).parent
PROMPT = ">>> "
EXAMPLES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if PROMPT in path.read_text())
PAGES = sorted(path.name for path in DOCS.glob("*.md") if PROMPT in path.read_text())
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FRAMEWORKS = ("array_api_strict", "jax", "torch")


def run(test: doctest.DocTest) -> int:
    """Run the examples of one docstring or block; how many there were."""
    report = io.StringIO()
    results = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(
        test, out=report.write, clear_globs=False
    )
    assert results.failed == 0, report.getvalue()
    return results.attempted


# ---- docstrings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_docstrings(path: Path) -> None:
    module = importlib.import_module(".".join(("nbnorm", *path.with_suffix("").parts)))
    ran = sum(run(test) for test in doctest.DocTestFinder().find(module))
    assert ran == (PACKAGE / path).read_text().count(PROMPT)


def test_every_public_function_and_layer_has_an_example() -> None:
    public = {name: getattr(nbnorm, name) for name in nbnorm.__all__}
    shown = {name for name, value in public.items() if f"nbnorm.{name}(" in (inspect.getdoc(value) or "")}
    callables = {name for name, value in public.items() if inspect.isfunction(value)}
    assert len(callables) > 10
    assert (
        callables | {"BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "StatsBank", "Welford"} <= shown
    )


# ---- pages -----------------------------------------------------------------------------------------------------------


def blocks(page: str, framework: str) -> Iterator[re.Match[str]]:
    """The blocks of a page that import the framework; those that import none where it is ""."""
    for block in BLOCK.finditer((DOCS / page).read_text()):
        imported = next((name for name in FRAMEWORKS if f"import {name}" in block[2]), "")
        if imported == framework:
            yield block


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """The API in ten lines: it runs, says which backend ran, and has ten lines."""
    (source,) = (block[2] for block in BLOCK.finditer((DOCS.parent / "README.md").read_text()))
    exec(compile(source, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("batch_norm on cpu, float32: ")
    assert len([line for line in source.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize(
    ("page", "framework"),
    [(page, framework) for page in PAGES for framework in ("", *FRAMEWORKS) if any(blocks(page, framework))],
)
def test_pages(page: str, framework: str) -> None:
    """The blocks of a page are one program, in order; those that need a framework are one of their own."""
    if framework:
        pytest.importorskip(framework, reason=f"{framework} is not installed")
    namespace: dict[str, Any] = {"__name__": page}
    ran = 0
    for kind, source in (block.groups() for block in blocks(page, framework)):
        if kind == "python":
            exec(compile(source, page, "exec"), namespace)
        else:
            test = doctest.DocTestParser().get_doctest(source, {}, page, None, None)
            test.globs = namespace
            ran += run(test)
    assert ran


def test_no_example_is_left_out() -> None:
    """Every prompt of a page stands in a block that `test_pages` runs."""
    for page in PAGES:
        found = [block[2] for framework in ("", *FRAMEWORKS) for block in blocks(page, framework)]
        assert sum(source.count(PROMPT) for source in found) == (DOCS / page).read_text().count(PROMPT), page


def test_backend_of_the_guide_is_short() -> None:
    (example,) = (block[2] for block in blocks("writing_a_backend.md", "") if block[1] == "python")
    assert len(example.splitlines()) < 60


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_figures_of_variances_are_fresh(dtype: str) -> None:
    compare(figures(dtype), runpy.run_path(str(DOCS / "accuracy.py"))["variances"](dtype))


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", *(pytest.param(half, marks=pytest.mark.slow) for half in ("float16", "bfloat16"))]
)
def test_figures_of_norms_are_fresh(dtype: str) -> None:
    printed = figures(f"{dtype}: mean, std")
    assert max(max(row) for row in printed.values()) < 1
    compare(printed, runpy.run_path(str(DOCS / "accuracy.py"))["norms"](dtype))


def test_table_of_options_is_fresh() -> None:
    assert runpy.run_path(str(DOCS / "options.py"))["table"]() in (DOCS / "options.md").read_text()


def figures(head: str) -> dict[str, list[float]]:
    """The rows of the table of accuracy whose first cell is `head`, by their own first cell."""
    lines = (DOCS / "numerics.md").read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = [line.strip("| ").split(" | ") for line in itertools.takewhile(bool, lines[begin + 2 :])]
    return {name: [float(value) for cell in cells for value in cell.split(" / ")] for name, *cells in rows}


def compare(printed: dict[str, list[float]], measured: dict[str, list[float]]) -> None:
    """Figures are "at most", with room for another processor; below 1e-12 they are rounding of float64."""
    assert printed.keys() == measured.keys()
    for row, values in measured.items():
        for was, now in zip(printed[row], values, strict=True):
            assert now <= max(1.5 * was, 1e-12), (row, was, now)
            assert was <= max(20 * now, 1e-12), (row, was, now)


# ---- the site --------------------------------------------------------------------------------------------------------


def test_site_builds_without_a_warning_and_documents_every_public_name(tmp_path: Path) -> None:
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package, reason=f"{package} is not installed (it comes with the docs extra)")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-d", tmp_path / "trees", DOCS, tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    documented = inventory(tmp_path / "site" / "objects.inv")
    assert {f"nbnorm.{name}" for name in nbnorm.__all__} - documented == set()


def inventory(path: Path) -> set[str]:
    """The names of the Python objects that a site documents: four lines of head, then compressed lines."""
    lines = zlib.decompress(path.read_bytes().split(b"\n", 4)[4]).decode().splitlines()
    return {line.split()[0] for line in lines if line.split()[1].startswith("py:")}
