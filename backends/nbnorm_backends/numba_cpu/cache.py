"""The disk cache of compiled kernels: what a dispatcher asks before it compiles, and tells after.

Numba's own (``cache=True``) keeps an index and data apart, knows the source of one file only, unpickles before it
checks anything, and raises where no folder can be written to. Here one sealed file holds one compiled signature, and
its key is everything that the machine code follows from.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np

from nbnorm import backend
from nbnorm_backends import store
from nbnorm_backends.store import log

try:  # none of it is Numba's public API
    from numba.core import config, serialize, sigutils
    from numba.core.bytecode import FunctionIdentity
    from numba.core.caching import NullCache
    from numba.core.compiler import CompileResult
    from numba.core.runtime.nrt import rtsys

    KNOWN = (
        isinstance(FunctionIdentity._unique_ids, itertools.count)
        and {"_reduce", "_rebuild"} <= vars(CompileResult).keys()
    )
except (ImportError, AttributeError):
    KNOWN = False

# Settings of Numba that differ between processes and leave machine code as it is. All others are part of the key: to
# compile once more than needed costs seconds, a setting that is not known here could cost a wrong result.
UNRELATED = {"CACHE_DIR", "NUMBA_DEFAULT_NUM_THREADS", "NUMBA_NUM_THREADS", "THREADING_LAYER"}


def sealed(dispatcher: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Give a dispatcher a private disk cache: what it compiles is loaded by later processes.

    Parameters
    ----------
    dispatcher : what `numba.njit` returns, not compiled yet
        Everything that its code follows from must be in the sources of this package, or in its arguments' types and
        `name`. A closure's cells are not looked at.
    name : str
        Stable between processes, and its alone.

    Returns
    -------
    dispatcher
        The same one. Without a cache where Numba is not the one that this was written for, or does not compile.
    """
    reason = _refusal(dispatcher)
    if reason:
        log.debug("kernel cache: none for %s: %s", name, reason)
    else:
        dispatcher._cache = _Cache(dispatcher, name)  # type: ignore[attr-defined]
        _begin_new_symbols()
    return dispatcher


def _refusal(dispatcher: Callable[..., Any]) -> str:
    """Why it can have no cache, or ""."""
    if not KNOWN:
        return f"numba {numba.__version__} is not known"
    if not isinstance(getattr(dispatcher, "_cache", None), NullCache):
        return "it is not compiled, or has a cache already"
    try:
        _sources()  # now, when they are what was imported: later they may have been edited
    except OSError as error:
        return f"the sources cannot be read: {error}"
    return ""


class _Cache:
    """The methods of ``numba.core.caching._Cache``. Called under Numba's compiler lock; none raises."""

    def __init__(self, dispatcher: Any, name: str) -> None:
        self._function = name, _stable(dispatcher.targetoptions), _stable(dispatcher.locals)
        self._saves = self._loads = True

    @property
    def cache_path(self) -> str | None:
        path = store.folder()
        return None if path is None else str(path)

    def enable(self) -> None:
        self._saves = self._loads = True

    def disable(self) -> None:
        self._saves = self._loads = False

    def flush(self) -> None:
        """Numba wants all signatures compiled anew."""
        self._loads = False

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled signature, or None, after which Numba compiles it."""
        try:
            found = self._load(sig, target_context) if self._loads else None
        except Exception:  # noqa: BLE001  whatever is wrong with it, it can be compiled
            log.debug("kernel cache: not loaded: %s", self._function[0], exc_info=True)
            found = None
        if found is None:
            _begin_new_symbols()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled signature, if that can be done."""
        try:
            if data.lifted or data.library.has_dynamic_globals:
                log.debug("kernel cache: %s refers to objects of this process", self._function[0])
            elif self._saves and store.folder():
                store.write(self._key(sig, data.codegen), serialize.dumps(data._reduce()))
        except Exception:  # noqa: BLE001  it has been compiled, and works without
            log.debug("kernel cache: not saved: %s", self._function[0], exc_info=True)

    def _load(self, sig: Any, target_context: Any) -> Any:
        content = store.read(self._key(sig, target_context.codegen()))
        if content is None:
            return None
        rtsys.initialize(target_context)  # memory for arrays: all of Numba's runtime that kernels call
        found = CompileResult._rebuild(target_context, *pickle.loads(content))
        args, _ = sigutils.normalize_signature(sig)
        return found if tuple(found.signature.args) == tuple(args) else None

    def _key(self, sig: Any, codegen: Any) -> bytes:
        types = [repr(part) for part in sigutils.normalize_signature(sig)]
        key = self._function, types, codegen.magic_tuple(), _settings(), _versions(), _sources()
        return hashlib.sha256(repr(key).encode()).digest()


def _begin_new_symbols() -> None:
    """Number the functions that are compiled next from a random start.

    Numba tells functions of one name and signature apart by a number that counts from one in each process, and so do
    the symbols of their machine code. Two files from two processes could define one symbol as two functions, of which a
    third process would run the first for both: closures and lambdas are such functions.
    """
    FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(7), "big"))


def _stable(options: dict[str, Any]) -> list[tuple[str, str]]:
    """In one order: that of a set of strings differs between processes."""
    return [
        (name, repr(sorted(value) if isinstance(value, set | frozenset) else value))
        for name, value in sorted(options.items())
    ]


def _settings() -> list[tuple[str, str]]:
    return [(name, repr(value)) for name, value in sorted(vars(config).items()) if _is_setting(name)]


def _is_setting(name: str) -> bool:
    return name.isupper() and name not in UNRELATED and not name.startswith("CUDA_")


def _versions() -> tuple[Any, ...]:
    packages = numba.__version__, llvmlite.__version__, np.__version__
    return *packages, sys.implementation.name, sys.version_info[:2], sys.abiflags


@functools.cache
def _sources() -> str:
    """A digest of this package's sources, of the contract, whose constants are compiled in, and of what compiled
    programs call; 1 ms."""
    contract = Path(backend.__file__)
    interop = contract.parent / "interop" / "numba.py"
    return store.digest_of((*sorted(Path(__file__).parent.glob("*.py")), contract, interop))
