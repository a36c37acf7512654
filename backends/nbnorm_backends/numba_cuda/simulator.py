"""CUDA kernels run thread by thread, and checked: what stands in for a GPU in tests and in `gpu_check --dry`.

A kernel is made by a factory that is given the `cuda` module and the primitives P of an element type; `launch` gives it
`Cuda`, which offers what kernels here use of `numba.cuda`, and `primitives` P. Every thread is a greenlet that runs until
it meets a barrier, a shuffle or an atomic; which warp of which block goes on then, is drawn from the seed.

Numbers are Numba's. Integers read from memory, indices and sizes are Python integers, as Numba's are 64 bits wide; what
an integer buffer cannot hold is an error. Real numbers are NumPy scalars, which round at every step. In Numba a constant
like 0.5 is a float64 and makes float64 of what it meets, in NumPy it does not: so it must stand in a call of its own,
such as `float32(0.5)`.

**Order of memory.** An epoch is what lies between two barriers of a block. An access is ordered before another one if

- the same thread makes both, in this order, or
- both threads are of one block, and the other one's epoch is later, or
- both are of one warp, and a `syncwarp` lies between (a shuffle orders nothing), or
- it is released and the other one has acquired it: `threadfence` and then an atomic, by the thread itself or with
  barriers on the way, and after that an atomic on the same cell and then `threadfence`, with barriers or without. This is
  the order of "the last block merges".

Two accesses of a cell that are not ordered, of which one writes and one is no atomic, are a race. It does not need to
happen: that nothing orders them is enough, so one order of warps finds nearly all. Cells are elements, so neighbours in
one word do not race.

**Found**, with the kernel, block, thread, line and address: races in shared and global memory; reads of what was never
written, in shared and local memory and in arrays made by `empty`; access outside of an array; vectors that do not lie on
16 bytes; barriers and shuffles that a thread of the block, a lane of the mask, misses or meets elsewhere or with other
arguments; deadlock, as a thread that reads the same cells without end; float64 where float32 is meant.

**Not found**: a loop without end that reads no memory; what the hardware may reorder within one thread; an integer times
a float32, which Numba computes in float64 (the compile check counts float64 instructions); errors of the approximate
functions of the device; limits of registers. Outside of a launch, arrays are NumPy's and nothing is checked.
"""

from __future__ import annotations

import contextvars
import copy
import dis
import functools
import inspect
import itertools
import linecache
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from greenlet import getcurrent, greenlet
from numpy.typing import NDArray

WARP = 32
SHARED_BYTES = 48 * 1024  # of static shared memory in a block
PATIENCE = 50_000  # reads of what a thread has read already, and atomics, until it counts as waiting for ever


class SimulatorError(RuntimeError):
    """A kernel did what a GPU would not forgive. The message names kernel, block, thread, line and address or barrier."""


class Dim3(NamedTuple):
    """An index or a size."""

    x: int
    y: int
    z: int


class Fresh(np.ndarray[Any, Any]):
    """A flat array as `empty` makes it; `unwritten` tells which elements no kernel has written yet."""

    unwritten: NDArray[np.bool_] | None = None


def empty(size: int, dtype: Any) -> Fresh:
    """A flat array of all ones in its bits (NaN, -1, 255), whose elements no kernel may read before one has written."""
    array = np.full(size * np.dtype(dtype).itemsize, 255, np.uint8).view(dtype).view(Fresh)
    array.unwritten = np.ones(size, bool)
    return array


class Pointer(NamedTuple):
    """An argument that points to the element `offset` of a flat array, whose first one lies on 16 bytes."""

    array: NDArray[Any]
    offset: int = 0


# --- threads and the order of their accesses ---


class Problem(Exception):
    """What is wrong, without the place."""


