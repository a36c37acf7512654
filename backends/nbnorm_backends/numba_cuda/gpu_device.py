"""A GPU as the check uses it, through torch: arrays to and from it, times by its events, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nbnorm.errors import BackendError
from nbnorm.peers import dtype_of, tensor
from nbnorm_backends.numba_cuda import device

Array = NDArray[Any]
Call = Callable[[], Any]
# Read before each timed call, to empty the second-level cache (50 MB of an H100), and several times, for the host
# prepares meanwhile what is timed: 0.1 to 0.25 ms for a norm, and a GPU that waits for it would be charged to the call.
# Read and not written: so would lines to be written back.
FLUSH_BYTES = 512 << 20
FLUSHES = 4  # of some 0.2 ms each there


class Device(Protocol):
    """What is measured."""

    torch_name: str
    l2_bytes: int
    capability: tuple[int, int]

    def facts(self) -> dict[str, Any]: ...
    def put(self, array: Array) -> Any: ...
    def get(self, result: Any) -> Array: ...
    def seconds(self, call: Call) -> float: ...
    def wait(self) -> None: ...
    def copy(self, size: int) -> Call: ...
    def capture(self, call: Call) -> tuple[Call, Any]: ...


def missing() -> list[str]:
    """Why there is nothing to check on this machine, and what mends it; empty where there is a GPU and all it needs."""
    problem = device.problem()
    found = [] if problem is None else [problem]
    if find_spec("torch") is None:
        return [*found, 'torch is not installed: pip install "nbnorm[torch]", in its build for CUDA']
    if problem is None:
        try:
            device.CudaDevice(0)
        except BackendError as error:
            return [str(error)]
        torch = import_module("torch")
        if not torch.cuda.is_available():
            return [f"torch {torch.__version__} sees no GPU: install its build for CUDA (pytorch.org/get-started)"]
    return found


class Gpu:
    """torch's current CUDA device."""

    torch_name = "cuda"

    def __init__(self) -> None:
        self._torch = torch = import_module("torch")
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.l2_bytes = int(self._properties.L2_cache_size)
        self.capability = (self._properties.major, self._properties.minor)
        size = max(FLUSH_BYTES, 4 * self.l2_bytes)
        self._lines = torch.zeros(size // 4, dtype=torch.int32, device="cuda")
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def facts(self) -> dict[str, Any]:
        of = self._properties
        return {
            "name": of.name,
            "capability": "{}.{}".format(*self.capability),
            "multiprocessors": of.multi_processor_count,
            "memory_bytes": of.total_memory,
            "l2_bytes": self.l2_bytes,
            "cuda": self._torch.version.cuda,
            "cudnn": self._torch.backends.cudnn.version(),
        }

    def put(self, array: Array) -> Any:
        return tensor(np.ascontiguousarray(array), "cuda")

    def get(self, result: Any) -> Array:
        result = result.detach()
        if result.dtype is self._torch.bfloat16:
            bits: Array = result.view(self._torch.int16).cpu().numpy()
            return bits.view(dtype_of("bfloat16"))
        found: Array = result.cpu().numpy()
        return found

    def seconds(self, call: Call) -> float:
        """Of the GPU, for one call out of cache."""
        for _ in range(FLUSHES):
            self._lines.sum()
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) * 1e-3

    def wait(self) -> None:
        self._torch.cuda.synchronize()

    def copy(self, size: int) -> Call:
        """A copy of as many bytes."""
        source = self._torch.randint(0, 256, (size,), dtype=self._torch.uint8, device="cuda")
        target = self._torch.empty_like(source)
        return lambda: target.copy_(source)

    def capture(self, call: Call) -> tuple[Call, Any]:
        """A CUDA graph of a call: its replay, and the result that each replay writes."""
        torch = self._torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # what is made on a first call is made outside of the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = call()
        return graph.replay, result
