"""How kernels are compiled before a first call."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
kernel_operator = pytest.importorskip("adasplash.ops.kernel_operator")
launch, is_compiling = kernel_operator.launch, kernel_operator.is_compiling
CPU = torch.device("cpu")


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

    @property
    def done(self):
        return [what for what, *_ in self.calls]


def test_what_is_launched_together_is_compiled_only():
    good, bad = Kernel(), Kernel(compiles=False)

    def launching():
        assert is_compiling()
        launch(good, (2, 1), 3, BLOCK=4)
        launch(bad, (1,))  # says so when it is run

    kernel_operator.compile_together(launching, CPU)
    assert not is_compiling()
    launch(good, (2, 1), 3, BLOCK=4)
    assert good.calls == [(what, (2, 1), (3,), {"BLOCK": 4}) for what in ("compile", "run")]
    assert bad.done == ["compile"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_while_compiling_leaves_nothing_behind(error, monkeypatch):
    def leave(self, *exception):  # what Triton 3.6 does when it is interrupted while it waits
        raise error

    monkeypatch.setattr(triton.AsyncCompileMode, "__exit__", leave)
    with pytest.raises(error):
        kernel_operator.compile_together(lambda: None, CPU)
    monkeypatch.undo()
    assert not is_compiling()
    with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):  # the caller's own
        kernel_operator.compile_together(lambda: None, CPU)


names = (f"adasplash::of_a_test_{i}" for i in itertools.count())


def new_operator(device, monkeypatch, error=None):
    """An operator that launches a kernel, and another one for backward, which may meet an error."""
    forward, backward = Kernel(), Kernel()

    def follow_up(arguments, outputs):
        launch(backward, (1,))
        if error is not None:
            raise error

    @kernel_operator.kernel_operator(next(names), follow_up=follow_up)
    def operator(x: Tensor, scale: float, option: int) -> Tensor:
        launch(forward, (1,))
        return x.clone()

    monkeypatch.setattr(kernel_operator, "INTERPRETED", False)
    return operator, forward, backward


def test_a_first_call_compiles_all_that_follows(device, monkeypatch):
    operator, forward, backward = new_operator(device, monkeypatch)
    x = torch.zeros(1, 2, 3, 4, device=device)
    operator(x, 1.0, 1)
    assert (forward.done, backward.done) == (["compile", "run"], ["compile"])
    operator(x[:, :, 1:], 2.0, 1)  # another length
    assert (forward.done, backward.done) == (["compile", "run", "run"], ["compile"])
    for other in (x.half(), x[:, 1:], x[..., 1:]):
        forward.calls.clear()
        operator(other, 1.0, 1)
        assert forward.done == ["compile", "run"]
    forward.calls.clear()
    operator(x, 1.0, 2)
    assert forward.done == ["compile", "run"]


def test_a_first_call_needs_no_memory_for_what_follows(device, monkeypatch):
    operator, forward, _ = new_operator(device, monkeypatch, torch.OutOfMemoryError("no room for gradients"))
    operator(torch.zeros(3, device=device), 1.0, 1)
    assert forward.done == ["compile", "run"]


FIRST_CALLS = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from adasplash.ops.checks import resolve_key_range
from adasplash.ops.entmax_attention import operator as entmax
from adasplash.ops.softmax_attention import operator as softmax


class Hopper:
    # Kernels are compiled for it, but nothing is computed.
    class utils:
        load_binary = staticmethod(lambda *about: (1, 1, 32, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})
        unload_module = staticmethod(lambda module: None)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, *about):
        return lambda *arguments: None


device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    triton.runtime.driver.set_active(Hopper())
    entmax._slots = lambda device, warps: 264
    for module in (entmax, softmax):
        for operator in vars(module).values():
            if isinstance(operator, torch.library.CustomOpDef):
                operator.register_kernel("cpu")(operator._init_fn)

compiled = []
triton.knobs.compilation.listener = lambda **about: compiled.append(about["metadata"])


def call(attend, batch, heads, groups, length, **how):
    q, k, v = (
        torch.randn(batch, h, length, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, groups, groups)
    )
    before = len(compiled)
    out = attend(q, k, v, resolve_key_range(q, k, None, True), scale=0.125, **how)
    after = len(compiled)
    out.sum().backward()
    print(after - before, len(compiled) - after, flush=True)


for attend, how in ((entmax.entmax_attention_kernels, {"alpha": 1.5}), (softmax.softmax_attention_kernels, {})):
    for sizes in ((1, 2, 2, 1024), (3, 4, 4, 2047), (1, 1, 1, 1), (1, 1, 1, 65553), (1, 8, 2, 1024), (1, 12, 3, 32768)):
        call(attend, *sizes, **how)
"""


def test_first_calls_compile_for_backward_too_and_other_sizes_nothing(tmp_path):
    """With kernels for a Hopper; on a CPU they are not run."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    entmax, softmax = counts[:6], counts[6:]
    nothing = (0, 0)
    # First calls are those of a head alone with its keys, and of several that share them.
    assert entmax[0][0] >= 12 and entmax[4][0] >= 8 and entmax[0][1] == entmax[4][1] == 0
    assert entmax[1:4] == [nothing] * 3 and entmax[5] == nothing
    assert softmax[0] == softmax[4] == (1, 2)
    assert softmax[1:4] == [nothing] * 3 and softmax[5] == nothing
