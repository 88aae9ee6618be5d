"""Reordering on a GPU: the functions of `reorder` that attention calls, by Triton kernels.

New places are counted, not sorted: a bucket's keys come after all keys of smaller buckets, in the order of the text. So
one pass counts each bucket in each chunk of CHUNK places, one running sum over (bucket, chunk) says where each chunk
puts its first element of each bucket, and a second pass adds the rank within the chunk. Nothing waits for the GPU, and
rows are only ever copied, forward and backward: every run gives the same bits.

Starting an operator or a kernel takes longer than its work on a short sequence. So queries and keys are hashed, counted
and placed together, and q, k and v are copied together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import kernel_operator, last_contiguous, sizes_without, with_equal_strides
from .key_range import KeyRange
from .reorder import Reordering
from .tile_table import block_dim

CHUNK = 32  # places of one program, which is one warp; ranks within are found by comparing all pairs
BUCKETS_AT_ONCE = 16
QUERIES_AT_ONCE = 256
UNALIGNED = sizes_without("query_length", "key_length", "query_rows", "range_b", "range_h")
ELEMENTS_AT_ONCE = 4096  # of the rows that one program copies or hashes


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


def _rows_at_once(dim: int) -> int:
    """Rows of one program."""
    return max(1, ELEMENTS_AT_ONCE // block_dim(dim))


# ----------------------------------------------------------------------------------------------------- order and ranges


def launch_hash(q: Tensor, k: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """`reorder.hash_buckets` of q (B, H, Tq, D) and k (B, G, Tk, D), directions (G, D, n_buckets / 2); int32."""
    batch, _, _, dim = q.shape
    groups, _, half = directions.shape
    parts = []
    for x in (q, k):
        x = last_contiguous(x)
        parts.append((x, x.new_empty(x.shape[:3], dtype=torch.int32), *x.stride()[:3], *x.shape[1:3]))
    rows = _rows_at_once(dim)
    hash_kernel[(batch * (q.shape[1] + k.shape[1]), triton.cdiv(max(q.shape[2], k.shape[2]), rows))](
        tuple(parts), directions.float().mT.contiguous(), batch, groups, half,
        D=dim, BLOCK_D=block_dim(dim), ROWS=rows,
    )  # fmt: skip
    return parts[0][1], parts[1][1]


def _empty_reordering(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For queries (B, H, Tq, ...) and keys (B, G, Tk, ...): order of both, start and stop, count of both; int32."""
    of_queries, of_keys = queries.shape[:3], keys.shape[:3]
    shapes = (of_queries, of_keys, of_queries, of_queries, of_queries[:2], of_keys[:2])
    return tuple(queries.new_empty(shape, dtype=torch.int32) for shape in shapes)


