"""Border checks shared by the attention functions."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor

from .key_range import KeyRange

# Of entmax. Weights are a power 1 / (alpha - 1) of what float32 rounds: sums of a row are off by 3e-4 here, by some percent at
# 1.000001, and at 1.00000001 alpha is 1 to float32.
NEAREST_ALPHA = 1.0001


def nearest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean X?' where a valid name is close, else ''."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_choice(what: str, name: str, valid: Iterable[str]) -> None:
    """Raises ValueError that lists the valid names and the nearest one."""
    valid = list(valid)
    if name not in valid:
        raise ValueError(f"Unknown {what} '{name}'; expected one of {', '.join(valid)}.{nearest(str(name), valid)}")


def check_tensor(name: str, x: Tensor, device: torch.device | None = None) -> None:
    """Raises ValueError unless x is a tensor, and on `device` where one is given."""
    if not isinstance(x, Tensor):
        raise ValueError(f"Expected {name} as a tensor, got {type(x).__name__}.")
    if device is not None and x.device != device:
        raise ValueError(f"Expected {name} on {device} as q is, got {x.device}; move it there.")


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None) -> None:
    """Checks q (B, H, Tq, D), k and v (B, G, Tk, D) with H a multiple of G; ALiBi slopes (H,) or (B, H).

    Raises:
        ValueError: naming what was expected and what came.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.ndim != 4:
            raise ValueError(f"Expected {name} of shape (batch, heads, length, dim), got {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise ValueError(f"Expected a floating point {name}, got {x.dtype}.")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"Expected q, k and v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them first.")
    if not (q.device == k.device == v.device):
        raise ValueError(f"Expected q, k and v on one device, got {q.device}, {k.device}, {v.device}.")
    batch, heads, _, dim = q.shape
    if dim == 0:
        raise ValueError(f"Expected q with a dim of at least 1, got {tuple(q.shape)}.")
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
    if alibi_slopes is None:
        return
    check_tensor("alibi_slopes", alibi_slopes, q.device)
    if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"Expected alibi_slopes of shape ({heads},) or ({batch}, {heads}), got {tuple(alibi_slopes.shape)}."
        )


def resolve_key_range(q: Tensor, k: Tensor, key_range: KeyRange | None, causal: bool) -> KeyRange:
    """The given range, made causal where asked, clamped to the keys there are; (B, H, Tq).

    Raises:
        ValueError: for anything but a KeyRange or None, a shape that does not fit, or another device.
    """
    batch, heads, query_length, _ = q.shape
    key_length = k.shape[2]
    constructor = KeyRange.causal if causal else KeyRange.bidirectional
    whole = constructor(query_length, key_length, device=q.device)
    if key_range is None:
        return whole.expand(batch, heads)
    if not isinstance(key_range, KeyRange):
        raise ValueError(
            f"Expected key_range as a KeyRange or None, got {type(key_range).__name__}; "
            "make one by KeyRange.padding(mask), .documents(position_ids), .window(length, width) or from start and stop."
        )
    expected = f"(1 or {batch}, 1 or {heads}, {query_length})"
    shape = key_range.start.shape
    if shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2] != query_length:
        raise ValueError(f"Expected a key_range of shape {expected}, got {tuple(shape)}.")
    if key_range.start.device != q.device:
        raise ValueError(f"Expected a key_range on {q.device} as q is, got one on {key_range.start.device}.")
    return (whole & key_range).expand(batch, heads)


def resolve_scale(q: Tensor, scale: float | None) -> float:
    """1 / sqrt(D) unless given. Raises ValueError unless it is a positive number; a tensor's gradient would be lost."""
    if scale is None:
        return 1.0 / math.sqrt(q.shape[-1])
    if isinstance(scale, Tensor):
        raise ValueError("Expected scale as a number, got a tensor; multiply q by it, and give scale=1.0.")
    if not isinstance(scale, Real):
        raise ValueError(f"Expected scale as a number, got {type(scale).__name__}.")
    if not 0.0 < scale < math.inf:
        raise ValueError(f"Expected a positive, finite scale, got {scale}.")
    return float(scale)


def resolve_alpha(q: Tensor, alpha: float | Tensor) -> float | Tensor:
    """A number stays; a tensor () or (H,) is shaped to broadcast with scores (B, H, Tq, Tk).

    Raises:
        ValueError: unless `check_alpha` is content, and shape and device fit.
    """
    check_alpha(alpha)
    if not isinstance(alpha, Tensor):
        return alpha
    check_tensor("alpha", alpha, q.device)
    heads = q.shape[1]
    if alpha.ndim and tuple(alpha.shape) != (heads,):
        raise ValueError(f"Expected alpha as a number or of shape ({heads},), one per head, got {tuple(alpha.shape)}.")
    return alpha.view(1, heads, 1, 1) if alpha.ndim else alpha


def check_alpha(alpha: float | Tensor) -> None:
    """Raises ValueError unless alpha is 1 or NEAREST_ALPHA <= alpha <= 2; a tensor has no 1 (its gradient has a pole there).

    A tensor on a GPU is not read, since that would wait for it.
    """
    if not isinstance(alpha, Tensor):
        if not isinstance(alpha, Real):
            raise ValueError(f"Expected alpha as a number or a tensor, got {type(alpha).__name__}.")
        if not 1.0 <= alpha <= 2.0:
            raise ValueError(f"Expected 1 <= alpha <= 2 (1 is softmax, 2 is sparsemax), got alpha = {alpha:g}.")
        if 1.0 < alpha < NEAREST_ALPHA:
            raise ValueError(
                f"Expected alpha of at least {NEAREST_ALPHA}, unless softmax is meant, got alpha = {alpha}."
            )
    elif not alpha.is_floating_point():
        raise ValueError(f"Expected a floating point alpha, got {alpha.dtype}.")
    elif alpha.device.type == "cpu" and not torch.compiler.is_compiling():
        wide = alpha.detach().float()  # bfloat16 would round the limit to 1
        outside = ~((wide >= NEAREST_ALPHA) & (wide <= 2.0))
        if outside.any():
            came = wide[outside].flatten()[0].item()
            raise ValueError(f"Expected {NEAREST_ALPHA} <= alpha <= 2 throughout a tensor alpha, got {came:g}.")


def check_directions(q: Tensor, k: Tensor, directions: Tensor) -> None:
    """Raises ValueError unless the hash directions are (G, D, n_buckets / 2), floating point, and where q is."""
    check_tensor("directions", directions, q.device)
    if directions.ndim != 3 or directions.shape[:2] != (k.shape[1], q.shape[-1]) or not directions.is_floating_point():
        raise ValueError(
            f"Expected directions of shape ({k.shape[1]}, {q.shape[-1]}, n_buckets / 2), one set per key head, and "
            f"floating point, got {tuple(directions.shape)}, {directions.dtype}; random_directions draws them."
        )


def resolve_kept(name: str, kept: Tensor | None, x: Tensor) -> Tensor:
    """Which rows of x (B, H, T, D) are kept, bool (B, H, T); None keeps all. Raises ValueError for anything else."""
    if kept is None:
        return torch.ones(x.shape[:3], dtype=torch.bool, device=x.device)
    check_tensor(name, kept, x.device)
    if kept.shape != x.shape[:3] or kept.dtype != torch.bool:
        raise ValueError(f"Expected {name} bool {tuple(x.shape[:3])}, got {kept.dtype} {tuple(kept.shape)}.")
    return kept
