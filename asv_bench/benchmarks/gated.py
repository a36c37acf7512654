"""What the gate compares, measured for the nbnorm that is imported here: python -m benchmarks.gated FILE < names.

Names are a line each. The file gets {"library": path, "values": {name: number}, "failed": {name: error}}.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbnorm

from . import callgrind
from .cases import BACKENDS, BACKWARD, CASES, FORWARD
from .instructions import FIGURES
from .ratios import PAIRS, TORCH, ratio

QUICK_PAIRS = 11
NAME = re.compile(r"track_(instructions|ratio_numpy|ratio_torch)_(forward|backward|call)\((.+), (\w+)\)")


def names(quick: bool) -> list[str]:
    """The gate's figures; with `quick` those of calls and of cases that are no variations of another."""
    found = ["track_instructions_{}({}, {})".format(*figure.split("|")) for figure in FIGURES]
    for kind, cases in {"forward": FORWARD, "backward": BACKWARD}.items():
        for peer, known in {"numpy": cases, "torch": TORCH if find_spec("torch") else []}.items():
            found += [f"track_ratio_{peer}_{kind}({case}, {backend})" for case in known for backend in BACKENDS]
    if not find_spec("ml_dtypes"):
        found = [name for name in found if "bfloat16" not in name]
    return [name for name in found if not quick or _parts(name)[2] not in CASES or " " not in _parts(name)[2]]


def measure(wanted: list[str], quick: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Values, and errors; in neither is what this version does not have."""
    counted = {"|".join(_parts(name)[1:]): name for name in wanted if name.startswith("track_instructions")}
    found, errors = callgrind.count(counted) if counted else ({}, {})
    values: dict[str, float] = {counted[figure]: count for figure, count in found.items()}
    failed = {counted[figure]: error for figure, error in errors.items()}
    for name in wanted:
        family, kind, case, backend = _parts(name)
        if family == "instructions":
            continue
        try:
            values[name] = ratio(kind, case, backend, family.removeprefix("ratio_"), QUICK_PAIRS if quick else PAIRS)
        except NotImplementedError:
            continue
        except Exception as error:  # noqa: BLE001  the others can be measured
            failed[name] = f"{type(error).__name__}: {error}"
    return values, failed


def _parts(name: str) -> tuple[str, str, str, str]:
    match = NAME.fullmatch(name)
    assert match is not None, name
    family, kind, case, backend = match.groups()
    return family, kind, case, backend


def main() -> None:
    target, quick = Path(sys.argv[1]), "--quick" in sys.argv
    wanted = sys.stdin.read().splitlines()
    found: dict[str, Any] = {"library": nbnorm.__file__, "names": names(quick)}
    found["values"], found["failed"] = measure(wanted, quick)
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
