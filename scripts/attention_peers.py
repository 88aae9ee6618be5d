"""The implementations of attention that bench_attention.py compares, ours and those beside it.

What there is to know of each stands in one table, PEERS, at the end; what is measured of it is a `Call`. adasplash is
imported where it is used: in the process that runs AdaSplash-2, that name is another package.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from forms import Form, misfit
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CHECKED_HEADS, CHECKED_QUERIES = 2, 256  # how many are compared with float64: the first heads, the last queries

Value = float | str | None  # what follows the colon of an implementation; None where nothing does


@dataclass(frozen=True)
class Call:
    """An implementation with its arguments.

    learned: tensors besides q, k, v that receive a gradient.
    allowed: which keys the checked queries may see besides the causal rule, bool (heads, queries, keys).
    """

    attend: Callable[[], Tensor]
    learned: tuple[Tensor, ...] = ()
    allowed: Tensor | None = None


@dataclass(frozen=True)
class Peer:
    """What there is to know of an implementation.

    keys: those that get weight: "all", those of the "support" that entmax leaves, of the query's "bucket", or some that
        are "drawn" whatever the input.
    prepare: the call, of q, k, v (B, H, T, D), what follows the colon, and alpha.
    prepare_documents: the call, of q, k, v and the position ids (B, T) of packed documents, which do not see each other;
        None where it knows no documents.
    takes: whether what follows the colon is valid.
    why_missing: why it cannot run here, of the folder of AdaSplash-2 and alpha; None where it can.
    """

    form: Form
    keys: Literal["all", "support", "bucket", "drawn"]
    prepare: Callable[..., Call]
    prepare_documents: Callable[[Tensor, Tensor, Tensor, Tensor], Call] | None = None
    takes: Callable[[Value], bool] = lambda value: value is None
    why_missing: Callable[[Path | None, float], str | None] = lambda folder, alpha: None


class Implementation(NamedTuple):
    """A peer as it was asked for, such as hash_sparse:16. value: what follows the colon; None where nothing does."""

    name: str
    kind: str
    value: Value

    @property
    def entmax(self) -> bool:
        return PEERS[self.kind].keys == "support"

    @property
    def depends_on_input(self) -> bool:
        """Whether its time does."""
        return PEERS[self.kind].keys in ("support", "bucket")


def parse_implementation(text: str) -> Implementation:
    """Raises ValueError that names the valid form, or the valid forms and the nearest."""
    kind, colon, rest = text.partition(":")
    value: Value = rest if colon else None
    try:
        value = float(rest) if colon else None
    except ValueError:
        pass  # a word
    if kind not in PEERS or not PEERS[kind].takes(value):
        raise misfit("implementation", text, {kind: peer.form for kind, peer in PEERS.items()})
    return Implementation(text, kind, value)


def alpha_of(implementation: Implementation, default: float) -> float:
    """1 is softmax."""
    if not implementation.entmax:
        return 1.0
    return implementation.value if isinstance(implementation.value, float) else default


def why_left_out(implementation: Implementation, folder: Path | None, alpha: float, documents: int = 1) -> str | None:
    """Why an implementation cannot be run here, None where it can; folder: of AdaSplash-2."""
    if documents > 1 and PEERS[implementation.kind].prepare_documents is None:
        known = ", ".join(kind for kind, peer in PEERS.items() if peer.prepare_documents)
        return f"of packed documents only {known} are timed"
    return PEERS[implementation.kind].why_missing(folder, alpha)


def prepare(
    implementation: Implementation, q: Tensor, k: Tensor, v: Tensor, alpha: float, positions: Tensor | None = None
) -> Call:
    """positions: position ids (B, T) of packed documents, which then do not see each other."""
    peer = PEERS[implementation.kind]
    if positions is None:
        return peer.prepare(q, k, v, implementation.value, alpha)
    return peer.prepare_documents(q, k, v, positions)


def one_line(text: object) -> str:
    return " ".join(str(text).split())[:200]


# ---------------------------------------------------------------------------------------------------------------- ours


def prepare_adasplash(q: Tensor, k: Tensor, v: Tensor, value: Value, alpha: float) -> Call:
    from adasplash import entmax_attention

    if value != "learned":
        return Call(lambda: entmax_attention(q, k, v, alpha=alpha, implementation="triton"))
    alphas = torch.full((q.shape[1],), alpha, device=q.device, requires_grad=True)
    return Call(lambda: entmax_attention(q, k, v, alpha=alphas, implementation="triton"), learned=(alphas,))


def prepare_adasplash2(q: Tensor, k: Tensor, v: Tensor, *_) -> Call:
    from adasplash import adasplash2

    return Call(lambda: adasplash2(q, k, v, niter=1))


def prepare_softmax(q: Tensor, k: Tensor, v: Tensor, *_) -> Call:
    from adasplash import softmax_attention

    return Call(lambda: softmax_attention(q, k, v, implementation="triton"))


def prepare_hash_sparse(q: Tensor, k: Tensor, v: Tensor, n_buckets: float, *_) -> Call:
    from adasplash import hash_sparse_attention
    from adasplash.ops.reordered_attention import random_directions

    directions = random_directions(q.shape[1], q.shape[-1], int(n_buckets), device=q.device)

    def buckets(x: Tensor) -> Tensor:
        projected = x[0, :CHECKED_HEADS].detach().double() @ directions[:CHECKED_HEADS].double()
        return torch.cat([projected, -projected], -1).argmax(-1)

    return Call(
        lambda: hash_sparse_attention(q, k, v, directions=directions, implementation="triton"),
        allowed=buckets(q)[:, -CHECKED_QUERIES:, None] == buckets(k)[:, None, :],
    )


def prepare_qk_sparse(q: Tensor, k: Tensor, v: Tensor, drop: float, *_) -> Call:
    from adasplash import qk_sparse_attention
    from adasplash.ops.reordered_attention import keep_mask

    masks = {"query_kept": keep_mask(q, drop), "key_kept": keep_mask(k, drop)}
    query_kept, key_kept = (mask[0, :CHECKED_HEADS] for mask in masks.values())
    return Call(
        lambda: qk_sparse_attention(q, k, v, **masks, implementation="triton"),
        allowed=query_kept[:, -CHECKED_QUERIES:, None] & key_kept[:, None, :],
    )


def prepare_softmax_documents(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Call:
    from adasplash import KeyRange, softmax_attention

    key_range = KeyRange.documents(positions)
    return Call(
        lambda: softmax_attention(q, k, v, key_range=key_range, implementation="triton"),
        allowed=in_own_document(positions),
    )


# ------------------------------------------------------------------------------------------------------- those beside it


def prepare_torch(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *_) -> Call:
    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return Call(attend)


def prepare_flex(q: Tensor, k: Tensor, v: Tensor, *_) -> Call:
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


def prepare_fa4(q: Tensor, k: Tensor, v: Tensor, *_) -> Call:
    from flash_attn.cute import flash_attn_func

    def attend() -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)  # (B, T, H, D)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Call(attend)


def in_own_document(positions: Tensor) -> Tensor:
    """Which keys of their own document the checked queries may see, bool (heads, queries, keys)."""
    document = (positions == 0).cumsum(-1)[0]
    return (document[-CHECKED_QUERIES:, None] == document)[None].expand(CHECKED_HEADS, -1, -1)


def prepare_bounds(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Call:
    """A kernel for sequences of different lengths, which lie one after the other.

    kernel: gives the function of q, k, v (tokens, H, D) for the bounds (sequences + 1,) and the greatest length.
    """
    begins = (positions.flatten() == 0).nonzero().flatten()
    bounds = torch.cat([begins, begins.new_tensor([positions.numel()])]).int()
    attend_packed = kernel(bounds, int(bounds.diff().max()))
    batch, heads, length, dim = q.shape

    def attend() -> Tensor:
        packed = (x.transpose(1, 2).reshape(batch * length, heads, dim) for x in (q, k, v))
        out = attend_packed(*packed)
        out = out[0] if isinstance(out, tuple) else out
        return out.view(batch, length, heads, dim).transpose(1, 2)

    return Call(attend, allowed=in_own_document(positions))


def fa2_within(bounds: Tensor, longest: int) -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    newer = "window_size" in inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if newer else {"is_causal": True}
    return functools.partial(varlen_attn, cu_seq_q=bounds, cu_seq_k=bounds, max_q=longest, max_k=longest, **causal)


def fa4_within(bounds: Tensor, longest: int) -> Callable:
    from flash_attn.cute import flash_attn_varlen_func

    lengths = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return functools.partial(flash_attn_varlen_func, **lengths, causal=True)


def why_no_fa4(folder: Path | None, alpha: float) -> str | None:
    try:
        import flash_attn.cute  # noqa: F401
    except Exception as error:  # of other kinds too where versions do not fit
        return f"not installed ({type(error).__name__}: {one_line(error)})"
    return None


def why_no_adasplash2(folder: Path | None, alpha: float) -> str | None:
    if folder is None:
        return "not given (--adasplash2 names the folder that holds it)"
    if not (folder / "adasplash" / "adasplash_v2.py").exists():
        return f"not installed (there is no adasplash/adasplash_v2.py in {folder})"
    return None if alpha == 1.5 else "it knows alpha 1.5 only"


# ----------------------------------------------------------------------------------------------------------- the table

PEERS = {
    "adasplash": Peer(
        Form(
            "adasplash[:ALPHA|:learned]",
            "entmax_attention; learned: alpha is a tensor, one a head, that receives a gradient",
            "1 < ALPHA <= 2",
        ),
        keys="support",
        prepare=prepare_adasplash,
        takes=lambda value: value in (None, "learned") or (isinstance(value, float) and 1 < value <= 2),
    ),
    "softmax": Peer(
        Form("softmax", "softmax_attention by its Triton kernels"),
        keys="all",
        prepare=prepare_softmax,
        prepare_documents=prepare_softmax_documents,
    ),
    "hash_sparse": Peer(
        Form(
            "hash_sparse:BUCKETS",
            "hash_sparse_attention: hashing, sorting, attention and restoring",
            "an even number of BUCKETS",
        ),
        keys="bucket",
        prepare=prepare_hash_sparse,
        takes=lambda value: isinstance(value, float) and value >= 2 and value % 2 == 0,
    ),
    "qk_sparse": Peer(
        Form("qk_sparse:DROP", "qk_sparse_attention likewise, for masks that are drawn beforehand", "0 <= DROP < 1"),
        keys="drawn",
        prepare=prepare_qk_sparse,
        takes=lambda value: isinstance(value, float) and 0 <= value < 1,
    ),
    "fa2": Peer(
        Form("fa2", "FlashAttention-2, as PyTorch has it"),
        keys="all",
        prepare=functools.partial(prepare_torch, SDPBackend.FLASH_ATTENTION),
        prepare_documents=functools.partial(prepare_bounds, fa2_within),
    ),
    "cudnn": Peer(
        Form("cudnn", "cuDNN, as PyTorch has it"),
        keys="all",
        prepare=functools.partial(prepare_torch, SDPBackend.CUDNN_ATTENTION),
    ),
    "flex": Peer(Form("flex", "FlexAttention, compiled"), keys="all", prepare=prepare_flex),
    "fa4": Peer(
        Form("fa4", "FlashAttention-4 (package flash-attn-4)"),
        keys="all",
        prepare=prepare_fa4,
        prepare_documents=functools.partial(prepare_bounds, fa4_within),
        why_missing=why_no_fa4,
    ),
    "adasplash2": Peer(
        Form("adasplash2", "AdaSplash-2 (package adasplash, of the same name as ours: it needs --adasplash2)"),
        keys="support",
        prepare=prepare_adasplash2,
        why_missing=why_no_adasplash2,
    ),
}
