"""Norms that are made again and again: what does not change between calls is settled once.

A call looks at addresses, takes the memory that it needs in one piece, fills addresses in and launches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import combinations

from nbnorm.devices import Library
from nbnorm.errors import BackendError
from nbnorm_backends.numba_cuda.device import FORKED, Device, Start
from nbnorm_backends.numba_cuda.launch import ITEM_SIZES, VECTOR_BYTES, real_kind
from nbnorm_backends.numba_cuda.plans import Buffer, Plan

BEGIN = 256  # bytes: on a multiple of as many begins each array of a block, as those of allocators do
MOVED = "running_mean", "running_var"  # kernels with 16-byte access do not look at these
Block = tuple[bool, int, tuple[tuple[str, int], ...]]  # whether it is zero at first, its bytes, and where what begins


def repeated(
    device: Device,
    memory: Library,
    kind: str,
    plan_of: Callable[[bool], Plan],
    names: tuple[str, ...],
    sizes: Mapping[str, int],
) -> Callable[..., bool]:
    """A function of addresses, None for what is not there, that runs a plan; False, and nothing done, where an array
    that is written is not apart from the others. y may be x; with `own` nobody else has its memory.

    Parameters
    ----------
    kind : element type
    plan_of : callable
        The plan, for whether all arrays begin on 16 bytes.
    names : of the inputs and y, in the order of the addresses
    sizes : dict of str to int
        Bytes of those that are there.
    """
    written = {"y", *MOVED}
    pairs = [(a, sizes[a], b, sizes[b]) for a, b in combinations(sizes, 2) if written & {a, b}]
    pairs_of_inputs = [pair for pair in pairs if "y" not in pair]
    vectors = [name for name in sizes if name not in MOVED]

    @lru_cache(maxsize=2)
    def ready(aligned: bool) -> tuple[Start, list[Block]]:
        plan = plan_of(aligned)
        buffers = {name: buffer for name, buffer in plan.buffers.items() if name not in sizes}
        return device.bind(plan.launches), _blocks(buffers, kind)

    process = os.getpid()

    def again(*addresses: int | None, own: bool) -> bool:
        if os.getpid() != process:  # a plan is not asked for what the backend rejects
            raise BackendError(FORKED)
        at = {name: address for name, address in zip(names, addresses, strict=True) if address is not None}
        for a, size, b, other in pairs_of_inputs if own else pairs:
            begin, second = at[a], at[b]
            if begin < second + other and second < begin + size and not (begin == second and (a, b) == ("x", "y")):
                return False
        mixed = 0
        for name in vectors:
            mixed |= at[name]
        start, blocks = ready(mixed % VECTOR_BYTES == 0)
        held = []  # until the kernels are on the stream, in whose order memory is given away again
        for zero, size, places in blocks:
            block, base = memory.block(size, zero=zero)
            held.append(block)
            for name, begin in places:
                at[name] = base + begin
        start(memory.stream(), at)
        return True

    return again


def _blocks(buffers: Mapping[str, Buffer], kind: str) -> list[Block]:
    """Buffers one behind another, in one block, and those that must be zero in another."""
    itemsizes = {"element": ITEM_SIZES[kind], "real": ITEM_SIZES[real_kind(kind)], "int32": 4, "int64": 8}

    def block(chosen: Iterable[tuple[str, Buffer]], zero: bool) -> Block:
        places, size = [], 0
        for name, buffer in chosen:
            places.append((name, size))
            size += -(-buffer.size * itemsizes[buffer.type] // BEGIN) * BEGIN
        return zero, size, tuple(places)

    both = [block([each for each in buffers.items() if each[1].zero == zero], zero) for zero in (False, True)]
    return [each for each in both if each[1]]
