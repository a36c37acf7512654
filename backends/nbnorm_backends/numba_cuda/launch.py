"""What can be launched: a finite list of kernels, the sizes that choose among them, and how they are compiled.

Row lengths, eps and the rest are run-time arguments. A variant is a family, an element type, and 16-byte or scalar
access; those of rows also have a size class.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from nbnorm_backends.numba_cuda import columns, planes, rows, totals

KINDS = ("float32", "float16", "bfloat16", "float64")


class RowClass(NamedTuple):
    """`threads` threads hold a row, up to `elements` each, in blocks of `block` threads."""

    threads: int
    elements: int
    block: int

    @property
    def longest(self) -> int:
        return self.threads * self.elements


# Rows in registers. 32 elements a thread keep 8 loads of 16 bytes under way, which is what hides the latency of memory;
# gradients keep five arrays of a row's elements where results keep three. float64 takes two registers an element. 512
# threads have 128 registers each; 1024 have 64, and the kernels spilled.
ROWS = {
    "row_forward": (RowClass(8, 16, 128), RowClass(32, 32, 128), RowClass(128, 32, 128), RowClass(512, 32, 512)),
    "row_backward": (RowClass(8, 16, 128), RowClass(32, 16, 128), RowClass(128, 16, 128), RowClass(512, 16, 512)),
}
ROWS_OF_DOUBLES = {
    "row_forward": (RowClass(8, 8, 128), RowClass(32, 16, 128), RowClass(128, 16, 128), RowClass(512, 16, 512)),
    "row_backward": (RowClass(8, 8, 128), RowClass(32, 8, 128), RowClass(128, 8, 128), RowClass(256, 8, 256)),
}
# Rows of any length, which are read twice: a warp has some dozen loads for 1024 elements, a block fewer.
LONG_ROWS = RowClass(32, 0, 128), RowClass(512, 0, 512)
BLOCK = 256  # threads of a block of all other kernels, at most


@dataclass(frozen=True)
class Variant:
    """One kernel, compiled once."""

    family: str
    kind: str
    vector: bool = True
    rows: RowClass | None = None

    @property
    def name(self) -> str:
        parts = [self.family, self.kind, "vector" if self.vector else "scalar"]
        return "_".join(parts if self.rows is None else [*parts, f"{self.rows.threads}x{self.rows.elements}"])

    @property
    def block(self) -> int:
        """Threads of a block, at most."""
        return BLOCK if self.rows is None else self.rows.block

    def make(self, cuda: Any, P: Any) -> Callable[..., None]:
        """The kernel for this cuda module and these primitives."""
        keys = {} if self.rows is None else self.rows._asdict()
        return FACTORIES[self.family](cuda, P, self.vector, **keys)  # type: ignore[no-any-return]


FACTORIES: dict[str, Callable[..., Any]] = {
    "row_forward": rows.make_row_forward,
    "long_row_forward": rows.make_long_row_forward,
    "row_backward": rows.make_row_backward,
    "planes_statistics": planes.make_planes_statistics,
    "planes_apply": planes.make_planes_apply,
    "planes_sums": planes.make_planes_sums,
    "planes_backward": planes.make_planes_backward,
    "columns_statistics": columns.make_columns_statistics,
    "columns_apply": columns.make_columns_apply,
    "columns_sums": columns.make_columns_sums,
    "columns_backward": columns.make_columns_backward,
    "finish_gradient": totals.make_finish_gradient,
    "sum_columns": totals.make_sum_columns,
    "commit": totals.make_commit,
}


NO_CLASSES = (None,)
SCALAR_ONLY = ("finish_gradient", "sum_columns", "commit")
REAL_ONLY = ("sum_columns", "commit")  # they read no elements


def row_classes(family: str, kind: str) -> tuple[RowClass | None, ...]:
    """The size classes of a family, ascending; None stands for a family without."""
    if family == "long_row_forward":
        return LONG_ROWS
    return (ROWS_OF_DOUBLES if kind == "float64" else ROWS).get(family, NO_CLASSES)


def has(family: str, kind: str, vector: bool) -> bool:
    """Whether a family is compiled for this element type and access. Rows with scalar access are long rows: 32 scalar
    loads and their conditions took 234 registers."""
    if vector and family in SCALAR_ONLY or not vector and family == "row_forward":
        return False
    return kind in ("float32", "float64") or family not in REAL_ONLY


@lru_cache(maxsize=1)
def variants() -> tuple[Variant, ...]:
    """All that is ever launched."""
    return tuple(
        Variant(family, kind, vector, rows)
        for family in FACTORIES
        for kind in KINDS
        for vector in (True, False)
        if has(family, kind, vector)
        for rows in row_classes(family, kind)
    )


# ---- compilation -----------------------------------------------------------------------------------------------------

# Arguments by name: what a pointer points to, "element" being x's type and "real" the one that is computed in.
POINTERS = {
    **dict.fromkeys(("x", "residual", "addend", "weight", "bias", "total", "y", "dy", "dx", "dz"), "element"),
    **dict.fromkeys(("weight_wide", "bias_wide", "mean_high", "mean_low", "rstd", "m2"), "real"),
    **dict.fromkeys(("part_weight", "part_bias", "part_high", "part_low", "part_m2"), "real"),
    **dict.fromkeys(("k1", "k2", "dweight", "dbias", "running_mean", "running_var"), "real"),
    **dict.fromkeys(("valid", "part_n", "counters"), "int32"),
    "mask": "uint8",
}
REALS = ("eps", "momentum")
FLAGS = ("flags", "before", "after")  # int32; all other numbers are int64


def signature(kernel: Callable[..., None], kind: str) -> Any:
    """Numba's types of a kernel's arguments, from their names."""
    from numba.cuda import types

    from nbnorm_backends.numba_cuda.primitives import ELEMENTS, real_type

    named = {"element": ELEMENTS[kind], "real": real_type(kind), "int32": types.int32, "uint8": types.uint8}

    def of(name: str) -> Any:
        if name in POINTERS:
            return types.CPointer(named[POINTERS[name]])
        return named["real"] if name in REALS else types.int32 if name in FLAGS else types.int64

    return types.void(*map(of, inspect.signature(kernel).parameters))


class Compiled(NamedTuple):
    """A kernel's machine code, the name of its entry, and what the assembler told of it."""

    cubin: bytes
    entry: str
    log: str


def compile_variant(variant: Variant, capability: tuple[int, int]) -> Compiled:
    """Machine code for a compute capability such as (9, 0); needs no GPU and no driver."""
    from numba import cuda

    from nbnorm_backends.numba_cuda.primitives import primitives

    kernel = variant.make(cuda, lru_cache(primitives)(variant.kind))
    ptx, _ = cuda.compile_ptx(
        kernel, signature(kernel, variant.kind), cc=capability, launch_bounds=variant.block
    )
    entry = re.search(r"\.visible \.entry (\S+)\(", ptx)
    assert entry is not None, ptx[:2000]
    cubin, log = assemble(ptx.encode(), "sm_{}{}".format(*capability))
    return Compiled(cubin, entry[1], log)


def assemble(ptx: bytes, architecture: str) -> tuple[bytes, str]:
    """(cubin, log of the assembler)"""
    from cuda.bindings import nvjitlink

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
