"""Runs CUDA kernels thread by thread and checks them: a GPU's stand-in for tests and for `gpu_check --dry`.

A kernel is made by a factory that is given the `cuda` module and the primitives P of an element type; here they are
`Cuda` and `primitives`. Every thread is a greenlet and runs until it meets a barrier, a shuffle or an atomic; which
warp of which block goes on then is drawn from the seed.

Integers are Python's, since Numba computes them in 64 bits; one that its buffer cannot hold is an error. Real numbers
are NumPy scalars, which round at every step. A constant like 0.5 is float64 in Numba, and makes float64 of what it
meets; NumPy would hide that, so it must stand in a call of its own: `float32(0.5)`.

**Order of memory.** An epoch is what lies between two barriers of a block. An access is ordered before another if

- one thread makes both, in this order, or
- both threads are of one block, and the other's epoch is later, or
- both are of one warp, and a `syncwarp` lies between (a shuffle orders nothing), or
- it is released and the other has acquired it: it comes before a `threadfence`, that before an atomic, that before an
  atomic on the same element, that before a `threadfence`, and that before the other access. Here "before" is within a
  thread or over a barrier, and between the atomics as it happened. So the last block may merge what all have written.

Two accesses to one element that are not ordered, of which one writes and not both are atomics, are a race. Nothing
needs to go wrong for that, so one seed finds nearly all.

**Found**, with kernel, block, thread, line, and address or barrier: races in shared and global memory; reads of what
was never written, in shared and local memory and in arrays made by `empty`; access out of bounds; vectors that do not
lie on 16 bytes; barriers and shuffles that a thread or lane misses, or meets elsewhere or with another argument;
deadlock, as a thread that reads the same elements for ever; floating-point atomics; real numbers that a store would
round, and float64 constants.

**Not found**: endless loops that read no memory; an integer that meets a float32, which makes float64 in Numba (the
compile check counts such instructions); one region of an array overrunning into the next; the errors of a device's
approximate functions.
"""

from __future__ import annotations

import contextvars
import dis
import functools
import inspect
import itertools
import linecache
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from greenlet import getcurrent, greenlet
from numpy.typing import NDArray

WARP = 32
ALL_LANES = 0xFFFFFFFF
SHARED_BYTES = 48 * 1024  # of static shared memory in a block
PATIENCE = 20_000  # reads of what a thread has just read, and atomics, until it counts as waiting for ever


class SimulatorError(RuntimeError):
    """A kernel did what a GPU does not forgive."""


class Problem(Exception):
    """What is wrong with an access, without its address."""


class Pointer(NamedTuple):
    """An argument that points to an element of a flat array, whose first element lies on 16 bytes."""

    array: NDArray[Any]
    offset: int = 0


class Fresh(np.ndarray[Any, Any]):
    """An array as `empty` makes it; `unwritten` tells which elements no kernel has written yet."""

    unwritten: NDArray[np.bool_] | None = None


def empty(size: int, dtype: Any) -> Fresh:
    """A flat array that no kernel may read before one has written to it; all its bits are ones (NaN, -1, 255)."""
    array: Fresh = np.full(size * np.dtype(dtype).itemsize, 255, np.uint8).view(dtype).view(Fresh)
    array.unwritten = np.ones(size, bool)
    return array


# ---- threads, and the order of what they do --------------------------------------------------------------------------


class Index(NamedTuple):
    """Of a block or thread, or the size of a grid or block."""

    x: int
    y: int

    def __str__(self) -> str:
        return f"({self.x}, {self.y})" if self.y else str(self.x)

    def all(self) -> list[Index]:
        return [Index(x, y) for y in range(self.y) for x in range(self.x)]


class Released(NamedTuple):
    """What an atomic tells of its block: accesses before this epoch, and those before this many fences of a thread."""

    serial: int
    epoch: int
    fences: tuple[int, ...]


Knowledge = dict["Block", Released]  # never changed once it is made
NOTHING: Knowledge = {}


def joined(*parts: Knowledge) -> Knowledge:
    """All that is known; of a block, what it released last."""
    whole: Knowledge = {}
    for part in parts:
        for block, released in part.items():
            whole[block] = max(released, whole.get(block, released))
    return whole


