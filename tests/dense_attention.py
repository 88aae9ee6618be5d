"""Attention with a boolean mask, written out in float64 and apart from the package: what the tests compare with."""

import torch
from torch import Tensor


def bisected_entmax(x: Tensor, alpha: float | Tensor) -> Tensor:
    """alpha-entmax over the last dim by bisection; alpha a number or a tensor that broadcasts. Fully masked rows: 0."""
    alpha = torch.as_tensor(alpha, dtype=x.dtype)
    empty = (x == -torch.inf).all(-1, keepdim=True)
    z = (alpha - 1) * x.masked_fill(empty, 0.0)
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        heavy = ((z - middle).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    p = (z - low).clamp(min=0) ** (1 / (alpha - 1))
    return (p / p.sum(-1, keepdim=True)).masked_fill(empty, 0.0)


def dense_probabilities(q, k, mask, *, alpha=1.0, scale=None, slopes=None) -> Tensor:
    """(B, H, Tq, Tk) weights; mask bool, broadcastable to that; alpha a number or (H,)."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    query_length, key_length = q.shape[2], k.shape[2]
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if slopes is not None:
        i = torch.arange(query_length)[:, None] + key_length - query_length
        distance = (i - torch.arange(key_length)).abs()
        scores = scores - slopes.double().reshape(-1, q.shape[1], 1, 1) * distance
    scores = scores.masked_fill(~mask, -torch.inf)
    if isinstance(alpha, Tensor):
        return bisected_entmax(scores, alpha.double().reshape(-1, 1, 1))
    if alpha == 1:
        return scores.masked_fill((~mask).all(-1, keepdim=True), 0.0).softmax(-1).masked_fill(~mask, 0.0)
    return bisected_entmax(scores, alpha)


def dense_attention(q, k, v, mask, **how) -> Tensor:
    """float64 (B, H, Tq, D)."""
    v = v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return dense_probabilities(q, k, mask, **how) @ v
