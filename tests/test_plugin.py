"""A third-party backend, installed by pip into an environment of its own and used there by name.

tests/plugin_package is the whole of it: what its author writes, and nothing of nbnorm's.
"""

from __future__ import annotations

import os
import site
import subprocess
import sysconfig
import textwrap
import venv
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "plugin_package"
# With hatchling at hand the build needs no network; without it pip gets it from the package index, as anyone's would.
OFFLINE = ["--no-build-isolation", "--no-index"] if find_spec("hatchling") else []
SETUP = """
import sys, numpy as np, nbnorm

x = np.random.default_rng(0).normal(3.0, 2.0, (4, 6)).astype(np.float32)

def layer_norm(**options):
    return nbnorm.layer_norm(x, 6, **options)

def explain(**options):
    return nbnorm.explain(nbnorm.layer_norm, x, 6, **options)

def info():
    (found,) = [info for info in nbnorm.backends() if info.name == "longdouble"]
    return found
"""
Run = Callable[..., list[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs code in a fresh process where the plugin is installed; gives the lines that it prints."""
    home = tmp_path_factory.mktemp("scratch") / "venv"
    venv.create(home, system_site_packages=True, with_pip=find_spec("pip") is None)
    # The packages that run this test lie beneath: a venv made from within a venv would see the base interpreter's.
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
    beneath = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (packages / "beneath.pth").write_text("".join(beneath))
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name == "NBNORM_CACHE_DIR" or not name.startswith("NBNORM_")
    }

    def call(*arguments: str | Path, **environment: str) -> list[str]:
        command = [home / "bin" / "python", *arguments]
        done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    call("-m", "pip", "install", "--no-deps", *OFFLINE, PACKAGE)
    return lambda code, **environment: call("-c", SETUP + textwrap.dedent(code), **environment)


def test_package_is_small() -> None:
    """The promise of the contract: four methods, under 100 lines, packaging included."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(len(path.read_text().splitlines()) for path in files) < 100


def test_installed_plugin_does_not_run_unless_named(run: Run) -> None:
    *listed, chosen, loaded = run(
        """
        print(info().distribution, info().target, info().state, sep="\\n")
        layer_norm()
        print(explain().chosen)
        print(info().state, "nbnorm_longdouble" in sys.modules)
        """
    )
    assert listed == ["nbnorm-longdouble 1.0", "nbnorm_longdouble:LongDoubleBackend", "found"]
    assert chosen in ("numba", "numpy")
    assert loaded == "found False"


def test_named_plugin_runs(run: Run) -> None:
    printed = run(
        """
        with nbnorm.trace() as decisions:
            y, pullback = nbnorm.vjp(nbnorm.layer_norm, x, 6, backend="longdouble")
        print([(decision.chosen, decision.source) for decision in decisions], info().state)

        dx = pullback(x).x
        wide = x.astype(np.float64)
        deviation = wide - wide.mean(1, keepdims=True)
        std = np.sqrt((deviation**2).mean(1, keepdims=True) + 1e-5)
        xhat = deviation / std
        expected = (wide - wide.mean(1, keepdims=True) - xhat * (wide * xhat).mean(1, keepdims=True)) / std
        np.testing.assert_allclose(y, xhat, rtol=1e-6)
        np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-10)

        try:
            nbnorm.layer_norm(x.astype(np.float16), 6, backend="longdouble")
        except nbnorm.BackendError as error:
            print(str(error).splitlines()[-1])
        with nbnorm.use_backend("longdouble"):
            decision = nbnorm.explain(nbnorm.layer_norm, x.astype(np.float16), 6)
        print(decision.chosen, dict(decision.rejected)["longdouble"])
        """
    )
    assert printed[0] == "[('longdouble', 'backend=')] loaded"
    assert "float16" in printed[1]
    assert printed[2] in [f"{name} computes for float32 and float64, not for float16" for name in ("numba", "numpy")]


def test_preferred_plugin_runs(run: Run) -> None:
    code = """
        with nbnorm.trace() as decisions:
            layer_norm()
            with nbnorm.use_backend("longdouble"):
                layer_norm()
            layer_norm(backend="numpy")
        print(*[f"{decision.chosen} by {decision.source}" for decision in decisions], sep="\\n")
    """
    by_use_backend, by_call = "longdouble by use_backend", "numpy by backend="
    assert run(code, NBNORM_BACKEND="longdouble") == ["longdouble by NBNORM_BACKEND", by_use_backend, by_call]
    assert run(code)[1:] == [by_use_backend, by_call]


def test_plugin_can_be_kept_out(run: Run) -> None:
    state, reason, *refused = run(
        """
        print(info().state, info().reason, sep="\\n")
        try:
            layer_norm(backend="longdouble")
        except nbnorm.BackendError as error:
            print(error)
        """,
        NBNORM_DISABLE_PLUGINS="1",
    )
    assert state == "refused"
    assert "NBNORM_DISABLE_PLUGINS" in reason
    assert any(reason in line for line in refused)


def test_plugin_conforms(run: Run) -> None:
    checked, refused = run(
        """
        from nbnorm.testing import check_backend
        from nbnorm_longdouble import LongDoubleBackend

        report = check_backend(LongDoubleBackend(), dtypes=("float16", "float64"))  # 6 s for each that it takes
        print(report.checked)
        print({reason for _, reason in report.refused})
        """
    )
    assert int(checked) > 0
    assert refused == "{'computes for float32 and float64, not for float16'}"