class Block:
    """A block of a grid, with its threads and its shared memory."""

    def __init__(self, grid: Grid, index: Index, run: Callable[[], None]) -> None:
        self.grid, self.index = grid, index
        self.shared: dict[Any, DevicePointer] = {}
        self.fenced = -1  # the last epoch before this one in which a thread fenced
        self.fences: tuple[int, ...] = (0,) * math.prod(grid.block)  # of each thread, before this epoch
        self.threads = [Thread(run, self, number, place) for number, place in enumerate(grid.block.all())]
        self.warps = [self.threads[i : i + WARP] for i in range(0, len(self.threads), WARP)]
        self.running = len(self.warps)  # that neither wait for the barrier nor have ended


class Wait(NamedTuple):
    """What a thread waits for; threads that wait for the same go on together."""

    operation: str
    mask: int | None = None
    argument: int = 0
    site: Any = None

    def __str__(self) -> str:
        return self.operation if self.mask is None else f"{self.operation}({self.mask:#x}, {self.argument})"


ENDED = Wait("its end")


class Thread(greenlet):
    """A thread, with what it waits for and its place in the order of memory."""

    def __init__(self, run: Callable[[], None], block: Block, number: int, index: Index) -> None:
        super().__init__(run)
        self.gr_context = contextvars.copy_context()  # where NumPy keeps its errstate
        self.block, self.number, self.index = block, number, index
        self.warp, self.lane = divmod(number, WARP)
        self.wait: Wait | None = None
        self.value: Any = None  # what it gives to a shuffle, and gets
        self.source = 0  # the lane that it gets it from
        self.epoch = self.syncs = self.fences = 0  # barriers, syncwarps and fences passed
        self.fenced = -1  # the epoch of its last fence
        self.pending = self.seen = NOTHING  # acquired; acquired and fenced
        self.repeats = 0
        self.stamp = Stamp(self)

    def pause(self, wait: Wait | None = None) -> Any:
        """Let others run, at least until what it waits for has come; what a shuffle gives."""
        self.wait = wait
        self.parent.switch()
        return self.value

    def repeat(self) -> None:
        self.repeats += 1
        if self.repeats > PATIENCE:
            raise Problem(f"deadlock: read and read again without end, {PATIENCE} times:")

    def __str__(self) -> str:
        return f"block {self.block.index} thread {self.index}"


class Stamp:
    """When a thread does something: the same until its next barrier, syncwarp or fence."""

    def __init__(self, thread: Thread) -> None:
        self.thread, self.block, self.warp = thread, thread.block, thread.warp
        self.epoch, self.syncs, self.fences, self.seen = thread.epoch, thread.syncs, thread.fences, thread.seen
        self.written = History(self)  # of what is written at this time, and not read since

    def follows(self, other: Stamp) -> bool:
        """Whether what was done at `other` is ordered before what is done now."""
        if other.thread is self.thread or not self.block.grid.races:
            return True
        if other.block is self.block and (
            other.epoch < self.epoch or (other.warp == self.warp and other.syncs < self.syncs)
        ):
            return True
        known = self.seen.get(other.block)
        return known is not None and (other.epoch < known.epoch or other.fences < known.fences[other.thread.number])


