"""Softmax attention on a GPU as torch operators: `adasplash::softmax_attention` and its backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..kernel_operator import kernel_operator, launch
from ..key_range import KeyRange
from ..launch_arguments import (
    head_constants,
    last_contiguous,
    row_stride,
    tile_constants,
    with_equal_strides,
    with_row_stride,
    with_wide_strides,
)
from ..range_attention import text_positions
from ..tile_table import Tiles, softmax_tiles
from .kernels import softmax_backward_columns_kernel, softmax_backward_rows_kernel, softmax_forward_kernel


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, query_length, dim = q.shape
    blocks = triton.cdiv(query_length, softmax_tiles(dim, q.dtype, q.device)["forward"].block_m)
    lse = q.new_empty((batch, heads, row_stride(query_length)), dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty((batch * heads, blocks, 4), dtype=torch.int32)


def _constants(q: Tensor, tiles: Tiles, slopes: Tensor | None) -> dict:
    return head_constants(q, slopes) | tile_constants(q.dtype, tiles)


@kernel_operator("adasplash::softmax_attention")
def softmax_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    stop: Tensor,
    slopes: Tensor | None,
    query_position: Tensor | None,
    key_position: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, Tq, D); k, v (B, G, Tk, D); start, stop (B, H, Tq) int32, all of last stride 1; slopes (B, H) float32.

    query_position (B, H, S), S the `row_stride` of Tq, and key_position (B, G, Tk) int32.

    Returns out (as q), lse (B, H, S), the logarithm to base 2 of each row's sum, and block_range (B * H, blocks, 4).
    """
    batch, heads, query_length, dim = q.shape
    groups, key_length = k.shape[1:3]
    out, lse, block_range = _empty_outputs(q)
    blocks = block_range.shape[1]
    start, stop = with_equal_strides(start, stop)
    launch(softmax_forward_kernel, (blocks, heads, batch),
        q, k, v, start, stop, slopes, query_position, key_position, out, lse, block_range,
        scale, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *start.stride()[:2],
        heads, heads // groups, query_length, lse.shape[-1], key_length, blocks,
        **_constants(q, softmax_tiles(dim, q.dtype, q.device)["forward"], slopes),
    )  # fmt: skip
    return out, lse, block_range


@softmax_attention_forward.register_fake
def _(q, k, v, start, stop, slopes, query_position, key_position, scale):
    return _empty_outputs(q)


@kernel_operator("adasplash::softmax_attention_backward")
def softmax_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    stop: Tensor,
    slopes: Tensor | None,
    query_position: Tensor | None,
    key_position: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_range: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv as q, k, v."""
    batch, heads, query_length, dim = q.shape
    groups, key_length = k.shape[1:3]
    ratio = heads // groups
    tiles = softmax_tiles(dim, q.dtype, q.device)
    positions = (slopes, query_position, key_position)
    start, stop = map(with_wide_strides, with_equal_strides(start, stop))
    ranges = start.stride()[:2]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    blocks = triton.cdiv(query_length, tiles["rows"].block_m)
    launch(softmax_backward_rows_kernel, (blocks, heads, batch),
        q, k, v, start, stop, *positions, out, lse, d_out, delta, dq,
        scale, *inputs, *out.stride()[:3], *d_out.stride()[:3], *dq.stride()[:3], *ranges,
        heads, ratio, query_length, lse.shape[-1], key_length, blocks, **_constants(q, tiles["rows"], slopes),
    )  # fmt: skip
    launch(softmax_backward_columns_kernel, (triton.cdiv(key_length, tiles["columns"].block_n), groups, batch),
        q, k, v, start, stop, *positions, block_range, lse, delta, d_out, dk, dv,
        scale, *inputs, *d_out.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *ranges,
        groups, ratio, query_length, lse.shape[-1], key_length, block_range.shape[1],
        QUERY_BLOCK=tiles["forward"].block_m, **_constants(q, tiles["columns"], slopes),
    )  # fmt: skip
    return dq, dk, dv


@softmax_attention_backward.register_fake
def _(d_out, q, k, v, *rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, *unused):
    if d_out is None:
        return (None,) * 9
    dq, dk, dv = softmax_attention_backward(last_contiguous(d_out), *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, *(None,) * 6


softmax_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def softmax_attention_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> Tensor:
    """What `range_attention` computes with alpha = 1, by kernels, differentiable once and the same at every run.

    Source: flash attention, Dao 2023 (https://arxiv.org/abs/2307.08691).

    Args:
        q: (B, H, Tq, D); k, v: (B, G, Tk, D), H a multiple of G; one dtype of bfloat16, float16 and float32, on one GPU,
            of any strides (those of another last stride than 1 are copied). Tq, Tk >= 1, D <= 256.
        key_range: ranges (B, H, Tq) within [0, Tk]; may be expanded.
        scale: > 0.
        alibi_slopes: (H,) or (B, H).
        query_positions, key_positions: (B, H, Tq) and (B, G, Tk), places in the text that ALiBi measures distances
            between; by default the order given, the last query beside the last key.

    Returns:
        (B, H, Tq, D) in q's dtype; 0 where a query sees no key, which then has no gradient either.

    Raises:
        ValueError: if scale is not positive.
    """
    if not scale > 0:
        raise ValueError(f"Expected a scale above 0, got {scale:g}.")
    batch, heads, _, _ = q.shape
    slopes = None
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(q.device, torch.float32).reshape(-1, heads).expand(batch, heads).contiguous()
        if query_positions is None:
            query_positions, key_positions = text_positions(q, k)
        query_positions = with_row_stride(query_positions.int())
        key_positions = key_positions.int().contiguous()
    else:
        query_positions = key_positions = None
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    start, stop = last_contiguous(key_range.start), last_contiguous(key_range.stop)
    out, _, _ = softmax_attention_forward(q, k, v, start, stop, slopes, query_positions, key_positions, scale)
    return out
