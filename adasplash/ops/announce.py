"""What is chosen for the user is said, once."""

from __future__ import annotations

import logging

_announced: set[str] = set()


def announce(message: str) -> None:
    """Says a thing once per process (a choice of implementation is never silent)."""
    if message not in _announced:
        _announced.add(message)
        logging.getLogger("adasplash").warning(message)
