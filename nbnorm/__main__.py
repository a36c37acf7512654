"""Where the `nbnorm` command and ``python -m nbnorm`` begin: what can be said without the `cli` extra."""

from __future__ import annotations

import sys

from nbnorm.errors import BackendError

EXTRAS = ("typer", "rich")


def main() -> None:
    """Run the command; a missing extra, or a backend that cannot be had, is one line and not a traceback."""
    try:
        from nbnorm.cli import app  # noqa: PLC0415  only here can its absence be explained
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        sys.exit(f'nbnorm: the command line needs {package}: pip install "nbnorm[cli]"')
    try:
        app(prog_name="nbnorm")
    except BackendError as error:
        sys.exit(f"nbnorm: {error}")


if __name__ == "__main__":
    main()
