"""The norms for compiled callers: what `runs` and `columns` do from Python with a scheduler, in one thread and in the
same order of sums, so to the same bits. Of what calls kernels, this alone is compiled.

Each KERNEL is kept on disk with all kernels that it calls, so a program that embeds it does not compile them again.
Every result is an array that is given; what may be None is an array in front of the kernels, which are compiled once
for all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from nbnorm_backends.numba_cpu import cuts, kernels, merging
from nbnorm_backends.numba_cpu.activations import IDENTITY
from nbnorm_backends.numba_cpu.checks import check_backward, check_forward
from nbnorm_backends.numba_cpu.elements import chosen, optional
from nbnorm_backends.numba_cpu.kernels import (
    ALLOCATES,
    COUNT,
    KERNEL,
    M2,
    MEAN,
    NEAR_PIVOT,
    NEAR_ZERO,
    PLAIN,
    RSTD,
    STATISTICS,
)

# Inlined before types are inferred: for each function on the way to kernels LLVM goes once more through all of them.
# What it is given as True or False has a type of its own then, for which kernels would be compiled anew: hence bool().
INLINE = njit(inline="always", error_model="numpy")


@intrinsic
def identity(typing_context: Any) -> Any:
    """The tag of the identity, which Numba does not take from a module."""
    return IDENTITY._numba_type_(), lambda context, builder, signature, args: context.get_dummy_value()


# ---- axes ------------------------------------------------------------------------------------------------------------
# x (n, r, g, c, s) and its parameters (1, g, c), or (1, g, 1, s) along a run, as kernels take them.


@PLAIN
def product(lengths, begin, end):
    """Of the lengths of some axes; slices of a tuple could be empty, which Numba does not loop over."""
    found = 1
    for axis in range(begin, end):
        found *= lengths[axis]
    return found


@INLINE
def row_axes(x):
    """Each row of the last axis is a group."""
    return (product(x.shape, 0, x.ndim - 1), 1, 1, 1, x.shape[-1]), (1, 1, 1, x.shape[-1])


def _group_axes_without_space(x, g):
    return (x.shape[0], 1, g, 1, x.shape[1] // g), (1, g, 1, x.shape[1] // g)


def _group_axes(x, g):
    return (x.shape[0], 1, g, x.shape[1] // g, product(x.shape, 2, x.ndim)), (1, g, x.shape[1] // g)


@chosen
def group_axes(x, g):
    """The channels of each sample are g groups."""
    return _group_axes_without_space if x.ndim == 2 else _group_axes


@INLINE
def channel_axes(x):
    """Each channel is a group."""
    return (1, x.shape[0], x.shape[1], 1, product(x.shape, 2, x.ndim)), (1, x.shape[1], 1)


# ---- what may be None ------------------------------------------------------------------------------------------------


@chosen(counted=True)
def parameter(x, param, others, shape, absent):
    """The parameter in that shape; one number for a run where the others, which belong to it, are missing too."""
    if not isinstance(param, types.NoneType):
        return lambda x, param, others, shape, absent: param.reshape(shape)
    if all(isinstance(other, types.NoneType) for other in others):
        return lambda x, param, others, shape, absent: np.full(shape[:3], absent, x.dtype)
    return lambda x, param, others, shape, absent: np.full(shape, absent, x.dtype)


@optional(lambda param: np.empty(0), counted=True)
def widened(param):
    return param.astype(np.float64)


@PLAIN
def copy(source, target):
    """As a loop: an assignment of slices takes Numba a second to compile, most of that for the text of its error."""
    for i in range(target.size):
        target[i] = source[i]


@optional(lambda target, source: None)
def save(target, source):
    copy(source, target.reshape(-1))


@INLINE
def gradients(dweight, dbias, size):
    """Where the gradients of weight and bias add up: (2, size), or (2, 0) where neither is wanted."""
    return np.zeros((2, 0 if dweight is None and dbias is None else size))


# ---- statistics ------------------------------------------------------------------------------------------------------


@ALLOCATES
def statistics_of(mean, rstd, count):
    """The array of statistics (5, groups) with these."""
    stats = np.zeros((STATISTICS, rstd.size))
    copy(mean, stats[MEAN])
    copy(rstd, stats[RSTD])
    stats[COUNT].fill(count)
    return stats


@optional(lambda mean, var, eps, stats: None)
def fix(mean, var, eps, stats):
    """Set the statistics to these means and variances."""
    for i in range(mean.size):
        stats[MEAN, i] = mean[i]
        stats[RSTD, i] = 1.0 / np.sqrt(np.float64(var[i]) + eps)


@optional(lambda mean, var, momentum, count, stats: None)
def blend(mean, var, momentum, count, stats):
    """Running statistics after one more batch of so many values a channel, as `Moments.update` has them."""
    if count > 1:
        for i in range(mean.size):
            mean[i] = (1.0 - momentum) * mean[i] + momentum * stats[MEAN, i]
            var[i] = (1.0 - momentum) * var[i] + momentum * (stats[M2, i] / (count - 1))


# ---- runs ------------------------------------------------------------------------------------------------------------


@INLINE
def forward(x, axes, weight, bias, center, eps, out, mean, rstd):
    """A norm with the statistics of x over the axes that `row_axes` or the like have found."""
    groups, channels = axes[0][0] * axes[0][2], product(axes[1], 0, len(axes[1]))
    check_forward(x, weight, bias, eps, out, mean, rstd, channels, groups)
    stats = np.zeros((STATISTICS, groups))
    apply(x, axes, weight, bias, center, eps, True, stats, out)
    save(mean, stats[MEAN])
    save(rstd, stats[RSTD])


@INLINE
def apply(x, axes, weight, bias, center, eps, find, stats, out):
    """The same without checks, and with given statistics unless `find` asks for those of x."""
    w, b = parameter(x, weight, (bias,), axes[1], 1.0), parameter(x, bias, (weight,), axes[1], 0.0)
    runs_forward(x.reshape(axes[0]), w, b, bool(center), float(eps), bool(find), stats, out.reshape(axes[0]))


@INLINE
def backward(dy, x, axes, weight, center, fixed, mean, rstd, dx, dweight, dbias):
    """The gradients of a norm over the same axes."""
    groups, channels = axes[0][0] * axes[0][2], product(axes[1], 0, len(axes[1]))
    check_backward(dy, x, weight, mean, rstd, dx, dweight, dbias, channels, groups)
    w, total = parameter(x, weight, (dweight, dbias), axes[1], 1.0), gradients(dweight, dbias, channels)
    views = dy.reshape(axes[0]), x.reshape(axes[0]), dx.reshape(axes[0])
    runs_backward(views[0], views[1], w, bool(center), bool(fixed), mean.reshape(-1), rstd.reshape(-1), total, views[2])
    save(dweight, total[0])
    save(dbias, total[1])


@KERNEL
def runs_forward(x, w, b, center, eps, find, stats, y):
    """y, and stats (5, n*g) where `find` asks; else those are given."""
    groups, leap, tag = stats.shape[1], 1 if cuts.fetches_ahead(x.shape, 2) else 0, identity()
    if x.size:
        kernels.runs_forward(
            0, groups, leap, x, w, b, center, eps, find, stats, None, None, tag, tag, None, None, None, False, y
        )


@KERNEL
def runs_backward(dy, x, w, center, fixed, mean, rstd, total, dx):
    """dx; total (2, w.size), the gradients of weight and bias, unless it is empty. mean and rstd (n*g,).

    Chunks have sums of their own for the parameters, as the engine's have, and are added in their order.
    """
    wanted, tag = total.size > 0, identity()
    if x.size:
        groups = cuts.groups_per_share(x.size, rstd.size, w.size)
        leap = 1 if cuts.fetches_ahead(x.shape, 3) else 0
        stats, k = statistics_of(mean, rstd, x.size // rstd.size), np.zeros((2, rstd.size))
        share = np.zeros((2, 1, *w.shape) if wanted else (2, 1, 0, *w.shape[1:]))
        for chunk in range(cuts.parts(rstd.size, groups)):
            kernels.runs_backward(
                chunk, groups, leap, dy, x, w, w, center, fixed, wanted or not fixed, stats, k,
                None, None, tag, tag, None, share[0], share[1], None, False, dx,
            )  # fmt: skip
            kernels.flush_row(share.reshape(-1), total.reshape(-1))


# ---- columns: x, dy, y and dx (N, C); weight and bias (C,), float64, empty where there are none ----------------------


@INLINE
def columns_backward(dy, x, weight, fixed, mean, rstd, dx, dweight, dbias):
    """The gradients of batch norm of (N, C)."""
    check_backward(dy, x, weight, mean, rstd, dx, dweight, dbias, x.shape[1], x.shape[1])
    total = gradients(dweight, dbias, x.shape[1])
    stats = statistics_of(mean.reshape(-1), rstd.reshape(-1), x.shape[0])
    tiles_backward(dy, x, widened(weight), bool(fixed), stats, total, dx)
    save(dweight, total[0])
    save(dbias, total[1])


@chosen(counted=True)
def if_single(x, value):
    """None for float64, which has no need of powers of two."""
    return (lambda x, value: None) if x.dtype == types.float64 else lambda x, value: value


@chosen(counted=True)
def first_pivot(x, pivot):
    """None for float32, whose sums are first taken about zero."""
    if x.dtype != types.float64:
        return lambda x, pivot: None

    def found(x, pivot):
        merging.means_of_first(x, pivot)
        return pivot

    return found


@INLINE
def grid(n, channels):
    """(r, w, rows, width): x (n, channels) as (r, w), short rows folded, and the size of its tiles."""
    k = cuts.fold(n, channels)
    rows, width = cuts.tile(n // k, k * channels)
    return n // k, k * channels, rows, width


@INLINE
def fill_terms(x, stats, weight, bias, terms):
    """What `kernels.affine` takes of each column: terms (4, 1, w) are its power, mean, scale and shift."""
    single = terms.itemsize < 8
    merging.columns_terms(stats, stats.shape[1], 1, weight, bias, single, terms[0], terms[1], terms[2], terms[3])


@INLINE
def columns_sums(x, rows, width, pivot, part, sums):
    for chunk in range(part.shape[2] * cuts.parts(x.shape[2], width)):
        kernels.columns_sums(chunk, 1, rows, width, x, pivot, None, identity(), None, None, None, part)
    merging.merge_shares(part, sums)


@INLINE
def find_columns(x, rows, width, eps, stats):
    """stats (5, C) of x (1, r, w), folded or not; see `columns._find`."""
    r, w = x.shape[1:]
    pivot, part, doubted = np.zeros((1, w)), np.empty((2, 1, cuts.parts(r, rows), w)), np.empty((1, w), np.bool_)
    sums, again = np.empty((2, 1, w)), np.empty((2, 1, w))
    columns_sums(x, rows, width, first_pivot(x, pivot), part, sums)
    if merging.doubt(sums, float(r), NEAR_PIVOT if x.itemsize == 8 else NEAR_ZERO, pivot, doubted):
        columns_sums(x, rows, width, pivot, part, again)
        merging.replace(sums, again, doubted)
    merging.columns_statistics(sums, float(r), pivot, stats.shape[1], 1, True, eps, stats)


@KERNEL
def columns_forward(x, weight, bias, eps, find, stats, y):
    """y, and stats (5, C) where `find` asks; else those are given."""
    if x.size:
        r, w, rows, width = grid(x.shape[0], x.shape[1])
        view, target, terms, tag = x.reshape(1, r, w), y.reshape(1, r, w), np.empty((4, 1, w), x.dtype), identity()
        if find:
            find_columns(view, rows, width, eps, stats)
        fill_terms(view, stats, weight, bias, terms)
        power = if_single(x, terms[0])
        for chunk in range(cuts.parts(r, rows) * cuts.parts(w, width)):
            kernels.columns_apply(
                chunk, 1, rows, width, view, power, terms[1], terms[2], terms[3], None, None, None, None, tag, tag,
                False, target,
            )  # fmt: skip


@INLINE
def columns_backward_sums(dy, x, rows, width, power, terms, stats, weight, sums):
    """sums (2, 1, w): sum(t) and sum(t * xhat) of each column of x (1, r, w)"""
    r, w = x.shape[1:]
    part, none, tag = np.empty((2, 1, cuts.parts(r, rows), w)), np.empty((2, 0, 0, 0, 0)), identity()
    for chunk in range(part.shape[2] * cuts.parts(w, width)):
        kernels.columns_backward_sums(
            chunk, 1, rows, width, dy, x, power, terms[1], terms[2], terms[3], None, None, None, None, tag, tag,
            part, none,
        )  # fmt: skip
    merging.merge_shares(part, sums)
    merging.sums_of_xhat(sums, stats, stats.shape[1], 1, weight, terms.itemsize < 8)


@INLINE
def find_columns_backward(dy, x, rows, width, power, terms, stats, weight, sums):
    """`columns_backward_sums`; in float64 for the columns where float32 overflows."""
    columns_backward_sums(dy, x, rows, width, power, terms, stats, weight, sums)
    doubted = np.empty(sums.shape[1:], np.bool_)
    if x.itemsize < 8 and merging.overflowed(sums, doubted):
        wide, again = np.empty(terms.shape), np.empty(sums.shape)
        fill_terms(x, stats, weight, np.empty(0), wide)
        columns_backward_sums(dy, x, rows, width, None, wide, stats, weight, again)
        merging.replace(sums, again, doubted)


@KERNEL
def tiles_backward(dy, x, weight, fixed, stats, total, dx):
    """dx; total (2, C), the gradients of weight and bias, unless it is empty."""
    n, channels = x.shape
    if x.size:
        r, w, rows, width = grid(n, channels)
        dys, xs, dxs = dy.reshape(1, r, w), x.reshape(1, r, w), dx.reshape(1, r, w)
        terms, gains = np.empty((4, 1, w), x.dtype), np.empty((4, 1, w), x.dtype)
        k, tag = np.zeros((2, channels)), identity()
        fill_terms(xs, stats, weight, np.empty(0), terms)
        power, lift = if_single(x, terms[0]), if_single(x, gains[3])
        if total.size or not fixed:
            sums, dparams = np.empty((2, 1, w)), np.empty((2, channels))
            find_columns_backward(dys, xs, rows, width, power, terms, stats, weight, sums)
            merging.columns_gradients(sums, stats, channels, 1, weight, True, fixed, k, dparams)
            copy(dparams.reshape(-1), total.reshape(-1))
        merging.columns_gains(stats, channels, 1, weight, k, x.itemsize < 8, gains[0], gains[1], gains[2], gains[3])
        for chunk in range(cuts.parts(r, rows) * cuts.parts(w, width)):
            kernels.columns_backward_apply(
                chunk, 1, rows, width, dys, xs, power, terms[1], terms[2], terms[3], None, None,
                gains[0], gains[1], gains[2], lift, None, None, tag, tag, None, None, False, dxs,
            )  # fmt: skip
