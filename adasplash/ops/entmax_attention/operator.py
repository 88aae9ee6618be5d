"""Entmax attention on a GPU as torch operators: `adasplash::entmax_attention` and its backward."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..announce import announce
from ..jit import INTERPRETED
from ..kernel_operator import kernel_operator, launch
from ..key_range import KeyRange
from ..launch_arguments import (
    GENERAL,
    formula_of,
    head_constants,
    last_contiguous,
    row_stride,
    tile_constants,
    with_equal_strides,
    with_row_stride,
    with_wide_strides,
)
from ..tile_table import ListShape, Tiles, block_dim, entmax_tiles, list_shapes
from .collect import collect_kernel, key_norm_kernel
from .columns import WIDEST_SORT, columns_backward_kernel, lay_out_columns_kernel, sort_columns_kernel, transpose_kernel
from .lists import rows_backward_kernel, rows_forward_kernel
from .tiles import list_blocks_kernel, tiles_backward_columns_kernel, tiles_backward_rows_kernel, tiles_forward_kernel

# A block that sees n keys may have FEW_KEYS + n / SCORES_PER_KEY on lists for each query, and KEYS_PER_QUERY at most (half as many where
# one takes four bytes). With more it is computed in tile mode, where so many scores cost about as much as a key on lists.
KEYS_PER_QUERY = 96
FEW_KEYS = 16
SCORES_PER_KEY = 128
# Tiles that a row may mark while it is scanned; rows that mark more go to tile mode. A power of two, for `note_tops`.
ENTRIES = 128
assert ENTRIES & (ENTRIES - 1) == 0
# Gluon is young, and Triton's compiler places barriers in it: only with versions that the kernel for Hopper was run with.
TRITONS_FOR_HOPPER = ("3.6.", "3.7.")
# Longer columns of the transposed lists are computed as dense tiles: keys that very many queries attend to.
LONGEST_COLUMN = WIDEST_SORT.value


def _slots(device: torch.device, warps: int) -> int:
    """Programs that fit on the GPU at once, two of 8 warps on each multiprocessor; each has scratch of its own."""
    if INTERPRETED:
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * (16 // warps)


@functools.cache
def _for_hopper(device: torch.device):
    """The module `collect_hopper` where it is for this GPU, else None; says so, once, if Triton alone stands against it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    if not triton.__version__.startswith(TRITONS_FOR_HOPPER):
        announce(
            "Entmax attention takes the kernel of all GPUs for its dense pass: the faster one for Hopper has been run with "
            f"triton {' and '.join(version + 'x' for version in TRITONS_FOR_HOPPER)} only, this is {triton.__version__}."
        )
        return None
    from . import collect_hopper

    return collect_hopper


def _collect_kernel(k: Tensor, tiles: Tiles):
    """The kernel that collects, and k as it takes it: on a Hopper the one for Hopper, where k can be copied by TMA."""
    hopper = _for_hopper(k.device)
    by_tma = hopper.tiles_by_tma(k, tiles) if hopper else None
    return (collect_kernel, k) if by_tma is None else (hopper.collect_hopper_kernel, by_tma)


def _shapes(q: Tensor, k: Tensor):
    batch, heads, query_length, dim = q.shape
    tiles = entmax_tiles(dim, q.dtype, q.device)
    return (
        batch,
        heads,
        k.shape[1],
        query_length,
        k.shape[2],
        dim,
        tiles,
        triton.cdiv(query_length, tiles["collect"].block_m),
    )


class Forward(NamedTuple):
    """What `entmax_attention_forward` returns: as a plain tuple, for an operator has nothing else."""

    out: Tensor  # as q
    tau: Tensor  # (B, H, S) float32, S the `row_stride` of Tq; infinite for a query without keys
    keys: Tensor  # uint16, a slab for each block of queries; then, if they need more than 16 bits, as much again of high halves
    first: Tensor  # (B, H, S) int32, where the support of a query begins in the slab of its block
    count: Tensor  # (B, H, S) int32, how many keys it has; 0 in tile mode
    in_tiles: Tensor  # (B * H, blocks) int32, whether a block is computed in tile mode
    block_range: Tensor  # (B * H, blocks, 4) int32, which keys a block sees (see `store_block_range`)


def _need_high_halves(numbers: int) -> bool:
    """Whether 16 bits are too few for so many different numbers.

    More are not spent on all, for lists are most of what forward keeps besides its arguments and `out`.
    """
    return numbers > 2**16


