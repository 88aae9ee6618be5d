"""Entries of the collect kernel for Hopper, in Gluon: a tile's scores become one, entries are thinned out, and become keys.
For a block that is to be computed in tile mode, a tile's scores become four tops.

An entry of a row is 8 int32: at the even places 4 words of bits, then the tile's maximum (place 1) and the tile (3). The scores
of a tile are looked at as pairs of float16, two to a register; `mark_tile` deals their bits to the words, `write_keys` reads
them. Column of bit b of word w: 64 (b // 8 % 2) + 8 (b % 8) + 2 w + b // 16.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..entmax_formulas import entmax_weights, newton_step
from ..jit import larger_or_nan, popcount
from .collect import ROUGH, raise_bound
from .lists import store_listed

# The name differs between triton 3.6 and its successors.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

TOPS_AT_ONCE = gl.constexpr(16)
ENTRIES_AT_ONCE = gl.constexpr(4)
TOPS_OF_TILE = gl.constexpr(4)
PLACES_AT_ONCE = gl.constexpr(4)


@gluon.jit
def plus(a, b):
    return a + b


@gluon.jit
def running_sum(x, axis: gl.constexpr, BLOCKED: gl.constexpr):
    """cumsum, which there is for blocked layouts only: BLOCKED is x's layout under that name."""
    return gl.convert_layout(gl.associative_scan(gl.convert_layout(x, BLOCKED), axis, plus), x.type.layout)


@gluon.jit
def larger_of_pairs(a, b):
    return gl.inline_asm_elementwise("max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], gl.int32, is_pure=True, pack=1)


@gluon.jit
def larger_half(pair):
    """The larger one of a pair, in float32."""
    return gl.inline_asm_elementwise(
        "{ .reg .f16 a, b; mov.b32 {a, b}, $1; max.NaN.f16 a, a, b; cvt.f32.f16 $0, a; }",
        "=f,r", [pair], gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def sum_of_pairs(a, b):
    return gl.inline_asm_elementwise("add.f16x2 $0, $1, $2;", "=r,r,r", [a, b], gl.int32, is_pure=True, pack=1)


@gluon.jit
def pair_up(raw):
    """Scores (M, N) as pairs of float16, those of columns 64 h + 8 e + 2 w and the next at [:, h, e, w] of (M, N / 64, 8, 4)."""
    BLOCK_M: gl.constexpr = raw.shape[0]
    even, odd = gl.split(raw.reshape([BLOCK_M, raw.shape[1] // 64, 8, 4, 2]))
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [odd, even], gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def lowered(bound, margin):
    """The bound less what rounding can do: to scores as near to it as matters, twice 2 ** -11 of them in float16; and the margin."""
    return bound - (gl.abs(bound) * 2.0**-10 + margin)


@gluon.jit
def mark_tile(
    pairs, tile, raising, bound, slope, found, margin, z_scale, r, RECORDS, entries,
    FORMULA: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """As in collect.py, of scores as `pair_up` leaves them, which deals them to the bits in another order: a byte for each
    h, the even columns' before the odd ones'. Not raising: the tile has raised the bound before, and must not again.
    """
    BLOCK_M: gl.constexpr = pairs.shape[0]
    top = gl.reduce(gl.reduce(gl.reduce(pairs, 2, larger_of_pairs), 1, larger_of_pairs), 1, larger_of_pairs)
    top = larger_half(top)
    top = gl.convert_layout(top, ROW, assert_trivial=True)
    hit = top > lowered(bound, margin)
    raised, raised_slope = raise_bound(bound, slope, top, z_scale, r, FORMULA)
    bound, slope = gl.where(raising, raised, bound), gl.where(raising, raised_slope, slope)
    limit = gl.maximum(lowered(bound, margin), -65504.0)  # finite: masked keys, at -inf, do not reach it
    limit = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $1, $1;", "=r,f", [limit], gl.int32, is_pure=True, pack=1)
    of_row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, pairs.type.layout)))
    limit = gl.convert_layout(limit, of_row, assert_trivial=True)
    of_eight: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, pairs.type.layout)))
    value = (15 + gl.arange(0, 8, layout=of_eight) << 10) * 65537  # 2 ** e, twice
    above = gl.inline_asm_elementwise(
        "{ .reg .b32 t; set.ge.f16x2.f16x2 t, $1, $2; mul.f16x2 $0, t, $3; }",
        "=r,r,r,r", [pairs, limit[:, None, None, None], value[None, None, :, None]], gl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    # On top of 2 ** 10 the low bits of a float16 are its integer.
    bytes_ = gl.inline_asm_elementwise(
        "{ .reg .b32 t, m; mov.b32 m, 0x64006400; add.f16x2 t, $1, m; and.b32 $0, t, 0x00FF00FF; }",
        "=r,r", [gl.reduce(above, 2, sum_of_pairs)], gl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    of_half: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, bytes_.type.layout))
    words = gl.sum(bytes_ << (8 * gl.arange(0, pairs.shape[1], layout=of_half))[None, :, None], 1)  # (M, 4)
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, words.type.layout))[None, :]
    top_bits = gl.convert_layout(top, gl.SliceLayout(1, words.type.layout), assert_trivial=True).to(
        gl.int32, bitcast=True
    )
    record = gl.join(words, gl.where(word == 0, top_bits[:, None], tile))  # (M, 4, 2)
    RECORD: gl.constexpr = record.type.layout
    m = gl.arange(0, BLOCK_M, layout=ROW)
    to = gl.where(hit & (found < entries), (found * BLOCK_M + m) * 8, -8)
    to = gl.convert_layout(to, gl.SliceLayout(1, gl.SliceLayout(2, RECORD)), assert_trivial=True)[:, None, None]
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, RECORD)))[None, :, None]
    of_two = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, RECORD)))[None, None, :]
    gl.store(RECORDS + (to + (2 * word + of_two)), record, mask=to >= 0)
    return bound, slope, found + hit.to(gl.int32)


