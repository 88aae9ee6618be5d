"""ALiBi slopes (Press, Smith and Lewis 2022, section 3), for all heads or for half of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.checks import check_choice

ALIBI_KINDS = ("none", "alibi", "nape")


def alibi_slopes(kind: str, heads: int) -> Tensor | None:
    """Slopes (H,), float32: 2^(-8 i / n) for the n biased heads i = 1..n; None for kind 'none'.

    'nape' biases every second head and leaves the others (slope 0) without any position of attention's own.
    """
    check_choice("alibi", kind, ALIBI_KINDS)
    if kind == "none":
        return None
    biased = heads if kind == "alibi" else (heads + 1) // 2
    slopes = 2.0 ** (-8.0 * torch.arange(1, biased + 1) / biased)
    if kind == "alibi":
        return slopes
    spread = torch.zeros(heads)
    spread[::2] = slopes
    return spread