class Block:
    """A block of threads and its shared memory."""

    def __init__(self, index: Dim3, size: Dim3, races: bool) -> None:
        self.index, self.races = index, races
        self.shared: dict[Any, DevicePointer] = {}
        self.fenced = -1  # the last epoch before this one in which a thread fenced
        self.threads = [Thread(self, number, place) for number, place in enumerate(indices(size))]
        self.warps = [self.threads[i : i + WARP] for i in range(0, len(self.threads), WARP)]
        self.running = len(self.warps)  # that do not wait for the barrier


class Released(NamedTuple):
    """What an atomic tells of its block: accesses before the epoch, and those before each thread's last fence."""

    serial: int
    epoch: int
    fences: tuple[int, ...]


Knowledge = dict[Block, Released]  # never changed once it is made


def joined(*parts: Knowledge) -> Knowledge:
    whole: Knowledge = {}
    for part in parts:
        for block, released in part.items():
            whole[block] = max(released, whole.get(block, released))
    return whole


class Wait(NamedTuple):
    """What a thread waits for; those that wait for the same go on together."""

    operation: str
    mask: int = 0
    argument: int = 0
    site: Any = None


ENDED = Wait("end")


class Thread:
    """A thread: what it waits for, and its place in the order of memory."""

    def __init__(self, block: Block, number: int, index: Dim3) -> None:
        self.block, self.number, self.index = block, number, index
        self.lane = number % WARP
        self.greenlet: Any = None
        self.wait: Wait | None = None
        self.value: Any = None  # what it gives to a shuffle, and gets
        self.source = 0  # the lane that it gets that from
        self.epoch = self.syncs = self.fences = 0  # barriers, syncwarps and fences passed
        self.fenced = -1  # the epoch of its last fence
        self.seen: Knowledge = {}  # acquired, and fenced
        self.pending: Knowledge = {}  # acquired
        self.repeats = 0  # of reads and atomics since it has met others
        self.stamp = Stamp(self, 0)

    def advance(self) -> None:
        self.stamp = Stamp(self, self.fences)

    def __str__(self) -> str:
        return f"block {label(self.block.index)} thread {label(self.index)}"


class Stamp:
    """When a thread makes an access: the same until its next barrier, syncwarp or fence."""

    def __init__(self, thread: Thread, fences: int) -> None:
        self.thread, self.block, self.warp = thread, thread.block, thread.number // WARP
        self.epoch, self.syncs, self.fences, self.seen = thread.epoch, thread.syncs, fences, thread.seen
        self.written = History(self)  # of cells written at this time, and not read yet

    def follows(self, other: Stamp) -> bool:
        """Whether what happened at `other` is ordered before what happens now."""
        if other.thread is self.thread or not self.block.races:
            return True
        if other.block is self.block:
            if other.epoch < self.epoch or (other.warp == self.warp and other.syncs < self.syncs):
                return True
        known = self.seen.get(other.block)
        return known is not None and (other.epoch < known.epoch or other.fences < known.fences[other.thread.number])


class History:
    """What happened to a cell: its last write, and the reads since then, as a list from the last to the first.

    Cells with the same past share one, and it remembers what it becomes by a read: each check is made once for all.
    """

    __slots__ = ("atomics", "becomes", "before", "fresh", "reader", "write")

    def __init__(self, write: Stamp | None = None, *, fresh: bool = False) -> None:
        self.write, self.fresh = write, fresh
        self.reader: Stamp | None = None
        self.before: History | None = None
        self.becomes: dict[Stamp, History] = {}
        self.atomics: Knowledge | None = None  # what was released by the atomics that wrote it last

    def read(self, now: Stamp) -> History:
        """The cell's history after a read."""
        if self.reader is now:
            now.thread.repeats += 1
            if now.thread.repeats > PATIENCE:
                raise Problem(f"deadlock: {PATIENCE} reads without a barrier of the same cells, the last of")
            return self
        follower = self.becomes.get(now)
        if follower is None:
            if self.fresh:
                raise Problem("uninitialised read of")
            if self.write is not None and not now.follows(self.write):
                raise Problem(f"race: {self.write.thread} wrote, and this reads, with nothing to order them,")
            follower = self.becomes[now] = History(self.write)
            follower.reader, follower.before, follower.atomics = now, self, self.atomics
        return follower

    def check_write(self, now: Stamp, *, atomic: bool = False) -> None:
        """Refuse a write that is not ordered after the last write and the reads since then."""
        if self.write is not None and not now.follows(self.write) and not (atomic and self.atomics is not None):
            raise Problem(f"race: {self.write.thread} wrote, and this writes, with nothing to order them,")
        past: History | None = self
        while past is not None and past.reader is not None:
            if not now.follows(past.reader):
                raise Problem(f"race: {past.reader.thread} read, and this writes, with nothing to order them,")
            past = past.before


