"""From text to batches of tokens: corpus -> tokenizer -> token shards -> loader. Stands alone."""

from .config import DataConfig, TokenizerConfig
from .loader import IGNORE_INDEX, Batch, Loader, keep_documents_apart
from .prepare import TokenSplits, prepare
from .shards import Tokens
from .tokenizer import Tokenizer, build_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "DataConfig",
    "Loader",
    "TokenSplits",
    "Tokenizer",
    "TokenizerConfig",
    "Tokens",
    "build_tokenizer",
    "keep_documents_apart",
    "prepare",
]
