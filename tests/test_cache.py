"""The disk cache of compiled kernels, in processes of their own: it is hit when it should be, and never in the way."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from numba import njit

import nbnorm_backends
from nbnorm_backends import store
from nbnorm_backends.numba_cpu import cache, kernels, merging, pool, whole
from nbnorm_backends.numba_cpu.pool import worker

ROOT = os.geteuid() == 0
PRELUDE = """
import os, sys, warnings
from pathlib import Path
import numpy as np
from numba import njit
from numba.core import event
from nbnorm.backend import LEAK
from nbnorm_backends import store
from nbnorm_backends.numba_cpu import cache

class Counter(event.Listener):
    compiled = 0
    def on_start(self, event):
        Counter.compiled += 1
    def on_end(self, event):
        pass

event.register("numba:compile", Counter())

def kernel(factor=LEAK, name="tests.kernel"):
    return cache.sealed(njit(lambda x: x * factor + 1.0), name)

def run(factor=LEAK, name="tests.kernel"):
    '''"compiled" or "loaded", after the result was found to be right.'''
    before, function = Counter.compiled, kernel(factor, name)
    assert function(8.0) == 8.0 * factor + 1.0, function(8.0)
    return "compiled" if Counter.compiled > before else "loaded"
"""


def start(code: str, folder: Path | str | None, *flags: str, **environment: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NBNORM_", "NUMBA_"))}
    if folder is not None:
        environment["NBNORM_CACHE_DIR"] = str(folder)
    command = [sys.executable, *flags, "-c", PRELUDE + textwrap.dedent(code)]
    return subprocess.Popen(
        command, env=inherited | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output(process: subprocess.Popen[str]) -> str:
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert not errors, errors
    return printed.strip()


def fresh_process(code: str, folder: Path | str | None, **environment: str) -> str:
    """What `code` prints in a process of its own, which has no errors to report."""
    return output(start(code, folder, **environment))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if store.NAME.fullmatch(path.name))


@pytest.fixture(autouse=True)
def _warn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_warned", set())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the store of this process."""
    monkeypatch.setenv("NBNORM_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the kernel of `run`, which is copied and not touched."""
    folder = tmp_path_factory.mktemp("cache") / "warm"
    assert fresh_process("print(run())", folder) == "compiled"
    return folder


# ---- hits ------------------------------------------------------------------------------------------------------------


def test_it_is_active_with_the_numba_that_is_installed() -> None:
    assert cache.KNOWN
    for kernel in (kernels.runs_forward, kernels.columns_apply, whole.respond):
        assert isinstance(worker(kernel)._cache, cache._Cache)  # type: ignore[attr-defined]
    for function in (merging.columns_statistics, pool.close):
        assert isinstance(function._cache, cache._Cache)


NORM = """
import hashlib, nbnorm
x = np.random.default_rng(0).normal(3.0, 2.0, (40, 300)).astype(np.float32)
y = nbnorm.layer_norm(x, 300, backend="numba")
print(Counter.compiled > 0, hashlib.sha256(y.tobytes()).hexdigest())
"""


def test_a_second_process_compiles_nothing_and_gives_the_same_bits(tmp_path: Path) -> None:
    first, second = (fresh_process(NORM, tmp_path / "new" / "kernels").split() for _ in range(2))
    assert first == ["True", second[1]]
    assert second[0] == "False"
    assert fresh_process(NORM, "").split() == first
    kept = files(tmp_path / "new" / "kernels")
    assert kept
    assert {file.stat().st_mode & 0o777 for file in kept} == {0o600}
    assert kept[0].parent.stat().st_mode & 0o777 == 0o700


def test_every_argument_type_has_a_file(tmp_path: Path) -> None:
    code = """
    function = kernel()
    print(function(8.0), function(np.float32(8.0)), function(np.ones(2)).tolist(), Counter.compiled)
    """
    first, second = (fresh_process(code, tmp_path / "kernels") for _ in range(2))
    assert first == "1.08 1.08 [1.01, 1.01] 4"  # with a function that NumPy's arithmetic on arrays is made of
    assert second == "1.08 1.08 [1.01, 1.01] 0"
    assert len(files(tmp_path / "kernels")) == 3


def test_what_changes_machine_code_is_a_miss_and_what_does_not_is_a_hit(warm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(warm, tmp_path / "kernels")
    assert fresh_process("print(run())", folder, NUMBA_NUM_THREADS="1", PYTHONHASHSEED="1") == "loaded"
    assert fresh_process("print(run())", folder, NUMBA_OPT="1") == "compiled"
    assert fresh_process("print(run())", folder, NUMBA_CPU_NAME="generic") == "compiled"
    assert fresh_process("print(run(name='tests.other'))", folder) == "compiled"
    flags = (
        "print(cache.sealed(njit(error_model='numpy', fastmath={'nsz', 'contract'})(lambda x: 0), 'tests.kernel')(8.0))"
    )
    assert [fresh_process(f"{flags}; print(Counter.compiled)", folder) for _ in range(2)] == ["0\n1", "0\n0"]
    assert fresh_process("print(run())", folder) == "loaded"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("nbnorm_backends/numba_cpu/elements.py", "LINE = 64 ", "LINE = 32 "),
        ("nbnorm/backend.py", "LEAK = 0.01 ", "LEAK = 0.02 "),
    ],
)
def test_a_changed_source_is_a_miss(warm: Path, tmp_path: Path, file: str, old: str, new: str) -> None:
    folder = shutil.copytree(warm, tmp_path / "kernels")
    copies = tmp_path / "copies"
    for package in (Path(cache.backend.__file__).parent, Path(nbnorm_backends.__path__[0])):
        shutil.copytree(package, copies / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PYTHONPATH": str(copies), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    code = f"""
    assert all(module.__file__.startswith({str(copies)!r}) for module in (cache, cache.backend))
    print(run())
    """
    assert fresh_process(code, folder, **environment) == "loaded"  # the same sources elsewhere
    source = (copies / file).read_text()
    assert source.count(old) == 1
    (copies / file).write_text(source.replace(old, new))
    assert [fresh_process(code, folder, **environment) for _ in range(2)] == ["compiled", "loaded"]


RECURSIVE = """
def closure(number):
    @njit
    def inner(x):  # called, and so a symbol of its own
        if x <= 0:
            return number
        return inner(x - 2) + 2 * inner(x - 3)
    return cache.sealed(njit(lambda x: inner(x)), f"tests.closure {number}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("forked", [False, True])
def test_symbols_of_several_processes_do_not_meet(tmp_path: Path, forked: bool) -> None:
    """Numba would number the functions of both alike, and a third process would run one of them for both."""
    if forked:
        code = """
        pid = os.fork()
        print(closure(2 if pid else 3)(9), flush=True)
        if not pid:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        """
        found = fresh_process(RECURSIVE + textwrap.dedent(code), tmp_path / "kernels").split()
    else:
        found = [fresh_process(f"{RECURSIVE}\nprint(closure({number})(9))", tmp_path / "kernels") for number in (2, 3)]
    two, three = sorted(map(int, found))
    assert 3 * two == 2 * three
    for order in ("2, 3, 2", "3, 2, 3"):
        printed = fresh_process(
            f"{RECURSIVE}\nprint([closure(number)(9) // number for number in ({order})], Counter.compiled)",
            tmp_path / "kernels",
        )
        assert printed == f"{[two // 2] * 3} 0"


def test_a_name_that_is_used_twice_outlives_the_first_use(warm: Path, tmp_path: Path) -> None:
    printed = fresh_process(
        """
        import gc
        first, second = kernel(), kernel()
        values = [first(8.0), second(8.0)]
        del first
        gc.collect()
        print([*values, second(8.0), kernel()(8.0)], Counter.compiled)
        """,
        shutil.copytree(warm, tmp_path / "kernels"),
    )
    assert printed == "[1.08, 1.08, 1.08, 1.08] 0"


def test_disable_and_recompile(warm: Path, tmp_path: Path) -> None:
    printed = fresh_process(
        """
        function = kernel()
        function(8.0)
        loaded = Counter.compiled
        function.recompile()
        other = kernel()
        other._cache.disable()
        other(8.0)
        print(loaded, Counter.compiled, function.stats.cache_path)
        """,
        folder := shutil.copytree(warm, tmp_path / "kernels"),
    )
    assert printed == f"0 2 {folder}"


# ---- damage ----------------------------------------------------------------------------------------------------------

DAMAGE = {
    "truncated": """
        for length in (0, 1, 31, 32, 33, len(whole) // 2, len(whole) - 1):
            yield path.write_bytes(whole[:length])
    """,
    "a flipped bit": """
        for place in (0, 31, 32, 40, len(whole) // 3, len(whole) // 2, len(whole) - 1):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            yield path.write_bytes(changed)
    """,
    "more at the end": """
        yield path.write_bytes(whole + whole)
    """,
    "of another key": """
        run(5.0, "tests.other")
        (other,) = set(path.parent.iterdir()) - {path}
        yield path.write_bytes(other.read_bytes())
    """,
    "a pickle that runs code": """
        yield path.write_bytes(whole[:32] + b"cos\\n_exit\\n(I3\\ntR.")
    """,
    "a symbolic link": """
        elsewhere = path.rename(path.parent.parent / "elsewhere")
        yield path.symlink_to(elsewhere)
        assert not path.is_symlink() and elsewhere.read_bytes() == whole
    """,
    "others may write": """
        yield path.chmod(0o620)
        assert path.stat().st_mode & 0o777 == 0o600
    """,
    "unreadable": """
        yield path.write_bytes(b"") or path.chmod(0)
    """,
    "a pipe": """
        path.unlink()
        yield os.mkfifo(path)
    """,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_and_is_replaced(warm: Path, tmp_path: Path, damage: str) -> None:
    printed = fresh_process(
        f"""
        (path,) = Path(os.environ["NBNORM_CACHE_DIR"]).iterdir()
        whole = path.read_bytes()
        def damages():{textwrap.indent(DAMAGE[damage], "    ")}
        for _ in damages():
            print(run(), run())
        """,
        shutil.copytree(warm, tmp_path / "kernels"),
    )
    assert set(printed.splitlines()) == {"compiled loaded"}


def test_a_folder_in_place_of_a_file_is_a_miss(warm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(warm, tmp_path / "kernels")
    (file,) = files(folder)
    file.unlink()
    file.mkdir()
    assert fresh_process("print(run(), run())", folder) == "compiled compiled"
    assert list(folder.iterdir()) == [file]


@pytest.mark.skipif(not ROOT, reason="only root gives files away")
def test_a_file_of_another_user_is_a_miss(warm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(warm, tmp_path / "kernels")
    os.chown(files(folder)[0], 12345, -1)
    assert fresh_process("print(run(), run())", folder) == "compiled loaded"
    assert files(folder)[0].stat().st_uid == 0


def test_a_kill_while_a_file_is_written_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    killed = start("os.rename = lambda *_, **__: os.kill(os.getpid(), 9)\nrun()", folder)
    killed.communicate(timeout=120)
    assert killed.returncode == -9
    (left,) = folder.iterdir()
    assert left in files(folder)  # so that it is removed when its time has come
    assert [fresh_process("print(run())", folder) for _ in range(2)] == ["compiled", "loaded"]


def test_processes_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "kernels"
    processes = [start("print(run())", folder) for _ in range(4)]
    assert {output(process) for process in processes} <= {"compiled", "loaded"}
    assert len(list(folder.iterdir())) == 1
    assert fresh_process("print(run())", folder) == "loaded"


# ---- where there is no cache -----------------------------------------------------------------------------------------


def test_an_empty_variable_means_none(tmp_path: Path) -> None:
    code = "print(run(), run(), kernel().stats.cache_path)"
    assert fresh_process(code, "", HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path)) == "compiled compiled None"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HOME": "{}/home", "XDG_CACHE_HOME": "{}/xdg"}, "xdg/nbnorm"),
        ({"HOME": "{}/home", "XDG_CACHE_HOME": ""}, "home/.cache/nbnorm"),
        ({"HOME": "", "XDG_CACHE_HOME": ""}, None),
    ],
)
def test_the_default_folder(tmp_path: Path, environment: dict[str, str], folder: str | None) -> None:
    environment = {name: value.format(tmp_path) for name, value in environment.items()}
    expected = "None" if folder is None else tmp_path / folder
    printed = fresh_process("print(run(), kernel().stats.cache_path)", None, **environment)
    assert printed == f"compiled {expected}"
    assert len(list(tmp_path.rglob("*.kernel"))) == (folder is not None)


def test_no_home_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NBNORM_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert store.folder() is None
    assert store.usage() == (0, 0)
    assert store.read(bytes(32)) is None
    store.write(bytes(32), b"content")


@pytest.mark.parametrize("folder", ["/proc/self/task", "/proc/nbnorm", "/dev/null", "/dev/null/nbnorm"])
def test_a_folder_that_cannot_be_written_to_is_no_cache(folder: str) -> None:
    code = "warnings.simplefilter('ignore'); print(run(), run())"
    assert fresh_process(code, folder) == "compiled compiled"


@pytest.mark.skipif(ROOT, reason="root writes everywhere")
def test_a_read_only_folder_is_read(warm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(warm, tmp_path / "kernels")
    folder.chmod(0o500)
    assert fresh_process("print(run(), run(2.0, 'tests.other'), run(2.0, 'tests.other'))", folder) == (
        "loaded compiled compiled"
    )


def test_a_full_disk_is_no_cache(tmp_path: Path) -> None:
    code = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    print(run(), run())
    """
    assert fresh_process(code, tmp_path / "kernels") == "compiled compiled"
    assert not list((tmp_path / "kernels").iterdir())


def _group_writable(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def _link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def _foreign(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    if not ROOT:
        pytest.skip("only root gives folders away")
    os.chown(folder, 12345, -1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_group_writable, r"can be written to by others \(mode 0770\)"),
        (_link, "is a symbolic link"),
        (_foreign, "belongs to user 12345 and not to 0"),
        (Path.touch, "is not a folder"),
    ],
)
def test_a_folder_that_is_not_safe_is_refused_with_one_warning(tmp_path: Path, make: object, reason: str) -> None:
    folder = tmp_path / "kernels"
    make(folder)
    process = start("print(run(), run(), run(2.0, 'tests.other'))", folder, "-W", "always")
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode, printed.strip()) == (0, "compiled compiled compiled")
    said = re.findall(r"RuntimeWarning: (.*)", errors)
    assert len(said) == 1
    assert re.fullmatch(
        f"nbnorm keeps no compiled kernels in {folder}, which {reason}; set NBNORM_CACHE_DIR to another folder", said[0]
    )
    assert not list(tmp_path.rglob("*.kernel*"))


def test_numba_that_is_not_known_has_no_cache(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setattr(cache, "KNOWN", False)
    dispatcher = njit(lambda x: x + 1)
    before = dispatcher._cache
    assert cache.sealed(dispatcher, "tests.unknown") is dispatcher
    assert dispatcher._cache is before
    assert dispatcher(1) == 2
    assert not here.exists()


def test_without_compilation_there_is_no_cache(tmp_path: Path) -> None:
    assert fresh_process("print(kernel(2.0)(8.0))", tmp_path / "kernels", NUMBA_DISABLE_JIT="1") == "17.0"
    assert not (tmp_path / "kernels").exists()


def test_sources_that_cannot_be_read_mean_none(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    def unreadable() -> str:
        raise FileNotFoundError("in a zip file")

    monkeypatch.setattr(cache, "_sources", unreadable)
    assert cache.sealed(njit(lambda x: x + 1), "tests.zipped")(1) == 2
    assert not here.exists()


# ---- the folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys() -> Iterator[bytes]:
    return (bytes([number]) * 32 for number in range(256))


def test_what_is_used_least_recently_is_removed_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch, here: Path, keys: Iterator[bytes]
) -> None:
    a, b, c, d = (next(keys) for _ in range(4))
    for age, key in ((300, a), (200, b), (100, c)):
        store.write(key, bytes(968))
        os.utime(here / store._name(key), (1e9 - age, 1e9 - age))
    (here / "notes.txt").write_text("of somebody else" * 1000)
    assert store.usage() == (3, 3000)
    monkeypatch.setattr(store, "LIMIT", 3000)
    assert store.read(a) == bytes(968)  # used now
    store.write(d, bytes(968))
    assert [store.read(key) is not None for key in (a, b, c, d)] == [True, False, True, True]
    assert (here / "notes.txt").exists()
    store.write(b, bytes(5000))  # larger than all that is allowed
    assert store.usage() == (0, 0)


def test_interrupted_writing_leaves_no_file(monkeypatch: pytest.MonkeyPatch, here: Path, keys: Iterator[bytes]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write(next(keys), b"content")
    assert not list(here.iterdir())


def test_the_variable_is_read_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: Iterator[bytes]) -> None:
    key = next(keys)
    for name in ("a", "b"):
        monkeypatch.setenv("NBNORM_CACHE_DIR", str(tmp_path / name))
        assert store.read(key) is None
        store.write(key, name.encode())
        assert store.read(key) == name.encode()


def test_no_descriptor_is_left_open(here: Path, keys: Iterator[bytes]) -> None:
    def opened() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not list them")
    store.write(next(keys), b"content")
    before = opened()
    for key in keys:
        store.write(key, b"content")
        assert store.read(key) == b"content"
    here.chmod(0o777)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert store.read(bytes(32)) is None
    assert opened() == before
