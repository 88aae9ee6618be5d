"""Which attention: the backends by name."""

import dataclasses

from ..ops.checks import check_choice, nearest
from ..typed import from_mapping
from .adasplash import AdaSplash
from .backend import AttentionBackend, Options
from .flash import Flash
from .hash_sparse import HashSparse
from .qk_sparse import QKSparse
from .softmax import Softmax

BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (Softmax, Flash, AdaSplash, HashSparse, QKSparse)
}

__all__ = ["BACKENDS", "AttentionBackend", "Options", "backend_options", "without_idle_alpha"]


def backend_options(name: str, values: dict | None = None) -> Options:
    """The options of the backend `name`, from a plain mapping.

    Raises:
        ValueError: for unknown names and options (with the valid, the nearest, and whose they are) or a value of another
            type.
    """
    check_choice("attention", name, BACKENDS)
    fields = _option_names(name)
    for key in values or {}:
        if key not in fields:
            owners = ", ".join(other for other in BACKENDS if key in _option_names(other))
            hint = f" It belongs to attention={owners}." if owners else nearest(key, fields)
            raise ValueError(
                f"Unknown option '{key}' for attention={name}; expected {', '.join(sorted(fields))}.{hint}"
            )
    return from_mapping(BACKENDS[name].Options, values or {})


def _option_names(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(BACKENDS[name].Options)}


def without_idle_alpha(stored: dict) -> dict:
    """{"name": ..., **options} of a file, less an alpha beside softmax: older ones have it, and it never did anything."""
    has_normaliser = stored.get("name") in BACKENDS and "normaliser" in _option_names(stored["name"])
    idle = has_normaliser and stored.get("normaliser", "softmax") == "softmax"
    return {key: value for key, value in stored.items() if not (idle and key == "alpha")}
