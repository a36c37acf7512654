"""Compiled variants: a table of the process, behind it the folder on disk, behind that the compiler."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import threading
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from nbnorm import backend
from nbnorm.dispatch import hold_over_fork
from nbnorm_backends import store
from nbnorm_backends.numba_cuda.launch import CAPABILITIES, Variant

COMPILER = "nbnorm_backends.numba_cuda.compiler"  # imports Numba, which takes 0.5 s: not needed for what is on disk
PACKAGES = "numba", "numba-cuda", "llvmlite", "numpy", "nvidia-nvvm", "nvidia-nvjitlink"

log = logging.getLogger("nbnorm")
_kernels: dict[tuple[Variant, tuple[int, int]], Kernel] = {}
_lock = threading.Lock()
hold_over_fork(_lock)


class Kernel(NamedTuple):
    """Machine code of a variant, the name of its entry, and those of its arguments in their order."""

    cubin: bytes
    entry: str
    names: tuple[str, ...]


def kernel_of(variant: Variant, capability: tuple[int, int]) -> Kernel:
    """The variant for a compute capability; about 1 s to compile, 1 ms from disk."""
    key = variant, target(capability)
    found = _kernels.get(key)
    if found is None:
        with _lock:
            found = _kernels.get(key)
            if found is None:
                found = _kernels[key] = _read(*key) or _compiled(*key)
    return found


def target(capability: tuple[int, int]) -> tuple[int, int]:
    """What is compiled for: the highest of `CAPABILITIES` that the device runs, which is one of its major number. Its
    own where there is none; the budgets of registers were not checked for that one."""
    return max((each for each in CAPABILITIES if each[0] == capability[0] and each <= capability), default=capability)


def _read(variant: Variant, capability: tuple[int, int]) -> Kernel | None:
    content = store.read(_key(variant, capability))
    if content is None:
        return None
    head, _, cubin = content.partition(b"\n")
    entry, *names = json.loads(head)
    return Kernel(cubin, entry, tuple(names))


def _compiled(variant: Variant, capability: tuple[int, int]) -> Kernel:
    log.debug("compiling %s for %s", variant.name, capability)
    made = import_module(COMPILER).compile_variant(variant, capability)
    store.write(_key(variant, capability), json.dumps([made.entry, *made.names]).encode() + b"\n" + made.cubin)
    return Kernel(made.cubin, made.entry, made.names)


def _key(variant: Variant, capability: tuple[int, int]) -> bytes:
    return hashlib.sha256(repr(("cuda", variant, capability, _versions(), _sources())).encode()).digest()


@functools.cache
def _versions() -> tuple[str, ...]:
    """From the metadata, so that nothing is imported."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return ""

    return tuple(map(of, PACKAGES))


@functools.cache
def _sources() -> str:
    """A digest of this package's sources, and of the contract, whose constants are compiled in."""
    return store.digest_of((*sorted(Path(__file__).parent.glob("*.py")), Path(backend.__file__)))
