"""`nbnorm stats` and `nbnorm apply`: as of the whole array, in little memory, and no half-written file."""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from command import INHERITED, RUN, nbnorm
from nbnorm import state, stream
from nbnorm.statistics import Moments

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed (it comes with the torch extra)")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EPS = 1e-3


def oracle(x: Any, axis: int) -> tuple[Any, Any]:
    """Mean and variance of each channel, in two passes of NumPy's longest float."""
    wide = np.moveaxis(x.astype(np.longdouble), axis, 0).reshape(x.shape[axis], -1)
    mean = wide.mean(axis=1)
    return mean, ((wide - mean[:, None]) ** 2).mean(axis=1)


def save(path: Path, x: Any) -> Path:
    np.save(path, x)
    return path


# ---- blocks ----------------------------------------------------------------------------------------------------------


@given(st.tuples(*[st.integers(0, 7)] * 3), st.integers(1, 50))
def test_blocks_are_the_array_in_its_order(view: tuple[int, int, int], size: int) -> None:
    channel_of = np.broadcast_to(np.arange(view[1])[:, None], view).ravel()
    begin = 0
    for channels, shape in stream.block_shapes(view, size):
        count = math.prod(shape)
        assert 0 < count <= size
        expected = np.broadcast_to(np.arange(channels.start, channels.stop)[:, None], shape).ravel()
        assert np.array_equal(channel_of[begin : begin + count], expected)
        begin += count
    assert begin == math.prod(view)


