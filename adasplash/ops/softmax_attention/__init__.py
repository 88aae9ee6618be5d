"""Softmax attention over key ranges."""

from .attention import softmax_attention

__all__ = ["softmax_attention"]
