"""State files: what is written comes back, and whatever is damaged, forged or nonsense is one StateError."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nbnorm
from nbnorm import StateError, containers, state
from nbnorm.files import replacing
from nbnorm.state import read_moments, read_state, write_moments, write_state

pytest.importorskip("safetensors", reason="safetensors is not installed (it comes with the exchange extra)")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed (it comes with the torch extra)")

SUFFIXES = (".npz", ".safetensors")
FLOATS = ("float64", "float32", "float16", "bfloat16")


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"layer{request.param}"


def layer() -> dict[str, Any]:
    return {
        "running_mean": np.array([0.5, -1e300]),
        "running_var": np.array([1.0, 5e-324]),
        "weight": np.array([1.0, 3.140625], ml_dtypes.bfloat16),
        "bias": np.array([6e-8, -65504.0], np.float16),
        "num_batches_tracked": np.array(7),
    }


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """To the last bit, dtypes and shapes too."""
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape, found[name].tobytes()) == (array.dtype, array.shape, array.tobytes())
        for name, array in expected.items()
    )


# ---- what is written comes back --------------------------------------------------------------------------------------


def test_arrays_and_texts_come_back(path: Path) -> None:
    metadata = {"convention": "torch", "note": 'café "q" \\ \n\x00', "": "x"}
    del metadata[""]
    write_state(path, layer(), metadata)
    arrays, found = read_state(path)
    assert same(arrays, layer())
    assert found == metadata
    assert list(arrays) == sorted(layer())
    arrays["weight"][0] = 0  # they are the caller's own


@pytest.mark.parametrize(
    "dtype", [*FLOATS, *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "bool"]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_every_dtype_and_shape(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    write_state(path, {"x": array})
    assert same(read_state(path)[0], {"x": array})


def test_order_in_memory_and_of_bytes_does_not_matter(path: Path) -> None:
    x = np.arange(12.0).reshape(3, 4)
    write_state(path, {"transposed": x.T, "steps": x[::2, ::-1], "swapped": x.astype(">f8")})
    assert same(read_state(path)[0], {"transposed": x.T.copy(), "steps": x[::2, ::-1].copy(), "swapped": x})


def test_tensors_are_taken(path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    write_state(path, torch.nn.BatchNorm1d(3, dtype=torch.bfloat16).eval().state_dict())
    arrays, _ = read_state(path)
    assert arrays["running_var"].dtype == ml_dtypes.bfloat16
    assert arrays["num_batches_tracked"].tolist() == 0


def test_names_that_are_awkward_in_archives(path: Path) -> None:
    arrays = {name: np.ones(1) for name in ("../a", "/b", "c.npy", "d/", "é", "file", "x" * 1000, "sp ace", "\n")}
    write_state(path, arrays)
    assert same(read_state(path)[0], arrays)


def test_no_arrays_at_all(path: Path) -> None:
    write_state(path, {})
    assert read_state(path) == ({}, {})


def test_other_programs_read_the_files(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    expected = np.array([0.5, -1e300])
    for suffix, load in ((".safetensors", load_file), (".npz", np.load)):
        arrays = {
            name: array for name, array in layer().items() if name != "weight"
        }  # NumPy has no bfloat16 of its own
        write_state(tmp_path / f"x{suffix}", arrays)
        assert np.array_equal(load(tmp_path / f"x{suffix}")["running_mean"], expected)


def test_moments_merge_after_reading_as_before(path: Path) -> None:
    x = 1e8 + np.random.default_rng(0).normal(size=(300, 4))
    first, second = nbnorm.moments(x[:100], axis=0), nbnorm.moments(x[100:], axis=0)
    write_moments(path, first.merge(first), {"channel_axis": "1"})
    found, metadata = read_moments(path)
    assert metadata == {"channel_axis": "1"}
    after, before = found.merge(second), first.merge(first).merge(second)
    assert np.count_nonzero(found.residual)
    for name in ("count", "mean", "m2", "residual"):
        assert np.array_equal(getattr(after, name), np.broadcast_to(getattr(before, name), (4,)))


def test_a_stream_goes_on_from_its_file(path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6, 2))
    stream = nbnorm.Welford()
    stream.update(x[:2])
    write_moments(path, stream.moments)
    again = nbnorm.Welford(read_moments(path)[0])
    again.update(x[2:])
    np.testing.assert_allclose(again.var(), x.var(axis=0), rtol=1e-14)
    with pytest.raises(TypeError, match="moments must be Moments; got int"):
        nbnorm.Welford(3)


# ---- what is refused when written ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weight": np.array([[1, 2], [3, np.nan]])}, r"weight\[1, 1\] must be finite; got nan"),
        ({"running_mean": np.array(np.inf)}, "running_mean must be finite; got inf"),
        ({"b": np.array([0, -np.inf], ml_dtypes.bfloat16)}, r"b\[1\] must be finite; got -inf"),
        ({"a.b.running_var": np.array([1, -1e-9])}, r"a.b.running_var\[1\] must be at least 0; got -1e-09"),
        ({"m2": np.array([-1.0])}, r"m2\[0\] must be at least 0; got -1"),
        ({"count": np.array([3, -1])}, r"count\[1\] must be at least 0; got -1"),
        ({"num_batches_tracked": np.array(1.0)}, "num_batches_tracked must be whole numbers; got dtype float64"),
        ({"running_mean": np.array([1])}, "running_mean must be of a floating dtype; got int64"),
        (
            {"a.running_mean": np.zeros(2), "a.running_var": np.ones(3), "b.running_var": np.ones(2)},
            r"a.running_mean and a.running_var must have one shape; got \(2,\) and \(3,\)",
        ),
        ({"x": np.zeros(2, complex)}, "x must be of dtype float64, float32, float16, .*; got complex128"),
        ({"x": np.array(["a"])}, "x must be of dtype .*; got <U1"),
        ({"x": np.array([None])}, "x must be of dtype .*; got object"),
        ({"": np.zeros(2)}, "a name must be text .*; got ''"),
        ({"__metadata__": np.zeros(2)}, "a name must be text .* other than '__metadata__'; got '__metadata__'"),
        ({"a\0": np.zeros(2)}, "a name must be text .* without NUL"),
        ({"\ud800": np.zeros(2)}, "a name must be text"),
        ({"x" * 1001: np.zeros(2)}, "a name must be text of 1 to 1000 characters"),
        ({3: np.zeros(2)}, "a name must be text .*; got 3"),
    ],
)
def test_states_that_make_no_sense(path: Path, arrays: dict[str, Any], message: str) -> None:
    write_state(path, {"x": np.ones(1)})
    with pytest.raises(StateError, match=message):
        write_state(path, arrays)
    assert read_state(path)[0]["x"] == 1  # the file is as it was
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "metadata", [{"a": 1}, {"nbnorm.sha256": "x"}, {"a": "\ud800"}, {1: "a"}, {"__metadata__": "x"}]
)
def test_metadata_that_cannot_be_kept(path: Path, metadata: Any) -> None:
    with pytest.raises(StateError, match="must be text"):
        write_state(path, {}, metadata)
    assert os.listdir(path.parent) == []


def test_what_is_no_array_and_paths_of_no_container(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"x must be an array .*; got list"):
        write_state(tmp_path / "a.npz", {"x": [1.0]})
    with pytest.raises(TypeError, match="masked arrays have no single meaning"):
        write_state(tmp_path / "a.npz", {"x": np.ma.ones(2)})
    for action in (read_state, lambda name: write_state(name, {})):
        with pytest.raises(StateError, match=r"path must end in .safetensors or .npz; got '.*a.pkl'"):
            action(tmp_path / "a.pkl")


# ---- one step, or none -----------------------------------------------------------------------------------------------


def test_permissions_follow_the_umask_or_the_file_before(path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_state(path, {})
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        write_state(path, {})
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(previous)


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / path.name
    path.symlink_to(target)
    write_state(path, layer())
    assert path.is_symlink()
    assert not target.is_symlink()
    assert same(read_state(target)[0], layer())


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(failure), replacing(target) as file:  # noqa: PT012
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
        raise failure
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_contents_are_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(kind(fd)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))

    def kind(descriptor: int) -> str:
        found = os.fstat(descriptor)
        return "folder" if stat.S_ISDIR(found.st_mode) else f"{found.st_size} bytes"

    with replacing(tmp_path / "a") as file:
        file.write(b"abc")
    assert events == ["3 bytes", "rename", "folder"]


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path: Path) -> None:
    """Files of the child may have 1000 bytes, which stops it in the same place as a full disk."""
    program = """
