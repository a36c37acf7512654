"""What a process pays before its first result, each time in a new one."""

from __future__ import annotations

from .cases import VERSION

FIRST = "nbnorm.layer_norm(x, 64)"
ARRAY = "import numpy as np, nbnorm; x = np.ones((8, 64), 'f4')"


def timeraw_import() -> tuple[str, str]:
    """Of nbnorm alone: NumPy is there before."""
    return "import nbnorm", "import numpy"


def timeraw_first_call() -> tuple[str, str]:
    """With compiled kernels on disk, in versions that keep them; the import of Numba is most of it."""
    return FIRST, ARRAY


def timeraw_first_call_cold() -> tuple[str, str]:
    """Without: the kernel is compiled."""
    return FIRST, f"import os; os.environ['NBNORM_CACHE_DIR'] = ''; {ARRAY}"


for benchmark in (timeraw_import, timeraw_first_call, timeraw_first_call_cold):
    benchmark.version = VERSION  # type: ignore[attr-defined]
    benchmark.repeat = 3  # type: ignore[attr-defined]
    benchmark.number = 1  # type: ignore[attr-defined]
