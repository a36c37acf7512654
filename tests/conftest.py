"""Options and fixtures: every test that asks for `backend` runs on each one, or on those named by --backend."""

from __future__ import annotations

import os
from collections import Counter
from types import ModuleType

import pytest

BACKENDS = ("numpy", "numba")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", choices=BACKENDS, help="run on this backend only (repeatable)")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    """Kernels are kept in pytest's own cache: what one process compiles the others load, and the next run too."""
    if not hasattr(config, "workerinput"):  # xdist's workers inherit the variable
        folder = config.cache.mkdir("kernels")  # type: ignore[union-attr]
        folder.chmod(0o700)
        os.environ["NBNORM_CACHE_DIR"] = str(folder)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backend") or BACKENDS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if is_slow(item):
                item.add_marker(pytest.mark.skip(reason="slow; give --slow to run it"))


def is_slow(item: pytest.Item) -> bool:
    """Whether it is marked ``slow``, or ``slow("numba")`` and runs on that backend: there every dtype, activation and
    mask is a compilation of its own."""
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    return any(not mark.args or backend in mark.args for mark in item.iter_markers("slow"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count what the conformance suites passed; each of their cases records the property "conformance"."""
    properties = (entry for report in terminalreporter.getreports("passed") for entry in report.user_properties)
    for suite, passed in sorted(Counter(value for name, value in properties if name == "conformance").items()):
        terminalreporter.write_line(f"{suite}: {passed} passed")


@pytest.fixture(scope="session")
def keras() -> ModuleType:
    """The real Keras 3, on its NumPy backend: which one it is, is decided when it is imported."""
    os.environ.setdefault("KERAS_BACKEND", "numpy")
    return pytest.importorskip("keras", reason="keras is not installed (it comes with the test-all extra)")