# --- memory ---


class DevicePointer:
    """Elements of global or shared memory, from `start` on; half types are there as their bits."""

    def __init__(self, launch: Launch, name: str, array: NDArray[Any], past: list[History], start: int = 0) -> None:
        self.launch, self.name, self.dtype, self.past, self.start = launch, name, array.dtype, past, start
        self.values: list[Any] = list(array) if self.dtype.kind == "f" else array.tolist()

    def at(self, name: str, start: int) -> DevicePointer:
        """Another pointer into the same memory."""
        other = copy.copy(self)
        other.name, other.start = name, start
        return other

    def read(self, i: int, count: int = 1) -> list[Any]:
        """Elements i to i + count."""
        place = self.place(i, count)
        past = self.past[place : place + count]
        now = self.launch.thread.stamp
        try:
            if past.count(past[0]) == count:
                self.past[place : place + count] = [past[0].read(now)] * count
            else:
                self.past[place : place + count] = [cell.read(now) for cell in past]
        except Problem as problem:
            raise self.error(problem, i, count) from None
        return self.values[place : place + count]

    def write(self, i: int, values: list[Any]) -> None:
        """Elements from i on = values, which are of the type that this memory holds."""
        count = len(values)
        place = self.place(i, count)
        now = self.launch.thread.stamp
        try:
            for cell in dict.fromkeys(self.past[place : place + count]):
                cell.check_write(now)
        except Problem as problem:
            raise self.error(problem, i, count) from None
        self.past[place : place + count] = [now.written] * count
        self.values[place : place + count] = values

    def place(self, i: int, count: int) -> int:
        """Where element i is in the lists, with room for `count`."""
        if not 0 <= i <= len(self.past) - self.start - count:
            raise self.error(f"out of bounds (0 to {len(self.past) - self.start}):", i, count)
        return self.start + i

    def vector(self, dtype: Any, i: int, count: int) -> None:
        """Refuse a vector of another type, or one that does not lie on 16 bytes."""
        self.check_type(dtype, i, count)
        if self.start * self.dtype.itemsize % 16:
            raise self.error(f"misaligned vector, {self.start * self.dtype.itemsize % 16} bytes past 16:", i, count)

    def check_type(self, dtype: Any, i: int, count: int = 1) -> None:
        if self.dtype != dtype:
            raise self.error(f"{np.dtype(dtype)} expected, {self.dtype} found:", i, count)

    def error(self, what: object, i: int, count: int = 1) -> SimulatorError:
        return self.launch.error(f"{what} {self.name}[{i}{f':{i + count}' if count > 1 else ''}]")

    def __getitem__(self, i: int) -> Any:
        if self.dtype == np.uint16:
            raise self.error("half types are read by P.ld and P.ld1:", i)
        return self.read(i)[0]

    def __setitem__(self, i: int, value: Any) -> None:
        if self.dtype == np.uint16:
            raise self.error("half types are written by P.st and P.st1:", i)
        try:
            self.write(i, [exact(value, self.dtype)])
        except Problem as problem:
            raise self.error(problem, i) from None


