"""The collect kernel for Hopper, in Gluon: the walk of collect.py, with layouts chosen by hand and keys copied by TMA.

In every layout here a row lies in one warp, so that values of rows change layouts without shared memory and barriers.

Scores are looked at in float16, two in a register: the queries of a block are scaled by a power of two so that none
overflows, and the bound is lowered by what the rounding can do. The float32 scores are then no longer needed, and the next
tile's product is computed into their registers meanwhile. What is done with the scores of a tile: entries_hopper.py.

A block may be walked more than once. Bits are formed against the bound reached so far, which is loose at first, so that a block with
many keys near its threshold marks too many. If its first tiles, an eighth of a long walk, already show this, the walk
restarts with the bound they gave; if its keys still do not fit at the end, it is walked once more with the final bound.
Where not even that promises to make them fit, a block is walked for its tops instead, the largest score of each quarter of a
tile. This is faster, and gives a bound so near the threshold that tile mode is spared a pass. If the tops show that the keys
fit after all, as a key further left may outweigh all that were seen before, it is walked once more for them.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..jit import SIZES, store_block_range, visible_tiles
from ..tile_table import Tiles, block_dim
from .collect import SLACK, room_for_keys
from .entries_hopper import (
    TOPS_AT_ONCE,
    TOPS_OF_TILE,
    barrier,
    lowered,
    mark_tile,
    note_tops,
    pair_up,
    running_sum,
    settle,
    settle_tops,
    write_keys,
)

# The name differs between triton 3.6 and its successors.
copy_to_shared = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

MANY_HITS = gl.constexpr(0.95)  # of a row's first tiles: then it is looked into whether the walk should start again


def tiles_by_tma(k: Tensor, tiles: Tiles) -> TensorDescriptor | None:
    """k (B, G, Tk, D) as the kernel takes it; None for float32, and where TMA cannot copy it."""
    if k.dtype == torch.float32 or k.data_ptr() % 16 or any(stride % 8 or stride == 0 for stride in k.stride()[:3]):
        return None
    block = [1, 1, tiles.block_n, block_dim(k.shape[-1])]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if k.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor.from_tensor(k, block, layout)


@gluon.jit
def start_copy(K, k_tiles, ready, turn, b, group, tile, wanted):
    """Starts to copy a key tile, if it is wanted, to the place of its turn in k_tiles (STAGES, 1, 1, N, D).

    The barrier is also for what lay there: by then every warp has done with it.
    """
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[3]
    BLOCK_D: gl.constexpr = k_tiles.shape[4]
    place = turn % STAGES
    mbarrier.expect(ready.index(place), BLOCK_N * BLOCK_D * 2, pred=wanted)
    barrier()
    at = [b, group, tile * BLOCK_N, 0]
    copy_to_shared(K, at, ready.index(place), k_tiles.index(place), pred=wanted)


@gluon.jit
def start_dot(q_tile, k_tiles, ready, turn, wanted, MMA: gl.constexpr):
    """Starts to compute the raw scores (M, N) of the tile of this turn; of anything if it is not wanted."""
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_M: gl.constexpr = q_tile.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[3]
    BLOCK_D: gl.constexpr = k_tiles.shape[4]
    place = turn % STAGES
    mbarrier.wait(ready.index(place), turn // STAGES & 1, pred=wanted)
    k = k_tiles.index(place).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=MMA)
    return warpgroup_mma(q_tile, k, nothing, use_acc=False, is_async=True)


@gluon.jit
def add_bias(raw, alibi, query_position, key_position, nearest):
    """ALiBi, less that of a key `nearest` away; what is far above that key's is cut, to what float16 can hold."""
    further = gl.abs(query_position[:, None] - key_position[None, :]) - nearest[:, None]
    biased = gl.minimum(raw - alibi * further.to(gl.float32), 60000.0)
    return gl.where(raw < float("inf"), biased, raw)  # what is not finite stays so


