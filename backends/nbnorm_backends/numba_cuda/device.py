"""A GPU, as the backend uses it: `Device`, and the real one, through cuda.core and the driver's own functions.

Nothing here waits for the device but `host`, the copy to host memory.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nbnorm.devices import DeviceArray, Memory, allocates
from nbnorm.errors import BackendError
from nbnorm_backends.numba_cuda import cubins
from nbnorm_backends.numba_cuda.launch import FLAGS, POINTERS, REALS, Variant
from nbnorm_backends.numba_cuda.plans import Launch

NEEDED = {"numba_cuda": "numba-cuda", "cuda.core": "cuda-core"}  # modules, and the packages that bring them
COMPILER, LINKER = "nvidia-nvvm", "nvidia-nvjitlink"
INSTALL = 'pip install "nbnorm[cuda]"'
DRIVER = 13000  # CUDA 13.0: older drivers do not load what its linker made
DRIVER_NAME = "the NVIDIA driver 580 or later"
CAPABILITY = 80  # from which on there are instructions for bfloat16
Start = Callable[[int, Mapping[str, int]], None]


class HostMemory(Memory):
    """A device's memory for arrays that come from the host and go back there."""

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """A copy of a C-contiguous array."""
        raise NotImplementedError


class Device(Protocol):
    """One GPU.

    Attributes
    ----------
    name : what errors call it
    capability : compute capability, times ten
    multiprocessors : int
    memory : for host arrays; those of a library are allocated by it
    """

    name: str
    capability: int
    multiprocessors: int
    memory: HostMemory

    def bind(self, launches: tuple[Launch, ...]) -> Start:
        """Have the kernels compiled and loaded. A function (stream, addresses) that starts them in their order, behind
        what the stream has to do, on the arrays at these addresses, by their names in the launches; 0 for none."""


@functools.cache
def problem() -> str | None:
    """Why there can be no GPU for this process, with what mends it, or None. Asks the driver, and starts nothing."""
    missing = [package for module, package in NEEDED.items() if not _is_there(module)]
    if missing:
        return f"{' and '.join(missing)} not installed: {INSTALL}"
    compiler, linker = _release(COMPILER), _release(LINKER)
    if compiler is not None and linker is not None and compiler > linker:
        newer, older = ("{}.{}".format(*each) for each in (compiler, linker))
        return (
            f"{COMPILER} {newer} is newer than {LINKER} {older}, which refuses what it makes: "
            f'pip install "cuda-toolkit=={older}.*"'
        )
    driver = import_module("cuda.bindings.driver")
    try:
        error, found = driver.cuDriverGetVersion()
    except RuntimeError:  # there is no library of the driver
        return f"no NVIDIA driver was found: install {DRIVER_NAME}"
    if not error and found < DRIVER:
        return f"the driver is for CUDA {_dotted(found)}, too old by {_dotted(DRIVER)}: install {DRIVER_NAME}"
    return None


def names() -> str:
    """Of all devices, or why there is none to be seen; there must be a driver."""
    try:
        found = import_module("cuda.core").Device.get_all_devices()
        return ", ".join(f"{each.name} (cuda:{each.device_id})" for each in found) or "none"
    except Exception as error:  # noqa: BLE001  cuda.core's CUDAError, where no GPU is visible, or the loader's
        return str(error)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _release(package: str) -> tuple[int, int] | None:
    """(major, minor); None where it came otherwise than by pip, and its version is not known."""
    try:
        major, minor = version(package).split(".")[:2]
    except PackageNotFoundError:
        return None
    return int(major), int(minor)


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def check(result: tuple[Any, ...], what: str) -> Any:
    """The value of a driver function's result; BackendError where it failed."""
    error, *values = result
    if error:
        raise BackendError(f"{what}: {error.name}{advice(error.name)}")
    return values[0] if len(values) == 1 else values


def advice(error: object, other: str = "") -> str:
    """What is said behind an error, by the name of the driver's that it has in it; something else where it has none."""
    return next((text for name, text in ADVICE.items() if name in str(error)), other)


FORKED = "CUDA does not survive a fork: start the process by spawn or forkserver"
ADVICE = {
    "CUDA_ERROR_NO_DEVICE": ": no GPU is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_DEVICE": ": there is no such device; look at nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_OUT_OF_MEMORY": ": free memory there, or pass fewer samples at a time",
    "CUDA_ERROR_NOT_INITIALIZED": f": {FORKED}",
}


