"""What is chosen for the user is said, once."""

from __future__ import annotations

import logging

import torch

_announced: set[str] = set()


def announce(message: str) -> None:
    """Says a thing once per process (a choice of implementation is never silent), also while a graph is traced."""
    say = say_once
    if torch.compiler.is_compiling():  # done at once, and no part of the graph
        from .uncompiled import say_once as say
    say(message)


def say_once(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        logging.getLogger("adasplash").warning(message)
