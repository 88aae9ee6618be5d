"""The public `entmax`: the kernels where they apply, else the reference."""

from __future__ import annotations

from torch import Tensor

from ..implementation import choose_implementation
from .reference import check_entmax_inputs, entmax_last_dim


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, *, implementation: str = "auto") -> Tensor:
    """alpha-entmax of x along `dim`: like softmax, but with exact zeros.

    On a GPU bfloat16, float16 and float32 are computed by kernels, one pass over rows that fit in registers.

    Args:
        x: any shape and floating dtype; computed in float32 (float64 stays). -inf marks masked entries.
        alpha: 1 <= alpha <= 2, where 1 is softmax, 2 sparsemax. A number, or a tensor that broadcasts to x with size 1
            at `dim` (a learned alpha per head, say); a tensor's values must exceed 1, and it receives a gradient. What is
            not 1 is at least 1.0001.
        dim: the dimension that sums to 1.
        implementation: auto | triton | reference; auto takes the kernels where they run. Softmax is torch's own.

    Returns:
        Same shape and dtype as x. A row that is masked throughout gives zeros.

    Raises:
        ValueError: for an alpha outside [1, 2] or one that does not broadcast, for an x that is not of a floating type or
            has no such dim, and where triton is asked for and cannot run.
    """
    x, alpha = check_entmax_inputs(x, alpha, dim)
    is_softmax = not isinstance(alpha, Tensor) and alpha == 1.0
    transform = entmax_last_dim
    if choose_implementation(implementation, x.device, x.dtype) == "triton" and not is_softmax:
        from .operator import entmax_kernels as transform
    return transform(x, alpha).movedim(-1, dim)