import resource, sys, numpy as np
from nbnorm.state import write_state
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_state(sys.argv[1], {"x": np.zeros(1000)})
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a.npz"], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("File too large\n", "")
    assert os.listdir(tmp_path) == []


def test_devices_and_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.npz").mkdir()
    os.mkfifo(tmp_path / "b.npz")
    for name in ("a.npz", "b.npz"):
        with pytest.raises(OSError, match=f"{name} is not a regular file, and is not replaced"):
            write_state(tmp_path / name, {})
    with pytest.raises(FileNotFoundError):
        write_state(tmp_path / "absent" / "c.npz", {})
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]


# ---- damage ----------------------------------------------------------------------------------------------------------


def small(path: Path) -> bytes:
    write_state(path, {"running_mean": np.array([0.5]), "running_var": np.array([2.0])}, {"a": "b"})
    return path.read_bytes()


def assert_same_or_refused(path: Path, content: bytes) -> bool:
    """Read changed contents: what was written, or StateError, and nothing else. Whether it was refused."""
    path.write_bytes(content)
    try:
        arrays, metadata = read_state(path)
    except StateError:
        return True
    assert same(arrays, {"running_mean": np.array([0.5]), "running_var": np.array([2.0])})
    assert metadata == {"a": "b"}
    return False


