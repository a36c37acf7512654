"""What can be launched: a finite list of kernels, the sizes that choose among them, and what each may take.

Row lengths, eps and the rest are run-time arguments. A variant is a family, an element type, and 16-byte or scalar
access; those of rows also have a size class.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
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
    since: int = 80  # the compute capability, times ten, from which on it is launched

    @property
    def longest(self) -> int:
        return self.threads * self.elements


# Rows in registers, with the weights. The assembler for sm_80 takes more registers of the same PTX, and spilled where
# sm_90 has enough: of 32 elements a thread, of gradients where 512 threads share a multiprocessor's registers, and of
# float64, which takes two registers an element, there too. 1024 threads have 64 registers each, and spilled on sm_90.
ROWS = {
    "row_forward": (
        RowClass(8, 16, 128),
        RowClass(32, 16, 128),
        RowClass(128, 16, 128),
        RowClass(512, 16, 512),
        RowClass(512, 32, 512, since=90),
    ),
    "row_backward": (
        RowClass(8, 16, 128),
        RowClass(32, 16, 128),
        RowClass(128, 16, 128),
        RowClass(256, 16, 256),
        RowClass(512, 16, 512, since=90),
    ),
}
ROWS_OF_DOUBLES = {
    "row_forward": (
        RowClass(8, 8, 128),
        RowClass(32, 8, 128),
        RowClass(128, 8, 128),
        RowClass(512, 8, 512, since=90),
    ),
    "row_backward": (RowClass(8, 8, 128), RowClass(32, 8, 128), RowClass(128, 8, 128), RowClass(256, 8, 256)),
}
# Gradients by scalar access: of 16 elements the loops were not unrolled, and arrays went to local memory.
SCALAR_ROWS = ROWS_OF_DOUBLES["row_backward"]
SCALAR_ROWS_OF_DOUBLES = tuple(each._replace(since=90) for each in SCALAR_ROWS)  # which spilled 180 bytes on sm_80
# Rows of any length, which are read twice: the second time from the second-level cache, as long as all rows under way
# fit it. With 68 to 78 registers a multiprocessor holds one block of 512 threads; on an H100, 132 rows of 32768 float32
# are 17 of its 50 MB, and as much again of y. One load of 16 bytes in each of 512 threads may be too little to cover
# the memory's latency. Two blocks would have twice as many, but sm_80 spills 8 to 48 bytes in 64 registers, sm_90 none,
# and of 65536 float32 the rows under way would no longer fit. Which counts more is for a GPU to tell.
LONG_ROWS = RowClass(32, 0, 128), RowClass(512, 0, 512)
GRID = 2**31 - 1  # blocks, the most that CUDA starts
BLOCK = 256  # threads of a block of all other kernels, at most; two of them on a multiprocessor
COLUMN_SUMS = columns.SUMS_BLOCK, 3


def real_kind(kind: str) -> str:
    """The element type that has the type in which this one is computed."""
    return "float64" if kind == "float64" else "float32"


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
    def real(self) -> str:
        return real_kind(self.kind)

    @property
    def bounds(self) -> tuple[int, int]:
        """Threads of a block at most, and blocks that a multiprocessor must hold, which share its 65536 registers."""
        if self.rows is None:
            return COLUMN_SUMS if self.family == "columns_sums" else (BLOCK, 2)
        three = self.family == "row_forward" and self.rows.block == 128 and self.kind != "float64"
        return self.rows.block, 3 if three else 1

    def make(self, cuda: Any, P: Any) -> Callable[..., None]:
        """The kernel for this cuda module and these primitives."""
        sizes = () if self.rows is None else self.rows[:3]
        return FACTORIES[self.family](cuda, P, self.vector, *sizes)  # type: ignore[no-any-return]


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


def row_classes(family: str, kind: str, vector: bool) -> tuple[RowClass | None, ...]:
    """The size classes of a family, ascending; None stands for a family without."""
    if family == "long_row_forward":
        return LONG_ROWS
    if family == "row_backward" and not vector:
        return SCALAR_ROWS_OF_DOUBLES if kind == "float64" else SCALAR_ROWS
    return (ROWS_OF_DOUBLES if kind == "float64" else ROWS).get(family, NO_CLASSES)


def has(family: str, kind: str, vector: bool) -> bool:
    """Whether a family is compiled for this element type and access. Rows with scalar access are long rows: 32 scalar
    loads and their conditions took 234 registers."""
    if (vector and family in SCALAR_ONLY) or (not vector and family == "row_forward"):
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
        for rows in row_classes(family, kind, vector)
    )


def variants_of(kinds: Collection[str], capability: int) -> list[Variant]:
    """Those that arrays of these element types need on a device."""
    real = {real_kind(kind) for kind in kinds}
    return [
        each
        for each in variants()
        if each.kind in (real if each.family in REAL_ONLY else kinds)
        and (each.rows is None or each.rows.since <= capability)
    ]


# ---- budgets ---------------------------------------------------------------------------------------------------------

CAPABILITIES = (8, 0), (9, 0)  # what is compiled for: A100 and H100; later ones of one major number run the same code


class Budget(NamedTuple):
    """What a compiled variant may take, and must have: registers at most; 128-bit loads and stores, and shuffles, at
    least. Rows in registers have the loads and stores for each vector of a thread. Spills, stack and local memory are
    never allowed, float64 instructions only where elements are float64."""

    registers: int = 255
    loads: int = 0
    stores: int = 0
    shuffles: int = 0
    float64: bool = False


BUDGETS = {
    "row_forward": Budget(loads=3, stores=1, shuffles=9),
    "long_row_forward": Budget(loads=4, stores=2, shuffles=30),
    "row_backward": Budget(loads=3, stores=1, shuffles=6),
    "planes_statistics": Budget(loads=5, shuffles=30),
    "planes_apply": Budget(loads=2, stores=1),
    "planes_sums": Budget(loads=3, shuffles=10),
    "planes_backward": Budget(loads=4, stores=2),
    "columns_statistics": Budget(loads=5, shuffles=30),
    "columns_apply": Budget(loads=2, stores=1),
    "columns_sums": Budget(loads=3),
    "columns_backward": Budget(loads=4, stores=2),
    "finish_gradient": Budget(shuffles=10),
    "sum_columns": Budget(),
    "commit": Budget(),
}
# Of float32, half types and float64 with 16-byte access, and of the same with scalar access: what the worst of them
# takes and a tenth, in steps of 8, as registers are given out; no more than the bounds of a launch leave, beyond which
# kernels spill. The bounds alone are no budget: most kernels could double below them. Where a kernel comes near its
# bound (128 of columns and planes, 255) the budget is the bound, and what is too much is seen as a spill.
REGISTERS = {
    "row_forward": (120, 128, 128, 0, 0, 0),
    "long_row_forward": (80, 88, 120, 80, 80, 104),
    "row_backward": (176, 176, 168, 144, 144, 192),
    "planes_statistics": (112, 128, 104, 80, 80, 96),
    "planes_apply": (64, 72, 64, 48, 56, 56),
    "planes_sums": (88, 120, 104, 72, 80, 96),
    "planes_backward": (64, 72, 80, 56, 56, 72),
    "columns_statistics": (120, 128, 128, 104, 104, 128),
    "columns_apply": (88, 120, 88, 72, 64, 72),
    "columns_sums": (128, 160, 128, 96, 104, 96),
    "columns_backward": (120, 128, 104, 80, 80, 80),
    "finish_gradient": (0, 0, 0, 64, 64, 64),
    "sum_columns": (0, 0, 0, 32, 32, 48),
    "commit": (0, 0, 0, 56, 56, 72),
}
REGISTERS_OF_80 = {  # where the assembler for sm_80 takes more
    "row_forward": (176, 184, 200, 0, 0, 0),
    "row_backward": (255, 255, 255, 248, 248, 0),
}
VECTOR_BYTES = 16
ITEM_SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


def budget_of(variant: Variant, capability: tuple[int, int]) -> Budget:
    budget, family = BUDGETS[variant.family], variant.family
    registers = REGISTERS_OF_80.get(family, REGISTERS[family]) if capability < (9, 0) else REGISTERS[family]
    kind = {"float32": 0, "float64": 2}.get(variant.kind, 1)
    budget = budget._replace(registers=registers[kind + 3 * (not variant.vector)], float64=variant.kind == "float64")
    if not variant.vector:
        return budget._replace(loads=0, stores=0)
    if variant.rows is not None and variant.rows.elements:
        vectors = variant.rows.elements * ITEM_SIZES[variant.kind] // VECTOR_BYTES
        return budget._replace(loads=budget.loads * vectors, stores=budget.stores * vectors)
    return budget


# ---- arguments -------------------------------------------------------------------------------------------------------

# By name: what a pointer points to, "element" being x's type and "real" the one that is computed in.
POINTERS = {
    **dict.fromkeys(("x", "residual", "addend", "weight", "bias", "total", "y", "dy", "dx", "dz"), "element"),
    **dict.fromkeys(("weight_wide", "bias_wide", "mean_high", "mean_low", "rstd", "m2"), "real"),
    **dict.fromkeys(("part_weight", "part_bias", "part_high", "part_low", "part_m2"), "real"),
    **dict.fromkeys(("k1", "k2", "dweight", "dbias", "running_mean", "running_var"), "real"),
    **dict.fromkeys(("part_n", "counters"), "int32"),
    "valid": "int64",
    "mask": "uint8",
}
REALS = ("eps", "momentum")
FLAGS = ("flags", "before", "after")  # int32; all other numbers are int64
