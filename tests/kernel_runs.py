"""How tests run a kernel: with its gradients, and among memory that nobody has written."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def with_gradients(attend: Callable, tensors: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """attend(*tensors), and the gradients of its inputs for the gradient `grad` of its output."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def poisoned(function: Callable, *arguments):
    """What the function returns where memory that nobody writes holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        return function(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
