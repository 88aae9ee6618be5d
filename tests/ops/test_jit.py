"""What kernels share, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch
import triton
import triton.language as tl

from adasplash.ops.jit import INTERPRETED, seeing_blocks

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
)


@triton.jit
def seeing_blocks_kernel(BLOCK_RANGE, BLOCKS, FOUND, todo, whole_blocks, tile_length):
    tile = tl.program_id(0)
    lo, full_lo, full_hi, hi = seeing_blocks(
        BLOCK_RANGE, BLOCKS, todo, whole_blocks, tile * tile_length, (tile + 1) * tile_length
    )
    tl.store(FOUND + tile * 4, lo)
    tl.store(FOUND + tile * 4 + 1, full_lo)
    tl.store(FOUND + tile * 4 + 2, full_hi)
    tl.store(FOUND + tile * 4 + 3, hi)


@pytest.mark.parametrize("listed", ["all", "some", "none"])
@pytest.mark.parametrize("kind", ["causal", "window", "documents", "gaps"])
def test_query_blocks_that_see_a_tile_of_keys(kind, listed, device):
    """More blocks than are looked at in one go; of full blocks the first run."""
    blocks, keys, tiles = 300, 640, 10
    number = torch.arange(blocks)
    stop = (number + 1) * keys // blocks
    start = {
        "causal": torch.zeros_like(stop),
        "window": (stop - 200).clamp(min=0),
        "documents": stop // 250 * 250,
        "gaps": torch.where(number % 100 == 50, keys, 0),  # blocks that see nothing
    }[kind]
    every_stop = torch.where(stop > start, (stop - 2).clamp(min=0), keys)
    any_stop = torch.where(stop > start, stop, 0)
    every_start = torch.where(stop > start, start, 0)
    bounds = torch.stack((start, any_stop, every_start, every_stop), -1).int()
    chosen = {"all": number, "some": number[(number % 70 > 20) & (number != 200)], "none": number[:0]}[listed]
    given = None if listed == "all" else chosen.int().to(device)
    found = torch.full((tiles, 4), -1, dtype=torch.int32, device=device)
    seeing_blocks_kernel[(tiles,)](bounds.to(device), given, found, len(chosen), blocks - 1, keys // tiles)
    for tile, (lo, full_lo, full_hi, hi) in enumerate(found.tolist()):
        begin, end = tile * keys // tiles, (tile + 1) * keys // tiles
        live = ((start < end) & (any_stop > begin))[chosen]
        full = ((every_start <= begin) & (every_stop >= end) & (number < blocks - 1))[chosen]
        inside = live.nonzero().flatten().tolist() or [0, -1]
        assert (lo, hi) == (inside[0], inside[-1] + 1)
        runs = (live & full).nonzero().flatten().tolist()
        assert lo <= full_lo <= full_hi <= hi and (full_lo < full_hi) == bool(runs)
        if runs:
            assert full_lo == runs[0] and full[full_lo:full_hi].all()
            assert full_hi == hi or not full[full_hi]