class Local(dict[int, Any]):
    """An array of one thread. A dict, since that tells what is missing, and is read at the speed of C."""

    def __init__(self, launch: Launch, size: int, dtype: Any) -> None:
        self.launch, self.size, self.dtype = launch, size, np.dtype(dtype)

    def __missing__(self, i: int) -> Any:
        inside = 0 <= i < self.size
        raise self.launch.error(f"{'uninitialised read' if inside else self._outside()} of local[{i}]")

    def __setitem__(self, i: int, value: Any) -> None:
        if not 0 <= i < self.size:
            raise self.launch.error(f"{self._outside()} of local[{i}]")
        if value.__class__ is not self.dtype.type:
            try:
                value = exact(value, self.dtype)
            except Problem as problem:
                raise self.launch.error(f"{problem} local[{i}]") from None
        dict.__setitem__(self, i, value)

    def vector(self, dtype: Any, offset: int, count: int) -> range:
        """The indices of a vector that P.ld writes or P.st reads."""
        if self.dtype != dtype:
            raise self.launch.error(f"{np.dtype(dtype)} expected, {self.dtype} found: local[{offset}:{offset + count}]")
        if not 0 <= offset <= self.size - count:
            raise self.launch.error(f"{self._outside()} of local[{offset}:{offset + count}]")
        return range(offset, offset + count)

    def _outside(self) -> str:
        return f"access out of bounds (0 to {self.size})"


def exact(value: Any, dtype: np.dtype[Any]) -> Any:
    """The value as memory of this type holds it; a real number must not be rounded for that, an integer not cut."""
    if isinstance(value, int | np.integer | np.bool_):
        if dtype.kind == "f":
            return dtype.type(value)
        if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            return int(value)
    elif dtype.kind == "f" and np.dtype(type(value)).itemsize <= dtype.itemsize:
        return dtype.type(value)
    raise Problem(f"{type(value).__name__} {value} does not fit {dtype}:")


# --- the launch ---


