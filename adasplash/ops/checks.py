"""Border checks shared by the attention functions."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .key_range import KeyRange


def nearest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean X?' where a valid name is close, else ''."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_choice(what: str, name: str, valid: Iterable[str]) -> None:
    """Raises ValueError that lists the valid names and the nearest one."""
    valid = list(valid)
    if name not in valid:
        raise ValueError(f"Unknown {what} '{name}'; expected one of {', '.join(valid)}.{nearest(str(name), valid)}")


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None) -> None:
    """Checks q (B, H, Tq, D), k and v (B, G, Tk, D) with H a multiple of G; ALiBi slopes (H,) or (B, H).

    Raises:
        ValueError: naming what was expected and what came.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"Expected {name} of shape (batch, heads, length, dim), got {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise ValueError(f"Expected a floating point {name}, got {x.dtype}.")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"Expected q, k and v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them first.")
    if not (q.device == k.device == v.device):
        raise ValueError(f"Expected q, k and v on one device, got {q.device}, {k.device}, {v.device}.")
    batch, heads, _, dim = q.shape
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"Expected k and v with equal batch, heads and length, got {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"Expected k with batch {batch} and dim {dim} as q has, got {tuple(k.shape)}.")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"Expected the query heads to be a multiple of the key heads, got {heads} query and {k.shape[1]} key heads."
        )
    if alibi_slopes is not None and tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"Expected alibi_slopes of shape ({heads},) or ({batch}, {heads}), got {tuple(alibi_slopes.shape)}."
        )


def resolve_key_range(q: Tensor, k: Tensor, key_range: KeyRange | None, causal: bool) -> KeyRange:
    """The given range, made causal where asked, clamped to the keys there are; (B, H, Tq)."""
    batch, heads, query_length, _ = q.shape
    key_length = k.shape[2]
    constructor = KeyRange.causal if causal else KeyRange.bidirectional
    whole = constructor(query_length, key_length, device=q.device)
    if key_range is None:
        return whole.expand(batch, heads)
    expected = f"(1 or {batch}, 1 or {heads}, {query_length})"
    shape = key_range.start.shape
    if shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2] != query_length:
        raise ValueError(f"Expected a key_range of shape {expected}, got {tuple(shape)}.")
    if key_range.start.device != q.device:
        raise ValueError(f"Expected a key_range on {q.device} as q is, got one on {key_range.start.device}.")
    return (whole & key_range).expand(batch, heads)


def resolve_scale(q: Tensor, scale: float | None) -> float:
    """1 / sqrt(D) unless given. Raises ValueError unless it is positive."""
    if scale is not None and not scale > 0.0:
        raise ValueError(f"Expected a positive scale, got {scale}.")
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def resolve_alpha(q: Tensor, alpha: float | Tensor) -> float | Tensor:
    """A number stays; a tensor () or (H,) is shaped to broadcast with scores (B, H, Tq, Tk).

    Raises:
        ValueError: unless `check_alpha` is content and the shape fits.
    """
    check_alpha(alpha)
    if not isinstance(alpha, Tensor) or alpha.ndim == 0:
        return alpha
    heads = q.shape[1]
    if tuple(alpha.shape) != (heads,):
        raise ValueError(f"Expected alpha as a number or of shape ({heads},), one per head, got {tuple(alpha.shape)}.")
    return alpha.view(1, heads, 1, 1)


def check_alpha(alpha: float | Tensor) -> None:
    """Raises ValueError unless 1 <= alpha <= 2, for a tensor 1 < alpha (its gradient has a pole at 1).

    A tensor on a GPU is not read, since that would wait for it.
    """
    if not isinstance(alpha, Tensor):
        if not 1.0 <= alpha <= 2.0:
            raise ValueError(f"Expected 1 <= alpha <= 2 (1 is softmax, 2 is sparsemax), got alpha = {alpha:g}.")
    elif alpha.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = ~((alpha > 1.0) & (alpha <= 2.0))
        if outside.any():
            came = alpha.detach()[outside].flatten()[0].item()
            raise ValueError(f"Expected 1 < alpha <= 2 throughout a tensor alpha, got {came:g}.")
