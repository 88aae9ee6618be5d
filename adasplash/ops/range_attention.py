"""Attention over key ranges in plain torch, in row chunks: memory O(T x chunk), any dtype, float32 inside.

Softmax and entmax attention are this one function with another `alpha` (1 is softmax), as hash-sparse and QK-dropping
attention are this one function over reordered sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .entmax.reference import entmax
from .key_range import KeyRange

# Scores held at once (all heads of one row chunk); 64 MiB each in float32 on the CPU, 512 MiB on a GPU.
SCORES_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 27}


def text_positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the text, (B, H, Tq) and (B, G, Tk), of queries and keys in order: the last query beside the last key."""
    query_length, key_length = q.shape[2], k.shape[2]
    query_positions = torch.arange(query_length, device=q.device) + (key_length - query_length)
    key_positions = torch.arange(key_length, device=q.device)
    return query_positions.expand(q.shape[:3]), key_positions.expand(k.shape[:3])


def alibi_bias(slopes: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """-slope * |i - j| (Press et al. 2022): slopes (H,) or (B, H), positions (B, H, rows) and (B, H, keys)."""
    distance = (query_positions[..., :, None] - key_positions[..., None, :]).abs()
    return -slopes.reshape(-1, slopes.shape[-1], 1, 1) * distance


def chunk_scores(q, k, start, stop, scale, slopes, query_positions, key_positions, first_key) -> Tensor:
    """Masked scores (B, H, rows, keys) of a row chunk in float32 (float64 stays); -inf outside the range."""
    batch, heads, rows, dim = q.shape
    groups, keys = k.shape[1:3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = q.to(wide).reshape(batch, groups, heads // groups * rows, dim)  # one matmul per key head, no copies of k
    scores = (q @ k.to(wide).mT).view(batch, heads, rows, keys) * scale
    if slopes is not None:
        repeated = key_positions.repeat_interleave(heads // key_positions.shape[1], 1)
        scores = scores + alibi_bias(slopes.to(wide), query_positions, repeated)
    key = torch.arange(first_key, first_key + keys, device=q.device)
    visible = (key >= start[..., None]) & (key < stop[..., None])
    return scores.masked_fill(~visible, -torch.inf)


def _attend_chunk(q, k, v, start, stop, alpha, scale, slopes, query_positions, key_positions, first_key) -> Tensor:
    batch, heads, rows, _ = q.shape
    groups, keys, value_dim = v.shape[1:]
    scores = chunk_scores(q, k, start, stop, scale, slopes, query_positions, key_positions, first_key)
    p = entmax(scores, alpha)
    p = p.view(batch, groups, heads // groups * rows, keys)
    return (p @ v.to(p.dtype)).view(batch, heads, rows, value_dim).to(q.dtype)


def row_chunks(q: Tensor, k: Tensor, key_range: KeyRange, tile: int = 1):
    """Yields (begin, end, first_key, last_key): blocks of rows and the keys that any of them sees, aligned to `tile`.

    Reading the bounds waits for a GPU, which a reference may.
    """
    batch, heads, query_length, _ = q.shape
    key_length = k.shape[2]
    at_once = SCORES_AT_ONCE.get(q.device.type, SCORES_AT_ONCE["cpu"])
    affordable = at_once // max(1, batch * heads * key_length) // tile
    rows = max(1, min(affordable, -(-query_length // tile))) * tile
    bounds = key_range.tile_bounds(rows)
    starts = bounds.any_start.amin((0, 1)).clamp(0, key_length).tolist()
    stops = bounds.any_stop.amax((0, 1)).clamp(0, key_length).tolist()
    for index, (first, last) in enumerate(zip(starts, stops, strict=True)):
        if first >= last:  # nobody sees anything: one key, masked, keeps the shapes ordinary
            first, last = 0, 1
        yield index * rows, min((index + 1) * rows, query_length), first // tile * tile, last


def range_attention(
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
) -> Tensor:
    """entmax attention with ranges; alpha = 1 is softmax. Autocast changes nothing: float32 inside.

    Args:
        q: (B, H, Tq, D); k, v: (B, G, Tk, D), H a multiple of G.
        key_range: ranges (B, H, Tq).
        alpha: a number, or a tensor that broadcasts to (B, H, 1, 1).
        alibi_slopes: (H,) or (B, H).
        query_positions, key_positions: (B, H, Tq) and (B, G, Tk), places in the text that ALiBi measures distances
            between; by default the order given, the last query beside the last key.

    Returns:
        (B, H, Tq, D) in q's dtype, D being v's; 0 where a query sees no key. A value of v that is not finite may show in
        rows that do not see its key.
    """
    attend = attend_ranges
    if torch.compiler.is_compiling():  # it stays out of graphs
        from .uncompiled import attend_ranges as attend
    return attend(q, k, v, key_range, alpha, scale, alibi_slopes, query_positions, key_positions)


def attend_ranges(q, k, v, key_range, alpha, scale, alibi_slopes, query_positions, key_positions) -> Tensor:
    if q.numel() == 0 or k.shape[2] == 0:
        nothing = sum(x[:, :, :0].sum() for x in (q, k, v))  # 0, with gradients for all
        return q.new_zeros(*q.shape[:3], v.shape[-1]) + nothing
    if query_positions is None:
        query_positions, key_positions = text_positions(q, k)
    out = []
    chunks = list(row_chunks(q, k, key_range))
    with torch.autocast(q.device.type, enabled=False):
        for begin, end, first, last in chunks:
            inputs = (
                q[:, :, begin:end],
                k[:, :, first:last],
                v[:, :, first:last],
                key_range.start[..., begin:end],
                key_range.stop[..., begin:end],
                alpha,
                scale,
                alibi_slopes,
                query_positions[..., begin:end],
                key_positions[..., first:last],
                first,
            )
            if len(chunks) > 1 and torch.is_grad_enabled():
                # the scores of a chunk are computed again in the backward pass instead of being kept
                out.append(checkpoint(_attend_chunk, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                out.append(_attend_chunk(*inputs))
        return torch.cat(out, 2)
