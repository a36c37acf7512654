"""Which backend runs, and why: plugin discovery, the order of preference, and the record of decisions.

Order of preference: ``backend=`` on the call (strict) > `use_backend` > the environment variable NBNORM_BACKEND >
the built-in order of the input's device. A third-party backend runs only where one of the first three names it.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points

from nbnorm.backend import API_VERSION, Backend, Request
from nbnorm.errors import BackendError

ENTRY_POINTS = "nbnorm.backends"
BUILT_IN_ORDER = {"cpu": ("numba", "numpy"), "cuda": ("cuda",)}
BUILT_IN_PACKAGE = "nbnorm_backends"
# A source tree that was never installed has no entry points; the fallback is known all the same.
FALLBACK = EntryPoint("numpy", f"{BUILT_IN_PACKAGE}.numpy_ref:make", ENTRY_POINTS)
NAME = re.compile(r"[a-z][a-z0-9_]*")

log = logging.getLogger("nbnorm")


@dataclass(frozen=True, slots=True)
class Decision:
    """What was chosen for one request, who asked for it, and why the others were not taken.

    Attributes
    ----------
    request : Request
    source : "backend=", "use_backend", "NBNORM_BACKEND" or "built-in order"
    chosen : name of the backend, or None
    rejected : (name, reason) of each backend asked before it
    copies : what had to be copied before a backend could see it, with the reason
    """

    request: Request
    source: str
    chosen: str | None
    rejected: tuple[tuple[str, str], ...]
    copies: tuple[str, ...] = ()

    def __str__(self) -> str:
        request = self.request
        lines = [f"{request.op} on {request.device}, {request.dtype}: {self.chosen or 'no backend'} ({self._why()})"]
        lines += [f"  {name} refused: {reason}" for name, reason in self.rejected]
        lines += [f"  copied: {copy}" for copy in self.copies]
        return "\n".join(lines)

    def _why(self) -> str:
        if self.chosen is None:
            return f"asked by {self.source}"
        place = "next" if self.rejected else "first"
        return f"named by {self.source}" if self.source == "backend=" else f"{place} in the order of {self.source}"


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """One backend as `backends()` lists it.

    Attributes
    ----------
    name, distribution, target : the entry point's name, the package that brings it, and what it points to.
    state : "found" (not imported yet), "loaded", "broken" (it failed to load) or "refused" (its name is not usable).
    reason : why it is broken or refused; "" otherwise.
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
        self._find = find or (lambda: entry_points(group=ENTRY_POINTS))
        self._lock = threading.RLock()  # re-entrant: a plugin may look at the registry while it loads
        self._points: dict[str, EntryPoint] | None = None
        self._refused: list[BackendInfo] = []
        self._loaded: dict[str, Backend | str] = {}  # the backend, or the reason why there is none
        self._decided: dict[tuple[tuple[str, ...], str, Request], Decision] = {}
        if hasattr(os, "register_at_fork"):  # a child must not inherit the lock from a thread that it does not have
            os.register_at_fork(
                before=self._lock.acquire,
                after_in_parent=self._lock.release,
                after_in_child=self._begin_child,
            )

    def _begin_child(self) -> None:
        """A backend may refuse in a forked child what it took before."""
        self._decided.clear()
        self._lock.release()

    def scan(self) -> dict[str, EntryPoint]:
        """The usable entry points by name, read on first use."""
        if self._points is None:
            with self._lock:
                if self._points is None:
                    self._points, self._refused = _sort_out(self._find())
        return self._points

    def rescan(self) -> dict[str, EntryPoint]:
        """Look again: a package may have been installed since. What is loaded stays."""
        with self._lock:
            self._points = None
            self._decided.clear()
            return self.scan()

    def require(self, names: Iterable[str]) -> None:
        """BackendError unless every name belongs to a backend that was found; nothing is imported."""
        for name in names:
            if name not in self.scan() and name not in self.rescan():
                raise BackendError(f"backend {name!r} is {self._absence(name)}")

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
            found = self._loaded[name] = _load(point)
            if isinstance(found, str):
                log.warning("backend %r %s", name, found)
            return found

    def decide(self, order: tuple[str, ...], source: str, request: Request) -> Decision:
        """The first backend of `order` that accepts the request; remembered."""
        key = order, source, request
        decision = self._decided.get(key)
        if decision is None:
            rejected: list[tuple[str, str]] = []
            chosen = None
            for name in order:
                backend = self.load(name)
                reason = backend if isinstance(backend, str) else _refusal(backend, request)
                if reason is None:
                    chosen = name
                    break
                rejected.append((name, reason))
            decision = Decision(request, source, chosen, tuple(rejected))
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


