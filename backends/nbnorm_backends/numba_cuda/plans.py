"""Which kernels a norm launches, in which order, with which grids, buffers and arguments; needs no GPU.

A plan depends on shapes, not on data: it can be kept, run by the simulator or launched, and captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nbnorm.backend import Epilogue
from nbnorm.errors import BackendError
from nbnorm.layout import Layout
from nbnorm_backends.numba_cuda import functions, planes, totals
from nbnorm_backends.numba_cuda.launch import (
    BLOCK,
    GRID,
    ITEM_SIZES,
    LONG_ROWS,
    VECTOR_BYTES,
    RowClass,
    Variant,
    real_kind,
    row_classes,
)

WARP = functions.WARP
BLOCKS_PER_MULTIPROCESSOR = 4  # of 256 threads: two to four run at the same time, by their registers
ROWS_PER_MULTIPROCESSOR = {"row_forward": 8, "long_row_forward": 8, "row_backward": 2}  # blocks that go from row to row
SHORT_ROWS = 1024  # a warp has longer ones in 8 rounds or more, and a block in fewer
# Fewer rows, of more elements, are split between blocks, in two launches and 3T in place of one and 2T: with a block
# each they would leave half of an H100's 132 multiprocessors idle. One of these, at its share of 25 GB/s, reads 2^16
# float32 in 10 us; for less a second launch does not pay.
FEW_ROWS, SPLIT_LENGTH = 64, 2**16


class Buffer(NamedTuple):
    """Memory that a plan needs beside its inputs: `size` times "element", "real", "int32" or "int64"."""

    type: str
    size: int
    zero: bool = False  # must be 0 before the first launch, and is 0 after each


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel: arguments by name are buffers' and inputs' names, None for pointers to nothing, and numbers."""

    variant: Variant
    grid: int
    block: int
    args: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """Launches in their order, on one stream, and the buffers that they share; results are among these."""

    launches: tuple[Launch, ...]
    buffers: dict[str, Buffer]


@dataclass(frozen=True, slots=True)
class Norm:
    """What is asked for. `layout` is that of x, C-contiguous; weights lie on its axes g and c, for along r there are no
    kernels.

    Attributes
    ----------
    wide : weight and bias are float32, beside x of a half type.
    total : x + residual is normalized and stored, in place of the epilogue's residual; needs r = 1.
    mask : shape of the mask, each axis 1 or full.
    fixed : the statistics are given, with `shared` one for each group in place of each sample and group, and with
        `variance` as variances in `rstd`, to which eps is to be added.
    aligned : every array begins on 16 bytes.
    bare : y alone is asked for; statistics are stored where another kernel reads them.
    """

    kind: str
    layout: Layout
    center: bool = True
    weight: bool = False
    bias: bool = False
    wide: bool = False
    activation: str | None = None
    order: str = "norm_act"
    residual: bool = False
    total: bool = False
    addend: bool = False
    mask: tuple[int, ...] | None = None
    fixed: bool = False
    shared: bool = False
    variance: bool = False
    aligned: bool = True
    bare: bool = False
    eps: float = 1e-5
    capability: int = 90
    multiprocessors: int = 132

    @property
    def weighted(self) -> bool:
        return self.weight or self.bias

    @property
    def real(self) -> str:
        return real_kind(self.kind)

    @property
    def count(self) -> int:
        _, r, _, c, s = self.layout
        return r * c * s

    @property
    def added(self) -> float:
        """eps as kernels add it. Below the smallest normal number a float32 may be 0, and equal values had a reciprocal
        standard deviation that is infinite, and a result that is NaN."""
        return max(self.eps, float(np.finfo(self.real).tiny)) if self.eps > 0 else self.eps

    @property
    def flags(self) -> int:
        chosen = {
            functions.CENTER: self.center,
            functions.WEIGHT: self.weight,
            functions.BIAS: self.bias,
            functions.WIDE: self.wide,
            functions.RESIDUAL: self.residual and not self.total,
            functions.TOTAL: self.total,
            functions.MASK: self.mask is not None,
            functions.ADDEND: self.addend,
            functions.FIXED: self.fixed,
            functions.VARIANCE: self.variance,
        }
        return sum(flag for flag, wanted in chosen.items() if wanted)

    @property
    def activations(self) -> dict[str, int]:
        epilogue = Epilogue(self.activation, self.order)
        return {"before": functions.CODES[epilogue.before], "after": functions.CODES[epilogue.after]}

    def vector(self, *lengths: int) -> bool:
        """Whether 16 bytes at a time do, where runs have these lengths."""
        size = VECTOR_BYTES // ITEM_SIZES[self.kind]
        return self.aligned and all(length % size == 0 for length in lengths)

    def vectors(self, length: int, vector: bool) -> int:
        return length * ITEM_SIZES[self.kind] // VECTOR_BYTES if vector else length

    @property
    def blocks(self) -> int:
        """As many as keep all multiprocessors busy."""
        return self.multiprocessors * BLOCKS_PER_MULTIPROCESSOR

    def mask_strides(self, axes: str) -> dict[str, int]:
        """Of the axes n, r, g, c and s that a kernel takes them for; 0 where the mask is 1 long."""
        found: dict[str, int] = {}
        stride = 1
        for axis, size in zip("scgrn", reversed(self.mask or (1,) * 5), strict=True):
            found[axis] = stride if size > 1 else 0
            stride *= size
        return {f"mask_{axis}": found[axis] for axis in axes}

    def inputs(self, *names: str) -> dict[str, Any]:
        """The pointers of these names, None where the norm has no such array."""
        absent = {
            "weight": not self.weight or self.wide,
            "bias": not self.bias or self.wide,
            "weight_wide": not (self.weight and self.wide),
            "bias_wide": not (self.bias and self.wide),
            "residual": not (self.residual or self.total),
            "total": not self.total,
            "addend": not self.addend,
            "mask": self.mask is None,
            "dz": not self.residual,
            "k1": self.fixed,
            "k2": self.fixed,
            "mean_high": self.fixed and not self.center,
            "mean_low": self.fixed and (self.variance or not self.center),
        }
        return {name: None if absent.get(name) else name for name in names}


