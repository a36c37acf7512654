"""What cannot be told without a GPU, told on one: ``python -m nbnorm_backends.numba_cuda.gpu_check --out FOLDER``.

Results against exact ones, bits in CUDA graphs, what a launch costs, and times beside a copy and torch. ``--dry`` does
without a GPU what can be done without: it compiles every kernel and runs every norm in the simulator.

The exit status is 1 where a result is further off than is allowed, a kernel over its budget or something found by the
sanitizer, and 2 where there is nothing to check. A goal of speed that is missed is said, and is no failure.
"""

from __future__ import annotations

import sys
from importlib import import_module


def install() -> str:
    """What brings all that is needed here: a check on a GPU compiles, and needs torch's build for it."""
    return f'pip install "nbnorm[{"cuda-check" if "--dry" in sys.argv else "cli,cuda,torch"}]"'


def _of_the_device() -> list[str]:
    """Why there can be no GPU, which no command line would mend."""
    problem = import_module("nbnorm_backends.numba_cuda.device").problem()
    return [] if problem is None else [problem]


def main() -> None:
    """Run the command; that the `cli` extra is missing is one line and not a traceback."""
    try:
        from nbnorm_backends.numba_cuda.gpu_command import app  # noqa: PLC0415  only here can its absence be explained
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in ("typer", "rich", "ml_dtypes"):
            raise
        for line in (*([] if "--dry" in sys.argv else _of_the_device()), f"gpu_check needs {package}: {install()}"):
            print(line, file=sys.stderr)
        sys.exit(2)
    app(prog_name="gpu_check")


if __name__ == "__main__":
    main()
