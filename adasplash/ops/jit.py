"""Small pieces that several kernels share; launch_arguments.py has what their operators share."""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes of a call, which kernels are compiled without looking at: other lengths, batches and numbers of heads compile nothing
# anew. Strides of rows do count, since aligned rows are loaded in wider pieces; those of head dims that are multiples of 16 always
# are. So does the number of heads that share a key head.
SIZES = (
    "batch",
    "batch_heads",
    "blocks",
    "chunks",
    "columns",
    "groups",
    "heads",
    "high_keys",
    "high_queries",
    "key_length",
    "query_length",
    "query_rows",
    "range_b",
    "range_h",
    "seeing_buckets",
    "sinks_at_most",
    "slots",
)

INTERPRETED = triton.knobs.runtime.interpret
IN_PYTHON = tl.constexpr(INTERPRETED)


def sizes_without(*aligned: str) -> list[str]:
    """SIZES for a kernel that loads wider pieces where these are multiples of 16, which its operator may see to."""
    return [size for size in SIZES if size not in aligned]


@triton.jit
def program_head():
    """The place in (B, H) or (B, G) that this program of a grid (..., H, B) is for: one axis alone would end at 65,535."""
    return tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def load_tile(pointers, in_dim, in_length, FULL_DIM: tl.constexpr):
    """A tile with zeros outside; in_length None: wholly inside the sequence; FULL_DIM: the dim needs no mask either."""
    if in_length is None:
        if FULL_DIM:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=in_dim, other=0.0)
    else:
        if FULL_DIM:
            return tl.load(pointers, mask=in_length, other=0.0)
        else:
            return tl.load(pointers, mask=in_dim & in_length, other=0.0)