WEIGHTS = "weight", "bias", "weight_wide", "bias_wide"
STATISTICS = "mean_high", "mean_low", "rstd"
FOUND = *STATISTICS, "m2"
PARTS = "part_n", "part_high", "part_low", "part_m2"


# ---- what a caller asks for ------------------------------------------------------------------------------------------


def forward(norm: Norm) -> Plan:
    """y from x: with statistics of its own, mean_high, mean_low, rstd and m2, and `valid` under a mask, or with given
    ones."""
    norm = _as_rows(norm)
    if norm.fixed:
        return _plan(norm, [_apply(norm)])
    found = _rows_forward(norm)
    if found is not None:
        return _plan(norm, [found])
    return _plan(norm, [_statistics(norm), _apply(norm, behind=True)])


def statistics(norm: Norm) -> Plan:
    """mean_high, mean_low, rstd, m2 and valid alone."""
    norm = _as_rows(norm)
    return _plan(norm, [_statistics(norm)])


def backward(norm: Norm) -> Plan:
    """dx, dweight and dbias on (g, c), and dz, the gradient of the residual, from the statistics of a forward."""
    norm = replace(_as_rows(norm), total=False)
    _, r, _, _, s = norm.layout
    if (_along(norm) or (r == s == 1 and not norm.weighted)) and norm.mask is None and not norm.fixed:
        launches = _rows_backward(norm)
        if launches:
            return _plan(norm, launches)
    find = not norm.fixed or norm.weighted
    return _plan(norm, [*(_sums(norm) if find else ()), _gradient(norm)])


def sums(norm: Norm) -> Plan:
    """k1, k2, dweight and dbias alone."""
    norm = _as_rows(norm)
    return _plan(norm, _sums(norm))


def gradient(norm: Norm) -> Plan:
    """dx alone, from k1 and k2."""
    norm = _as_rows(norm)
    return _plan(norm, [_gradient(norm)])


def commit(kind: str, samples: int, channels: int, count: int, momentum: float, *, masked: bool = False) -> Plan:
    """Update running_mean and running_var, of the type that is computed in, by mean_high, m2 and valid of a batch."""
    args: dict[str, Any] = {name: name for name in ("mean_high", "m2", "running_mean", "running_var")}
    args |= {"valid": "valid" if masked else None, "samples": samples, "channels": channels, "count": count}
    args |= {"momentum": momentum, "flags": functions.MASK if masked else 0}
    return Plan((Launch(Variant("commit", real_kind(kind), vector=False), 1, BLOCK, args),), {})


# ---- rows ------------------------------------------------------------------------------------------------------------


def _as_rows(norm: Norm) -> Norm:
    """One weight or none for each element of a run: c stands for the run."""
    n, r, g, c, s = norm.layout
    if c > 1 or s == 1 or (norm.weighted and g > 1) or (norm.weighted and s > 1):
        return norm
    mask = norm.mask and (*norm.mask[:3], norm.mask[4], 1)
    return replace(norm, layout=Layout(n, r, g, s, 1), mask=mask)


