"""The entmax row transform."""

from .dispatch import entmax

__all__ = ["entmax"]
