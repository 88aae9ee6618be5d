"""Training language models on long contexts with attention that is exactly sparse.

The operations need torch alone. What needs transformers (`patch_attention`, `from_pretrained`, `register`,
`attention_statistics`, `draw_support`) is imported at first use. The attention implementation "adasplash" is registered
here where transformers is already imported, else by the first of the first three that is called.
"""

import sys
from importlib import import_module

from .ops import (
    KeyRange,
    entmax,
    entmax_attention,
    hash_sparse_attention,
    keep_mask,
    qk_sparse_attention,
    random_directions,
    softmax_attention,
    support_map,
)
from .version import __version__ as __version__

__all__ = [
    "KeyRange",
    "attention_statistics",
    "draw_support",
    "entmax",
    "entmax_attention",
    "from_pretrained",
    "hash_sparse_attention",
    "keep_mask",
    "patch_attention",
    "qk_sparse_attention",
    "random_directions",
    "register",
    "softmax_attention",
    "support_map",
]

_LAZY = {
    "attention_statistics": "models",
    "draw_support": "evaluation.support",
    "from_pretrained": "models",
    "patch_attention": "attention.huggingface",
    "register": "attention.huggingface",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "transformers" in sys.modules:
    __getattr__("register")()