class History:
    """What happened to an element: its last write and the reads since then, linked from the last to the first.

    Elements of the same past share one. It remembers what it becomes by a read, so a check is made once for them all.
    """

    __slots__ = ("atomics", "becomes", "before", "earlier", "fresh", "reader", "write")

    def __init__(self, write: Stamp | None = None, *, fresh: bool = False) -> None:
        self.write, self.fresh = write, fresh
        self.reader: Stamp | None = None
        self.before: History | None = None
        self.becomes: dict[Stamp, History] = {}
        self.atomics = NOTHING  # what they released, if the last access was one
        self.earlier: History | None = None  # the atomic before that which is `write`

    def read(self, now: Stamp) -> History:
        """What this becomes by a read."""
        if self.reader is now:
            now.thread.repeat()
            return self
        after = self.becomes.get(now)
        if after is None:
            if self.fresh:
                raise Problem("uninitialised read of")
            if self.write is not None and not now.follows(self.write):
                raise Problem(f"race: unordered after a write by {self.write.thread}, a read of")
            self.after_atomics(now, "a read of")
            after = self.becomes[now] = History(self.write)
            after.reader, after.before, after.earlier = now, self, self.earlier
        return after

    def overwrite(self, now: Stamp) -> History:
        """What this becomes by a write, which must come after the last one and the reads since then."""
        if self.write is not None and not now.follows(self.write):
            raise Problem(f"race: unordered after a write by {self.write.thread}, a write of")
        past: History | None = self
        while past is not None and past.reader is not None:
            if not now.follows(past.reader):
                raise Problem(f"race: unordered after a read by {past.reader.thread}, a write of")
            past = past.before
        self.after_atomics(now, "a write of")
        return now.written

    def after_atomics(self, now: Stamp, what: str) -> None:
        """Refuse a plain access that does not come after all atomics, also where the last one is the thread's own. One
        behind a fence of its thread releases itself too."""
        past = self.earlier
        while past is not None and past.write is not None:
            block, known = past.write.block, now.seen.get(past.write.block)
            released = past.atomics[block]
            fenced = released.epoch >= 0 or released.fences[past.write.thread.number] > 0
            acquired = fenced and known is not None and known.serial >= released.serial
            if not (acquired or now.follows(past.write)):
                raise Problem(f"race: unordered after a write by {past.write.thread}, {what}")
            past = past.earlier

    def add(self, now: Stamp) -> History:
        """What this becomes by an atomic, which releases what its thread has fenced and acquires what others have."""
        thread, block = now.thread, now.block
        thread.repeat()
        if self.fresh:
            raise Problem("uninitialised read of")
        if not self.atomics:
            self.overwrite(now)
        after = History(now)
        fences = (*block.fences[: thread.number], thread.fences, *block.fences[thread.number + 1 :])
        released = Released(next(block.grid.serials), max(thread.fenced, block.fenced), fences)
        after.atomics = joined(self.atomics, thread.seen, {block: released})
        after.earlier = self if self.atomics and self.write is not now else self.earlier
        thread.pending = joined(thread.pending, self.atomics)
        return after


def error(what: object, thread: Thread | None = None) -> SimulatorError:
    """The error with its place: of the thread that runs, or of one that waits."""
    frame = thread.gr_frame if thread else sys._getframe()
    thread = thread or getcurrent()
    return SimulatorError(f"{what} ({thread.block.grid.kernel}, {thread}, {line_of(frame)})")


def line_of(frame: FrameType | None) -> str:
    """The kernel's line: that of the innermost frame which is not in this file."""
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    if frame is None:
        return "at its end"
    file = frame.f_code.co_filename
    return f"{os.path.basename(file)}:{frame.f_lineno}: {linecache.getline(file, frame.f_lineno).strip()}"


# ---- memory ----------------------------------------------------------------------------------------------------------


class DevicePointer:
    """Points into global or shared memory, whose elements are `values` and their histories `past`.

    Half types are there as their bits.
    """

    def __init__(self, name: str, dtype: Any, values: list[Any], past: list[History], start: int = 0) -> None:
        self.name, self.dtype, self.values, self.past, self.start = name, np.dtype(dtype), values, past, start
        self.type = self.dtype.type
        self.off = start * self.dtype.itemsize % 16  # bytes from where a vector may lie

    def touch(self, i: int, count: int, element: Any, becomes: Callable[[History, Stamp], History]) -> slice:
        """Check and note an access to elements i to i + count of this type; where they are in `values`."""
        begin = self.start + i
        where = slice(begin, begin + count)
        past, now = self.past[where], getcurrent().stamp
        try:
            if not (self.start <= begin and begin + count <= len(self.past)):
                raise Problem(f"out of bounds, from 0 to {len(self.past) - self.start}:")
            if self.type is not element:
                raise Problem(f"{self.dtype} accessed as {np.dtype(element)}:")
            if count > 1 and self.off:
                raise Problem(f"misaligned vector, {self.off} bytes off:")
            if past.count(past[0]) == count:
                self.past[where] = [becomes(past[0], now)] * count
            else:
                self.past[where] = [becomes(each, now) for each in past]
        except Problem as problem:
            raise error(f"{problem} {self.name}[{i}{f':{i + count}' if count > 1 else ''}]") from None
        return where

    def __getitem__(self, i: int) -> Any:
        return self.values[self.touch(i, 1, self.type, History.read)][0]

    def __setitem__(self, i: int, value: Any) -> None:
        self.values[self.touch(i, 1, self.type, History.overwrite)] = [exact(value, self.dtype)]


