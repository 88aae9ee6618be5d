"""The entmax transform in plain torch: the meaning that every kernel is held to.

alpha-entmax(x)_j = [(alpha - 1) x_j - tau]_+^(1 / (alpha - 1)), with tau such that a row sums to 1
(Peters, Niculae and Martins 2019, section 3). Gradients: Peters et al. 2019, Prop. 2; for alpha Correia, Niculae and
Martins 2019, Prop. 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_alpha, check_tensor

# Sorting starts with this many largest entries of a row, and doubles while a row's support may be larger.
FIRST_CANDIDATES = 64


def _threshold_sorted(z: Tensor, quadratic: bool) -> Tensor:
    """Exact tau for alpha = 1.5 (quadratic) and alpha = 2 over the last dim of z; z <= 0 with a maximum of 0.

    Only the largest entries can be in the support, so they alone are sorted; where a row needs more of them, twice as many
    for alpha = 2, and for alpha = 1.5 none, since Newton's method is faster then.
    """
    length = z.shape[-1]
    count = min(FIRST_CANDIDATES, length)
    while True:
        top = z.topk(count, dim=-1).values.clamp(min=-2.0)  # below max - 1 nothing is in the support: -2 is out
        size = torch.arange(1, count + 1, device=z.device, dtype=z.dtype)
        mean = top.cumsum(-1) / size
        if quadratic:
            variance = (top.square().cumsum(-1) / size - mean.square()).clamp(min=0)
            tau = mean - ((1.0 / size) - variance).clamp(min=0).sqrt()
        else:
            tau = mean - 1.0 / size
        support = (tau < top).sum(-1, keepdim=True).clamp(min=1)
        tau = tau.gather(-1, support - 1)
        if count == length or not (support == count).any():
            return tau
        if quadratic:
            return _threshold_squares(z, tau)
        count = min(2 * count, length)


def _threshold_squares(z: Tensor, tau: Tensor) -> Tensor:
    """tau for alpha = 1.5, from the threshold of a row's largest entries, which is a lower bound.

    Newton's method on the norm of [z - t]_+, nearly a straight line in t: a few steps, where sorting would go on for long.
    """
    tiny = torch.finfo(z.dtype).eps
    for _ in range(100):
        distance = (z - tau).clamp_(min=0)
        slope = distance.sum(-1, keepdim=True).clamp(min=tiny)
        mass = distance.square_().sum(-1, keepdim=True)
        step = (mass - mass.sqrt()) / slope
        tau = tau + step
        if not (step.abs() > 2 * tiny).any():
            break
    return tau


def _threshold_newton(z: Tensor, alpha: Tensor) -> Tensor:
    """tau for any 1 < alpha <= 2: Newton's method from the left of the root.

    f(t) = sum [z - t]_+^(1 / (alpha - 1)) is convex and decreasing, so that starting at max z - 1, where f >= 1, the
    iterates climb to the root and never pass it.
    """
    power = 1.0 / (alpha - 1.0)
    tau = torch.full_like(z[..., :1], -1.0)
    tiny = torch.finfo(z.dtype).eps
    for _ in range(100):
        distance = (z - tau).clamp(min=0)
        # distance ** (power - 1) at distance 0 would be 1 for alpha = 2: outside the support it has to be 0
        slope = torch.where(distance > 0, distance ** (power - 1.0), 0.0)
        step = ((slope * distance).sum(-1, keepdim=True) - 1.0) / (power * slope.sum(-1, keepdim=True)).clamp(min=tiny)
        tau = tau + step.clamp(min=0)
        if (step <= 2 * tiny).all():
            break
    return tau


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor, alpha_value: float | None) -> Tensor:
        """x (..., n), alpha broadcastable to (..., 1); alpha_value is set where alpha is one known number."""
        work = x if x.dtype == torch.float64 else x.float()
        alpha = alpha.to(work.dtype)
        top = work.amax(-1, keepdim=True)
        masked_row = top == -torch.inf
        z = (alpha - 1.0) * (work - top.masked_fill(masked_row, 0.0))
        if alpha_value in (1.5, 2.0):
            tau = _threshold_sorted(z, quadratic=alpha_value == 1.5)
        else:
            tau = _threshold_newton(z, alpha)
        p = (z - tau).clamp(min=0) ** (1.0 / (alpha - 1.0))
        p = p.masked_fill(masked_row, 0.0)
        ctx.save_for_backward(p, alpha)
        ctx.x_dtype = x.dtype
        return p.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        p, alpha = ctx.saved_tensors
        grad = grad.to(p.dtype)
        u = torch.where(p > 0, p ** (2.0 - alpha), 0.0)
        share = u / u.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)  # the u-weighted mean's weights
        grad_x = grad_alpha = None
        if ctx.needs_input_grad[0]:
            grad_x = (u * (grad - (share * grad).sum(-1, keepdim=True))).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            entropy = -torch.special.xlogy(p, p)
            by_alpha = (p - share) / (alpha - 1.0) ** 2
            by_alpha = by_alpha + (entropy - share * entropy.sum(-1, keepdim=True)) / (alpha - 1.0)
            grad_alpha = (grad * by_alpha).sum_to_size(alpha.shape)
        return grad_x, grad_alpha, None


def check_entmax_inputs(x: Tensor, alpha: float | Tensor, dim: int) -> tuple[Tensor, float | Tensor]:
    """x, and a tensor alpha that is not a scalar, with `dim` moved last.

    Raises:
        ValueError: for an alpha outside [1, 2] or one that does not broadcast, an x that is not of a floating type, or a dim
            that it does not have.
    """
    check_alpha(alpha)
    check_tensor("x", x)
    if not x.is_floating_point():
        raise ValueError(f"entmax expects a floating point x, got {x.dtype}.")
    if x.ndim == 0:
        raise ValueError("entmax expects at least one dimension, got a scalar.")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"entmax expects a dim of x, whose shape is {tuple(x.shape)}, got {dim}.")
    shape = x.shape
    x = x.movedim(dim, -1)
    if x.shape[-1] == 0:
        raise ValueError(f"entmax expects at least one entry along dim {dim}, got shape {tuple(x.shape)}.")
    if isinstance(alpha, Tensor) and alpha.ndim:
        try:
            moved = alpha.expand(torch.broadcast_shapes(alpha.shape, (1,) * x.ndim)).movedim(dim, -1)
            fits = moved.shape[-1] == 1 and torch.broadcast_shapes(moved.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"Expected an alpha that broadcasts to x with size 1 at dim {dim}, got alpha of shape "
                f"{tuple(alpha.shape)} for x of shape {tuple(shape)}."
            )
        alpha = moved
    return x, alpha


def entmax_last_dim(x: Tensor, alpha: float | Tensor) -> Tensor:
    """entmax over the last dim, of checked inputs: alpha a number, or a tensor that broadcasts to x[..., :1]."""
    if isinstance(alpha, Tensor):
        return _Entmax.apply(x, alpha, None)
    if alpha == 1.0:
        work = x if x.dtype == torch.float64 else x.float()
        masked_row = (work == -torch.inf).all(-1, keepdim=True)
        return work.masked_fill(masked_row, 0.0).softmax(-1).masked_fill(masked_row, 0.0).to(x.dtype)
    return _Entmax.apply(x, torch.tensor(float(alpha), device=x.device, dtype=torch.float64), float(alpha))


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """What the public `entmax` computes, in plain torch on any device and in any floating dtype; arguments as there."""
    x, alpha = check_entmax_inputs(x, alpha, dim)
    return entmax_last_dim(x, alpha).movedim(-1, dim)
