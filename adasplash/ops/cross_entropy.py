"""Cross-entropy of a linear output layer in token chunks, so that tokens x vocabulary logits never exist at once.

At 16k tokens GPT-2's logits alone are 3 GiB in float32. Where a gradient is needed, it is computed together with the
loss, chunk by chunk: softmax(logits) - onehot is at hand then, and no logits are kept or computed twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_TOKENS = 4096


def _chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token loss (n,), logits float32 (n, V) and their logsumexp (n, 1)."""
    logits = (hidden @ weight.T).float()
    normaliser = logits.logsumexp(-1, keepdim=True)
    counted = targets != IGNORE_INDEX
    chosen = logits.gather(-1, targets.where(counted, 0)[:, None])  # any other negative target is out of range
    return torch.where(counted, (normaliser - chosen)[:, 0], 0.0), logits, normaliser


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        vocabulary = torch.arange(weight.shape[0], device=hidden.device)
        for begin in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(begin, begin + CHUNK_TOKENS)
            loss, logits, normaliser = _chunk(hidden[rows], weight, targets[rows])
            total = total + loss.sum()
            if need_hidden or need_weight:
                target = targets[rows, None]
                grad = (logits - normaliser).exp() - (vocabulary == target).float()
                grad = torch.where(target != IGNORE_INDEX, grad, 0.0).to(hidden.dtype)  # (n, V)
                if need_hidden:
                    grad_hidden[rows] = grad @ weight
                if need_weight:
                    grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
        )


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T)[target], natural logarithm.

    Args:
        hidden: (N, C); weight: (V, C), any floating dtype; under autocast the products run in its dtype.
        targets: int64 (N,); -100 is not counted.

    Returns:
        float32 scalar, differentiable in hidden and weight.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _SummedCrossEntropy.apply(hidden, weight, targets)


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Per-token losses, float32 (N,), 0 where the target is -100; arguments as in `summed_cross_entropy`."""
    if torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(torch.get_autocast_dtype(hidden.device.type))  # once, not once a chunk
    return torch.cat(
        [
            _chunk(hidden[begin : begin + CHUNK_TOKENS], weight, targets[begin : begin + CHUNK_TOKENS])[0]
            for begin in range(0, hidden.shape[0], CHUNK_TOKENS)
        ]
    )