class Local(dict[int, Any]):
    """An array of one thread. A dict, which is read at the speed of C and tells what is not there."""

    def __init__(self, size: int, dtype: Any) -> None:
        self.size, self.dtype = size, np.dtype(dtype)
        self.type = self.dtype.type

    def __missing__(self, i: int) -> Any:
        raise error(f"uninitialised read of local[{i}]" if 0 <= i < self.size else self.outside(i))

    def __setitem__(self, i: int, value: Any) -> None:
        if not 0 <= i < self.size:
            raise error(self.outside(i))
        dict.__setitem__(self, i, value if value.__class__ is self.type else exact(value, self.dtype))

    def vector(self, begin: int, count: int, real: Any) -> range:
        """The indices that a vector load fills, or a vector store reads."""
        if not 0 <= begin <= self.size - count:
            raise error(self.outside(f"{begin}:{begin + count}"))
        if self.type is not real:
            raise error(f"{self.dtype} accessed as {np.dtype(real)}: local[{begin}:{begin + count}]")
        return range(begin, begin + count)

    def outside(self, i: object) -> str:
        return f"out of bounds, from 0 to {self.size}: local[{i}]"


def exact(value: Any, dtype: np.dtype[Any]) -> Any:
    """The value as memory of this type holds it: no real number is rounded for that, and no integer cut."""
    if isinstance(value, int | np.integer | np.bool_):
        if dtype.kind == "f":
            return dtype.type(value)
        if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            return int(value)
    elif dtype.kind == "f" and np.dtype(type(value)).itemsize <= dtype.itemsize:
        return dtype.type(value)
    raise error(f"{np.dtype(type(value))} {value} does not fit {dtype}")


# ---- the cuda module and the launch ----------------------------------------------------------------------------------


class Cuda:
    """The `cuda` module that factories are given."""

    def __init__(self, grid: Index, block: Index) -> None:
        self.gridDim, self.blockDim = grid, block
        self.shared = SimpleNamespace(array=self._shared_array)
        self.local = SimpleNamespace(array=Local)
        self.atomic = SimpleNamespace(add=self._atomic_add)

    threadIdx = property(lambda self: getcurrent().index)
    blockIdx = property(lambda self: getcurrent().block.index)

    def syncthreads(self) -> None:
        getcurrent().pause(Wait("syncthreads", site=site()))

    def syncwarp(self, mask: int = ALL_LANES) -> None:
        self._shuffle(Wait("syncwarp", mask, site=site()), None, getcurrent().lane)

    def shfl_sync(self, mask: int, value: Any, lane: int) -> Any:
        """The value of a lane, which each may choose."""
        return self._shuffle(Wait("shfl_sync", mask, site=site()), value, lane % WARP)

    def shfl_xor_sync(self, mask: int, value: Any, k: int) -> Any:
        return self._shuffle(Wait("shfl_xor_sync", mask, k, site()), value, getcurrent().lane ^ k)

    def shfl_down_sync(self, mask: int, value: Any, k: int) -> Any:
        lane = getcurrent().lane
        return self._shuffle(Wait("shfl_down_sync", mask, k, site()), value, lane + k if lane + k < WARP else lane)

    def _shuffle(self, wait: Wait, value: Any, source: int) -> Any:
        thread = getcurrent()
        thread.value, thread.source = value, source
        return thread.pause(wait)

    def threadfence(self) -> None:
        thread = getcurrent()
        thread.fences += 1
        thread.fenced = thread.epoch
        thread.seen = thread.pending
        thread.stamp = Stamp(thread)

    def threadfence_block(self) -> None:
        """Orders nothing that barriers do not order."""

    def _atomic_add(self, pointer: DevicePointer, i: int, value: int) -> Any:
        """Add to an element, and give what it was. Others may come first, on whom sums of floats would depend."""
        if pointer.dtype.kind == "f":
            raise error(f"floating-point atomic: {pointer.name}[{i}] of {pointer.dtype}")
        thread = getcurrent()
        thread.pause()
        where = pointer.touch(i, 1, pointer.type, History.add)
        old = pointer.values[where][0]
        pointer.values[where] = [exact(old + value, pointer.dtype)]
        return old

    def _shared_array(self, size: int, dtype: Any) -> DevicePointer:
        """The array of this call, one for all threads of the block."""
        shared: dict[Any, DevicePointer] = getcurrent().block.shared
        key = site()
        if key not in shared:  # named as by the line, such as "rows.py:31: slots = cuda.shared.array(...)"
            name = f"shared {line_of(sys._getframe()).partition(' = ')[0].rpartition(' ')[2]}"
            shared[key] = DevicePointer(name, dtype, [None] * size, [History(fresh=True)] * size)
            if sum(len(each.values) * each.dtype.itemsize for each in shared.values()) > SHARED_BYTES:
                raise error(f"more than {SHARED_BYTES} bytes of static shared memory")
        return shared[key]


