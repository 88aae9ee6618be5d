"""Reordering: sort by bucket, or keep and compact. Afterwards every query's visible keys are one contiguous range.

Both keep the order of the text among the keys that belong together, so that the keys of a bucket (or the kept keys)
before a place a in the text are a prefix, and any KeyRange [a, b) of the text becomes a range of the new order.

Here in torch for any device; operator.py has what attention calls of this as kernels, with the same meaning.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..key_range import KeyRange


class Reordering(NamedTuple):
    """A new order of queries and keys, and the ranges that hold in it.

    query_order: (B, H, Tq), the place in the text of each query in its new order; key_order: (B, G, Tk) likewise.
    key_range: (B, H, Tq), ranges of new key places, for the queries in their new order.
    query_count, key_count: (B, H) and (B, G), how many of them, all in front, may see or be seen.

    Orders and counts are int64 from torch, int32 from the kernels.
    """

    query_order: Tensor
    key_order: Tensor
    key_range: KeyRange
    query_count: Tensor
    key_count: Tensor


def take_rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x (B, H, T, D) in the order (B, H, T) given."""
    return x.gather(2, order.long()[..., None].expand(*order.shape, x.shape[-1]))


def restore_rows(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of `take_rows`."""
    return torch.empty_like(x).scatter(2, order.long()[..., None].expand_as(x), x)


def reorder_inputs(q: Tensor, k: Tensor, v: Tensor, reordering: Reordering) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, Tq, D), k and v (B, G, Tk, D) in their new order."""
    key_order = reordering.key_order
    return take_rows(q, reordering.query_order), take_rows(k, key_order), take_rows(v, key_order)


def restore_output(out: Tensor, reordering: Reordering) -> Tensor:
    """Output (B, H, Tq, D) of queries in their new order, in the order of the text."""
    return restore_rows(out, reordering.query_order)


def hash_buckets(x: Tensor, directions: Tensor) -> Tensor:
    """Angular LSH: argmax of [x R, -x R]; x (B, G, T, D), directions R (G, D, n_buckets / 2) -> int64 (B, G, T)."""
    with torch.autocast(x.device.type, enabled=False):
        projected = x.detach().float() @ directions.float()
    return torch.cat([projected, -projected], -1).argmax(-1)


def sort_by_bucket(query_buckets: Tensor, key_buckets: Tensor, key_range: KeyRange) -> Reordering:
    """Queries and keys sorted by bucket; each query keeps, of its range, the keys of its own bucket.

    Args:
        query_buckets: int64 (B, H, Tq); key_buckets: (B, G, Tk).
        key_range: (B, H, Tq) in the order of the text.
    """
    heads, groups, key_length = query_buckets.shape[1], key_buckets.shape[1], key_buckets.shape[2]
    query_order = query_buckets.argsort(dim=-1, stable=True)
    # bucket and place in one integer: its sorted list is the new order of the keys, and searching it counts them
    place = torch.arange(key_length, device=key_buckets.device)
    sorted_keys, key_order = (key_buckets * (key_length + 1) + place).sort(-1)
    sorted_keys = sorted_keys.repeat_interleave(heads // groups, 1)

    def new_place(text_place: Tensor) -> Tensor:
        wanted = query_buckets * (key_length + 1) + text_place.clamp(0, key_length)
        return torch.searchsorted(sorted_keys, wanted.gather(-1, query_order))

    def whole(order: Tensor) -> Tensor:
        return order.new_full(order.shape[:2], order.shape[2])

    new_range = KeyRange(new_place(key_range.start), new_place(key_range.stop))
    return Reordering(query_order, key_order, new_range, whole(query_order), whole(key_order))


def sort_by_hash(q: Tensor, k: Tensor, directions: Tensor, key_range: KeyRange) -> Reordering:
    """Queries (B, H, Tq, D) and keys (B, G, Tk, D) sorted by `hash_buckets`, with (G, D, n_buckets / 2) directions."""
    query_directions = directions.repeat_interleave(q.shape[1] // k.shape[1], 0)
    return sort_by_bucket(hash_buckets(q, query_directions), hash_buckets(k, directions), key_range)


def compact_kept(query_kept: Tensor, key_kept: Tensor, key_range: KeyRange) -> Reordering:
    """Kept queries and keys moved to the front; each kept query keeps, of its range, the kept keys.

    Dropped queries receive an empty range, hence output 0.

    Args:
        query_kept: bool (B, H, Tq); key_kept: bool (B, G, Tk).
        key_range: (B, H, Tq) in the order of the text.
    """
    heads, groups, key_length = query_kept.shape[1], key_kept.shape[1], key_kept.shape[2]
    query_order = (~query_kept).byte().argsort(dim=-1, stable=True)
    key_order = (~key_kept).byte().argsort(dim=-1, stable=True)
    kept_before = torch.nn.functional.pad(key_kept.cumsum(-1), (1, 0)).repeat_interleave(heads // groups, 1)

    def new_place(text_place: Tensor) -> Tensor:
        return kept_before.gather(-1, text_place.clamp(0, key_length).long())

    start, stop = new_place(key_range.start), new_place(key_range.stop)
    stop = torch.where(query_kept, stop, start)
    new_range = KeyRange(start.gather(-1, query_order), stop.gather(-1, query_order))
    return Reordering(query_order, key_order, new_range, query_kept.sum(-1), key_kept.sum(-1))
