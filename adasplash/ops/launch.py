"""What the operators share that launch kernels; jit.py has what the kernels share."""

from __future__ import annotations

from collections.abc import Callable

import torch
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


def kernel_operator(name: str) -> Callable:
    """Decorator: registers a function that launches kernels as the torch operator `name`; on CPU for the interpreter alone."""
    return torch_operator(name, None if INTERPRETED else "cuda")


def last_contiguous(x: Tensor) -> Tensor:
    """x with stride 1 in its last dim, copied only if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def with_equal_strides(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """The two ends of key ranges, (B, H, Tq), such that one set of strides serves both in a kernel."""
    return (start, stop) if start.stride() == stop.stride() else (start.contiguous(), stop.contiguous())


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
