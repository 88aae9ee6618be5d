"""The entmax transform on a GPU as torch operators: `adasplash::entmax` and its backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..kernel_operator import kernel_operator, launch
from ..launch_arguments import GENERAL, formula_of, last_contiguous
from .kernels import entmax_backward_kernel, entmax_kernel

# The forward holds rows of up to this many entries in registers; longer ones, and all in the backward, are swept in memory,
# in blocks of up to SWEPT_BLOCK.
LONGEST_HELD = 16384
SWEPT_BLOCK = 4096


def _block(length: int, longest: int) -> dict:
    block = min(max(triton.next_power_of_2(length), 128), longest)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _empty_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 3), dtype=torch.float32)


@kernel_operator("adasplash::entmax")
def entmax_forward(x: Tensor, alpha: Tensor, formula: int) -> tuple[Tensor, Tensor]:
    """x (R, n), bfloat16, float16 or float32, last stride 1; alpha (R,) float32; formula from `formula_of`.

    Returns p (R, n) in x's dtype, and the rows' thresholds (R, 3) in float32, in the parts that `entmax_kernel` explains.
    """
    p, threshold = _empty_outputs(x)
    rows, length = x.shape
    held = length <= LONGEST_HELD
    launch(entmax_kernel, (rows,),
        x, alpha, p, threshold, x.stride(0), alpha.stride(0), length,
        FORMULA=formula, HELD=held, **_block(length, LONGEST_HELD if held else SWEPT_BLOCK),
    )  # fmt: skip
    return p, threshold


@entmax_forward.register_fake
def _(x, alpha, formula):
    return _empty_outputs(x)


@kernel_operator("adasplash::entmax_backward")
def entmax_backward(
    g: Tensor, x: Tensor, alpha: Tensor, threshold: Tensor, formula: int, alpha_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The gradients for x (R, n), in its dtype, and for alpha (R,), which is empty unless asked for; g (R, n)."""
    rows, length = x.shape
    dx = x.new_empty(x.shape)
    d_alpha = threshold.new_empty(rows if alpha_gradient else 0)
    launch(entmax_backward_kernel, (rows,),
        g, x, alpha, threshold, dx, d_alpha, g.stride(0), x.stride(0), alpha.stride(0), length,
        FORMULA=formula, ALPHA_GRADIENT=alpha_gradient, **_block(length, SWEPT_BLOCK),
    )  # fmt: skip
    return dx, d_alpha


@entmax_backward.register_fake
def _(g, x, alpha, threshold, formula, alpha_gradient):
    return x.new_empty(x.shape), threshold.new_empty(x.shape[0] if alpha_gradient else 0)


def _setup_context(ctx, inputs, output):
    x, alpha, ctx.formula = inputs
    ctx.save_for_backward(x, alpha, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, g, unused):
    if g is None:
        return None, None, None
    alpha_gradient = ctx.needs_input_grad[1]
    dx, d_alpha = entmax_backward(last_contiguous(g), *ctx.saved_tensors, ctx.formula, alpha_gradient)
    return dx, d_alpha if alpha_gradient else None, None


entmax_forward.register_autograd(_backward, setup_context=_setup_context)


def entmax_kernels(x: Tensor, alpha: float | Tensor) -> Tensor:
    """alpha-entmax over the last dim by kernels; a transform with another layout is copied first.

    Args:
        x: (..., n), bfloat16, float16 or float32, on a GPU; n at least 1.
        alpha: 1 < alpha <= 2, a number or a tensor that broadcasts to x[..., :1]; a tensor receives a gradient.
    """
    rows = last_contiguous(x.reshape(-1, x.shape[-1]))
    if isinstance(alpha, Tensor):
        formula = GENERAL
        alpha = alpha.to(x.device, torch.float32).expand(*x.shape[:-1], 1).reshape(-1)
    else:
        formula = formula_of(alpha)
        alpha = torch.full((1,), alpha, dtype=torch.float32, device=x.device).expand(rows.shape[0])
    return entmax_forward(rows, alpha, formula)[0].view(x.shape)
