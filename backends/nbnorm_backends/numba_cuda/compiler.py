"""From a variant to machine code, without a GPU and without a driver: Numba makes PTX, nvJitLink a cubin of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numba_cuda  # noqa: F401  # without it `numba.cuda` is Numba's own, which is another one
from cuda.bindings import nvjitlink
from numba import cuda
from numba.cuda import compiler as numba_compiler
from numba.cuda import types

from nbnorm_backends.numba_cuda.launch import FLAGS, POINTERS, REALS, Variant
from nbnorm_backends.numba_cuda.primitives import ELEMENTS, primitives, real_type

cached_primitives = lru_cache(primitives)


def signature(kernel: Callable[..., None], kind: str) -> Any:
    """Numba's types of a kernel's arguments, from their names."""
    named = {"element": ELEMENTS[kind], "real": real_type(kind)}
    named |= {name: getattr(types, name) for name in ("uint8", "int32", "int64")}

    def of(name: str) -> Any:
        if name in POINTERS:
            return types.CPointer(named[POINTERS[name]])
        return named["real"] if name in REALS else types.int32 if name in FLAGS else types.int64

    return types.void(*map(of, inspect.signature(kernel).parameters))


class Compiled(NamedTuple):
    """A kernel's machine code, the name of its entry, what the assembler told of it, and the names of its arguments."""

    cubin: bytes
    entry: str
    log: str
    names: tuple[str, ...]


def compile_variant(variant: Variant, capability: tuple[int, int]) -> Compiled:
    """Machine code for a compute capability such as (9, 0); needs no GPU and no driver."""
    kernel = variant.make(cuda, cached_primitives(variant.kind))
    types_of, bounds = signature(kernel, variant.kind), variant.bounds
    ptx, _ = cuda.compile_ptx(kernel, types_of, cc=capability, launch_bounds=bounds)
    return _linked(kernel, ptx, capability)


def compile_for_each(variant: Variant, capabilities: Sequence[tuple[int, int]]) -> list[Compiled]:
    """The same code for several capabilities in little more than the time of one: nine tenths of it are Numba's, which
    asks for none of them, and one NVVM's. Numba has no public function for that."""
    kernel = variant.make(cuda, cached_primitives(variant.kind))
    keys: dict[str, Any] = {"device": False, "abi": "numba", "cc": capabilities[0], "launch_bounds": variant.bounds}
    with numba_compiler.global_compiler_lock:
        library, _ = numba_compiler._compile_pyfunc_with_fixup(kernel, signature(kernel, variant.kind), **keys)
        found = [(capability, *library.get_asm_strs(cc=capability)) for capability in capabilities]
    return [_linked(kernel, ptx, capability) for capability, ptx in found]


def _linked(kernel: Callable[..., None], ptx: str, capability: tuple[int, int]) -> Compiled:
    entry = re.search(r"\.visible \.entry (\S+)\(", ptx)
    assert entry is not None, ptx[:2000]
    cubin, log = assemble(ptx.encode(), "sm_{}{}".format(*capability))
    return Compiled(cubin, entry[1], log, tuple(inspect.signature(kernel).parameters))


def assemble(ptx: bytes, architecture: str) -> tuple[bytes, str]:
    """(cubin, log of the assembler)"""
    options = [f"-arch={architecture}", "-verbose", "-Xptxas=-v"]
    handle = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, ptx, len(ptx), "kernel.ptx")
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    except nvjitlink.nvJitLinkError as error:
        log = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, log)
        raise RuntimeError(f"{error}: {log.decode(errors='replace')}") from error
    finally:
        nvjitlink.destroy(handle)
    return bytes(cubin), log.decode(errors="replace").strip("\0")
