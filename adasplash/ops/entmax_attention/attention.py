"""Entmax attention: the public function."""

from __future__ import annotations

from torch import Tensor

from ..attend import attend
from ..checks import check_attention_inputs, resolve_alpha, resolve_key_range, resolve_scale
from ..key_range import KeyRange


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
        q: (B, H, Tq, D), any floating dtype; k: (B, G, Tk, D), v: (B, G, Tk, Dv), H a multiple of G (grouped queries).
        alpha: 1 <= alpha <= 2, a number or a tensor () or (H,); a tensor receives a gradient. 1 is softmax.
        key_range: who may look at whom; intersected with the causal range where `causal`.
        causal: query i sees keys up to its own place, the last query standing beside the last key.
        scale: of the scores; by default 1 / sqrt(D).
        alibi_slopes: (H,) or (B, H); subtracts slope * distance from the scores (Press et al. 2022).
        implementation: auto | triton | reference. auto takes the Triton kernels on NVIDIA GPUs from compute capability 8.0
            on, for bfloat16, float16 and float32, head dims up to 256 and Dv = D; else the torch reference.

    Returns:
        (B, H, Tq, Dv), q's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: if shapes, dtypes, devices or alpha do not fit.
    """
    check_attention_inputs(q, k, v, alibi_slopes)
    return attend(
        q,
        k,
        v,
        resolve_key_range(q, k, key_range, causal),
        alpha=resolve_alpha(q, alpha),
        scale=resolve_scale(q, scale),
        alibi_slopes=alibi_slopes,
        implementation=implementation,
    )
