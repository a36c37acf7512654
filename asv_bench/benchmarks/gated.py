"""What the gate compares, measured for the nbnorm that is imported here: python -m benchmarks.gated FILE < names.

Names are a line each. The file gets {"library": path, "names": every name, "uncounted": why
instructions cannot be counted or null, "values": {name: number}, "failed": {name: error}}.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbnorm

from . import callgrind, instructions, ratios
from .cases import Measured

QUICK_PAIRS = 11
NAME = re.compile(r"track_(instructions|ratio_numpy|ratio_torch)_(forward|backward|call)\((.+), (.+)\)")


def names(quick: bool) -> list[str]:
    """The gate's figures; with `quick` those of calls and of cases that are no variations of another."""
    found = ["track_instructions_{}({}, {})".format(*figure.split("|")) for figure in instructions.FIGURES]
    found += ["track_ratio_{}_{}({}, {})".format(*figure.split("|")) for figure in ratios.FIGURES]
    if not find_spec("ml_dtypes"):
        found = [name for name in found if "bfloat16" not in name]
    return [name for name in found if not quick or " " not in _parts(name)[2]]


def measure(wanted: list[str], quick: bool) -> Measured:
    """Values, and errors; in neither is what this version does not have."""
    counted = {"|".join(_parts(name)[1:]): name for name in wanted if name.startswith("track_instructions")}
    timed = {"|".join(_parts(name)).removeprefix("ratio_"): name for name in wanted if name.startswith("track_ratio")}
    values: dict[str, float] = {}
    failed: dict[str, str] = {}
    for named, found in (
        (counted, callgrind.count(counted) if counted else ({}, {})),
        (timed, ratios.measure(timed, QUICK_PAIRS if quick else ratios.PAIRS) if timed else ({}, {})),
    ):
        values |= {named[figure]: value for figure, value in found[0].items()}
        failed |= {named[figure]: error for figure, error in found[1].items()}
    return values, failed


def _parts(name: str) -> tuple[str, str, str, str]:
    match = NAME.fullmatch(name)
    assert match is not None, name
    family, kind, case, backend = match.groups()
    return family, kind, case, backend


def main() -> None:
    target, quick = Path(sys.argv[1]), "--quick" in sys.argv
    wanted = sys.stdin.read().splitlines()
    found: dict[str, Any] = {"library": nbnorm.__file__, "names": names(quick), "uncounted": callgrind.absence()}
    found["values"], found["failed"] = measure(wanted, quick)
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
