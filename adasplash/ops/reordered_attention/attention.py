"""Hash-sparse and QK-dropping attention: reorder, attend over ranges, restore (arXiv 2306.01160, sections 3.1, 3.2)."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from ..attend import attend
from ..checks import (
    check_attention_inputs,
    check_choice,
    check_directions,
    check_tensor,
    resolve_alpha,
    resolve_kept,
    resolve_key_range,
    resolve_scale,
)
from ..implementation import choose_implementation
from ..key_range import KeyRange
from . import reference
from .reference import Reordering


def _steps(q: Tensor, k: Tensor, implementation: str):
    """The module whose functions reorder: `reference`, or `operator` where kernels are chosen for q."""
    chosen = choose_implementation(implementation, q.device, q.dtype, q.shape[-1])
    if chosen == "reference" or q.numel() == 0 or k.shape[2] == 0:
        return reference
    from . import operator  # here, so that the package needs no triton where no kernel runs

    return operator


def _attend_reordered(q, k, v, reordering: Reordering, *, alpha, scale, alibi_slopes, implementation) -> Tensor:
    steps = _steps(q, k, implementation)
    positions = {}
    if alibi_slopes is not None:  # nothing else asks where in the text a query or key stands
        positions["query_positions"] = reordering.query_order + (k.shape[2] - q.shape[2])
        positions["key_positions"] = reordering.key_order
    out = attend(
        *steps.reorder_inputs(q, k, v, reordering),
        reordering.key_range,
        alpha=alpha,
        scale=scale,
        alibi_slopes=alibi_slopes,
        implementation=implementation,
        **positions,
    )
    return steps.restore_output(out, reordering)


def random_directions(heads: int, dim: int, n_buckets: int, *, device=None) -> Tensor:
    """The random hash of `hash_sparse_attention` (Pagliardini et al. 2023, arXiv 2306.01160, section 3.2).

    Args:
        heads, dim: number of key heads G, and their dimension D.
        n_buckets: even; about 1 / n_buckets of the pairs remain.

    Returns:
        Unit directions, float32 (G, D, n_buckets / 2), from torch's random generator.

    Raises:
        ValueError: for an odd n_buckets, or one below 2.
    """
    if n_buckets < 2 or n_buckets % 2:
        raise ValueError(f"Expected an even n_buckets of at least 2, got {n_buckets}.")
    return torch.nn.functional.normalize(torch.randn(heads, dim, n_buckets // 2, device=device), dim=1)


def keys_of_queries(q: Tensor) -> Tensor:
    """The keys of shared_qk: q (B, H, T, D) with rows of norm 1, in q's dtype (autocast would make them float32)."""
    wide = q if q.dtype == torch.float64 else q.float()
    return torch.nn.functional.normalize(wide, dim=-1).to(q.dtype)


def hash_reordering(q, k, directions, key_range, *, causal, attend_self, implementation="auto") -> Reordering:
    """The order and ranges that `hash_sparse_attention` uses; arguments as there."""
    visible = resolve_key_range(q, k, key_range, causal)
    if not attend_self:
        if not causal:
            raise ValueError("attend_self=False needs causal=True: a range with a hole at the query is not one range.")
        query_length, key_length = q.shape[2], k.shape[2]
        before = torch.arange(query_length, device=q.device, dtype=torch.int32) + (key_length - query_length)
        visible = KeyRange(visible.start, torch.minimum(visible.stop, before.clamp(min=0)))
    check_directions(q, k, directions)
    return _steps(q, k, implementation).sort_by_hash(q, k, directions, visible)


