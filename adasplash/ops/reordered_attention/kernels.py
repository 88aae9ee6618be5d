"""Kernels that hash, count, place and copy. What they are for: operator.py.

New places are counted, not sorted: a bucket's keys come after all keys of smaller buckets, in the order of the text. So
one pass counts each bucket in each chunk of CHUNK places, one running sum over (bucket, chunk) says where each chunk
puts its first element of each bucket, and a second pass adds the rank within the chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..jit import sizes_without

UNALIGNED = sizes_without("query_length", "key_length", "query_rows", "range_b", "range_h")


@triton.jit(do_not_specialize=UNALIGNED)
def hash_kernel(
    PARTS, DIRECTIONS, batch, groups, half,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each row's bucket: the largest of its products with the directions and their opposites, the first of equals.

    PARTS: for queries and for keys (X, BUCKETS, strides of X, heads, length).
    """
    bh = tl.program_id(0)
    for part in tl.static_range(len(PARTS)):
        X, BUCKETS, x_b, x_h, x_t, heads, length = PARTS[part]
        if (bh >= 0) & (bh < batch * heads):
            b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
            row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
            d = tl.arange(0, BLOCK_D)
            inside = row < length
            at = X + b * x_b + h * x_h + row[:, None].to(tl.int64) * x_t + d[None, :]
            x = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            direction_at = DIRECTIONS + h // (heads // groups) * half * D + d
            highest = tl.full((ROWS,), float("-inf"), tl.float32)
            lowest = tl.full((ROWS,), float("inf"), tl.float32)
            highest_at = tl.zeros((ROWS,), tl.int32)
            lowest_at = tl.zeros((ROWS,), tl.int32)
            for i in range(half):
                direction = tl.load(direction_at + i * D, mask=d < D, other=0.0)
                # Not a matrix product: in full float32 these sums cost less than reading x, for as many buckets as are
                # in use.
                projected = tl.sum(x * direction[None, :], 1)
                higher, lower = projected > highest, projected < lowest
                highest, highest_at = tl.where(higher, projected, highest), tl.where(higher, i, highest_at)
                lowest, lowest_at = tl.where(lower, projected, lowest), tl.where(lower, i, lowest_at)
            bucket = tl.where(highest >= -lowest, highest_at, half + lowest_at)
            tl.store(BUCKETS + bh.to(tl.int64) * length + row, bucket, mask=inside)
        bh -= batch * heads


@triton.jit
def pick_row(QUERIES, KEYS, row, query_rows, query_length, key_length):
    """Where row `row` of (query_rows, query_length) begins, or of (any number, key_length) that follow; its length."""
    if row < query_rows:
        at = QUERIES + row.to(tl.int64) * query_length
    else:
        at = KEYS + (row - query_rows).to(tl.int64) * key_length
    return at, tl.where(row < query_rows, query_length, key_length)


@triton.jit
def load_buckets(pointers, inside, KEPT: tl.constexpr):
    """Buckets, -1 where not inside; if KEPT, from a mask: what is kept is bucket 0, what is dropped bucket 1."""
    bucket = tl.load(pointers, mask=inside, other=0).to(tl.int32)
    if KEPT:
        bucket = 1 - bucket
    return tl.where(inside, bucket, -1)