@pytest.mark.filterwarnings("ignore")  # Python warns of what it finds in damaged headers
def test_files_cut_anywhere(path: Path) -> None:
    content = small(path)
    for length in range(len(content)):
        assert assert_same_or_refused(path, content[:length]), length
    assert not assert_same_or_refused(path, content)


@pytest.mark.filterwarnings("ignore")
def test_every_bit_flipped(path: Path) -> None:
    content = bytearray(small(path))
    refused = 0
    for place in range(len(content)):
        for bit in range(8):
            content[place] ^= 1 << bit
            refused += assert_same_or_refused(path, bytes(content))
            content[place] ^= 1 << bit
    # In a zip archive dates, versions and permissions mean nothing here; in safetensors hardly a bit means nothing.
    assert refused > len(content) * 8 * (0.75 if path.suffix == ".npz" else 0.98)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_changed_at_random(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    content = small(path)

    @settings(max_examples=400, deadline=1000)
    @given(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 20), st.binary(max_size=20)), max_size=4)
    )
    def check(changes: list[tuple[int, int, bytes]]) -> None:
        changed = content
        for place, length, new in changes:
            changed = changed[:place] + new + changed[place + length :]
        assert_same_or_refused(path, changed)

    check()


# ---- forgery ---------------------------------------------------------------------------------------------------------


def npz(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def safetensors(header: Any, elements: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + elements


def compressed() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.zeros(10_000_000))
    return stream.getvalue()


def pickled() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, x=np.array([os.system], dtype=object))
    return stream.getvalue()


def overlapping() -> bytes:
    """A hundred members of one name and place: together they are larger than the file."""
    content = npz(x=bytes(10_000))
    begin = content.index(b"PK\x01\x02")
    entry, tail = content[begin : content.index(b"PK\x05\x06")], bytearray(content[content.index(b"PK\x05\x06") :])
    tail[8:12] = struct.pack("<HH", 100, 100)
    tail[12:16] = struct.pack("<I", 100 * len(entry))
    return content[:begin] + entry * 100 + bytes(tail)


ONE = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("suffix", "make", "message"),
    [
        (".npz", lambda: b"", "not a .npz file, or damaged: File is not a zip file"),
        (".npz", compressed, "members of the .npz file must not be compressed"),
        (".npz", overlapping, "members of the .npz file must fit into its|Overlapped"),
        (".npz", pickled, r"x.npy: an array of shape \(1,\) and dtype object must fill"),
        (
            ".npz",
            lambda: npz(x=npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + bytes(8)),
            "x.npy must be of dtype .*'O'",
        ),
        (
            ".npz",
            lambda: npz(x=npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,)}")),
            "x.npy: an array of shape .* must fill 8000000000[0-9]+ bytes; the file has",
        ),
        (
            ".npz",
            lambda: npz(x=npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}")),
            "x.npy: shape must not be negative",
        ),
        (
            ".npz",
            lambda: npz(x=npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**70}, 0)}}")),
            "too large|too big|Maximum allowed",
        ),
        (
            ".npz",
            lambda: npz(x=npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({'1,' * 99} 0)}}")),
            "dimension",
        ),
        (".npz", lambda: npz(x=npy("[" * 5000)), "x.npy: header of the .npy file cannot be read|x.npy: Cannot parse"),
        (".npz", lambda: npz(x=npy("{[]: 1}")), "x.npy: header of the .npy file cannot be read|x.npy: Cannot parse"),
        (".npz", lambda: npz(x=npy("{" + " " * 20_000)), "x.npy: Header info length .* is large"),
        (".npz", lambda: npz(x=b"\x93NUMPY\x03\x00"), "x.npy: version of the .npy format must be 1.0 or 2.0; got 3.0"),
        (".npz", lambda: npz(__metadata__=metadata_npy(b"[" * 100_000)), "__metadata__ must be a JSON object"),
        (".npz", lambda: npz(__metadata__=metadata_npy(b"[1]")), r"__metadata__ must be a JSON object; got b'\[1\]'"),
        (".npz", lambda: npz(__metadata__=metadata_npy(b"{")), "Expecting property name"),
        (".npz", lambda: npz(__metadata__=metadata_npy(b"\xff{}")), "utf-8"),
        (".npz", lambda: npz(x=metadata_npy(b"abc")), "has no checksum: it was not written as a state file"),
        (".safetensors", lambda: b"", "cut off: its header must have at most 0 bytes; got 0"),
        (".safetensors", lambda: safetensors({}, length=1 << 63), "its header must have at most 2 bytes"),
        (".safetensors", lambda: safetensors(b"{" + b" " * (1 << 24)), "at most 16777216 bytes; got 16777217"),
        (".safetensors", lambda: safetensors(b"[" * 10_000), "not a safetensors file, or damaged"),
        (".safetensors", lambda: safetensors({"__metadata__": {"a": ["b"]}}), "not a safetensors file, or damaged"),
        (".safetensors", lambda: safetensors({"x": ONE}), "not a safetensors file, or damaged"),
        (".safetensors", lambda: safetensors({"x": ONE}, bytes(9)), "not a safetensors file, or damaged"),
        (".safetensors", lambda: safetensors({"x": ONE, "y": ONE}, bytes(8)), "not a safetensors file, or damaged"),
        (
            ".safetensors",
            lambda: safetensors({"x": ONE | {"shape": [1 << 63, 0], "data_offsets": [0, 0]}}),
            "damaged|too large|too big|Maximum allowed",
        ),
        (
            ".safetensors",
            lambda: safetensors({"x": ONE | {"dtype": "F8_E4M3"}}, bytes(1)),
            "damaged|x must be of dtype",
        ),
        (".safetensors", lambda: safetensors({"x": ONE}, bytes(8)), "has no checksum"),
    ],
)
def test_forged_files(tmp_path: Path, suffix: str, make: Callable[[], bytes], message: str) -> None:
    path = tmp_path / f"forged{suffix}"
    path.write_bytes(make())
    with pytest.raises(StateError, match=message):
        read_state(path)