class Launch:
    """A grid on its way: which thread runs, and which may go on."""

    def __init__(self, grid: Dim3, block: Dim3, seed: int, races: bool) -> None:
        self.grid, self.block, self.races = grid, block, races
        self.random = random.Random(seed)
        self.hub = getcurrent()
        self.serials = itertools.count(1)
        self.kernel = ""
        self.thread: Thread  # the one that runs
        self.fresh, self.initial = History(fresh=True), History()

    def run(self, kernel: Callable[..., None], args: list[Any], resident: bool) -> None:
        """Run every block, one after the other or all at once."""
        order = list(indices(self.grid))
        self.random.shuffle(order)
        for together in [order] if resident else [[index] for index in order]:
            blocks = [Block(index, self.block, self.races) for index in together]
            for thread in (thread for block in blocks for thread in block.threads):
                thread.greenlet = greenlet(functools.partial(kernel, *args))
                thread.greenlet.gr_context = contextvars.copy_context()  # where NumPy keeps its errstate
            ready = [warp for block in blocks for warp in block.warps]
            while ready:
                n = self.random.randrange(len(ready))
                for thread in ready[n]:
                    if thread.wait is None:
                        self._resume(thread)
                if self._settle(ready[n]):
                    continue
                block = ready[n][0].block
                ready[n] = ready[-1]
                ready.pop()
                block.running -= 1
                if block.running == 0:
                    ready += self._release(block)

    def _resume(self, thread: Thread) -> None:
        self.thread = thread
        try:
            thread.greenlet.switch()
        except SimulatorError:
            raise
        except Exception as error:
            error.add_note(f"in {self.kernel}, {thread}")
            raise
        if thread.greenlet.dead:
            thread.wait = ENDED

    def _settle(self, warp: list[Thread]) -> bool:
        """Whether a lane of the warp can run, perhaps because a shuffle or syncwarp is complete now."""
        if any(thread.wait is None for thread in warp):
            return True
        for thread in warp:
            if thread.wait in (ENDED, None) or thread.wait.operation == "syncthreads":
                continue
            lanes = [other for other in warp if thread.wait.mask >> other.lane & 1]
            if thread not in lanes:
                raise self.error(
                    f"{thread.wait.operation} without its own lane in the mask {thread.wait.mask:#x}", thread
                )
            self._agree(lanes, thread)
            self._exchange(lanes)
            return True
        return False

    def _release(self, block: Block) -> list[list[Thread]]:
        """Let all threads pass the barrier, if they have not all ended; the warps that go on."""
        waiting = next((thread for thread in block.threads if thread.wait is not ENDED), None)
        if waiting is None:
            return []
        self._agree(block.threads, waiting)
        block.fenced = max(thread.fenced for thread in block.threads)
        self._meet(block.threads)
        for thread in block.threads:
            thread.epoch += 1
            thread.advance()
        block.running = len(block.warps)
        return block.warps

    def _agree(self, group: list[Thread], thread: Thread) -> None:
        """Refuse that one of the group does not wait for what the thread waits for."""
        odd = next((other for other in group if other.wait != thread.wait), None)
        if odd is None or thread.wait is None or odd.wait is None:
            return
        does = "has ended" if odd.wait is ENDED else f"is at {odd.wait} in {place(odd.greenlet.gr_frame)}"
        raise self.error(f"divergent {thread.wait}: {odd} {does}", thread)

    def _exchange(self, lanes: list[Thread]) -> None:
        """Complete a shuffle or syncwarp."""
        if lanes[0].wait is not None and lanes[0].wait.operation == "syncwarp":
            self._meet(lanes)
            for thread in lanes:
                thread.syncs += 1
                thread.advance()
            return
        values = {thread.lane: thread.value for thread in lanes}
        for thread in lanes:
            if thread.source not in values:
                raise self.error(f"{thread.wait} from lane {thread.source}, which takes no part", thread)
            thread.value = values[thread.source]
            thread.wait, thread.repeats = None, 0

    def _meet(self, threads: list[Thread]) -> None:
        """What one has acquired, all have."""
        if any(thread.seen or thread.pending for thread in threads):
            seen = joined(*(thread.seen for thread in threads))
            pending = joined(*(thread.pending for thread in threads))
            for thread in threads:
                thread.seen, thread.pending = seen, pending
        for thread in threads:
            thread.wait, thread.repeats = None, 0

    def pause(self, wait: Wait | None = None) -> None:
        """Let others run; until what the thread waits for has come, if it waits."""
        self.thread.wait = wait
        self.hub.switch()

    def error(self, what: str, thread: Thread | None = None) -> SimulatorError:
        """The error with its place: of the thread that runs, or of one that waits."""
        frame = thread.greenlet.gr_frame if thread else sys._getframe()
        return SimulatorError(f"{what} ({self.kernel}, {thread or self.thread}, {place(frame)})")


def indices(size: Dim3) -> Iterator[Dim3]:
    return (Dim3(x, y, z) for z, y, x in itertools.product(range(size.z), range(size.y), range(size.x)))


def label(index: Dim3) -> str:
    return f"({index.x}, {index.y}, {index.z})" if index.y or index.z else str(index.x)


def place(frame: FrameType | None) -> str:
    """The kernel's line: of the innermost frame that is none of this file's."""
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    if frame is None:
        return "its end"
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} `{line}`"


