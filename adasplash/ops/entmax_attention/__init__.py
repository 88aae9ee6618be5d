"""Entmax attention. What it means: ops/range_attention.py; which implementation runs: ops/implementation.py; its kernels: operator.py."""

from .attention import entmax_attention

__all__ = ["entmax_attention"]