def metadata_npy(text: bytes) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.frombuffer(text, np.uint8))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"running_var": np.array([1.0, -1.0])}, r": running_var\[1\] must be at least 0; got -1.0"),
        ({"weight": np.array([np.nan])}, r": weight\[0\] must be finite; got nan"),
        ({"running_mean": np.zeros(2), "running_var": np.zeros(3)}, "must have one shape"),
    ],
)
def test_nonsense_under_a_right_checksum(
    path: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, Any], message: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(state, "_check", lambda *arguments: None)
        write_state(path, arrays)
    with pytest.raises(StateError, match=message):
        read_state(path)


def test_another_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(state, "VERSION", "2")
        write_state(path, {})
    with pytest.raises(StateError, match=f"{path}: version of a state file must be 1; got 2"):
        read_state(path)


def test_files_that_are_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StateError, match="No such file") as caught:
        read_state(path)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    os.mkfifo(path)
    with pytest.raises(StateError, match="must be a regular file"):
        read_state(path)
    path.unlink()
    write_state(path, layer())
    monkeypatch.setattr(state, "MAX_FILE", 100)
    with pytest.raises(StateError, match="must have at most 100 bytes"):
        read_state(path)


@pytest.mark.parametrize(
    "arrays",
    [
        layer(),
        {"count": np.array(1), "mean": np.zeros(2), "residual": np.zeros(2), "m2": np.zeros(2)},
        {"count": np.ones(2, int), "mean": np.zeros(2, "f4"), "residual": np.zeros(2), "m2": np.zeros(2)},
    ],
)
def test_other_states_are_no_moments(path: Path, arrays: dict[str, Any]) -> None:
    write_state(path, arrays)
    with pytest.raises(StateError, match="moments must be count, mean, residual, m2 of one shape; got"):
        read_moments(path)


def test_without_safetensors_its_files_say_so_and_the_others_work(tmp_path: Path) -> None:
    program = """
import sys; sys.modules["safetensors"] = None
import nbnorm.checks as checks
checks.find_spec = lambda name: None
import nbnorm.state as state
state.write_state(sys.argv[1] + "/a.npz", {})
try:
    state.write_state(sys.argv[1] + "/a.safetensors", {})
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.stdout == ".safetensors files need the package safetensors: pip install 'nbnorm[exchange]'\n"
    assert os.listdir(tmp_path) == ["a.npz"]


def test_large_headers_are_within_their_cap() -> None:
    """Names of a hundred thousand arrays, as the cap promises."""
    arrays = {f"layers.{place}.running_mean": np.zeros(1) for place in range(100_000)}
    content = containers.CONTAINERS[".safetensors"].encode(arrays, {})
    assert len(containers.CONTAINERS[".safetensors"].decode(content)[0]) == 100_000


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_state_keeps_its_metadata(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"layer.{ending}"
    layer = nbnorm.BatchNorm.with_convention("keras", 2)
    write_state(path, layer.state_dict(), {"note": "ours"})
    arrays, metadata = read_state(path)
    assert metadata == {**layer.state_dict().metadata, "note": "ours"}
    with pytest.raises(StateError, match="convention must be torch"):
        nbnorm.BatchNorm(2, eps=1e-3).load_state_dict(arrays, metadata)
    layer.load_state_dict(arrays, metadata)