def _rows_forward(norm: Norm) -> Launch | None:
    """One launch, where rows are contiguous and many."""
    n, r, g, c, s = norm.layout
    rows, length = n * g, c * s
    if r > 1 or (rows < FEW_ROWS and length > SPLIT_LENGTH and not norm.total):
        assert not norm.total, "x + residual is normalized in rows alone"
        return None
    per_plane = norm.weighted and (g > 1 or s > 1)
    vector = norm.vector(length, s) if per_plane else norm.vector(length)
    family, chosen = "row_forward", _row_class(norm, "row_forward", length, vector=True)
    if chosen is None or not vector or norm.mask is not None or norm.activations["before"]:
        family, chosen = "long_row_forward", LONG_ROWS[length > SHORT_ROWS]
    variant = Variant(family, norm.kind, vector, chosen)
    args = norm.inputs("x", "residual", *WEIGHTS, "total", "y")
    args |= dict.fromkeys(FOUND) if norm.bare else {name: name for name in FOUND}
    args |= {"rows": rows, "length": length, "groups": g, "channels": c, "inner": s, "eps": norm.added}
    flags = (functions.PLANES if per_plane else 0) | (functions.BARE if norm.bare else 0)
    args |= {"flags": norm.flags | flags, "after": norm.activations["after"]}
    if family == "long_row_forward":
        args |= {
            "valid": None if norm.bare else "valid",
            "before": norm.activations["before"],
            **norm.mask_strides("ngcs"),
        }
        args |= norm.inputs("mask")
    return _row_launch(norm, variant, chosen, rows, args)


def _rows_backward(norm: Norm) -> list[Launch]:
    """Nothing where a row is too long for registers."""
    n, _, g, length, _ = norm.layout
    rows = n * g
    vector = norm.vector(length)
    chosen = _row_class(norm, "row_backward", length, vector)
    if chosen is None:
        return []
    variant = Variant("row_backward", norm.kind, vector, chosen)
    args = norm.inputs("x", "dy", "residual", "addend", *WEIGHTS, *STATISTICS, "dx", "dz", "part_weight", "part_bias")
    args |= {"rows": rows, "length": length, "flags": norm.flags, **norm.activations}
    launch = _row_launch(norm, variant, chosen, rows, args)
    if not norm.weighted:
        return [launch]
    args = {name: name for name in ("part_weight", "part_bias", "dweight", "dbias")}
    args |= {"parts": launch.grid, "length": length}
    sums = Variant("sum_columns", real_kind(norm.kind), vector=False)
    return [launch, Launch(sums, _ceil(length, WARP), WARP * totals.LINES, args)]


def _row_class(norm: Norm, family: str, length: int, vector: bool) -> RowClass | None:
    """The smallest that holds a row; None where none does."""
    classes = row_classes(family, norm.kind, vector)
    return next((each for each in classes if each and length <= each.longest and each.since <= norm.capability), None)


