"""attention=flash: all keys in range, softmax, through the best fused kernel that this machine has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ..ops.announce import announce
from ..ops.checks import check_attention_inputs, resolve_key_range, resolve_scale
from ..ops.implementation import why_no_kernels
from ..ops.range_attention import alibi_bias, row_chunks
from ..ops.softmax_attention import softmax_attention
from . import flash_attention_4
from .backend import AttentionBackend

# Of PyTorch's, fastest first, as measured on an H200 (forward + backward at 16k: FlashAttention-4 11 ms, cuDNN 13 ms,
# FlashAttention-2 21 ms).
PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, mask: Tensor | None = None):
    """PyTorch's scaled dot product attention, grouped heads included."""
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(PRIORITY, set_priority=True):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )


def pytorch_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    """The name of the kernel that `fused_attention` runs without a mask; under torch.compile it is not known yet."""
    if q.device.type != "cuda" or torch.compiler.is_compiling():
        return f"PyTorch's fused attention on {q.device.type}"
    asked = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1])
    if torch.backends.cuda.can_use_cudnn_attention(asked):
        return "cuDNN"
    if torch.backends.cuda.can_use_flash_attention(asked):
        return "FlashAttention-2"
    return "PyTorch's fused attention on cuda"


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """Attention without a mask by the fastest kernel that there is: FlashAttention-4, else PyTorch's; says which."""
    if flash_attention_4.fits(q, k, v):
        announce("attention=flash: FlashAttention-4.")
        return flash_attention_4.flash_attention_4(q, k, v, scale=scale, causal=causal)
    announce(f"attention=flash: {pytorch_kernel(q, k, v, causal)}.")
    return fused_attention(q, k, v, causal=causal, scale=scale)


def _masked_chunk(q, k, v, start, stop, scale, slopes, first_query, first_key) -> Tensor:
    """One block of rows under a mask; a row that sees no key is given one, and its output is zeroed."""
    key = torch.arange(first_key, first_key + k.shape[2], device=q.device)
    mask = (key >= start[..., None]) & (key < stop[..., None])
    empty = (stop <= start)[..., None]
    mask = mask | (empty & (key == first_key))
    if slopes is not None:
        query = torch.arange(first_query, first_query + q.shape[2], device=q.device)
        mask = alibi_bias(slopes, query[None, None], key[None, None]).masked_fill(~mask, -torch.inf).to(q.dtype)
    return fused_attention(q, k, v, causal=False, scale=scale, mask=mask).masked_fill(empty, 0.0)


@torch.compiler.disable
def masked_fused_attention(q, k, v, key_range, *, scale, slopes) -> Tensor:
    """Fused attention over key ranges, in row blocks so that no T x T mask exists."""
    if q.numel() == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    offset = k.shape[2] - q.shape[2]
    out = []
    for begin, end, first, last in row_chunks(q, k, key_range):
        inputs = (
            q[:, :, begin:end],
            k[:, :, first:last],
            v[:, :, first:last],
            key_range.start[..., begin:end],
            key_range.stop[..., begin:end],
            scale,
            slopes,
            begin + offset,
            first,
        )
        if torch.is_grad_enabled():  # recompute, rather than keep every block's mask
            out.append(checkpoint(_masked_chunk, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            out.append(_masked_chunk(*inputs))
    return torch.cat(out, 2)


class Flash(AttentionBackend):
    name = "flash"

    def forward(self, q, k, v, *, key_range=None, causal=True, scale=None):
        plain = key_range is None and self.slopes is None
        single = q.shape[2] == 1  # the one query at the end sees everything
        if self.options.implementation == "auto" and plain and (not causal or single or q.shape[2] == k.shape[2]):
            check_attention_inputs(q, k, v)
            return dense_attention(q, k, v, causal=causal and not single, scale=resolve_scale(q, scale))
        if self.options.implementation != "auto" or why_no_kernels(q.device, q.dtype, self.head_dim) is None:
            return softmax_attention(
                q,
                k,
                v,
                key_range=key_range,
                causal=causal,
                scale=scale,
                alibi_slopes=self.slopes,
                implementation=self.announce_implementation(q),
            )
        check_attention_inputs(q, k, v)
        scale = resolve_scale(q, scale)
        announce(f"attention=flash: PyTorch's fused attention under masks, in row blocks, on {q.device.type}.")
        visible = resolve_key_range(q, k, key_range, causal)
        return masked_fused_attention(q, k, v, visible, scale=scale, slopes=self.slopes)
