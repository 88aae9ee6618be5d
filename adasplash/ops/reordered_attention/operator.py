"""Reordering on a GPU as torch operators: the functions of `reference` that attention calls, by kernels.

Nothing waits for the GPU, and rows are only ever copied, forward and backward: every run gives the same bits. Starting an
operator or a kernel takes longer than its work on a short sequence. So queries and keys are hashed, counted and placed
together, and q, k and v are copied together.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..kernel_operator import kernel_operator, launch
from ..key_range import KeyRange
from ..launch_arguments import last_contiguous, with_equal_strides
from ..tile_table import block_dim
from .kernels import count_kernel, hash_kernel, place_kernel, range_kernel, rows_kernel
from .reference import Reordering

CHUNK = 32  # places of one program, which is one warp; ranks within are found by comparing all pairs
BUCKETS_AT_ONCE = 16
QUERIES_AT_ONCE = 256
ELEMENTS_AT_ONCE = 4096  # of the rows that one program copies or hashes


def _rows_at_once(dim: int) -> int:
    """Rows of one program."""
    return max(1, ELEMENTS_AT_ONCE // block_dim(dim))


# ----------------------------------------------------------------------------------------------------- order and ranges


def launch_hash(q: Tensor, k: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.hash_buckets` of q (B, H, Tq, D) and k (B, G, Tk, D), directions (G, D, n_buckets / 2); int32."""
    batch, _, _, dim = q.shape
    groups, _, half = directions.shape
    parts = []
    for x in (q, k):
        x = last_contiguous(x)
        parts.append((x, x.new_empty(x.shape[:3], dtype=torch.int32), *x.stride()[:3], *x.shape[1:3]))
    rows = _rows_at_once(dim)
    launch(hash_kernel, (batch * (q.shape[1] + k.shape[1]), triton.cdiv(max(q.shape[2], k.shape[2]), rows)),
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
    launch(count_kernel, (rows, chunks, triton.cdiv(n_buckets, BUCKETS_AT_ONCE)),
        query_buckets, key_buckets, counts, *sizes, BUCKETS_AT_ONCE=BUCKETS_AT_ONCE, **constants, num_warps=1,
    )  # fmt: skip
    before = counts.cumsum(-1, dtype=torch.int32)
    launch(place_kernel, (rows, chunks),
        query_buckets, key_buckets, before, query_order, key_order, query_count, key_count,
        *sizes, seeing_buckets, **constants, num_warps=1,
    )  # fmt: skip
    launch(range_kernel, (query_rows, triton.cdiv(query_length, QUERIES_AT_ONCE)),
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
    launch(rows_kernel, (batch * sum(heads), triton.cdiv(max(lengths), rows)),
        tuple(parts), batch, BLOCK_D=block_dim(max(dims)), ROWS=rows, RESTORE=restore,
    )  # fmt: skip
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
