"""Entmax attention. What it means: ops/range_attention.py; which implementation runs: ops/attend.py; its kernels: operator.py."""

from .attention import entmax_attention

__all__ = ["entmax_attention"]
