"""How sparse attention is: counted exactly, in row chunks, from the scores themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .entmax.reference import entmax
from .key_range import KeyRange
from .range_attention import chunk_scores, row_chunks

TILE = 64


class SupportStatistics(NamedTuple):
    """float32 (H,) each: share of the visible 64 x 64 tiles that hold a pair with weight, and keys per query with weight."""

    density: Tensor
    support: Tensor


def count_tiles(pairs: Tensor) -> Tensor:
    """Number of TILE x TILE tiles with a True; pairs bool (B, H, rows, keys), both tile-aligned at 0 -> (H,)."""
    rows, keys = pairs.shape[-2:]
    pairs = F.pad(pairs, (0, -keys % TILE, 0, -rows % TILE))
    return pairs.unflatten(-1, (-1, TILE)).any(-1).unflatten(-2, (-1, TILE)).any(-2).sum((0, 2, 3))


@torch.no_grad()
def visible_tiles(key_range: KeyRange, key_length: int) -> Tensor:
    """Number of tiles that hold a visible pair, per head: (H,) for key_range (B, H, Tq)."""
    bounds = key_range.tile_bounds(TILE)
    first = bounds.any_start.clamp(0, key_length) // TILE
    last = -(-bounds.any_stop.clamp(0, key_length) // TILE)
    return (last - first).clamp(min=0).sum((0, 2))


@torch.no_grad()
def support_statistics(
    q: Tensor,
    k: Tensor,
    key_range: KeyRange,
    *,
    alpha: float | Tensor,
    scale: float,
    alibi_slopes: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    tiles: Tensor | None = None,
) -> SupportStatistics:
    """Counts for attention as `range_attention` computes it; arguments as there.

    `tiles` (H,) is the number of tiles that density is a share of, by default those that `key_range` sees.
    """
    batch, heads, query_length, _ = q.shape
    groups, key_length = k.shape[1:3]
    if alibi_slopes is not None and query_positions is None:
        query_positions = (torch.arange(query_length, device=q.device) + (key_length - query_length)).expand(
            batch, heads, -1
        )
    if alibi_slopes is not None and key_positions is None:
        key_positions = torch.arange(key_length, device=q.device).expand(batch, groups, -1)
    active = torch.zeros(heads, device=q.device)
    support = torch.zeros(heads, device=q.device)
    for begin, end, first, last in row_chunks(q, k, key_range, tile=TILE):
        scores = chunk_scores(
            q[:, :, begin:end],
            k[:, :, first:last],
            key_range.start[..., begin:end],
            key_range.stop[..., begin:end],
            scale,
            alibi_slopes,
            None if alibi_slopes is None else query_positions[..., begin:end],
            None if alibi_slopes is None else key_positions[..., first:last],
            first,
        )
        weighted = entmax(scores, alpha) > 0
        support += weighted.sum((0, 2, 3))
        active += count_tiles(weighted)
    tiles = visible_tiles(key_range, key_length) if tiles is None else tiles
    return SupportStatistics(active / tiles.clamp(min=1), support / (batch * query_length))
