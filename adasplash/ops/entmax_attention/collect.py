"""From scores to support: one dense pass leaves, for each query, a short list of keys that holds its whole support.

A program takes a block of queries and walks over its key tiles from the right. The threshold of any subset of a row is a
lower bound of the row's own threshold (the more terms, the larger), and what lies below it is never in the support. So
each row carries the bound of the tile maxima seen so far; a tile whose maximum lies above it makes an entry: the tile,
its maximum, and a bit for each key above the bound. After the walk, the threshold of all entries' maxima is a nearly
tight bound; only the entries whose maximum lies above it have their bits turned into keys, which go to the block's slab
of KEYS, row after row. A block whose entries do not fit, or which has more keys than `room_for_keys` grants it, is left to
tile mode. Nothing is dropped that could be in the support: the bounds are lowered by all that rounding can do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..entmax_formulas import entmax_weights, newton_step
from ..jit import (
    SIZES,
    load_rows,
    load_tile,
    max_or_nan,
    popcount,
    program_head,
    score_tile,
    store_block_range,
    visible_tiles,
)
from .lists import store_listed

SLACK = tl.constexpr(2.0**-12)
ROUGH = tl.constexpr(True)  # logarithms: the slack is wide enough for them
# Turns a score's difference to a limit into 0 or 1 with one saturating multiplication: none is below 2^-60.
STEEP = tl.constexpr(2.0**60)


@triton.jit(do_not_specialize=SIZES)
def key_norm_kernel(
    K, KEY_NORM, k_b, k_h, k_t, groups, key_length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """KEY_NORM[b, g] = max |k| over the finite keys, zero before; positive floats are ordered as the integers of their bits."""
    bg = program_head()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    at = K + (bg // groups).to(tl.int64) * k_b + (bg % groups).to(tl.int64) * k_h
    k = load_tile(
        at + row[:, None].to(tl.int64) * k_t + d[None, :], d[None, :] < D, row[:, None] < key_length, D == BLOCK_D
    )
    k = k.to(tl.float32)
    squares = tl.where(tl.sum(tl.abs(k), 1) < float("inf"), tl.sum(k * k, 1), 0.0)
    norm = tl.sqrt(tl.max(squares, 0))
    tl.atomic_max(KEY_NORM + bg, norm.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def raise_bound(bound, slope, tile_top, z_scale, r, FORMULA: tl.constexpr):
    """The row's bound, a raw score, raised by one more tile maximum.

    With z = z_scale * raw, sum p over the maxima seen is at least 1 at the bound, so that the bound is below the row's
    threshold. sum p is convex in the bound: a tile that adds p = d ** r allows it to rise by p / (r * slope) in z, slope
    being at least sum u there. A maximum more than 1 above the bound in z starts afresh, alone.
    """
    p, u = entmax_weights(tl.where(tile_top > bound, (tile_top - bound) * z_scale, 0.0), r, FORMULA, ROUGH)
    alone = tile_top - 1.0 / z_scale
    afresh = alone > bound
    slope = tl.where(afresh, 1.0, slope + u)
    inverse = tl.rsqrt(r * z_scale * slope)  # of its root: cheaper than a quotient
    bound = tl.where(afresh, alone, bound + p * (inverse * inverse))
    # A row with a score that is not finite has no threshold: its bound is NaN from here on, and so will its output be.
    return tl.where(tile_top < float("inf"), bound, float("nan")), slope


@triton.jit
def room_for_keys(capacity, few_keys, scores_per_key, rows, visible):
    """How many keys the lists of a block may hold that sees so many; more are faster in tile mode, though the slab has room."""
    return tl.minimum(capacity, rows * (few_keys + visible // scores_per_key))


@triton.jit
def bit_limit(bound, margin):
    """What a score has to exceed for its bit: never so near 0 that a difference to it could be below 1 / STEEP."""
    limit = bound - margin
    return tl.where(tl.abs(limit) < 2.0**-30, -(2.0**-30), limit)


@triton.jit
def of_entries(record, e, field, BLOCK_M: tl.constexpr):
    """Pointers (M, E) to a field of the entries e (1, E) of all rows."""
    # Hints for the layout alone. "Contiguous" is untrue: by it neighbouring threads take rows, not entries, with every version of
    # Triton. "Multiple of 4" bytes keeps it harmless: by it each number is loaded by itself, never as a wider piece.
    return tl.max_contiguous(tl.multiple_of(record + (e * (BLOCK_M * 8) + field), (4, 4)), (2, 1))


@triton.jit
def words_of_entries(record, e, BLOCK_M: tl.constexpr):
    """Pointers (M, E, 4) to the words of the entries e (1, E) of all rows, with the hints of `of_entries`."""
    word = tl.arange(0, 4)[None, None, :]
    at = (record + e * (BLOCK_M * 8))[:, :, None] + 2 * word
    return tl.max_contiguous(tl.multiple_of(at, (4, 4, 4)), (4, 2, 1))


@triton.jit
def entry_tops(record, e, live, BLOCK_M: tl.constexpr):
    """The tile maxima of the entries e (1, E); -inf where not live (M, E)."""
    top = tl.load(of_entries(record, e, 1, BLOCK_M), mask=live, other=-8388608)  # the bits of -inf
    return top.to(tl.float32, bitcast=True)


@triton.jit
def mark_tile(
    raw, tile, bound, slope, found, margin, z_scale, r, value, half, RECORDS, entries,
    BLOCK_M: tl.constexpr, HALVES: tl.constexpr, EIGHTS: tl.constexpr, FORMULA: tl.constexpr,
):  # fmt: skip
    """Enters a tile's scores (M, N) for the rows whose bound they exceed; returns bound, slope and found.

    An entry of a row is 8 int32: at the even places 4 words of bits, then the tile's maximum (place 1), the tile (3).
    """
    apart = tl.reshape(raw, (BLOCK_M, HALVES, EIGHTS, 4, 2))
    top = max_or_nan(max_or_nan(max_or_nan(max_or_nan(apart, 4), 2), 1), 1)
    hit = top > bound - margin
    bound, slope = raise_bound(bound, slope, top, z_scale, r, FORMULA)
    limit = bit_limit(bound, margin)
    steep = tl.where(
        tl.abs(limit) > 2.0**30, 1.0, STEEP
    )  # so far from 0, differences are above 1, and 2^60 times as much overflows
    above = apart * steep[:, None, None, None, None] - (limit * steep)[:, None, None, None, None]
    above = tl.minimum(tl.maximum(above, 0.0), 1.0)
    pairs = tl.sum(
        above * tl.where(tl.arange(0, 2) > 0, 2.0, 1.0)[None, None, None, None, :], 4
    )  # (M, HALVES, EIGHTS, 4)
    words = tl.sum(tl.sum(pairs * value, 2).to(tl.int32) << half, 1)  # (M, 4)
    word = tl.arange(0, 4)[None, :]
    record = tl.join(words, tl.where(word == 0, top.to(tl.int32, bitcast=True)[:, None], tile))  # (M, 4, 2)
    to = tl.where(hit & (found < entries), found * (BLOCK_M * 8) + tl.arange(0, BLOCK_M) * 8, -1)[:, None, None]
    place = 2 * word[:, :, None] + tl.arange(0, 2)[None, None, :]
    tl.store(RECORDS + (to + place), record, mask=to >= 0)
    return bound, slope, found + hit.to(tl.int32)


@triton.jit
def settle(record, bound, slope, found, margin, z_scale, r, BLOCK_M: tl.constexpr, FORMULA: tl.constexpr):
    """Raises the bound to the threshold of the entries' maxima, nearly, and drops the entries below it."""
    tl.debug_barrier()
    most = tl.max(found, 0)
    c = tl.arange(0, 16)
    for _ in tl.static_range(2):
        mass = tl.zeros((BLOCK_M,), tl.float32)
        u_sum = tl.zeros((BLOCK_M,), tl.float32)
        for begin in range(0, most, 16):
            e = (begin + c)[None, :]
            top = entry_tops(record, e, e < found[:, None], BLOCK_M)
            distance = tl.where(top > bound[:, None], (top - bound[:, None]) * z_scale, 0.0)
            p, u = entmax_weights(distance, r, FORMULA, ROUGH)
            mass += tl.sum(p, 1)
            u_sum += tl.sum(u, 1)
        # Where the entries alone have sum p >= 1 they are what the bound rests on from here; at it, sum u is smaller still.
        slope = tl.where(mass >= 1.0, u_sum, slope)
        bound += tl.maximum(newton_step(mass, u_sum, r, FORMULA), 0.0) / z_scale
    kept = tl.zeros((BLOCK_M,), tl.int32)
    c = tl.arange(0, 4)
    for begin in range(0, most, 4):
        e = (begin + c)[None, :]
        stay = entry_tops(record, e, e < found[:, None], BLOCK_M) > (bound - margin)[:, None]
        at = (record + e * (BLOCK_M * 8))[:, :, None] + tl.arange(0, 8)[None, None, :]
        content = tl.load(at, mask=stay[:, :, None], other=0)
        to = kept[:, None] + tl.cumsum(stay.to(tl.int32), 1) - 1
        kept += tl.sum(stay.to(tl.int32), 1)
        tl.debug_barrier()  # all have read what is about to be overwritten
        to = (record + to * (BLOCK_M * 8))[:, :, None] + tl.arange(0, 8)[None, None, :]
        tl.store(to, content, mask=stay[:, :, None])
    tl.debug_barrier()
    return bound, slope, kept


