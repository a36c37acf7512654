"""Which backend runs, and why: plugin discovery, the order of preference, and the record of decisions.

Order of preference: ``backend=`` on the call (strict) > `use_backend` > the environment variable NBNORM_BACKEND >
the built-in order of the input's device. A third-party backend runs only where one of the first three names it.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from nbnorm.backend import API_VERSION, WHOLE_OPS, Backend, Request
from nbnorm.errors import BackendError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "nbnorm.backends"
BUILT_IN_ORDER = {"cpu": ("numba", "numpy"), "cuda": ("cuda",)}
BUILT_IN_PACKAGE = "nbnorm_backends"
BUILT_IN_NAMES = {name for order in BUILT_IN_ORDER.values() for name in order}
NAME = re.compile(r"[a-z][a-z0-9_]*")
BUILT_IN = "built-in order"
NAMED = "backend="
KEPT_OUT = "kept out by NBNORM_DISABLE_PLUGINS"

log = logging.getLogger("nbnorm")


@dataclass(frozen=True, slots=True)
class Decision:
    """What was chosen for one request, who asked for it, and why the others were not taken.

    Attributes
    ----------
    request : Request
    source : str
        "backend=", "use_backend", "NBNORM_BACKEND" or "built-in order".
    chosen : str or None
        Name of the backend.
    rejected : tuple of (name, reason)
        The backends asked before it.
    copies : tuple of str
        What has to be copied before a backend can see it, with the reason.
    fused : bool
        Whether the backend has the whole request in its own passes over memory, or its mask, activation or residual are
        composed around them with NumPy, in temporary arrays.
    """

    request: Request
    source: str
    chosen: str | None
    rejected: tuple[tuple[str, str], ...]
    copies: tuple[str, ...] = ()
    fused: bool = True

    def __str__(self) -> str:
        op, device, dtype = self.request[:3]
        lines = [f"{op} on {device}, {dtype}: {self._verdict()}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected]
        lines += [f"  copied: {copy}" for copy in self.copies]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.chosen is None:
            return f"no backend takes it (asked through {self.source})"
        chosen = self.chosen if self.fused else f"{self.chosen}, composed"
        if self.source == NAMED:
            return f"{chosen} (named by backend=)"
        order = f"the {BUILT_IN}" if self.source == BUILT_IN else f"{self.source}'s order"
        return f"{chosen} (the first in {order} to take it)"


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """One backend as `backends()` lists it.

    Attributes
    ----------
    name : str
        Of the entry point.
    distribution : str
        The package that brings it.
    target : str
        What the entry point names.
    state : str
        "found" (not imported yet), "loaded", "broken" (it failed to load) or "refused" (its name is not usable, or
        NBNORM_DISABLE_PLUGINS keeps it out).
    reason : str
        Why it is broken or refused; "" otherwise.
    """

    name: str
    distribution: str
    target: str
    state: str
    reason: str = ""


class Registry:
    """Backends by name: found once among the entry points, loaded on demand, each at most once.

    Parameters
    ----------
    find : callable that returns the entry points of the group; tests pass their own.
    """

    def __init__(self, find: Callable[[], Iterable[EntryPoint]] | None = None) -> None:
        self._find = find or _installed
        self._lock = threading.RLock()  # re-entrant: a plugin may look at the registry while it loads
        self._points: dict[str, EntryPoint] | None = None
        self._refused: list[BackendInfo] = []
        self._loaded: dict[str, Backend | str] = {}  # the backend, or the reason why there is none
        self._loading: set[str] = set()
        self.forked = False  # whether this process is a forked child
        self._decided: dict[tuple[tuple[str, ...], str, Request], Decision] = {}
        self.calls: dict[Any, Any] = {}  # what was remembered of calls: forgotten with the decisions

    def scan(self) -> dict[str, EntryPoint]:
        """The usable entry points by name, read on first use."""
        points = self._points
        return self.rescan() if points is None else points

    def rescan(self) -> dict[str, EntryPoint]:
        """Look again: a package may have been installed since. What is loaded stays, and so does what is broken."""
        with self._lock:
            importlib.invalidate_caches()  # else a folder that changed a moment ago may be read as it was
            points, refused = _sort_out(self._find())
            for info in refused:
                if info not in self._refused and info.reason != KEPT_OUT:
                    log.warning("backend %r of %s is refused: %s", info.name, info.distribution, info.reason)
            self._points, self._refused = points, refused
            self._forget()
            return points

    def survive_fork(self) -> None:
        """Fork only while nothing loads: a child must not inherit the lock from a thread that it does not have."""
        hold_over_fork(self._lock)
        os.register_at_fork(after_in_child=self._begin_child)

    def _begin_child(self) -> None:
        """A backend may refuse in a forked child what it took before."""
        self.forked = True
        self._forget()

    def _forget(self) -> None:
        self._decided.clear()
        self.calls.clear()

    def require(self, names: Iterable[str]) -> None:
        """BackendError unless every name belongs to a backend that was found; nothing is imported."""
        for name in names:
            if name not in self.scan() and name not in self.rescan():
                raise BackendError(f"backend {name!r}: {self._absence(name)}")

    def load(self, name: str) -> Backend | str:
        """The backend, or the reason why it cannot be had."""
        found = self._loaded.get(name)
        if found is not None:
            return found
        with self._lock:
            if name in self._loaded:
                return self._loaded[name]
            point = self.scan().get(name)
            if point is None:
                return self._absence(name)  # not remembered: it may be installed later
            if name in self._loading:  # by this thread, which holds the lock: a plugin that names itself
                return f"asked for itself while it was being loaded from {point.value}"
            self._loading.add(name)
            try:
                found = self._loaded[name] = _load(point)
            finally:
                self._loading.remove(name)
                self._forget()  # what was decided without it meanwhile
            if isinstance(found, str):
                log.warning("backend %r %s", name, found)
            return found

    def decide(self, order: tuple[str, ...], source: str, request: Request) -> Decision:
        """The first backend of `order` that accepts the request; remembered."""
        key = order, source, request
        decision = self._decided.get(key)
        if decision is None:
            rejected: list[tuple[str, str]] = []
            chosen, fused = None, True
            for name in order:
                backend = self.load(name)
                reason = backend if isinstance(backend, str) else _refusal(backend, request, source)
                if reason is None:
                    assert isinstance(backend, Backend)
                    chosen, fused = name, backend.fuses(request)
                    break
                rejected.append((name, reason))
            decision = Decision(request, source, chosen, tuple(rejected), fused=fused)
            self._decided[key] = decision
        return decision

    def list(self) -> tuple[BackendInfo, ...]:
        """Every backend that was found, without importing any."""
        infos = []
        for name, point in self.scan().items():
            found = self._loaded.get(name)
            state = "found" if found is None else "broken" if isinstance(found, str) else "loaded"
            infos.append(
                BackendInfo(name, _distribution(point), point.value, state, found if isinstance(found, str) else "")
            )
        return (*infos, *self._refused)

    def _absence(self, name: str) -> str:
        refused = [info.reason for info in self._refused if info.name == name]
        return refused[0] if refused else f"not installed (installed: {', '.join(sorted(self.scan())) or 'none'})"


def _installed() -> Iterable[EntryPoint]:
    """The entry points of every installed package; one whose metadata cannot be read hides only its own."""
    from importlib import metadata  # noqa: PLC0415  a third of the time that nbnorm takes to import beyond NumPy

    try:
        return metadata.entry_points(group=ENTRY_POINTS)
    except Exception:  # noqa: BLE001  the parser of another package's file may raise anything
        found: list[EntryPoint] = []
        for distribution in metadata.distributions():
            try:
                found += distribution.entry_points.select(group=ENTRY_POINTS)
            except Exception as error:  # noqa: BLE001  as above, and now it is known whose
                log.warning("the entry points of %s cannot be read: %s", distribution.name, error)
        return found


def _sort_out(found: Iterable[EntryPoint]) -> tuple[dict[str, EntryPoint], list[BackendInfo]]:
    """Usable entry points by name, and those that are not, with the reason. Nothing replaces anything in silence."""
    from importlib.metadata import EntryPoint  # noqa: PLC0415  as above

    # A source tree that was never installed has no entry points; the fallback is known all the same.
    fallback = EntryPoint("numpy", f"{BUILT_IN_PACKAGE}.numpy_ref:make", ENTRY_POINTS)
    usable = {fallback.name: fallback}
    refused: list[BackendInfo] = []
    claims: dict[str, list[EntryPoint]] = {}
    for point in found:
        if _is_built_in(point):
            usable[point.name] = point
        elif point not in claims.setdefault(point.name, []):  # one distribution may be found twice on sys.path
            claims[point.name].append(point)
    for name, points in claims.items():
        reason = _unusable(name, points)
        if reason is None:
            usable[name] = points[0]
        else:
            refused += [BackendInfo(name, _distribution(point), point.value, "refused", reason) for point in points]
    return usable, refused


def _unusable(name: str, points: list[EntryPoint]) -> str | None:
    """Why a name that third parties claim is not to be used, or None."""
    if os.environ.get("NBNORM_DISABLE_PLUGINS", "") not in ("", "0"):
        return KEPT_OUT
    if not NAME.fullmatch(name):
        return "badly named: a name is lower-case letters, digits and underscores, and begins with a letter"
    if name in BUILT_IN_NAMES:  # present or not: it would run unasked
        return "the name belongs to a built-in backend"
    if len(points) > 1:
        return f"claimed more than once: {', '.join(f'{_distribution(point)} ({point.value})' for point in points)}"
    return None


def _is_built_in(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == "nbnorm"


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "unknown distribution"


def _load(point: EntryPoint) -> Backend | str:
    """Import and make one backend; whatever it raises becomes a reason and harms nobody else."""
    origin = f"{point.value} of {_distribution(point)}"
    try:
        backend = point.load()()
    except (Exception, SystemExit) as error:  # noqa: BLE001  a plugin's import may raise anything, and may call sys.exit
        return f"broken: {origin} raised {type(error).__name__}: {error}"
    if not isinstance(backend, Backend):
        return f"broken: {origin} made a {type(backend).__name__}, not a nbnorm.backend.Backend"
    if backend.api_version != API_VERSION:
        return f"broken: {origin} speaks version {backend.api_version} of the contract; this is version {API_VERSION}"
    if getattr(backend, "name", None) != point.name:
        return f"broken: {origin} made a backend named {getattr(backend, 'name', None)!r}, not {point.name!r}"
    return backend


def _refusal(backend: Backend, request: Request, source: str) -> str | None:
    if backend.device != request.device and not (backend.takes_host and request.device == "cpu" and source == NAMED):
        copies = f"; backend={backend.name!r} on the call copies it" if backend.takes_host else ""
        return f"runs on {backend.device}, the array lies on {request.device}{copies}"
    if request.op in WHOLE_OPS and request.op not in backend.whole_ops:
        return f"does not have {request.op}"
    reason = backend.reject(request)
    if reason is not None and not (isinstance(reason, str) and reason):
        raise TypeError(f"{type(backend).__name__}.reject must return a reason or None; got {reason!r}")
    return reason


class Lock(Protocol):
    """What can be held over a fork."""

    def acquire(self) -> object: ...
    def release(self) -> object: ...


_fork_locks: list[Lock] = []


def hold_over_fork(lock: Lock) -> None:
    """Take this lock before every fork, after those that were registered earlier, and give it back on both sides.

    One order for all: a backend that compiles while it loads takes its compiler's lock under the registry's, so a
    forking thread that took them the other way round would wait for ever.
    """
    if hasattr(os, "register_at_fork"):
        if not _fork_locks:
            os.register_at_fork(before=_acquire_all, after_in_parent=_release_all, after_in_child=_release_all)
        _fork_locks.append(lock)


def _acquire_all() -> None:
    for lock in _fork_locks:
        lock.acquire()


def _release_all() -> None:
    for lock in reversed(_fork_locks):
        lock.release()


registry = Registry()
if hasattr(os, "register_at_fork"):
    registry.survive_fork()
_preferred: ContextVar[tuple[str, ...] | None] = ContextVar("nbnorm_preferred", default=None)
_traced: ContextVar[tuple[list[Decision], ...]] = ContextVar("nbnorm_traced", default=())
_environment: tuple[str, ...] | None = None


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Prefer these backends, in this order, inside the ``with`` block; the built-in order follows them.

    Holds for the current context (thread or asyncio task) only; an inner block replaces the order of an outer one.

    Raises
    ------
    BackendError
        If a name belongs to no installed backend; nothing is imported to find out.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.zeros((2, 3), np.float32)
    >>> with nbnorm.use_backend("numpy"):
    ...     nbnorm.explain(nbnorm.rms_norm, x, 3).chosen
    'numpy'
    """
    registry.require(_check_names(names))
    token = _preferred.set(names)
    try:
        yield
    finally:
        _preferred.reset(token)


