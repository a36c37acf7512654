"""The paired timer, and the comparison with peers that rests on it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbnorm.measure import compare

PEERS = Path(__file__).parents[1] / "asv_bench" / "peers.py"


def test_two_calls_are_timed_in_turn() -> None:
    calls: list[str] = []

    def quick() -> None:
        calls.append("quick")
        time.sleep(0.001)

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.003)

    found = compare(quick, slow, pairs=5)
    assert calls[-10:] == ["quick", "slow"] * 5
    assert 0.001 <= found.first <= found.second
    low, median, high = found.ratios
    assert 1 < low <= median <= high


def test_short_calls_are_repeated() -> None:
    found = compare(lambda: None, lambda: None, pairs=5)
    assert found.first < 1e-5
    assert 0.2 < found.ratios[1] < 5


def run_peers(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PEERS), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_comparison_with_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    target = tmp_path / "cells.json"
    done = run_peers("--quick", "--pairs", 3, "--cells", "layer norm (64,768)", "--json", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("geometric mean against the fastest peer: ")
    cells = json.loads(target.read_text())["cells"]
    assert set(cells) == {"layer norm (64,768)"}
    for (found,) in cells.values():
        assert found["peers"]["torch"] > 0
        assert 0 < found["error"] < 1e-5
        assert 0 < found["limit"] < 2


def test_a_cell_that_is_not_there() -> None:
    pytest.importorskip("torch")
    done = run_peers("--quick", "--cells", "no such cell")
    assert done.returncode != 0
    assert "no cell has no such cell in its name" in done.stderr
