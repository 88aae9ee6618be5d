"""Softmax attention: the public function."""

from __future__ import annotations

from torch import Tensor

from ..attend import attend
from ..checks import check_attention_inputs, resolve_key_range, resolve_scale
from ..key_range import KeyRange


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_range: KeyRange | None = None,
    causal: bool = True,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """out = softmax(scale * q k^T + ALiBi) v over each query's keys.

    Arguments, result and errors as in `entmax_attention`; a query that sees no key outputs 0 (and not NaN).
    """
    check_attention_inputs(q, k, v, alibi_slopes)
    return attend(
        q,
        k,
        v,
        resolve_key_range(q, k, key_range, causal),
        alpha=1.0,
        scale=resolve_scale(q, scale),
        alibi_slopes=alibi_slopes,
        implementation=implementation,
    )
