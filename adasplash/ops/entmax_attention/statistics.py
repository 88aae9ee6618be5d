"""How many pairs have weight, counted on the GPU: one more dense pass, with the thresholds that the forward pass found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import SIZES, load_rows, load_tile, program_head, score_tile, visible_tiles
from ..key_range import KeyRange
from ..launch_arguments import dot_precision, head_constants, with_equal_strides
from ..tile_table import block_dim
from .operator import Forward, entmax_attention_forward, operator_arguments


@triton.jit(do_not_specialize=SIZES)
def count_support_kernel(
    Q, K, START, STOP, ALPHA, SLOPES, QUERY_POSITION, KEY_POSITION, TAU, SUPPORT, ACTIVE,
    scale, q_b, q_h, q_t, k_b, k_h, k_t, range_b, range_h, heads, ratio, query_length, row_stride, key_length, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SUPPORT (B, H, S): keys with weight; ACTIVE (B * H, blocks): TILE x TILE tiles of the block that hold one."""
    block = tl.program_id(0)
    bh = program_head()
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    group = (h // ratio).to(tl.int64)
    row = block * TILE + tl.arange(0, TILE)
    n = tl.arange(0, TILE)
    d = tl.arange(0, BLOCK_D)
    inside = row < query_length
    at = bh.to(tl.int64) * row_stride + row
    range_at = b * range_b + h.to(tl.int64) * range_h + row
    start = tl.load(START + range_at, mask=inside, other=0)
    stop = tl.load(STOP + range_at, mask=inside, other=0)
    first, _, _, last = visible_tiles(start, stop, key_length, TILE)
    q = load_rows(Q, b, h, row, inside, q_b, q_h, q_t, d, D, BLOCK_D)
    k_at = K + b * k_b + group * k_h + n[None, :].to(tl.int64) * k_t + d[:, None]
    z_scale = (tl.load(ALPHA + h).to(tl.float32) - 1.0) * scale
    tau = tl.load(TAU + at, mask=inside, other=0.0)
    slope = 0.0
    query_position = row
    if HAS_ALIBI:
        slope = tl.load(SLOPES + bh) / scale
        query_position = tl.load(QUERY_POSITION + at, mask=inside, other=0)
        KEY_POSITION += (b * (heads // ratio) + group) * key_length
    support = tl.zeros((TILE,), tl.int32)
    active = 0
    for step in range(0, last - first):
        tile = first + step
        column = tile * TILE + n
        k = load_tile(
            k_at + (tile * TILE).to(tl.int64) * k_t, d[:, None] < D, column[None, :] < key_length, D == BLOCK_D
        )
        key_position = column
        if HAS_ALIBI:
            key_position = tl.load(KEY_POSITION + column, mask=column < key_length, other=0)
        raw = score_tile(q, k, query_position, key_position, slope, HAS_ALIBI, PRECISION)
        weighted = (
            (raw * z_scale > tau[:, None]) & (column[None, :] >= start[:, None]) & (column[None, :] < stop[:, None])
        )
        here = tl.sum(weighted.to(tl.int32), 1)
        support += here
        active += (tl.max(here, 0) > 0).to(tl.int32)
    tl.store(SUPPORT + at, support, mask=inside)
    tl.store(ACTIVE + bh * blocks + block, active)


def fits(q: Tensor, tile: int) -> bool:
    """Whether the GPU has the shared memory to count in tiles of heads as wide as q's: float32 takes two halves of both tiles."""
    if q.device.type != "cuda" or q.dtype != torch.float32:
        return True
    needed = 2 * 2 * tile * block_dim(q.shape[-1]) * 4
    return needed <= torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin


def count_support(
    q: Tensor, k: Tensor, key_range: KeyRange, *, tile: int, alpha: float | Tensor, scale: float, **places
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts for `entmax_attention_kernels(q, k, ...)`, arguments as there.

    Returns:
        support (B, H, Tq) int32, active tiles (B, H, blocks) int32, share of queries computed in tile mode (H,).
        A pair on the edge of the support may be counted or not, as its score rounds.
    """
    batch, heads, query_length, _ = q.shape
    arguments = operator_arguments(q, k, k, key_range, alpha=alpha, scale=scale, **places)
    q, k, _, start, stop, alpha, slopes, query_position, key_position, *_ = arguments
    start, stop = with_equal_strides(start, stop)
    found = Forward(*entmax_attention_forward(*arguments))
    blocks = triton.cdiv(query_length, tile)
    support = torch.empty_like(found.tau, dtype=torch.int32)
    active = support.new_empty((batch, heads, blocks))
    with torch.cuda.device_of(q):
        count_support_kernel[(blocks, heads, batch)](
            q, k, start, stop, alpha, slopes, query_position, key_position, found.tau, support, active,
            scale, *q.stride()[:3], *k.stride()[:3], *start.stride()[:2],
            heads, heads // k.shape[1], query_length, found.tau.shape[-1], k.shape[2], blocks,
            num_stages=1,  # tiles of wide heads fit into shared memory once
            TILE=tile, PRECISION=dot_precision(q.dtype), **head_constants(q, slopes),
        )  # fmt: skip
    return support[..., :query_length], active, found.in_tiles.view(batch, heads, -1).float().mean((0, 2))
