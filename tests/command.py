"""The `nbnorm` command, run as a user runs it: in a process of its own, without a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INHERITED = {
    name: value for name, value in os.environ.items() if name == "NBNORM_CACHE_DIR" or not name.startswith("NBNORM_")
}
# None in sys.modules is Python's own way to say that a module cannot be imported.
HIDE = "import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(',')))\n"
RUN = "from nbnorm.__main__ import main; main()"


def nbnorm(
    *arguments: str | Path, hide: str = "", cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command, wide enough that no line of a table is broken, with some modules made absent."""
    code = ["-c", HIDE + RUN, hide] if hide else ["-c", RUN]
    return subprocess.run(
        [sys.executable, *code, *map(str, arguments)],
        env=INHERITED | {"COLUMNS": "250"} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
