"""Entmax attention on whole tiles, for what is too dense for lists: blocks of queries with a large support, and sink keys.

The same mathematics as on lists, on tensor cores. BLOCKS (B * H, blocks) names the query blocks, the first
BLOCK_COUNT[B * H] of them in tile mode. Such a block has QUERY_BLOCK queries, and PARTS programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..entmax_formulas import alpha_weights, entmax_weights, halley_step, near_delta, newton_step
from ..jit import (
    IN_PYTHON,
    SIZES,
    largest,
    load_per_row,
    load_rows,
    load_tile,
    program_head,
    rounded,
    score_tile,
    seeing_blocks,
    sizes_without,
    visible_tiles,
)

NEWTON_STEPS = tl.constexpr(16)  # at most; one or two are usual, and one pass over v


@triton.jit(do_not_specialize=SIZES)
def list_blocks_kernel(IN_TILES, BLOCKS, BLOCK_COUNT, blocks, AT_ONCE: tl.constexpr):
    """The blocks of one (batch, head): those in tile mode, and after them the others, each in ascending order.

    BLOCK_COUNT: how many are in tile mode.
    """
    bh = tl.program_id(0)
    in_tiles = 0
    for begin in range(0, blocks, AT_ONCE):
        block = begin + tl.arange(0, AT_ONCE)
        in_tiles += tl.sum(tl.load(IN_TILES + bh * blocks + block, mask=block < blocks, other=0), 0)
    tl.store(BLOCK_COUNT + bh, in_tiles)
    listed = 0
    for begin in range(0, blocks, AT_ONCE):
        block = begin + tl.arange(0, AT_ONCE)
        flag = tl.load(IN_TILES + bh * blocks + block, mask=block < blocks, other=0)
        before = listed + tl.cumsum(flag, 0) - flag
        to = tl.where(flag > 0, before, in_tiles + block - before)
        tl.store(BLOCKS + bh * blocks + to, block, mask=block < blocks)
        listed += tl.sum(flag, 0)


@triton.jit
def partial_sums(x):
    """x (M, N) -> (M, 8), whose sums are those of the rows: what lies 8 columns apart is in one thread, and a loop adds it up there."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8)), 1)


@triton.jit
def moves(tau, step):
    """Whether a step is more than tau's last digits, which no number of steps would settle."""
    return (tau < float("inf")) & (tl.abs(step) > tl.abs(tau) * 2.0**-21)


@triton.jit
def limited(distance, FORMULA: tl.constexpr):
    """A distance to tau between 0 and 1: no weight is above 1, and a product with both limits is one instruction.

    The general FORMULA, which has no unit (see `tiles_forward_kernel`), must see distances above 1.
    """
    distance = tl.maximum(distance, 0.0)
    return distance if FORMULA == 0 else tl.minimum(distance, 1.0)


@triton.jit
def tiles_of_part(part: tl.constexpr, first, full_first, full_last, last):
    """Where the key tiles begin and end of the left edge (0), of the inside (1), which needs no mask, and of the right edge (2)."""
    begin = first if part == 0 else (full_first if part == 1 else full_last)
    end = full_first if part == 0 else (full_last if part == 1 else last)
    return begin, end


