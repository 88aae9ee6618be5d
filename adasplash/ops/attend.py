"""Attention over key ranges by what runs here: Triton kernels on a GPU, the torch reference elsewhere."""

from __future__ import annotations

from torch import Tensor

from .announce import announce
from .implementation import choose_implementation
from .key_range import KeyRange
from .range_attention import range_attention, text_positions


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    *,
    alpha: float | Tensor,
    scale: float,
    alibi_slopes: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """What `range_attention` computes, arguments as there; implementation: auto | triton | reference.

    Raises ValueError where triton is asked for and cannot run; auto then takes the reference.
    """
    arguments = {
        "scale": scale,
        "alibi_slopes": alibi_slopes,
        "query_positions": query_positions,
        "key_positions": key_positions,
    }
    chosen = choose_implementation(implementation, q.device, q.dtype, max(q.shape[-1], v.shape[-1]))
    obstacle = None
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        obstacle = "the kernels have no gradient for ALiBi slopes"
    elif q.shape[-1] != v.shape[-1]:
        obstacle = f"the kernels want v with q's head dim {q.shape[-1]}, got {v.shape[-1]}"
    if obstacle and implementation == "triton":
        raise ValueError(f"implementation=triton cannot run here: {obstacle}. Use implementation=auto.")
    if obstacle and chosen == "triton":
        announce(f"Attention by its torch reference: {obstacle}.")
    if chosen == "reference" or obstacle or q.numel() == 0 or k.shape[2] == 0:
        return range_attention(q, k, v, key_range, alpha=alpha, **arguments)
    if alibi_slopes is not None and query_positions is None:
        arguments["query_positions"], arguments["key_positions"] = text_positions(q, k)
    # Imported here, so that the package needs no triton where no kernel runs.
    if not isinstance(alpha, Tensor) and alpha == 1.0:
        from .softmax_attention.operator import softmax_attention_kernels

        return softmax_attention_kernels(q, k, v, key_range, **arguments)
    from .entmax_attention.operator import entmax_attention_kernels

    return entmax_attention_kernels(q, k, v, key_range, alpha=alpha, **arguments)