def hash_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    directions: Tensor,
    shared_qk: bool = False,
    attend_self: bool = True,
    alpha: float | Tensor = 1.0,
    key_range: KeyRange | None = None,
    causal: bool = True,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Attention between queries and keys that fall into the same bucket of a random hash.

    Args:
        q, k, v, key_range, causal, scale, alibi_slopes, implementation: as in `entmax_attention`.
        directions: (G, D, n_buckets / 2) from `random_directions`; the bucket is the argmax of [x R, -x R].
        shared_qk: the keys are the normalised queries, as in the paper; k is not used then.
        attend_self: whether a query may see the key at its own place (the paper's training kernel: no). False needs
            `causal`; a query alone in its bucket then outputs 0.
        alpha: 1 is softmax, up to 2 entmax; a number or a tensor () or (H,).

    Returns:
        (B, H, Tq, D), q's dtype; 0 for a query whose bucket holds no visible key.

    Raises:
        ValueError: if arguments do not fit, or if shared_qk is asked with grouped heads or Tq != Tk.
    """
    if shared_qk:
        if q.shape[:3] != k.shape[:3]:
            raise ValueError(
                f"shared_qk needs as many key heads and places as queries, got q {tuple(q.shape)} and k "
                f"{tuple(k.shape)}; use shared_qk=False (and use_cache=False in generate)."
            )
        k = keys_of_queries(q)
    check_attention_inputs(q, k, v, alibi_slopes)
    reordering = hash_reordering(
        q, k, directions, key_range, causal=causal, attend_self=attend_self, implementation=implementation
    )
    return _attend_reordered(
        q,
        k,
        v,
        reordering,
        alpha=resolve_alpha(q, alpha),
        scale=resolve_scale(q, scale),
        alibi_slopes=alibi_slopes,
        implementation=implementation,
    )


def keep_mask(x: Tensor, drop: float, *, score: str = "random", per_head: bool = True) -> Tensor:
    """Which queries or keys stay for `qk_sparse_attention` (Pagliardini et al. 2023, arXiv 2306.01160, section 3.1).

    Args:
        x: queries or keys (B, H, T, D).
        drop: share of the rows that goes, 0 <= drop < 1.
        score: random | norm. random keeps each row with probability 1 - drop, independently, by torch's random
            generator; norm drops the share `drop` of the smallest norm. The choice by norm looks at the whole sequence,
            and so does not keep the future from the past: a training device.
        per_head: each head decides for itself; else one decision for all.

    Returns:
        bool (B, H, T), True where a row stays.

    Raises:
        ValueError: for an x of another shape, a drop outside [0, 1), or an unknown score.
    """
    check_choice("score", score, ("random", "norm"))
    check_tensor("x", x)
    if x.ndim != 4:
        raise ValueError(f"Expected x of shape (batch, heads, length, dim), got {tuple(x.shape)}.")
    if not isinstance(drop, Real) or not 0.0 <= drop < 1.0:
        raise ValueError(f"Expected drop as a number, 0 <= drop < 1, got {drop}.")
    if score == "random":
        shape = x.shape[:3] if per_head else (x.shape[0], 1, x.shape[2])
        kept = torch.rand(shape, device=x.device) >= drop
    else:
        norm = x.detach().float().norm(dim=-1)
        norm = norm if per_head else norm.mean(1, keepdim=True)
        kept = norm.argsort(dim=-1, stable=True).argsort(-1) >= round(drop * x.shape[2])
    return kept.expand(x.shape[:3])


def qk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_kept: Tensor | None = None,
    key_kept: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    key_range: KeyRange | None = None,
    causal: bool = True,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Attention between kept queries and kept keys.

    Args:
        q, k, v, key_range, causal, scale, alibi_slopes, implementation: as in `entmax_attention`.
        query_kept: bool (B, H, Tq); key_kept: bool (B, G, Tk); None keeps all. `keep_mask` draws them.
        alpha: 1 is softmax, up to 2 entmax; a number or a tensor () or (H,).

    Returns:
        (B, H, Tq, D), q's dtype; 0 for dropped queries, and for queries with no kept key in their range.

    Raises:
        ValueError: if arguments do not fit.
    """
    check_attention_inputs(q, k, v, alibi_slopes)
    masks = resolve_kept("query_kept", query_kept, q), resolve_kept("key_kept", key_kept, k)
    return _attend_reordered(
        q,
        k,
        v,
        _steps(q, k, implementation).compact_kept(*masks, resolve_key_range(q, k, key_range, causal)),
        alpha=resolve_alpha(q, alpha),
        scale=resolve_scale(q, scale),
        alibi_slopes=alibi_slopes,
        implementation=implementation,
    )
