"""Measures tile shapes of the attention kernels and prints those to write into adasplash/ops/tile_table.py.

    python scripts/tune_tiles.py                        # all kernels, head dim 64, bfloat16
    python scripts/tune_tiles.py --dim 128 --heads 8 entmax.collect softmax.columns

A kernel's time is what the profiler sees of it alone, forward and backward through all kernels, causal, 65,536 tokens in
sequences of --length. Each shape is tried with the table's shapes for the other kernels; one that does not compile, or
needs more of the GPU than there is, is left out with its reason.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from attention_inputs import make_inputs, parse_input
from torch.profiler import ProfilerActivity, profile

from adasplash import KeyRange
from adasplash.ops.checks import check_choice
from adasplash.ops.entmax_attention import operator as entmax
from adasplash.ops.softmax_attention import operator as softmax
from adasplash.ops.tile_table import Tiles

# What is tuned: its names for the profiler, of which a GPU runs one, and the input that keeps it busy.
KERNELS = {
    "entmax.collect": (("collect_kernel", "collect_hopper_kernel"), "scattered:.2:.8"),
    "entmax.forward": (("tiles_forward_kernel",), "gaussian:.3"),
    "entmax.rows": (("tiles_backward_rows_kernel",), "gaussian:.3"),
    "entmax.columns": (("tiles_backward_columns_kernel",), "gaussian:.3"),
    "entmax.sinks": (("tiles_backward_columns_kernel",), "clustered:3"),
    "softmax.forward": (("softmax_forward_kernel",), "gaussian"),
    "softmax.rows": (("softmax_backward_rows_kernel",), "gaussian"),
    "softmax.columns": (("softmax_backward_columns_kernel",), "gaussian"),
}
TOKENS = 65536
STEPS = 3


def candidates(kernel: str, table: dict[str, Tiles]) -> Iterator[Tiles]:
    """The table's shape first, then others that go with the table's shapes of the other kernels."""
    family, part = kernel.split(".")
    now = table[part]
    yield now
    rows = [32, 64, 128]
    if kernel == "entmax.collect":  # its blocks of queries are the others' measure
        rows = [now.block_m]
    elif part in ("columns", "sinks") or kernel in ("entmax.forward", "entmax.rows"):  # these divide them
        whole = table["collect" if family == "entmax" else "forward"].block_m
        rows = [m for m in rows if whole % m == 0]
    elif kernel == "softmax.forward":
        rows = [m for m in rows if m % table["columns"].block_m == 0]
    for block_m, block_n, warps, stages in itertools.product(rows, (32, 64, 128), (4, 8), (2, 3)):
        for registers in (None, 128) if warps == 8 else (None, 168):
            shape = Tiles(block_m, block_n, warps, stages, registers)
            if shape != now and 2048 <= block_m * block_n <= 4096 * warps // 2:
                yield shape


def step_function(family: str, inputs) -> Callable[[], None]:
    """One forward and backward pass through the family's kernels."""
    q, k, v, d_out = inputs
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    visible = KeyRange.causal(q.shape[2], device=q.device).expand(*q.shape[:2])
    scale = q.shape[-1] ** -0.5

    def step():
        if family == "entmax":
            out = entmax.entmax_attention_kernels(*leaves, visible, alpha=1.5, scale=scale)
        else:
            out = softmax.softmax_attention_kernels(*leaves, visible, scale=scale)
        torch.autograd.grad(out, leaves, d_out)

    return step


def profiled(step: Callable[[], None]) -> Sequence[Any]:
    """What the profiler sees of STEPS steps on the GPU, an event for each kernel."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    return seen.key_averages()


def kernel_time(events: Sequence[Any], names: Sequence[str]) -> float:
    """Milliseconds that the kernels of these names take in one of the STEPS that were profiled.

    Raises:
        RuntimeError: none of them ran; says what did.
    """
    own = [event.device_time_total for event in events if event.key in names]
    if not own:
        ran = ", ".join(sorted(event.key for event in events if event.device_time_total)) or "nothing"
        raise RuntimeError(f"Expected {' or '.join(names)} to run, but what ran is: {ran}; mend KERNELS.")
    return sum(own) / STEPS / 1000


def tune(kernel: str, dim: int, heads: int, length: int) -> None:
    names, spec = KERNELS[kernel]
    family, part = kernel.split(".")
    module, table = (entmax, "entmax_tiles") if family == "entmax" else (softmax, "softmax_tiles")
    lookup = getattr(module, table)
    now = lookup(dim, torch.bfloat16, torch.device("cuda"))
    step = step_function(family, make_inputs(parse_input(spec), TOKENS // length, heads, length, dim, device="cuda"))
    times = {}
    try:
        for shape in candidates(kernel, now):
            setattr(module, table, lambda *_, shape=shape: {**now, part: shape})
            try:
                events = profiled(step)
            except Exception as error:  # too large for this GPU, or not compilable: the next one
                reason = " ".join(str(error).split())[:100]
                print(f"{kernel} {shape}: {type(error).__name__}: {reason}", flush=True)
                continue
            times[shape] = kernel_time(events, names)
            print(f"{kernel} {shape}: {times[shape]:.3f} ms", flush=True)
    finally:
        setattr(module, table, lookup)
    if times:
        best = min(times, key=times.__getitem__)
        before = f", table {times[now[part]]:.3f} ms" if now[part] in times else ""
        print(f"best {kernel}, dim {dim}: {best}, {times[best]:.3f} ms{before}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)}; by default all")
    parser.add_argument("--dim", type=int, default=64, help="of a head (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=16384, help="tokens of a sequence (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        for kernel in options.kernels:
            check_choice("kernel", kernel, KERNELS)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("Error: tuning needs an NVIDIA GPU, and torch finds none.", file=sys.stderr)
        return 1
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, compute capability {properties.major}.{properties.minor}, torch {torch.__version__}")
    for kernel in options.kernels or KERNELS:
        tune(kernel, options.dim, options.heads, options.length)
    return 0


if __name__ == "__main__":
    sys.exit(main())