class CudaDevice:
    """A real one, by its ordinal. BackendError, where there is none or it is too old."""

    def __init__(self, ordinal: int) -> None:
        self._driver, self._core = import_module("cuda.bindings.driver"), import_module("cuda.core")
        self.ordinal, self.name = ordinal, f"cuda:{ordinal}"
        check(self._driver.cuInit(0), self.name)
        handle = check(self._driver.cuDeviceGet(ordinal), self.name)
        self._context = check(self._driver.cuDevicePrimaryCtxRetain(handle), self.name)
        try:
            with self.current() as device:
                self.name = f"{device.name} (cuda:{ordinal})"
                major, minor = device.compute_capability
                self.multiprocessors = int(device.properties.multiprocessor_count)
            self.capability = 10 * int(major) + int(minor)
            if self.capability < CAPABILITY:
                raise BackendError(f"{self.name} has compute capability {major}.{minor}; its kernels need 8.0 or later")
            self.memory: HostMemory = CudaMemory(self)
        except BackendError:
            raise
        except Exception as error:  # cuda.core's CUDAError
            raise BackendError(f"{self.name} could not be opened: {error}; look at nvidia-smi") from error
        self._loaded: dict[Variant, tuple[Any, tuple[str, ...]]] = {}

    @contextmanager
    def current(self) -> Iterator[Any]:
        """This device's context as the thread's own, and then again the one that was; cuda.core's device of both."""
        check(self._driver.cuCtxPushCurrent(self._context), self.name)
        try:
            device = self._core.Device(self.ordinal)
            device.set_current()  # the same context: cuda.core keeps a mark in each thread
            yield device
        finally:
            check(self._driver.cuCtxPopCurrent(), self.name)

    def bind(self, launches: tuple[Launch, ...]) -> Start:
        bound = []
        for each in launches:
            kernel, names = self._kernel(each.variant)
            bound.append((_config(each.grid, each.block), kernel, *arguments(each.variant, names, each.args)))
        launch, get_current, context = self._core.launch, self._driver.cuCtxGetCurrent, int(self._context)

        def start(stream: int, at: Mapping[str, int]) -> None:
            started = 0
            try:
                on = self._stream(stream)
                error, current = get_current()
                if error:
                    check((error,), self.name)
                if int(current) != context:
                    with self.current():
                        start(stream, at)
                    return
                for config, kernel, fixed, places in bound:
                    values = fixed.copy()
                    for i, name in places:
                        values[i] = at[name]
                    launch(on, config, kernel, *values)
                    started += 1
            except BackendError:
                raise
            except Exception as error:
                raise BackendError(_failed(self.name, launches, started, error)) from error

        return start

    def _kernel(self, variant: Variant) -> tuple[Any, tuple[str, ...]]:
        found = self._loaded.get(variant)
        if found is None:
            try:
                made = cubins.kernel_of(variant, divmod(self.capability, 10))
                with self.current():
                    kernel = self._core.ObjectCode.from_cubin(made.cubin, name=variant.name).get_kernel(made.entry)
            except Exception as error:
                found_by = advice(error, f". {INSTALL} brings what compiles and links")
                message = f"{self.name}: the kernel {variant.name} could not be compiled or loaded: {error}{found_by}"
                raise BackendError(message) from error
            found = self._loaded[variant] = kernel, made.names
        return found

    @functools.lru_cache(maxsize=64)  # noqa: B019  a device is never let go
    def _stream(self, handle: int) -> Any:
        return self._core.Stream.from_handle(handle) if handle else self._core.LEGACY_DEFAULT_STREAM


@functools.lru_cache(maxsize=1024)
def _config(grid: int, block: int) -> Any:
    return import_module("cuda.core").LaunchConfig(grid=grid, block=block)


def arguments(
    variant: Variant, names: tuple[str, ...], args: dict[str, Any]
) -> tuple[list[Any], list[tuple[int, str]]]:
    """In the order of the kernel's signature, and of its types, as cuda.core tells them: addresses and int64 from
    Python's integers, int32 and real numbers from NumPy's. Addresses are 0, and it is said which is to be whose."""
    real = np.float64 if variant.kind == "float64" else np.float32
    values: list[Any] = []
    for name in names:
        value = 0 if name in POINTERS else args[name]
        values.append(real(value) if name in REALS else np.int32(value) if name in FLAGS else int(value))
    given = ((i, args[name]) for i, name in enumerate(names) if name in POINTERS)
    return values, [(i, array) for i, array in given if array is not None]


def _failed(device: str, launches: tuple[Launch, ...], started: int, error: Exception) -> str:
    """What is said of a kernel that could not be started, behind others of its call."""
    failed = launches[started].variant
    written = "Nothing was written"
    if started or failed.family == "commit":
        written = "The results, and `out`, are not to be used; running statistics are as they were"
    return (
        f"{device}: the kernel {failed.name} could not be started: {error}{advice(error)}. {written}. If an earlier "
        "kernel failed, the process must be started again"
    )


class CudaMemory(HostMemory):
    """Of cuda.core's pool, in the order of a stream of its own."""

    def __init__(self, device: CudaDevice) -> None:
        self.device, self._device = f"cuda:{device.ordinal}", device
        with device.current() as opened:
            self._stream = opened.create_stream()

    def stream(self) -> int:
        return int(self._stream.handle)

    @allocates
    def empty(self, shape: tuple[int, ...], dtype: DTypeLike, *, zero: bool = False) -> DeviceArray:
        dtype = np.dtype(dtype)
        with self._device.current() as opened:
            buffer = opened.allocate(max(1, dtype.itemsize * int(np.prod(shape, dtype=object))), stream=self._stream)
            if zero:
                buffer.fill(0, stream=self._stream)
        return DeviceArray.of(self, buffer, int(buffer.handle), shape, None, dtype)

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        target = self.empty(array.shape, array.dtype)
        target.owner = target.owner, array  # which may be a copy that nobody else has, and is read later
        with self._device.current():
            driver = self._device._driver
            copied = driver.cuMemcpyHtoDAsync(target.pointer, array.ctypes.data, array.nbytes, self._stream.handle)
            check(copied, self._device.name)
        return target

    def host(self, array: DeviceArray) -> NDArray[Any]:
        target = np.empty(array.shape, array.dtype)
        with self._device.current():
            driver = self._device._driver
            copied = driver.cuMemcpyDtoHAsync(target.ctypes.data, array.pointer, target.nbytes, self._stream.handle)
            check(copied, self._device.name)
            self._stream.sync()
        return target