def site() -> tuple[Any, ...]:
    """Which call of the kernel it is that called the caller, with all calls of helpers on the way: Numba inlines these,
    and each call has barriers and shared arrays of its own."""
    frame: FrameType | None = sys._getframe(2)
    found: list[Any] = []
    while frame is not None:
        found += frame.f_code, frame.f_lasti
        frame = frame.f_back
    return tuple(found)


class Grid:
    """A launch: which threads run, and which may go on."""

    def __init__(self, kernel: str, grid: Index, block: Index, seed: int, races: bool) -> None:
        self.kernel, self.grid, self.block, self.races = kernel, grid, block, races
        self.random = random.Random(seed)
        self.serials = itertools.count()  # of atomics

    def run(self, body: Callable[[], None], resident: bool) -> None:
        order = self.grid.all()
        self.random.shuffle(order)
        for indices in [order] if resident else [[index] for index in order]:
            ready = [warp for index in indices for warp in Block(self, index, body).warps]
            while ready:
                n = self.random.randrange(len(ready))
                for thread in ready[n]:
                    if thread.wait is None:
                        self.resume(thread)
                if self.settle(ready[n]):
                    continue
                ready[n], ready[-1] = ready[-1], ready[n]
                block = ready.pop()[0].block
                block.running -= 1
                if block.running == 0:
                    ready += self.release(block)

    def resume(self, thread: Thread) -> None:
        try:
            thread.switch()
        except SimulatorError:
            raise
        except Exception as exception:
            exception.add_note(f"in {self.kernel}, {thread}")
            raise
        if thread.dead:
            thread.wait = ENDED

    def settle(self, warp: list[Thread]) -> bool:
        """Complete a shuffle or syncwarp that all its lanes have reached; whether a lane of the warp can run."""
        if any(thread.wait is None for thread in warp):
            return True
        for thread in warp:
            wait = thread.wait
            if wait is None or wait.mask is None:
                continue
            lanes = [each for each in warp if wait.mask >> each.lane & 1]
            if thread not in lanes:
                raise error(f"divergent {wait}: its own lane is not in the mask", thread)
            agree(lanes, thread)
            values = {each.lane: each.value for each in lanes}
            for each in lanes:
                if each.source not in values:
                    raise error(f"divergent {wait}: lane {each.source}, whose value it takes, has no part in it", each)
                each.value = values[each.source]
            meet(lanes, syncs=int(wait.operation == "syncwarp"))
            return True
        return False

    def release(self, block: Block) -> list[list[Thread]]:
        """Let the threads pass the barrier, unless they have ended; the warps that go on."""
        waiting = next((thread for thread in block.threads if thread.wait is not ENDED), None)
        if waiting is None:
            return []
        agree(block.threads, waiting)
        block.fenced = max(thread.fenced for thread in block.threads)
        block.fences = tuple(thread.fences for thread in block.threads)
        meet(block.threads, epochs=1)
        block.running = len(block.warps)
        return block.warps


def agree(group: list[Thread], thread: Thread) -> None:
    """Refuse that one of the group does not wait for what the thread waits for."""
    odd = next((each for each in group if each.wait != thread.wait), None)
    if odd is not None:
        does = "has ended" if odd.wait is ENDED else f"is at {odd.wait}, {line_of(odd.gr_frame)}"
        raise error(f"divergent {thread.wait}: {odd} {does}", thread)


def meet(threads: list[Thread], *, epochs: int = 0, syncs: int = 0) -> None:
    """Let threads go on, which know now what one of them knew, if this orders memory."""
    ordered = epochs or syncs
    if ordered and any(thread.pending for thread in threads):
        pending = joined(*(thread.pending for thread in threads))
        seen = joined(*(thread.seen for thread in threads))
        for thread in threads:
            thread.pending, thread.seen = pending, seen
    for thread in threads:
        thread.wait, thread.repeats = None, 0
        if ordered:
            thread.epoch += epochs
            thread.syncs += syncs
            thread.stamp = Stamp(thread)