SHAPES = [((5, 4, 3, 2), axis) for axis in range(4)] + [((7,), 0), ((3, 60), 1), ((60, 3), 1), ((2, 3, 70), -2)]


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", ">f2", BFLOAT16])
@pytest.mark.parametrize("order", ["C", "F"])
def test_statistics_and_results_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, order: Any
) -> None:
    """In blocks of all three kinds: many outer steps, some channels of one, a piece of a channel."""
    rng = np.random.default_rng(0)
    for (shape, axis), elements in itertools.product(SHAPES, (1, 5, 16, 1000)):
        x = np.asarray(rng.normal(3, 2, shape).astype(dtype), order=order)
        monkeypatch.setattr(stream, "BLOCK_BYTES", elements * x.itemsize)
        source = stream.open_array(save(tmp_path / "x.npy", x), axis, x.dtype == BFLOAT16)
        done: list[int] = []
        found = stream.channel_statistics(source, done.append)
        mean, var = oracle(x, axis)
        np.testing.assert_allclose(found.moments.mean, mean.astype(float), rtol=1e-14)
        np.testing.assert_allclose(found.moments.var(), var.astype(float), rtol=1e-13, atol=1e-300)
        others = tuple(place for place in range(x.ndim) if place != axis % x.ndim)
        wide = x.astype(float)
        assert np.array_equal(found.least, wide.min(axis=others))
        assert np.array_equal(found.most, wide.max(axis=others))
        assert (found.moments.count == x.size // x.shape[axis]).all()
        assert sum(done) == x.nbytes

        with (tmp_path / "y.npy").open("wb") as target:
            stream.normalize(source, target, found.moments, EPS, done.append)
        y = np.load(tmp_path / "y.npy")
        y = y.view(BFLOAT16) if x.dtype == BFLOAT16 else y
        assert (y.dtype, y.shape, y.flags.f_contiguous) == (x.dtype, x.shape, x.flags.f_contiguous)
        along = [-1 if place == axis % x.ndim else 1 for place in range(x.ndim)]
        std = np.sqrt(var + EPS).reshape(along)
        expected = (x.astype(np.longdouble) - mean.reshape(along)) / std
        error = np.abs(y.astype(np.longdouble) - expected)
        assert (error <= bound(x.dtype.name, np.abs(expected), np.abs(mean.reshape(along)) / std)).all()


def bound(dtype: str, result: Any, offset: Any) -> Any:
    """What the documentation promises (docs/numerics.md); half types add the rounding of the result."""
    if dtype == "float64":
        return 4 * 2.0**-52 * (1 + result + offset)
    return 4e-7 * np.maximum(1, result) + {"float32": 0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype] * result


def test_a_large_mean_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean 1e8 and standard deviation 1 over a thousand blocks; merged without a residual the variance has 9 digits."""
    x = 1e8 + np.random.default_rng(0).normal(size=(10_000, 3))
    monkeypatch.setattr(stream, "BLOCK_BYTES", 30 * 8)
    found = stream.channel_statistics(stream.open_array(save(tmp_path / "x.npy", x), 1), lambda count: None)
    np.testing.assert_allclose(found.moments.var(), oracle(x, 1)[1].astype(float), rtol=1e-13)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    source = stream.open_array(save(tmp_path / "x.npy", np.ones((100, 3))), 1)
    os.truncate(tmp_path / "x.npy", 1000)
    with pytest.raises(ValueError, match=r"x.npy ended early: somebody has cut it while it was read"):
        stream.channel_statistics(source, lambda count: None)


def test_shards_merge_to_the_whole(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(5, 2, (100, 3)).astype(np.float32)
    parts = []
    for name, part in (("a", x[:1]), ("b", x[1:60]), ("c", x[60:])):
        save(tmp_path / f"{name}.npy", part)
        done = nbnorm("stats", tmp_path / f"{name}.npy", "--channel-axis", "1", "--save", tmp_path / f"{name}.npz")
        assert done.returncode == 0, done.stderr
        parts.append(state.read_moments(tmp_path / f"{name}.npz")[0])
    whole = parts[0].merge(parts[1]).merge(parts[2])
    assert whole.count.tolist() == [100, 100, 100]
    np.testing.assert_allclose(whole.var(), oracle(x, 1)[1].astype(float), rtol=1e-14)


def test_nan_and_infinity_stay_in_their_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(30, 4, 5))
    x[3, 1, 2] = np.nan
    x[[4, 29], 3, 0] = np.inf, -np.inf
    monkeypatch.setattr(stream, "BLOCK_BYTES", 500)
    found = stream.channel_statistics(stream.open_array(save(tmp_path / "x.npy", x), 1), lambda count: None)
    assert found.nonfinite.tolist() == [0, 1, 0, 2]
    assert np.isfinite(found.moments.mean).tolist() == [True, False, True, False]
    np.testing.assert_allclose(found.moments.var()[[0, 2]], oracle(x[:, [0, 2]], 1)[1].astype(float), rtol=1e-13)


# ---- the commands ----------------------------------------------------------------------------------------------------


def rows(output: str) -> list[list[str]]:
    """The cells of a table's rows."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if line[:1] == "│"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_stats_then_apply(tmp_path: Path, suffix: str) -> None:
    x = np.random.default_rng(0).normal([[1.0], [-20.0]], [[2.0], [0.5]], (50, 2, 30)).astype(np.float32)
    save(tmp_path / "x.npy", x)
    done = nbnorm("stats", "x.npy", "--channel-axis", "-2", "--save", f"s{suffix}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    mean, var = oracle(x, 1)
    for channel, row in enumerate(rows(done.stdout)):
        numbers = mean[channel], np.sqrt(var[channel]), x[:, channel].min(), x[:, channel].max()
        assert row == [str(channel), "1500", *(f"{float(number):.6g}" for number in numbers), ""]
    assert re.search(r"^reading .* 12\.0/12\.0 kB", done.stdout, re.MULTILINE)
    assert "x.npy: float32 (50, 2, 30)" in done.stdout
    assert f"saved: s{suffix}\n" in done.stdout
    moments, metadata = state.read_moments(tmp_path / f"s{suffix}")
    assert metadata == {"channel_axis": "-2"}
    np.testing.assert_allclose(moments.mean, mean.astype(float), rtol=1e-14)

    done = nbnorm("apply", "x.npy", "--stats", f"s{suffix}", "--out", "y.npy", "--eps", "0.001", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^normalizing .*\nsaved: y.npy\n$", done.stdout, re.MULTILINE)
    y = np.load(tmp_path / "y.npy")
    expected = (x - mean[:, None]) / np.sqrt(var[:, None] + 1e-3)
    np.testing.assert_allclose(y, expected.astype(float), atol=2e-6)
    assert sorted(os.listdir(tmp_path)) == [f"s{suffix}", "x.npy", "y.npy"]


def test_many_channels_are_shown_from_both_ends(tmp_path: Path) -> None:
    save(tmp_path / "x.npy", np.tile(np.arange(23.0), (2, 1)))
    short = rows(nbnorm("stats", tmp_path / "x.npy", "--channel-axis", "1").stdout)
    assert [row[0] for row in short] == [*map(str, range(10)), "3 more", *map(str, range(13, 23))]
    every = rows(nbnorm("stats", tmp_path / "x.npy", "--channel-axis", "1", "--all").stdout)
    assert [row[2] for row in every] == [str(channel) for channel in range(23)]


def test_bfloat16_has_to_be_named(tmp_path: Path) -> None:
    save(tmp_path / "x.npy", np.arange(8).reshape(4, 2).astype(BFLOAT16))
    done = nbnorm("stats", "x.npy", "--channel-axis", "1", cwd=tmp_path)
    message = "nbnorm: x.npy has elements of two plain bytes; if they are bfloat16, say --bfloat16\n"
    assert (done.returncode, done.stderr) == (1, message)
    done = nbnorm("stats", "x.npy", "--channel-axis", "1", "--bfloat16", "--save", "s.npz", cwd=tmp_path)
    assert [row[2] for row in rows(done.stdout)] == ["3", "4"]
    done = nbnorm("apply", "x.npy", "--stats", "s.npz", "--bfloat16", "--out", "y.npy", cwd=tmp_path)
    assert np.load(tmp_path / "y.npy").view(BFLOAT16)[:, 0].tolist() == [-1.34375, -0.447265625, 0.447265625, 1.34375]


def test_channels_that_are_not_finite_are_named_and_not_saved(tmp_path: Path) -> None:
    x = np.ones((4, 3), np.float16)
    x[1:3, 1] = np.nan, np.inf
    save(tmp_path / "x.npy", x)
    done = nbnorm("stats", "x.npy", "--channel-axis", "1", "--save", "s.npz", cwd=tmp_path)
    message = "nbnorm: nothing saved: there are NaN or Inf in 1 of the channels: 1\n"
    assert (done.returncode, done.stderr) == (1, message)
    assert [row[-1] for row in rows(done.stdout)] == ["", "2", ""]
    assert os.listdir(tmp_path) == ["x.npy"]


def put(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"\[Errno 2\] No such file or directory: 'x.npy'"),
        (lambda path: os.mkfifo(path), "x.npy must be a regular file"),
        (lambda path: path.write_bytes(b"abc"), "x.npy: .*"),
        (
            lambda path: save(path, np.ones((3, 2), int)),
            "x.npy must be of dtype float32, .*; got int64: convert it first",
        ),
        (lambda path: save(path, np.ones(3)), r"channel axis must be one of the axes of x.npy, of shape \(3,\); got 1"),
        (
            lambda path: save(path, np.array(3.0)),
            r"channel axis must be one of the axes of x.npy, of shape \(\); got 1",
        ),
        (
            lambda path: save(path, np.ones((1, 200_000))),
            "channel axis must have at most 131072 channels; got 200000.*",
        ),
        (
            lambda path: path.write_bytes(save(path, np.ones((3, 2))).read_bytes()[:-1]),
            r"x.npy: an array of shape \(3, 2\) and dtype float64 must fill 176 bytes; the file has 175",
        ),
        (lambda path: path.write_bytes(save(path, np.ones((3, 2))).read_bytes() + b"a"), "x.npy: .* the file has 177"),
        (lambda path: np.save(path, np.array([None]), allow_pickle=True), "x.npy: an array of .*"),
        (
            lambda path: save(path, np.ones((3, 2), [("a", "f4")])),
            r"x.npy must be of dtype .*; got \[\('a', '<f4'\)\].*",
        ),
    ],
)
def test_files_that_are_no_such_array(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "x.npy")
    before = os.listdir(tmp_path)
    done = nbnorm("stats", "x.npy", "--channel-axis", "1", "--save", "s.npz", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"nbnorm: {message}\n", done.stderr), done.stderr
    assert os.listdir(tmp_path) == before


def test_an_array_without_elements_has_no_statistics(tmp_path: Path) -> None:
    save(tmp_path / "x.npy", np.ones((0, 2)))
    done = nbnorm("stats", "x.npy", "--channel-axis", "1", "--save", "s.npz", cwd=tmp_path)
    assert rows(done.stdout) == [["0", "0", "0", "nan", "inf", "-inf", ""], ["1", "0", "0", "nan", "inf", "-inf", ""]]
    assert done.stderr == "nbnorm: nothing saved: the file has no elements\n"
    state.write_moments(tmp_path / "s.npz", Moments(0, np.zeros(2), np.zeros(2)), {"channel_axis": "1"})
    done = nbnorm("apply", "x.npy", "--stats", "s.npz", "--out", "y.npy", cwd=tmp_path)
    assert done.stderr == "nbnorm: statistics of channel 0 must have elements behind them; got none\n"


def moments(channels: int = 2, m2: float = 3.0) -> Moments:
    return Moments(np.full(channels, 3), np.zeros(channels), np.full(channels, m2))


@pytest.mark.parametrize(
    ("stats", "arguments", "message"),
    [
        ((moments(), {"channel_axis": "1"}), ["--out", "x.npy"], "x.npy is the file that is read; name another .*"),
        (
            (moments(), {"channel_axis": "1"}),
            ["--out", "link.npy"],
            "link.npy is the file that is read; name another .*",
        ),
        ((moments(), {"channel_axis": "1"}), ["--out", "s.npz"], "s.npz is the file that is read; name another .*"),
        ((moments(), {"channel_axis": "1"}), ["--out", "absent/y.npy"], "--out must be in a folder .*"),
        ((moments(), {"channel_axis": "1"}), ["--out", "pipe"], "pipe is not a regular file, and is not replaced"),
        (
            (moments(3), {"channel_axis": "1"}),
            ["--out", "y.npy"],
            r"statistics must be those of 2 channels, as x.npy has; got shape \(3,\)",
        ),
        (
            (moments(), {"channel_axis": "1"}),
            ["--out", "y.npy", "--channel-axis", "0"],
            "statistics must be those of 3 .*",
        ),
        ((moments(), {}), ["--out", "y.npy"], "s.npz names no channel axis; give --channel-axis"),
        (
            (moments(m2=0.0), {"channel_axis": "1"}),
            ["--out", "y.npy", "--eps", "0"],
            "eps must be above 0, as the variance of channel 0 is 0; got 0",
        ),
    ],
)
def test_apply_refuses_before_it_writes(tmp_path: Path, stats: Any, arguments: list[str], message: str) -> None:
    save(tmp_path / "x.npy", np.ones((3, 2)))
    (tmp_path / "link.npy").symlink_to("x.npy")
    os.mkfifo(tmp_path / "pipe")
    state.write_moments(tmp_path / "s.npz", *stats)
    before = {name: (tmp_path / name).lstat() for name in os.listdir(tmp_path)}
    done = nbnorm("apply", "x.npy", "--stats", "s.npz", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"nbnorm: {message}\n", done.stderr), done.stderr
    after = {name: (tmp_path / name).lstat() for name in os.listdir(tmp_path)}
    assert {name: (found.st_ino, found.st_mtime_ns) for name, found in after.items()} == {
        name: (found.st_ino, found.st_mtime_ns) for name, found in before.items()
    }


def test_damaged_statistics_are_one_line(tmp_path: Path) -> None:
    save(tmp_path / "x.npy", np.ones((3, 2)))
    state.write_moments(tmp_path / "s.npz", moments())
    content = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "s.npz").write_bytes(content[:-30])
    done = nbnorm("apply", "x.npy", "--stats", "s.npz", "--out", "y.npy", cwd=tmp_path)
    assert done.stderr == "nbnorm: s.npz: not a .npz file, or damaged: File is not a zip file\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "x.npy"], "Missing option '--channel-axis'"),
        (["stats", "x.npy", "--channel-axis", "1", "--save", "s.pkl"], "path must end in .safetensors or .npz"),
        (["stats", "x.npy", "--channel-axis", "1", "--save", "absent/s.npz"], "'absent' is not a folder"),
        (["apply", "x.npy", "--stats", "s.npz", "--out", "y.npy", "--eps", "-1"], "greater than or equal to 0|x>=0"),
        (["apply", "x.npy", "--stats", "s.npz", "--out", "y.npy", "--eps", "nan"], "greater than or equal to 0|x>=0"),
    ],
)
def test_bad_options(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = nbnorm(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(message, done.stderr)


def sparse(path: Path, shape: tuple[int, ...], dtype: str) -> Path:
    """Zeros that take no room on the disk."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + math.prod(shape) * np.dtype(dtype).itemsize)
    return path


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """Files of the child may have a megabyte, which stops it in the same place as a full disk."""
    sparse(tmp_path / "x.npy", (1000, 2, 1000), "<f4")
    state.write_moments(tmp_path / "s.npz", moments(), {"channel_axis": "1"})
    put(tmp_path, "y.npy", b"old")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    command = [sys.executable, "-c", limit + RUN, "apply", "x.npy", "--stats", "s.npz", "--out", "y.npy"]
    done = subprocess.run(command, env=INHERITED, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "nbnorm: [Errno 27] File too large\n")
    assert (tmp_path / "y.npy").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["s.npz", "x.npy", "y.npy"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    sparse(tmp_path / "x.npy", (8000, 2, 1 << 15), "<f4")  # 2 GB: it is not done before the signal is there
    state.write_moments(tmp_path / "s.npz", moments(), {"channel_axis": "1"})
    command = [sys.executable, "-c", RUN, "apply", "x.npy", "--stats", "s.npz", "--out", "y.npy"]
    child = subprocess.Popen(command, env=INHERITED, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".nbnorm-*.partial")):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    assert child.wait(60) != 0
    assert sorted(os.listdir(tmp_path)) == ["s.npz", "x.npy"]


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_anonymous(*arguments: str | Path) -> int:
    """Bytes of memory that no file stands behind, the most that the command had at once."""
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, arguments)], env=INHERITED, stdout=subprocess.DEVNULL
    )
    most = 0
    while child.poll() is None:
        with open(f"/proc/{child.pid}/status") as status:
            found = re.search(r"^RssAnon:\s+(\d+) kB$", status.read(), re.MULTILINE)
        most = max(most, int(found[1]) * 1024 if found else 0)  # none between the end and the wait
        time.sleep(0.002)
    assert child.returncode == 0
    return most


@pytest.mark.parametrize(
    ("steps", "dtype"),
    [
        (250, "<f4"),
        *(pytest.param(steps, dtype, marks=pytest.mark.slow) for steps, dtype in ((2000, "<f4"), (4000, ">f2"))),
    ],
)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, steps: int, dtype: str) -> None:
    """Files of 0.25 and 2 GB. 60 MB are Python and its libraries; another 60 MB, if kernels have yet to be compiled."""
    x = sparse(tmp_path / "x.npy", (steps, 64, 64, 64), dtype)
    with x.open("r+b") as file:
        file.seek(-np.dtype(dtype).itemsize, os.SEEK_END)
        file.write(np.array(1.0, dtype).tobytes())
    nbnorm("stats", save(tmp_path / "small.npy", np.ones((2, 64), dtype)), "--channel-axis", "1")
    assert peak_anonymous("stats", x, "--channel-axis", "1", "--save", tmp_path / "s.npz") < 130e6
    found = state.read_moments(tmp_path / "s.npz")[0]
    assert found.mean.tolist() == [0.0] * 63 + [1 / (steps * 4096)]
    assert peak_anonymous("apply", x, "--stats", tmp_path / "s.npz", "--out", tmp_path / "y.npy") < 150e6
    y = np.load(tmp_path / "y.npy", mmap_mode="r")
    assert (y.shape, y.dtype, float(y[0, 0, 0, 0])) == ((steps, 64, 64, 64), dtype, 0.0)
    expected = (1 - found.mean[-1]) / math.sqrt(float(found.var()[-1]) + 1e-5)
    np.testing.assert_allclose(float(y[-1, -1, -1, -1]), expected, rtol=1e-3)


@pytest.mark.slow
def test_compiling_for_a_file_of_2_gb_stays_within_200_mb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir(0o700)
    monkeypatch.setitem(INHERITED, "NBNORM_CACHE_DIR", str(tmp_path / "kernels"))
    for shape, dtype in (((2000, 64, 64, 64), "<f4"), ((4000, 1 << 17), "<f4"), ((4000, 64, 64, 64), "<f2")):
        x = sparse(tmp_path / "x.npy", shape, dtype)
        assert x.stat().st_size > 2e9
        assert peak_anonymous("stats", x, "--channel-axis", "1", "--save", tmp_path / "s.npz") < 200e6
        assert peak_anonymous("apply", x, "--stats", tmp_path / "s.npz", "--out", tmp_path / "y.npy") < 200e6