def _row_launch(norm: Norm, variant: Variant, chosen: RowClass, rows: int, args: dict[str, Any]) -> Launch:
    most = ROWS_PER_MULTIPROCESSOR[variant.family] * norm.multiprocessors
    return Launch(variant, min(most, _ceil(rows, chosen.block // chosen.threads)), chosen.block, args)


# ---- columns and planes ----------------------------------------------------------------------------------------------


def _in_columns(norm: Norm) -> bool:
    """Whether neighbours are of different statistics, or weights."""
    _, _, g, c, s = norm.layout
    return s == 1 and (norm.layout.r > 1 or g > 1 or c > 1)


def _statistics(norm: Norm) -> Launch:
    n, r, g, c, s = norm.layout
    args = norm.inputs("x", "mask", *FOUND, "valid", *PARTS, "counters")
    args |= {"groups": g, "eps": norm.added, "flags": norm.flags, "before": norm.activations["before"]}
    if s == 1 and r > 1:
        variant = Variant("columns_statistics", norm.kind, norm.vector(g * c))
        tiling = _tiling(norm, variant)
        args |= {"rows": r, "channels": c, **tiling.args, **norm.mask_strides("nrgc")}
        return Launch(variant, tiling.grid, tiling.block, args)
    length = c * s
    vector = norm.vector(length)
    items = r * norm.vectors(length, vector)
    block = min(planes.BLOCK, WARP * _ceil(items, WARP))
    splits = _split(norm.blocks, n * g, items, block * planes.UNROLL)
    args |= {"runs": r, "length": length, "inner": s, "splits": splits, **norm.mask_strides("nrgcs")}
    return Launch(Variant("planes_statistics", norm.kind, vector), n * g * splits, block, args)


def _apply(norm: Norm, *, behind: bool = False) -> Launch:
    """`behind` the statistics, in reverse."""
    args = norm.inputs("x", "residual", *WEIGHTS, "mask", "y", *STATISTICS)
    if norm.total:
        args |= {"x": "total", "residual": None}
    return _elementwise(norm, "apply", args, functions.REVERSE if behind else 0)


def _along(norm: Norm) -> bool:
    """Whether the weights differ along a row that shares one statistic, and rows are all there is: sums along a row and
    sums along a column are then of different kernels."""
    _, r, g, _, s = norm.layout
    return r == g == s == 1 and not norm.fixed


def _as_columns(norm: Norm) -> Norm:
    """The rows as those of columns."""
    n, _, _, c, _ = norm.layout
    return replace(norm, layout=Layout(1, n, 1, c, 1))


def _gradient(norm: Norm) -> Launch:
    pointers = "x", "dy", "residual", "addend", *WEIGHTS, "mask", *STATISTICS, "k1", "k2", "dx", "dz"
    args = norm.inputs(*pointers)
    if _along(norm):
        return _columns(_as_columns(norm), "backward", args, functions.ALONG)
    return _elementwise(norm, "backward", args, functions.REVERSE)


def _elementwise(norm: Norm, name: str, args: dict[str, Any], flags: int) -> Launch:
    if _in_columns(norm):
        return _columns(norm, name, args, flags)
    n, r, g, c, s = norm.layout
    vector = norm.vector(s)
    items = norm.vectors(s, vector)
    width = min(BLOCK, _power(_ceil(items, 4)))
    units = n * r * g * c
    blocks = _ceil(units, BLOCK // width)
    splits = _split(norm.blocks, blocks, items, width * 4)
    args |= _common(norm, flags) | {"units": units, "runs": r, "inner": s, "splits": splits, "width": width}
    args |= norm.mask_strides("nrgcs")
    return Launch(Variant(f"planes_{name}", norm.kind, vector), blocks * splits, BLOCK, args)


def _columns(norm: Norm, name: str, args: dict[str, Any], flags: int) -> Launch:
    variant = Variant(f"columns_{name}", norm.kind, norm.vector(norm.layout.g * norm.layout.c))
    tiling = _tiling(norm, variant)
    args |= _common(norm, flags) | {"rows": norm.layout.r, **tiling.args, **norm.mask_strides("nrgc")}
    if flags & functions.ALONG:  # the rows are samples
        args["mask_r"] = args["mask_n"]
    return Launch(variant, tiling.grid, tiling.block, args)


def _common(norm: Norm, flags: int) -> dict[str, Any]:
    g, c = norm.layout.g, norm.layout.c
    found = {"groups": g, "channels": c, "stride_n": 0 if norm.shared else g, "eps": norm.added}
    return {**found, "flags": norm.flags | flags, **norm.activations}


class Tiling(NamedTuple):
    """How (rows, columns) are cut."""

    width: int
    tiles: int
    slabs: int
    grid: int
    block: int

    @property
    def args(self) -> dict[str, int]:
        return {"slabs": self.slabs, "tiles": self.tiles, "width": self.width}


def _tiling(norm: Norm, variant: Variant) -> Tiling:
    n, r, g, c, _ = norm.layout
    vectors = norm.vectors(g * c, variant.vector)
    width = min(WARP, _power(vectors))
    tiles = _ceil(vectors, width)
    lines = min(variant.bounds[0] // width, _power(r))
    slabs = _split(norm.blocks, n * tiles, r, lines * 4)
    return Tiling(width, tiles, slabs, n * slabs * tiles, max(WARP, lines * width))


def _sums(norm: Norm) -> list[Launch]:
    n, _, g, c, _ = norm.layout
    if not _along(norm):
        launch = _columns_sums(norm) if _in_columns(norm) else _planes_sums(norm)
        splits = launch.args["slabs"] if _in_columns(norm) else launch.args["splits"]
        keys: dict[str, Any] = {"statistics": not norm.fixed, "weights": norm.weighted}
        return [launch, _finish(norm, splits, samples=n, columns=c, groups=g, **keys)]
    row_sums = _planes_sums(norm, functions.ALONG)
    multiplied = replace(norm, weight=False)
    launches = [row_sums, _finish(multiplied, row_sums.args["splits"], samples=n, columns=1, weights=False)]
    if norm.weighted:
        column_sums = _columns_sums(_as_columns(norm), functions.ALONG)
        launches += [column_sums, _finish(norm, column_sums.args["slabs"], samples=1, columns=c, statistics=False)]
    return launches


def _columns_sums(norm: Norm, flags: int = 0) -> Launch:
    pointers = "x", "dy", "residual", *WEIGHTS, "mask", *STATISTICS, "part_weight", "part_bias"
    return _columns(norm, "sums", norm.inputs(*pointers), flags)


def _planes_sums(norm: Norm, flags: int = 0) -> Launch:
    n, r, g, c, s = norm.layout
    if flags & functions.ALONG:
        c, s = 1, c
    vector = norm.vector(s)
    items = r * norm.vectors(s, vector)
    splits = _split(norm.blocks, n * g * c, items, BLOCK * 4)
    args = norm.inputs("x", "dy", "residual", *WEIGHTS, "mask", *STATISTICS, "part_weight", "part_bias")
    args |= _common(norm, flags) | {"runs": r, "channels": c, "inner": s, "splits": splits}
    args |= norm.mask_strides("nrgcs")
    return Launch(Variant("planes_sums", norm.kind, vector), n * g * c * splits, BLOCK, args)


def _finish(
    norm: Norm,
    splits: int,
    *,
    samples: int,
    columns: int,
    groups: int = 1,
    statistics: bool = True,
    weights: bool = True,
) -> Launch:
    """k1 and k2, and dweight and dbias where they are wanted, from sums for `columns` columns of each group."""
    first = 0 if statistics else samples * groups
    last = samples * groups + (groups * columns if weights else 0)
    args: dict[str, Any] = norm.inputs("part_weight", "part_bias", "weight", "weight_wide")
    args["valid"] = "valid" if statistics and norm.mask is not None else None  # given statistics have counted nothing
    args |= {name: name if statistics else None for name in ("k1", "k2")}
    args |= {name: name if weights else None for name in ("dweight", "dbias")}
    args |= {"samples": samples, "groups": groups, "channels": columns, "splits": splits, "count": norm.count}
    args |= {"first": first, "last": last, "flags": norm.flags}
    variant = Variant("finish_gradient", norm.kind, vector=False)
    return Launch(variant, _ceil(last - first, 4), 4 * WARP, args)


# ---- buffers ---------------------------------------------------------------------------------------------------------


def _plan(norm: Norm, launches: Iterable[Launch]) -> Plan:
    """With the buffers that the launches name; workspaces of one name are as large as the largest."""
    launches = tuple(launches)
    n, _, g, c, _ = norm.layout
    size = math.prod(norm.layout)
    sizes = {name: Buffer("element", size) for name in ("y", "total", "dx", "dz")}
    sizes |= {name: Buffer("real", n * g) for name in ("k1", "k2")}
    sizes |= {name: Buffer("real", g * c) for name in ("dweight", "dbias")}
    finds = any("m2" in launch.args for launch in launches)
    if finds:
        sizes |= {name: Buffer("real", n * g) for name in FOUND} | {"valid": Buffer("int64", n * g)}
    found: dict[str, Buffer] = {}
    for launch in launches:
        if launch.grid > GRID:
            shape = " x ".join(map(str, norm.layout))
            raise BackendError(
                f"x, seen as {shape}, takes {launch.grid} blocks of the kernel {launch.variant.name}, and CUDA starts "
                f"{GRID} at most: pass fewer samples at a time"
            )
        part = _part_size(launch)
        sizes |= {name: Buffer("real", part) for name in (*PARTS[1:], "part_weight", "part_bias")}
        sizes |= {"part_n": Buffer("int32", part), "counters": Buffer("int32", launch.grid, zero=True)}
        for name in launch.args.values():
            if isinstance(name, str) and name in sizes:
                earlier = found.get(name)
                found[name] = sizes[name] if earlier is None else max(earlier, sizes[name], key=lambda each: each.size)
    return Plan(launches, found)


def _part_size(launch: Launch) -> int:
    """Partial results that a launch writes."""
    args, family = launch.args, launch.variant.family
    if family == "row_backward":
        return int(2 * launch.grid * args["length"])
    if family in ("columns_statistics", "columns_sums"):
        return int(launch.grid // args["tiles"] * args["groups"] * args["channels"])
    return launch.grid if family in ("planes_statistics", "planes_sums") else 0


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def _split(blocks: int, units: int, items: int, least: int) -> int:
    """Into how many parts each of `units` is cut, so that there are enough blocks with `least` items or more."""
    return max(1, min(blocks // units, _ceil(items, least)))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power(number: int) -> int:
    """The next power of two."""
    power = 1
    while power < number:
        power *= 2
    return power