@contextmanager
def trace() -> Iterator[list[Decision]]:
    """Collect the `Decision` of every call made inside the ``with`` block, in order.

    Calls made by threads that the block starts are not seen: a new thread begins with an empty context.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> with nbnorm.trace() as decisions:
    ...     y = nbnorm.layer_norm(np.eye(3, dtype=np.float32), 3, backend="numpy")
    >>> [(d.request.op, d.chosen) for d in decisions]
    [('layer_norm', 'numpy')]
    """
    collected: list[Decision] = []
    token = _traced.set((*_traced.get(), collected))
    try:
        yield collected
    finally:
        _traced.reset(token)


def backends() -> tuple[BackendInfo, ...]:
    """Every installed backend with its state and, where it cannot run, the reason. Imports none of them.

    Examples
    --------
    >>> import nbnorm
    >>> ours = (b for b in nbnorm.backends() if b.distribution.startswith("nbnorm "))
    >>> sorted(backend.name for backend in ours)
    ['cuda', 'numba', 'numpy']
    """
    return registry.list()


def decide(request: Request, backend: str | Backend | None, copies: tuple[str, ...] = ()) -> Decision:
    """The decision for one request, without running anything."""
    if backend is not None:
        decision = _strict(request, backend)
    elif (preferred := _preferred.get()) is not None:
        decision = registry.decide(_then_built_in(preferred, request.device), "use_backend", request)
    elif named := environment_order():
        decision = registry.decide(_then_built_in(named, request.device), "NBNORM_BACKEND", request)
    else:
        decision = registry.decide(BUILT_IN_ORDER.get(request.device, ()), BUILT_IN, request)
    return replace(decision, copies=copies) if copies else decision


