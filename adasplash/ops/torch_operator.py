"""Functions as operators of torch: opaque to the compiler, with gradients and shapes registered beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def torch_operator(name: str, device_types: str | None = None) -> Callable:
    """Decorator: registers a function as the torch operator `name`, which mutates nothing.

    It runs on the GPU of its first argument, whichever GPU is current. device_types: None is any.
    """

    def register(function):
        @functools.wraps(function)
        def on_its_device(*args, **kwargs):
            with torch.cuda.device_of(args[0]):
                return function(*args, **kwargs)

        schema = torch.library.infer_schema(function, mutates_args=())
        return torch.library.custom_op(name, on_its_device, mutates_args=(), device_types=device_types, schema=schema)

    return register