def launch(
    factory: Callable[[Any], Callable[..., None]],
    grid: int | tuple[int, int],
    block: int | tuple[int, int],
    args: Sequence[Any],
    *,
    seed: int = 0,
    races: bool = True,
    resident: bool = False,
) -> None:
    """Run the kernel that ``factory(cuda)`` makes.

    Parameters
    ----------
    factory
        Makes the kernel from a `cuda` module.
    grid, block
        Blocks in the grid and threads in a block: x, or x and y.
    args
        What the kernel is given: pointers for C-contiguous arrays (to 16 bits for float16 and bfloat16) and for each
        `Pointer`; integers; NumPy floats; None, which points nowhere. An array given twice is one memory.
    seed
        Draws the order of blocks and warps.
    races
        Look for races.
    resident
        Run all blocks at once, rather than one after the other.

    Raises
    ------
    SimulatorError
        For what the module lists as found. The arrays are as they were.
    TypeError, ValueError
        For an argument that is none of these.
    """
    blocks, threads = (Index(*size) if isinstance(size, tuple) else Index(size, 1) for size in (grid, block))
    if min(*blocks, *threads) < 1 or math.prod(threads) > 1024:
        raise ValueError(f"grid, block: at least 1 and at most 1024 threads a block expected, got {grid}, {block}")
    kernel = factory(Cuda(blocks, threads))
    check_constants(kernel)
    memories: dict[int, tuple[NDArray[Any], DevicePointer]] = {}
    names = inspect.signature(kernel).parameters
    given = [argument(name, value, memories) for name, value in zip(names, args, strict=True)]
    with np.errstate(all="ignore"):
        Grid(kernel.__name__, blocks, threads, seed, races).run(functools.partial(kernel, *given), resident)
    for array, memory in memories.values():
        written = np.array([past.write is not None for past in memory.past], bool)
        if written.any():
            bits_of(array)[written] = np.array(memory.values, memory.dtype)[written]
        if isinstance(array, Fresh) and array.unwritten is not None:
            array.unwritten &= ~written


def argument(name: str, value: Any, memories: dict[int, tuple[NDArray[Any], DevicePointer]]) -> Any:
    """What a kernel is given for it; `memories` are those of the arrays so far, by their id."""
    if value is None or isinstance(value, np.floating):
        return value
    if isinstance(value, int | np.integer | np.bool_):
        return int(value)
    array, offset = value if isinstance(value, Pointer) else (value, 0)
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: an array, a Pointer, an integer, a NumPy float or None expected, got {type(value)}")
    if not array.flags.c_contiguous or not 0 <= offset <= array.size:
        raise ValueError(f"{name}: C-contiguous with an offset in it expected, got {array.strides}, {offset}")
    if id(array) not in memories:
        if any(np.may_share_memory(array, other) for other, _ in memories.values()):
            raise ValueError(f"{name}: overlaps another argument; give the same array, and offsets as Pointer")
        bits = bits_of(array)
        initial, fresh = History(), History(fresh=True)
        unwritten = getattr(array, "unwritten", None)
        past = [initial] * array.size if unwritten is None else [fresh if each else initial for each in unwritten]
        values = list(bits) if bits.dtype.kind == "f" else bits.tolist()
        memories[id(array)] = array, DevicePointer(name, bits.dtype, values, past)
    memory = memories[id(array)][1]
    return DevicePointer(name, memory.dtype, memory.values, memory.past, offset)


def bits_of(array: NDArray[Any]) -> NDArray[Any]:
    """A flat view of the array as it lies in memory: half types as uint16, bool as uint8."""
    flat = np.asarray(array).reshape(-1)
    return flat.view({1: np.uint8, 2: np.uint16}.get(flat.dtype.itemsize, flat.dtype))