def select(request: Request, backend: str | Backend | None, copies: tuple[str, ...] = ()) -> Backend:
    """The backend that shall run the request; BackendError, with every reason, where there is none."""
    decision = decide(request, backend, copies)
    for collected in _traced.get():
        collected.append(decision)
    if decision.chosen is None:
        raise BackendError(str(decision))
    return backend_of(decision, backend)


def backend_of(decision: Decision, backend: str | Backend | None) -> Backend:
    """The backend that was chosen, of those that the call names or the registry has."""
    if isinstance(backend, Backend):
        return backend
    assert decision.chosen is not None
    found = registry.load(decision.chosen)
    assert isinstance(found, Backend)  # it was, when it was chosen, and what is loaded stays
    return found


def preferred() -> tuple[str, ...] | None:
    """The order of `use_backend` here."""
    return _preferred.get()


def traced() -> bool:
    """Whether somebody collects the decisions made here."""
    return bool(_traced.get())


def environment_order() -> tuple[str, ...]:
    """The names in NBNORM_BACKEND, read and checked on first use."""
    global _environment
    if _environment is None:
        names = tuple(name.strip() for name in os.environ.get("NBNORM_BACKEND", "").split(",") if name.strip())
        try:
            registry.require(names)
        except BackendError as error:
            raise BackendError(f"NBNORM_BACKEND={','.join(names)}: {error}") from None
        _environment = names
    return _environment


def _strict(request: Request, backend: str | Backend) -> Decision:
    if isinstance(backend, Backend):
        reason = _refusal(backend, request, NAMED)
        if reason is not None:
            return Decision(request, NAMED, None, ((backend.name, reason),))
        return Decision(request, NAMED, backend.name, (), fused=backend.fuses(request))
    registry.require((backend,))
    return registry.decide((backend,), NAMED, request)


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("name at least one backend")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"use_backend takes names; got {name!r}")
    return names


def _then_built_in(names: tuple[str, ...], device: str) -> tuple[str, ...]:
    return names + tuple(name for name in BUILT_IN_ORDER.get(device, ()) if name not in names)
