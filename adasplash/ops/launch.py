"""What the operators share that launch kernels; jit.py has what the kernels share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import torch
import triton
from torch import Tensor

from .jit import INTERPRETED
from .tile_table import Tiles, block_dim
from .torch_operator import torch_operator

# Which formula a kernel is built for: p = d ** r with d = z - tau and r = 1 / (alpha - 1). The number is r, where products are enough.
GENERAL = 0  # any 1 < alpha <= 2, read from a tensor
LINEAR = 1  # alpha = 2
QUADRATIC = 2  # alpha = 1.5
QUARTIC = 4  # alpha = 1.25


def formula_of(alpha: float | None) -> int:
    """The kernels' formula for a known alpha; None: alpha is only known on the GPU."""
    return {1.25: QUARTIC, 1.5: QUADRATIC, 2.0: LINEAR}.get(alpha, GENERAL)


_compiling: ContextVar[set | None] = ContextVar("compiling", default=None)  # the kernels, while `compile_together` runs
_compiled: set[tuple] = set()  # variants of operators, as `_variant` tells them apart


def is_compiling() -> bool:
    """Whether `compile_together` runs, so that nothing is computed."""
    return _compiling.get() is not None


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """`kernel[grid](*arguments, **constants)`; while `compile_together` runs, the kernel is compiled only."""
    if is_compiling():
        _compiling.get().add(kernel.warmup(*arguments, grid=grid, **constants))
    else:
        kernel[grid](*arguments, **constants)


@contextlib.contextmanager
def compile_together(device: torch.device):
    """What is launched within is only compiled and loaded, all at once: it takes not much longer than the slowest kernel.

    A kernel that cannot be compiled says so when it is launched.
    """

    def load(kernel):
        with torch.cuda.device(device):
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
            return kernel.run  # some versions of Triton compile now what starts the kernel, for another half second

    compiling = set()
    with ThreadPoolExecutor() as threads:
        with triton.AsyncCompileMode(threads, ignore_errors=True):
            before = _compiling.set(compiling)
            try:
                yield
            finally:
                _compiling.reset(before)
        threads.map(load, compiling)


def _variant(name: str, arguments: tuple) -> tuple:
    """What decides which kernels an operator needs, nearly; those that differ by less are compiled when they are launched."""
    first = arguments[0]
    of_arguments = (x.dtype if isinstance(x, Tensor) else str(x) for x in arguments)
    return name, first.device, first.shape[-1], *of_arguments


def kernel_operator(name: str, follow_up: Callable | None = None) -> Callable:
    """Decorator: registers a function that launches kernels as the torch operator `name`; on CPU for the interpreter alone.

    Before a first call its kernels are compiled together, with those that `follow_up(arguments, outputs)` launches.
    """

    def register(function):
        @functools.wraps(function)
        def once_compiled(*arguments):
            if not INTERPRETED and not is_compiling():
                variant = _variant(name, arguments)
                if variant not in _compiled:
                    _compiled.add(variant)
                    with compile_together(arguments[0].device):
                        outputs = function(*arguments)
                        if follow_up is not None:
                            follow_up(arguments, outputs)
                        del outputs
            return function(*arguments)

        return torch_operator(name, None if INTERPRETED else "cuda")(once_compiled)

    return register


def last_contiguous(x: Tensor) -> Tensor:
    """x with stride 1 in its last dim, copied only if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_stride(length: int) -> int:
    """Places from one head's values of rows, one for each of `length` queries, to the next head's: a multiple of 16, so that
    kernels load wide pieces of them at every length.
    """
    return -(-length // 16) * 16


def with_row_stride(x: Tensor) -> Tensor:
    """x (B, H, Tq) with the `row_stride` of kernels, (B, H, S)."""
    return torch.nn.functional.pad(x, (0, row_stride(x.shape[-1]) - x.shape[-1])).contiguous()


def with_equal_strides(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """The two ends of key ranges, (B, H, Tq), such that one set of strides serves both in a kernel, multiples of 16; copied if need be."""
    if start.stride() == stop.stride() and not any(stride % 16 for stride in start.stride()[:2]):
        return start, stop
    return with_row_stride(start), with_row_stride(stop)


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot is to multiply float32: as exactly as three products of TF32 make it; float16 and bfloat16 it takes as they are."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def head_constants(q: Tensor, slopes: Tensor | None) -> dict:
    """What an attention kernel is compiled for, whatever its tiles; q (B, H, Tq, D)."""
    return {"D": q.shape[-1], "BLOCK_D": block_dim(q.shape[-1]), "HAS_ALIBI": slopes is not None}


def tile_constants(dtype: torch.dtype, tiles: Tiles) -> dict:
    """What a kernel that computes tiles of scores is compiled for, of inputs of this dtype."""
    return {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PRECISION": dot_precision(dtype),
        **tiles.launch_options(),
    }
