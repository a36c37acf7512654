"""Files that are replaced in one step: whoever looks sees the old file or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file to write to and to seek in, which takes the place of `path` when the block ends without an exception.

    It lies in the same folder and is on disk before it is renamed, and the renaming is on disk when this returns. After
    an exception it is removed and `path` is as it was; only a process that is killed leaves it, as
    ``.nbnorm-*.partial``. The file has the permissions of the one that it replaces, or else those of the umask. Through
    a symbolic link the file that it points to is replaced.

    Raises
    ------
    OSError
        If the system refuses: no such folder, no permission, no space. If `path` is there and no regular file, since a
        device or a folder must not be replaced.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise OSError(f"{os.fspath(path)} is not a regular file, and is not replaced")
    partial = target.with_name(f".nbnorm-{uuid.uuid4().hex}.partial")
    file = partial.open("x+b")
    try:
        with file:
            if target.exists():
                shutil.copymode(target, partial)  # before anything is written that others should not read
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
