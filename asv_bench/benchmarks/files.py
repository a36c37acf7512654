"""Statistics of a file that is read in blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .cases import VERSION

try:
    from nbnorm import stream
except ImportError:  # before 0.3.0
    stream = None  # type: ignore[assignment]

SHAPE = (64, 64, 128, 64)  # 128 MiB of float32, which the page cache holds


class Files:
    """asv runs setup_cache in a folder of its own, which it removes."""

    version = VERSION

    def setup_cache(self) -> str:
        path = Path("population.npy").resolve()
        np.save(path, np.random.default_rng(0).standard_normal(SHAPE, np.float32))
        return str(path)

    def setup(self, path: str) -> None:
        if stream is None:
            raise NotImplementedError
        self.run(path)

    def run(self, path: str) -> None:
        source = stream.open_array(Path(path), 1)
        stream.channel_statistics(source, lambda size: None)

    def time_statistics(self, path: str) -> None:
        self.run(path)

    def peakmem_statistics(self, path: str) -> None:
        self.run(path)
