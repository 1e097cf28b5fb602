"""The backends of nearby attention and the choice between them."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from megatron_nuwa.ops import cpu, cuda, reference

# In the order in which "auto" asks them. A backend is a module with `forward`, `backward` and
# `why_not(query)`: one clause that says why it cannot take a tensor, None when it can.
BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "cpu": cpu, "reference": reference}
BACKEND_NAMES = ("auto", "reference", "cpu", "cuda")


def backend_for(query: Tensor, name: str) -> ModuleType:
    """The backend of this name, or for "auto" the fastest that can take `query`.

    Raises `ValueError` where a backend that was asked for by name cannot.
    """
    if name == "auto":
        return next(backend for backend in BACKENDS.values() if backend.why_not(query) is None)
    reason: str | None = BACKENDS[name].why_not(query)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run this call: {reason}; use 'auto'")
    return BACKENDS[name]


def explain_auto(query: Tensor) -> tuple[str, str | None]:
    """The name of the backend that "auto" takes for `query`, and why not its device's own."""
    name = next(name for name in BACKENDS if BACKENDS[name].why_not(query) is None)
    reason: str | None = BACKENDS[query.device.type].why_not(query)
    return name, reason
