"""Every variant compiled without a GPU and held to its budget: ``python -m nbnorm_backends.numba_cuda.compile_check``.

It prints what the assembler and the disassembler tell of each; the exit status is 1 where a budget is broken, 2 where
what compiles is not installed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import TYPE_CHECKING, NamedTuple

from nbnorm_backends.numba_cuda.launch import CAPABILITIES, Budget, Variant, budget_of, variants

if TYPE_CHECKING:
    from nbnorm_backends.numba_cuda.compiler import Compiled

NEEDED = 'pip install "nbnorm[cuda-check]"'
COMPILER = "nbnorm_backends.numba_cuda.compiler"  # imports what may not be installed
COLUMNS = "variant", "arch", "regs", "ld128", "st128", "shuffles", "spills", "stack", "local", "float64", "instructions"
ROW = "{:48} {:6} {:>5} {:>6} {:>6} {:>9} {:>7} {:>6} {:>6} {:>8} {:>13}"
Task = tuple[Variant, list[tuple[int, int]]]
# A line of nvdisasm: the address, perhaps a predicate, and the instruction.
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)


class Facts(NamedTuple):
    """What became of a kernel: registers of a thread, bytes of spills and stack, and instructions by kind."""

    registers: int
    spills: int
    stack: int
    loads: int  # of 128 bits
    stores: int  # of 128 bits
    shuffles: int
    local: int  # accesses of local memory
    float64: int
    instructions: int


def facts_of(compiled: Compiled) -> Facts:
    """From the assembler's log and the machine code."""
    registers = re.search(r"Used (\d+) registers", compiled.log)
    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.log)
    if registers is None or memory is None:
        raise RuntimeError(f"the assembler's log names no registers or no stack: {compiled.log!r}")
    stack, stored, loaded = map(int, memory.groups())
    found = Counter(INSTRUCTION.findall(disassemble(compiled.cubin)))

    def count(*starts: str, wide: bool = False) -> int:
        chosen = (name for name in found if name.startswith(starts) and (not wide or ".128" in name))
        return sum(found[name] for name in chosen)

    return Facts(
        registers=int(registers[1]),
        spills=stored + loaded,
        stack=stack,
        loads=count("LDG", wide=True),
        stores=count("STG", wide=True),
        shuffles=count("SHFL"),
        local=count("LDL", "STL"),
        float64=count("DADD", "DMUL", "DFMA"),
        instructions=found.total(),
    )


def disassemble(cubin: bytes) -> str:
    """The machine code as text, by NVIDIA's nvdisasm."""
    tool = import_module("cuda.pathfinder").find_nvidia_binary_utility("nvdisasm")
    if tool is None:
        raise RuntimeError(f"nvdisasm is not installed; {NEEDED}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout


def broken(facts: Facts, budget: Budget) -> list[str]:
    """What is over the budget, or under."""
    found = [f"{facts.registers} registers, over {budget.registers}"] if facts.registers > budget.registers else []
    for name in ("spills", "stack", "local"):
        if getattr(facts, name):
            found.append(f"{name}: {getattr(facts, name)}")
    for name in ("loads", "stores", "shuffles"):
        if getattr(facts, name) < getattr(budget, name):
            found.append(f"{getattr(facts, name)} {name}, under {getattr(budget, name)}")
    if facts.float64 and not budget.float64:
        found.append(f"{facts.float64} float64 instructions")
    return found


def check(chosen: Iterable[Variant], capabilities: Sequence[tuple[int, int]], jobs: int = 1) -> int:
    """Print the table, from `jobs` processes; the number of variants that break their budget."""
    tasks = [(variant, [each for each in capabilities if _runs(variant, each)]) for variant in chosen]
    tasks = [task for task in tasks if task[1]]
    print(ROW.format(*COLUMNS))
    failures = 0
    for (variant, able), each in zip(tasks, _compiled(tasks, jobs), strict=True):
        for capability, facts in zip(able, each, strict=True):
            errors = broken(facts, budget_of(variant, capability))
            failures += bool(errors)
            architecture = "sm_{}{}".format(*capability)
            sizes = facts.registers, facts.loads, facts.stores, facts.shuffles, facts.spills, facts.stack, facts.local
            print(ROW.format(variant.name, architecture, *sizes, facts.float64, facts.instructions), end=" ")
            print("; ".join(errors), flush=True)
    return failures


def _runs(variant: Variant, capability: tuple[int, int]) -> bool:
    return variant.rows is None or variant.rows.since <= 10 * capability[0] + capability[1]


def _compiled(tasks: Sequence[Task], jobs: int) -> Iterator[list[Facts]]:
    """What became of each, in their order."""
    if jobs == 1:
        yield from map(_facts, tasks)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as processes:
        yield from processes.map(_facts, tasks)


def _facts(task: Task) -> list[Facts]:
    return [facts_of(compiled) for compiled in import_module(COMPILER).compile_for_each(*task)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compile_check", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="variants whose name has this regular expression")
    parser.add_argument("--arch", action="append", choices=[f"{a}{b}" for a, b in CAPABILITIES], help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    chosen = parser.parse_args(arguments)
    try:
        only = re.compile(chosen.only)
    except re.error as error:
        parser.error(f"--only: a regular expression expected, got {chosen.only!r}: {error}")
    listed = [each for each in variants() if only.search(each.name)]
    if not listed:
        parser.error(f"--only: no variant has {chosen.only!r} in its name, such as {variants()[0].name}")
    try:
        import_module(COMPILER)
    except ImportError as error:
        print(f"what compiles for GPUs is not installed ({error}); {NEEDED}", file=sys.stderr)
        return 2
    capabilities = [pair for pair in CAPABILITIES if not chosen.arch or f"{pair[0]}{pair[1]}" in chosen.arch]
    failures = check(listed, capabilities, chosen.jobs)
    if failures:
        print(f"{failures} over budget", file=sys.stderr)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
