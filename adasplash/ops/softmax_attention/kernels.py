"""Softmax attention over key ranges in Triton: forward, dq, and dk with dv.

Flash attention (Dao 2023, https://arxiv.org/abs/2307.08691) with two integers per query in place of all masks: key tiles
that every row of a query block sees run without a mask, those at the edges of the ranges with one, others are never
visited. Only out and the logarithm of the row's sum are kept; the backward kernels compute the weights again. No atomics:
each output element is summed by one program in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..jit import (
    SIZES,
    load_per_row,
    load_rows,
    load_tile,
    program_head,
    score_tile,
    seeing_blocks,
    sizes_without,
    store_block_range,
    visible_tiles,
)

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2(e)), and exp2 is what the hardware has
LOWEST = tl.constexpr(-3.0e38)  # where a row's maximum starts: finite, since -inf - -inf is NaN
UNSEEING = tl.constexpr(float("inf"))  # kept for rows that see no key: all their weights are exp2(z - inf) = 0


@triton.jit(do_not_specialize=SIZES)
def softmax_forward_kernel(
    Q, K, V, START, STOP, SLOPES, QUERY_POSITION, KEY_POSITION, OUT, LSE, BLOCK_RANGE,
    scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t, range_b, range_h,
    heads, ratio, query_length, row_stride, key_length, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out, the logarithm (base 2) of each row's sum, and for each query block which keys some and which all rows see."""
    block = blocks - 1 - tl.program_id(0)  # the last queries first: where attention is causal they have most to do
    bh = program_head()
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    group = h // ratio
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = row < query_length
    at = bh.to(tl.int64) * row_stride + row
    range_at = b * range_b + h * range_h + row
    start = tl.load(START + range_at, mask=inside, other=0)
    stop = tl.load(STOP + range_at, mask=inside, other=0)
    seeing = stop > start
    store_block_range(BLOCK_RANGE, bh * blocks + block, start, stop, key_length)
    first, full_first, full_last, last = visible_tiles(start, stop, key_length, BLOCK_N)

    q = load_rows(Q, b, h, row, inside, q_b, q_h, q_t, d, D, BLOCK_D)
    k_at = K + b * k_b + group * k_h + n[None, :].to(tl.int64) * k_t + d[:, None]
    v_at = V + b * v_b + group * v_h + n[:, None].to(tl.int64) * v_t + d[None, :]
    z_scale = scale * LOG2_E
    slope = 0.0
    query_position = row
    if HAS_ALIBI:
        slope = tl.load(SLOPES + bh) / scale
        query_position = tl.load(QUERY_POSITION + at, mask=inside, other=0)
        KEY_POSITION += (b * (heads // ratio) + group) * key_length

    top = tl.full((BLOCK_M,), LOWEST, tl.float32)  # largest z so far
    total = tl.zeros((BLOCK_M,), tl.float32)  # sum of exp2(z - top)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    left = full_first - first
    for edges in tl.static_range(2):  # tiles without a mask, then those at the edges: left of them and right of them
        count = left + last - full_last if edges else full_last - full_first
        for step in tl.range(0, count, num_stages=STAGES):
            tile = full_first + step
            if edges:
                tile = tl.where(step < left, first + step, full_last + step - left)
            column = tile * BLOCK_N + n
            shift = (tile * BLOCK_N).to(tl.int64)
            k = load_tile(
                k_at + shift * k_t, d[:, None] < D, column[None, :] < key_length if edges else None, D == BLOCK_D
            )
            v = load_tile(
                v_at + shift * v_t, d[None, :] < D, column[:, None] < key_length if edges else None, D == BLOCK_D
            )
            key_position = column
            if HAS_ALIBI:
                key_position = load_per_row(KEY_POSITION + column, column < key_length if edges else None, 0)
            raw = score_tile(q, k, query_position, key_position, slope, HAS_ALIBI, PRECISION)  # (M, N)
            if edges:
                visible = (column[None, :] >= start[:, None]) & (column[None, :] < stop[:, None])
                raw = tl.where(visible, raw, float("-inf"))
            new_top = tl.maximum(top, tl.max(raw, 1) * z_scale)
            p = tl.exp2(raw * z_scale - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
            top = new_top

    # rows that see nothing went through the tiles without a mask too: what they summed is dropped here
    out = tl.where(seeing[:, None], out / tl.where(seeing, total, 1.0)[:, None], 0.0)
    lse = tl.where(seeing, top + tl.log2(tl.where(seeing, total, 1.0)), UNSEEING)
    out_at = OUT + b * out_b + h * out_h + row[:, None].to(tl.int64) * out_t + d[None, :]
    tl.store(out_at, out.to(OUT.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    # All of it: what an operator returns should be the same at every run.
    tl.store(LSE + at, lse, mask=row < row_stride)


@triton.jit(do_not_specialize=SIZES)
def softmax_backward_rows_kernel(
    Q, K, V, START, STOP, SLOPES, QUERY_POSITION, KEY_POSITION, OUT, LSE, D_OUT, DELTA, DQ,
    scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t, o_b, o_h, o_t, dq_b, dq_h, dq_t,
    range_b, range_h, heads, ratio, query_length, row_stride, key_length, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq = scale * (p * (dp - delta)) k with dp = d_out v^T, and delta = sum of d_out * out over each row."""
    block = blocks - 1 - tl.program_id(0)
    bh = program_head()
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    group = h // ratio
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = row < query_length
    at = bh.to(tl.int64) * row_stride + row
    range_at = b * range_b + h * range_h + row
    start = tl.load(START + range_at, mask=inside, other=0)
    stop = tl.load(STOP + range_at, mask=inside, other=0)
    first, full_first, full_last, last = visible_tiles(start, stop, key_length, BLOCK_N)

    wide_row = row[:, None].to(tl.int64)
    in_dim = d[None, :] < D
    q = load_tile(Q + b * q_b + h * q_h + wide_row * q_t + d[None, :], in_dim, inside[:, None], D == BLOCK_D)
    d_out = load_tile(D_OUT + b * o_b + h * o_h + wide_row * o_t + d[None, :], in_dim, inside[:, None], D == BLOCK_D)
    out = load_tile(OUT + b * out_b + h * out_h + wide_row * out_t + d[None, :], in_dim, inside[:, None], D == BLOCK_D)
    delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + at, delta, mask=inside)
    lse = tl.load(LSE + at, mask=inside, other=UNSEEING)
    k_at = K + b * k_b + group * k_h + n[None, :].to(tl.int64) * k_t + d[:, None]
    v_at = V + b * v_b + group * v_h + n[None, :].to(tl.int64) * v_t + d[:, None]
    z_scale = scale * LOG2_E
    slope = 0.0
    query_position = row
    if HAS_ALIBI:
        slope = tl.load(SLOPES + bh) / scale
        query_position = tl.load(QUERY_POSITION + at, mask=inside, other=0)
        KEY_POSITION += (b * (heads // ratio) + group) * key_length

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    left = full_first - first
    for edges in tl.static_range(2):  # as in the forward kernel
        count = left + last - full_last if edges else full_last - full_first
        for step in tl.range(0, count, num_stages=STAGES):
            tile = full_first + step
            if edges:
                tile = tl.where(step < left, first + step, full_last + step - left)
            column = tile * BLOCK_N + n
            shift = (tile * BLOCK_N).to(tl.int64)
            in_length = column[None, :] < key_length if edges else None
            k = load_tile(k_at + shift * k_t, d[:, None] < D, in_length, D == BLOCK_D)  # (D, N)
            v = load_tile(v_at + shift * v_t, d[:, None] < D, in_length, D == BLOCK_D)
            key_position = column
            if HAS_ALIBI:
                key_position = load_per_row(KEY_POSITION + column, column < key_length if edges else None, 0)
            raw = score_tile(q, k, query_position, key_position, slope, HAS_ALIBI, PRECISION)
            dp = tl.dot(d_out, v, input_precision=PRECISION)
            z = raw * z_scale - lse[:, None]
            if edges:
                visible = (column[None, :] >= start[:, None]) & (column[None, :] < stop[:, None])
                z = tl.where(visible, z, float("-inf"))
            ds = tl.exp2(z) * (dp - delta[:, None])  # (M, N)
            dq = tl.dot(ds.to(k.dtype), tl.trans(k), dq, input_precision=PRECISION)
    dq_at = DQ + b * dq_b + h * dq_h + wide_row * dq_t + d[None, :]
    tl.store(dq_at, (dq * scale).to(DQ.dtype.element_ty), mask=inside[:, None] & in_dim)


@triton.jit(do_not_specialize=sizes_without("range_b", "range_h"))
def softmax_backward_columns_kernel(
    Q, K, V, START, STOP, SLOPES, QUERY_POSITION, KEY_POSITION, BLOCK_RANGE, LSE, DELTA, D_OUT, DK, DV,
    scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    range_b, range_h, groups, ratio, query_length, row_stride, key_length, blocks,
    QUERY_BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dv = p^T d_out and dk = scale * (p * (dp - delta))^T q of one key tile, over all query heads that share it.

    QUERY_BLOCK is the forward kernel's block_m, a multiple of BLOCK_M. The first tiles of keys come first, which under
    causal attention have most to do.
    """
    bg = program_head()
    b = (bg // groups).to(tl.int64)
    group = (bg % groups).to(tl.int64)
    first_key = tl.program_id(0) * BLOCK_N
    end_key = tl.minimum(first_key + BLOCK_N, key_length)
    key = first_key + tl.arange(0, BLOCK_N)
    present = key < key_length
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    in_dim = d[None, :] < D
    wide_key = key[:, None].to(tl.int64)
    k = load_rows(K, b, group, key, present, k_b, k_h, k_t, d, D, BLOCK_D)
    v = load_rows(V, b, group, key, present, v_b, v_h, v_t, d, D, BLOCK_D)
    key_position = key
    if HAS_ALIBI:
        key_position = tl.load(KEY_POSITION + (b * groups + group) * key_length + key, mask=present, other=0)
    z_scale = scale * LOG2_E
    PARTS: tl.constexpr = QUERY_BLOCK // BLOCK_M

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for local in range(0, ratio):
        bh = (bg * ratio + local).to(tl.int64)
        h = group * ratio + local
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(SLOPES + bh) / scale
        lo, full_lo, full_hi, hi = seeing_blocks(
            BLOCK_RANGE + bh * blocks * 4, None, blocks, query_length // QUERY_BLOCK, first_key, end_key
        )
        q_at = Q + b * q_b + h * q_h + m[:, None].to(tl.int64) * q_t + d[None, :]
        o_at = D_OUT + b * o_b + h * o_h + m[:, None].to(tl.int64) * o_t + d[None, :]
        left = (full_lo - lo) * PARTS
        for edges in tl.static_range(2):  # blocks without a mask, then those at the edges: before and after them
            count = left + (hi - full_hi) * PARTS if edges else (full_hi - full_lo) * PARTS
            for step in tl.range(0, count, num_stages=STAGES):
                part = full_lo * PARTS + step
                if edges:
                    part = tl.where(step < left, lo * PARTS + step, full_hi * PARTS + step - left)
                row = part * BLOCK_M + m
                inside = row < query_length if edges else None
                shift = (part * BLOCK_M).to(tl.int64)
                q = load_tile(q_at + shift * q_t, in_dim, inside[:, None] if edges else None, D == BLOCK_D)
                d_out = load_tile(o_at + shift * o_t, in_dim, inside[:, None] if edges else None, D == BLOCK_D)
                at = bh * row_stride + row
                lse = load_per_row(LSE + at, inside, UNSEEING)
                delta = load_per_row(DELTA + at, inside, 0.0)
                query_position = row
                if HAS_ALIBI:
                    query_position = load_per_row(QUERY_POSITION + at, inside, 0)
                raw = score_tile(k, tl.trans(q), key_position, query_position, slope, HAS_ALIBI, PRECISION)
                z = raw * z_scale - lse[None, :]
                if edges:
                    range_at = b * range_b + h * range_h + row
                    start = tl.load(START + range_at, mask=inside, other=0)
                    stop = tl.load(STOP + range_at, mask=inside, other=0)
                    visible = (key[:, None] >= start[None, :]) & (key[:, None] < stop[None, :])
                    z = tl.where(visible, z, float("-inf"))
                p = tl.exp2(z)  # (N, M)
                dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
                dp = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    full = present[:, None] & in_dim
    dk_at = DK + b * dk_b + group * dk_h + wide_key * dk_t + d[None, :]
    dv_at = DV + b * dv_b + group * dv_h + wide_key * dv_t + d[None, :]
    tl.store(dk_at, (dk * scale).to(DK.dtype.element_ty), mask=full)
    tl.store(dv_at, dv.to(DV.dtype.element_ty), mask=full)
