"""Entmax attention."""

from .reference import entmax_attention

__all__ = ["entmax_attention"]
