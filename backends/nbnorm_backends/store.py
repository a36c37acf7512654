"""The folder of compiled kernels, one sealed file for each key: what is read is what this user wrote for that key, or
nothing.

Machine code is run, and the pickle around it runs code when it is read, so the folder and its files must be the user's
alone, and damage must be found before anything is unpickled. Nothing here raises: a cache that cannot be had is no
cache. It can be asked without importing Numba.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LIMIT = 200 * 2**20  # bytes of the folder; the files of one kernel and signature take 0.1 MB
DIGEST = hashlib.sha256().digest_size
NAME = re.compile(r"[0-9a-f]{64}\.kernel(\.[0-9a-f]{16})?")  # the latter is being written, or was left by a kill
KINDS = {"file": stat.S_ISREG, "folder": stat.S_ISDIR}
SUPPORTED = hasattr(os, "geteuid") and {os.open, os.rename, os.unlink} <= os.supports_dir_fd

log = logging.getLogger("nbnorm")
_warned: set[str] = set()


def folder() -> Path | None:
    """Where files are kept: NBNORM_CACHE_DIR, else nbnorm in XDG_CACHE_HOME or ~/.cache; None for nowhere.

    Nowhere, if NBNORM_CACHE_DIR is empty or there is no home.
    """
    named = os.environ.get("NBNORM_CACHE_DIR")
    if named is None:
        home = os.environ.get("HOME")
        caches = os.environ.get("XDG_CACHE_HOME") or (home and os.path.join(home, ".cache"))
        named = caches and os.path.join(caches, "nbnorm")
    return Path(named) if named and SUPPORTED else None


def read(key: bytes) -> bytes | None:
    """What was written for a key, or None."""
    try:
        with _opened() as directory:
            descriptor = os.open(_name(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
            with open(descriptor, "rb") as file:
                problem = _problem(os.fstat(descriptor), "file")
                content = b"" if problem else file.read()
                if not problem and _seal(key, content[DIGEST:]) != content[:DIGEST]:
                    problem = "is damaged"
                if problem:
                    raise OSError(f"{_name(key)} {problem}")
                with suppress(OSError):  # a folder that is only read keeps its times
                    os.utime(descriptor)
        return content[DIGEST:]
    except FileNotFoundError:
        return None
    except OSError as error:
        log.debug("kernel cache: not read: %s", error)
        return None


def write(key: bytes, content: bytes) -> None:
    """Keep this for a key, in place of what was there. The file appears whole, or not at all."""
    try:
        with _opened(create=True) as directory:
            name = _name(key)
            temporary = f"{name}.{os.urandom(8).hex()}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(temporary, flags, 0o600, dir_fd=directory), "wb") as file:
                try:
                    file.write(_seal(key, content) + content)
                    file.flush()
                    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(temporary, dir_fd=directory)
                    raise
            _shrink(directory)
    except OSError as error:
        log.debug("kernel cache: not written: %s", error)


def usage() -> tuple[int, int]:
    """How many files there are, and their bytes."""
    try:
        with _opened() as directory:
            sizes = [size for _, size, _ in _files(directory)]
    except OSError:
        return 0, 0
    return len(sizes), sum(sizes)


def digest_of(sources: Iterable[Path]) -> str:
    """Of the content of source files and their names, in this order."""
    digest = hashlib.sha256()
    for path in sources:
        source = path.read_bytes()
        digest.update(f"{path.name} {len(source)} ".encode() + source)
    return digest.hexdigest()


def _name(key: bytes) -> str:
    return f"{key.hex()}.kernel"


def _seal(key: bytes, content: bytes) -> bytes:
    """What a file begins with. With the key in it, a file under another's name is not taken for that one's."""
    return hashlib.sha256(key + content).digest()


@contextmanager
def _opened(*, create: bool = False) -> Iterator[int]:
    """A descriptor of the folder, by which its files are opened: nobody can put another folder in its place meanwhile.

    Opened each time: a program that becomes a daemon closes its descriptors, and their numbers go to other files.
    """
    path = folder()
    if path is None:
        raise FileNotFoundError("there is no folder")
    if create:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.lstat(path)
    problem = _problem(found, "folder")
    if problem:
        _warn(f"nbnorm keeps no compiled kernels in {path}, which {problem}; set NBNORM_CACHE_DIR to another folder")
        raise OSError(f"{path} {problem}")
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not os.path.samestat(found, os.fstat(descriptor)):
            raise OSError(f"{path} was replaced while it was opened")
        yield descriptor
    finally:
        os.close(descriptor)


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _problem(found: os.stat_result, kind: str) -> str:
    """Why a folder or file is not to be trusted; "" if it is."""
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not KINDS[kind](found.st_mode):
        return f"is not a {kind}"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid} and not to {os.geteuid()}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written to by others (mode {mode:04o})"
    return ""


def _files(directory: int) -> Iterator[tuple[float, int, str]]:
    """(time of last use, bytes, name) of each file that is ours."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    yield found.st_mtime, found.st_size, entry.name


def _shrink(directory: int) -> None:
    """Remove what was not used for longest until the limit holds: files of other versions, above all."""
    files = sorted(_files(directory))
    excess = sum(size for _, size, _ in files) - LIMIT
    for _, size, name in files:
        if excess <= 0:
            return
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
        excess -= size
