"""Softmax, entmax, hash-sparse and QK-dropping attention against a dense computation with exactly the allowed pairs."""

import pytest
import torch
import torch.utils._pytree as pytree
from dense_attention import dense_attention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import adasplash.ops.range_attention as range_attention_module
from adasplash import KeyRange, entmax_attention, hash_sparse_attention, qk_sparse_attention, softmax_attention
from adasplash.attention import BACKENDS, backend_options
from adasplash.ops.checks import (
    check_attention_inputs,
    resolve_alpha,
    resolve_kept,
    resolve_key_range,
    resolve_scale,
)
from adasplash.ops.implementation import choose_implementation
from adasplash.ops.reordered_attention import random_directions
from adasplash.ops.reordered_attention.attention import keys_of_queries
from adasplash.ops.reordered_attention.reference import hash_buckets

# B, H, G, Tq, Tk, D
SHAPES = [
    (1, 1, 1, 1, 1, 4),
    (2, 2, 1, 63, 63, 8),
    (1, 3, 3, 65, 65, 5),
    (2, 6, 2, 7, 65, 4),
    (1, 8, 1, 66, 3, 4),
    (1, 2, 2, 1, 33, 4),
]
ALPHAS = {"softmax": 1.0, "entmax": 1.5, "per head": "per head"}
KINDS = ["causal", "bidirectional", "window", "documents", "padding", "everything"]


def inputs(shape, dtype=torch.float64):
    batch, heads, groups, query_length, key_length, dim = shape
    q = 2 * torch.randn(batch, query_length, heads, dim, dtype=dtype).transpose(1, 2)  # strided, as from transformers
    k = torch.randn(batch, key_length, groups, dim, dtype=dtype).transpose(1, 2)
    return q, k, torch.randn(batch, groups, key_length, dim, dtype=dtype)


