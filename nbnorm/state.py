"""State files: arrays by name and text by name, in safetensors or .npz containers, which are checked when read.

Neither container notices every damage: safetensors has no checksum, and a .npz file has one of each array alone. So a
SHA-256 of all contents is among the metadata, and whatever is read is what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm.arrays import Array, adapter_of
from nbnorm.containers import DTYPES, METADATA, container_of
from nbnorm.errors import StateError
from nbnorm.files import replacing
from nbnorm.statistics import Moments

Arrays = dict[str, NDArray[Any]]
Metadata = dict[str, str]

VERSION = "1"  # of what the contents mean; a file of another version is refused
MAX_FILE = 1 << 30  # bytes: it is read into memory as a whole, and states of norms are small
RESERVED = "nbnorm."  # begins the names of the metadata that are added here
VERSION_NAME, CHECKSUM_NAME = f"{RESERVED}version", f"{RESERVED}sha256"
MAX_NAME = 1000  # characters

# What an array is follows from the last part of its name: "running_var", or "layer1.bn.running_var".
MEANS, VARIANCES = ("mean", "residual", "running_mean"), ("m2", "var", "running_var")
COUNTS = ("count", "num_batches_tracked")
SAME_SHAPE = (("mean", "residual", "m2", "var"), ("running_mean", "running_var"))


def write_state(
    path: str | os.PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays and text to a state file. A file that is there is replaced in one step, or left as it was.

    Parameters
    ----------
    path : path
        Ends in ``.safetensors`` (which needs the package safetensors) or ``.npz``.
    arrays : mapping from str to array
        Of any kind that nbnorm takes; float64, float32, float16, bfloat16, integers or bool, of any shape.
    metadata : mapping from str to str
        Joins what a `State` of a layer says of itself. Names must not begin with "nbnorm.".

    Raises
    ------
    StateError
        If `read_state` would not read it: a dtype, a value that is not finite, a negative variance or count, statistics
        that differ in shape.
    OSError
        If the system refuses: no such folder, no permission, no space.

    Examples
    --------
    >>> import os, tempfile, numpy as np
    >>> from nbnorm.state import read_state, write_state
    >>> path = os.path.join(tempfile.mkdtemp(), "layer.npz")
    >>> write_state(path, {"running_mean": np.zeros(2), "running_var": np.ones(2)}, {"convention": "torch"})
    >>> arrays, metadata = read_state(path)
    >>> arrays["running_var"].tolist(), metadata
    ([1.0, 1.0], {'convention': 'torch'})
    """
    container = container_of(path)
    plain = {name: _plain(name, array) for name, array in arrays.items()}
    own = getattr(arrays, "metadata", {})  # of a `State`, whose numbers mean nothing certain without it
    sealed = dict(own) | dict(metadata or {}) | {VERSION_NAME: VERSION}
    _check_texts(plain, sealed)
    _check(path, plain)
    content = container.encode(plain, sealed | {CHECKSUM_NAME: digest(plain, sealed)})
    with replacing(path) as file:
        file.write(content)


def read_state(path: str | os.PathLike[str]) -> tuple[Arrays, Metadata]:
    """Arrays and text of a state file, as `write_state` was given them; sorted by name.

    Nothing in a file is executed, and no length that it states is believed before the file is seen to be as long.

    Parameters
    ----------
    path : path
        Ends in ``.safetensors`` or ``.npz``.

    Returns
    -------
    (arrays, metadata) : dict from str to ndarray, dict from str to str

    Raises
    ------
    StateError
        For whatever is wrong: no such file, another format or version, damage, an array that `write_state` would not
        write.
    """
    container = container_of(path)
    try:
        arrays, metadata = container.decode(_content(Path(path)))
        _check_seal(arrays, metadata)
    except (OSError, MemoryError, OverflowError, TypeError, ValueError) as error:
        raise StateError(f"{os.fspath(path)}: {error}") from error
    _check(path, arrays)
    native = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in sorted(arrays.items())}
    return native, dict(sorted(metadata.items()))


def write_moments(path: str | os.PathLike[str], moments: Moments, metadata: Mapping[str, str] | None = None) -> None:
    """Write moments to a state file: count, mean, residual and m2, so that they merge later as they would now.

    Raises
    ------
    StateError, OSError
        As for `write_state`; NaN and Inf are refused.

    Examples
    --------
    >>> import os, tempfile, numpy as np, nbnorm
    >>> from nbnorm.state import read_moments, write_moments
    >>> path = os.path.join(tempfile.mkdtemp(), "stats.npz")
    >>> write_moments(path, nbnorm.moments(np.arange(6.0).reshape(3, 2), axis=0))
    >>> moments, metadata = read_moments(path)
    >>> moments.merge(nbnorm.moments(np.ones((1, 2)), axis=0)).mean.tolist()
    [1.75, 2.5]
    """
    count = np.broadcast_to(np.asarray(moments.count, np.int64), moments.mean.shape)
    arrays = {"count": count, "mean": moments.mean, "residual": moments.residual, "m2": moments.m2}
    write_state(path, arrays, metadata)


