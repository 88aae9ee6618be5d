"""Which attention: the backends by name."""

from ..ops.checks import check_choice
from .adasplash import AdaSplash
from .backend import AttentionBackend, Options, parse_options
from .flash import Flash
from .hash_sparse import HashSparse
from .qk_sparse import QKSparse
from .softmax import Softmax

BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (Softmax, Flash, AdaSplash, HashSparse, QKSparse)
}

__all__ = ["BACKENDS", "AttentionBackend", "Options", "backend_options"]


def backend_options(name: str, values: dict | None = None) -> Options:
    """The options of the backend `name`. Raises ValueError for unknown names and options, with the valid and nearest."""
    check_choice("attention", name, BACKENDS)
    return parse_options(BACKENDS[name], values or {})
