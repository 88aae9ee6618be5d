"""Training language models on long contexts with attention that is exactly sparse.

The operations need torch alone. What needs transformers (`patch_attention`, `from_pretrained`, `register`) is imported
at first use. The attention implementation "adasplash" is registered here where transformers is already imported, else by
the first of those three that is called.
"""

import sys
from importlib import import_module

from .ops import (
    KeyRange,
    entmax,
    entmax_attention,
    hash_sparse_attention,
    qk_sparse_attention,
    softmax_attention,
)
from .version import __version__ as __version__

__all__ = [
    "KeyRange",
    "entmax",
    "entmax_attention",
    "from_pretrained",
    "hash_sparse_attention",
    "patch_attention",
    "qk_sparse_attention",
    "register",
    "softmax_attention",
]

_LAZY = {"from_pretrained": "models", "patch_attention": "attention.huggingface", "register": "attention.huggingface"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


if "transformers" in sys.modules:
    __getattr__("register")()
