"""Softmax attention over key ranges. What it means: ops/range_attention.py; which implementation runs: ops/implementation.py; its kernels: operator.py."""

from .attention import softmax_attention

__all__ = ["softmax_attention"]
