"""Which backend runs, and why. The plugins are real modules with real metadata, in a folder made for each test."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint, distributions, entry_points
from pathlib import Path

import numpy as np
import pytest

import nbnorm
from nbnorm import dispatch
from nbnorm.dispatch import Decision, Registry
from nbnorm_backends.numpy_ref import NumpyBackend

X = np.arange(6, dtype=np.float32).reshape(2, 3)
PLUGIN = """
from nbnorm_backends.numpy_ref import NumpyBackend

class Plugin(NumpyBackend):
    name = {name!r}
    refusal = {refusal!r}
    asked = 0

    def reject(self, request):
        self.asked += 1
        return self.refusal
"""
ASK = """
import os, sys, numpy as np, nbnorm

def ask(**options):
    found = nbnorm.explain(nbnorm.layer_norm, np.ones((2, 3), np.float32), 3, **options)
    print(found.chosen, "by", found.source)
"""


class SitePackages:
    """A folder of installed distributions, as pip would leave them, each with one module and one entry point."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(
        self,
        name: str,
        code: str = PLUGIN,
        *,
        refusal: str | None = None,
        module: str | None = None,
        target: str | None = None,
        distribution: str | None = None,
        group: str = dispatch.ENTRY_POINTS,
    ) -> None:
        module = module or f"plugin_{name}"
        distribution = distribution or f"nbnorm_{name}"
        code = code.format(name=name, refusal=refusal) if code is PLUGIN else textwrap.dedent(code)
        (self.folder / f"{module}.py").write_text(code)
        metadata = self.folder / f"{distribution}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {target or f'{module}:Plugin'}\n")
        importlib.invalidate_caches()

    def find(self) -> list[EntryPoint]:
        found = (point for package in distributions(path=[str(self.folder)]) for point in package.entry_points)
        return [point for point in found if point.group == dispatch.ENTRY_POINTS]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SitePackages]:
    """A folder on sys.path; what was imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield SitePackages(tmp_path)
    for name in set(sys.modules) - before:
        if name.startswith("plugin_"):
            del sys.modules[name]


@pytest.fixture
def registry(packages: SitePackages, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry behind the public functions: the NumPy fallback, what the test installs, and no NBNORM_BACKEND."""
    fresh = Registry(packages.find)
    monkeypatch.setattr(dispatch, "registry", fresh)
    monkeypatch.setattr(dispatch, "_environment", ())
    monkeypatch.delenv("NBNORM_DISABLE_PLUGINS", raising=False)
    return fresh


def explain(x: np.ndarray = X, **options: object) -> Decision:
    return nbnorm.explain(nbnorm.layer_norm, x, 3, **options)


def states() -> dict[str, str]:
    return {info.name: info.state for info in nbnorm.backends()}


def reasons(name: str) -> list[str]:
    return [info.reason for info in nbnorm.backends() if info.name == name]


