"""The entmax row transform."""

from .reference import entmax

__all__ = ["entmax"]