def launch_sort(
    query_buckets: Tensor,
    key_buckets: Tensor,
    start: Tensor,
    stop: Tensor,
    n_buckets: int,
    seeing_buckets: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reorder.sort_by_bucket`; queries of `seeing_buckets` and above see nothing, and are not counted, nor are such keys.

    Args:
        query_buckets, key_buckets: (B, H, Tq) and (B, G, Tk), integers in [0, n_buckets); or bool, of what is kept: True
            is bucket 0, False bucket 1.
        start, stop: int32 (B, H, Tq).

    Returns:
        The fields of a `Reordering`.
    """
    batch, heads, query_length = query_buckets.shape
    groups, key_length = key_buckets.shape[1:]
    query_buckets, key_buckets = query_buckets.contiguous(), key_buckets.contiguous()
    start, stop = with_equal_strides(start, stop)
    seeing_buckets = n_buckets if seeing_buckets is None else seeing_buckets
    fields = _empty_reordering(query_buckets, key_buckets)
    query_order, key_order, new_start, new_stop, query_count, key_count = fields
    query_rows, rows = batch * heads, batch * (heads + groups)
    chunks = triton.cdiv(max(query_length, key_length), CHUNK)
    sizes = (query_rows, query_length, key_length, chunks, n_buckets)
    constants = {"KEPT": query_buckets.dtype == torch.bool, "CHUNK": CHUNK}
    counts = query_order.new_empty((rows, n_buckets * chunks + 1))
    count_kernel[(rows, chunks, triton.cdiv(n_buckets, BUCKETS_AT_ONCE))](
        query_buckets, key_buckets, counts, *sizes, BUCKETS_AT_ONCE=BUCKETS_AT_ONCE, **constants, num_warps=1
    )
    before = counts.cumsum(-1, dtype=torch.int32)
    place_kernel[(rows, chunks)](
        query_buckets, key_buckets, before, query_order, key_order, query_count, key_count,
        *sizes, seeing_buckets, **constants, num_warps=1,
    )  # fmt: skip
    range_kernel[(query_rows, triton.cdiv(query_length, QUERIES_AT_ONCE))](
        query_buckets, query_order, key_order, before, start, stop, new_start, new_stop,
        *start.stride(), heads, heads // groups, *sizes, seeing_buckets, QUERIES=QUERIES_AT_ONCE, **constants,
    )  # fmt: skip
    return fields


def _reordering(query_order, key_order, start, stop, query_count, key_count) -> Reordering:
    return Reordering(query_order, key_order, KeyRange(start, stop), query_count, key_count)


@kernel_operator("adasplash::sort_by_hash")
def _sort_by_hash(
    q: Tensor, k: Tensor, directions: Tensor, start: Tensor, stop: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch_sort(*launch_hash(q, k, directions), start, stop, n_buckets=2 * directions.shape[-1])


@kernel_operator("adasplash::compact_kept")
def _compact_kept(
    query_kept: Tensor, key_kept: Tensor, start: Tensor, stop: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch_sort(query_kept, key_kept, start, stop, n_buckets=2, seeing_buckets=1)


_sort_by_hash.register_fake(lambda q, k, *others: _empty_reordering(q, k))
_compact_kept.register_fake(lambda query_kept, key_kept, *others: _empty_reordering(query_kept, key_kept))


def sort_by_hash(q: Tensor, k: Tensor, directions: Tensor, key_range: KeyRange) -> Reordering:
    """As in `reorder`."""
    tensors = q.detach(), k.detach(), directions.detach()
    return _reordering(*_sort_by_hash(*tensors, key_range.start, key_range.stop))


def compact_kept(query_kept: Tensor, key_kept: Tensor, key_range: KeyRange) -> Reordering:
    """As in `reorder`."""
    return _reordering(*_compact_kept(query_kept, key_kept, key_range.start, key_range.stop))


# ----------------------------------------------------------------------------------------------------------------- rows


def _heads_apart(x: Tensor) -> bool:
    """Whether x (B, H, T, D) is so in memory, one head after the other, and not (B, T, H, D), heads beside each other."""
    return bool(x.stride(1) >= x.stride(2))


def _empty_rows(x: Tensor, heads_apart: bool) -> Tensor:
    batch, heads, length, dim = x.shape
    return x.new_empty(x.shape) if heads_apart else x.new_empty((batch, length, heads, dim)).transpose(1, 2)


def _copy_rows(tensors, orders, counts, heads_apart, *, restore: bool) -> tuple[Tensor, ...]:
    """Each (B, H, T, D) in the order (B, H, T) given, or back; zeros for all but the first `count` (B, H) of that order."""
    outputs = tuple(map(_empty_rows, tensors, heads_apart))
    parts = []
    for x, order, count, out in zip(tensors, orders, counts, outputs, strict=True):
        x = last_contiguous(x)
        parts.append((x, order.contiguous(), count, out, *x.stride()[:3], *out.stride()[:3], *x.shape[1:]))
    batch = tensors[0].shape[0]
    heads, lengths, dims = zip(*(x.shape[1:] for x in tensors), strict=True)
    rows = _rows_at_once(max(dims))
    rows_kernel[(batch * sum(heads), triton.cdiv(max(lengths), rows))](
        tuple(parts), batch, BLOCK_D=block_dim(max(dims)), ROWS=rows, RESTORE=restore
    )
    return outputs


@kernel_operator("adasplash::reorder_inputs")
def _reorder_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_order: Tensor,
    key_order: Tensor,
    query_count: Tensor,
    key_count: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    orders, counts = (query_order, key_order, key_order), (query_count, key_count, key_count)
    return _copy_rows((q, k, v), orders, counts, [True] * 3, restore=False)


@kernel_operator("adasplash::reorder_inputs_backward")
def _reorder_inputs_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    query_order: Tensor,
    key_order: Tensor,
    query_count: Tensor,
    key_count: Tensor,
    heads_apart: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    orders, counts = (query_order, key_order, key_order), (query_count, key_count, key_count)
    return _copy_rows((dq, dk, dv), orders, counts, heads_apart, restore=True)


@kernel_operator("adasplash::restore_output")
def _restore_output(out: Tensor, query_order: Tensor, query_count: Tensor) -> Tensor:
    return _copy_rows([out], [query_order], [query_count], [False], restore=True)[0]


@kernel_operator("adasplash::restore_output_backward")
def _restore_output_backward(d_out: Tensor, query_order: Tensor, query_count: Tensor) -> Tensor:
    return _copy_rows([d_out], [query_order], [query_count], [True], restore=False)[0]


_reorder_inputs.register_fake(lambda q, k, v, *others: tuple(_empty_rows(x, True) for x in (q, k, v)))
_reorder_inputs_backward.register_fake(lambda dq, dk, dv, *others: tuple(map(_empty_rows, (dq, dk, dv), others[-1])))
_restore_output.register_fake(lambda out, *others: _empty_rows(out, False))
_restore_output_backward.register_fake(lambda d_out, *others: _empty_rows(d_out, True))


# Of a permutation the transpose is the inverse. The gradients are laid out as their tensors, so that nobody copies them.
def _keep_layouts(ctx, inputs, output):
    ctx.heads_apart = [_heads_apart(x) for x in inputs[:3]]
    ctx.save_for_backward(*inputs[3:])


def _restore_gradients(ctx, dq, dk, dv):
    return *_reorder_inputs_backward(dq, dk, dv, *ctx.saved_tensors, ctx.heads_apart), *(None,) * 4


def _keep_order(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _reorder_gradient(ctx, d_out):
    return _restore_output_backward(d_out, *ctx.saved_tensors), None, None


_reorder_inputs.register_autograd(_restore_gradients, setup_context=_keep_layouts)
_restore_output.register_autograd(_reorder_gradient, setup_context=_keep_order)


def reorder_inputs(q: Tensor, k: Tensor, v: Tensor, reordering: Reordering) -> tuple[Tensor, Tensor, Tensor]:
    """As in `reorder`, contiguous; zeros for what nobody sees. Gradients come in the layouts of q, k and v."""
    by = reordering
    return _reorder_inputs(q, k, v, by.query_order, by.key_order, by.query_count, by.key_count)


def restore_output(out: Tensor, reordering: Reordering) -> Tensor:
    """As in `reorder`, in memory (B, T, H, D): heads beside each other, as the projection after attention wants them."""
    return _restore_output(out, reordering.query_order, reordering.query_count)