def fresh_process(code: str, folder: Path | None = None, **environment: str) -> list[str]:
    """The lines that `code` prints in a process of its own, without the NBNORM_ variables of this one."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name == "NBNORM_CACHE_DIR" or not name.startswith("NBNORM_")
    }
    if folder is not None:
        path = [str(folder), *filter(None, [inherited.get("PYTHONPATH")])]
        inherited["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ---- discovery -------------------------------------------------------------------------------------------------------


def test_import_is_lazy() -> None:
    heavy = "numba llvmlite scipy torch jax ml_dtypes nbnorm_backends"
    printed = fresh_process(
        f"""
        import sys
        before = "importlib.metadata" in sys.modules
        import nbnorm
        assert ("importlib.metadata" in sys.modules) == before
        assert nbnorm.backends()
        print(sorted(set("{heavy}".split()) & {{name.partition(".")[0] for name in sys.modules}}))
        """
    )
    assert printed == ["[]"]


def test_plugin_is_found_by_its_entry_point_and_loaded_on_demand(registry: Registry, packages: SitePackages) -> None:
    packages.add("fast")
    packages.add("other", group="somebody.else")
    assert states() == {"numpy": "found", "fast": "found"}
    info = nbnorm.backends()[1]
    assert (info.distribution, info.target, info.reason) == ("nbnorm_fast 1.0", "plugin_fast:Plugin", "")
    assert "plugin_fast" not in sys.modules
    with nbnorm.use_backend("fast"):
        assert "plugin_fast" not in sys.modules
        nbnorm.layer_norm(X, 3)
    assert states() == {"numpy": "found", "fast": "loaded"}
    assert registry.load("fast") is registry.load("fast")


def test_default_registry_reads_the_installed_entry_points(packages: SitePackages) -> None:
    packages.add("fast")
    found = {info.name: info.distribution for info in Registry().list()}
    assert found["fast"] == "nbnorm_fast 1.0"
    assert {"numpy", "numba"} <= set(found)


def test_fallback_is_known_without_entry_points(registry: Registry) -> None:
    assert states() == {"numpy": "found"}
    decision = explain()
    assert (decision.chosen, decision.source) == ("numpy", "built-in order")
    assert dict(decision.rejected)["numba"] == "not installed (installed: numpy)"


def test_absence_is_not_remembered(registry: Registry, packages: SitePackages) -> None:
    for ask in (lambda: explain(backend="late"), lambda: explain_in_use_backend("late")):
        with pytest.raises(nbnorm.BackendError, match="'late'"):
            ask()
    assert registry.load("late") == "not installed (installed: numpy)"
    packages.add("late")
    assert explain(backend="late").chosen == "late"
    assert explain_in_use_backend("late").chosen == "late"


def explain_in_use_backend(*names: str) -> Decision:
    with nbnorm.use_backend(*names):
        return explain()


BROKEN = {
    "missing_dependency": ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
    "syntax": ("def", "SyntaxError"),
    "exits": ("import sys; sys.exit('wrong platform')", "SystemExit: wrong platform"),
    "no_factory": ("", "Plugin"),
    "factory_fails": ("def Plugin(): raise OSError('no such device')", "OSError: no such device"),
    "no_backend": ("class Plugin: name = 'no_backend'", "made a Plugin, not a nbnorm.backend.Backend"),
    "incomplete": ("from nbnorm import Backend\nclass Plugin(Backend): name = 'incomplete'", "abstract"),
    "misnamed": (PLUGIN.format(name="other", refusal=None), "'other'"),
    "old": (PLUGIN.format(name="old", refusal=None) + "    api_version = 0", "version 0 of the contract"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plugin_is_reported_and_harmless(
    registry: Registry, packages: SitePackages, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    code, reason = BROKEN[name]
    packages.add(name, code)
    packages.add("sound")
    assert states()[name] == "found"
    decision = explain_in_use_backend(name, "sound")
    assert decision.chosen == "sound"
    with pytest.raises(nbnorm.BackendError) as strict:
        nbnorm.layer_norm(X, 3, backend=name)
    assert states() == {"numpy": "found", name: "broken", "sound": "loaded"}
    for told in (dict(decision.rejected)[name], str(strict.value), *reasons(name), caplog.text):
        assert reason in told
        assert f"nbnorm_{name} 1.0" in told
    assert len(caplog.records) == 1


def test_interrupt_while_a_plugin_loads_is_not_swallowed(registry: Registry, packages: SitePackages) -> None:
    packages.add("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        explain(backend="slow")
    assert states()["slow"] == "found"


def test_name_claimed_twice_is_nobodys(
    registry: Registry, packages: SitePackages, caplog: pytest.LogCaptureFixture
) -> None:
    packages.add("fast", module="plugin_a", distribution="a")
    packages.add("fast", module="plugin_b", distribution="b")
    with pytest.raises(nbnorm.BackendError, match="claimed more than once"):
        explain(backend="fast")
    assert [info.state for info in nbnorm.backends() if info.name == "fast"] == ["refused", "refused"]
    for told in (*reasons("fast"), caplog.text):
        assert "a 1.0" in told
        assert "b 1.0" in told
    assert not {"plugin_a", "plugin_b"} & set(sys.modules)


def test_one_distribution_found_twice_is_one_plugin(packages: SitePackages) -> None:
    packages.add("fast")
    registry = Registry(lambda: packages.find() * 2)
    assert [info.state for info in registry.list()] == ["found", "found"]
    assert isinstance(registry.load("fast"), nbnorm.Backend)


@pytest.mark.parametrize("built_in_first", [True, False])
@pytest.mark.parametrize("target", ["plugin_numpy:Plugin", "nbnorm_backends.numpy_ref:NumpyBackend"])
def test_built_in_name_stays_with_the_built_in(packages: SitePackages, built_in_first: bool, target: str) -> None:
    packages.add("numpy", target=target)
    points = [point for point in entry_points(group=dispatch.ENTRY_POINTS) if point.name == "numpy"]
    points.sort(key=lambda point: point.dist.name, reverse=not built_in_first)
    assert sorted(point.dist.name for point in points) == ["nbnorm", "nbnorm_numpy"]
    kept, refused = Registry(lambda: points).list()
    assert (kept.state, kept.distribution) == ("found", f"nbnorm {nbnorm.__version__}")
    assert (refused.state, refused.distribution) == ("refused", "nbnorm_numpy 1.0")
    assert "built-in" in refused.reason


def test_absent_built_in_leaves_its_name_to_nobody(registry: Registry, packages: SitePackages) -> None:
    """Else a third party that took the name would run unasked, by the built-in order."""
    packages.add("numba")
    assert explain().chosen == "numpy"
    assert states()["numba"] == "refused"


@pytest.mark.parametrize("name", ["Fast", "2fast", "my-backend", "a.b", "fast,numpy", "schnellß"])
def test_badly_named_plugin_is_refused(
    registry: Registry, packages: SitePackages, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    packages.add(name, module="plugin_bad", distribution="bad")
    assert states() == {"numpy": "found", name: "refused"}
    assert "badly named" in reasons(name)[0]
    assert "bad 1.0" in caplog.text
    with pytest.raises(nbnorm.BackendError, match="badly named"):
        explain(backend=name)


@pytest.mark.parametrize(("value", "state"), [("1", "refused"), ("yes", "refused"), ("0", "found"), ("", "found")])
def test_plugins_can_be_kept_out(
    registry: Registry, packages: SitePackages, monkeypatch: pytest.MonkeyPatch, value: str, state: str
) -> None:
    packages.add("fast")
    monkeypatch.setenv("NBNORM_DISABLE_PLUGINS", value)
    assert states() == {"numpy": "found", "fast": state}
    if state == "refused":
        with pytest.raises(nbnorm.BackendError, match="NBNORM_DISABLE_PLUGINS"):
            explain(backend="fast")


# ---- loading under threads, forks and re-entry -----------------------------------------------------------------------


def in_time(work: Callable[[], object]) -> object:
    """The result of `work` in a thread that may take ten seconds: a deadlock fails the test, and hangs nothing."""
    result: list[object] = []
    thread = threading.Thread(target=lambda: result.append(work()), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "deadlock"
    return result[0]


def test_plugin_may_use_nbnorm_while_it_loads(registry: Registry, packages: SitePackages) -> None:
    packages.add(
        "curious",
        """
        import numpy as np, nbnorm
        from nbnorm_backends.numpy_ref import NumpyBackend

        seen = [info.name for info in nbnorm.backends()]
        nbnorm.layer_norm(np.ones((1, 2)), 2, backend="numpy")

        class Plugin(NumpyBackend):
            name = "curious"

            def __init__(self):
                with nbnorm.use_backend("numpy"):
                    nbnorm.layer_norm(np.ones((1, 2)), 2)
        """,
    )
    assert in_time(lambda: explain(backend="curious").chosen) == "curious"
    assert sys.modules["plugin_curious"].seen == ["numpy", "curious"]


def test_plugin_that_names_itself_while_it_loads(
    registry: Registry, packages: SitePackages, caplog: pytest.LogCaptureFixture
) -> None:
    packages.add(
        "vain",
        """
        import numpy as np, nbnorm
        from nbnorm_backends.numpy_ref import NumpyBackend

        refusals = []

        def look():
            try:
                nbnorm.layer_norm(np.ones((2, 3)), 3, backend="vain")
            except nbnorm.BackendError as error:
                refusals.append(str(error))

        class Plugin(NumpyBackend):
            name = "vain"
            made = 0

            def __init__(self):
                Plugin.made += 1
                look()

        look()
        """,
    )
    assert in_time(lambda: explain(backend="vain").chosen) == "vain"
    assert explain(X.astype(np.float64), backend="vain").chosen == "vain"  # refused while it loaded, and only then
    plugin = sys.modules["plugin_vain"]
    assert plugin.Plugin.made == 1
    assert len(plugin.refusals) == 2
    assert all("vain" in refusal for refusal in plugin.refusals)
    assert not caplog.records


def test_threads_that_load_at_once_share_one_backend(registry: Registry, packages: SitePackages) -> None:
    packages.add("slow", "import time; time.sleep(0.1)\n" + PLUGIN.format(name="slow", refusal=None))
    start = threading.Barrier(4)

    def load(_: int) -> object:
        start.wait(10)
        return registry.load("slow")

    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load, range(4)))
    assert isinstance(loaded[0], nbnorm.Backend)
    assert len(set(map(id, loaded))) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_child_forked_while_a_plugin_loads_can_dispatch(packages: SitePackages) -> None:
    packages.add("slow", "import time; time.sleep(0.3)\n" + PLUGIN.format(name="slow", refusal=None))
    printed = fresh_process(
        """
        import os, sys, threading, time, warnings
        import numpy as np, nbnorm

        x = np.ones((2, 3))
        loader = threading.Thread(target=nbnorm.layer_norm, args=(x, 3), kwargs={"backend": "slow"})
        loader.start()
        while "plugin_slow" not in sys.modules:
            time.sleep(0.01)
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: that is the point here
        child = os.fork()
        if not child:
            threading.Timer(20, os._exit, [1]).start()
            nbnorm.layer_norm(x, 3, backend="numpy")
            os._exit(0)
        loader.join()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        packages.folder,
    )
    assert printed == ["0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_forked_child_decides_anew(packages: SitePackages) -> None:
    packages.add(
        "homebound",
        """
        import os
        from nbnorm_backends.numpy_ref import NumpyBackend

        class Plugin(NumpyBackend):
            name = "homebound"

            def __init__(self):
                self.home = os.getpid()

            def reject(self, request):
                return None if os.getpid() == self.home else "its threads stayed in the parent"
        """,
    )
    printed = fresh_process(
        f"""{ASK}
with nbnorm.use_backend("homebound"):
    ask()
    sys.stdout.flush()
    child = os.fork()
    ask()
    sys.stdout.flush()
if not child:
    os._exit(0)
os.waitpid(child, 0)
""",
        packages.folder,
    )
    (at_first, *both) = printed
    assert at_first == "homebound by use_backend"
    assert sorted(line.startswith("homebound") for line in both) == [False, True]


# ---- the order of preference -----------------------------------------------------------------------------------------


def test_order_of_precedence(packages: SitePackages) -> None:
    for name in ("first", "second", "third"):
        packages.add(name)
    script = f"""{ASK}
ask(backend="third")
with nbnorm.use_backend("second"):
    ask()
    ask(backend="third")
ask()
os.environ["NBNORM_BACKEND"] = "third"
ask()
"""
    first = "first by NBNORM_BACKEND"
    assert fresh_process(script, packages.folder, NBNORM_BACKEND="first") == [
        "third by backend=",
        "second by use_backend",
        "third by backend=",
        first,
        first,  # the variable is read once
    ]
    *named, unnamed, changed = fresh_process(script, packages.folder)
    assert named == ["third by backend=", "second by use_backend", "third by backend="]
    assert unnamed == changed
    assert unnamed in ("numba by built-in order", "numpy by built-in order")


def test_environment_may_name_several(packages: SitePackages) -> None:
    packages.add("picky", refusal="not today")
    packages.add("second")
    assert fresh_process(ASK + "ask()", packages.folder, NBNORM_BACKEND=" picky, second ") == [
        "second by NBNORM_BACKEND"
    ]


def test_unknown_name_in_the_environment(packages: SitePackages) -> None:
    packages.add("fast")
    script = f"""{ASK}
ask(backend="numpy")
with nbnorm.use_backend("fast"):
    ask()
for attempt in (1, 2):
    try:
        nbnorm.layer_norm(np.ones((2, 3)), 3)
    except nbnorm.BackendError as error:
        print(error)
"""
    strict, preferred, *errors = fresh_process(script, packages.folder, NBNORM_BACKEND="typo")
    assert (strict, preferred) == ("numpy by backend=", "fast by use_backend")
    assert len(errors) == 2
    for error in errors:
        assert "NBNORM_BACKEND=typo" in error
        assert {"fast", "numba", "numpy"} <= set(re.findall(r"\w+", error.partition("installed: ")[2]))


def test_third_party_runs_only_where_it_is_named(registry: Registry, packages: SitePackages) -> None:
    packages.add("fast")
    assert explain().chosen == "numpy"
    assert explain_in_use_backend("numpy").chosen == "numpy"
    assert "fast" not in dict(explain().rejected)
    assert states()["fast"] == "found"


def test_refusal_falls_through_to_the_next(registry: Registry, packages: SitePackages) -> None:
    packages.add("picky", refusal="not today")
    packages.add("second")
    packages.add("third")
    decision = explain_in_use_backend("picky", "second", "third")
    assert (decision.chosen, decision.source) == ("second", "use_backend")
    assert decision.rejected == (("picky", "not today"),)
    assert states()["third"] == "found"
    assert explain_in_use_backend("picky").chosen == "numpy"


def test_named_backend_is_strict(registry: Registry, packages: SitePackages) -> None:
    packages.add("picky", refusal="not today")
    out = np.full_like(X, 7.0)
    with nbnorm.use_backend("numpy"), pytest.raises(nbnorm.BackendError, match="not today"):
        nbnorm.layer_norm(X, 3, out=out, backend="picky")
    assert (out == 7.0).all()
    decision = explain(backend="picky")
    assert (decision.chosen, decision.rejected) == (None, (("picky", "not today"),))


def test_refusal_by_device_and_by_dtype(registry: Registry, packages: SitePackages) -> None:
    packages.add("remote", PLUGIN.format(name="remote", refusal=None) + "    device = 'cuda'")
    with pytest.raises(nbnorm.BackendError, match="runs on cuda, the array lies on cpu"):
        nbnorm.layer_norm(X, 3, backend="remote")
    packages.add(
        "single",
        """
        from nbnorm_backends.numpy_ref import NumpyBackend

        class Plugin(NumpyBackend):
            name = "single"

            def reject(self, request):
                return None if request.dtype == "float32" else f"takes no {request.dtype}"
        """,
    )
    nbnorm.layer_norm(X, 3, backend="single")
    with pytest.raises(nbnorm.BackendError, match="takes no float64"):
        nbnorm.layer_norm(X.astype(np.float64), 3, backend="single")
    with nbnorm.use_backend("single"), nbnorm.trace() as decisions:
        nbnorm.layer_norm(X, 3)
        nbnorm.layer_norm(X.astype(np.float64), 3)
    assert [decision.chosen for decision in decisions] == ["single", "numpy"]


def test_unknown_name_lists_the_installed_ones(registry: Registry, packages: SitePackages) -> None:
    packages.add("fast")
    for ask in (lambda: nbnorm.layer_norm(X, 3, backend="typo"), lambda: explain_in_use_backend("numpy", "typo")):
        with pytest.raises(nbnorm.BackendError, match=r"'typo'.*installed: fast, numpy"):
            ask()
    assert states() == {"numpy": "found", "fast": "found"}


@pytest.mark.parametrize("wrong", [3, ["numpy"], NumpyBackend, b"numpy", True])
def test_backend_must_be_a_name_or_a_backend(registry: Registry, wrong: object) -> None:
    with pytest.raises(TypeError, match="backend must be a name or a Backend; got"):
        explain(backend=wrong)
    with pytest.raises(TypeError, match="name"), nbnorm.use_backend(wrong):  # type: ignore[arg-type]
        pass


def test_use_backend_needs_a_name() -> None:
    with pytest.raises(ValueError, match="at least one"), nbnorm.use_backend():
        pass


def test_backend_given_as_an_instance(registry: Registry) -> None:
    class Own(NumpyBackend):
        name = "own"

        def reject(self, request: nbnorm.backend.Request) -> str | None:
            return "no rms" if request.op == "rms_norm" else None

    with nbnorm.trace() as decisions:
        y = nbnorm.layer_norm(X, 3, backend=Own())
    np.testing.assert_array_equal(y, nbnorm.layer_norm(X, 3, backend="numpy"))
    assert [(decision.chosen, decision.source) for decision in decisions] == [("own", "backend=")]
    with pytest.raises(nbnorm.BackendError, match="no rms"):
        nbnorm.rms_norm(X, 3, backend=Own())
    assert "own" not in states()


def test_decisions_are_cached(registry: Registry, packages: SitePackages) -> None:
    packages.add("fast")
    plugin = registry.load("fast")
    for _ in range(3):
        nbnorm.layer_norm(X, 3, backend="fast")
    assert plugin.asked == 1  # type: ignore[union-attr]
    nbnorm.layer_norm(X[:1], 3, backend="fast")  # sizes are no part of the request
    assert plugin.asked == 1  # type: ignore[union-attr]
    nbnorm.layer_norm(X.astype(np.float64), 3, backend="fast")
    assert plugin.asked == 2  # type: ignore[union-attr]


# ---- contexts --------------------------------------------------------------------------------------------------------


def test_use_backend_ends_with_its_block(registry: Registry, packages: SitePackages) -> None:
    packages.add("fast")
    packages.add("other")
    with nbnorm.use_backend("fast"):
        with nbnorm.use_backend("other"):
            assert explain().chosen == "other"
        with pytest.raises(ZeroDivisionError), nbnorm.use_backend("other"):
            raise ZeroDivisionError
        with pytest.raises(nbnorm.BackendError), nbnorm.use_backend("typo"):
            pass
        assert explain().chosen == "fast"
    assert explain().source == "built-in order"


def test_use_backend_holds_in_its_thread_only(registry: Registry, packages: SitePackages) -> None:
    packages.add("fast")
    packages.add("other")
    both_inside = threading.Barrier(2)

    def chosen_in(name: str) -> str | None:
        with nbnorm.use_backend(name):
            both_inside.wait(10)
            return explain().chosen

    with nbnorm.use_backend("fast"), ThreadPoolExecutor(2) as pool:
        assert pool.submit(explain).result().source == "built-in order"
        assert list(pool.map(chosen_in, ["other", "numpy"])) == ["other", "numpy"]
        assert explain().chosen == "fast"


def test_use_backend_holds_in_its_task_only(registry: Registry, packages: SitePackages) -> None:
    packages.add("fast")
    packages.add("other")

    async def chosen_in(name: str, both_inside: asyncio.Barrier) -> str | None:
        with nbnorm.use_backend(name):
            await both_inside.wait()
            return explain().chosen

    async def two_tasks() -> list[str | None]:
        both_inside = asyncio.Barrier(2)
        return await asyncio.gather(chosen_in("fast", both_inside), chosen_in("other", both_inside))

    assert asyncio.run(asyncio.wait_for(two_tasks(), 10)) == ["fast", "other"]


# ---- explain and trace -----------------------------------------------------------------------------------------------


def test_explain_runs_nothing(registry: Registry) -> None:
    class Inert(nbnorm.Backend):
        name = "inert"

        def _fail(self, *args: object, **options: object) -> None:
            raise AssertionError("a backend ran")

        moments = apply = backward_sums = backward_apply = forward = backward = _fail

    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    decision = nbnorm.explain(nbnorm.batch_norm, X, mean, var, training=True, backend=Inert())
    assert decision.chosen == "inert"
    assert (mean == 0).all()
    assert (var == 1).all()
    with pytest.raises(AssertionError, match="a backend ran"):
        nbnorm.batch_norm(X, mean, var, training=True, backend=Inert())


def test_explain_checks_the_call(registry: Registry) -> None:
    with pytest.raises(ValueError, match="normalized_shape"):
        nbnorm.explain(nbnorm.layer_norm, X, 4)
    with pytest.raises(TypeError, match="op must be one of"):
        nbnorm.explain(np.mean, X)


def test_decision_as_text(registry: Registry, packages: SitePackages) -> None:
    packages.add("picky", refusal="not today")
    first, *others = str(explain_in_use_backend("picky")).splitlines()
    for part in ("layer_norm", "cpu", "float32", "numpy", "use_backend"):
        assert part in first
    assert len(others) == 2  # picky, and numba, which is not installed here
    assert "picky" in others[0]
    assert "not today" in others[0]
    assert "no backend" in str(explain(backend="picky"))


def test_explain_counts_copies(registry: Registry) -> None:
    assert explain().copies == ()
    swapped = X.astype(X.dtype.newbyteorder())
    (copy,) = explain(swapped).copies
    assert f"{X.nbytes} bytes" in copy
    assert "byte order" in copy
    assert copy in str(explain(swapped))


def test_trace_collects_in_order_and_nests(registry: Registry) -> None:
    with nbnorm.trace() as outer:
        nbnorm.layer_norm(X, 3)
        with nbnorm.trace() as inner:
            nbnorm.rms_norm(X, 3)
            nbnorm.moments(X, axis=0)
        nbnorm.group_norm(X, 3)
        explain()  # nothing ran, so there is nothing to collect
    nbnorm.batch_norm(X, training=True)
    assert [decision.request.op for decision in inner] == ["rms_norm", "moments"]
    assert [decision.request.op for decision in outer] == ["layer_norm", "rms_norm", "moments", "group_norm"]
    assert {decision.chosen for decision in outer} == {"numpy"}


def test_trace_keeps_a_refused_call(registry: Registry, packages: SitePackages) -> None:
    packages.add("picky", refusal="not today")
    with nbnorm.trace() as decisions, pytest.raises(nbnorm.BackendError) as refused:
        nbnorm.layer_norm(X, 3, backend="picky")
    assert [decision.chosen for decision in decisions] == [None]
    assert str(decisions[0]) == str(refused.value)


# ---- other people's mistakes -----------------------------------------------------------------------------------------


def test_unreadable_metadata_of_another_package_hides_only_its_own(tmp_path: Path) -> None:
    """One malformed entry_points.txt makes importlib.metadata.entry_points() itself raise."""
    packages = SitePackages(tmp_path)
    packages.add("fast")
    broken = tmp_path / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[nbnorm.backends]\nthis line has no equals sign\n")
    printed = fresh_process(
        """
        import numpy as np, nbnorm
        from importlib.metadata import entry_points
        try:
            entry_points(group="nbnorm.backends")
        except Exception:
            print("raises")
        print(sorted(info.name for info in nbnorm.backends() if info.state == "found"))
        print(nbnorm.layer_norm(np.array([[1.0, 3.0]]), 2, eps=1e-12, backend="fast").round(6).tolist())
        """,
        tmp_path,
    )
    assert printed == ["raises", "['cuda', 'fast', 'numba', 'numpy']", "[[-1.0, 1.0]]"]


@pytest.mark.parametrize("reason", ["", False, 3])
def test_a_refusal_without_a_reason_is_an_error(reason: object) -> None:
    class Mute(NumpyBackend):
        def reject(self, request: object) -> object:
            return reason

    with pytest.raises(TypeError, match=rf"Mute\.reject must return a reason or None; got {reason!r}"):
        explain(backend=Mute())
