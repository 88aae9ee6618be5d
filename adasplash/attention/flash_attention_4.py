"""FlashAttention-4, of the package flash-attn-4, as a torch operator, so that torch.compile can put it into a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.announce import announce
from ..ops.torch_operator import torch_operator


class Kernels(NamedTuple):
    """The package's two functions below its own autograd function; tensors are (B, T, H, D)."""

    forward: Callable
    backward: Callable


@functools.cache
def installed_kernels() -> Kernels | None:
    """None where the package is not installed, or cannot be loaded, which is announced."""
    try:
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
    except ModuleNotFoundError:
        return None
    except Exception as error:  # of any kind where versions do not fit
        announce(f"attention=flash: flash-attn-4 is installed but cannot be loaded ({type(error).__name__}: {error}).")
        return None
    return Kernels(_flash_attn_fwd, _flash_attn_bwd)


@torch.compiler.assume_constant_result
def runs_on(device: torch.device) -> bool:
    """Whether it is installed and was tried on such a GPU: on Hopper."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and torch.version.hip is None
        and installed_kernels() is not None
    )


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether it can take these (B, H, T, D): for what it was tried with, half precision and head dims 64 and 128."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in (64, 128)
        and min(q.shape[2], k.shape[2]) > 0
        and runs_on(q.device)
    )


@torch_operator("adasplash::flash_attention_4")
def forward_operator(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """q (B, Tq, H, D); k, v (B, Tk, G, D). Returns out as q, contiguous, and lse (B, H, Tq) float32."""
    out, lse, *_ = installed_kernels().forward(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
    return out, lse


def _empty_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous, whatever the strides of q, k and v: the package takes no others."""
    return tuple(x.new_empty(x.shape) for x in tensors)


@torch_operator("adasplash::flash_attention_4_backward")
def backward_operator(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous."""
    dq, dk, dv = _empty_gradients(q, k, v)
    deterministic = torch.are_deterministic_algorithms_enabled()
    installed_kernels().backward(
        q, k, v, out, d_out, lse, scale, causal, deterministic=deterministic, dq=dq, dk=dk, dv=dv
    )
    return dq, dk, dv


@forward_operator.register_fake
def _(q, k, v, scale, causal):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


@backward_operator.register_fake
def _(d_out, q, k, v, out, lse, scale, causal):
    return _empty_gradients(q, k, v)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_out, d_lse):
    if d_out is None:
        return (None,) * 5
    return *backward_operator(d_out, *ctx.saved_tensors, ctx.scale, ctx.causal), None, None


forward_operator.register_autograd(_differentiate, setup_context=_save)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> Tensor:
    """q (B, H, Tq, D); k, v (B, G, Tk, D), for which `fits` holds; causal: the last query beside the last key.

    Source: https://github.com/Dao-AILab/flash-attention, flash_attn/cute.
    """
    out, _ = forward_operator(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, causal)
    return out.transpose(1, 2)
