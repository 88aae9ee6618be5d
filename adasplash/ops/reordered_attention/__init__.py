"""Hash-sparse and QK-dropping attention: attention.py. How it reorders: reference.py; the same by kernels: operator.py."""

from .attention import (
    hash_reordering,
    hash_sparse_attention,
    keep_mask,
    keys_of_queries,
    qk_sparse_attention,
    random_directions,
)

__all__ = [
    "hash_reordering",
    "hash_sparse_attention",
    "keep_mask",
    "keys_of_queries",
    "qk_sparse_attention",
    "random_directions",
]