def visibility(kind, shape):
    """KeyRange, causal flag and the mask (B or 1, 1, Tq, Tk) that they should mean, built apart from KeyRange."""
    batch, _, _, query_length, key_length, _ = shape
    i = torch.arange(query_length)[:, None] + key_length - query_length
    j = torch.arange(key_length)[None, :]
    mask, key_range, causal = (
        torch.ones(1, 1, query_length, key_length, dtype=torch.bool),
        None,
        kind != "bidirectional",
    )
    if causal:
        mask = mask & (j <= i)
    if kind in ("window", "everything"):
        key_range = KeyRange.window(query_length, 9, key_length)
        mask = mask & ((i - j).abs() < 9)
    if kind in ("padding", "everything"):
        keep = torch.ones(batch, key_length, dtype=torch.bool)
        keep[0, key_length // 2 :] = False
        keep[-1, : key_length // 3] = False
        padding = KeyRange.padding(keep, query_length)
        key_range = padding if key_range is None else key_range & padding
        mask = mask & keep[:, None, None, :]
    if kind in ("documents", "everything") and query_length == key_length:
        position = torch.arange(key_length) % 13
        documents = KeyRange.documents(position[None])
        key_range = documents if key_range is None else key_range & documents
        mask = mask & (torch.arange(key_length)[:, None] // 13 == torch.arange(key_length) // 13)
    return key_range, causal, mask


def alpha_of(alpha, heads, dtype=torch.float64):
    return torch.linspace(1.2, 1.9, heads, dtype=dtype) if alpha == "per head" else alpha


def buckets_mask(q, k, directions):
    ratio = q.shape[1] // k.shape[1]
    query_buckets = hash_buckets(q, directions.repeat_interleave(ratio, 0))
    return query_buckets[..., :, None] == hash_buckets(k, directions).repeat_interleave(ratio, 1)[..., None, :]


@pytest.fixture(params=["whole", "chunked"])
def chunks(request, monkeypatch):
    if request.param == "chunked":
        monkeypatch.setattr(range_attention_module, "SCORES_AT_ONCE", {"cpu": 3000})


# ------------------------------------------------------------------------------------------------ against the definition


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_range_attention(shape, alpha, kind, chunks):
    q, k, v = inputs(shape)
    key_range, causal, mask = visibility(kind, shape)
    alpha = alpha_of(ALPHAS[alpha], shape[1])
    slopes = 0.3 * torch.rand(shape[1]) if kind in ("causal", "everything") else None
    if kind == "everything":
        slopes = torch.rand(shape[0], shape[1])  # of one sample each
    how = {"key_range": key_range, "causal": causal, "alibi_slopes": slopes, "scale": 0.7 if kind == "window" else None}
    out = entmax_attention(q, k, v, alpha=alpha, **how)
    expected = dense_attention(q, k, v, mask, alpha=alpha, slopes=slopes, scale=how["scale"])
    torch.testing.assert_close(out, expected, atol=1e-8, rtol=1e-7)
    if isinstance(alpha, float) and alpha == 1.0:
        torch.testing.assert_close(softmax_attention(q, k, v, **how), expected)


@pytest.mark.parametrize("attend_self", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hash_sparse(shape, kind, attend_self, chunks):
    if kind == "bidirectional" and not attend_self:
        pytest.skip("refused, see the errors below")
    q, k, v = inputs(shape)
    heads, groups, query_length, key_length, dim = shape[1:]
    directions = random_directions(groups, dim, 4)
    key_range, causal, mask = visibility(kind, shape)
    mask = mask & buckets_mask(q, k, directions)
    if not attend_self:
        own = torch.arange(query_length)[:, None] + key_length - query_length
        mask = mask & (torch.arange(key_length) != own)
    slopes = torch.rand(heads) if kind in ("causal", "everything") else None
    alpha = {"causal": 1.0, "window": 1.5}.get(kind, alpha_of("per head", heads))
    how = {"alpha": alpha, "key_range": key_range, "causal": causal, "alibi_slopes": slopes}
    out = hash_sparse_attention(q, k, v, directions=directions, attend_self=attend_self, **how)
    expected = dense_attention(q, k, v, mask, alpha=alpha, slopes=slopes)
    torch.testing.assert_close(out, expected, atol=1e-8, rtol=1e-7)
    assert (out[(~mask).all(-1).expand(out.shape[:3])] == 0).all()


def test_hash_sparse_with_shared_queries_and_keys():
    q, k, v = inputs((2, 3, 3, 65, 65, 4))
    directions = random_directions(3, 4, 4)
    keys = q / q.norm(dim=-1, keepdim=True)
    mask = torch.ones(65, 65, dtype=torch.bool).tril() & buckets_mask(q, keys, directions)
    assert mask.diagonal(dim1=-2, dim2=-1).all()  # a query's own key is in its bucket
    out = hash_sparse_attention(q, torch.full_like(k, torch.nan), v, directions=directions, shared_qk=True)
    torch.testing.assert_close(out, dense_attention(q, keys, v, mask))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qk_sparse(shape, kind, chunks):
    q, k, v = inputs(shape)
    query_kept, key_kept = torch.rand(q.shape[:3]) > 0.3, torch.rand(k.shape[:3]) > 0.3
    if kind == "bidirectional":
        key_kept[:] = False
    key_range, causal, mask = visibility(kind, shape)
    mask = mask & query_kept[..., None] & key_kept.repeat_interleave(shape[1] // shape[2], 1)[..., None, :]
    slopes = torch.rand(shape[1]) if kind in ("causal", "everything") else None
    alpha = {"causal": 1.0, "window": 1.5}.get(kind, alpha_of("per head", shape[1]))
    how = {"alpha": alpha, "key_range": key_range, "causal": causal, "alibi_slopes": slopes}
    out = qk_sparse_attention(q, k, v, query_kept=query_kept, key_kept=key_kept, **how)
    torch.testing.assert_close(out, dense_attention(q, k, v, mask, alpha=alpha, slopes=slopes), atol=1e-8, rtol=1e-7)
    assert (out[~query_kept] == 0).all()
    torch.testing.assert_close(qk_sparse_attention(q, k, v, **how), entmax_attention(q, k, v, **how))  # None keeps all


# ------------------------------------------------------------------------------------------------------------ gradients


def as_function(kind, shape):
    """(q, k, v, alpha) -> out, for each of the attentions."""
    directions = random_directions(shape[2], shape[5], 4)
    kept = {"query_kept": torch.rand(shape[0], shape[1], shape[3]) > 0.3}
    kept["key_kept"] = torch.rand(shape[0], shape[2], shape[4]) > 0.3
    window = KeyRange.window(shape[3], 4, shape[4])
    slopes = torch.tensor([0.1, 0.4]).repeat(shape[1] // 2)
    return {
        "softmax": lambda q, k, v, alpha: softmax_attention(q, k, v, alibi_slopes=slopes) + 0 * alpha.sum(),
        "entmax": lambda q, k, v, alpha: entmax_attention(q, k, v, alpha=alpha, alibi_slopes=slopes),
        "window": lambda q, k, v, alpha: entmax_attention(q, k, v, alpha=alpha, key_range=window),
        "hash": lambda q, k, v, alpha: hash_sparse_attention(q, k, v, alpha=alpha, directions=directions),
        "shared": lambda q, k, v, alpha: hash_sparse_attention(
            q, q[:, ::2], v, alpha=alpha, directions=directions, attend_self=False
        ),
        "kept": lambda q, k, v, alpha: qk_sparse_attention(q, k, v, alpha=alpha, **kept),
    }[kind]


@pytest.mark.parametrize("kind", ["softmax", "entmax", "window", "hash", "shared", "kept"])
def test_gradients(kind, chunks, monkeypatch):
    if range_attention_module.SCORES_AT_ONCE["cpu"] == 3000:
        monkeypatch.setattr(range_attention_module, "SCORES_AT_ONCE", {"cpu": 2 * 2 * 7 * 2})
    shape = (2, 2, 1, 5, 7, 3) if kind != "shared" else (2, 2, 1, 5, 5, 3)
    alpha = torch.tensor([1.3, 1.6], dtype=torch.float64)
    tensors = [x.requires_grad_() for x in (*inputs(shape), alpha)]
    assert gradcheck(as_function(kind, shape), tensors, fast_mode=True)


def test_gradient_of_one_alpha_for_all_heads():
    q, k, v = inputs((1, 2, 1, 5, 5, 3))
    alpha = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda alpha: entmax_attention(q, k, v, alpha=alpha), (alpha,))


@pytest.mark.parametrize("kind", ["softmax", "entmax", "hash", "kept"])
def test_chunks_change_nothing(kind, monkeypatch):
    shape = (2, 4, 2, 65, 70, 8)
    attend = as_function(kind, shape)
    alpha = torch.linspace(1.2, 1.9, 4, dtype=torch.float64)
    tensors = [x.requires_grad_() for x in (*inputs(shape), alpha)]
    grad = torch.randn(2, 4, 65, 8, dtype=torch.float64)

    def run():
        out = attend(*tensors)
        return out, *torch.autograd.grad(out, tensors, grad, allow_unused=True)

    whole = run()
    monkeypatch.setattr(range_attention_module, "SCORES_AT_ONCE", {"cpu": 2 * 4 * 70 * 7})
    for one, other in zip(whole, run(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["softmax", "entmax", "hash", "kept"])
def test_no_square_tensor_is_kept_for_the_backward_pass(kind, monkeypatch):
    length = 65
    monkeypatch.setattr(range_attention_module, "SCORES_AT_ONCE", {"cpu": 2 * length * 3})
    shape = (1, 2, 1, length, length, 4)
    tensors = [x.requires_grad_() for x in (*inputs(shape), torch.tensor([1.3, 1.6], dtype=torch.float64))]
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        as_function(kind, shape)(*tensors)
    assert saved and max(saved) < length * length


def test_short_sequences_cost_no_more_than_themselves():
    """The block of rows that memory has room for is far longer than these sequences."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    with Sizes():
        entmax_attention(*inputs((1, 2, 2, 1, 3, 4)))
    assert largest <= 100


@pytest.mark.parametrize("kind", ["softmax", "entmax", "hash", "kept"])
def test_queries_without_keys(kind, chunks):
    shape = (2, 2, 1, 66, 66, 4)
    q, k, v = (x.requires_grad_() for x in inputs(shape, torch.float32))
    keep = torch.ones(2, 66, dtype=torch.bool)
    keep[0], keep[1, :30] = False, False  # one sample of pads alone, one with pads on the left
    how = {"key_range": KeyRange.padding(keep)}
    if kind == "hash":
        out = hash_sparse_attention(q, k, v, directions=random_directions(1, 4, 2), alpha=1.5, **how)
    elif kind == "kept":
        out = qk_sparse_attention(q, k, v, query_kept=torch.rand(2, 2, 66) > 0.2, **how)
    else:
        out = entmax_attention(q, k, v, alpha=1.0 if kind == "softmax" else 1.5, **how)
    assert (out[0] == 0).all() and (out[1, :, :30] == 0).all() and out[1, :, 31:].abs().sum() > 0
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all() and x.grad[1].abs().sum() > 0
        assert (x.grad[0] == 0).all() and (x.grad[1, :, :30] == 0).all()


# ------------------------------------------------------------------------------------------------------ dtypes and modes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_only_inputs_and_output_are_rounded(dtype, autocast):
    """Float32 inside, under autocast too: the error is that of rounding the output once."""
    q, k, v = inputs((1, 2, 1, 65, 65, 16), dtype)
    mask = torch.ones(65, 65, dtype=torch.bool).tril()
    for alpha in (1.0, 1.5):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = entmax_attention(q, k, v, alpha=alpha)
        assert out.dtype == dtype
        exact = dense_attention(q, k, v, mask, alpha=alpha)
        assert (out.double() - exact).abs().max() <= 2 * (exact.to(dtype).double() - exact).abs().max() + 1e-5


def test_autocast_changes_no_bucket():
    x, directions = torch.randn(2, 3, 400, 8), random_directions(3, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hash_buckets(x, directions), hash_buckets(x.clone(), directions))
        under_autocast = hash_buckets(x, directions)
    assert torch.equal(under_autocast, hash_buckets(x, directions))


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_huge_scores_stay_finite(alpha):
    q, k, v = (x.requires_grad_() for x in inputs((1, 1, 1, 9, 9, 4), torch.float32))
    out = entmax_attention(1e15 * q, 1e15 * k, v, alpha=alpha)
    out.sum().backward()
    assert all(x.isfinite().all() for x in (out, q.grad, k.grad, v.grad))


def test_values_may_have_another_dim():
    q, k, _ = inputs((1, 4, 2, 9, 9, 4))
    v = torch.randn(1, 2, 9, 6, dtype=torch.float64)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    for attend in (softmax_attention, qk_sparse_attention):
        torch.testing.assert_close(attend(q, k, v), dense_attention(q, k, v, mask))


def test_no_keys_and_no_queries():
    q = torch.randn(1, 2, 3, 4)
    assert torch.equal(entmax_attention(q, q[:, :, :0], q[:, :, :0]), torch.zeros_like(q))
    assert softmax_attention(q[:, :, :0], q, q).shape == (1, 2, 0, 4)
    for attend in (softmax_attention, entmax_attention, qk_sparse_attention):
        assert attend(q[:0], q[:0], q[:0]).shape == (0, 2, 3, 4)
        for queries, keys in ((q[:0], q[:0]), (q, q[:, :, :0]), (q[:, :, :0], q)):
            leaves = [x.clone().requires_grad_() for x in (queries, keys, keys)]
            attend(*leaves).sum().backward()
            assert all((x.grad == 0).all() for x in leaves)


def test_shared_keys_of_queries_of_zeros_are_zeros():
    zeros = torch.zeros(1, 1, 2, 4, dtype=torch.float16)  # which has no number as small as what guards the division
    assert torch.equal(keys_of_queries(zeros), zeros)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_shared_keys_have_the_dtype_of_the_queries_under_autocast(dtype):
    """On a GPU it makes norms float32; torch.autocast itself does nothing where there is none."""
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            assert keys_of_queries(torch.empty(1, 2, 5, 4, device="cuda", dtype=dtype)).dtype == dtype
    finally:
        torch.set_autocast_enabled("cuda", False)


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors():
    q, k, v = inputs((2, 4, 2, 5, 7, 4), torch.float32)
    directions, elsewhere = random_directions(2, 4, 4), torch.ones(4, device="meta")
    cases = [
        (lambda: softmax_attention(q[0], k, v), r"q of shape \(batch, heads, length, dim\)"),
        (lambda: softmax_attention(q.long(), k, v), "floating point q"),
        (lambda: softmax_attention(q, k.double(), v), "one dtype"),
        (lambda: softmax_attention(q, k, v[:, :, 1:]), "k and v with equal"),
        (lambda: softmax_attention(q, k[..., 1:], v), "dim 4 as q has"),
        (lambda: softmax_attention(q[:, :3], k, v), "3 query and 2 key heads"),
        (lambda: softmax_attention(q, k, v, alibi_slopes=torch.ones(3)), r"alibi_slopes of shape \(4,\) or \(2, 4\)"),
        (lambda: softmax_attention(q, k, v.tolist()), "v as a tensor, got list"),
        (lambda: softmax_attention(q, k, v, alibi_slopes=[0.5] * 4), "alibi_slopes as a tensor, got list"),
        (lambda: softmax_attention(q, k, v, alibi_slopes=elsewhere), "alibi_slopes on cpu as q is, got meta"),
        (lambda: softmax_attention(q, k, v, key_range=KeyRange.causal(4, 7)), "key_range of shape"),
        (lambda: softmax_attention(q, k, v, key_range=q > 0), "KeyRange or None, got Tensor; make one by KeyRange.pad"),
        (lambda: softmax_attention(q, k, v, key_range=(0, 5)), "KeyRange or None, got tuple"),
        (lambda: softmax_attention(q, k, v, key_range="causal"), "KeyRange or None, got str"),
        (lambda: softmax_attention(q, k, v, scale=-1.0), "a positive, finite scale, got -1.0"),
        (lambda: softmax_attention(q, k, v, scale=float("inf")), "a positive, finite scale, got inf"),
        (lambda: softmax_attention(q, k, v, scale="1"), "scale as a number, got str"),
        (lambda: softmax_attention(q, k, v, scale=torch.tensor(1.0)), "got a tensor; multiply q by it"),
        (lambda: entmax_attention(q, k, v, alpha=3), "1 <= alpha <= 2"),
        (lambda: entmax_attention(q, k, v, alpha=torch.full((3,), 1.5)), r"shape \(4,\), one per head"),
        (lambda: entmax_attention(q, k, v, alpha="1.5"), "alpha as a number or a tensor, got str"),
        (lambda: entmax_attention(q, k, v, alpha=None), "alpha as a number or a tensor, got NoneType"),
        (lambda: entmax_attention(q, k, v, alpha=[1.5] * 4), "alpha as a number or a tensor, got list"),
        (lambda: entmax_attention(q, k, v, alpha=torch.tensor(2)), "floating point alpha, got torch.int64"),
        (lambda: entmax_attention(q, k, v, alpha=elsewhere), "alpha on cpu as q is, got meta"),
        (lambda: hash_sparse_attention(q, k, v, directions=8), "directions as a tensor, got int"),
        (lambda: hash_sparse_attention(q, k, v, directions=directions.long()), "floating point, got .* torch.int64"),
        (lambda: hash_sparse_attention(q, k, v, directions=directions.to("meta")), "directions on cpu as q is"),
        (lambda: hash_sparse_attention(q, k, v, directions=directions[:1]), r"directions of shape \(2, 4,"),
        (
            lambda: hash_sparse_attention(q, k, v, directions=directions, causal=False, attend_self=False),
            "attend_self=False needs causal=True",
        ),
        (lambda: hash_sparse_attention(q, k, v, directions=directions, shared_qk=True), "use_cache=False in generate"),
        (lambda: qk_sparse_attention(q, k, v, query_kept=torch.ones(2, 4, 5)), "query_kept bool"),
        (lambda: qk_sparse_attention(q, k, v, query_kept=[True]), "query_kept as a tensor, got list"),
        (lambda: qk_sparse_attention(q, k, v, key_kept=torch.ones(2, 4, 7).bool()), r"key_kept bool \(2, 2, 7\)"),
        (lambda: random_directions(2, 4, 5), "even n_buckets"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_checks_stay_inside_one_graph():
    """Everything up to the operators: checks of kinds and devices must not break a graph, nor a number make many."""

    def checked(q, kept, alpha, scale):
        check_attention_inputs(q, q, q, q[:, 0, 0, 0])
        visible = resolve_key_range(q, q, KeyRange.window(5, 3), True)
        scores = resolve_scale(q, scale) * resolve_alpha(q, alpha) * q + resolve_kept("kept", kept, q)[..., None]
        return scores + visible.start[..., None]

    q, kept = torch.randn(3, 3, 5, 4), torch.rand(3, 3, 5) > 0.5
    compiled = torch.compile(checked, fullgraph=True, backend="aot_eager")
    for alpha in (1.5, 1.25, 2, torch.tensor(1.5), torch.full((3,), 1.5)):
        torch.testing.assert_close(compiled(q, kept, alpha, 0.5), checked(q, kept, alpha, 0.5))


@pytest.mark.parametrize("backend", ["adasplash", "hash_sparse", "qk_sparse"])
def test_backends_leave_to_the_reference_what_kernels_do_not_take(backend, monkeypatch):
    """As on a GPU: values may have another head dim than queries, whichever backend is configured."""
    monkeypatch.setattr("adasplash.attention.backend.why_no_kernels", lambda *arguments: None)
    monkeypatch.setattr("adasplash.ops.attend.choose_implementation", lambda *arguments: "triton")
    monkeypatch.setattr("adasplash.attention.backend.choose_implementation", lambda *arguments: "triton")
    module = BACKENDS[backend](backend_options(backend), heads=2, key_heads=2, head_dim=16)
    q, v = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 8)
    assert module(q, q, v).shape == (1, 2, 5, 8)


@pytest.mark.parametrize("obstacle", ["head dim", "ALiBi slopes"])
def test_triton_is_not_silently_replaced_by_the_reference(obstacle, monkeypatch, caplog):
    monkeypatch.setattr("adasplash.ops.announce._announced", set())
    monkeypatch.setattr("adasplash.ops.implementation.why_no_kernels", lambda *arguments: None)  # as on a GPU
    q = torch.randn(1, 2, 5, 16)
    v = torch.randn(1, 2, 5, 8 if obstacle == "head dim" else 16)
    slopes = torch.ones(2, requires_grad=True) if obstacle == "ALiBi slopes" else None
    with pytest.raises(ValueError, match=obstacle):
        entmax_attention(q, q, v, alibi_slopes=slopes, implementation="triton")
    entmax_attention(q, q, v, alibi_slopes=slopes, implementation="auto")
    assert "torch reference" in caplog.text and obstacle in caplog.text


def test_the_reference_on_a_gpu_is_announced(monkeypatch, caplog):
    monkeypatch.setattr("adasplash.ops.announce._announced", set())
    monkeypatch.setattr("adasplash.ops.implementation.why_no_kernels", lambda *arguments: "it is too old")
    for device, said in (("cpu", False), ("cuda", True)):
        assert choose_implementation("auto", torch.device(device), torch.float32) == "reference"
        assert ("The torch reference runs on cuda: it is too old." in caplog.text) == said
    with pytest.raises(ValueError, match="implementation=triton cannot run here: it is too old"):
        choose_implementation("triton", torch.device("cuda"), torch.float32)