def _keys_per_query(q: Tensor, key_length: int) -> int:
    """Slots of a block's slab for each query: as many as any block may use."""
    tile = entmax_tiles(q.shape[-1], q.dtype, q.device)["collect"].block_n
    useful = FEW_KEYS + triton.cdiv(key_length, tile) * tile // SCORES_PER_KEY
    return min(KEYS_PER_QUERY // (1 + _need_high_halves(key_length)), useful)


def _empty_outputs(q: Tensor, k: Tensor, keys_per_query: int) -> Forward:
    batch, heads, _, query_length, _, _, tiles, blocks = _shapes(q, k)
    rows = (batch, heads, row_stride(query_length))
    places = batch * heads * blocks * tiles["collect"].block_m * keys_per_query
    return Forward(
        out=torch.empty_like(q),
        tau=q.new_empty(rows, dtype=torch.float32),
        keys=q.new_empty(places * (1 + _need_high_halves(k.shape[2])), dtype=torch.uint16),
        first=q.new_empty(rows, dtype=torch.int32),
        count=q.new_empty(rows, dtype=torch.int32),
        in_tiles=q.new_empty((batch * heads, blocks), dtype=torch.int32),
        block_range=q.new_empty((batch * heads, blocks, 4), dtype=torch.int32),
    )


def _programs(length: int, shape: ListShape) -> int:
    """Programs of a list kernel for so many rows or columns."""
    return triton.cdiv(length, shape.rows * shape.turns)


def _on_lists(shape: ListShape) -> dict:
    # Without software pipelining: its prefetching costs registers, and the lists are short.
    return {
        "TURNS": shape.turns,
        "ROWS": shape.rows,
        "PAIRS": shape.pairs,
        "num_warps": shape.warps,
        "num_stages": 1,
    }


def _list_blocks(in_tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks, those in tile mode first in their row of (B * H, blocks), and how many they are, (B * H,)."""
    block_list = torch.empty_like(in_tiles)
    block_count = in_tiles.new_empty(in_tiles.shape[0])
    launch(list_blocks_kernel, (in_tiles.shape[0],), in_tiles, block_list, block_count, in_tiles.shape[1], AT_ONCE=256)
    return block_list, block_count


def _backward_if_wanted(inputs, outputs):
    *tensors, scale, formula, keys_per_query = inputs
    alpha = tensors[5]
    if any(x.requires_grad for x in (*tensors[:3], alpha)):
        options = (scale, formula, keys_per_query, alpha.requires_grad)
        entmax_attention_backward(torch.empty_like(outputs[0]), *tensors, *outputs, *options)


@kernel_operator("adasplash::entmax_attention", follow_up=_backward_if_wanted)
def entmax_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    stop: Tensor,
    alpha: Tensor,
    slopes: Tensor | None,
    query_position: Tensor | None,
    key_position: Tensor | None,
    scale: float,
    formula: int,
    keys_per_query: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q (B, H, Tq, D); k, v (B, G, Tk, D), last stride 1; start, stop (B, H, Tq) int32; alpha (H,); slopes (B, H);
    query_position (B, H, S) and key_position (B, G, Tk) int32.

    Returns the fields of `Forward`.
    """
    batch, heads, groups, query_length, key_length, dim, tiles, blocks = _shapes(q, k)
    out, tau, keys, first, count, in_tiles, block_range = _empty_outputs(q, k, keys_per_query)
    shape = tiles["collect"]
    capacity = shape.block_m * keys_per_query
    places = batch * heads * blocks * capacity
    high_keys = keys.numel() - places
    common = head_constants(q, slopes) | {"FORMULA": formula}
    ratio = heads // groups
    slots = min(_slots(q.device, shape.warps), batch * heads * blocks)
    records = q.new_empty((slots, ENTRIES, shape.block_m, 8), dtype=torch.int32)
    bound = torch.empty_like(tau)
    work, key_norm = q.new_zeros(4 + batch * groups, dtype=torch.int32).split([4, batch * groups])
    launch(key_norm_kernel, (triton.cdiv(key_length, 64), groups, batch),
        k, key_norm, *k.stride()[:3], groups, key_length, D=dim, BLOCK_D=block_dim(dim), ROWS=64,
    )  # fmt: skip
    positions = (slopes, query_position, key_position)
    start, stop = with_equal_strides(start, stop)
    ranges = (start.stride(0), start.stride(1))
    kernel, keys_in = _collect_kernel(k, shape)
    launch(kernel, (slots,),
        q, keys_in, key_norm, start, stop, alpha, *positions,
        work, records, keys, first, count, bound, in_tiles, block_range,
        scale, *q.stride()[:3], *k.stride()[:3], *ranges,
        batch * heads, heads, ratio, query_length, tau.shape[-1], key_length, blocks,
        ENTRIES, capacity, FEW_KEYS, SCORES_PER_KEY, high_keys,
        **common, **tile_constants(q.dtype, shape),
    )  # fmt: skip
    del records
    lists = list_shapes(dim)["forward"]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    launch(rows_forward_kernel, (_programs(query_length, lists), heads, batch),
        q, k, v, alpha, *positions, keys, first, count, in_tiles, bound,
        q.new_empty(places, dtype=torch.float32),
        out, tau,
        scale, *strides, heads, ratio, query_length, tau.shape[-1], key_length, blocks, capacity, high_keys,
        BLOCK_M=shape.block_m, **_on_lists(lists), **common,
    )  # fmt: skip
    block_list, block_count = _list_blocks(in_tiles)
    launch(tiles_forward_kernel, (blocks * shape.block_m // tiles["forward"].block_m, heads, batch),
        q, k, v, start, stop, alpha, *positions, block_list, block_count, bound, out, tau,
        scale, *strides, *ranges, heads, ratio, query_length, tau.shape[-1], key_length, blocks,
        QUERY_BLOCK=shape.block_m, **common, **tile_constants(q.dtype, tiles["forward"]),
    )  # fmt: skip
    return out, tau, keys, first, count, in_tiles, block_range


@entmax_attention_forward.register_fake
def _(q, k, v, start, stop, alpha, slopes, query_position, key_position, scale, formula, keys_per_query):
    return tuple(_empty_outputs(q, k, keys_per_query))


@kernel_operator("adasplash::entmax_attention_backward")
def entmax_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    stop: Tensor,
    alpha: Tensor,
    slopes: Tensor | None,
    query_position: Tensor | None,
    key_position: Tensor | None,
    out: Tensor,
    tau: Tensor,
    keys: Tensor,
    first: Tensor,
    count: Tensor,
    in_tiles: Tensor,
    block_range: Tensor,
    scale: float,
    formula: int,
    keys_per_query: int,
    alpha_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv as q, k, v, and the gradient for alpha (H,), which is empty unless asked for."""
    batch, heads, groups, query_length, key_length, dim, tiles, blocks = _shapes(q, k)
    ratio = heads // groups
    capacity = tiles["collect"].block_m * keys_per_query
    places = batch * heads * blocks * capacity
    high_keys = keys.numel() - places
    high_queries = places * _need_high_halves(ratio * query_length)
    common = head_constants(q, slopes) | {"FORMULA": formula}
    positions = (slopes, query_position, key_position)
    start, stop = map(with_wide_strides, with_equal_strides(start, stop))
    ranges = (start.stride(0), start.stride(1))
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])
    dq, dk, dv = torch.empty_like(out), torch.empty_like(k), torch.empty_like(v)  # dq with the strides of out
    delta = torch.empty_like(tau)
    d_alpha = torch.empty_like(tau) if alpha_gradient else tau.new_empty(1)
    column_count = q.new_zeros((batch * groups, key_length), dtype=torch.int32)
    lists = list_shapes(dim)
    launch(rows_backward_kernel, (_programs(query_length, lists["backward"]), heads, batch),
        q, k, v, alpha, *positions, keys, first, count, in_tiles, tau, out, d_out, delta, column_count, dq, d_alpha,
        scale, *inputs, *dq.stride()[:3], heads, ratio, query_length, tau.shape[-1], key_length, blocks, capacity, high_keys,
        BLOCK_M=tiles["collect"].block_m, ALPHA_GRADIENT=alpha_gradient, **_on_lists(lists["backward"]), **common,
    )  # fmt: skip
    block_list, block_count = _list_blocks(in_tiles)
    launch(tiles_backward_rows_kernel, (blocks * tiles["collect"].block_m // tiles["rows"].block_m, heads, batch),
        q, k, v, start, stop, alpha, *positions, block_list, block_count, tau, out, d_out, delta, dq, d_alpha,
        scale, *inputs, *dq.stride()[:3], *ranges, heads, ratio, query_length, tau.shape[-1], key_length, blocks,
        QUERY_BLOCK=tiles["collect"].block_m, ALPHA_GRADIENT=alpha_gradient, **common, **tile_constants(q.dtype, tiles["rows"]),
    )  # fmt: skip

    region = ratio * blocks * capacity  # entries of one (batch, key head)
    sinks_at_most = max(1, min(key_length, region // LONGEST_COLUMN))
    cursor = q.new_empty((batch * groups, key_length, 2), dtype=torch.int64)
    queries = keys.new_empty(places + high_queries)
    sinks = q.new_empty((batch * groups, sinks_at_most), dtype=torch.int32)
    sink_count = q.new_empty(batch * groups, dtype=torch.int32)
    launch(lay_out_columns_kernel, (batch * groups,),
        column_count, cursor, sinks, sink_count, key_length, region, sinks_at_most, LONGEST_COLUMN,
        AT_ONCE=4096, num_warps=8,
    )  # fmt: skip
    launch(transpose_kernel, (_programs(query_length, lists["transpose"]), heads, batch),
        keys, first, count, in_tiles, cursor, queries,
        heads, ratio, query_length, tau.shape[-1], key_length, blocks, capacity, LONGEST_COLUMN, high_keys, high_queries,
        BLOCK_M=tiles["collect"].block_m, **_on_lists(lists["transpose"]),
    )  # fmt: skip
    columns, sort = batch * groups * key_length, lists["sort"]
    launch(sort_columns_kernel, (_programs(columns, sort),),
        cursor, queries, columns, LONGEST_COLUMN, high_queries, TURNS=sort.turns, COLUMNS=sort.rows, num_warps=sort.warps,
    )  # fmt: skip
    outputs = (*dk.stride()[:3], *dv.stride()[:3])
    launch(columns_backward_kernel, (_programs(key_length, lists["columns"]), groups, batch),
        q, k, v, alpha, *positions, cursor, queries, tau, delta, d_out, dk, dv,
        scale, *inputs, *outputs, groups, ratio, query_length, tau.shape[-1], key_length, high_queries,
        **_on_lists(lists["columns"]), **common,
    )  # fmt: skip
    shape = tiles["sinks"]
    slots = triton.cdiv(_slots(q.device, shape.warps), max(1, batch * groups))
    shared = batch * groups * slots if slots > 1 else 0
    partial = tau.new_empty((shared, 2, shape.block_n, block_dim(dim)))
    arrived = q.new_zeros(shared, dtype=torch.int32)
    for of_sinks, programs in (
        (True, max(slots, triton.cdiv(sinks_at_most, shape.block_n))),
        (False, triton.cdiv(key_length, tiles["columns"].block_n)),
    ):
        launch(tiles_backward_columns_kernel, (programs, groups, batch),
            q, k, v, start, stop, alpha, *positions, block_list, block_count, block_range, sinks, sink_count,
            partial, arrived, tau, delta, d_out, dk, dv,
            scale, *inputs, *outputs, *ranges, groups, ratio, query_length, tau.shape[-1], key_length, blocks, sinks_at_most, slots,
            OF_SINKS=of_sinks, QUERY_BLOCK=tiles["collect"].block_m,
            **common, **tile_constants(q.dtype, tiles["sinks" if of_sinks else "columns"]),
        )  # fmt: skip
    return dq, dk, dv, d_alpha[..., :query_length].sum((0, 2)) if alpha_gradient else tau.new_empty(0)


@entmax_attention_backward.register_fake
def _(d_out, q, k, v, start, stop, alpha, slopes, query_position, key_position, out, *rest):
    return (
        torch.empty_like(out),
        torch.empty_like(k),
        torch.empty_like(v),
        alpha.new_empty(alpha.shape if rest[-1] else 0, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    q, k, v, start, stop, alpha, slopes, query_position, key_position, ctx.scale, ctx.formula, ctx.keys_per_query = (
        inputs
    )
    ctx.save_for_backward(q, k, v, start, stop, alpha, slopes, query_position, key_position, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, *unused):
    if d_out is None:
        return (None,) * 12
    alpha_gradient = ctx.needs_input_grad[5]
    dq, dk, dv, d_alpha = entmax_attention_backward(
        last_contiguous(d_out), *ctx.saved_tensors, ctx.scale, ctx.formula, ctx.keys_per_query, alpha_gradient
    )
    return dq, dk, dv, None, None, d_alpha if alpha_gradient else None, *(None,) * 6


entmax_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def operator_arguments(
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
) -> tuple:
    """The arguments of `entmax_attention_forward` for those of `entmax_attention_kernels`."""
    batch, heads, _, _ = q.shape
    if isinstance(alpha, Tensor):
        formula = GENERAL
        alpha = alpha.to(q.device, torch.float32).reshape(-1).expand(heads).contiguous()
    else:
        formula = formula_of(alpha)
        alpha = torch.full((heads,), float(alpha), device=q.device)
    slopes = query_position = key_position = None
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(q.device, torch.float32).reshape(-1, heads).expand(batch, heads).contiguous()
        query_position, key_position = with_row_stride(query_positions.int()), key_positions.int().contiguous()
    tensors = [last_contiguous(x) for x in (q, k, v, key_range.start, key_range.stop)]
    return *tensors, alpha, slopes, query_position, key_position, scale, formula, _keys_per_query(q, k.shape[2])


def entmax_attention_kernels(q: Tensor, k: Tensor, v: Tensor, key_range: KeyRange, **how) -> Tensor:
    """What `range_attention` computes, by kernels.

    Arguments as there, with alpha > 1 and scale > 0, all tensors on one GPU; with ALiBi the positions are needed.
    """
    return entmax_attention_forward(*operator_arguments(q, k, v, key_range, **how))[0]
