"""The mathematics and the kernels: torch (and triton) only."""

from .entmax import entmax
from .entmax_attention import entmax_attention
from .key_range import KeyRange
from .reordered_attention import hash_sparse_attention, keep_mask, qk_sparse_attention, random_directions
from .softmax_attention import softmax_attention
from .support_map import support_map

__all__ = [
    "KeyRange",
    "entmax",
    "entmax_attention",
    "hash_sparse_attention",
    "keep_mask",
    "qk_sparse_attention",
    "random_directions",
    "softmax_attention",
    "support_map",
]
