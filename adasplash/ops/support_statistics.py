"""How sparse attention is: counted exactly, in row chunks, from the scores themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .announce import announce
from .entmax.reference import entmax
from .implementation import choose_implementation
from .key_range import KeyRange
from .range_attention import chunk_scores, row_chunks, text_positions

TILE = 64


class SupportStatistics(NamedTuple):
    """How sparse each head of a layer is, float32 (H,) each; counted over a batch, exactly.

    density: share of the visible 64 x 64 tiles that hold a pair with weight, 0 to 1.
    support: keys with weight per query, on average.
    largest: the largest support of a query.
    tile_mode: share of the queries, 0 to 1, that the kernels compute on whole tiles; 0 where no kernel runs.
    """

    density: Tensor
    support: Tensor
    largest: Tensor
    tile_mode: Tensor


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


def weighted_pairs(
    q: Tensor,
    k: Tensor,
    key_range: KeyRange,
    *,
    alpha: float | Tensor,
    scale: float,
    alibi_slopes: Tensor | None,
    query_positions: Tensor,
    key_positions: Tensor,
    tile: int = 1,
) -> Iterator[tuple[int, int, Tensor]]:
    """Which pairs get weight, in blocks of rows: (first query, first key, bool (B, H, rows, keys)); arguments as `attend`.

    All keys that a block leaves out have none. First keys, and queries, are multiples of `tile`.
    """
    for begin, end, first, last in row_chunks(q, k, key_range, tile):
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
        yield begin, first, entmax(scores, alpha) > 0


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
    implementation: str = "auto",
) -> SupportStatistics:
    """Counts for attention as `attend` computes it; arguments as there.

    `tiles` (H,) is the number of tiles that density is a share of, by default those that `key_range` sees.
    """
    batch, heads, query_length, _ = q.shape
    if query_positions is None:
        query_positions, key_positions = text_positions(q, k)
    how = {"alpha": alpha, "scale": scale, "alibi_slopes": alibi_slopes, "tile": TILE}
    how |= {"query_positions": query_positions, "key_positions": key_positions}
    tiles = visible_tiles(key_range, k.shape[2]) if tiles is None else tiles
    chosen = choose_implementation(implementation, q.device, q.dtype, q.shape[-1])
    if chosen == "triton" and (isinstance(alpha, Tensor) or alpha > 1.0):
        from .entmax_attention import statistics

        if statistics.fits(q, TILE):
            found, active, tile_mode = statistics.count_support(q, k, key_range, **how)
            density = active.sum((0, 2)) / tiles.clamp(min=1)
            return SupportStatistics(density, found.float().mean((0, 2)), found.amax((0, 2)).float(), tile_mode)
        # where triton is asked for, too: a run whose attention it computes is not to end for want of a statistic
        announce(
            f"The torch reference counts supports: float32 heads of dim {q.shape[-1]} are too wide for the kernel."
        )
    active, support, largest = torch.zeros(3, heads, device=q.device).unbind()
    for _, _, weighted in weighted_pairs(q, k, key_range, **how):
        found = weighted.sum(-1)  # (B, H, rows)
        support += found.sum((0, 2))
        largest = torch.maximum(largest, found.amax((0, 2)))
        active += count_tiles(weighted)
    support = support / (batch * query_length)
    return SupportStatistics(active / tiles.clamp(min=1), support, largest, torch.zeros_like(support))
