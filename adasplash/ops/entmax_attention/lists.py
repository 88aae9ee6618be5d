"""Entmax attention on support lists, row by row: threshold and output, dq and delta; columns.py has what goes by columns.

A pair costs one gathered row of k or v (or q and dO) and D multiply-adds; nothing is computed for keys off the lists.
Rows of a block: keys from slab of the block + FIRST[row] on, COUNT[row] of them; blocks in tile mode have COUNT 0 and are skipped.
What lists hold takes 16 bits where that is enough, see `load_listed`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..entmax_formulas import alpha_weights, entmax_weights, near_delta, newton_step
from ..jit import SIZES, largest, load_rows, load_tile, program_head

NEWTON_STEPS = tl.constexpr(24)  # at most; a handful is usual
THRESHOLD_ROWS = tl.constexpr(4)  # whose thresholds are found side by side,
THRESHOLD_PAIRS = tl.constexpr(8)  # from so many pairs of each at a time: a thread of a warp for each


@triton.jit
def load_listed(LISTS, at, live, high):
    """The numbers, int32, at places `at` of lists; 0 where not live.

    Of each, 16 bits lie there, and 16 more as many places further as `high` says, unless it is 0 or None. So a longer sequence
    compiles nothing anew.
    """
    number = tl.load(LISTS + at, mask=live, other=0).to(tl.int32)
    if high is not None:
        if high > 0:
            number |= tl.load(LISTS + at + high, mask=live, other=0).to(tl.int32) << 16
    return number


@triton.jit
def store_listed(LISTS, at, number, live, high):
    """Stores what `load_listed` loads."""
    tl.store(LISTS + at, number, mask=live)
    if high is not None:
        if high > 0:
            tl.store(LISTS + at + high, number >> 16, mask=live)


@triton.jit
def load_lists(FIRST, COUNT, at, inside, slab):
    """Where the keys of the rows `at` stand in KEYS, and how many they are; `slab`: where those of their block begin."""
    count = tl.load(COUNT + at, mask=inside, other=0)
    return slab + tl.load(FIRST + at, mask=inside, other=0), count


@triton.jit
def load_pairs(pointers, live, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The D numbers at each of pointers (R, C), as (R, C, D) in float32; zeros where not live."""
    # The hint is for the layout alone, and untrue of R: threads take different rows before different pairs, with every version
    # of Triton, so that sums over C stay in a thread. Only the last axis is read in wide pieces, of which it is true.
    pointers = tl.max_contiguous(pointers[:, :, None] + d[None, None, :], (live.shape[0], 1, BLOCK_D))
    return load_tile(pointers, d[None, None, :] < D, live[:, :, None], D == BLOCK_D).to(tl.float32)


