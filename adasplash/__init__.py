"""Training language models on long contexts with attention that is exactly sparse.

The operations need torch alone. What needs transformers (`patch_attention`, `from_pretrained`, `register`) is imported
at first use; the attention implementation "adasplash" is registered with transformers once both are imported.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

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


class _RegisterWithTransformers(MetaPathFinder):
    """Registers "adasplash" as soon as transformers' models are imported, without importing them itself."""

    def find_spec(self, name, path=None, target=None):
        if name != "transformers.modeling_utils":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            __getattr__("register")()

        spec.loader.exec_module = execute_and_register
        return spec


if "transformers.modeling_utils" in sys.modules:
    __getattr__("register")()
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())
