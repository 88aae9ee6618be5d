"""What operators make of their arguments for kernels: strides, formulas, constants. kernel_operator.py launches them."""

from __future__ import annotations

import torch
from torch import Tensor

from .tile_table import Tiles, block_dim

# Which formula a kernel is built for: p = d ** r with d = z - tau and r = 1 / (alpha - 1). The number is r, where products are enough.
GENERAL = 0  # any 1 < alpha <= 2, read from a tensor
LINEAR = 1  # alpha = 2
QUADRATIC = 2  # alpha = 1.5
QUARTIC = 4  # alpha = 1.25


def formula_of(alpha: float | None) -> int:
    """The kernels' formula for a known alpha; None: alpha is only known on the GPU."""
    return {1.25: QUARTIC, 1.5: QUADRATIC, 2.0: LINEAR}.get(alpha, GENERAL)


def last_contiguous(x: Tensor) -> Tensor:
    """x with stride 1 in its last dim, copied only if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_stride(length: int) -> int:
    """Places from one head's values of rows, one for each of `length` queries, to the next head's: a multiple of 16, so that
    kernels load wide pieces of them at every length.
    """
    return -(-length // 16) * 16


def with_row_stride(x: Tensor) -> Tensor:
    """x (B, H, Tq) with the `row_stride` of kernels, contiguous (B, H, S)."""
    missing = row_stride(x.shape[-1]) - x.shape[-1]
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).contiguous()


def with_equal_strides(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """The two ends of key ranges, (B, H, Tq), such that one set of strides serves both in a kernel."""
    return (start, stop) if start.stride() == stop.stride() else (start.contiguous(), stop.contiguous())


def with_wide_strides(x: Tensor) -> Tensor:
    """One end of key ranges, (B, H, Tq), with strides that are multiples of 16, so that kernels load wide pieces of it.

    Where they are not, (B, H, S), and expanded dims stay so.
    """
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True)]
    if not any(stride % 16 for stride in strides):
        return x.as_strided(x.shape, (*strides, 1))
    once = [slice(None) if stride else slice(1) for stride in strides]
    return with_row_stride(x[tuple(once)]).expand(*x.shape[:2], -1)


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