@triton.jit(do_not_specialize=SIZES)
def collect_kernel(
    Q, K, KEY_NORM, START, STOP, ALPHA, SLOPES, QUERY_POSITION, KEY_POSITION,
    WORK, RECORDS, KEYS, FIRST, COUNT, BOUND, IN_TILES, BLOCK_RANGE,
    scale, q_b, q_h, q_t, k_b, k_h, k_t, range_b, range_h,
    batch_heads, heads, ratio, query_length, row_stride, key_length, blocks, entries, capacity, few_keys, scores_per_key,
    high_keys: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FORMULA: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per slot of RECORDS (slots, entries, M, 8).

    Programs take blocks of queries as they come free, the last ones first: WORK, 0 before, counts those that are taken.
    """
    slot = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    # A row's columns of a tile are dealt to 4 words as the tensor cores deal them to 4 threads: two neighbours each, in
    # turn. So a word is formed within a thread. Column of bit b of word w: 64 (b // 16) + 8 (b % 16 // 2) + 2 w + b % 2.
    HALVES: tl.constexpr = 2 if BLOCK_N == 128 else 1
    EIGHTS: tl.constexpr = BLOCK_N // (8 * HALVES)
    word = tl.arange(0, 4)[None, None, :]
    value = (1 << 2 * tl.arange(0, EIGHTS)).to(tl.float32)[None, None, :, None]
    half = (16 * tl.arange(0, HALVES))[None, :, None]
    RECORDS += slot * entries * (BLOCK_M * 8)
    record = RECORDS + (m * 8)[:, None]

    work = tl.atomic_add(WORK, 1, sem="relaxed")
    while work < blocks * batch_heads:
        block = blocks - 1 - work // batch_heads
        bh = work % batch_heads
        b = (bh // heads).to(tl.int64)
        h = bh % heads
        row = block * BLOCK_M + m
        inside = row < query_length
        at = b * range_b + h.to(tl.int64) * range_h + row
        start = tl.load(START + at, mask=inside, other=0)
        stop = tl.load(STOP + at, mask=inside, other=0)
        seeing = stop > start
        first_tile, full_first, full_last, last_tile = visible_tiles(start, stop, key_length, BLOCK_N)

        q = load_rows(Q, b, h, row, inside, q_b, q_h, q_t, d, D, BLOCK_D)
        group = h // ratio
        k_at = K + b * k_b + group.to(tl.int64) * k_h + n[None, :].to(tl.int64) * k_t + d[:, None]
        alpha = tl.load(ALPHA + h).to(tl.float32)
        z_scale = (alpha - 1.0) * scale
        r = 1.0 / (alpha - 1.0)
        groups = heads // ratio
        slope_alibi = 0.0
        query_position = row
        key_position = KEY_POSITION
        # A score summed in another order differs by at most D |q| |k| 2^-23; each rise of the bound rounds once, and the
        # sums and powers behind the rises err by less than SLACK in z.
        wide = q.to(tl.float32)
        margin = tl.sqrt(tl.sum(wide * wide, 1)) * tl.load(KEY_NORM + b * groups + group).to(tl.float32, bitcast=True)
        if HAS_ALIBI:
            slope_alibi = tl.load(SLOPES + bh) / scale
            query_position = tl.load(QUERY_POSITION + bh.to(tl.int64) * row_stride + row, mask=inside, other=0)
            key_position = KEY_POSITION + (b * groups + group) * key_length
            margin = 2.0 * margin + 1.0 / z_scale  # |bias| <= |q| |k| + |score| where it matters
        margin = margin * ((D + 8 + last_tile - first_tile) * 2.0**-22) + 1.0 / z_scale * SLACK
        margin = tl.where(margin == margin, margin, float("inf"))  # 0 times a norm that overflows

        bound = tl.where(seeing, float("-inf"), float("inf"))  # a row that sees nothing makes no entries
        slope = tl.full((BLOCK_M,), 1.0, tl.float32)
        found = tl.zeros((BLOCK_M,), tl.int32)

        # Both edges, under a mask.
        left = full_first - first_tile
        for step in range(0, left + last_tile - full_last):
            tile = tl.where(step < left, first_tile + step, full_last + step - left)
            column = tile * BLOCK_N + n
            in_length = column[None, :] < key_length
            k = load_tile(k_at + (tile * BLOCK_N).to(tl.int64) * k_t, d[:, None] < D, in_length, D == BLOCK_D)
            place = column
            if HAS_ALIBI:
                place = tl.load(key_position + column, mask=column < key_length, other=0)
            raw = score_tile(q, k, query_position, place, slope_alibi, HAS_ALIBI, PRECISION)
            from_here = (start - tile * BLOCK_N)[:, None]
            to_here = (stop - tile * BLOCK_N)[:, None]
            raw = tl.where((n[None, :] >= from_here) & (n[None, :] < to_here), raw, float("-inf"))
            bound, slope, found = mark_tile(
                raw, tile, bound, slope, found, margin, z_scale, r, value, half, RECORDS, entries,
                BLOCK_M, HALVES, EIGHTS, FORMULA,
            )  # fmt: skip

        # The walk, in stretches of 32, 64, 128, ... tiles: after each the bound is tightened and the entries are thinned out.
        stretches = tl.sum((32 * ((1 << tl.arange(0, 16)) - 1) < full_last - full_first).to(tl.int32), 0)
        lost = 0
        for stretch in range(0, tl.maximum(stretches, 1)):
            done = 32 * ((1 << stretch) - 1)
            bound_before, slope_before, found_before = bound, slope, found
            bound = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            slope = tl.full((BLOCK_M,), 1.0, tl.float32)
            found = tl.zeros((BLOCK_M,), tl.int32)
            for step in tl.range(
                0, tl.maximum(tl.minimum(32 << stretch, full_last - full_first - done), 0), num_stages=STAGES
            ):
                # Taken over here, and not before the loop, these stay in the layout of the scores and not in settle's.
                bound = tl.where(step == 0, bound_before, bound)
                slope = tl.where(step == 0, slope_before, slope)
                found = tl.where(step == 0, found_before, found)
                tile = full_last - 1 - done - step
                k = load_tile(k_at + (tile * BLOCK_N).to(tl.int64) * k_t, d[:, None] < D, None, D == BLOCK_D)
                place = n
                if HAS_ALIBI:
                    place = tl.load(key_position + tile * BLOCK_N + n)
                raw = score_tile(q, k, query_position, place, slope_alibi, HAS_ALIBI, PRECISION)
                bound, slope, found = mark_tile(
                    raw, tile, bound, slope, found, margin, z_scale, r, value, half, RECORDS, entries,
                    BLOCK_M, HALVES, EIGHTS, FORMULA,
                )  # fmt: skip
            walked = full_last - full_first > done
            bound = tl.where(walked, bound, bound_before)
            slope = tl.where(walked, slope, slope_before)
            found = tl.where(walked, found, found_before)
            lost = tl.maximum(lost, tl.max(found, 0) - entries)
            found = tl.minimum(found, entries)
            bound, slope, found = settle(record, bound, slope, found, margin, z_scale, r, BLOCK_M, FORMULA)
        found = tl.where(seeing, found, 0)
        most = tl.max(found, 0)

        # The keys of the entries left: counted first, for each row's place in the slab.
        e4 = tl.arange(0, 4)
        count = tl.zeros((BLOCK_M,), tl.int32)
        for begin in range(0, most, 4):
            e = (begin + e4)[None, :]
            live = e < found[:, None]
            words = tl.load(words_of_entries(record, e, BLOCK_M), mask=live[:, :, None], other=0)
            count += tl.sum(tl.sum(popcount(words), 2), 1)
        first = tl.cumsum(count, 0) - count
        room = room_for_keys(capacity, few_keys, scores_per_key, BLOCK_M, (last_tile - first_tile) * BLOCK_N)
        fits = (tl.sum(count, 0) <= room) & (lost <= 0)
        slab = (bh.to(tl.int64) * blocks + block) * capacity
        at = bh.to(tl.int64) * row_stride + row
        tl.store(IN_TILES + bh * blocks + block, tl.where(fits, 0, 1))
        store_block_range(BLOCK_RANGE, bh * blocks + block, start, stop, key_length)
        tl.store(FIRST + at, first, mask=inside)
        tl.store(COUNT + at, tl.where(fits, count, 0), mask=inside)
        tl.store(BOUND + at, tl.where(seeing, bound, 0.0), mask=inside)
        if fits:
            place = first
            for begin in range(0, most, 4):
                e = (begin + e4)[None, :]
                live = e < found[:, None]
                tile = tl.load(of_entries(record, e, 3, BLOCK_M), mask=live, other=0)
                words = tl.load(words_of_entries(record, e, BLOCK_M), mask=live[:, :, None], other=0)
                here = popcount(words)  # (M, 4 entries, 4 words)
                in_entry = tl.sum(here, 2)
                before = place[:, None] + tl.cumsum(in_entry, 1) - in_entry
                to = before[:, :, None] + tl.cumsum(here, 2) - here
                place += tl.sum(in_entry, 1)
                base = tile[:, :, None] * BLOCK_N + 2 * word
                for _bit in range(0, tl.max(tl.max(tl.max(here, 2), 1), 0)):
                    b_ = popcount((words & -words) - 1)
                    column = base + 64 * (b_ // 16) + 8 * (b_ % 16 // 2) + b_ % 2
                    store_listed(KEYS, slab + to, column, words != 0, high_keys)
                    to += 1
                    words = words & (words - 1)
        work = tl.atomic_add(WORK, 1, sem="relaxed")
        tl.debug_barrier()