@triton.jit
def tile_distances(
    q, k, column, start, stop, tau, z_scale, slope, query_position, KEY_POSITION, key_length,
    MASKED: tl.constexpr, FORMULA: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z - tau (M, N) of q (M, D) and the keys k (D, N) in `column`, limited; 0 where MASKED and out of the row's range."""
    place = column
    if HAS_ALIBI:
        place = tl.load(KEY_POSITION + column, mask=column < key_length, other=0)
    raw = score_tile(q, k, query_position, place, slope, HAS_ALIBI, PRECISION)
    distance = limited(raw * z_scale - tau[:, None], FORMULA)
    if MASKED:
        visible = (column[None, :] >= start[:, None]) & (column[None, :] < stop[:, None])
        distance = tl.where(visible, distance, 0.0)
    return distance


@triton.jit(do_not_specialize=SIZES)
def tiles_forward_kernel(
    Q, K, V, START, STOP, ALPHA, SLOPES, QUERY_POSITION, KEY_POSITION, BLOCKS, BLOCK_COUNT, BOUND, OUT, TAU,
    scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t, range_b, range_h,
    heads, ratio, query_length, row_stride, key_length, blocks,
    QUERY_BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FORMULA: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Refines the bound to the threshold, then computes tau and out.

    The weights of the pass over v sum to `mass`, by which `out` is divided: this leaves an error of at most |mass - 1| times the
    difference between the means of v weighted by p and by u. Where |mass - 1| is too large for that, as it can be with a few keys
    far above many near-equal ones, which a step drops in large numbers, the pass is made again. tau takes one more step from it.
    """
    bh = program_head()
    ROUGH: tl.constexpr = Q.dtype.element_ty != tl.float32
    PARTS: tl.constexpr = QUERY_BLOCK // BLOCK_M
    tl.static_assert(QUERY_BLOCK % BLOCK_M == 0, "a block is computed in equal parts")
    # The last blocks first: under causal attention they have most to do.
    listed_at = tl.load(BLOCK_COUNT + bh) - 1 - tl.program_id(0) // PARTS
    if listed_at >= 0:
        block = tl.load(BLOCKS + bh * blocks + listed_at)
        b = (bh // heads).to(tl.int64)
        h = bh % heads
        group = (h // ratio).to(tl.int64)
        row = block * QUERY_BLOCK + tl.program_id(0) % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        inside = row < query_length
        at = bh.to(tl.int64) * row_stride + row
        range_at = b * range_b + h.to(tl.int64) * range_h + row
        start = tl.load(START + range_at, mask=inside, other=0)
        stop = tl.load(STOP + range_at, mask=inside, other=0)
        first, full_first, full_last, last = visible_tiles(start, stop, key_length, BLOCK_N)
        q = load_rows(Q, b, h, row, inside, q_b, q_h, q_t, d, D, BLOCK_D)
        k_at = K + b * k_b + group * k_h + n[None, :].to(tl.int64) * k_t + d[:, None]
        v_at = V + b * v_b + group * v_h + n[:, None].to(tl.int64) * v_t + d[None, :]
        alpha = tl.load(ALPHA + h).to(tl.float32)
        z_scale = (alpha - 1.0) * scale
        r = 1.0 / (alpha - 1.0)
        slope = 0.0
        query_position = row
        if HAS_ALIBI:
            slope = tl.load(SLOPES + bh) / scale
            query_position = tl.load(QUERY_POSITION + at, mask=inside, other=0)
            KEY_POSITION += (b * (heads // ratio) + group) * key_length
        seeing = stop > start
        bound = tl.load(BOUND + at, mask=inside, other=0.0)
        tau = tl.where(seeing & (bound == bound), bound * z_scale, float("inf"))

        # A step s (relative to the mean distance from tau) leaves an error of |mass - 1| of about s ** 3 / 2, or s ** 2 / 10 where its
        # bend is an estimate: limits by the precision of the dtype, so that hardly a block is far off. Near alpha = 2, u jumps at tau.
        if Q.dtype.element_ty == tl.float32:
            close, far_off = 1e-3 if FORMULA == 2 else 1e-5, 1e-5
        elif Q.dtype.element_ty == tl.float16:
            close = 0.1 if FORMULA == 2 else tl.where(alpha < 1.6, 0.05, 1e-2)
            far_off = 5e-4
        else:
            close = tl.where(alpha < 1.6, 0.25, 0.05)
            far_off = 4e-3
        # The bound of scores in the thousands may lie far below. Distances are taken in a unit in which even then none is above 1.
        UNIT: tl.constexpr = 1.0 if FORMULA == 0 else (2.0**12 if FORMULA == 4 else 2.0**24)
        steps = 0
        while steps < NEWTON_STEPS:
            p_sums = tl.zeros((BLOCK_M, 8), tl.float32)
            u_sums = tl.zeros((BLOCK_M, 8), tl.float32)
            below_sums = tl.zeros((BLOCK_M, 8), tl.float32)
            tau_units = tau / UNIT
            for part in tl.static_range(3):
                begin, end = tiles_of_part(part, first, full_first, full_last, last)
                for i in tl.range(0, end - begin, num_stages=STAGES):
                    tile = begin + i
                    column = tile * BLOCK_N + n
                    in_length = column[None, :] < key_length if part != 1 else None
                    k = load_tile(k_at + (tile * BLOCK_N).to(tl.int64) * k_t, d[:, None] < D, in_length, D == BLOCK_D)
                    distance = tile_distances(
                        q, k, column, start, stop, tau_units, z_scale / UNIT, slope, query_position, KEY_POSITION, key_length,
                        part != 1, FORMULA, HAS_ALIBI, PRECISION,
                    )  # fmt: skip
                    p, u = entmax_weights(distance, r, FORMULA, ROUGH)
                    p_sums += partial_sums(p)
                    u_sums += partial_sums(u)
                    if FORMULA == 4:
                        below_sums += partial_sums(distance * distance)
                    elif FORMULA != 1:
                        below_sums += partial_sums(tl.minimum(tl.maximum(distance * 2.0**100, 0.0), 1.0))  # 0 or 1
            # FORMULA is r, but for the general one, which has no unit.
            mass = tl.sum(p_sums, 1) * UNIT**FORMULA
            u_sum = tl.sum(u_sums, 1)
            if FORMULA > 1:
                u_sum *= UNIT ** (FORMULA - 1)
            if FORMULA == 1:
                step = newton_step(mass, u_sum, r, FORMULA)
            else:
                step = halley_step(mass, u_sum, tl.sum(below_sums, 1) * (UNIT**2 if FORMULA == 4 else 1.0), r, FORMULA)
            relative = tl.where(seeing & moves(tau, step), tl.abs(step) * u_sum, 0.0) / tl.where(mass > 0.0, mass, 1.0)
            tau += step
            steps = tl.where(largest(relative) > close, steps + 1, NEWTON_STEPS)

        out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)  # what the loop leaves has to have a type before it
        mass = tl.zeros((BLOCK_M,), tl.float32)
        passes = 0
        while passes < NEWTON_STEPS:
            out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            p_sums = tl.zeros((BLOCK_M, 8), tl.float32)
            u_sums = tl.zeros((BLOCK_M, 8), tl.float32)
            for part in tl.static_range(3):
                begin, end = tiles_of_part(part, first, full_first, full_last, last)
                for i in tl.range(0, end - begin, num_stages=STAGES):
                    tile = begin + i
                    column = tile * BLOCK_N + n
                    in_length = column[None, :] < key_length if part != 1 else None
                    k = load_tile(k_at + (tile * BLOCK_N).to(tl.int64) * k_t, d[:, None] < D, in_length, D == BLOCK_D)
                    in_length = column[:, None] < key_length if part != 1 else None
                    v = load_tile(v_at + (tile * BLOCK_N).to(tl.int64) * v_t, d[None, :] < D, in_length, D == BLOCK_D)
                    distance = tile_distances(
                        q, k, column, start, stop, tau, z_scale, slope, query_position, KEY_POSITION, key_length,
                        part != 1, FORMULA, HAS_ALIBI, PRECISION,
                    )  # fmt: skip
                    p, u = entmax_weights(distance, r, FORMULA, ROUGH)
                    p_sums += partial_sums(p)
                    u_sums += partial_sums(u)
                    out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
            mass = tl.sum(p_sums, 1)
            step = newton_step(mass, tl.sum(u_sums, 1), r, FORMULA)
            off = tl.where(moves(tau, step), tl.abs(mass - 1.0), 0.0)
            tau += step
            passes = tl.where(largest(off) > far_off, passes + 1, NEWTON_STEPS)
        out = out / tl.where(mass > 0.0, mass, 1.0)[:, None]
        # Scores that are not finite, or sums of their powers.
        out = tl.where(((bound == bound) & (tau == tau))[:, None], out, float("nan"))
        to = b * out_b + h.to(tl.int64) * out_h + row[:, None].to(tl.int64) * out_t + d[None, :]
        full = inside[:, None] & (d < D)[None, :]
        tl.store(OUT + to, out.to(OUT.dtype.element_ty), mask=full)
        tl.store(TAU + at, tau, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def tiles_backward_rows_kernel(
    Q, K, V, START, STOP, ALPHA, SLOPES, QUERY_POSITION, KEY_POSITION, BLOCKS, BLOCK_COUNT, TAU, OUT, D_OUT,
    DELTA, DQ, D_ALPHA,
    scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, dq_b, dq_h, dq_t, range_b, range_h,
    heads, ratio, query_length, row_stride, key_length, blocks,
    QUERY_BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FORMULA: tl.constexpr, HAS_ALIBI: tl.constexpr, ALPHA_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq, delta and the rows' shares of the gradient for alpha."""
    bh = program_head()
    ROUGH: tl.constexpr = Q.dtype.element_ty != tl.float32
    PARTS: tl.constexpr = QUERY_BLOCK // BLOCK_M
    tl.static_assert(QUERY_BLOCK % BLOCK_M == 0, "a block is computed in equal parts")
    # The last blocks first: under causal attention they have most to do.
    listed_at = tl.load(BLOCK_COUNT + bh) - 1 - tl.program_id(0) // PARTS
    if listed_at >= 0:
        block = tl.load(BLOCKS + bh * blocks + listed_at)
        b = (bh // heads).to(tl.int64)
        h = bh % heads
        group = (h // ratio).to(tl.int64)
        row = block * QUERY_BLOCK + tl.program_id(0) % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        inside = row < query_length
        at = bh.to(tl.int64) * row_stride + row
        range_at = b * range_b + h.to(tl.int64) * range_h + row
        start = tl.load(START + range_at, mask=inside, other=0)
        stop = tl.load(STOP + range_at, mask=inside, other=0)
        first, full_first, full_last, last = visible_tiles(start, stop, key_length, BLOCK_N)
        q = load_rows(Q, b, h, row, inside, q_b, q_h, q_t, d, D, BLOCK_D)
        d_out = load_rows(D_OUT, b, h, row, inside, o_b, o_h, o_t, d, D, BLOCK_D)
        like_q = b * dq_b + h.to(tl.int64) * dq_h + row[:, None].to(tl.int64) * dq_t + d[None, :]
        out = load_tile(OUT + like_q, d[None, :] < D, inside[:, None], D == BLOCK_D)
        near = near_delta(d_out, out)
        k_at = K + b * k_b + group * k_h + n[None, :].to(tl.int64) * k_t + d[:, None]
        v_at = V + b * v_b + group * v_h + n[None, :].to(tl.int64) * v_t + d[:, None]
        alpha = tl.load(ALPHA + h).to(tl.float32)
        z_scale = (alpha - 1.0) * scale
        r = 1.0 / (alpha - 1.0)
        tau = tl.load(TAU + at, mask=inside, other=0.0)
        slope = 0.0
        query_position = row
        if HAS_ALIBI:
            slope = tl.load(SLOPES + bh) / scale
            query_position = tl.load(QUERY_POSITION + at, mask=inside, other=0)
            KEY_POSITION += (b * (heads // ratio) + group) * key_length
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        k_mean = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        u_sums = tl.zeros((BLOCK_M, 8), tl.float32)
        ds_sums = tl.zeros((BLOCK_M, 8), tl.float32)
        w_sums = tl.zeros((BLOCK_M, 8), tl.float32)
        w_dp_sums = tl.zeros((BLOCK_M, 8), tl.float32)
        exact_u_sums = tl.zeros((BLOCK_M, 8), tl.float32)
        exact_ds_sums = tl.zeros((BLOCK_M, 8), tl.float32)
        for part in tl.static_range(3):
            begin, end = tiles_of_part(part, first, full_first, full_last, last)
            for i in tl.range(0, end - begin, num_stages=STAGES):
                tile = begin + i
                column = tile * BLOCK_N + n
                in_length = column[None, :] < key_length if part != 1 else None
                k = load_tile(k_at + (tile * BLOCK_N).to(tl.int64) * k_t, d[:, None] < D, in_length, D == BLOCK_D)
                v = load_tile(v_at + (tile * BLOCK_N).to(tl.int64) * v_t, d[:, None] < D, in_length, D == BLOCK_D)
                distance = tile_distances(
                    q, k, column, start, stop, tau, z_scale, slope, query_position, KEY_POSITION, key_length,
                    part != 1, FORMULA, HAS_ALIBI, PRECISION,
                )  # fmt: skip
                p, u = entmax_weights(distance, r, FORMULA, ROUGH)
                dp = tl.dot(d_out, v, input_precision=PRECISION) - near[:, None]
                ds = u * dp
                if ALPHA_GRADIENT:
                    w = alpha_weights(p, distance, ROUGH)
                    w_sums += partial_sums(w)
                    w_dp_sums += partial_sums(w * dp)
                    exact_u_sums += partial_sums(u)
                    exact_ds_sums += partial_sums(ds)
                dq = tl.dot(ds.to(k.dtype), tl.trans(k), dq, input_precision=PRECISION)
                k_mean = tl.dot(u.to(k.dtype), tl.trans(k), k_mean, input_precision=PRECISION)
                if FORMULA < 2:
                    # Near alpha = 2, u is flat, and ds of many keys may be rounded alike for the dot: then sum dS is 0 only if
                    # what is added up is what the dots see. Nearer 1.5 such errors even out.
                    u = rounded(u, k.dtype)
                    ds = rounded(ds, k.dtype)
                u_sums += partial_sums(u)
                ds_sums += partial_sums(ds)
        seen_u = tl.sum(u_sums, 1)
        delta = tl.sum(ds_sums, 1) / tl.where(seen_u > 0.0, seen_u, 1.0)
        dq = (dq - delta[:, None] * k_mean) * scale
        full = inside[:, None] & (d < D)[None, :]
        tl.store(DQ + like_q, dq.to(DQ.dtype.element_ty), mask=full)
        tl.store(DELTA + at, delta + near, mask=inside)
        if ALPHA_GRADIENT:
            # Near alpha = 1, where r is large, the gradient asks for more digits of delta than the rounded sums have.
            exact_u = tl.sum(exact_u_sums, 1)
            delta = tl.sum(exact_ds_sums, 1) / tl.where(exact_u > 0.0, exact_u, 1.0)
            tl.store(D_ALPHA + at, (tl.sum(w_dp_sums, 1) - delta * tl.sum(w_sums, 1)) * (128.0 * r * r), mask=inside)


@triton.jit
def listed_part(BLOCKS, blocks, first, step, before, gap, PARTS: tl.constexpr):
    """Which part of the query rows is due in a step over BLOCKS (blocks,), each of PARTS parts: from the place `first` on, with a gap
    after `before` steps.

    Loaded by hand: a load that others wait for would cost them half of the stages in the compiler's pipeline. The step after the last
    is asked for, too.
    """
    place = tl.minimum(first + step + tl.where(step >= before, gap, 0), blocks * PARTS - 1)
    pointer = BLOCKS + place // PARTS
    if IN_PYTHON:
        block = tl.load(pointer)
    else:
        block = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [pointer], dtype=tl.int32, is_pure=True, pack=1
        )
    return block * PARTS + place % PARTS


@triton.jit(do_not_specialize=sizes_without("range_b", "range_h"))
def tiles_backward_columns_kernel(
    Q, K, V, START, STOP, ALPHA, SLOPES, QUERY_POSITION, KEY_POSITION, BLOCKS, BLOCK_COUNT, BLOCK_RANGE, SINKS, SINK_COUNT,
    PARTIAL, ARRIVED, TAU, DELTA, D_OUT, DK, DV,
    scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    range_b, range_h, groups, ratio, query_length, row_stride, key_length, blocks, sinks_at_most, slots,
    OF_SINKS: tl.constexpr, QUERY_BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FORMULA: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv what the lists left out: all keys with the blocks in tile mode, or the sinks with the others.

    A few tiles of sinks would keep a few programs busy for long. So `slots` programs of one (batch, key head) share them,
    each with a part of the queries and a sum in PARTIAL (B * G * slots, 2, BLOCK_N, BLOCK_D); the last of a tile to arrive,
    as counted in ARRIVED (B * G * slots,), adds them up, always in the same order.
    """
    bg = program_head()
    b = (bg // groups).to(tl.int64)
    group = (bg % groups).to(tl.int64)
    program = tl.program_id(0)
    tile = program
    share = 0
    shares = 1
    if OF_SINKS:
        sinks = tl.load(SINK_COUNT + bg)
        shares = tl.maximum(slots // tl.maximum(tl.cdiv(sinks, BLOCK_N), 1), 1)
        share = program % shares
        tile = program // shares
    place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if OF_SINKS:
        work = sinks - tile * BLOCK_N
        present = place < sinks
        key = tl.load(SINKS + bg.to(tl.int64) * sinks_at_most + place, mask=present, other=0)
    else:
        work = 0
        for local in range(0, ratio):
            work += tl.load(BLOCK_COUNT + bg * ratio + local)
        present = place < key_length
        key = place
    if work > 0:
        d = tl.arange(0, BLOCK_D)
        m = tl.arange(0, BLOCK_M)
        in_dim = d[None, :] < D
        wide_key = key[:, None].to(tl.int64)
        k = load_rows(K, b, group, key, present, k_b, k_h, k_t, d, D, BLOCK_D)
        v = load_rows(V, b, group, key, present, v_b, v_h, v_t, d, D, BLOCK_D)
        first_key = tl.min(tl.where(present, key, key_length), 0)
        end_key = tl.max(tl.where(present, key, 0), 0) + 1
        key_position = key
        if HAS_ALIBI:
            key_at = (b * groups + group) * key_length + key
            key_position = tl.load(KEY_POSITION + key_at, mask=present, other=0)
        ROUGH: tl.constexpr = Q.dtype.element_ty != tl.float32
        PARTS: tl.constexpr = QUERY_BLOCK // BLOCK_M
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        touched = 1 if OF_SINKS else 0  # else how many blocks see keys of this tile
        for local in range(0, ratio):
            bh = (bg * ratio + local).to(tl.int64)
            h = group * ratio + local
            alpha = tl.load(ALPHA + h).to(tl.float32)
            z_scale = (alpha - 1.0) * scale
            r = 1.0 / (alpha - 1.0)
            slope = 0.0
            if HAS_ALIBI:
                slope = tl.load(SLOPES + bh) / scale
            in_tiles = tl.load(BLOCK_COUNT + bh)
            head_blocks = BLOCKS + bh * blocks
            listed = in_tiles if OF_SINKS else 0  # the place in them where those to look at begin
            todo = blocks - in_tiles if OF_SINKS else in_tiles
            lo, full_lo, full_hi, hi = seeing_blocks(
                BLOCK_RANGE + bh * blocks * 4,
                head_blocks + listed,
                todo,
                query_length // QUERY_BLOCK,
                first_key,
                end_key,
            )
            q_at = Q + b * q_b + h * q_h + m[:, None].to(tl.int64) * q_t + d[None, :]
            o_at = D_OUT + b * o_b + h * o_h + m[:, None].to(tl.int64) * o_t + d[None, :]
            touched += hi - lo
            run = (full_hi - full_lo) * PARTS
            before = (full_lo - lo) * PARTS
            for edges in tl.static_range(2):  # the run of blocks that see all the keys, then those before and after it
                count = before + (hi - full_hi) * PARTS if edges else run
                begin, end = count * share // shares, count * (share + 1) // shares
                first = (listed + (lo if edges else full_lo)) * PARTS
                gap = run if edges else 0
                part = listed_part(head_blocks, blocks, first, begin, before, gap, PARTS)
                for step in tl.range(begin, end, num_stages=STAGES):
                    row = part * BLOCK_M + m
                    inside = row < query_length if edges else None
                    shift = (part * BLOCK_M).to(tl.int64)
                    q = load_tile(q_at + shift * q_t, in_dim, inside[:, None] if edges else None, D == BLOCK_D)
                    d_out = load_tile(o_at + shift * o_t, in_dim, inside[:, None] if edges else None, D == BLOCK_D)
                    at = bh * row_stride + row
                    tau = load_per_row(TAU + at, inside, 0.0)
                    delta = load_per_row(DELTA + at, inside, 0.0)
                    query_position = row
                    if HAS_ALIBI:
                        query_position = load_per_row(QUERY_POSITION + at, inside, 0)
                    raw = score_tile(k, tl.trans(q), key_position, query_position, slope, HAS_ALIBI, PRECISION)
                    # (N, M); tau is inf where a row sees nothing
                    distance = limited(raw * z_scale - tau[None, :], FORMULA)
                    if edges:
                        range_at = b * range_b + h * range_h + row
                        start = tl.load(START + range_at, mask=inside, other=0)
                        stop = tl.load(STOP + range_at, mask=inside, other=0)
                        visible = (key[:, None] >= start[None, :]) & (key[:, None] < stop[None, :])
                        distance = tl.where(visible, distance, 0.0)
                    p, u = entmax_weights(distance, r, FORMULA, ROUGH)
                    dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
                    dp = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
                    ds = u * (dp - delta[None, :])
                    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
                    # A step ahead: the loads of q and dO, which are started early, need it.
                    part = listed_part(head_blocks, blocks, first, step + 1, before, gap, PARTS)
        adds = touched > 0
        if OF_SINKS:
            if shares > 1:
                n = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + d[None, :]
                first_slot = (bg * slots + tile * shares).to(tl.int64) * (2 * BLOCK_N * BLOCK_D)
                own = first_slot + share * (2 * BLOCK_N * BLOCK_D) + n
                tl.store(PARTIAL + own, dk)
                tl.store(PARTIAL + own + BLOCK_N * BLOCK_D, dv)
                tl.debug_barrier()
                adds = tl.atomic_add(ARRIVED + bg * slots + tile, 1) == shares - 1
                if adds:
                    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
                    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
                    for other in range(0, shares):
                        at = first_slot + other * (2 * BLOCK_N * BLOCK_D) + n
                        dk += tl.load(PARTIAL + at, cache_modifier=".cg")
                        dv += tl.load(PARTIAL + at + BLOCK_N * BLOCK_D, cache_modifier=".cg")
        if adds:
            full = present[:, None] & in_dim
            dk_at = DK + b * dk_b + group * dk_h + wide_key * dk_t + d[None, :]
            dv_at = DV + b * dv_b + group * dv_h + wide_key * dv_t + d[None, :]
            dk = dk * scale + tl.load(dk_at, mask=full, other=0.0).to(tl.float32)
            dv += tl.load(dv_at, mask=full, other=0.0).to(tl.float32)
            tl.store(dk_at, dk.to(DK.dtype.element_ty), mask=full)
            tl.store(dv_at, dv.to(DV.dtype.element_ty), mask=full)
