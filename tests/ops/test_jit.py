"""What kernels share, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1)."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from adasplash.ops.entmax_attention.lists import load_listed, store_listed
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


@triton.jit
def copy_listed_kernel(FROM, TO, count, high_from, high_to, AT_ONCE: tl.constexpr):
    at = tl.arange(0, AT_ONCE)
    store_listed(TO, at, load_listed(FROM, at, at < count, high_from), at < count, high_to)


def test_lists_hold_numbers_of_either_size(device):
    low, high = [0, 1, 65535, 0, 65535, 7], [0, 0, 0, 1, 32767, 0]
    numbers = torch.tensor([*low, *high], device=device).to(torch.uint16)
    two, one = (torch.full((size,), 9, dtype=torch.uint16, device=device) for size in (16, 8))
    copy_listed_kernel[(1,)](numbers, two, 6, 6, 8, AT_ONCE=8)
    assert two.tolist() == [*low, 9, 9, *high, 9, 9]
    copy_listed_kernel[(1,)](two, one, 6, 8, 0, AT_ONCE=8)
    assert one.tolist() == [*low, 9, 9]


SPECIALIZE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature
from adasplash.ops.entmax_attention import operator as entmax
from adasplash.ops.softmax_attention import operator as softmax

variants = {}
backend = CUDABackend(GPUTarget("cuda", 90, 32))


class Recorder:
    def __init__(self, kernel):
        self.name = kernel.fn.__name__
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid):
        return self

    def warmup(self, *args, grid, **options):
        pass

    def __call__(self, *args, **options):
        variants.setdefault(self.name, set()).add(str(self.bind(*args, **options)[1]))


for module in (entmax, softmax):
    for name, value in vars(module).items():
        if isinstance(value, JITFunction):
            setattr(module, name, Recorder(value))
entmax._slots = lambda device, warps: 264


def launch(batch, heads, length):
    q, k, v, d_out = torch.randn(4, batch, length, heads, 64).bfloat16().transpose(2, 3).unbind()
    # The ends of ranges begin at multiples of 16 bytes, as new tensors do.
    common = (q, k, v, *(torch.zeros(batch, heads, length, dtype=torch.int32) for _ in range(2)))
    alpha = torch.full((heads,), 1.5)
    room = entmax._keys_per_query(q, length)
    saved = entmax.entmax_attention_forward._init_fn(*common, alpha, None, None, None, 0.125, 2, room)
    saved = (alpha, None, None, None, *saved)
    entmax.entmax_attention_backward._init_fn(d_out, *common, *saved, 0.125, 2, room, False)
    saved = (None, None, None, *softmax.softmax_attention_forward._init_fn(*common, None, None, None, 0.125))
    softmax.softmax_attention_backward._init_fn(d_out, *common, *saved, 0.125)


launch(2, 12, 256)
first = {name: set(found) for name, found in variants.items()}
for sizes in ((1, 1, 1), (1, 1, 16), (2, 12, 250), (1, 12, 1024), (16, 5, 48), (1, 1, 65552)):
    launch(*sizes)
print("anew", *sorted(name for name in variants if variants[name] != first[name]), flush=True)
print(len(variants))
"""


def test_other_sizes_compile_nothing_anew(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SPECIALIZE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    anew, kernels = done.stdout.splitlines()
    assert anew == "anew" and int(kernels) >= 15
