"""Softmax attention over key ranges."""

from .reference import softmax_attention

__all__ = ["softmax_attention"]
