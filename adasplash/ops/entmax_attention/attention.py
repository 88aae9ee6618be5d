"""Entmax attention: the public function."""

from __future__ import annotations

from torch import Tensor

from ..attend import attend
from ..checks import check_alpha, check_attention_inputs, resolve_key_range, resolve_scale
from ..key_range import KeyRange


def alpha_per_head(alpha: float | Tensor, heads: int) -> float | Tensor:
    """A number stays; a tensor () or (H,) is shaped to broadcast with scores (B, H, Tq, Tk)."""
    if not isinstance(alpha, Tensor) or alpha.ndim == 0:
        return alpha
    if tuple(alpha.shape) != (heads,):
        raise ValueError(f"Expected alpha as a number or of shape ({heads},), one per head, got {tuple(alpha.shape)}.")
    return alpha.view(1, heads, 1, 1)


def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    key_range: KeyRange | None = None,
    causal: bool = True,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """out = entmax(scale * q k^T + ALiBi, alpha) v over each query's keys (AdaSplash, arXiv 2502.12082, section 2).

    Args:
        q: (B, H, Tq, D), any floating dtype; k, v: (B, G, Tk, D) with H a multiple of G (grouped queries).
        alpha: 1 <= alpha <= 2, a number or a tensor () or (H,); a tensor receives a gradient. 1 is softmax.
        key_range: who may look at whom; intersected with the causal range where `causal`.
        causal: query i sees keys up to its own place, the last query standing beside the last key.
        scale: of the scores; by default 1 / sqrt(D).
        alibi_slopes: (H,) or (B, H); subtracts slope * distance from the scores (Press et al. 2022).
        implementation: auto | triton | reference; auto takes the kernels wherever they run (see `why_no_kernels`).

    Returns:
        (B, H, Tq, D), q's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: if shapes, dtypes, devices or alpha do not fit.
    """
    check_attention_inputs(q, k, v, alibi_slopes)
    check_alpha(alpha)
    return attend(
        q,
        k,
        v,
        resolve_key_range(q, k, key_range, causal),
        alpha=alpha_per_head(alpha, q.shape[1]),
        scale=resolve_scale(q, scale),
        alibi_slopes=alibi_slopes,
        implementation=implementation,
    )