def check_constants(function: Any) -> None:
    """Refuse a Python float in a kernel's arithmetic, which Numba would do in float64."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    known = {**function.__globals__, **{name: cell.cell_contents for name, cell in cells}}
    instructions = list(dis.get_instructions(function))
    owner: Any = None  # of an attribute, such as `math`
    for this, following in zip(instructions, [*instructions[1:], instructions[-1]], strict=True):
        named = this.opname in ("LOAD_DEREF", "LOAD_GLOBAL")
        value = known.get(this.argval) if named else this.argval if this.opcode in dis.hasconst else None
        if this.opname == "LOAD_ATTR" and inspect.ismodule(owner):
            value = getattr(owner, this.argval, None)
        owner = value
        converted = following.opname in ("PRECALL", "CALL") and following.arg == 1
        if any(type(each) is float for each in (value if type(value) is tuple else [value])) and not converted:
            place = f"{os.path.basename(function.__code__.co_filename)}:{this.positions and this.positions.lineno}"
            raise SimulatorError(f"float64 constant {value}, outside of float32() ({function.__name__}, {place})")


# ---- primitives ------------------------------------------------------------------------------------------------------


def decode(words: NDArray[np.uint16], kind: str) -> NDArray[np.float32]:
    """float16 or bfloat16 as float32."""
    if kind == "float16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << 16).view(np.float32)


def encode(values: NDArray[np.float32], kind: str) -> NDArray[np.uint16]:
    """float32 as float16 or bfloat16, to nearest, ties to even."""
    if kind == "float16":
        return values.astype(np.float16).view(np.uint16)
    words = values.view(np.uint32)
    rounded = (words + 0x7FFF + (words >> 16 & 1) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


@functools.cache
def primitives(kind: str) -> Any:
    """The primitives P of "float32", "float64", "float16" or "bfloat16".

    Vectors are V elements in 16 bytes, and lie on 16 bytes. Half types are computed in float32.

    - ``P.ld(pointer, k, array, begin)``: local ``array[begin : begin + V]`` = the k-th vector behind the pointer
    - ``P.st(pointer, k, array, begin)``: the k-th vector = ``array[begin : begin + V]``
    - ``P.ld1(pointer, i)``, ``P.st1(pointer, i, value)``: the i-th element, which may lie anywhere
    - ``P.rsqrt, exp, tanh, erf, sqrt, fma``, and ``P.maximum, minimum``, which prefer a number to NaN
    - ``P.fdiv``: the quotient; 0 where a float32 divisor is beyond 2^126, as by the device's fast division
    - ``P.dev``: decorates functions that kernels call
    """
    half = kind in ("float16", "bfloat16")
    real: Any = np.float64 if kind == "float64" else np.float32
    element = np.uint16 if half else real
    size = 16 // np.dtype(element).itemsize
    decoded = list(decode(np.arange(2**16, dtype=np.uint16), kind)) if half else []

    def ld(pointer: DevicePointer, k: int, array: Local, begin: int) -> None:
        values = pointer.values[pointer.touch(k * size, size, element, History.read)]
        dict.update(array, zip(array.vector(begin, size, real), [decoded[v] for v in values] if half else values))

    def st(pointer: DevicePointer, k: int, array: Local, begin: int) -> None:
        values = [array[i] for i in array.vector(begin, size, real)]
        where = pointer.touch(k * size, size, element, History.overwrite)
        pointer.values[where] = encode(np.array(values), kind).tolist() if half else values

    def ld1(pointer: DevicePointer, i: int) -> Any:
        value = pointer.values[pointer.touch(i, 1, element, History.read)][0]
        return decoded[value] if half else value

    def st1(pointer: DevicePointer, i: int, value: Any) -> None:
        value = exact(value, np.dtype(real))
        where = pointer.touch(i, 1, element, History.overwrite)
        pointer.values[where] = encode(np.array([value]), kind).tolist() if half else [value]

    def fdiv(a: Any, b: Any) -> Any:
        return a / b if real is np.float64 or not 2.0**126 < abs(b) < np.inf else a * real(0)

    def fma(a: Any, b: Any, c: Any) -> Any:
        if real is np.float32:  # the product is exact; rounding the sum twice can differ at ties
            return real(float(a) * float(b) + float(c))
        finite = np.isfinite([a, b, c]).all()
        return real(Fraction(a) * Fraction(b) + Fraction(c)) if finite else a * b + c

    def dev(function: Any) -> Any:
        check_constants(function)
        return function

    def function(compute: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *values: real(compute(*map(real, values)))

    functions: dict[str, Callable[..., Any]] = {"rsqrt": lambda x: 1 / np.sqrt(x), "erf": math.erf}
    functions |= {"exp": np.exp, "tanh": np.tanh, "sqrt": np.sqrt, "maximum": np.fmax, "minimum": np.fmin}
    return SimpleNamespace(
        V=size, ld=ld, st=st, ld1=ld1, st1=st1, fdiv=fdiv, fma=fma, dev=dev,
        **{name: function(compute) for name, compute in functions.items()},
    )  # fmt: skip