def _sort_out(found: Iterable[EntryPoint]) -> tuple[dict[str, EntryPoint], list[BackendInfo]]:
    """Usable entry points by name, and those that are not, with the reason. Nothing replaces anything in silence."""
    usable: dict[str, EntryPoint] = {FALLBACK.name: FALLBACK}
    refused: list[BackendInfo] = []
    claims: dict[str, list[EntryPoint]] = {}

    def refuse(point: EntryPoint, reason: str) -> None:
        refused.append(BackendInfo(point.name, _distribution(point), point.value, "refused", reason))

    third_party_out = os.environ.get("NBNORM_DISABLE_PLUGINS", "") not in ("", "0")
    for point in found:
        if _is_built_in(point):
            usable[point.name] = point
        elif third_party_out:
            refuse(point, "kept out by NBNORM_DISABLE_PLUGINS")
        elif not NAME.fullmatch(point.name):
            refuse(point, f"badly named: {point.name!r} is not lower-case letters, digits and underscores")
        elif point not in claims.setdefault(point.name, []):  # one distribution may be found twice on sys.path
            claims[point.name].append(point)
    for name, points in claims.items():
        owners = ", ".join(f"{_distribution(point)} ({point.value})" for point in points)
        for point in points:
            if name in usable and _is_built_in(usable[name]):
                refuse(point, f"the name {name!r} belongs to a built-in backend")
            elif len(points) > 1:
                refuse(point, f"the name {name!r} is claimed more than once: {owners}")
        if name not in usable and len(points) == 1:
            usable[name] = points[0]
    for info in refused:
        if info.reason != "kept out by NBNORM_DISABLE_PLUGINS":
            log.warning("backend %r of %s is refused: %s", info.name, info.distribution, info.reason)
    return usable, refused


def _is_built_in(point: EntryPoint) -> bool:
    return point.value.partition(":")[0].partition(".")[0] == BUILT_IN_PACKAGE


def _distribution(point: EntryPoint) -> str:
    dist = getattr(point, "dist", None)
    return f"{dist.name} {dist.version}" if dist is not None else "unknown distribution"


def _load(point: EntryPoint) -> Backend | str:
    """Import and make one backend; whatever it raises becomes a reason and harms nobody else."""
    origin = f"{point.value} of {_distribution(point)}"
    try:
        backend = point.load()()
    except Exception as error:  # noqa: BLE001  a plugin's import may raise anything
        return f"broken: {origin} raised {type(error).__name__}: {error}"
    if not isinstance(backend, Backend):
        return f"broken: {origin} made a {type(backend).__name__}, not a nbnorm.backend.Backend"
    if backend.api_version != API_VERSION:
        return f"broken: {origin} speaks version {backend.api_version} of the contract; this is version {API_VERSION}"
    return backend


def _refusal(backend: Backend, request: Request) -> str | None:
    if backend.device != request.device:
        return f"runs on {backend.device}, the array lies on {request.device}"
    return backend.reject(request)


registry = Registry()
_preferred: ContextVar[tuple[str, ...] | None] = ContextVar("nbnorm_preferred", default=None)
_traced: ContextVar[tuple[list[Decision], ...]] = ContextVar("nbnorm_traced", default=())
_environment: tuple[str, ...] | None = None


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Prefer these backends, in this order, inside the ``with`` block; the built-in order follows them.

    Holds for the current context (thread or asyncio task) only.

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
    >>> sorted(info.name for info in nbnorm.backends() if info.distribution.startswith("nbnorm "))
    ['numba', 'numpy']
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
        decision = registry.decide(BUILT_IN_ORDER.get(request.device, ()), "built-in order", request)
    return replace(decision, copies=copies) if copies else decision


def select(request: Request, backend: str | Backend | None, copies: tuple[str, ...] = ()) -> Backend:
    """The backend that shall run the request; BackendError, with every reason, where there is none."""
    decision = decide(request, backend, copies)
    for collected in _traced.get():
        collected.append(decision)
    if decision.chosen is None:
        raise BackendError(str(decision))
    if isinstance(backend, Backend):
        return backend
    found = registry.load(decision.chosen)
    assert isinstance(found, Backend)  # it was, when it was chosen, and what is loaded stays
    return found


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
        reason = _refusal(backend, request)
        rejected = () if reason is None else ((backend.name, reason),)
        return Decision(request, "backend=", backend.name if reason is None else None, rejected)
    _check_names((backend,))
    registry.require((backend,))
    return registry.decide((backend,), "backend=", request)


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("name at least one backend")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"backend must be a name or a Backend; got {type(name).__name__}")
    return names


def _then_built_in(names: tuple[str, ...], device: str) -> tuple[str, ...]:
    return names + tuple(name for name in BUILT_IN_ORDER.get(device, ()) if name not in names)
