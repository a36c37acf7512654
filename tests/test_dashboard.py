"""The dashboard, built from real results and opened in a real browser: it works, and asks nothing of another host."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "asv_bench" / "publish.py"
pytestmark = pytest.mark.slow
COMMITS = 8  # the step is found with four on either side
BENCHMARK = "bench.track_work"
SOURCE = """
def track_work():
    return {}

track_work.version = "1"  # else asv takes edited code for another benchmark
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["publish"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


publish = load()


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight commits, of which the last four take twice the work, measured by asv; the folder of their dashboard."""
    pytest.importorskip("asv", reason="asv is not installed")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("project")
    benchmarks = folder / "benchmarks"
    benchmarks.mkdir()
    (benchmarks / "__init__.py").touch()
    config = {"version": 1, "project": "scratch", "repo": ".", "branches": ["main"], "environment_type": "existing"}
    (folder / "asv.conf.json").write_text(json.dumps(config))
    asv = "env", f"HOME={folder}", sys.executable, "-m", "asv"  # it keeps what it knows of machines at home
    run(folder, *asv, "machine", "--yes", "--machine", "scratch")
    run(folder, "git", "init", "-q", "-b", "main")
    for commit in range(COMMITS):
        work = 1.0 if commit < COMMITS // 2 else 2.0
        (benchmarks / "bench.py").write_text(f"# {commit}\n" + SOURCE.format(work))
        run(folder, "git", "add", "benchmarks")
        identity = "-c", "user.name=x", "-c", "user.email=x@example.org"
        date = f"2026-01-0{commit + 1}T12:00:00"
        run(folder, "env", f"GIT_COMMITTER_DATE={date}", "git", *identity, "commit", "-q", "-m", "x", "--date", date)
        revision = run(folder, "git", "rev-parse", "HEAD").strip()
        run(folder, *asv, "run", "--machine", "scratch", "-E", "existing", "--set-commit-hash", revision)
    publish.publish(folder / "asv.conf.json", folder / "site")
    return folder / "site"


@pytest.fixture
def chromium() -> None:
    pytest.importorskip("playwright", reason="playwright is not installed")
    if publish.chromium() is None:
        pytest.skip("chromium is not installed")


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[tuple[Any, str]]:
    """A page and a dashboard's address; that no request fails or leaves this machine is asserted at the end."""
    asked: list[str] = []
    wrong: list[str] = []
    with publish.browser(folder) as (page, address):
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("response", lambda response: wrong.append(response.url) if response.status >= 400 else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        yield page, address
    assert asked
    assert [url for url in asked if not url.startswith(address)] == []
    assert wrong == []


def test_grid(dashboard: Path, chromium: None) -> None:
    with opened(dashboard) as (page, address):
        page.goto(address)
        page.wait_for_selector("#summarygrid-display >> text=track_work")
        assert page.locator("#summarygrid-display canvas").count() >= 1


def test_graph(dashboard: Path, chromium: None) -> None:
    with opened(dashboard) as (page, address):
        page.goto(f"{address}#{BENCHMARK}")
        page.wait_for_selector("#main-graph canvas.flot-base")
        drawn = page.evaluate("$('#main-graph').data('plot').getData()[0].data.map(point => point[1])")
    assert drawn == [1.0] * (COMMITS // 2) + [2.0] * (COMMITS // 2)


def test_regressions(dashboard: Path, chromium: None) -> None:
    with opened(dashboard) as (page, address):
        page.goto(f"{address}#regressions")
        row = page.wait_for_selector(f"#regressions-body tr:has-text('{BENCHMARK}')")
        assert "2.00x" in row.inner_text()


def test_results_of_the_project(chromium: None, tmp_path: Path) -> None:
    """The committed ones: every benchmark is in the grid, and its graph opens."""
    pytest.importorskip("asv", reason="asv is not installed")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    if not (SCRIPT.parents[1] / ".git").exists():
        pytest.skip("not a clone: asv needs the commits")
    publish.publish(publish.CONFIG, tmp_path)
    benchmarks = json.loads((tmp_path / "index.json").read_text())["benchmarks"]
    assert len(benchmarks) > 10
    with opened(tmp_path) as (page, address):
        page.goto(address)
        page.wait_for_selector("#summarygrid-display canvas")
        shown = page.locator("#summarygrid-display").inner_text()
        assert [name for name in benchmarks if name.partition(".")[2] not in shown] == []
        page.goto(f"{address}#calls.Calls.time_thousand_calls")
        page.wait_for_selector("#main-graph canvas.flot-base")
        page.goto(f"{address}#regressions")
        page.wait_for_selector("#regressions-body table")


def test_licences_lie_beside_the_scripts(dashboard: Path) -> None:
    for package in publish.PACKAGES:
        folder = dashboard / "vendor" / package.name
        assert "MIT" in (text := (folder / package.licence).read_text()) or "Permission is hereby granted" in text
        assert all((folder / path).stat().st_size > 1000 for path in package.files.values())


def test_picture(dashboard: Path, chromium: None, tmp_path: Path) -> None:
    publish.save_picture(dashboard, tmp_path / "graph.png", BENCHMARK)
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")


def test_a_package_with_another_hash_is_refused(tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    package = publish.Package("blueimp-md5", "2.18.0", publish.PACKAGES[4].sha512, {})
    with pytest.raises(SystemExit, match=r"blueimp-md5@2\.18\.0 from npm has the hash sha512-.*; expected sha512-DRQ"):
        publish._fetch(package, tmp_path)


def test_a_script_that_is_not_known_is_an_error() -> None:
    with pytest.raises(SystemExit, match=r"links to https://example\.org/other\.js"):
        publish.localized('<script src="https://example.org/other.js"></script>')


def test_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no .*absent\.json"):
        publish.publish(tmp_path / "absent.json", tmp_path)
