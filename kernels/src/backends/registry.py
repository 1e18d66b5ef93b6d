"""Every backend by its name: those of this package, and what a user's code adds."""

from __future__ import annotations

from collections.abc import Iterator

from diffsparse.kernels.backends.cpu import CPU
from diffsparse.kernels.backends.gluon_sm90 import GLUON_SM90
from diffsparse.kernels.backends.protocol import Backend, KernelBackend
from diffsparse.kernels.backends.reference import REFERENCE
from diffsparse.kernels.backends.triton import TRITON

__all__ = [
    "BACKENDS",
    "about_way",
    "backend_names",
    "candidates",
    "find_backend",
    "last_resort",
    "register_backend",
    "way_of",
]

#: Best first: the order in which ``backend="auto"`` tries them.
_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (GLUON_SM90, TRITON, CPU, REFERENCE)}

#: The backends of this package, best first; ``available_backends()`` has registered ones too.
BACKENDS = tuple(_BACKENDS)


def register_backend(backend: Backend, *, replace: bool = False) -> None:
    """Make a backend known by its name. ``backend="auto"`` tries it before the others on the devices that it lists.

    Raises:
        TypeError: something that :class:`Backend` asks for is missing.
        ValueError: the name is not an identifier, is ``auto``, or is taken (``replace=True`` takes its place).
    """
    if not isinstance(backend, Backend):
        needed = [name for name in dir(Backend) if not name.startswith("_")]
        lacking = [name for name in needed if not hasattr(backend, name)]
        raise TypeError(f"{type(backend).__name__} is not a backend: it lacks {', '.join(lacking)}")
    name = backend.name
    if not isinstance(name, str) or not name.isidentifier() or name == "auto":
        raise ValueError(f"a backend's name is a word of letters, digits and _, and not 'auto'; got {name!r:.60}")
    if name in _BACKENDS and not replace:
        raise ValueError(f"there is a backend {name!r} already; register_backend(..., replace=True) takes its place")
    others = {known: one for known, one in _BACKENDS.items() if known != name}
    _BACKENDS.clear()
    _BACKENDS.update({name: backend, **others})


def backend_names() -> tuple[str, ...]:
    """Of all backends, best first."""
    return tuple(_BACKENDS)


def find_backend(name: str) -> Backend | None:
    """The backend of that name, or None."""
    return _BACKENDS.get(name)


def way_of(name: str) -> str:
    """In which of its ways a backend runs on this machine; empty where it has one, or says nothing of it."""
    backend = find_backend(name)
    return backend.way() if isinstance(backend, KernelBackend) else ""


def about_way(name: str) -> str:
    """The same in a line for a bug report."""
    backend = find_backend(name)
    return backend.about_way() if isinstance(backend, KernelBackend) else ""


def last_resort() -> Backend:
    """The backend that runs every call, and says what is right. It is slower than dense attention."""
    return _BACKENDS[REFERENCE.name]


def candidates(device_type: str) -> Iterator[Backend]:
    """What ``backend="auto"`` tries on a device, best first, the one that runs everything last.

    A device type that no backend lists is taken for a GPU.
    """
    listed = {kind for backend in _BACKENDS.values() for kind in backend.devices}
    kind = device_type if device_type in listed else "cuda"
    yield from (backend for backend in list(_BACKENDS.values()) if kind in backend.devices)
    yield last_resort()
