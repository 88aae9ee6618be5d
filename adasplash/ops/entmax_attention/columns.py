"""Entmax attention on support lists, key by key: the lists transposed, and dk and dv from them.

Each key's column holds the queries that give it weight, in ascending order, so that sums do not depend on who came first.
Columns longer than `longest`, of keys that very many queries attend to (sinks), are left to tile mode.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..entmax_formulas import entmax_weights
from ..jit import SIZES, load_rows, program_head
from .lists import load_listed, load_lists, load_pairs, pair_scores, store_listed

WIDEST_SORT = tl.constexpr(128)  # entries that one column is sorted among


@triton.jit(do_not_specialize=SIZES)
def lay_out_columns_kernel(
    COLUMN_COUNT, CURSOR, SINKS, SINK_COUNT, key_length, region, sinks_at_most, longest, AT_ONCE: tl.constexpr
):
    """One program per (batch, key head): where each column's entries begin, and the list of columns above `longest`.

    CURSOR (B * G, Tk, 2) int64: begin and length of a column; a head's columns lie in its `region` of entries.
    """
    bg = tl.program_id(0).to(tl.int64)
    next_entry = bg * region
    sinks = 0
    for begin in range(0, key_length, AT_ONCE):
        key = begin + tl.arange(0, AT_ONCE)
        inside = key < key_length
        count = tl.load(COLUMN_COUNT + bg * key_length + key, mask=inside, other=0)
        at = 2 * (bg * key_length + key)
        tl.store(CURSOR + at, next_entry + tl.cumsum(count, 0) - count, mask=inside)
        tl.store(CURSOR + at + 1, count.to(tl.int64), mask=inside)
        next_entry += tl.sum(count, 0)
        sink = (count > longest).to(tl.int32)
        tl.store(SINKS + bg * sinks_at_most + sinks + tl.cumsum(sink, 0) - sink, key, mask=sink > 0)
        sinks += tl.sum(sink, 0)
    tl.store(SINK_COUNT + bg, sinks)


@triton.jit(do_not_specialize=SIZES)
def transpose_kernel(
    KEYS, FIRST, COUNT, IN_TILES, CURSOR, QUERIES,
    heads, ratio, query_length, row_stride, key_length, blocks, capacity, longest,
    high_keys: tl.int64, high_queries: tl.int64,
    BLOCK_M: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Enters each pair into its key's column: QUERIES holds (head in group) * Tq + row, in the order of arrival.

    Moves the begins in CURSOR to the ends. Columns above `longest` stay out: such sinks are cheaper as dense tiles.
    """
    bh = program_head()
    tl.static_assert(BLOCK_M % (TURNS * ROWS) == 0, "all rows of a program belong to one block")
    block = tl.program_id(0) * (TURNS * ROWS) // BLOCK_M
    if tl.load(IN_TILES + bh * blocks + block) == 0:
        c = tl.arange(0, PAIRS)
        slab = (bh.to(tl.int64) * blocks + block) * capacity
        column = (bh // ratio).to(tl.int64) * key_length
        for turn in range(0, TURNS):
            row = (tl.program_id(0) * TURNS + turn) * ROWS + tl.arange(0, ROWS)
            inside = row < query_length
            at = bh.to(tl.int64) * row_stride + row
            first, count = load_lists(FIRST, COUNT, at, inside, slab)
            entry = bh % ratio * query_length + row
            for begin in range(0, tl.max(count, 0), PAIRS):
                live = (begin + c)[None, :] < count[:, None]
                key = column + load_listed(KEYS, first[:, None] + (begin + c)[None, :], live, high_keys)
                live = live & (tl.load(CURSOR + 2 * key + 1, mask=live, other=0) <= longest)
                to = tl.atomic_add(CURSOR + 2 * key, 1, mask=live, sem="relaxed")
                store_listed(QUERIES, to, tl.broadcast_to(entry[:, None], (ROWS, PAIRS)), live, high_queries)


@triton.jit
def sort_columns(QUERIES, begin, length, high_queries, WIDTH: tl.constexpr):
    """Sorts columns of at most WIDTH entries in place."""
    e = tl.arange(0, WIDTH)[None, :]
    live = e < length[:, None]
    entry = tl.where(live, load_listed(QUERIES, begin[:, None] + e, live, high_queries), 2147483647)
    store_listed(QUERIES, begin[:, None] + e, tl.sort(entry, 1), live, high_queries)


@triton.jit(do_not_specialize=SIZES)
def sort_columns_kernel(
    CURSOR, QUERIES, columns, longest, high_queries: tl.int64, TURNS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Puts the entries of each column in ascending order: what depends on the order of arrival ends here.

    Turns the ends in CURSOR back into begins, and the lengths of columns above `longest` (at most WIDEST_SORT) into 0.
    """
    for turn in range(0, TURNS):
        at = (tl.program_id(0).to(tl.int64) * TURNS + turn) * COLUMNS + tl.arange(0, COLUMNS)
        inside = at < columns
        length = tl.load(CURSOR + 2 * at + 1, mask=inside, other=0)
        length = tl.where(length <= longest, length, 0)
        begin = tl.load(CURSOR + 2 * at, mask=inside, other=0) - length
        tl.store(CURSOR + 2 * at, begin, mask=inside)
        tl.store(CURSOR + 2 * at + 1, length, mask=inside)
        most = tl.max(length, 0)
        if most > 64:
            sort_columns(QUERIES, begin, length, high_queries, WIDEST_SORT)
        elif most > 32:
            sort_columns(QUERIES, begin, length, high_queries, 64)
        elif most > 16:
            sort_columns(QUERIES, begin, length, high_queries, 32)
        elif most > 1:
            sort_columns(QUERIES, begin, length, high_queries, 16)


@triton.jit(do_not_specialize=SIZES)
def columns_backward_kernel(
    Q, K, V, ALPHA, SLOPES, QUERY_POSITION, KEY_POSITION, CURSOR, QUERIES, TAU, DELTA, D_OUT, DK, DV,
    scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    groups, ratio, query_length, row_stride, key_length, high_queries: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    FORMULA: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """dk and dv of ROWS keys, TURNS times, from the transposed lists, in ascending order of (head, query): deterministic."""
    bg = program_head()
    b = (bg // groups).to(tl.int64)
    group = bg % groups
    first_head = bg * ratio  # of all B * H
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, PAIRS)
    for turn in range(0, TURNS):
        key = (tl.program_id(0) * TURNS + turn) * ROWS + tl.arange(0, ROWS)
        inside = key < key_length
        at = bg.to(tl.int64) * key_length + key
        length = tl.load(CURSOR + 2 * at + 1, mask=inside, other=0)
        begin_at = tl.load(CURSOR + 2 * at, mask=inside, other=0)
        most = tl.max(length, 0)
        k = load_rows(K, b, group, key, inside, k_b, k_h, k_t, d, D, BLOCK_D).to(tl.float32)
        v = load_rows(V, b, group, key, inside, v_b, v_h, v_t, d, D, BLOCK_D).to(tl.float32)
        key_position = key
        if HAS_ALIBI:
            key_position = tl.load(KEY_POSITION + at, mask=inside, other=0)
        dk = tl.zeros((ROWS, BLOCK_D), tl.float32)
        dv = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for begin in range(0, most, PAIRS):
            live = (begin + c)[None, :] < length[:, None]
            entry = load_listed(QUERIES, begin_at[:, None] + (begin + c)[None, :], live, high_queries)
            if ratio == 1:  # then Triton knows it
                local = tl.zeros_like(entry)
                row = entry
            else:
                local = entry // query_length
                row = entry % query_length
            head = (first_head % (groups * ratio) + local).to(tl.int64)
            q_at = Q + b * q_b + (head * q_h + row.to(tl.int64) * q_t)
            q = load_pairs(q_at, live, d, D, BLOCK_D)
            o_at = D_OUT + b * o_b + (head * o_h + row.to(tl.int64) * o_t)
            d_out = load_pairs(o_at, live, d, D, BLOCK_D)
            at_row = (first_head + local).to(tl.int64) * row_stride + row
            tau = tl.load(TAU + at_row, mask=live, other=0.0)
            delta = tl.load(DELTA + at_row, mask=live, other=0.0)
            alpha = tl.load(ALPHA).to(tl.float32)  # of all heads
            if FORMULA == 0:
                alpha = tl.load(ALPHA + head, mask=live, other=1.5).to(tl.float32)
            slope = 0.0
            query_position = row
            if HAS_ALIBI:
                slope = tl.load(SLOPES + first_head + local, mask=live, other=0.0)
                query_position = tl.load(QUERY_POSITION + at_row, mask=live, other=0)
            z = pair_scores(q, k[:, None, :], scale, slope, query_position, key_position[:, None], HAS_ALIBI)
            distance = tl.where(live, z * (alpha - 1.0) - tau, 0.0)
            p, u = entmax_weights(distance, 1.0 / (alpha - 1.0), FORMULA, Q.dtype.element_ty != tl.float32)
            ds = u * (tl.sum(d_out * v[:, None, :], 2) - delta)
            dk += tl.sum(ds[:, :, None] * q, 1)
            dv += tl.sum(p[:, :, None] * d_out, 1)
        full = inside[:, None] & (d < D)[None, :]
        dk_at = DK + b * dk_b + group.to(tl.int64) * dk_h + key[:, None].to(tl.int64) * dk_t + d[None, :]
        dv_at = DV + b * dv_b + group.to(tl.int64) * dv_h + key[:, None].to(tl.int64) * dv_t + d[None, :]
        tl.store(dk_at, (dk * scale).to(DK.dtype.element_ty), mask=full)
        tl.store(dv_at, dv.to(DV.dtype.element_ty), mask=full)
