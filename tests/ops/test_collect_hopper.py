"""The collect kernel for Hopper needs one to run; that it compiles can be seen anywhere."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon", reason="needs a Triton with Gluon")
operator = pytest.importorskip("adasplash.ops.entmax_attention.operator")

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from adasplash.ops.entmax_attention.collect_hopper import collect_hopper_kernel as kernel

dim, block_n, formula, alibi = map(int, sys.argv[1:])
block_dim = triton.next_power_of_2(dim)
constants = dict(D=dim, BLOCK_D=block_dim, BLOCK_M=128, BLOCK_N=block_n, FORMULA=formula, HAS_ALIBI=bool(alibi))
constants |= dict(PRECISION="tf32", STAGES=3, num_warps=8)
if not alibi:
    constants |= dict(SLOPES=None, QUERY_POSITION=None, KEY_POSITION=None)
layout = gl.NVMMASharedLayout.get_default_for([1, 1, block_n, block_dim], gl.bfloat16)
types = dict(Q="*bf16", K=f"tensordesc<bf16[1, 1, {block_n}, {block_dim}],{layout!r}>", ALPHA="*fp32", SLOPES="*fp32")
types |= dict(BOUND="*fp32", scale="fp32", high_keys="i64")
names = kernel.arg_names
signature = {name: types.get(name, "*i32" if name.isupper() else "i32") for name in names}
signature |= dict.fromkeys(constants, "constexpr")
source = GluonASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=8, maxnreg=128))
print("wgmma" in compiled.asm["ptx"], flush=True)
"""


@pytest.mark.parametrize(
    "dim, block_n, formula, alibi", [(64, 128, 2, 0), (64, 128, 1, 0), (64, 128, 4, 0), (80, 64, 0, 1)]
)
def test_compiles_without_a_gpu(dim, block_n, formula, alibi, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    arguments = map(str, (dim, block_n, formula, alibi))
    command = [sys.executable, "-c", COMPILE, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


@pytest.mark.parametrize(
    "capability, version, taken, told",
    [(9, "3.6.0", True, False), (9, "3.7.1", True, False), (9, "3.5.1", False, True), (8, "3.5.1", False, False)],
)
def test_only_where_it_was_run_and_says_so(capability, version, taken, told, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr("adasplash.ops.announce._announced", set())
    choose = operator._for_hopper.__wrapped__  # without what the cache remembers of the real GPU
    assert (choose(torch.device("cuda", 0)) is not None) == taken
    assert choose(torch.device("cpu")) is None
    assert ("only, this is 3.5.1" in caplog.text) == told


def test_keys_that_tma_cannot_copy_are_left_to_the_other_kernel():
    from adasplash.ops.entmax_attention.collect_hopper import tiles_by_tma
    from adasplash.ops.tile_table import entmax_tiles

    tiles = entmax_tiles(64, torch.bfloat16, torch.device("cpu"))["collect"]
    k = torch.zeros(2, 3, 100, 72, dtype=torch.bfloat16)
    assert tiles_by_tma(k[..., :64], tiles) is not None
    assert tiles_by_tma(k[..., 1:65], tiles) is None  # begins 2 bytes after a multiple of 16
    assert tiles_by_tma(k[..., :69].contiguous()[..., :64], tiles) is None  # rows 138 bytes apart
    assert tiles_by_tma(k[:, :1, :, :64].expand(2, 3, 100, 64), tiles) is None
    assert tiles_by_tma(k.float(), tiles) is None
