"""Instructions of one call of each case, counted by callgrind: exact, where times on a shared machine are not.

    valgrind --tool=callgrind --instr-atstart=no ... python -m benchmarks.callgrind FIGURE...

is what `count` runs.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from .cases import Measured, on_path

# A client request of Valgrind on x86-64, as a function of (address of request and arguments, default result): rax and
# rdx are loaded, then come the rotations and the exchange that Valgrind knows it by and a processor does nothing at
# (valgrind.h, "__SPECIAL_INSTRUCTION_PREAMBLE"). So no C compiler is needed.
REQUEST = bytes.fromhex("4889f8 4889f2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0 c3")
RUNNING_ON_VALGRIND = 0x1001
ZERO_STATS, DUMP_STATS_AT, START_INSTRUMENTATION = 0x43540001, 0x43540003, 0x43540004  # callgrind.h
# What counts must not depend on: the number of threads, the order of sets, the processor that Numba compiles for.
FIXED = {
    "NBNORM_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OPENBLAS_CORETYPE": "Haswell",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "",
    "PYTHONHASHSEED": "0",
}
WARM_CALLS = 10  # CPython specializes bytecode in the first eight


def absence() -> str | None:
    """Why nothing can be counted here, or None."""
    if platform.machine() != "x86_64":
        return f"instructions are counted on x86-64; this is {platform.machine()}"
    if shutil.which("valgrind") is None:
        return "instructions are counted by valgrind, which is not installed (apt-get install valgrind)"
    return None


def count(figures: Collection[str], timeout: float = 1800) -> Measured:
    """Instructions by figure, and what was raised by those that failed.

    Figures are "kind|name|backend", as `benchmarks.instructions` lists them; in neither are those that this version
    does not have.

    Raises
    ------
    RuntimeError
        If the process ends otherwise than it should, with what it wrote.
    """
    left = list(figures)
    environment = on_path(os.environ | FIXED)
    done = _run([], left, environment, timeout)  # fills the kernel cache: Valgrind makes compiling ten times as long
    failed = {}
    while not done.returncode:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
            done = _run(["valgrind", *options], left, environment, timeout)
            lines = [line.partition("\t") for line in done.stdout.splitlines()]
            if not done.returncode:
                return _totals(Path(folder)), failed | {figure: error for figure, _, error in lines if error}
        if done.returncode == -signal.SIGILL and lines:
            figure = lines[-1][0]
            failed[figure] = "an instruction that this Valgrind does not know"
            left.remove(figure)
            done.returncode = 0
    last = done.stdout.splitlines()[-1:] or ["the import of nbnorm"]
    raise RuntimeError(f"{last[0]} ended with {done.returncode}:\n{done.stderr[-4000:]}")


def _run(
    prefix: list[str], figures: list[str], environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "benchmarks.callgrind", *figures]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def _totals(folder: Path) -> dict[str, float]:
    """What callgrind dumped, by the names that it was given."""
    found: dict[str, float] = {}
    for path in folder.iterdir():
        text = path.read_text()
        name = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
        if name:
            total = re.search(r"^(?:summary|totals): (\d+)$", text, re.MULTILINE)
            assert total is not None, path
            found[name[1]] = int(total[1])
    return found


def _requester() -> Callable[..., int]:
    """A function of a request and its argument."""
    memory = mmap.mmap(-1, len(REQUEST), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(REQUEST)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    code = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64), ctypes.c_uint64)(address)

    def request(number: int, argument: int = 0) -> int:
        assert memory is not None  # lives as long as this function
        return int(code((ctypes.c_uint64 * 6)(number, argument), 0))

    return request


def main(figures: list[str]) -> None:
    """Warm up every figure, then, under Valgrind, count one call of each. Tells the figure at hand, and errors."""
    from .instructions import runner_of  # noqa: PLC0415  which imports this module

    runs = {}
    for figure in figures:
        print(figure, flush=True)
        try:
            run = runner_of(figure)
            run()  # a second time: it may be another path
            runs[figure] = run
        except NotImplementedError:
            continue
        except Exception as error:  # noqa: BLE001  the others can be counted
            print(f"{figure}\t{type(error).__name__}: {error}".replace("\n", " "), flush=True)
    request = _requester()
    if not request(RUNNING_ON_VALGRIND):
        return
    for run in runs.values():  # when all backends are loaded: loading one forgets the calls that are remembered
        for _ in range(WARM_CALLS):
            run()
    gc.collect()
    gc.disable()
    request(START_INSTRUMENTATION)
    for figure, run in runs.items():
        name = ctypes.create_string_buffer(figure.encode())
        request(ZERO_STATS)
        run()
        request(DUMP_STATS_AT, ctypes.addressof(name))


if __name__ == "__main__":
    main(sys.argv[1:])
