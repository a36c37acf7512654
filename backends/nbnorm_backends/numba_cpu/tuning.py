"""Sizes that were measured, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from nbnorm_backends.numba_cpu.elements import widens_to_512_bits


@dataclass(frozen=True, slots=True)
class Tuning:
    """In elements of x. Chunks follow from these and the shape alone, so that bits do not depend on the threads."""

    chunk: int = 65536  # least work of a chunk: claiming one costs about 5 us, computing it 30 us or more
    shares: int = 64  # most chunks that keep partial sums of their own: bounds their memory
    thin: int = 16  # partial sums hold at most a sixteenth of x's elements, twice, in float64
    width: int = 1024  # columns of a tile: float64 sums, pivots and coefficients of a row stay in L1
    fold: int = 1024  # columns that short rows are folded to, so that the inner loop fills vectors
    depth: int = 32  # rows that must remain: each column costs sums and coefficients of its own, in float64
    cached: int = 262144  # a group that stays in a core's cache with the next one, which is fetched meanwhile
    # Read and written, which no cache holds: the next group is fetched while one is written. See outputs.STREAM_RUNS;
    # of layer norm, results of 4, 6, 8, 12, 16 MiB then take 1.17, 1.14, 0.96, 0.70, 0.81 of the time for both.
    far: int = (12 if widens_to_512_bits() else 8) << 20
    far_apart: int = 6 << 20  # the same where groups are not contiguous: the processor finds no streams in them
    # Runs of a group from which it is cut into parts: of 1024, 2048, 8192 runs of 256 to 784 elements batch norm then
    # has 0.75 to 0.91, 0.69 to 0.74, 0.55 of its time, of 32768 of 64 elements 0.33, of 256 and 512 long ones to 1.2.
    far_runs: int = 1024
    part: int = 4096  # least elements of a part of a group, whose statistics take 100 ns
    most_parts: int = 16384  # of all groups: 40 bytes each
    serial: int = 131072  # below this a hand-over to helpers (17-30 us) costs more than it gains


TUNING = Tuning()
