"""Time of each case, forward and backward."""

from __future__ import annotations

from .cases import BACKENDS, BACKWARD, FORWARD, VERSION, runner


class Forward:
    """asv runs setup before each timed call; the runner that it returns has been warmed up and is made once."""

    version = VERSION
    params = (FORWARD, BACKENDS)
    param_names = ("case", "backend")
    repeat = (3, 20, 0.5)

    def setup(self, case: str, backend: str) -> None:
        self.run = runner("forward", case, backend)

    def time_forward(self, case: str, backend: str) -> None:
        self.run()


class Backward:
    version = VERSION
    params = (BACKWARD, BACKENDS)
    param_names = ("case", "backend")
    repeat = (3, 20, 0.5)

    def setup(self, case: str, backend: str) -> None:
        self.run = runner("backward", case, backend)

    def time_backward(self, case: str, backend: str) -> None:
        self.run()
