"""How work is cut: functions of the shape alone, for Python and for compiled callers, so that both add in one order."""

from __future__ import annotations

from numba.extending import register_jitable

from nbnorm_backends.numba_cpu.tuning import TUNING

# Numba takes numbers from a module, and no dataclass.
CHUNK, SHARES, THIN = TUNING.chunk, TUNING.shares, TUNING.thin
WIDTH, FOLD, DEPTH = TUNING.width, TUNING.fold, TUNING.depth
CACHED, FAR, FAR_APART = TUNING.cached, TUNING.far, TUNING.far_apart


@register_jitable
def parts(whole: int, part: int) -> int:
    """How many parts of that size the whole has; the last may be smaller."""
    return (whole + part - 1) // part


@register_jitable
def groups_per_chunk(size: int, groups: int) -> int:
    """For x of so many elements in so many groups."""
    return max(1, CHUNK // max(1, size // max(1, groups)))


@register_jitable
def groups_per_share(size: int, groups: int, params: int) -> int:
    """`groups_per_chunk`, where each chunk has sums of its own for so many parameters."""
    shares = min(SHARES, max(1, size // (THIN * params)))
    found: int = max(groups_per_chunk(size, groups), parts(groups, shares))
    return found


@register_jitable
def fetches_ahead(shape: tuple[int, int, int, int, int], arrays: int) -> bool:
    """Whether the next group is fetched while one is written; so many arrays like x are read and written."""
    n, r, g, c, s = shape
    size = n * r * g * c * s
    return arrays * size >= (FAR if r == 1 else FAR_APART) and size <= CACHED * n * g


def parts_of_group(shape: tuple[int, ...]) -> int:
    """Into how many parts along r the groups of x (1, r, g, c, s) are cut, so that all of x is read as it lies: where
    they outgrow the caches, and one is alone, or has more runs in memory than the processor has pages at hand. 1 where
    no part of r would do. Compiled callers, who have one thread, cut nothing."""
    n, r, g, c, s = shape
    scattered = r >= TUNING.far_runs and r * g * c * s >= TUNING.far_apart
    if n > 1 or r * c * s <= TUNING.cached or not (g == 1 or scattered):
        return 1
    least = max(parts(TUNING.part, c * s), parts(r * g, TUNING.most_parts))
    runs = next((runs for runs in range(least, 4 * least + 1) if r % runs == 0), r)
    return r // runs


@register_jitable
def fold(r: int, w: int) -> int:
    """The largest divisor of r that folds rows of w elements into at most FOLD columns of DEPTH rows."""
    k = max(1, min(FOLD // w, r // DEPTH))
    while r % k:
        k -= 1
    return k


@register_jitable
def tile(r: int, w: int) -> tuple[int, int]:
    """(rows, width) of a tile of r rows of w elements; whatever n is."""
    width = min(w, WIDTH)
    return min(r, max(CHUNK // width, parts(r, SHARES))), width
