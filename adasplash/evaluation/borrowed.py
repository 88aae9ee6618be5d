"""Measuring a model without leaving a trace on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def borrowed(model: nn.Module, device: torch.device, *, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode, under fixed random numbers.

    Afterwards mode, buffers (hash directions may be redrawn in training mode), gradients and the random numbers are
    what they were.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model.train(training)
        model.zero_grad(set_to_none=True)
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