@triton.jit
def gather(X, at, live, x_t, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `at` (R, C) of a head X as (R, C, D) in float32; zeros where not live."""
    return load_pairs(X + at.to(tl.int64) * x_t, live, d, D, BLOCK_D)


@triton.jit
def pair_scores(q, k, scale, slope, query_position, key_position, HAS_ALIBI: tl.constexpr):
    """q (R, 1, D) or (R, C, D), k likewise -> scores (R, C)."""
    score = tl.sum(q * k, 2) * scale
    if HAS_ALIBI:
        score -= slope * tl.abs(query_position - key_position).to(tl.float32)
    return score


@triton.jit
def find_thresholds(
    KEYS, Z, FIRST, COUNT, BOUND, TAU, row, slab, high, query_length, bound_scale, r, FORMULA: tl.constexpr
):
    """TAU of rows (R,) of one head from the z of their candidates; those above it move up in KEYS and Z, COUNT becomes theirs.

    Newton's method from the bound that the lists were collected with. TAU is infinite for a row without keys, which
    gives weight to none, in tiles either.
    """
    inside = row < query_length
    first, count = load_lists(FIRST, COUNT, row, inside, slab)
    bound = tl.load(BOUND + row, mask=inside, other=0.0) * bound_scale
    c = tl.arange(0, THRESHOLD_PAIRS)[None, :]
    at = first[:, None] + c
    most = tl.max(count, 0)
    first_z = tl.load(Z + at, mask=c < count[:, None], other=float("-inf"))  # mostly all
    top = tl.max(first_z, 1)
    for begin in range(THRESHOLD_PAIRS, most, THRESHOLD_PAIRS):
        z = tl.load(Z + at + begin, mask=begin + c < count[:, None], other=float("-inf"))
        top = tl.maximum(top, tl.max(z, 1))
    top = tl.where(count > 0, top, 0.0)
    tau = tl.minimum(tl.maximum(bound - top, -1.0), -1e-6)  # relative to the largest z
    steps = 0
    while steps < NEWTON_STEPS:
        p, u = entmax_weights(first_z - top[:, None] - tau[:, None], r, FORMULA)
        mass = tl.sum(p, 1)
        slope = tl.sum(u, 1)
        for begin in range(THRESHOLD_PAIRS, most, THRESHOLD_PAIRS):
            z = tl.load(Z + at + begin, mask=begin + c < count[:, None], other=float("-inf"))
            p, u = entmax_weights(z - top[:, None] - tau[:, None], r, FORMULA)
            mass += tl.sum(p, 1)
            slope += tl.sum(u, 1)
        step = newton_step(mass, slope, r, FORMULA)
        tau += step
        steps = tl.where(largest(tl.abs(step)) > 2e-7, steps + 1, NEWTON_STEPS)
    tau = tl.where(count > 0, tau + top, float("inf"))

    kept = tl.zeros_like(count)
    for begin in range(0, most, THRESHOLD_PAIRS):
        live = begin + c < count[:, None]
        key = load_listed(KEYS, at + begin, live, high)
        z = tl.load(Z + at + begin, mask=live, other=float("-inf"))
        stay = (z > tau[:, None]).to(tl.int32)
        to = (first + kept)[:, None] + tl.cumsum(stay, 1) - stay
        tl.debug_barrier()  # all have read what is about to be overwritten
        store_listed(KEYS, to, key, stay > 0, high)
        tl.store(Z + to, z, mask=stay > 0)
        kept += tl.sum(stay, 1)
    tl.store(TAU + row, tau, mask=inside)
    tl.store(COUNT + row, kept, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def rows_forward_kernel(
    Q, K, V, ALPHA, SLOPES, QUERY_POSITION, KEY_POSITION, KEYS, FIRST, COUNT, IN_TILES, BOUND, Z, OUT, TAU,
    scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t,
    heads, ratio, query_length, row_stride, key_length, blocks, capacity, high_keys: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    FORMULA: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """tau and out for TURNS * ROWS queries; leaves in KEYS and COUNT the exact support.

    Rows are scored and weighed ROWS at a time, for a key is D numbers there; their thresholds are found THRESHOLD_ROWS at a
    time, for a key is one number then. Z is scratch, a float for each place in KEYS.
    """
    bh = program_head()
    ROUGH: tl.constexpr = Q.dtype.element_ty != tl.float32
    tl.static_assert(BLOCK_M % (TURNS * ROWS) == 0, "all rows of a program belong to one block")
    block = tl.program_id(0) * (TURNS * ROWS) // BLOCK_M
    on_lists = tl.load(IN_TILES + bh * blocks + block) == 0
    # A body without high halves and one with them: to ask at every load would take 3 to 7 % of the time.
    for WIDE in tl.static_range(2):
        high = high_keys if WIDE else None
        if on_lists & ((high_keys > 0) == WIDE):
            b = (bh // heads).to(tl.int64)
            h = bh % heads
            group = (h // ratio).to(tl.int64)
            d = tl.arange(0, BLOCK_D)
            c = tl.arange(0, PAIRS)
            alpha = tl.load(ALPHA + h).to(tl.float32)
            r = 1.0 / (alpha - 1.0)
            slope = 0.0
            if HAS_ALIBI:
                slope = tl.load(SLOPES + bh)
                positions = KEY_POSITION + (b * (heads // ratio) + group) * key_length
            k_head = K + (b * k_b + group * k_h)
            v_head = V + (b * v_b + group * v_h)
            slab = (bh.to(tl.int64) * blocks + block) * capacity
            first_row = tl.program_id(0) * (TURNS * ROWS)
            for turn in range(0, TURNS):
                row = first_row + turn * ROWS + tl.arange(0, ROWS)
                inside = row < query_length
                at = bh.to(tl.int64) * row_stride + row
                first, count = load_lists(FIRST, COUNT, at, inside, slab)
                q = load_rows(Q, b, h, row, inside, q_b, q_h, q_t, d, D, BLOCK_D).to(tl.float32)
                query_position = row
                if HAS_ALIBI:
                    query_position = tl.load(QUERY_POSITION + at, mask=inside, other=0)
                for begin in range(0, tl.max(count, 0), PAIRS):
                    live = (begin + c)[None, :] < count[:, None]
                    place = first[:, None] + (begin + c)[None, :]
                    key = load_listed(KEYS, place, live, high)
                    k = gather(k_head, key, live, k_t, d, D, BLOCK_D)
                    key_position = key
                    if HAS_ALIBI:
                        key_position = tl.load(positions + key, mask=live, other=0)
                    z = pair_scores(q[:, None, :], k, scale, slope, query_position[:, None], key_position, HAS_ALIBI)
                    tl.store(Z + place, z * (alpha - 1.0), mask=live)
            tl.debug_barrier()

            head = bh.to(tl.int64) * row_stride
            for begin in range(0, TURNS * ROWS, THRESHOLD_ROWS):
                find_thresholds(
                    KEYS, Z, FIRST + head, COUNT + head, BOUND + head, TAU + head,
                    first_row + begin + tl.arange(0, THRESHOLD_ROWS), slab, high, query_length, (alpha - 1.0) * scale, r, FORMULA,
                )  # fmt: skip
            tl.debug_barrier()

            for turn in range(0, TURNS):
                row = first_row + turn * ROWS + tl.arange(0, ROWS)
                inside = row < query_length
                at = bh.to(tl.int64) * row_stride + row
                first, count = load_lists(FIRST, COUNT, at, inside, slab)
                tau = tl.load(TAU + at, mask=inside, other=0.0)
                bound = tl.load(BOUND + at, mask=inside, other=0.0)
                out = tl.zeros((ROWS, BLOCK_D), tl.float32)
                for begin in range(0, tl.max(count, 0), PAIRS):
                    live = (begin + c)[None, :] < count[:, None]
                    place = first[:, None] + (begin + c)[None, :]
                    key = load_listed(KEYS, place, live, high)
                    z = tl.load(Z + place, mask=live, other=float("-inf"))
                    p, _ = entmax_weights(z - tau[:, None], r, FORMULA, ROUGH)
                    v = gather(v_head, key, live, v_t, d, D, BLOCK_D)
                    out += tl.sum(p[:, :, None] * v, 1)
                out = tl.where((bound == bound)[:, None], out, float("nan"))  # scores that are not finite
                to = b * out_b + h.to(tl.int64) * out_h + row[:, None].to(tl.int64) * out_t + d[None, :]
                full = inside[:, None] & (d < D)[None, :]
                tl.store(OUT + to, out.to(OUT.dtype.element_ty), mask=full)


@triton.jit(do_not_specialize=SIZES)
def rows_backward_kernel(
    Q, K, V, ALPHA, SLOPES, QUERY_POSITION, KEY_POSITION, KEYS, FIRST, COUNT, IN_TILES, TAU, OUT, D_OUT,
    DELTA, COLUMN_COUNT, DQ, D_ALPHA,
    scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, dq_b, dq_h, dq_t,
    heads, ratio, query_length, row_stride, key_length, blocks, capacity, high_keys: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    FORMULA: tl.constexpr, HAS_ALIBI: tl.constexpr, ALPHA_GRADIENT: tl.constexpr,
):  # fmt: skip
    """dq and delta = sum u dP / sum u for ROWS queries, TURNS times; counts the pairs of each key in COLUMN_COUNT.

    DQ and OUT have strides dq_*. D_ALPHA (B, H, S): the row's share of the gradient for alpha.
    """
    bh = program_head()
    ROUGH: tl.constexpr = Q.dtype.element_ty != tl.float32
    tl.static_assert(BLOCK_M % (TURNS * ROWS) == 0, "all rows of a program belong to one block")
    block = tl.program_id(0) * (TURNS * ROWS) // BLOCK_M
    on_lists = tl.load(IN_TILES + bh * blocks + block) == 0
    # A body without high halves and one with them: to ask at every load would take 3 to 7 % of the time.
    for WIDE in tl.static_range(2):
        high = high_keys if WIDE else None
        if on_lists & ((high_keys > 0) == WIDE):
            b = (bh // heads).to(tl.int64)
            h = bh % heads
            group = (h // ratio).to(tl.int64)
            d = tl.arange(0, BLOCK_D)
            c = tl.arange(0, PAIRS)
            alpha = tl.load(ALPHA + h).to(tl.float32)
            r = 1.0 / (alpha - 1.0)
            slope = 0.0
            if HAS_ALIBI:
                slope = tl.load(SLOPES + bh)
                positions = KEY_POSITION + (b * (heads // ratio) + group) * key_length
            k_head = K + (b * k_b + group * k_h)
            v_head = V + (b * v_b + group * v_h)
            column_count = COLUMN_COUNT + (b * (heads // ratio) + group) * key_length
            for turn in range(0, TURNS):
                row = (tl.program_id(0) * TURNS + turn) * ROWS + tl.arange(0, ROWS)
                inside = row < query_length
                at = bh.to(tl.int64) * row_stride + row
                slab = (bh.to(tl.int64) * blocks + block) * capacity
                first, count = load_lists(FIRST, COUNT, at, inside, slab)
                tau = tl.load(TAU + at, mask=inside, other=0.0)
                q = load_rows(Q, b, h, row, inside, q_b, q_h, q_t, d, D, BLOCK_D).to(tl.float32)
                d_out = load_rows(D_OUT, b, h, row, inside, o_b, o_h, o_t, d, D, BLOCK_D).to(tl.float32)
                like_q = b * dq_b + h.to(tl.int64) * dq_h + row[:, None].to(tl.int64) * dq_t + d[None, :]
                out = load_tile(OUT + like_q, d[None, :] < D, inside[:, None], D == BLOCK_D)
                near = near_delta(d_out, out)
                query_position = row
                if HAS_ALIBI:
                    query_position = tl.load(QUERY_POSITION + at, mask=inside, other=0)
                dq = tl.zeros((ROWS, BLOCK_D), tl.float32)
                k_mean = tl.zeros((ROWS, BLOCK_D), tl.float32)
                u_sum = tl.zeros((ROWS,), tl.float32)
                delta = tl.zeros((ROWS,), tl.float32)
                w_sum = tl.zeros((ROWS,), tl.float32)
                w_dp = tl.zeros((ROWS,), tl.float32)
                for begin in range(0, tl.max(count, 0), PAIRS):
                    live = (begin + c)[None, :] < count[:, None]
                    key = load_listed(KEYS, first[:, None] + (begin + c)[None, :], live, high)
                    k = gather(k_head, key, live, k_t, d, D, BLOCK_D)
                    v = gather(v_head, key, live, v_t, d, D, BLOCK_D)
                    key_position = key
                    if HAS_ALIBI:
                        key_position = tl.load(positions + key, mask=live, other=0)
                    z = pair_scores(q[:, None, :], k, scale, slope, query_position[:, None], key_position, HAS_ALIBI)
                    distance = tl.where(live, z * (alpha - 1.0) - tau[:, None], 0.0)
                    p, u = entmax_weights(distance, r, FORMULA, ROUGH)
                    dp = tl.sum(d_out[:, None, :] * v, 2) - near[:, None]
                    dq += tl.sum((u * dp)[:, :, None] * k, 1)
                    k_mean += tl.sum(u[:, :, None] * k, 1)
                    u_sum += tl.sum(u, 1)
                    delta += tl.sum(u * dp, 1)
                    tl.atomic_add(column_count + key, 1, mask=live, sem="relaxed")
                    if ALPHA_GRADIENT:
                        w = alpha_weights(p, distance, ROUGH)
                        w_sum += tl.sum(w, 1)
                        w_dp += tl.sum(w * dp, 1)
                delta = delta / tl.where(u_sum > 0.0, u_sum, 1.0)
                dq = (dq - delta[:, None] * k_mean) * scale
                full = inside[:, None] & (d < D)[None, :]
                tl.store(DQ + like_q, dq.to(DQ.dtype.element_ty), mask=full)
                tl.store(DELTA + at, delta + near, mask=inside)
                if ALPHA_GRADIENT:
                    tl.store(D_ALPHA + at, (w_dp - delta * w_sum) * (128.0 * r * r), mask=inside)