@gluon.jit
def settle(
    RECORDS, bound, slope, found, margin, z_scale, r, FORMULA: gl.constexpr, ENTRY: gl.constexpr, COUNT: gl.constexpr
):
    """As in collect.py, and returns the number of keys in the entries kept, too.

    Values of rows have a slice of a (M, TOPS_AT_ONCE) layout.
    """
    BLOCK_M: gl.constexpr = bound.shape[0]
    LIST: gl.constexpr = bound.type.layout.parent
    barrier()
    most = gl.max(found, 0)
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LIST))[:, None]
    c = gl.arange(0, TOPS_AT_ONCE, layout=gl.SliceLayout(0, LIST))[None, :]
    for _ in gl.static_range(2):
        mass = gl.zeros([BLOCK_M], gl.float32, layout=gl.SliceLayout(1, LIST))
        u_sum = mass
        for begin in range(0, most, TOPS_AT_ONCE):
            e = begin + c
            top = gl.load(RECORDS + ((e * BLOCK_M + m) * 8 + 1), mask=e < found[:, None], other=-8388608)
            top = top.to(gl.float32, bitcast=True)
            distance = gl.where(top > bound[:, None], (top - bound[:, None]) * z_scale, 0.0)
            p, u = entmax_weights(distance, r, FORMULA, ROUGH)
            mass += gl.sum(p, 1)
            u_sum += gl.sum(u, 1)
        slope = gl.where(mass >= 1.0, u_sum, slope)
        bound += gl.maximum(newton_step(mass, u_sum, r, FORMULA), 0.0) / z_scale

    # The entries that stay move up, without a barrier: an entry lies in one thread, and where it goes depends, by the
    # running sum, on all the entries of its row that it could overwrite.
    OF_ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, ENTRY))
    limit = gl.convert_layout(lowered(bound, margin), OF_ROW)[:, None]
    live = gl.convert_layout(found, OF_ROW)[:, None]
    m = gl.arange(0, BLOCK_M, layout=OF_ROW)[:, None]
    c = gl.arange(0, ENTRIES_AT_ONCE, layout=gl.SliceLayout(0, gl.SliceLayout(2, ENTRY)))[None, :]
    i = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, ENTRY)))[None, None, :]
    kept = gl.zeros([BLOCK_M], gl.int32, layout=OF_ROW)
    keys = kept
    ahead = gl.load(RECORDS + (((c * BLOCK_M + m) * 8)[:, :, None] + i), mask=(c < live)[:, :, None], other=0)
    for begin in range(0, most, ENTRIES_AT_ONCE):
        content = ahead
        e = begin + ENTRIES_AT_ONCE + c
        ahead = gl.load(RECORDS + (((e * BLOCK_M + m) * 8)[:, :, None] + i), mask=(e < live)[:, :, None], other=0)
        top = gl.sum(gl.where(i == 1, content, 0), 2).to(gl.float32, bitcast=True)
        stay = (top > limit) & (begin + c < live)
        to = kept[:, None] + running_sum(stay.to(gl.int32), 1, COUNT) - 1
        kept += gl.sum(stay.to(gl.int32), 1)
        bits = gl.sum(popcount(gl.where(i % 2 == 0, content, 0)), 2)
        keys += gl.sum(gl.where(stay, bits, 0), 1)
        gl.store(RECORDS + (((to * BLOCK_M + m) * 8)[:, :, None] + i), content, mask=stay[:, :, None])
    barrier()
    kept = gl.convert_layout(kept, gl.SliceLayout(1, LIST))
    return bound, slope, kept, gl.convert_layout(keys, gl.SliceLayout(1, LIST))


