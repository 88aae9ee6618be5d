"""The public `entmax`: the kernels where they apply, else the reference."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from .reference import check_entmax_inputs, entmax_last_dim

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HAS_TRITON = find_spec("triton") is not None


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """alpha-entmax of x along `dim`: like softmax, but with exact zeros.

    On a GPU bfloat16, float16 and float32 are computed by kernels, one pass over rows that fit in registers.

    Args:
        x: any shape and floating dtype; computed in float32 (float64 stays). -inf marks masked entries.
        alpha: 1 <= alpha <= 2, where 1 is softmax, 2 sparsemax. A number, or a tensor that broadcasts to x with size 1
            at `dim` (a learned alpha per head, say); a tensor's values must exceed 1, and it receives a gradient.
        dim: the dimension that sums to 1.

    Returns:
        Same shape and dtype as x. A row that is masked throughout gives zeros.

    Raises:
        ValueError: for an alpha outside [1, 2] or one that does not broadcast, or an x that is not of a floating type.
    """
    x, alpha = check_entmax_inputs(x, alpha, dim)
    is_softmax = not isinstance(alpha, Tensor) and alpha == 1.0
    transform = entmax_last_dim
    if x.is_cuda and x.dtype in KERNEL_DTYPES and not is_softmax and HAS_TRITON:
        from .operator import entmax_kernels as transform
    return transform(x, alpha).movedim(-1, dim)
