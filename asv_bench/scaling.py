"""How nbnorm's time grows with the size, and falls with the threads.

    OMP_WAIT_POLICY=passive python asv_bench/scaling.py [--largest 4096] [--pairs 15]

The first table has the time per byte of x from 64 MiB to `--largest` MiB, over that of 64 MiB. The others have the time
on one thread over that on all of them, in turn (A B A B), for arrays that the caches hold: of single calls, before each
of which the other threads sleep, and of calls that follow each other, as in a program.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import nbnorm
from nbnorm.measure import compare
from nbnorm.parallel import thread_count

MIB = 1 << 20
Run = Callable[[], Any]


def problems(x: Any) -> dict[str, tuple[Callable[..., Any], Any, dict[str, Any]]]:
    """Norms on the elements of x, (rows, 1024), by name."""
    channels_first = x.reshape(-1, 64, 16, 16)
    training = {"training": True}
    return {
        "layer norm": (nbnorm.layer_norm, x, {"normalized_shape": 1024}),
        "batch norm, channels first": (nbnorm.batch_norm, channels_first, training),
        "batch norm, channels last": (nbnorm.batch_norm, x.reshape(-1, 64), training),
    }


def arrays(elements: int) -> Any:
    x = np.empty((elements // 1024, 1024), np.float32)
    rng = np.random.default_rng(0)
    for rows in np.array_split(x, max(1, x.nbytes // (64 * MIB))):
        rng.standard_normal(out=rows, dtype=np.float32)
    return x


def seconds(run: Run, times: int) -> float:
    """The median time of a call."""
    run()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def over_sizes(largest: int, times: int) -> None:
    sizes = [64]
    while sizes[-1] * 4 <= largest:
        sizes.append(sizes[-1] * 4)
    found: dict[str, list[float]] = {}
    for size in sizes:
        for name, (op, view, keys) in problems(arrays(size * MIB // 4)).items():
            found.setdefault(name, []).append(seconds(lambda: op(view, **keys), times) / size)  # noqa: B023  runs at once
    print(f"| time per byte, over that of 64 MiB | {' | '.join(f'{size} MiB' for size in sizes)} |")
    print("|---|" + "---|" * len(sizes))
    for name, each in found.items():
        print(f"| {name}: {each[0] * 1e3 / MIB * 1e6:.3f} ns | {' | '.join(f'{one / each[0]:.2f}' for one in each)} |")


def over_threads(calls: int, pairs: int) -> None:
    threads = thread_count()
    print(f"\n| {threads} threads against one, {calls} calls in a row | 1 MiB | 2 MiB | 4 MiB |\n|---|---|---|---|")
    rows: dict[str, list[str]] = {}
    for size in (1, 2, 4):
        for name, (op, view, keys) in problems(arrays(size * MIB // 4)).items():

            def run(count: int, op: Any = op, view: Any = view, keys: Any = keys) -> None:
                with nbnorm.threads(count):
                    for _ in range(calls):
                        op(view, **keys)

            ratio = compare(lambda: run(threads), lambda: run(1), pairs=pairs).ratios[1]
            rows.setdefault(name, []).append(f"{ratio:.2f}")
    for name, ratios in rows.items():
        print(f"| {name} | {' | '.join(ratios)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=4096, help="MiB of x")
    parser.add_argument("--pairs", type=int, default=15, help="timings of each size, pairs of each ratio")
    options = parser.parse_args()
    over_sizes(options.largest, max(3, options.pairs // 2))
    for calls in (1, 20):
        over_threads(calls, options.pairs)


if __name__ == "__main__":
    main()
