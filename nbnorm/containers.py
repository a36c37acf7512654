"""Arrays and texts by name as the bytes of a safetensors or a .npz file, and back.

What is decoded may come from anybody. Nothing is unpickled, and memory is only taken for what the bytes are long enough
for. Whether the contents make sense is not asked here.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nbnorm.arrays import bfloat16
from nbnorm.checks import check_installed
from nbnorm.errors import StateError
from nbnorm.npy import read_header

Arrays = Mapping[str, NDArray[Any]]
Metadata = Mapping[str, str]
Contents = tuple[dict[str, NDArray[Any]], dict[str, str]]

METADATA = "__metadata__"  # what the texts are called in both containers
MAX_HEADER = 1 << 24  # bytes of a safetensors header: that of 100,000 arrays has 8 MB

# Names of dtypes in safetensors and in NumPy (https://huggingface.co/docs/safetensors).
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class Container(Protocol):
    def encode(self, arrays: Arrays, metadata: Metadata) -> bytes:
        """The bytes of a file. Arrays are C-contiguous, in the machine's byte order, of one of `DTYPES`."""

    def decode(self, content: bytes) -> Contents:
        """What `encode` was given; ValueError if the bytes are no such file."""


def container_of(path: str | os.PathLike[str]) -> Container:
    """The container that the end of a path names."""
    suffix = os.path.splitext(path)[1]
    if suffix not in CONTAINERS:
        raise StateError(f"path must end in {' or '.join(CONTAINERS)}; got {os.fspath(path)!r}")
    return CONTAINERS[suffix]


class Safetensors:
    """Eight bytes of length, a JSON header, and the elements; the package checks that they fill the file."""

    def encode(self, arrays: Arrays, metadata: Metadata) -> bytes:
        check_installed("safetensors", "exchange", ".safetensors files need")
        from safetensors.numpy import save  # noqa: PLC0415  an extra

        return save(dict(arrays), dict(metadata))

    def decode(self, content: bytes) -> Contents:
        check_installed("safetensors", "exchange", ".safetensors files need")
        from safetensors import SafetensorError, deserialize  # noqa: PLC0415  an extra

        header = self._header(content)
        try:
            found = deserialize(content)  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            raise ValueError(f"not a safetensors file, or damaged: {error}") from error
        arrays = {
            name: np.frombuffer(tensor["data"], self._dtype(name, tensor["dtype"])).reshape(tensor["shape"])
            for name, tensor in found
        }
        return arrays, dict(json.loads(header).get(METADATA) or {})

    def _header(self, content: bytes) -> bytes:
        """The JSON text, of which deserialize has seen that it is shallow and maps text to text under METADATA."""
        length = int.from_bytes(content[:8], "little")
        if len(content) < 8 or length > min(MAX_HEADER, len(content) - 8):
            most = min(MAX_HEADER, max(len(content) - 8, 0))
            raise ValueError(
                f"not a safetensors file, or cut off: its header must have at most {most} bytes; got {length}"
            )
        return content[8 : 8 + length]

    def _dtype(self, name: str, stored: str) -> np.dtype[Any]:
        if stored not in DTYPES:
            raise ValueError(f"{name} must be of dtype {', '.join(DTYPES)}; got {stored}")
        return bfloat16(name) if stored == "BF16" else np.dtype(DTYPES[stored]).newbyteorder("<")


class Npz:
    """A zip archive of .npy files, as `numpy.savez` writes it; the texts are JSON in an array of bytes.

    bfloat16 stands in it as NumPy itself writes it, as plain bytes ``|V2``.
    """

    def encode(self, arrays: Arrays, metadata: Metadata) -> bytes:
        text = np.frombuffer(json.dumps(dict(metadata)).encode(), np.uint8)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for name, array in (*arrays.items(), (METADATA, text)):
                member = io.BytesIO()
                np.lib.format.write_array(member, array, allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getbuffer())
        return stream.getvalue()

    def decode(self, content: bytes) -> Contents:
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                arrays = self._members(archive, len(content))
        except (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, RuntimeError, struct.error) as error:
            raise ValueError(f"not a .npz file, or damaged: {error}") from error
        return arrays, self._texts(arrays.pop(METADATA, np.zeros(0)).tobytes())

    def _members(self, archive: zipfile.ZipFile, size: int) -> dict[str, NDArray[Any]]:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("members of the .npz file must not be compressed: a small file could fill the memory")
        total = sum(member.file_size for member in members)
        if total > size:
            raise ValueError(f"members of the .npz file must fit into its {size} bytes; got {total}")
        return dict(self._array(member.filename, archive.read(member)) for member in members)

    def _array(self, member: str, content: bytes) -> tuple[str, NDArray[Any]]:
        name = member.removesuffix(".npy")
        try:
            header = read_header(io.BytesIO(content), len(content))
        except ValueError as error:
            raise ValueError(f"{member}: {error}") from error
        dtype = bfloat16(name) if header.dtype.str == "|V2" else header.dtype
        if dtype.name not in DTYPES.values() or header.fortran_order:
            raise ValueError(f"{member} must be of dtype {', '.join(DTYPES.values())} in C order; got {header}")
        return name, np.frombuffer(content, dtype, offset=header.start).reshape(header.shape)

    def _texts(self, content: bytes) -> dict[str, str]:
        try:
            return {str(name): str(text) for name, text in json.loads(content or b"{}").items()}
        except (AttributeError, RecursionError) as error:
            raise ValueError(f"{METADATA} must be a JSON object; got {content[:80]!r}") from error


CONTAINERS: dict[str, Container] = {".safetensors": Safetensors(), ".npz": Npz()}
