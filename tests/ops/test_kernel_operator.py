"""How kernels are compiled before a first call."""

import os
import subprocess
import sys

import pytest
import torch

launch = pytest.importorskip("adasplash.ops.launch", reason="needs triton")


class Kernel:
    """Notes what is asked of it, as a Triton kernel would do it."""

    def __init__(self, compiles=True):
        self.calls = []
        self.compiles = compiles

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.calls.append(("run", grid, arguments, constants))

    def warmup(self, *arguments, grid, **constants):
        self.calls.append(("compile", grid, arguments, constants))
        return self

    @property
    def run(self):
        if not self.compiles:
            raise RuntimeError("too large for this GPU")


def test_what_is_launched_together_is_compiled_only():
    good, bad = Kernel(), Kernel(compiles=False)
    with launch.compile_together(torch.device("cpu")):
        assert launch.is_compiling()
        launch.launch(good, (2, 1), 3, BLOCK=4)
        launch.launch(bad, (1,))  # says so when it is run
    assert not launch.is_compiling()
    launch.launch(good, (2, 1), 3, BLOCK=4)
    assert good.calls == [(what, (2, 1), (3,), {"BLOCK": 4}) for what in ("compile", "run")]
    assert [what for what, *_ in bad.calls] == ["compile"]


def test_an_error_while_compiling_is_raised_and_leaves_nothing_behind():
    for _ in range(2):
        with pytest.raises(ValueError, match="before a launch"), launch.compile_together(torch.device("cpu")):
            raise ValueError("before a launch")
        assert not launch.is_compiling()


FIRST_CALL = """
import torch
from triton import knobs
from adasplash import entmax_attention

compiled = []
knobs.compilation.listener = lambda **about: compiled.append(about["metadata"])

def call(batch, heads, groups, length):
    q, k, v = (
        torch.randn(batch, h, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, groups, groups)
    )
    before = len(compiled)
    out = entmax_attention(q, k, v, alpha=1.5)
    after = len(compiled)
    out.sum().backward()
    torch.cuda.synchronize()
    print(after - before, len(compiled) - after, flush=True)

call(1, 2, 2, 1024)
call(3, 4, 4, 2048)
call(1, 1, 1, 65552)
call(1, 8, 2, 1024)
call(1, 12, 3, 32768)
"""


@pytest.mark.gpu
def test_a_first_call_compiles_for_backward_too_and_other_sizes_nothing(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *others, grouped, grouped_longer = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert first[0] >= 12 and first[1] == 0
    assert others == [(0, 0)] * 2
    assert grouped > (0, 0) and grouped_longer == (0, 0)