@gluon.jit
def write_keys(
    RECORDS, KEYS, first, found, most, high_keys, BLOCK_N: gl.constexpr, WORDS: gl.constexpr, COUNT: gl.constexpr
):
    """Turns the bits of the entries into keys, from place first[row] of KEYS on."""
    BLOCK_M: gl.constexpr = first.shape[0]
    OF_ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, WORDS))
    place = gl.convert_layout(first, OF_ROW)
    found = gl.convert_layout(found, OF_ROW)[:, None]
    m = gl.arange(0, BLOCK_M, layout=OF_ROW)[:, None]
    c = gl.arange(0, ENTRIES_AT_ONCE, layout=gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))[None, :]
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    entry = (c * BLOCK_M + m) * 8
    next_tile = gl.load(RECORDS + entry + 3, mask=c < found, other=0)
    next_words = gl.load(RECORDS + (entry[:, :, None] + 2 * word), mask=(c < found)[:, :, None], other=0)
    for begin in range(0, most, ENTRIES_AT_ONCE):
        tile, words = next_tile, next_words
        e = begin + ENTRIES_AT_ONCE + c
        entry = (e * BLOCK_M + m) * 8
        next_tile = gl.load(RECORDS + entry + 3, mask=e < found, other=0)
        next_words = gl.load(RECORDS + (entry[:, :, None] + 2 * word), mask=(e < found)[:, :, None], other=0)
        here = popcount(words)  # (M, 4 entries, 4 words)
        in_entry = gl.sum(here, 2)
        before = place[:, None] + running_sum(in_entry, 1, COUNT) - in_entry
        to = before[:, :, None] + running_sum(here, 2, WORDS) - here
        place += gl.sum(in_entry, 1)
        in_tile = tile[:, :, None] * BLOCK_N + 2 * word
        for _ in range(0, gl.max(gl.max(gl.max(here, 2), 1), 0)):
            bit = popcount((words & -words) - 1)
            column = in_tile + 64 * (bit // 8 % 2) + 8 * (bit % 8) + bit // 16
            store_listed(KEYS, to, column, words != 0, high_keys)
            to += 1
            words = words & (words - 1)


@gluon.jit
def note_tops(pairs, j, room, RECORDS):
    """Stores the largest score of each quarter of the tile of turn j (a quarter lies in one thread).

    RECORDS is (room, M, TOPS_OF_TILE) here; room is a power of two, and tiles so many turns apart share a place and its tops.
    """
    BLOCK_M: gl.constexpr = pairs.shape[0]
    top = larger_half(gl.reduce(gl.reduce(pairs, 2, larger_of_pairs), 1, larger_of_pairs))  # (M, TOPS_OF_TILE)
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, top.type.layout))[:, None]
    quarter = gl.arange(0, TOPS_OF_TILE, layout=gl.SliceLayout(0, top.type.layout))[None, :]
    at = RECORDS + (((j & (room - 1)) * BLOCK_M + m) * TOPS_OF_TILE + quarter)
    before = gl.load(at, mask=(m >= 0) & (j >= room), other=-8388608)  # the bits of -inf
    top = larger_or_nan(top, before.to(gl.float32, bitcast=True))
    gl.store(at, top.to(gl.int32, bitcast=True))


@gluon.jit
def settle_tops(RECORDS, bound, places, z_scale, r, FORMULA: gl.constexpr, QUARTER: gl.constexpr):
    """The bound (M,) raised to the threshold of the tops of so many places, nearly, and how many of them lie above it."""
    BLOCK_M: gl.constexpr = bound.shape[0]
    OF_ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, QUARTER))
    ROW: gl.constexpr = bound.type.layout
    barrier()
    bound = gl.convert_layout(bound, OF_ROW)
    m = gl.arange(0, BLOCK_M, layout=OF_ROW)[:, None]
    c = gl.arange(0, PLACES_AT_ONCE, layout=gl.SliceLayout(0, gl.SliceLayout(2, QUARTER)))[None, :]
    quarter = gl.arange(0, TOPS_OF_TILE, layout=gl.SliceLayout(0, gl.SliceLayout(1, QUARTER)))[None, None, :]
    above = gl.zeros([BLOCK_M], gl.int32, layout=OF_ROW)
    for _ in gl.static_range(3):
        mass = gl.zeros([BLOCK_M], gl.float32, layout=OF_ROW)
        u_sum = mass
        above = gl.zeros([BLOCK_M], gl.int32, layout=OF_ROW)
        for begin in range(0, places, PLACES_AT_ONCE):
            at = RECORDS + (((begin + c) * BLOCK_M + m) * TOPS_OF_TILE)[:, :, None] + quarter
            top = gl.load(at, mask=(begin + c < places)[:, :, None], other=-8388608).to(gl.float32, bitcast=True)
            hit = top > bound[:, None, None]
            p, u = entmax_weights(gl.where(hit, (top - bound[:, None, None]) * z_scale, 0.0), r, FORMULA, ROUGH)
            p = gl.where(top < float("inf"), p, float("nan"))
            mass += gl.sum(gl.sum(p, 2), 1)
            u_sum += gl.sum(gl.sum(u, 2), 1)
            above += gl.sum(gl.sum(hit.to(gl.int32), 2), 1)
        bound += gl.maximum(newton_step(mass, u_sum, r, FORMULA), 0.0) / z_scale
        bound = gl.where(mass == mass, bound, float("nan"))
    barrier()  # before others write where entries are
    return gl.convert_layout(bound, ROW), gl.sum(above, 0)
