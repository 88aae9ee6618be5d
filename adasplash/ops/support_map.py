"""Which keys one head gives weight to, counted in the cells of a picture."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_attention_inputs, check_tensor, resolve_alpha, resolve_key_range, resolve_scale
from .key_range import KeyRange
from .range_attention import text_positions
from .support_statistics import weighted_pairs


class SupportMap(NamedTuple):
    """The exact support of one head in square cells, in the order of the text.

    counts: int64 (rows, columns), the pairs with weight in each cell.
    size: queries, and keys, that a cell stands for; 1 where the windows are small enough to show single keys.
    queries, keys: the half-open windows that it shows.
    """

    counts: Tensor
    size: int
    queries: tuple[int, int]
    keys: tuple[int, int]


def support_map(
    q: Tensor,
    k: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    key_range: KeyRange | None = None,
    causal: bool = True,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
    cells: int = 512,
) -> SupportMap:
    """The exact support of one head under `entmax_attention`; plain torch, memory O(T x chunk).

    Args:
        q: (Tq, D), any floating dtype; k: (Tk, D), the same.
        alpha, key_range, causal, scale, alibi_slopes: as in `entmax_attention`, for one sample and one head: ranges
            (1, 1, Tq), slopes (1,).
        queries, keys: half-open windows (begin, end) to look at; by default everything.
        cells: the map has at most so many rows and columns.

    Returns:
        The map; `adasplash.evaluation.plot_support` makes a picture of it.

    Raises:
        ValueError: if shapes, dtypes, devices or alpha do not fit, a window is empty or reaches outside, or cells < 1.
    """
    for name, x in (("q", q), ("k", k)):
        check_tensor(name, x)
        if x.ndim != 2:
            raise ValueError(f"Expected {name} of one head, (length, dim), got {tuple(x.shape)}; give {name}[b, h].")
    q, k = q[None, None], k[None, None]
    check_attention_inputs(q, k, k, alibi_slopes)
    return map_head(
        q,
        k,
        resolve_key_range(q, k, key_range, causal),
        alpha=resolve_alpha(q, alpha),
        scale=resolve_scale(q, scale),
        alibi_slopes=alibi_slopes,
        queries=queries,
        keys=keys,
        cells=cells,
    )


@torch.no_grad()
def map_head(
    q: Tensor,
    k: Tensor,
    key_range: KeyRange,
    *,
    head: int = 0,
    alpha: float | Tensor,
    scale: float,
    alibi_slopes: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
    cells: int = 512,
) -> SupportMap:
    """The map of one head of a batch of one, for attention as `attend` computes it: arguments as there, reordered or not.

    Windows, cells and errors as in `support_map`.
    """
    query_length, key_length = q.shape[2], k.shape[2]
    top, bottom = queries = _window("queries", queries, query_length)
    left, right = keys = _window("keys", keys, key_length)
    if not isinstance(cells, int) or cells < 1:
        raise ValueError(f"Expected cells as a whole number of at least 1, got {cells}.")
    if query_positions is None:
        query_positions, key_positions = text_positions(q, k)
    place = query_positions[0, head] - (key_length - query_length)  # the last query stands beside the last key
    chosen = ((place >= top) & (place < bottom)).nonzero().flatten()
    group = head // (q.shape[1] // k.shape[1])
    bounds = (bound[:1, head : head + 1, chosen] for bound in (key_range.start, key_range.stop))
    pairs = weighted_pairs(
        q[:, head : head + 1, chosen],
        k[:, group : group + 1],
        KeyRange(*bounds),
        alpha=alpha[:, head : head + 1] if isinstance(alpha, Tensor) and alpha.ndim else alpha,
        scale=scale,
        alibi_slopes=None if alibi_slopes is None else alibi_slopes[..., head : head + 1],
        query_positions=query_positions[:, head : head + 1, chosen],
        key_positions=key_positions[:, group : group + 1],
    )
    size = -(-max(bottom - top, right - left) // cells)
    rows, columns = -(-(bottom - top) // size), -(-(right - left) // size)
    counts = torch.zeros(rows * columns, dtype=torch.int64, device=q.device)
    rows_below_top, keys_right_of_left = place[chosen] - top, key_positions[0, group] - left
    for first_query, first_key, weighted in pairs:
        row, key = weighted[0, 0].nonzero(as_tuple=True)
        row, key = rows_below_top[first_query + row], keys_right_of_left[first_key + key]
        seen = (key >= 0) & (key < right - left)
        counts += torch.bincount((row // size * columns + key // size)[seen], minlength=counts.numel())
    return SupportMap(counts.view(rows, columns), size, queries, keys)


def _window(name: str, window: tuple[int, int] | None, length: int) -> tuple[int, int]:
    if window is None:
        window = (0, length)
    fits = isinstance(window, tuple | list) and len(window) == 2 and all(isinstance(end, int) for end in window)
    if not fits or not 0 <= window[0] < window[1] <= length:
        raise ValueError(f"Expected {name} as a window (begin, end) inside 0..{length}, got {window}.")
    return tuple(window)
