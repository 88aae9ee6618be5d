"""How sparse attention is: counted exactly, in row chunks, from the scores themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .entmax.reference import entmax
from .key_range import KeyRange
from .range_attention import chunk_scores, row_chunks, text_positions

TILE = 64


class SupportStatistics(NamedTuple):
    """float32 (H,) each.

    density: share of the visible 64 x 64 tiles that hold a pair with weight.
    support: keys with weight per query.
    """

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
    if query_positions is None:
        query_positions, key_positions = text_positions(q, k)
    active = torch.zeros(heads, device=q.device)
    support = torch.zeros(heads, device=q.device)
    for begin, end, first, last in row_chunks(q, k, key_range, tile=TILE):
        with torch.autocast(q.device.type, enabled=False):
            scores = chunk_scores(
                q[:, :, begin:end],
                k[:, :, first:last],
                key_range.start[..., begin:end],
                key_range.stop[..., begin:end],
                scale,
                alibi_slopes,
                query_positions[..., begin:end],
                key_positions[..., first:last],
                first,
            )
        weighted = entmax(scores, alpha) > 0
        support += weighted.sum((0, 2, 3))
        active += count_tiles(weighted)
    tiles = visible_tiles(key_range, k.shape[2]) if tiles is None else tiles
    return SupportStatistics(active / tiles.clamp(min=1), support / (batch * query_length))