def read_moments(path: str | os.PathLike[str]) -> tuple[Moments, Metadata]:
    """Moments and text that `write_moments` was given.

    Raises
    ------
    StateError
        As for `read_state`; if the file holds something else than moments.
    """
    arrays, metadata = read_state(path)
    wanted = {"count": np.int64, "mean": np.float64, "residual": np.float64, "m2": np.float64}
    found = {name: array.dtype for name, array in arrays.items()}
    if found != wanted or arrays["count"].shape != arrays["mean"].shape:
        raise StateError(f"{os.fspath(path)}: moments must be {', '.join(wanted)} of one shape; got {', '.join(found)}")
    return Moments(arrays["count"], arrays["mean"], arrays["m2"], arrays["residual"]), metadata


# ---- what is in a state ----------------------------------------------------------------------------------------------


def _plain(name: str, array: Array) -> NDArray[Any]:
    """A C-contiguous array of the machine's byte order: safetensors would write others' memory as it lies."""
    found = adapter_of(array, name).view(array, name)
    if found.dtype.name not in DTYPES.values():
        raise StateError(f"{name} must be of dtype {', '.join(DTYPES.values())}; got {found.dtype}")
    return np.asarray(found, found.dtype.newbyteorder("="), order="C")


def _check_texts(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """StateError where a container cannot keep a name or a text."""
    for name in (*arrays, *metadata):
        if not _is_text(name) or not 0 < len(name) <= MAX_NAME or "\0" in name or name == METADATA:
            raise StateError(
                f"a name must be text of 1 to {MAX_NAME} characters without NUL, other than {METADATA!r}; got {name!r}"
            )
    for name, value in metadata.items():
        if not _is_text(value) or (name.startswith(RESERVED) and name != VERSION_NAME):
            raise StateError(f"metadata[{name!r}] must be text, under a name without {RESERVED!r}; got {value!r}")


def _is_text(value: object) -> bool:
    """Whether it is a str that UTF-8 has bytes for: a lone surrogate has none."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _content(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # to open a pipe would wait for somebody to write to it
        raise StateError("must be a regular file")
    with path.open("rb") as file:
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise StateError(f"a state file must have at most {MAX_FILE} bytes")
    return content


def _check_seal(arrays: Mapping[str, NDArray[Any]], metadata: Metadata) -> None:
    """Check the checksum and the version, and take them out of the metadata."""
    stated = metadata.pop(CHECKSUM_NAME, None)
    if stated is None:
        raise StateError("has no checksum: it was not written as a state file")
    if stated != digest(arrays, metadata):
        raise StateError("contents do not agree with their checksum: the file is damaged")
    version = metadata.pop(VERSION_NAME, None)
    if version != VERSION:
        raise StateError(f"version of a state file must be {VERSION}; got {version}")


def digest(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> str:
    """SHA-256 of a JSON text with all but the elements, and of the elements in little-endian C order."""
    ordered = sorted(arrays.items())
    head = [sorted(metadata.items()), [(name, array.dtype.name, array.shape) for name, array in ordered]]
    found = hashlib.sha256(json.dumps(head).encode())
    for _, array in ordered:
        found.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return found.hexdigest()


def _check(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """StateError where an array cannot be what its name says."""
    for name, array in arrays.items():
        kind = name.rpartition(".")[2]
        whole = array.dtype.kind in "iu"
        if kind in COUNTS and not whole:
            raise StateError(f"{os.fspath(path)}: {name} must be whole numbers; got dtype {array.dtype}")
        if kind in MEANS + VARIANCES and (whole or array.dtype == np.bool_):
            raise StateError(f"{os.fspath(path)}: {name} must be of a floating dtype; got {array.dtype}")
        _check_each(path, name, array, np.isfinite(array), "finite")
        if kind in VARIANCES + COUNTS:
            _check_each(path, name, array, array >= 0, "at least 0")
    for name in arrays:
        _check_shapes(path, name, arrays)


def _check_each(path: str | os.PathLike[str], name: str, array: NDArray[Any], good: NDArray[Any], what: str) -> None:
    if not good.all():
        index = tuple(int(place) for place in np.argwhere(~good)[0])
        where = f"[{', '.join(map(str, index))}]" if index else ""
        raise StateError(f"{os.fspath(path)}: {name}{where} must be {what}; got {array[index]}")


def _check_shapes(path: str | os.PathLike[str], name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    prefix, dot, kind = name.rpartition(".")
    for group in SAME_SHAPE:
        for other in group if kind in group else ():
            theirs = arrays.get(prefix + dot + other)
            if theirs is not None and theirs.shape != arrays[name].shape:
                shapes = f"{arrays[name].shape} and {theirs.shape}"
                raise StateError(
                    f"{os.fspath(path)}: {name} and {prefix}{dot}{other} must have one shape; got {shapes}"
                )
