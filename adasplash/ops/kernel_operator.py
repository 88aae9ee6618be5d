"""Functions that launch kernels as operators of torch. Before a first call its kernels are compiled, all at once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, ContextVar

import torch
import triton
from torch import Tensor

from .jit import INTERPRETED
from .torch_operator import torch_operator

_compiling: ContextVar[set | None] = ContextVar("compiling", default=None)  # the kernels, while `compile_together` runs
_known: set[tuple] = set()  # variants of operators whose kernels were compiled, as `_variant` tells them apart


def is_compiling() -> bool:
    """Whether `compile_together` runs, so that nothing is computed."""
    return _compiling.get() is not None


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """`kernel[grid](*arguments, **constants)`; while `compile_together` runs, the kernel is compiled only."""
    if is_compiling():
        _compiling.get().add(kernel.warmup(*arguments, grid=grid, **constants))
    else:
        kernel[grid](*arguments, **constants)


def compile_together(launching: Callable[[], None], device: torch.device) -> None:
    """Compiles and loads the kernels that `launching` launches, all at once, without starting them.

    A kernel that cannot be compiled says so when it is launched.
    """
    kernels = set()

    def compile_all():
        _compiling.set(kernels)
        with triton.AsyncCompileMode(threads, ignore_errors=True):
            launching()

    def load(kernel):
        with torch.cuda.device(device):
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
            return kernel.run  # Triton 3.6 compiles here what starts the kernel, for another third of a second

    with ThreadPoolExecutor() as threads:
        # In a context of its own: Triton 3.6 does not leave its mode when it is interrupted, and the caller may be in one.
        Context().run(compile_all)
        threads.map(load, kernels)


def _variant(name: str, arguments: tuple) -> tuple:
    """What decides which kernels an operator needs, nearly: dtypes, heads and dims of (B, H, T, D), options.

    What differs by less is compiled when it is launched.
    """

    def kind(x):
        if isinstance(x, Tensor):
            return (x.dtype, x.shape[1], x.shape[3]) if x.dim() == 4 else x.dtype
        return None if isinstance(x, float) else str(x)

    return name, arguments[0].device, *map(kind, arguments)


def kernel_operator(name: str, follow_up: Callable | None = None) -> Callable:
    """Decorator: registers a function that launches kernels as the torch operator `name`; on CPU for the interpreter alone.

    Before a first call its kernels are compiled together, with those that `follow_up(arguments, outputs)` launches.
    """

    def register(function):
        def rehearse(arguments):
            outputs = function(*arguments)
            if follow_up is not None:
                follow_up(arguments, outputs)

        @functools.wraps(function)
        def once_compiled(*arguments):
            if not INTERPRETED and not is_compiling():
                variant = _variant(name, arguments)
                first = arguments[0]
                if variant not in _known and not (first.is_cuda and torch.cuda.is_current_stream_capturing()):
                    _known.add(variant)
                    with contextlib.suppress(torch.OutOfMemoryError):  # the call itself needs less, and tells
                        compile_together(lambda: rehearse(arguments), first.device)
            return function(*arguments)

        return torch_operator(name, None if INTERPRETED else "cuda")(once_compiled)

    return register
