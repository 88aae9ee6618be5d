"""Reordering on a GPU: the functions of `reorder` that attention calls, by Triton kernels.

New places are counted, not sorted: a bucket's keys come after all keys of smaller buckets, in the order of the text. So
one pass counts each bucket in each chunk of CHUNK places, one running sum over (bucket, chunk) says where each chunk
puts its first element of each bucket, and a second pass adds the rank within the chunk. Nothing waits for the GPU, and
rows are only ever copied, forward and backward: every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import kernel_operator, last_contiguous
from .key_range import KeyRange
from .reorder import Reordering
from .tile_table import block_dim

CHUNK = 128  # places of one program; ranks within are found by comparing all pairs
BUCKETS_AT_ONCE = 16
QUERIES_AT_ONCE = 256
ELEMENTS_AT_ONCE = 4096  # of the rows that one program copies or hashes


@triton.jit
def hash_kernel(
    X, DIRECTIONS, BUCKETS, x_b, x_h, x_t,
    heads, ratio, length, half,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each row's bucket: the largest of its products with the directions and their opposites, the first of equals."""
    bh = tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = row < length
    at = X + b * x_b + h * x_h + row[:, None].to(tl.int64) * x_t + d[None, :]
    x = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    direction_at = DIRECTIONS + (h // ratio) * half * D + d
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    lowest = tl.full((ROWS,), float("inf"), tl.float32)
    highest_at = tl.zeros((ROWS,), tl.int32)
    lowest_at = tl.zeros((ROWS,), tl.int32)
    for i in range(half):
        direction = tl.load(direction_at + i * D, mask=d < D, other=0.0)
        # Not a matrix product: in full float32 these sums cost less than reading x, for as many buckets as are in use.
        projected = tl.sum(x * direction[None, :], 1)
        higher, lower = projected > highest, projected < lowest
        highest, highest_at = tl.where(higher, projected, highest), tl.where(higher, i, highest_at)
        lowest, lowest_at = tl.where(lower, projected, lowest), tl.where(lower, i, lowest_at)
    bucket = tl.where(highest >= -lowest, highest_at, half + lowest_at)
    tl.store(BUCKETS + bh.to(tl.int64) * length + row, bucket, mask=inside)


@triton.jit
def count_kernel(BUCKETS, COUNTS, length, chunks, n_buckets, CHUNK: tl.constexpr, BUCKETS_AT_ONCE: tl.constexpr):
    """How often each bucket occurs in each chunk, (n_buckets, chunks) for each batch and head, after a leading 0."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    bucket = tl.program_id(2) * BUCKETS_AT_ONCE + tl.arange(0, BUCKETS_AT_ONCE)
    found = tl.load(BUCKETS + bh * length + place, mask=place < length, other=-1)
    count = tl.sum((found[:, None] == bucket[None, :]).to(tl.int32), 0)
    counts_at = COUNTS + bh * (n_buckets * chunks + 1) + 1 + bucket * chunks + chunk
    tl.store(counts_at, count, mask=bucket < n_buckets)


@triton.jit
def place_kernel(BUCKETS, BEFORE, ORDER, length, chunks, n_buckets, CHUNK: tl.constexpr):
    """Writes each place of the text to its new place: where its chunk's bucket begins, plus its rank therein."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    within = tl.arange(0, CHUNK)
    place = chunk * CHUNK + within
    inside = place < length
    bucket = tl.load(BUCKETS + bh * length + place, mask=inside, other=0)
    same_and_earlier = (bucket[:, None] == bucket[None, :]) & (within[None, :] < within[:, None])
    rank = tl.sum(same_and_earlier.to(tl.int32), 1)
    begin = tl.load(BEFORE + bh * (n_buckets * chunks + 1) + bucket * chunks + chunk, mask=inside, other=0)
    tl.store(ORDER + bh * length + begin + rank, place, mask=inside)


@triton.jit
def new_place(text_place, bucket, inside, key_order, before, key_length, chunks, CHUNK: tl.constexpr):
    """The new place of the first key of this bucket at or after a place of the text; or the end of the bucket."""
    text_place = tl.minimum(tl.maximum(text_place, 0), key_length)
    chunk = tl.minimum(text_place // CHUNK, chunks - 1)
    # The bucket's keys of that chunk: at most CHUNK in the order of the text, so that bisection finds the place.
    low = tl.load(before + bucket * chunks + chunk, mask=inside, other=0)
    high = tl.load(before + bucket * chunks + chunk + 1, mask=inside, other=0)
    size = CHUNK
    while size > 0:
        middle = (low + high) // 2
        unsure = low < high
        key = tl.load(key_order + middle, mask=unsure, other=0)
        is_earlier = unsure & (key < text_place)
        low = tl.where(is_earlier, middle + 1, low)
        high = tl.where(is_earlier, high, middle)
        size = size // 2
    return low


@triton.jit
def range_kernel(
    QUERY_BUCKETS, QUERY_ORDER, KEY_ORDER, BEFORE, START, STOP, NEW_START, NEW_STOP,
    start_b, start_h, start_t, stop_b, stop_h, stop_t,
    heads, ratio, query_length, key_length, chunks, n_buckets, seeing_buckets,
    QUERIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The range of new key places of each query, in the new order of queries."""
    bh = tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    bg = b * (heads // ratio) + h // ratio
    at = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside = at < query_length
    query_row = bh.to(tl.int64) * query_length
    query = tl.load(QUERY_ORDER + query_row + at, mask=inside, other=0)
    bucket = tl.load(QUERY_BUCKETS + query_row + query, mask=inside, other=0)
    start = tl.load(START + b * start_b + h * start_h + query * start_t, mask=inside, other=0)
    stop = tl.load(STOP + b * stop_b + h * stop_h + query * stop_t, mask=inside, other=0)
    seeing = bucket < seeing_buckets
    bucket = tl.minimum(bucket, seeing_buckets - 1)
    key_order = KEY_ORDER + bg * key_length
    before = BEFORE + bg * (n_buckets * chunks + 1)
    start = new_place(start, bucket, inside, key_order, before, key_length, chunks, CHUNK)
    stop = new_place(stop, bucket, inside, key_order, before, key_length, chunks, CHUNK)
    tl.store(NEW_START + query_row + at, start, mask=inside)
    tl.store(NEW_STOP + query_row + at, tl.where(seeing, stop, start), mask=inside)


@triton.jit
def rows_kernel(
    X, ORDER, OUT, x_b, x_h, x_t, out_b, out_h, out_t,
    heads, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, RESTORE: tl.constexpr,
):  # fmt: skip
    """Copies row order[i] to row i, or back if RESTORE."""
    bh = tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = row < length
    ordered = tl.load(ORDER + bh.to(tl.int64) * length + row, mask=inside, other=0).to(tl.int64)
    row = row.to(tl.int64)
    source, target = (row, ordered) if RESTORE else (ordered, row)
    mask = inside[:, None] & (d < D)[None, :]
    x = tl.load(X + b * x_b + h * x_h + source[:, None] * x_t + d[None, :], mask=mask)
    tl.store(OUT + b * out_b + h * out_h + target[:, None] * out_t + d[None, :], x, mask=mask)


# ----------------------------------------------------------------------------------------------------- order and ranges


@kernel_operator("adasplash::hash_buckets")
def hash_buckets(x: Tensor, directions: Tensor) -> Tensor:
    """x (B, H, T, D), directions (G, D, n_buckets / 2), one set for H / G heads -> int32 (B, H, T); see `reorder`."""
    batch, heads, length, dim = x.shape
    x = last_contiguous(x)
    directions = directions.float().mT.contiguous()  # (G, n_buckets / 2, D)
    rows = _rows(dim)
    buckets = x.new_empty((batch, heads, length), dtype=torch.int32)
    hash_kernel[(triton.cdiv(length, rows), batch * heads)](
        x, directions, buckets, *x.stride()[:3],
        heads, heads // directions.shape[0], length, directions.shape[1],
        D=dim, BLOCK_D=block_dim(dim), ROWS=rows,
    )  # fmt: skip
    return buckets


@hash_buckets.register_fake
def _(x, directions):
    return x.new_empty(x.shape[:3], dtype=torch.int32)


def _order_and_counts(buckets: Tensor, n_buckets: int) -> tuple[Tensor, Tensor]:
    """The order (B, H, T) and the elements before those of (bucket, chunk), (B * H, n_buckets * chunks + 1)."""
    batch, heads, length = buckets.shape
    chunks = triton.cdiv(length, CHUNK)
    counts = buckets.new_zeros((batch * heads, n_buckets * chunks + 1))
    count_kernel[(chunks, batch * heads, triton.cdiv(n_buckets, BUCKETS_AT_ONCE))](
        buckets, counts, length, chunks, n_buckets, CHUNK=CHUNK, BUCKETS_AT_ONCE=BUCKETS_AT_ONCE
    )
    before = counts.cumsum(-1, dtype=torch.int32)
    order = torch.empty_like(buckets)
    place_kernel[(chunks, batch * heads)](buckets, before, order, length, chunks, n_buckets, CHUNK=CHUNK, num_warps=8)
    return order, before


@kernel_operator("adasplash::sort_by_bucket")
def _sort_by_bucket(
    query_buckets: Tensor, key_buckets: Tensor, start: Tensor, stop: Tensor, n_buckets: int, seeing_buckets: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous int32 buckets (B, H, Tq) and (B, G, Tk); start, stop (B, H, Tq) int32.

    Returns the order of the queries (B, H, Tq), of the keys (B, G, Tk), and the new start and stop (B, H, Tq), int32.
    Ranges are empty for queries of buckets from `seeing_buckets` on.
    """
    batch, heads, query_length = query_buckets.shape
    groups, key_length = key_buckets.shape[1:]
    query_order, _ = _order_and_counts(query_buckets, n_buckets)
    key_order, before = _order_and_counts(key_buckets, n_buckets)
    new_start, new_stop = torch.empty_like(query_order), torch.empty_like(query_order)
    range_kernel[(triton.cdiv(query_length, QUERIES_AT_ONCE), batch * heads)](
        query_buckets, query_order, key_order, before, start, stop, new_start, new_stop,
        *start.stride(), *stop.stride(),
        heads, heads // groups, query_length, key_length, triton.cdiv(key_length, CHUNK), n_buckets, seeing_buckets,
        QUERIES=QUERIES_AT_ONCE, CHUNK=CHUNK,
    )  # fmt: skip
    return query_order, key_order, new_start, new_stop


@_sort_by_bucket.register_fake
def _(query_buckets, key_buckets, start, stop, n_buckets, seeing_buckets):
    new = torch.empty_like
    return new(query_buckets), new(key_buckets), new(query_buckets), new(query_buckets)


def sort_by_bucket(
    query_buckets: Tensor,
    key_buckets: Tensor,
    key_range: KeyRange,
    *,
    n_buckets: int,
    seeing_buckets: int | None = None,
) -> Reordering:
    """`reorder.sort_by_bucket` for buckets 0 .. n_buckets - 1; queries of `seeing_buckets` and above see nothing."""
    query_order, key_order, start, stop = _sort_by_bucket(
        query_buckets.int().contiguous(),
        key_buckets.int().contiguous(),
        key_range.start,
        key_range.stop,
        n_buckets,
        n_buckets if seeing_buckets is None else seeing_buckets,
    )
    return Reordering(query_order, key_order, KeyRange(start, stop))


def sort_by_hash(q: Tensor, k: Tensor, directions: Tensor, key_range: KeyRange) -> Reordering:
    """As in `reorder`."""
    q, k, directions = q.detach(), k.detach(), directions.detach()
    buckets = hash_buckets(q, directions), hash_buckets(k, directions)
    return sort_by_bucket(*buckets, key_range, n_buckets=2 * directions.shape[-1])


def compact_kept(query_kept: Tensor, key_kept: Tensor, key_range: KeyRange) -> Reordering:
    """As in `reorder`: what is kept is bucket 0, what is dropped bucket 1."""
    return sort_by_bucket(~query_kept, ~key_kept, key_range, n_buckets=2, seeing_buckets=1)


# ----------------------------------------------------------------------------------------------------------------- rows


def _rows(dim: int) -> int:
    """Rows of one program."""
    return max(1, ELEMENTS_AT_ONCE // block_dim(dim))


def _copy_rows(x: Tensor, order: Tensor, out: Tensor, restore: bool) -> Tensor:
    batch, heads, length, dim = x.shape
    x = last_contiguous(x)
    rows = _rows(dim)
    rows_kernel[(triton.cdiv(length, rows), batch * heads)](
        x, order.contiguous(), out, *x.stride()[:3], *out.stride()[:3],
        heads, length, D=dim, BLOCK_D=block_dim(dim), ROWS=rows, RESTORE=restore,
    )  # fmt: skip
    return out


def _taken(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _restored(x: Tensor) -> Tensor:
    """Heads beside each other, as the projections before and after attention have them."""
    batch, heads, length, dim = x.shape
    return x.new_empty((batch, length, heads, dim)).transpose(1, 2)


@kernel_operator("adasplash::take_rows")
def take_rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x (B, H, T, D), contiguous, in the order (B, H, T) given: a permutation of 0 .. T - 1 for each head."""
    return _copy_rows(x, order, _taken(x), restore=False)


@kernel_operator("adasplash::restore_rows")
def restore_rows(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of `take_rows`; in memory (B, T, H, D)."""
    return _copy_rows(x, order, _restored(x), restore=True)


take_rows.register_fake(lambda x, order: _taken(x))
restore_rows.register_fake(lambda x, order: _restored(x))


def _keep_order(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


# Of a permutation the transpose is the inverse: each is the other's gradient.
take_rows.register_autograd(lambda ctx, grad: (restore_rows(grad, *ctx.saved_tensors), None), setup_context=_keep_order)
restore_rows.register_autograd(lambda ctx, grad: (take_rows(grad, *ctx.saved_tensors), None), setup_context=_keep_order)
