"""Largest memory of a process that imports the library, makes arrays of 64 MiB and normalizes."""

from __future__ import annotations

from .cases import BACKENDS, CASES, VERSION, runner

NAMES = [name for name in CASES if name.endswith(" large")]


class Memory:
    version = VERSION
    params = (NAMES, BACKENDS)
    param_names = ("case", "backend")

    def setup(self, case: str, backend: str) -> None:
        runner("forward", case, backend)

    def peakmem_forward(self, case: str, backend: str) -> None:
        runner("forward", case, backend)()

    def peakmem_backward(self, case: str, backend: str) -> None:
        runner("backward", case, backend)()
