"""The implementations of attention that bench_attention.py compares, ours and those beside it.

How each is named, why it may not run here, and the call that is timed. adasplash is imported where it is used: in the
process that runs AdaSplash-2, that name is another package.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

IMPLEMENTATIONS = {
    "adasplash": "adasplash[:ALPHA|:learned]",
    "softmax": "softmax",
    "hash_sparse": "hash_sparse:BUCKETS",
    "qk_sparse": "qk_sparse:DROP",
    "fa2": "fa2",
    "cudnn": "cudnn",
    "flex": "flex",
    "fa4": "fa4",
    "adasplash2": "adasplash2",
}
ENTMAX = ("adasplash", "adasplash2")
DEPENDS_ON_INPUT = (*ENTMAX, "hash_sparse")
KNOW_DOCUMENTS = ("softmax", "fa2", "fa4")

CHECKED_HEADS, CHECKED_QUERIES = 2, 256  # how many are compared with float64: the first heads, the last queries


class Implementation(NamedTuple):
    """value: what follows the colon; None where nothing does."""

    name: str
    kind: str
    value: float | str | None


def parse_implementation(text: str) -> Implementation:
    """Raises ValueError that lists the valid forms."""
    kind, colon, rest = text.partition(":")
    try:
        value = rest if text == "adasplash:learned" else float(rest) if colon else None
    except ValueError:
        value = math.nan
    if kind == "adasplash":
        valid = value in (None, "learned") or 1 < value <= 2
    elif kind == "hash_sparse":
        valid = value is not None and value >= 2 and value % 2 == 0
    elif kind == "qk_sparse":
        valid = value is not None and 0 <= value < 1
    else:
        valid = kind in IMPLEMENTATIONS and value is None
    if not valid:
        raise ValueError(
            f"Unknown implementation '{text}'; expected one of {', '.join(IMPLEMENTATIONS.values())}, "
            "with 1 < ALPHA <= 2, an even number of BUCKETS and 0 <= DROP < 1."
        )
    return Implementation(text, kind, value)


def alpha_of(implementation: Implementation, default: float) -> float:
    """1 is softmax."""
    if implementation.kind not in ENTMAX:
        return 1.0
    return implementation.value if isinstance(implementation.value, float) else default


def why_left_out(implementation: Implementation, folder: Path | None, alpha: float, documents: int = 1) -> str | None:
    """Why an implementation cannot be run here, None where it can; folder: of AdaSplash-2."""
    if documents > 1 and implementation.kind not in KNOW_DOCUMENTS:
        return f"of packed documents only {', '.join(KNOW_DOCUMENTS)} are timed"
    if implementation.kind == "fa4":
        try:
            import flash_attn.cute  # noqa: F401
        except Exception as error:  # of other kinds too where versions do not fit
            return f"not installed ({type(error).__name__}: {one_line(error)})"
    if implementation.kind == "adasplash2":
        if folder is None:
            return "not given (--adasplash2 names the folder that holds it)"
        if not (folder / "adasplash" / "adasplash_v2.py").exists():
            return f"not installed (there is no adasplash/adasplash_v2.py in {folder})"
        if alpha != 1.5:
            return "it knows alpha 1.5 only"
    return None


def one_line(text: object) -> str:
    return " ".join(str(text).split())[:200]


@dataclass(frozen=True)
class Call:
    """An implementation with its arguments.

    learned: tensors besides q, k, v that receive a gradient.
    allowed: which keys the checked queries may see besides the causal rule, bool (heads, queries, keys).
    """

    attend: Callable[[], Tensor]
    learned: tuple[Tensor, ...] = ()
    allowed: Tensor | None = None


def prepare(
    implementation: Implementation, q: Tensor, k: Tensor, v: Tensor, alpha: float, positions: Tensor | None = None
) -> Call:
    """positions: position ids (B, T) of packed documents, which then do not see each other."""
    kind, value = implementation.kind, implementation.value
    if positions is not None:
        return prepare_documents(q, k, v, kind, positions)
    if kind == "adasplash":
        return prepare_adasplash(q, k, v, alpha, learned=value == "learned")
    if kind == "softmax":
        from adasplash import softmax_attention

        return Call(lambda: softmax_attention(q, k, v, implementation="triton"))
    if kind == "hash_sparse":
        return prepare_hash_sparse(q, k, v, int(value))
    if kind == "qk_sparse":
        return prepare_qk_sparse(q, k, v, value)
    if kind == "flex":
        return prepare_flex(q, k, v)
    if kind == "fa4":
        return prepare_fa4(q, k, v)
    if kind == "adasplash2":
        from adasplash import adasplash2

        return Call(lambda: adasplash2(q, k, v, niter=1))
    return prepare_torch(q, k, v, kind)


def prepare_adasplash(q: Tensor, k: Tensor, v: Tensor, alpha: float, learned: bool) -> Call:
    from adasplash import entmax_attention

    if not learned:
        return Call(lambda: entmax_attention(q, k, v, alpha=alpha, implementation="triton"))
    alphas = torch.full((q.shape[1],), alpha, device=q.device, requires_grad=True)
    return Call(lambda: entmax_attention(q, k, v, alpha=alphas, implementation="triton"), learned=(alphas,))


def prepare_hash_sparse(q: Tensor, k: Tensor, v: Tensor, n_buckets: int) -> Call:
    from adasplash import hash_sparse_attention
    from adasplash.ops.reordered_attention import random_directions

    directions = random_directions(q.shape[1], q.shape[-1], n_buckets, device=q.device)

    def buckets(x: Tensor) -> Tensor:
        projected = x[0, :CHECKED_HEADS].detach().double() @ directions[:CHECKED_HEADS].double()
        return torch.cat([projected, -projected], -1).argmax(-1)

    return Call(
        lambda: hash_sparse_attention(q, k, v, directions=directions, implementation="triton"),
        allowed=buckets(q)[:, -CHECKED_QUERIES:, None] == buckets(k)[:, None, :],
    )


def prepare_qk_sparse(q: Tensor, k: Tensor, v: Tensor, drop: float) -> Call:
    from adasplash import qk_sparse_attention
    from adasplash.ops.reordered_attention import keep_mask

    masks = {"query_kept": keep_mask(q, drop), "key_kept": keep_mask(k, drop)}
    query_kept, key_kept = (mask[0, :CHECKED_HEADS] for mask in masks.values())
    return Call(
        lambda: qk_sparse_attention(q, k, v, **masks, implementation="triton"),
        allowed=query_kept[:, -CHECKED_QUERIES:, None] & key_kept[:, None, :],
    )


def prepare_torch(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[kind]

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return Call(attend)


def prepare_flex(q: Tensor, k: Tensor, v: Tensor) -> Call:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(batch, head, query, key):
        return query >= key

    torch._dynamo.reset()  # what was compiled for other lengths counts towards a limit
    torch._functorch.config.donated_buffer = False  # the backward pass is timed by itself, again and again
    length = q.shape[2]
    block_mask = create_block_mask(causal, None, None, length, length, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return Call(lambda: compiled(q, k, v, block_mask=block_mask))


def prepare_fa4(q: Tensor, k: Tensor, v: Tensor) -> Call:
    from flash_attn.cute import flash_attn_func

    def attend() -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)  # (B, T, H, D)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Call(attend)


def prepare_documents(q: Tensor, k: Tensor, v: Tensor, kind: str, positions: Tensor) -> Call:
    document = (positions == 0).cumsum(-1)[0]
    allowed = (document[-CHECKED_QUERIES:, None] == document)[None].expand(CHECKED_HEADS, -1, -1)
    if kind == "softmax":
        from adasplash import KeyRange, softmax_attention

        key_range = KeyRange.documents(positions)
        return Call(lambda: softmax_attention(q, k, v, key_range=key_range, implementation="triton"), allowed=allowed)
    begins = (positions.flatten() == 0).nonzero().flatten()
    bounds = torch.cat([begins, begins.new_tensor([positions.numel()])]).int()
    longest = int(bounds.diff().max())
    if kind == "fa4":
        from flash_attn.cute import flash_attn_varlen_func

        lengths = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
        attend_packed = functools.partial(flash_attn_varlen_func, **lengths, causal=True)
    else:
        from torch.nn.attention.varlen import varlen_attn

        lengths = {"cu_seq_q": bounds, "cu_seq_k": bounds, "max_q": longest, "max_k": longest}
        newer = "window_size" in inspect.signature(varlen_attn).parameters
        attend_packed = functools.partial(
            varlen_attn, **lengths, **({"window_size": (-1, 0)} if newer else {"is_causal": True})
        )
    batch, heads, length, dim = q.shape

    def attend() -> Tensor:
        packed = (x.transpose(1, 2).reshape(batch * length, heads, dim) for x in (q, k, v))
        out = attend_packed(*packed)
        out = out[0] if isinstance(out, tuple) else out
        return out.view(batch, length, heads, dim).transpose(1, 2)

    return Call(attend, allowed=allowed)
