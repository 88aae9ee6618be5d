"""Entmax attention."""

from .attention import entmax_attention

__all__ = ["entmax_attention"]
