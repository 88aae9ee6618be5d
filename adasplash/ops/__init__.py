"""The mathematics and the kernels: torch (and triton) only."""

from .entmax import entmax
from .entmax_attention import entmax_attention
from .key_range import KeyRange
from .reordered_attention import hash_sparse_attention, qk_sparse_attention
from .softmax_attention import softmax_attention

__all__ = [
    "KeyRange",
    "entmax",
    "entmax_attention",
    "hash_sparse_attention",
    "qk_sparse_attention",
    "softmax_attention",
]