@triton.jit
def load_rows(X, b, h, row, inside, x_b, x_h, x_t, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (R,) of head h of X (B, H, T, D) as (R, BLOCK_D), zeros where not inside."""
    at = X + b * x_b + h.to(tl.int64) * x_h + row[:, None].to(tl.int64) * x_t + d[None, :]
    return load_tile(at, d[None, :] < D, inside[:, None], D == BLOCK_D)


@triton.jit
def visible_tiles(start, stop, key_length, BLOCK_N: tl.constexpr):
    """Of rows with these ranges: (first, full_first, full_last, last) key tiles.

    Tiles in [first, last) are seen by some row, those in [full_first, full_last) wholly by every row that sees anything.
    """
    seeing = stop > start
    first = tl.min(tl.where(seeing, start, key_length), 0) // BLOCK_N
    last = tl.maximum(tl.cdiv(tl.max(tl.where(seeing, stop, 0), 0), BLOCK_N), first)
    full_first = tl.cdiv(tl.max(tl.where(seeing, start, 0), 0), BLOCK_N)
    full_first = tl.minimum(tl.maximum(full_first, first), last)
    full_last = tl.min(tl.where(seeing, stop, key_length), 0) // BLOCK_N
    full_last = tl.maximum(tl.minimum(full_last, last), full_first)
    return first, full_first, full_last, last


@triton.jit
def load_per_row(pointers, inside, outside):
    """One value per row; `outside` where not inside; inside None: all rows are."""
    if inside is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=outside)


@triton.jit
def store_block_range(BLOCK_RANGE, block, start, stop, key_length):
    """BLOCK_RANGE[block] of 4 int32: first key and end of what some row of the block sees, then of what all of them see.

    Rows that see nothing do not count.
    """
    seeing = stop > start
    at = BLOCK_RANGE + block * 4
    tl.store(at, tl.min(tl.where(seeing, start, key_length), 0))
    tl.store(at + 1, tl.max(tl.where(seeing, stop, 0), 0))
    tl.store(at + 2, tl.max(tl.where(seeing, start, 0), 0))
    tl.store(at + 3, tl.min(tl.where(seeing, stop, key_length), 0))


@triton.jit
def seeing_blocks(BLOCK_RANGE, BLOCKS, todo, whole_blocks, first_key, end_key):
    """Which of `todo` query blocks see any of the keys [first_key, end_key): (lo, full_lo, full_hi, hi).

    BLOCKS: the blocks' numbers, ascending; None: 0, 1, 2, ... The places in BLOCKS from lo to hi hold all blocks that see such a
    key. Within them, those from full_lo to full_hi are the first run of blocks that need no mask: every row there sees all of
    the keys, or none of any, and rows of the latter kind must have an infinite threshold. Blocks from whole_blocks on are
    incomplete and never in the run.
    """
    lo = todo
    hi = 0
    full_lo = todo
    full_hi = todo
    for begin in range(0, todo, 128):
        index = begin + tl.arange(0, 128)
        here = index < todo
        block = index
        if BLOCKS is not None:
            block = tl.load(BLOCKS + index, mask=here, other=0)
        at = BLOCK_RANGE + block * 4
        live = here & (tl.load(at, mask=here, other=0) < end_key)
        live = live & (tl.load(at + 1, mask=here, other=0) > first_key)
        full = (block < whole_blocks) & (tl.load(at + 2, mask=here, other=0) <= first_key)
        full = full & (tl.load(at + 3, mask=here, other=0) >= end_key)
        lo = tl.minimum(lo, tl.min(tl.where(live, index, todo), 0))
        hi = tl.maximum(hi, tl.max(tl.where(live, index + 1, 0), 0))
        full_lo = tl.minimum(full_lo, tl.min(tl.where(live & full, index, todo), 0))
        full_hi = tl.minimum(full_hi, tl.min(tl.where((index > full_lo) & (full == 0), index, todo), 0))
    lo = tl.minimum(lo, hi)
    full_lo = tl.minimum(full_lo, hi)
    full_hi = tl.maximum(tl.minimum(full_hi, hi), full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def score_tile(q, k, query_position, key_position, slope, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr):
    """q (M, D), k (D, N) -> raw scores (M, N) in float32: not yet times scale; slope is the ALiBi slope over scale."""
    raw = tl.dot(q, k, input_precision=PRECISION)
    if HAS_ALIBI:
        raw -= slope * tl.abs(query_position[:, None] - key_position[None, :]).to(tl.float32)
    return raw


@triton.jit
def larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_or_nan(x, axis: tl.constexpr):
    """tl.max over one axis, but NaN where there is one: tl.max drops it."""
    if IN_PYTHON:  # the interpreter takes a minute for a reduction of our own
        return tl.where(tl.max((x != x).to(tl.int32), axis) > 0, float("nan"), tl.max(x, axis))
    else:
        return tl.reduce(x, axis, larger_or_nan)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in float32 as DTYPE holds it. Of two at a time: the compiler's conversion of one by one is 16 times slower than a product."""
    if IN_PYTHON or DTYPE == tl.float32:
        return x.to(DTYPE).to(tl.float32)
    elif DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 pair;
            .reg .b16 low, high;
            cvt.rn.f16x2.f32 pair, $3, $2;
            mov.b32 {low, high}, pair;
            cvt.f32.f16 $0, low;
            cvt.f32.f16 $1, high;
            }""",
            "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 pair;
            cvt.rn.bf16x2.f32 pair, $3, $2;
            shl.b32 $0, pair, 16;
            and.b32 $1, pair, 0xffff0000;
            }""",
            "=r,=r,f,f", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def largest(x):
    """The largest of a value per row, bit for bit the same in all threads, as a condition has to be.

    A row is held by several threads. Where a sum over them was contracted with a product, their copies may differ in the
    last bit, and tl.max(x, 0) would give each thread the largest of its own copies.
    """
    return tl.max(tl.max(tl.broadcast_to(x[:, None], (x.shape[0], 32)), 1), 0)


@triton.jit
def popcount(x):
    """Number of set bits of each int32."""
    if IN_PYTHON:
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return ((x * 0x01010101) >> 24) & 0xFF
    else:  # the compiler finds the instruction behind the lines above in some places only
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