class Cuda:
    """The `cuda` module that a factory of kernels is given."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self.gridDim, self.blockDim = launch.grid, launch.block
        self.shared = SimpleNamespace(array=self._shared_array)
        self.local = SimpleNamespace(array=functools.partial(Local, launch))
        self.atomic = SimpleNamespace(add=self._atomic_add)

    @property
    def threadIdx(self) -> Dim3:
        return self._launch.thread.index

    @property
    def blockIdx(self) -> Dim3:
        return self._launch.thread.block.index

    def syncthreads(self) -> None:
        self._launch.pause(Wait("syncthreads", site=site()))

    def syncwarp(self, mask: int = 0xFFFFFFFF) -> None:
        self._launch.pause(Wait("syncwarp", mask, site=site()))

    def shfl_sync(self, mask: int, value: Any, lane: int) -> Any:
        """The value of a lane, which may be another one for each."""
        return self._shuffle(Wait("shfl_sync", mask, site=site()), value, lane % WARP)

    def shfl_xor_sync(self, mask: int, value: Any, lanes: int) -> Any:
        return self._shuffle(Wait("shfl_xor_sync", mask, lanes, site()), value, self._launch.thread.lane ^ lanes)

    def shfl_down_sync(self, mask: int, value: Any, lanes: int) -> Any:
        lane = self._launch.thread.lane
        source = lane + lanes if lane + lanes < WARP else lane
        return self._shuffle(Wait("shfl_down_sync", mask, lanes, site()), value, source)

    def _shuffle(self, wait: Wait, value: Any, source: int) -> Any:
        thread = self._launch.thread
        thread.value, thread.source = value, source
        self._launch.pause(wait)
        return thread.value

    def threadfence(self) -> None:
        thread = self._launch.thread
        thread.fences += 1
        thread.fenced = thread.epoch
        if thread.pending:
            thread.seen = joined(thread.seen, thread.pending)
        thread.advance()

    def _atomic_add(self, pointer: DevicePointer, i: int, value: int) -> Any:
        """pointer[i] += value; what it was. Others may come first."""
        self._launch.pause()
        thread = self._launch.thread
        thread.repeats += 1
        if thread.repeats > PATIENCE:
            raise pointer.error(f"deadlock: {PATIENCE} atomics without a barrier, the last on", i)
        at = pointer.place(i, 1)
        past = pointer.past[at]
        try:
            if past.fresh:
                raise Problem("uninitialised read of")
            past.check_write(thread.stamp, atomic=True)
            old = pointer.values[at]
            pointer.values[at] = exact(old + value, pointer.dtype)
        except Problem as problem:
            raise pointer.error(problem, i) from None
        fences = tuple(other.fences for other in thread.block.threads)
        released = Released(next(self._launch.serials), max(thread.fenced, thread.block.fenced), fences)
        # As if it was before the thread's last fence: who acquires what it released comes after the atomic itself too.
        pointer.past[at] = History(Stamp(thread, thread.fences - 1))
        pointer.past[at].atomics = joined(past.atomics or {}, thread.seen, {thread.block: released})
        thread.pending = joined(thread.pending, past.atomics or {})
        return old

    def _shared_array(self, size: int, dtype: Any) -> DevicePointer:
        """The array of this line of the kernel, the same for each thread of the block."""
        shared = self._launch.thread.block.shared
        key = site()
        if key not in shared:
            array = np.empty(size, dtype)
            name = f"shared[{place(sys._getframe())}]"
            shared[key] = DevicePointer(self._launch, name, array, [self._launch.fresh] * size)
            if sum(len(each.past) * each.dtype.itemsize for each in shared.values()) > SHARED_BYTES:
                raise self._launch.error(f"more than {SHARED_BYTES} bytes of static shared memory")
        return shared[key]


def site() -> tuple[Any, int]:
    """Which call in the kernel this is."""
    frame = sys._getframe(2)
    return frame.f_code, frame.f_lasti


def launch(
    factory: Callable[[Any], Callable[..., None]],
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    args: Sequence[Any],
    *,
    seed: int = 0,
    races: bool = True,
    resident: bool = False,
) -> None:
    """Run the kernel that ``factory(cuda)`` makes, and write what it wrote to the arrays.

    Parameters
    ----------
    factory
        Makes the kernel from the `cuda` module.
    grid, block
        Blocks, and threads in a block; an integer, or one for x, y and z.
    args
        C-contiguous arrays, of which the kernel gets pointers to their elements (float16 and bfloat16 as their 16 bits);
        a `Pointer` to begin at another element; integers, NumPy floats, and None, which points nowhere. An array that is
        given twice is the same memory twice.
    seed
        Draws the order of blocks and warps.
    races
        Whether races are looked for.
    resident
        Whether all blocks run at once, rather than one after the other.

    Raises
    ------
    SimulatorError
        If the kernel does what `nbnorm_backends.numba_cuda.simulator` lists; the arrays are as they were then.
    TypeError, ValueError
        If an argument is none of these.
    """
    run = Launch(size_of(grid), size_of(block), seed, races)
    if math.prod(run.block) > 1024:
        raise ValueError(f"block: at most 1024 threads expected, got {block}")
    kernel = factory(Cuda(run))
    check_constants(kernel)
    run.kernel = kernel.__name__
    memories: dict[int, tuple[NDArray[Any], DevicePointer]] = {}
    passed = [_argument(run, memories, name, value) for name, value in zip(inspect.signature(kernel).parameters, args)]
    with np.errstate(all="ignore"):
        run.run(kernel, passed, resident)
    for array, memory in memories.values():
        written = np.array([past.write is not None for past in memory.past], bool)
        flat = array.reshape(-1)
        if written.any():
            bits(flat)[written] = np.array(memory.values, memory.dtype)[written]
        if isinstance(array, Fresh) and array.unwritten is not None:
            array.unwritten &= ~written


def size_of(size: int | tuple[int, ...]) -> Dim3:
    x, y, z = (*(size if isinstance(size, tuple) else (size,)), 1, 1)[:3]
    return Dim3(x, y, z)


def bits(array: NDArray[Any]) -> NDArray[Any]:
    """The array as it lies in memory: half types as uint16."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def _argument(run: Launch, memories: dict[int, tuple[NDArray[Any], DevicePointer]], name: str, value: Any) -> Any:
    """What the kernel is given for an argument."""
    if value is None or isinstance(value, np.floating):
        return value
    if isinstance(value, int | np.integer | np.bool_):
        return int(value)
    array, offset = value if isinstance(value, Pointer) else (value, 0)
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"{name}: an array, a Pointer, an integer or a NumPy float expected, got {type(value).__name__}"
        )
    if not array.flags.c_contiguous or not 0 <= offset <= array.size:
        raise ValueError(f"{name}: a C-contiguous array and an offset inside it expected, got strides {array.strides}")
    if id(array) not in memories:
        if any(np.may_share_memory(array, other) for other, _ in memories.values()):
            raise ValueError(f"{name}: overlaps another argument; give the same array, as a Pointer with an offset")
        past = [run.initial] * array.size
        if isinstance(array, Fresh) and array.unwritten is not None:
            past = [run.fresh if unwritten else run.initial for unwritten in array.unwritten]
        memories[id(array)] = array, DevicePointer(run, name, bits(array.reshape(-1)), past)
    return memories[id(array)][1].at(name, offset)