@triton.jit(do_not_specialize=UNALIGNED)
def count_kernel(
    QUERY_BUCKETS, KEY_BUCKETS, COUNTS, query_rows, query_length, key_length, chunks, n_buckets,
    KEPT: tl.constexpr, CHUNK: tl.constexpr, BUCKETS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """How often each bucket occurs in each chunk, (n_buckets, chunks) for each row, after a leading 0."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    buckets_at, length = pick_row(QUERY_BUCKETS, KEY_BUCKETS, row, query_rows, query_length, key_length)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    found = load_buckets(buckets_at + place, place < length, KEPT)
    bucket = tl.program_id(2) * BUCKETS_AT_ONCE + tl.arange(0, BUCKETS_AT_ONCE)
    count = tl.sum((found[:, None] == bucket[None, :]).to(tl.int32), 0)
    counts_at = COUNTS + row.to(tl.int64) * (n_buckets * chunks + 1)
    tl.store(counts_at, 0, mask=(chunk == 0) & (tl.program_id(2) == 0))
    tl.store(counts_at + 1 + bucket * chunks + chunk, count, mask=bucket < n_buckets)


@triton.jit(do_not_specialize=UNALIGNED)
def place_kernel(
    QUERY_BUCKETS, KEY_BUCKETS, BEFORE, QUERY_ORDER, KEY_ORDER, QUERY_COUNT, KEY_COUNT,
    query_rows, query_length, key_length, chunks, n_buckets, seeing_buckets,
    KEPT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes each place of the text to its new place: where its chunk's bucket begins, plus its rank therein."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    buckets_at, length = pick_row(QUERY_BUCKETS, KEY_BUCKETS, row, query_rows, query_length, key_length)
    order_at, length = pick_row(QUERY_ORDER, KEY_ORDER, row, query_rows, query_length, key_length)
    within = tl.arange(0, CHUNK)
    place = chunk * CHUNK + within
    inside = place < length
    bucket = load_buckets(buckets_at + place, inside, KEPT)
    same_and_earlier = (bucket[:, None] == bucket[None, :]) & (within[None, :] < within[:, None])
    rank = tl.sum(same_and_earlier.to(tl.int32), 1)
    before = BEFORE + row.to(tl.int64) * (n_buckets * chunks + 1)
    begin = tl.load(before + bucket * chunks + chunk, mask=inside, other=0)
    tl.store(order_at + begin + rank, place, mask=inside)
    count_at, _ = pick_row(QUERY_COUNT, KEY_COUNT, row, query_rows, 1, 1)
    tl.store(count_at, tl.load(before + seeing_buckets * chunks), mask=chunk == 0)


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


@triton.jit(do_not_specialize=UNALIGNED)
def range_kernel(
    QUERY_BUCKETS, QUERY_ORDER, KEY_ORDER, BEFORE, START, STOP, NEW_START, NEW_STOP,
    range_b, range_h, range_t,
    heads, ratio, query_rows, query_length, key_length, chunks, n_buckets, seeing_buckets,
    QUERIES: tl.constexpr, KEPT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The range of new key places of each query, in the new order of queries."""
    bh = tl.program_id(0)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    bg = b * (heads // ratio) + h // ratio
    at = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    inside = at < query_length
    query_row = bh.to(tl.int64) * query_length
    query = tl.load(QUERY_ORDER + query_row + at, mask=inside, other=0)
    bucket = load_buckets(QUERY_BUCKETS + query_row + query, inside, KEPT)
    range_at = b * range_b + h * range_h + query * range_t
    start = tl.load(START + range_at, mask=inside, other=0)
    stop = tl.load(STOP + range_at, mask=inside, other=0)
    seeing = bucket < seeing_buckets
    bucket = tl.minimum(bucket, seeing_buckets - 1)
    key_order = KEY_ORDER + bg * key_length
    before = BEFORE + (query_rows + bg) * (n_buckets * chunks + 1)
    start = new_place(start, bucket, inside, key_order, before, key_length, chunks, CHUNK)
    stop = new_place(stop, bucket, inside, key_order, before, key_length, chunks, CHUNK)
    tl.store(NEW_START + query_row + at, start, mask=inside)
    tl.store(NEW_STOP + query_row + at, tl.where(seeing, stop, start), mask=inside)


@triton.jit(do_not_specialize=UNALIGNED)
def rows_kernel(PARTS, batch, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, RESTORE: tl.constexpr):
    """Copies row order[i] to row i, or back if RESTORE; zeros from row COUNT of the new order on.

    PARTS: for each tensor (X, ORDER, COUNT, OUT, strides of X, strides of OUT, heads, length, dim).
    """
    bh = tl.program_id(0)
    for part in tl.static_range(len(PARTS)):
        X, ORDER, COUNT, OUT, x_b, x_h, x_t, out_b, out_h, out_t, heads, length, dim = PARTS[part]
        if (bh >= 0) & (bh < batch * heads):
            b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
            row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
            d = tl.arange(0, BLOCK_D)
            inside = row < length
            ordered = tl.load(ORDER + bh.to(tl.int64) * length + row, mask=inside, other=0).to(tl.int64)
            mask = inside[:, None] & (d < dim)[None, :]
            read = mask & (row < tl.load(COUNT + bh))[:, None]
            row = row.to(tl.int64)
            source, target = (row, ordered) if RESTORE else (ordered, row)
            x = tl.load(X + b * x_b + h * x_h + source[:, None] * x_t + d[None, :], mask=read, other=0.0)
            tl.store(OUT + b * out_b + h * out_h + target[:, None] * out_t + d[None, :], x, mask=mask)
        bh -= batch * heads