@gluon.jit
def unknown(x):
    """x, of which the compiler knows nothing: what is computed from it in a rare branch is not computed before the loops, to
    take registers in all of them."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, is_pure=False, pack=1)


@gluon.jit
def tile_of_turn(j, left, edges, first_tile, full_last):
    """Tiles are taken in this order: those at the left edge, at the right edge, then the full ones from the right."""
    return gl.where(j < left, first_tile + j, gl.where(j < edges, full_last + j - left, full_last - 1 - (j - edges)))


@gluon.jit
def start_first_copies(K, k_tiles, ready, turn, b, group, left, edges, tiles, first_tile, full_last):
    STAGES: gl.constexpr = k_tiles.shape[0]
    for j in gl.static_range(STAGES):
        tile = tile_of_turn(j, left, edges, first_tile, full_last)
        start_copy(K, k_tiles, ready, turn + j, b, group, tile, j < tiles)


@gluon.jit
def may_fit(kept, tiles, rows, room):
    """Whether the keys above the final bound are likely to fit, if `kept` of the rows' tiles have one or more of them.

    Keys that fall into tiles at random miss a share 1 - kept / tiles of them when there are -log(1 - kept / tiles) a tile.
    """
    share = kept / (rows * gl.maximum(tiles, 1)).to(gl.float32)
    return -gl.log(gl.maximum(1.0 - share, 1e-3)) * (rows * tiles) <= room


@gluon.jit(do_not_specialize=SIZES)
def collect_hopper_kernel(
    Q, K, KEY_NORM, START, STOP, ALPHA, SLOPES, QUERY_POSITION, KEY_POSITION,
    WORK, RECORDS, KEYS, FIRST, COUNT, BOUND, IN_TILES, BLOCK_RANGE,
    scale, q_b, q_h, q_t, k_b, k_h, k_t, range_b, range_h,
    batch_heads, heads, ratio, query_length, row_stride, key_length, blocks, entries, capacity, few_keys, scores_per_key,
    high_keys: tl.int64,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    FORMULA: gl.constexpr, HAS_ALIBI: gl.constexpr, PRECISION: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """As in collect.py, but K is a tensor descriptor; k_* and PRECISION are unused."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    WARP_ROWS: gl.constexpr = BLOCK_M // num_warps  # 16, as wgmma deals them
    TOPS: gl.constexpr = gl.BlockedLayout(
        [1, TOPS_AT_ONCE * WARP_ROWS // 32], [WARP_ROWS, 32 // WARP_ROWS], [num_warps, 1], [1, 0]
    )
    LIST: gl.constexpr = gl.SliceLayout(1, TOPS)
    ENTRY: gl.constexpr = gl.BlockedLayout([WARP_ROWS // 8, 1, 8], [8, 4, 1], [num_warps, 1, 1], [2, 1, 0])
    WORDS: gl.constexpr = gl.BlockedLayout([WARP_ROWS // 8, 1, 4], [8, 4, 1], [num_warps, 1, 1], [2, 1, 0])
    QUARTER: gl.constexpr = gl.BlockedLayout([WARP_ROWS // 16, 2, 4], [16, 2, 1], [num_warps, 1, 1], [2, 1, 0])
    OF_ENTRY: gl.constexpr = gl.BlockedLayout([WARP_ROWS // 8, 1], [8, 4], [num_warps, 1], [1, 0])
    QUERY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [num_warps, 1], [1, 0])

    k_tiles = gl.allocate_shared_memory(K.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], K.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], K.dtype)
    q_tile = gl.allocate_shared_memory(K.dtype, [BLOCK_M, BLOCK_D], q_layout)
    fence_async_shared()

    RECORDS += gl.program_id(0).to(gl.int64) * entries * (BLOCK_M * 8)
    turn = 0  # tiles that this program has taken
    work = gl.atomic_add(WORK, 1, sem="relaxed")
    while work < blocks * batch_heads:
        block = blocks - 1 - work // batch_heads
        bh = work % batch_heads
        b = bh // heads
        h = bh % heads
        group = h // ratio
        groups = heads // ratio
        row = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=ROW)
        inside = row < query_length
        at = b.to(gl.int64) * range_b + h.to(gl.int64) * range_h + row
        start = gl.load(START + at, mask=inside, other=0)
        stop = gl.load(STOP + at, mask=inside, other=0)
        seeing = stop > start
        first_tile, full_first, full_last, last_tile = visible_tiles(start, stop, key_length, BLOCK_N)
        left = full_first - first_tile
        edges = left + last_tile - full_last
        tiles = last_tile - first_tile
        start_first_copies(K, k_tiles, ready, turn, b, group, left, edges, tiles, first_tile, full_last)

        q_row = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, QUERY))
        q_d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, QUERY))
        q_at = Q + b.to(gl.int64) * q_b + h.to(gl.int64) * q_h + q_row[:, None].to(gl.int64) * q_t + q_d[None, :]
        q = gl.load(q_at, mask=(q_row < query_length)[:, None] & (q_d < D)[None, :], other=0.0).to(gl.float32)
        alpha = gl.load(ALPHA + h).to(gl.float32)
        raw_z_scale = (alpha - 1.0) * scale
        r = 1.0 / (alpha - 1.0)
        norm = gl.sqrt(gl.sum(q * q, 1))
        key_norm = gl.minimum(gl.load(KEY_NORM + b * groups + group).to(gl.float32, bitcast=True), 1e18)
        # Of scores, and of what a row's threshold lies below its largest score. In units of a power of two it is at most 2 ** 15,
        # and not below 2 ** 14 but where queries are that much larger than scores.
        largest_norm = gl.max(gl.where(norm < float("inf"), norm, 0.0), 0)
        magnitude = gl.minimum(gl.maximum(largest_norm * key_norm + 1.0 / raw_z_scale, largest_norm), 1e38)
        exponent = gl.maximum(magnitude.to(gl.int32, bitcast=True) >> 23, 15)
        unit = (exponent - 14 << 23).to(gl.float32, bitcast=True)
        per_unit = (268 - exponent << 23).to(gl.float32, bitcast=True)
        z_scale = raw_z_scale * unit
        q_tile.store((q * per_unit).to(K.dtype))
        fence_async_shared()
        norm = gl.convert_layout(norm, ROW)
        margin = norm * key_norm * per_unit
        if HAS_ALIBI:
            alibi = gl.load(SLOPES + bh) / scale * per_unit
            query_position = gl.load(QUERY_POSITION + bh.to(gl.int64) * row_stride + row, mask=inside, other=0)
            key_position = KEY_POSITION + (b * groups + group) * key_length
            # Biases are counted from that of a key in sight, so that no row's largest score is far below 0: from the last one, or
            # the one at the row's own place, whichever is nearer.
            last = gl.maximum(stop - 1, 0)
            own = gl.minimum(gl.maximum(row + key_length - query_length, start), last)
            nearest = gl.abs(query_position - gl.load(key_position + last, mask=seeing, other=0))
            nearest = gl.minimum(nearest, gl.abs(query_position - gl.load(key_position + own, mask=seeing, other=0)))
            margin += gl.abs(alibi) * nearest.to(gl.float32)
        # What rounding can do besides: to products and sums in float32, to queries scaled down, to scores above the bound, up to 1 in z.
        margin = margin * ((D + 8 + tiles) * 2.0**-22) + 1.0 / z_scale * (SLACK + 2.0**-10) + 2.0**-23
        if K.dtype == gl.float16:
            margin += key_norm * 2.0**-21
        margin = gl.where(norm < float("inf"), gl.minimum(margin, 65536.0), 65536.0)

        bound = gl.where(seeing, float("-inf"), float("inf"))  # a row that sees nothing makes no entries
        slope = gl.full([BLOCK_M], 1.0, gl.float32, layout=ROW)
        found = gl.zeros([BLOCK_M], gl.int32, layout=ROW)
        keys = gl.zeros([BLOCK_M], gl.int32, layout=LIST)
        fits = False
        looking = True
        raise_from = 0  # the tiles of earlier turns have raised the bound already: a mass must not count twice
        room = room_for_keys(capacity, few_keys, scores_per_key, BLOCK_M, tiles * BLOCK_N)
        trial = edges + gl.minimum(gl.maximum(tiles // 8, 8), 64)
        barrier()
        while looking:
            found = gl.zeros([BLOCK_M], gl.int32, layout=ROW)
            # Both edges, under a mask.
            for j in range(0, edges):
                tile = tile_of_turn(j, left, edges, first_tile, full_last)
                dot = start_dot(q_tile, k_tiles, ready, turn + j, True, MMA)
                raw = warpgroup_mma_wait(0, deps=(dot,))
                ahead = j + STAGES
                to_copy = tile_of_turn(ahead, left, edges, first_tile, full_last)
                start_copy(K, k_tiles, ready, turn + ahead, b, group, to_copy, ahead < tiles)
                column = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, MMA))
                if HAS_ALIBI:
                    place = gl.load(key_position + column, mask=column < key_length, other=0)
                    raw = add_bias(raw, alibi, query_position, place, nearest)
                raw = gl.where(
                    (column[None, :] >= start[:, None]) & (column[None, :] < stop[:, None]), raw, float("-inf")
                )
                bound, slope, found = mark_tile(
                    pair_up(raw), tile, j >= raise_from, bound, slope, found, margin, z_scale, r, RECORDS, entries,
                    FORMULA, ROW,
                )  # fmt: skip

            # The walk, in stretches of 64, 128, 256, ... tiles: after each the bound is tightened and the entries are thinned out.
            begin = edges
            stretch = 64
            lost = 0
            more = True
            restart = False
            tops_only = False
            trying = (raise_from == 0) & (tiles >= 2 * trial + STAGES)
            while more:
                end = gl.where(trying, trial, gl.minimum(begin + stretch, tiles))
                dot = start_dot(q_tile, k_tiles, ready, turn + begin, begin < end, MMA)
                for j in range(begin, end):
                    tile = full_last - 1 - (j - edges)
                    raw = warpgroup_mma_wait(0, deps=(dot,))
                    if HAS_ALIBI:
                        column = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, MMA))
                        raw = add_bias(raw, alibi, query_position, gl.load(key_position + column), nearest)
                    pairs = pair_up(raw)
                    dot = start_dot(q_tile, k_tiles, ready, turn + j + 1, j + 1 < end, MMA)
                    start_copy(K, k_tiles, ready, turn + j + STAGES, b, group, tile - STAGES, j + STAGES < tiles)
                    bound, slope, found = mark_tile(
                        pairs, tile, j >= raise_from, bound, slope, found, margin, z_scale, r, RECORDS, entries,
                        FORMULA, ROW,
                    )  # fmt: skip
                warpgroup_mma_wait(0, deps=(dot,))  # the last one is of nothing
                begin = end
                more = end < tiles
                if not trying or gl.sum(found, 0).to(gl.float32) > MANY_HITS * (BLOCK_M * end):
                    found = gl.convert_layout(found, LIST)
                    lost = gl.maximum(lost, gl.max(found, 0) - entries)
                    bound, slope, found, keys = settle(
                        RECORDS, gl.convert_layout(bound, LIST), gl.convert_layout(slope, LIST), gl.minimum(found, entries),
                        gl.convert_layout(margin, LIST), z_scale, r, FORMULA, ENTRY, OF_ENTRY,
                    )  # fmt: skip
                    bound = gl.convert_layout(bound, ROW)
                    slope = gl.convert_layout(slope, ROW)
                    found = gl.convert_layout(found, ROW)
                    if trying:
                        restart = gl.sum(keys, 0) > room
                        tops_only = restart & (not may_fit(gl.sum(found, 0), end, BLOCK_M, room // 2))
                        more = not restart
                    else:
                        stretch *= 2
                trying = False
            taken = begin
            if restart:
                for _ in gl.static_range(STAGES):  # the copies under way
                    mbarrier.wait(ready.index((turn + taken) % STAGES), (turn + taken) // STAGES & 1)
                    taken += 1
            turn += taken
            total = gl.sum(keys, 0)
            fits = (total <= room) & (lost <= 0) & (not restart)
            # What does not fit may do so in a second look, where the bits are formed against the final bound from the start.
            again = (raise_from < tiles) & (total > room) & may_fit(gl.sum(found, 0), tiles, BLOCK_M, room)
            raise_from = gl.where(restart, begin, tiles)
            looking = (restart & (not tops_only)) | again
            if tops_only:  # of the tiles without a mask: the others have raised the bound already
                end = unknown(full_last)
                whole = end - full_first
                places = unknown(entries) * 8 // TOPS_OF_TILE
                start_first_copies(K, k_tiles, ready, turn, b, group, 0, 0, whole, full_first, end)
                dot = start_dot(q_tile, k_tiles, ready, turn, True, MMA)
                for j in range(0, whole):
                    tile = end - 1 - j
                    raw = warpgroup_mma_wait(0, deps=(dot,))
                    if HAS_ALIBI:
                        column = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, MMA))
                        raw = add_bias(raw, alibi, query_position, gl.load(key_position + column), nearest)
                    pairs = pair_up(raw)
                    dot = start_dot(q_tile, k_tiles, ready, turn + j + 1, j + 1 < whole, MMA)
                    start_copy(K, k_tiles, ready, turn + j + STAGES, b, group, tile - STAGES, j + STAGES < whole)
                    note_tops(pairs, j, places, RECORDS)
                warpgroup_mma_wait(0, deps=(dot,))  # the last one is of nothing
                turn += whole
                places = gl.minimum(whole, places)
                bound, above = settle_tops(RECORDS, bound, places, z_scale, r, FORMULA, QUARTER)
                looking = may_fit(above, places * TOPS_OF_TILE, BLOCK_M, room)
                raise_from = tiles
            if looking:
                start_first_copies(K, k_tiles, ready, turn, b, group, left, edges, tiles, first_tile, full_last)

        # The keys of the entries left.
        store_block_range(BLOCK_RANGE, bh * blocks + block, start, stop, key_length)
        bound = lowered(bound, margin) * unit
        if HAS_ALIBI:
            bound -= alibi * unit * nearest.to(gl.float32)
        bound = gl.convert_layout(gl.where(seeing, bound, 0.0), LIST)
        found = gl.convert_layout(gl.where(seeing, found, 0), LIST)
        count = gl.where(found > 0, keys, 0)
        most = gl.max(found, 0)
        first = running_sum(count, 0, gl.BlockedLayout([1], [32], [num_warps], [0])) - count
        row = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=LIST)
        inside = row < query_length
        at = bh.to(gl.int64) * row_stride + row
        gl.store(IN_TILES + bh * blocks + block, gl.where(fits, 0, 1))
        gl.store(FIRST + at, first, mask=inside)
        gl.store(COUNT + at, gl.where(fits, count, 0), mask=inside)
        gl.store(BOUND + at, bound, mask=inside)
        if fits:
            slab = (bh.to(gl.int64) * blocks + block) * capacity
            write_keys(RECORDS, KEYS + slab, first, found, most, high_keys, BLOCK_N, WORDS, OF_ENTRY)
        work = gl.atomic_add(WORK, 1, sem="relaxed")
        barrier()
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))
