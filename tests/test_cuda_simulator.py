"""The CUDA simulator: it finds every kind of mistake where it is, and nothing in the kernel that does it right."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nbnorm_backends.numba_cuda import simulator
from nbnorm_backends.numba_cuda.simulator import Pointer, SimulatorError, empty, launch, primitives

ALL = 0xFFFFFFFF
f32 = np.float32
P = primitives("float32")
KINDS = ("float32", "float64", "float16", "bfloat16")
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# Factories of kernels with one mistake, or without it. Its line ends in "# here", or in "# or here" where two accesses
# meet and either may be the later one.
PLANTED: list[Any] = []


def planted(message: str, thread: str = r"block 0 thread \d+", grid: int = 1, block: int = 64, offset: int = 4) -> Any:
    def register(factory: Callable[..., Any]) -> Callable[..., Any]:
        PLANTED.append(pytest.param(factory, message, thread, grid, block, offset, id=factory.__name__))
        return factory

    return register


@planted(r"out of bounds, from 0 to 256: x\[256\]", "block 0 thread 63")
def beyond_the_end(cuda, wrong):
    def kernel(x, y, count):
        i = cuda.threadIdx.x * 4 + 3
        y[i] = x[i + 1 if wrong else i]  # here

    return kernel


@planted(r"out of bounds, from 0 to 256: y\[-1\]", "block 0 thread 0")
def below_the_start(cuda, wrong):
    def kernel(x, y, count):
        i = cuda.threadIdx.x
        y[i - 1 if wrong else i] = x[i]  # here

    return kernel


@planted(r"out of bounds, from 0 to 256: x\[256:260\]", "block 64 thread 0", grid=65, block=1)
def vector_beyond_the_end(cuda, wrong):
    def kernel(x, y, count):
        r = cuda.local.array(4, f32)
        k = cuda.blockIdx.x
        if k < 64 or wrong:
            P.ld(x, k, r, 0)  # here

    return kernel


@planted(r"out of bounds, from 0 to 64: shared tile\[64\]", "block 0 thread 0")
def shared_out_of_bounds(cuda, wrong):
    def kernel(x, y, count):
        tile = cuda.shared.array(64, f32)
        tile[64 - cuda.threadIdx.x if wrong else 63 - cuda.threadIdx.x] = x[0]  # here

    return kernel


@planted(r"out of bounds, from 0 to 4: local\[4\]")
def local_write_out_of_bounds(cuda, wrong):
    def kernel(x, y, count):
        r = cuda.local.array(4, f32)
        for e in range(5 if wrong else 4):
            r[e] = x[e]  # here

    return kernel


@planted(r"out of bounds, from 0 to 4: local\[-1\]")
def local_read_out_of_bounds(cuda, wrong):
    def kernel(x, y, count):
        r = cuda.local.array(4, f32)
        r[3] = x[cuda.threadIdx.x]
        y[cuda.threadIdx.x] = r[-1 if wrong else 3]  # here

    return kernel


@planted(r"out of bounds, from 0 to 6: local\[4:8\]")
def local_vector_out_of_bounds(cuda, wrong):
    def kernel(x, y, count):
        r = cuda.local.array(6, f32)
        P.ld(x, cuda.threadIdx.x, r, 4 if wrong else 2)  # here

    return kernel


@planted("uninitialised read of local", r"block 0 thread \d+")
def local_uninitialised(cuda, wrong):
    def kernel(x, y, count):
        r = cuda.local.array(4, f32)
        for e in range(3 if wrong else 4):
            r[e] = f32(0)
        P.st(y, cuda.threadIdx.x, r, 0)  # here

    return kernel


@planted(r"uninitialised read of shared tile\[63\]")
def shared_uninitialised(cuda, wrong):
    def kernel(x, y, count):
        tile = cuda.shared.array(64, f32)
        t = cuda.threadIdx.x
        if t < 63 or not wrong:
            tile[t] = x[t]
        cuda.syncthreads()
        y[t] = tile[63]  # here

    return kernel


@planted(r"uninitialised read of y\[17\]", "block 0 thread 17")
def global_uninitialised(cuda, wrong):
    def kernel(x, y, count):
        t = cuda.threadIdx.x
        if t != 17 or not wrong:
            y[t] = x[t]
        y[t] += f32(1)  # here

    return kernel


@planted(r"race: unordered after a write by block 0 thread 0, a read of shared cell\[0\]", block=32)
def shared_read_after_write(cuda, wrong):
    def kernel(x, y, count):
        cell = cuda.shared.array(1, f32)
        for step in range(2):
            if cuda.threadIdx.x == 0:
                cell[0] = x[step]
            if step == 0 or not wrong:
                cuda.syncthreads()
            y[cuda.threadIdx.x] = cell[0]  # here
            cuda.syncthreads()

    return kernel


@planted(r"race: unordered after a read by block 0 thread \d+, a write of shared tile\[\d+\]")
def shared_write_after_read(cuda, wrong):
    def kernel(x, y, count):
        tile = cuda.shared.array(64, f32)
        t = cuda.threadIdx.x
        tile[t] = x[t]
        cuda.syncthreads()
        a = tile[(t + 1) % 64]
        if not wrong:
            cuda.syncthreads()
        tile[t] = a  # here

    return kernel


@planted(r"race: unordered after a write by block 0 thread \d+, a write of shared tile\[\d+\]")
def shared_write_after_write(cuda, wrong):
    def kernel(x, y, count):
        tile = cuda.shared.array(64, f32)
        t = cuda.threadIdx.x
        tile[t // 2 if wrong else t] = f32(1)  # here

    return kernel


@planted(r"race: unordered after a write by block 0 thread 0, a read of shared cell\[0\]", block=32)
def shuffles_order_no_memory(cuda, wrong):
    def kernel(x, y, count):
        cell = cuda.shared.array(1, f32)
        if cuda.threadIdx.x == 0:
            cell[0] = f32(1)
        if wrong:
            cuda.shfl_sync(ALL, x[0], 0)
        else:
            cuda.syncwarp()
        y[cuda.threadIdx.x] = cell[0]  # here

    return kernel


@planted(r"race: unordered after a (write|read) by block 0 thread \d+, a (read|write) of x\[0\]")
def syncwarp_orders_one_warp(cuda, wrong):
    def kernel(x, y, count):
        if cuda.threadIdx.x == 0:
            x[0] = f32(1)  # or here
        cuda.syncwarp()
        if cuda.threadIdx.x < 32 or wrong:
            y[cuda.threadIdx.x] = x[0]  # here

    return kernel


@planted(r"race: unordered after a write by block \d thread 0, a write of y\[0\]", r"block \d thread 0", 2, 32)
def two_blocks_write_one_cell(cuda, wrong):
    def kernel(x, y, count):
        if cuda.threadIdx.x == 0:
            y[0 if wrong else cuda.blockIdx.x] = f32(1)  # here

    return kernel


@planted(r"race: unordered after a read by block \d thread \d+, a write of x\[4:8\]", r"block \d thread 1", 2, 32)
def in_place_over_what_others_read(cuda, wrong):
    def kernel(x, y, count):
        r = cuda.local.array(4, f32)
        k = cuda.blockIdx.x * 32 + cuda.threadIdx.x
        P.ld(x, k, r, 0)
        if wrong:
            P.ld(x, 1, r, 0)  # or here
        P.st(x, k, r, 0)  # here

    return kernel


def last_block(cuda, fence_before: bool = True, fence_after: bool = True, fence_by_all: bool = True):
    """Every thread writes to y; the last block sums what all wrote to y[255]. Fences by all, or by thread 0."""

    def kernel(x, y, count):
        last = cuda.shared.array(1, np.int32)
        t = cuda.threadIdx.x
        n = cuda.gridDim.x * 32
        y[cuda.blockIdx.x * 32 + t] = x[cuda.blockIdx.x * 32 + t]
        if fence_before and fence_by_all:
            cuda.threadfence()
        cuda.syncthreads()
        if t == 0:
            if fence_before and not fence_by_all:
                cuda.threadfence()
            last[0] = cuda.atomic.add(count, 0, 1) == cuda.gridDim.x - 1
            if fence_after and not fence_by_all:
                cuda.threadfence()
        cuda.syncthreads()
        if last[0]:
            if fence_after and fence_by_all:
                cuda.threadfence()
            if t == 0:
                total = f32(0)
                for i in range(n):
                    total += y[i]  # here
                y[255] = total
                count[0] = 0

    return kernel


AFTER_BLOCK = r"race: unordered after a write by block \d thread \d+, a read of y\[\d+\]"


@planted(AFTER_BLOCK, r"block \d thread 0", 3, 32)
def no_fence_before_the_atomic(cuda, wrong):
    return last_block(cuda, fence_before=not wrong)


@planted(AFTER_BLOCK, r"block \d thread 0", 3, 32)
def no_fence_after_the_atomic(cuda, wrong):
    return last_block(cuda, fence_after=not wrong)


@planted(AFTER_BLOCK, r"block \d thread 0", 3, 32)
def no_barrier_before_the_atomic(cuda, wrong):
    def kernel(x, y, count):
        t = cuda.threadIdx.x
        y[cuda.blockIdx.x * 32 + t] = x[t]
        cuda.threadfence()
        if not wrong:
            cuda.syncthreads()
        if t == 0:
            old = cuda.atomic.add(count, 0, 1)
            cuda.threadfence()
            if old == 2:
                for i in range(96):
                    if i // 32 != cuda.blockIdx.x:
                        x[0] = y[i]  # here

    return kernel


@planted(AFTER_BLOCK, r"block \d thread 1", 3, 32)
def fence_between_barriers(cuda, wrong):
    """By any one thread: after the barrier that follows the writes, and before the one that precedes the atomic."""

    def kernel(x, y, count):
        t = cuda.threadIdx.x
        y[cuda.blockIdx.x * 32 + t] = x[t]
        if not wrong:
            cuda.syncthreads()
        if t == 0:
            cuda.threadfence()
        cuda.syncthreads()
        if t == 1:
            old = cuda.atomic.add(count, 0, 1)
            cuda.threadfence()
            if old == 2:
                for i in range(96):
                    x[0] = y[i]  # here

    return kernel


@planted(AFTER_BLOCK, r"block \d thread \d+", 2, 32)
def shuffles_tell_nothing_of_other_blocks(cuda, wrong):
    def kernel(x, y, count):
        t, old = cuda.threadIdx.x, 0
        if t == 0:
            y[cuda.blockIdx.x] = x[0]
            cuda.threadfence()
            old = cuda.atomic.add(count, 0, 1)
        if not wrong:
            cuda.syncwarp()
        old = cuda.shfl_sync(ALL, old, 0)
        cuda.threadfence()
        if old == 1:
            x[t] = y[1 - cuda.blockIdx.x]  # here

    return kernel


@planted(r"race: unordered after a (write|read) by block 0 thread \d, a (read|write) of x\[(4:8|6)\]", block=32)
def element_of_a_vector(cuda, wrong):
    def kernel(x, y, count):
        r = cuda.local.array(4, f32)
        if cuda.threadIdx.x == 0:
            P.st1(x, 6 if wrong else 8, f32(1))  # or here
        if cuda.threadIdx.x == 1:
            P.ld(x, 1, r, 0)  # here

    return kernel


@planted(
    r"race: unordered after a write by block \d thread 0, a (read|write) of count\[0\]", r"block \d thread 0", 2, 32
)
def plain_access_beside_atomics(cuda, wrong):
    def kernel(x, y, count):
        if cuda.threadIdx.x == 0:
            cuda.atomic.add(count, 0, 1)  # or here
            if wrong:
                y[cuda.blockIdx.x] = f32(count[0])  # here

    return kernel


@planted(r"race: unordered after a write by block \d thread 0, a write of count\[0\]", r"block \d thread 0", 3, 32)
def plain_write_after_ones_own_atomic(cuda, wrong):
    def kernel(x, y, count):
        if cuda.threadIdx.x == 0:
            cuda.threadfence()
            old = cuda.atomic.add(count, 0, 1)
            if not wrong:
                cuda.threadfence()
            if old == 2:
                count[0] = 0  # here

    return kernel


@planted(r"floating-point atomic: y\[0\] of float32", block=32)
def atomic_of_floats(cuda, wrong):
    def kernel(x, y, count):
        cuda.atomic.add(y if wrong else count, 0, 1)  # here

    return kernel


@planted(r"misaligned vector, 4 bytes off: x\[\d+:\d+\]", block=32, offset=1)
def misaligned(cuda, wrong):
    def kernel(x, y, count):
        r = cuda.local.array(4, f32)
        P.ld(x, cuda.threadIdx.x, r, 0)  # here

    return kernel


@planted(r"divergent syncthreads: block 0 thread 40 has ended", "block 0 thread 0")
def barrier_that_some_miss(cuda, wrong):
    def kernel(x, y, count):
        if cuda.threadIdx.x < (40 if wrong else 64):
            cuda.syncthreads()  # here

    return kernel


@planted(r"divergent syncthreads: block 0 thread 32 is at syncthreads, test_cuda_simulator.py:\d+", "block 0 thread 0")
def barriers_on_two_branches(cuda, wrong):
    def kernel(x, y, count):
        if cuda.threadIdx.x < 32 or not wrong:
            cuda.syncthreads()  # here
        else:
            cuda.syncthreads()

    return kernel


def make_helpers(cuda):
    """A barrier and a shuffle in functions that kernels call."""

    @P.dev
    def barrier():
        cuda.syncthreads()  # or here

    @P.dev
    def across(value):
        return cuda.shfl_xor_sync(ALL, value, 1)  # or here

    return barrier, across


@planted(r"divergent syncthreads: block 0 thread 32 is at syncthreads", "block 0 thread 0")
def barriers_of_a_helper_on_two_branches(cuda, wrong):
    barrier, _ = make_helpers(cuda)

    def kernel(x, y, count):
        if cuda.threadIdx.x < 32 or not wrong:
            barrier()
        else:
            barrier()

    return kernel


@planted(r"divergent syncthreads: block 0 thread 32 is at syncthreads", "block 0 thread 0")
def three_rounds_against_two_and_one(cuda, wrong):
    barrier, _ = make_helpers(cuda)

    def kernel(x, y, count):
        short = wrong and cuda.threadIdx.x >= 32
        for _ in range(2 if short else 3):
            barrier()
        if short:
            barrier()

    return kernel


@planted(r"divergent shfl_xor_sync\(0xffffffff, 1\): block 0 thread 4 is at shfl_xor_sync", block=32)
def shuffles_of_a_helper_on_two_branches(cuda, wrong):
    _, across = make_helpers(cuda)

    def kernel(x, y, count):
        if cuda.threadIdx.x < 4 and wrong:
            y[cuda.threadIdx.x] = across(x[cuda.threadIdx.x])
        else:
            y[cuda.threadIdx.x] = across(x[cuda.threadIdx.x])

    return kernel


@planted(r"divergent shfl_xor_sync\(0xffffffff, 1\): block 0 thread 16 has ended", "block 0 thread 0", block=32)
def shuffle_that_some_miss(cuda, wrong):
    def kernel(x, y, count):
        if cuda.threadIdx.x < 16:
            y[cuda.threadIdx.x] = cuda.shfl_xor_sync(ALL if wrong else 0xFFFF, x[cuda.threadIdx.x], 1)  # here

    return kernel


@planted(r"divergent shfl_down_sync\(0xffffffff, 8\): block 0 thread 4 is at shfl_down_sync\(0xffffffff, 4\)", block=32)
def shuffles_of_different_steps(cuda, wrong):
    def kernel(x, y, count):
        k = 8 if cuda.threadIdx.x < 4 or not wrong else 4
        y[cuda.threadIdx.x] = cuda.shfl_down_sync(ALL, x[cuda.threadIdx.x], k)  # here

    return kernel


@planted(r"divergent shfl_xor_sync\(0xff, 16\): lane 16, whose", "block 0 thread 0", block=32)
def shuffle_from_a_lane_that_takes_no_part(cuda, wrong):
    def kernel(x, y, count):
        if cuda.threadIdx.x < 8:
            y[cuda.threadIdx.x] = cuda.shfl_xor_sync(0xFF, x[0], 16 if wrong else 4)  # here
            cuda.syncwarp(0xF if cuda.threadIdx.x < 4 else 0xF0)

    return kernel


@planted(r"divergent syncwarp\(0xffff, 0\): its own lane", "block 0 thread 16", block=32)
def lane_outside_of_its_mask(cuda, wrong):
    def kernel(x, y, count):
        if cuda.threadIdx.x < 16:
            cuda.syncwarp(0xFFFF)
        elif wrong:
            cuda.syncwarp(0xFFFF)  # here

    return kernel


@planted(r"divergent shfl_sync\(0xffffffff, 0\): block 0 thread 0 is at syncthreads", "block 0 thread 1", block=32)
def barrier_against_shuffle(cuda, wrong):
    def kernel(x, y, count):
        if wrong and cuda.threadIdx.x == 0:
            cuda.syncthreads()
        y[cuda.threadIdx.x] = cuda.shfl_sync(ALL, x[0], 0)  # here

    return kernel


@planted(r"deadlock: read and read again without end, 20000 times: count\[0\]", "block . thread 0", 2, 32)
def blocks_that_wait_for_a_later_one(cuda, wrong):
    def kernel(x, y, count):
        if cuda.threadIdx.x == 0:
            cuda.atomic.add(count, 0, 1)
            while wrong and cuda.atomic.add(count, 0, 0) < 2:  # here
                pass

    return kernel


@planted(r"deadlock: read and read again without end, 20000 times: count\[0\]", "block 0 thread 3", block=32)
def polling_a_plain_cell(cuda, wrong):
    def kernel(x, y, count):
        if cuda.threadIdx.x == 3:
            while wrong and count[0] == 0:  # here
                pass
        cuda.syncthreads()

    return kernel


@planted(r"float64 0\.5 does not fit float32")
def float64_in_a_float32_store(cuda, wrong):
    def kernel(x, y, count):
        half = cuda.threadIdx.x // 1000 + np.float64(1) / 2
        y[cuda.threadIdx.x] = half if wrong else f32(half)  # here

    return kernel


@planted(r"int64 2147483648 does not fit int32", block=1)
def an_integer_too_large(cuda, wrong):
    def kernel(x, y, count):
        count[0] = 2**31 if wrong else 2**31 - 1  # here

    return kernel


def run(factory: Any, wrong: bool, grid: int, block: int, offset: int, seed: int) -> np.ndarray:
    y = empty(256, f32)
    x = Pointer(np.arange(260, dtype=f32), offset if wrong else 4)
    launch(lambda cuda: factory(cuda, wrong), grid, block, (x, y, np.zeros(1, np.int32)), seed=seed)
    return y


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("factory", "message", "thread", "grid", "block", "offset"), PLANTED)
def test_a_planted_mistake_is_found_where_it_is(factory, message, thread, grid, block, offset, seed) -> None:
    place = rf"{message}.* \(kernel, {thread}, test_cuda_simulator\.py:\d+: .*# (or )?here\)$"
    with pytest.raises(SimulatorError, match=place):
        run(factory, True, grid, block, offset, seed)


@pytest.mark.parametrize(("factory", "message", "thread", "grid", "block", "offset"), PLANTED)
def test_the_same_kernel_without_the_mistake_passes(factory, message, thread, grid, block, offset) -> None:
    results = [run(factory, False, grid, block, offset, seed).tobytes() for seed in range(3)]
    assert len(set(results)) == 1


@pytest.mark.parametrize("fence_by_all", [True, False])
def test_the_last_block_merges_what_all_have_written(fence_by_all: bool) -> None:
    """Fenced by each thread that wrote and reads, as PyTorch does, and by the thread of the atomic between barriers."""
    x = np.random.default_rng(0).integers(0, 100, 256).astype(f32)
    for seed in range(5):
        for resident in (False, True):
            y, count = empty(256, f32), np.zeros(1, np.int32)
            make = lambda cuda: last_block(cuda, fence_by_all=fence_by_all)  # noqa: E731
            launch(make, 7, 32, (x, y, count), seed=seed, resident=resident)
            assert y[255] == x[:224].sum()
            assert count[0] == 0
            assert y.unwritten.nonzero()[0].tolist() == list(range(224, 255))


def test_blocks_that_wait_for_each_other_run_where_all_are_resident() -> None:
    def make(cuda):
        def kernel(y, arrived):
            cuda.threadfence()
            cuda.atomic.add(arrived, 0, 1)
            while cuda.atomic.add(arrived, 0, 0) < cuda.gridDim.x:
                pass
            cuda.threadfence()
            y[cuda.blockIdx.x] = f32(1)

        return kernel

    y = empty(8, f32)
    launch(make, 8, 1, (y, np.zeros(1, np.int32)), resident=True)
    assert y.tolist() == [1] * 8
    with pytest.raises(SimulatorError, match="deadlock"):
        launch(make, 8, 1, (empty(8, f32), np.zeros(1, np.int32)))


@pytest.mark.parametrize("fenced", [True, False])
def test_what_a_block_has_acquired_it_releases_too(fenced: bool) -> None:
    def make(cuda):
        def kernel(y, flags):
            b = cuda.blockIdx.x
            if b == 0:
                y[0] = f32(1)
            else:
                while cuda.atomic.add(flags, b - 1, 0) == 0:
                    pass
            if fenced or b != 1:
                cuda.threadfence()
            if b == 2:
                y[1] = y[0]
            cuda.atomic.add(flags, b, 1)

        return kernel

    y = empty(2, f32)
    if fenced:
        launch(make, 3, 1, (y, np.zeros(3, np.int32)), resident=True)
        assert y[1] == 1
    else:
        with pytest.raises(
            SimulatorError, match=r"race: unordered after a write by block 0 thread 0, a read of y\[0\]"
        ):
            launch(make, 3, 1, (y, np.zeros(3, np.int32)), resident=True)


def test_reading_the_same_again_is_no_deadlock_while_barriers_are_met() -> None:
    def make(cuda):
        def kernel(x, y):
            for _ in range(4):
                for _ in range(simulator.PATIENCE // 2):
                    y[0] = x[0]
                cuda.syncthreads()

        return kernel

    y = empty(1, f32)
    launch(make, 1, 1, (np.ones(1, f32), y))
    assert y[0] == 1


def make_reduction(cuda, P, steps):
    """Sums over a block, by shuffles and then over warps in shared memory: sums[block] and squares, in two turns."""
    real = np.float64 if P.V == 2 else f32

    @P.dev
    def over_warp(value):
        for k in (16, 8, 4, 2, 1):
            value += cuda.shfl_xor_sync(ALL, value, k)
        return value

    def reduction(x, y, sums):
        slots = cuda.shared.array(64, real)
        r = cuda.local.array(P.V, real)
        t, size = cuda.threadIdx.x, cuda.blockDim.x
        for turn in range(2):
            total = real(0)
            for step in range(steps):
                k = (cuda.blockIdx.x * steps + step) * size + t
                P.ld(x, k, r, 0)
                for e in range(P.V):
                    total += r[e] * r[e] if turn else r[e]
                    r[e] = r[e] * real(2)
                P.st(y, k, r, 0)
            total = over_warp(total)
            if t % 32 == 0:
                slots[turn * 32 + t // 32] = total
            cuda.syncthreads()
            total = slots[turn * 32 + t % 32] if t % 32 < size // 32 else real(0)
            total = over_warp(total)
            if t == 0:
                sums[turn * cuda.gridDim.x + cuda.blockIdx.x] = total

    return reduction


@pytest.mark.parametrize("kind", KINDS)
def test_reductions_agree_with_numpy_and_have_the_same_bits_for_any_seed(kind: str) -> None:
    P = primitives(kind)
    x = np.random.default_rng(0).standard_normal(3 * 2 * 96 * P.V).astype(DTYPES[kind])
    real = np.float64 if kind == "float64" else f32
    results = []
    for seed in range(4):
        y, sums = empty(x.size, DTYPES[kind]), empty(6, real)
        launch(lambda cuda: make_reduction(cuda, P, 2), 3, 96, (x, y, sums), seed=seed)
        results.append(sums.tobytes())
        assert np.array_equal(y, x * DTYPES[kind](2))
    assert len(set(results)) == 1
    blocks = x.astype("f8").reshape(3, -1)
    expected = np.concatenate([blocks.sum(1), (blocks**2).sum(1)])
    sizes = np.concatenate([np.abs(blocks).sum(1), (blocks**2).sum(1)])
    assert np.all(np.abs(sums - expected) <= 8 * np.finfo(real).eps * sizes)


def test_seeds_draw_the_order_of_blocks_and_warps() -> None:
    def make(cuda):
        def kernel(order, count):
            if cuda.threadIdx.x % 32 == 0:
                ticket = cuda.atomic.add(count, 0, 1)
                order[ticket] = cuda.blockIdx.x * 4 + cuda.threadIdx.x // 32

        return kernel

    def order_of(seed: int, resident: bool) -> tuple[int, ...]:
        order = empty(16, np.int32)
        launch(make, 4, 128, (order, np.zeros(1, np.int32)), seed=seed, resident=resident)
        assert sorted(order) == list(range(16))
        return tuple(order.tolist())

    one_by_one = [order_of(seed, False) for seed in range(8)]
    assert order_of(3, False) == one_by_one[3]
    assert len(set(one_by_one)) == 8
    assert all(len({warp // 4 for warp in order[:4]}) == 1 for order in one_by_one)
    assert len({order[0] // 4 for order in one_by_one}) > 1
    assert any(len({warp // 4 for warp in order_of(seed, True)[:4]}) > 1 for seed in range(8))


def test_indices_have_two_axes() -> None:
    def make(cuda):
        def kernel(y):
            t = cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
            b = cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x
            y[b * 6 + t] = b * 6 + t

        return kernel

    y = empty(36, np.int32)
    launch(make, (2, 3), (3, 2), (y,))
    assert y.tolist() == list(range(36))


# ---- numbers ----


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_types_are_decoded_and_encoded_as_by_their_own_library(kind: str) -> None:
    words = np.arange(2**16, dtype=np.uint16)
    values = words.view(DTYPES[kind])
    decoded = simulator.decode(words, kind)
    number = ~np.isnan(decoded)
    assert np.array_equal(np.isnan(values.astype(f32)), ~number)
    assert decoded[number].tobytes() == values[number].astype(f32).tobytes()

    finite = np.sort(decoded[np.isfinite(decoded)])
    middles = ((finite[1:].astype("f8") + finite[:-1]) / 2).astype(f32)  # ties
    drawn = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32).view(f32)
    xs = np.concatenate([decoded, middles, np.nextafter(middles, f32(9e9)), np.nextafter(middles, f32(-9e9)), drawn])
    with np.errstate(over="ignore", invalid="ignore"):
        expected, encoded = xs.astype(DTYPES[kind]), simulator.encode(xs, kind).view(DTYPES[kind])
    number = ~np.isnan(xs)
    assert np.array_equal(np.isnan(encoded.astype(f32)), ~number)
    assert encoded[number].tobytes() == expected[number].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_scalar_access_is_that_of_vectors(kind: str) -> None:
    """From an address that no vector may have; what lies around stays as it was."""
    P = primitives(kind)
    x = np.random.default_rng(0).standard_normal(67).astype(DTYPES[kind])
    y = x.copy()

    def make(cuda):
        def kernel(x, y):
            i = cuda.threadIdx.x
            P.st1(y, i, P.ld1(x, i) / np.float32(3))

        return kernel

    launch(make, 1, 32, (Pointer(x, 1), Pointer(y, 3)))
    real = np.float64 if kind == "float64" else f32
    expected = x.copy()
    expected[3:35] = (x[1:33].astype(real) / real(3)).astype(x.dtype)
    assert y.tobytes() == expected.tobytes()


def test_functions_agree_with_their_definitions() -> None:
    from scipy import special

    x = np.linspace(-4, 4, 101)
    for kind, rtol in (("float32", 3e-7), ("float64", 1e-15)):
        P = primitives(kind)
        real = np.float64 if kind == "float64" else f32
        xs = [real(v) for v in x]
        for name, exact in {"exp": np.exp, "tanh": np.tanh, "erf": special.erf}.items():
            got = [getattr(P, name)(v) for v in xs]
            assert {type(v) for v in got} == {real}
            np.testing.assert_allclose(got, exact(np.array(xs, "f8")), rtol=rtol, err_msg=name)
        positive = [real(v) for v in x + 5]
        np.testing.assert_allclose([P.rsqrt(v) for v in positive], np.array(positive, "f8") ** -0.5, rtol=rtol)
        np.testing.assert_allclose([P.sqrt(v) for v in positive], np.array(positive, "f8") ** 0.5, rtol=rtol)
        assert P.maximum(real(1), real("nan")) == P.minimum(real("nan"), real(1)) == 1
        a, b = real(1) / real(3), real(3)
        assert P.fma(a, b, -(a * b)) == float(Fraction(float(a)) * 3 - Fraction(float(a * b)))  # what a * b has lost
    assert primitives("float32").fdiv(f32(1), f32(2.0**127)) == 0  # as the device's fast division
    assert primitives("float64").fdiv(np.float64(1), np.float64(2.0**127)) == 2.0**-127


def test_float32_is_rounded_at_every_step() -> None:
    def make(cuda):
        def kernel(y, scale):
            r = cuda.local.array(1, f32)
            r[0] = f32(2**24)
            for _ in range(8):
                r[0] += f32(1)  # is lost each time
            y[0] = r[0] * scale

        return kernel

    y = empty(1, f32)
    launch(make, 1, 1, (y, f32(1)))
    assert y[0] == 2**24


def test_constants_in_float64_are_refused() -> None:
    third, numbers = 1 / 3, (0.5, 0.25)

    def literal(cuda):
        def kernel(y):
            y[0] = f32(1) * 0.5

        return kernel

    def closure(cuda):
        def kernel(y):
            y[0] = f32(1) * third

        return kernel

    def unrolled(cuda):
        def kernel(y):
            for number in numbers:
                y[0] = f32(1) * number

        return kernel

    def device_function(cuda):
        @P.dev
        def half():
            return 0.5

        def kernel(y):
            y[0] = half()

        return kernel

    def attribute(cuda):
        def kernel(y):
            y[0] = f32(1) * math.pi

        return kernel

    def converted(cuda):
        def kernel(y):
            y[0] = f32(0.5) * f32(third) * f32(math.pi)

        return kernel

    for factory, value in (
        (literal, "0.5"),
        (closure, "0.333"),
        (unrolled, r"\(0.5, 0.25\)"),
        (device_function, "0.5"),
        (attribute, "3.14"),
    ):
        with pytest.raises(SimulatorError, match=rf"float64 constant {value}.*test_cuda_simulator\.py:\d+"):
            launch(factory, 1, 1, (empty(1, f32),))
    launch(converted, 1, 1, (empty(1, f32),))


# ---- arguments ----


def nothing(cuda):
    def kernel(x, y):
        pass

    return kernel


@pytest.mark.parametrize(
    ("error", "message", "x", "y"),
    [
        (TypeError, "y: an array, a Pointer, an integer, a NumPy float or None expected, got <class 'float'>", 1, 0.5),
        (ValueError, "x: C-contiguous", np.zeros((4, 4), f32).T, 1),
        (ValueError, "x: C-contiguous with an offset in it expected, got .*, 5", Pointer(np.zeros(4, f32), 5), 1),
        (ValueError, "y: overlaps another argument", (base := np.zeros(8, f32)), base[4:]),
    ],
)
def test_arguments_are_checked(error, message, x, y) -> None:
    with pytest.raises(error, match=message):
        launch(nothing, 1, 1, (x, y))


def test_the_number_of_arguments_and_threads_is_checked() -> None:
    with pytest.raises(ValueError, match="shorter"):
        launch(nothing, 1, 1, (1,))
    with pytest.raises(ValueError, match="at most 1024 threads"):
        launch(nothing, 1, 2048, (1, 1))


def test_shared_memory_is_limited() -> None:
    def make(cuda):
        def kernel():
            cuda.shared.array(12 * 1024, f32)
            cuda.shared.array(1, f32)

        return kernel

    with pytest.raises(SimulatorError, match="more than 49152 bytes"):
        launch(make, 1, 1, ())


def test_each_call_of_a_helper_has_a_shared_array_of_its_own() -> None:
    """As in what Numba makes of functions that it inlines."""

    def make(cuda):
        @P.dev
        def cell(value):
            array = cuda.shared.array(1, f32)
            if cuda.threadIdx.x == 0:
                array[0] = value
            return array

        def kernel(y):
            one = cell(f32(1))
            two = cell(f32(2))
            cuda.syncthreads()
            y[cuda.threadIdx.x] = one[0] + two[0]

        return kernel

    y = empty(4, f32)
    launch(make, 1, 4, (y,))
    assert y.tolist() == [3] * 4


def test_what_one_launch_wrote_another_may_read() -> None:
    def make_write(cuda):
        def write(y):
            y[cuda.threadIdx.x] = f32(1)

        return write

    def make_read(cuda):
        def read(y, z):
            z[cuda.threadIdx.x] = y[cuda.threadIdx.x]

        return read

    y, z = empty(4, f32), empty(4, f32)
    launch(make_write, 1, 3, (y,))
    launch(make_read, 1, 3, (y, z))
    assert y.unwritten.tolist() == z.unwritten.tolist() == [False, False, False, True]
    with pytest.raises(SimulatorError, match=r"uninitialised read of y\[3\]"):
        launch(make_read, 1, 4, (y, z))


def test_in_place_is_one_memory_and_races_can_be_left_out() -> None:
    def make(cuda):
        def kernel(x, y):
            t = cuda.threadIdx.x
            y[t] = x[t] + x[63 - t]

        return kernel

    x = np.ones(64, f32)
    with pytest.raises(SimulatorError, match="race"):
        launch(make, 1, 64, (x, x))
    assert x.tolist() == [1] * 64  # as it was
    launch(make, 1, 64, (x, x), races=False)
    assert sorted(set(x.tolist())) == [2, 3]


def test_an_exception_of_the_kernel_tells_the_thread() -> None:
    def make(cuda):
        def kernel():
            1 // (cuda.threadIdx.x - 5)

        return kernel

    with pytest.raises(ZeroDivisionError) as caught:
        launch(make, 1, 32, ())
    assert caught.value.__notes__ == ["in kernel, block 0 thread 5"]