def check_constants(function: Any) -> None:
    """Refuse a Python float in a kernel's arithmetic, which Numba would do in float64."""
    known = {**function.__globals__}
    known |= {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    }
    for this, following in itertools.pairwise(dis.get_instructions(function)):
        if this.opcode in dis.hasconst:
            value = this.argval
        elif this.opname in ("LOAD_DEREF", "LOAD_GLOBAL"):
            value = known.get(this.argval)
        else:
            continue
        converted = following.opname in ("PRECALL", "CALL") and following.arg == 1
        if (
            any(type(each) is float for each in value)
            if type(value) is tuple
            else type(value) is float and not converted
        ):
            line = this.positions.lineno if this.positions else None
            raise SimulatorError(
                f"float64 constant {value}, which needs a call of its own such as float32({value})"
                f" ({function.__name__}, {os.path.basename(function.__code__.co_filename)}:{line})"
            )


# --- primitives ---


def decode(words: NDArray[np.uint16], kind: str) -> NDArray[np.float32]:
    """float16 or bfloat16 as float32."""
    if kind == "float16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << 16).view(np.float32)


def encode(values: NDArray[np.float32], kind: str) -> NDArray[np.uint16]:
    """float32 rounded to float16 or bfloat16, to nearest, ties to even."""
    if kind == "float16":
        return values.astype(np.float16).view(np.uint16)
    words = values.view(np.uint32)
    rounded = ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


