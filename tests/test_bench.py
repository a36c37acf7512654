"""`nbnorm bench`: the peers compute what nbnorm does, verdicts follow the noise, and the command says what it found."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command import nbnorm
from nbnorm.measure import compare, noisy, verdict
from nbnorm.peers import PEERS, Case, Problem, Unavailable
from nbnorm_backends.numba_cpu import outputs

IMAGES, ROWS = (6, 8, 5, 4), (4, 3, 40)
CASES = [
    Case("batch_norm", IMAGES),
    Case("batch_norm", (6, 5, 4, 8), channel_axis=-1, activation="relu"),
    Case("batch_norm", IMAGES, activation="relu", training=False),
    Case("batch_norm", IMAGES, backward=True),
    Case("batch_norm", IMAGES, backward=True, training=False),
    Case("batch_norm", (40, 8), activation="gelu", backward=True),
    Case("group_norm", IMAGES, num_groups=4, activation="silu"),
    Case("group_norm", (6, 5, 4, 8), channel_axis=3, num_groups=2, activation="tanh", backward=True),
    Case("instance_norm", IMAGES, activation="gelu_tanh"),
    Case("instance_norm", IMAGES, activation="sigmoid", training=False, backward=True),
    Case("layer_norm", ROWS, activation="leaky_relu"),
    Case("layer_norm", ROWS, backward=True),
    Case("rms_norm", ROWS, activation="gelu"),
    Case("rms_norm", ROWS, backward=True),
]
# The largest relative difference that was seen: 4e-16, 1e-6, 6e-4 and 6e-3, the rounding of the dtype.
BOUNDS = {"float64": 3e-15, "float32": 5e-6, "float16": 2e-3, "bfloat16": 2e-2}


def installed(peer: str) -> str:
    if missing := PEERS[peer].missing():
        pytest.skip(f"{' and '.join(missing)} not installed")
    return peer


def relative_error(problem: Problem, contender: Any) -> float:
    return float(contender.error(problem.exact) / np.abs(problem.exact).max())


# ---- the peers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("peer", ["torch", "onednn", "jax", "onnxruntime"])
def test_peers_compute_the_same(peer: str, dtype: str) -> None:
    installed(peer)
    ran = 0
    for case in CASES:
        problem = Problem(Case(**vars(case) | {"dtype": dtype}))
        try:
            contender = PEERS[peer].call(problem)
        except Unavailable:
            continue
        assert relative_error(problem, contender) < BOUNDS[dtype], case
        ran += 1
    assert ran == {"onednn": 2, "onnxruntime": 5}.get(peer, len(CASES)) or dtype != "float32"
    assert ran or peer in ("onednn", "onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5], CASES[13]], ids=str)
def test_compiled_torch_computes_the_same(case: Case) -> None:
    installed("torch.compile")
    problem = Problem(case)
    assert relative_error(problem, PEERS["torch.compile"].call(problem)) < BOUNDS["float32"]


@pytest.mark.slow("numba")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nbnorm_computes_the_same(case: Case, backend: str) -> None:
    problem = Problem(case)
    assert relative_error(problem, problem.ours(backend)) < BOUNDS["float32"]
    assert problem.chosen(backend) == backend


def test_what_a_peer_does_not_run_has_a_reason() -> None:
    with pytest.raises(Unavailable, match="for inference"):
        PEERS["onnxruntime"].call(Problem(CASES[0]))
    with pytest.raises(Unavailable, match="channels first"):
        PEERS["onednn"].call(Problem(CASES[6]))


def test_torch_compile_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match=r"needs a C\+\+ compiler, and there is no no-such-compiler"):
        PEERS["torch.compile"].call(Problem(CASES[0]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_bytes_that_a_norm_moves(dtype: str) -> None:
    case = Case("batch_norm", (3, 5), dtype)
    assert case.bytes == 2 * 15 * np.dtype(dtype).itemsize
    assert Case("batch_norm", (3, 5), dtype, backward=True).bytes == 1.5 * case.bytes


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("length", [1, 7, 63, 64, 4096, 4099, 70000])
def test_copies_run_at_every_size(length: int, backward: bool) -> None:
    """Non-temporal stores need whole cache lines: elsewhere they end the process."""
    who, copies = Problem(Case("batch_norm", (3, length), "float16", backward=backward)).copies()
    assert who == "numba"
    assert len(copies) == (1 if length < 4096 else 2) or not outputs.STREAMING
    for copy in copies:
        copy()


# ---- the rule of noise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "noise", "said"),
    [
        ((1.05, 1.1, 1.2), (0.98, 1.0, 1.04), "faster"),
        ((0.7, 0.8, 0.9), (0.98, 1.0, 1.04), "slower"),
        ((1.0, 1.1, 1.2), (0.98, 1.0, 1.04), "too close to tell"),
        ((1.0, 1.0, 1.3), (0.98, 1.0, 1.04), "too noisy to tell"),
        ((1.1, 1.2, 1.3), (0.8, 1.0, 1.2), "too noisy to tell"),
        ((2.0, 2.2, 2.4), (0.8, 1.0, 1.2), "faster"),
    ],
)
def test_verdicts(ratios: Any, noise: Any, said: str) -> None:
    assert verdict(ratios, noise) == said


@pytest.mark.parametrize(("pairs", "most"), [(31, 1e-3), (9, 0.02)])
def test_a_call_beside_itself_is_hardly_ever_told_apart(pairs: int, most: float) -> None:
    drawn = np.exp(0.05 * np.random.default_rng(0).normal(size=(4000, pairs)))
    found = [tuple(statistics.quantiles(ratios, n=4)) for ratios in drawn]
    told = [not verdict(one, other).startswith("too ") for one, other in zip(found[::2], found[1::2], strict=True)]
    assert sum(told) <= most * len(told)


def test_a_call_whose_time_varies_is_noise() -> None:
    durations = itertools.cycle([0.001, 0.003, 0.001, 0.001, 0.003])

    def call() -> None:
        time.sleep(next(durations))

    noise = compare(call, call, pairs=9).ratios
    assert noisy(noise)
    assert verdict(noise, noise) == "too noisy to tell"


# ---- the command -----------------------------------------------------------------------------------------------------

QUICK = "--shape", "small", "--pairs", "3"


def bench(folder: Path, *arguments: str, hide: str = "", **environment: str) -> tuple[dict[str, Any], str]:
    """What the command wrote, and printed."""
    figures = folder / "figures.json"
    done = nbnorm("bench", *QUICK, *arguments, "--json", figures, hide=hide, cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    assert f"figures: {figures}" in done.stdout
    return json.loads(figures.read_text()), done.stdout


def test_bench_prints_what_it_writes(tmp_path: Path) -> None:
    peers = [peer for peer in ("torch", "jax", "onnxruntime") if not PEERS[peer].missing()]
    arguments = "--op", "layer_norm", "--activation", "gelu", "--against", ",".join([*peers, "numpy"])
    found, printed = bench(tmp_path, *arguments, "--plot", "picture.svg")
    assert "layer_norm (8, 64) float32, forward, gelu" in printed
    assert found["case"]["shape"] == [8, 64]
    assert (found["backend"], found["copied_by"], found["pairs"]) == ("numba", "numba", 3)
    assert list(found["peers"]) == [*peers, "numpy"]
    rows = {"nbnorm": found["ours"], **found["peers"]}
    for name, row in rows.items():
        low, median, high = row["ratios"]
        assert 0 < low <= median <= high
        assert 0 < row["error"] < 1e-5
        assert math.isclose(row["gigabytes_per_second"], 2 * 8 * 64 * 4 / row["seconds"] / 1e9)
        cells = re.search(
            rf"^ *{name} +(\S+) us +(\S+) \((\S+) to (\S+)\) +\S+ +(\d+)% +(\S+) *(.*?) *$", printed, re.M
        )
        assert cells is not None, printed
        assert [float(cell) for cell in cells.groups()[1:4]] == [round(ratio, 2) for ratio in (median, low, high)]
        assert float(cells[1]) == float(f"{row['seconds'] * 1e6:.3g}")
        assert cells[7] == row["verdict"]
        if name != "nbnorm":
            assert row["verdict"] == verdict(tuple(row["ratios"]), tuple(found["ours"]["ratios"]))
            ratio = found["ours"]["copy_fraction"] / row["copy_fraction"]
            assert math.isclose(ratio, median)
    assert found["noisy"] == ("too noisy to tell small differences" in printed)
    assert found["threads"] >= 1
    picture = (tmp_path / "picture.svg").read_text()
    assert "<svg" in picture


def test_bench_says_what_a_peer_does_not_run(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    found, printed = bench(tmp_path, "--backward", "--against", "onnxruntime")
    assert found["peers"]["onnxruntime"]["unavailable"].startswith("ONNX Runtime is for inference")
    assert "onnxruntime: ONNX Runtime is for inference" in printed
    assert (tmp_path / "nbnorm-bench.png").read_bytes().startswith(b"\x89PNG")


def test_bench_cuts_no_figure(tmp_path: Path) -> None:
    arguments = "--op", "layer_norm", "--against", "numpy"
    found, printed = bench(tmp_path, *arguments, COLUMNS="40")
    for row in (found["ours"], found["peers"]["numpy"]):
        assert f" {row['gigabytes_per_second']:.3g} " in printed
    assert "nbnorm is" in printed
    assert "…" not in printed


def test_bench_pipes_its_figures(tmp_path: Path) -> None:
    done = nbnorm("bench", *QUICK, "--against", "numpy", "--json", "-", cwd=tmp_path)
    assert list(json.loads(done.stdout)["peers"]) == ["numpy"]
    assert "nbnorm is" in done.stderr


@pytest.mark.parametrize(("option", "variable"), [(["--threads", "1"], "2"), ([], "1")])
def test_bench_on_one_thread(option: list[str], variable: str, tmp_path: Path) -> None:
    found, _ = bench(tmp_path, *option, "--against", "numpy", NBNORM_NUM_THREADS=variable)
    assert found["threads"] == 1


def test_bench_without_extras_and_frameworks(tmp_path: Path) -> None:
    found, printed = bench(tmp_path, hide="numba,matplotlib,torch,jax,onnx,onnxruntime")
    assert (found["backend"], found["copied_by"], found["peers"]) == ("numpy", "numpy", {})
    assert "copy: by NumPy, on one thread" in printed
    assert "left out: torch, jax, onnxruntime: pip install torch jax onnxruntime onnx" in printed
    assert 'no picture: pip install "nbnorm[demo]"' in printed
    assert not (tmp_path / "nbnorm-bench.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "layernorm"], "'--op': must be one of batch_norm, layer_norm, .*; got 'layernorm'"),
        (["--shape", "huge"], r"'--shape': must be .* small \(2, 64, 4, 4\), medium .*, large .*; got 'huge'"),
        (["--shape", "8,0"], "'--shape': .*; got '8,0'"),
        (["--shape", "8"], "'--shape': must be two or more lengths"),
        (["--dtype", "int8"], "'--dtype': must be one of float32, float64, float16.*; got 'int8'"),
        (["--backend", "absent"], "'--backend': must be one of .*numba.*; got 'absent'"),
        (["--against", "numpy,absent"], "'--against': must be of torch, .*, numpy.*; got 'absent'"),
        (["--activation", "elu"], "'--activation': must be one of relu, .*; got 'elu'"),
        (["--mode", "test"], "'--mode': must be one of train, eval; got 'test'"),
        (["--op", "layer_norm", "--mode", "eval"], "'--mode': layer_norm has no running statistics"),
        (["--op", "rms_norm", "--channels-last"], "'--channels-last': rms_norm is over the last axis"),
        (["--channels-last", "--channel-axis", "1"], "'--channel-axis': must be -1 with --channels-last; got 1"),
        (["--shape", "8,4", "--channel-axis", "2"], r"'--channel-axis': must be an axis of the shape \(8, 4\); got 2"),
        (["--num-groups", "2"], "'--num-groups': is for group_norm; got batch_norm"),
        (["--threads", "9999"], "'--threads': must be at most the .* processors .*; got 9999"),
        (["--plot", "figure.txt"], "'--plot': must end in .pdf, .png, .svg; got 'figure.txt'"),
        (["--json", "absent/figures.json"], "'--json': 'absent' is not a folder that can be written to"),
    ],
)
def test_bench_names_what_there_is(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = nbnorm("bench", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(f"Invalid value for {message}", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("peer", "hide", "needs"),
    [
        ("torch", "torch", "torch needs torch: pip install torch"),
        ("jax", "jax", "jax needs jax: pip install jax"),
        ("onnxruntime", "onnxruntime,onnx", "onnxruntime needs onnxruntime and onnx: pip install onnxruntime onnx"),
    ],
)
def test_bench_names_a_missing_package(peer: str, hide: str, needs: str) -> None:
    done = nbnorm("bench", "--against", peer, hide=hide)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Invalid value for '--against': {needs}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "group_norm", "--num-groups", "7", "--shape", "4,8"], "num_groups must divide the 8 channels"),
        (["--op", "instance_norm", "--shape", "4,8"], "x must have at least 3 axes"),
        (["--shape", "1000000,1000000"], r"shape \(1000000, 1000000\) takes 126660 GiB .*; this machine has \d+"),
    ],
)
def test_bench_says_in_one_line_what_cannot_be(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = nbnorm("bench", *arguments, "--against", "numpy", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"nbnorm: {message}.*\n", done.stderr)


def test_plot_without_matplotlib_names_its_extra(tmp_path: Path) -> None:
    done = nbnorm("bench", "--plot", "picture.png", hide="matplotlib", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == 'nbnorm: --plot needs matplotlib: pip install "nbnorm[demo]"\n'