@functools.cache
def primitives(kind: str) -> Any:
    """The primitives P of "float32", "float64", "float16" or "bfloat16".

    Vectors have 16 bytes, of V elements, and lie on 16 bytes; k counts vectors, i elements. Half types are computed in
    float32.

    ==========================  =========================================================================
    ld(pointer, k, array, off)  local array[off : off + V] = the k-th vector behind the pointer
    st(pointer, k, array, off)  the k-th vector behind the pointer = local array[off : off + V]
    ld1(pointer, i)             the i-th element
    st1(pointer, i, value)      the i-th element = value
    rsqrt, exp, tanh, erf,      functions; maximum and minimum give the other one for NaN; fdiv is 0 where the
    sqrt, fdiv, fma, maximum,   float32 divisor is beyond 2^126, as the device's fast division is
    minimum
    dev                         decorates functions that kernels call
    ==========================  =========================================================================
    """
    half = kind in ("float16", "bfloat16")
    real: Any = np.float64 if kind == "float64" else np.float32
    element = np.uint16 if half else real
    size = 16 // np.dtype(element).itemsize
    decoded = list(decode(np.arange(2**16, dtype=np.uint16), kind)) if half else []

    def ld(pointer: DevicePointer, k: int, array: Local, offset: int) -> None:
        pointer.vector(element, k * size, size)
        values = pointer.read(k * size, size)
        dict.update(
            array, zip(array.vector(real, offset, size), [decoded[word] for word in values] if half else values)
        )

    def st(pointer: DevicePointer, k: int, array: Local, offset: int) -> None:
        pointer.vector(element, k * size, size)
        values = [array[i] for i in array.vector(real, offset, size)]
        pointer.write(k * size, encode(np.array(values), kind).tolist() if half else values)

    def ld1(pointer: DevicePointer, i: int) -> Any:
        pointer.check_type(element, i)
        return decoded[pointer.read(i)[0]] if half else pointer.read(i)[0]

    def st1(pointer: DevicePointer, i: int, value: Any) -> None:
        pointer.check_type(element, i)
        try:
            value = exact(value, np.dtype(real))
        except Problem as problem:
            raise pointer.error(problem, i) from None
        pointer.write(i, encode(np.array([value]), kind).tolist() if half else [value])

    def fdiv(a: Any, b: Any) -> Any:
        beyond = real is np.float32 and 2.0**126 < abs(b) < np.inf
        return real(a / b) if not beyond else real(0 * a)

    def fma(a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once but for ties of float64 on the way to float32."""
        if real is np.float32:
            return real(float(a) * float(b) + float(c))
        if not np.isfinite([a, b, c]).all():
            return a * b + c
        return real(Fraction(a) * Fraction(b) + Fraction(c))

    def dev(function: Any) -> Any:
        check_constants(function)
        return function

    return SimpleNamespace(
        V=size,
        ld=ld,
        st=st,
        ld1=ld1,
        st1=st1,
        fdiv=fdiv,
        fma=fma,
        dev=dev,
        rsqrt=lambda x: real(1 / np.sqrt(real(x))),
        exp=lambda x: np.exp(real(x)),
        tanh=lambda x: np.tanh(real(x)),
        erf=lambda x: real(math.erf(x)),
        sqrt=lambda x: np.sqrt(real(x)),
        maximum=lambda x, y: np.fmax(real(x), real(y)),
        minimum=lambda x, y: np.fmin(real(x), real(y)),
    )
