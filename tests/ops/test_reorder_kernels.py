"""The kernels that reorder against `reorder` in torch, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from adasplash import KeyRange, hash_sparse_attention, qk_sparse_attention
from adasplash.ops import reorder, reorder_kernels, reordered_attention
from adasplash.ops.jit import INTERPRETED
from adasplash.ops.reordered_attention import random_directions

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
)

# B, H, G, Tq, Tk
SHAPES = [(1, 1, 1, 1, 1), (2, 2, 1, 63, 63), (1, 2, 1, 507, 507), (1, 3, 3, 5, 256), (1, 2, 2, 129, 3)]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def any_range(shape, device):
    """Ranges of all sorts, some beyond the keys there are."""
    batch, heads, _, query_length, key_length = shape
    start = torch.randint(-2, key_length + 3, (batch, heads, query_length), device=device)
    return KeyRange(start, torch.randint(-2, key_length + 3, (batch, heads, query_length), device=device))


def strided(shape, device, dtype=torch.float32):
    """(B, H, T, D), strided as in a model."""
    batch, heads, length, dim = shape
    x = torch.randn(batch, length, heads, dim + 3, device=device).to(dtype)
    return x[..., :dim].transpose(1, 2)


def check_equal(reordering, expected):
    for name in ("query_order", "key_order"):
        order = getattr(reordering, name)
        assert order.dtype == torch.int32 and torch.equal(order.long(), getattr(expected, name)), name
    assert torch.equal(reordering.key_range.start, expected.key_range.start)
    assert torch.equal(reordering.key_range.stop, expected.key_range.stop)


# ----------------------------------------------------------------------------------------------------- order and ranges


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_buckets", [16, 34])
def test_sort_by_bucket(shape, n_buckets, device):
    batch, heads, groups, query_length, key_length = shape
    query_buckets = torch.randint(0, n_buckets, (batch, heads, query_length), device=device)
    key_buckets = torch.randint(0, n_buckets, (batch, groups, key_length), device=device)
    key_range = any_range(shape, device)
    reordering = reorder_kernels.sort_by_bucket(query_buckets, key_buckets, key_range, n_buckets=n_buckets)
    check_equal(reordering, reorder.sort_by_bucket(query_buckets, key_buckets, key_range))


@pytest.mark.parametrize("bucket", [0, 15])
def test_one_bucket_holds_everything(bucket, device):
    buckets = torch.full((1, 1, 300), bucket, device=device)
    causal = KeyRange.causal(300, device=device).expand(1, 1)
    reordering = reorder_kernels.sort_by_bucket(buckets, buckets, causal, n_buckets=16)
    check_equal(reordering, reorder.sort_by_bucket(buckets, buckets, causal))
    assert torch.equal(reordering.key_range.stop, causal.stop)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_compact_kept(shape, share, device):
    batch, heads, groups, query_length, key_length = shape
    query_kept = torch.rand(batch, heads, query_length, device=device) < share
    key_kept = (torch.rand(batch, 1, key_length, device=device) < share).expand(-1, groups, -1)
    key_range = any_range(shape, device)
    reordering = reorder_kernels.compact_kept(query_kept, key_kept, key_range)
    check_equal(reordering, reorder.compact_kept(query_kept, key_kept, key_range))
    dropped = ~query_kept.gather(-1, reordering.query_order.long())
    assert reordering.key_range.empty[dropped].all()


# -------------------------------------------------------------------------------------------------------------- hashing


@pytest.mark.parametrize(
    "n_buckets, dim, dtype", [(2, 8, torch.float32), (16, 64, torch.bfloat16), (34, 80, torch.float32)], ids=str
)
def test_hash_buckets(n_buckets, dim, dtype, device):
    x = strided((1, 4, 131, dim), device, dtype)
    directions = random_directions(2, dim, n_buckets, device=device)
    buckets = reorder_kernels.hash_buckets(x, directions).long()
    wide = x.double() @ directions.double().repeat_interleave(2, 0)
    projected = torch.cat([wide, -wide], -1)
    chosen = projected.gather(-1, buckets[..., None])[..., 0]
    torch.testing.assert_close(chosen, projected.amax(-1), atol=1e-5, rtol=1e-5)  # the largest but for rounding
    assert (buckets == projected.argmax(-1)).double().mean() > 0.999


def test_of_equals_the_first_is_the_bucket(device):
    directions = torch.eye(8, device=device)[None, :, :4]
    rows = [[0, 0, 0, 0], [1, 1, 0, 0], [-1, 1, 0, 0], [-1, -1, -1, 0], [0, 0, 0, -2], [0, 2, -2, 2], [torch.nan] * 4]
    x = torch.tensor([[row + [9] * 4 for row in rows]], device=device)[None].flatten(1, 2)[:, None].float()
    buckets = reorder_kernels.hash_buckets(x, directions)[0, 0].tolist()
    assert buckets[:6] == reorder.hash_buckets(x, directions)[0, 0, :6].tolist() == [0, 0, 1, 4, 7, 1]
    assert 0 <= buckets[6] < 8  # whatever the input, places can be counted


# ----------------------------------------------------------------------------------------------------------------- rows


def random_order(batch, heads, length, device):
    return torch.rand(batch, heads, length, device=device).argsort(-1)


@pytest.mark.parametrize("length, dim", [(1, 16), (63, 5), (507, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_take_and_restore(length, dim, dtype, device):
    x = strided((2, 2, length, dim), device, dtype)
    order = random_order(2, 2, length, device)
    grad = strided((2, 2, length, dim), device, dtype)
    for name in ("take_rows", "restore_rows"):
        results = []
        for steps, dtype_of_order in ((reorder_kernels, torch.int32), (reorder, torch.int64)):
            leaf = x.detach().requires_grad_()
            out = getattr(steps, name)(leaf, order.to(dtype_of_order))
            results.append((out, *torch.autograd.grad(out, leaf, grad)))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other), name
    order = order.int()
    taken = reorder_kernels.take_rows(x, order)
    restored = reorder_kernels.restore_rows(taken, order)
    assert torch.equal(restored, x) and taken.is_contiguous() and restored.transpose(1, 2).is_contiguous()


def test_gradient_without_strides(device):
    x = torch.randn(1, 2, 9, 16, device=device, requires_grad=True)
    order = random_order(1, 2, 9, device).int()
    reorder_kernels.take_rows(x, order).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


# ------------------------------------------------------------------------------------------------------------- together


def attentions(device, groups=2, heads=4, length=33, dim=16):
    """(q, k, v, implementation) -> out. The directions are axes, so that rounding moves no row to another bucket."""
    directions = torch.eye(dim, device=device)[None, :, :4].repeat(groups, 1, 1)
    kept = {"query_kept": torch.rand(2, heads, length, device=device) > 0.3}
    kept["key_kept"] = torch.rand(2, groups, length, device=device) > 0.3

    def hash_sparse(q, k, v, implementation):
        how = {"directions": directions, "attend_self": False, "implementation": implementation}
        return hash_sparse_attention(q, k, v, **how)

    def qk_sparse(q, k, v, implementation):
        return qk_sparse_attention(q, k, v, **kept, implementation=implementation)

    return {"hash_sparse": hash_sparse, "qk_sparse": qk_sparse}


def out_and_gradients(attend, tensors, grad):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("name", ["hash_sparse", "qk_sparse"])
def test_attention_and_checkpointing(name, device, monkeypatch):
    attend = attentions(device)[name]
    tensors = [strided((2, heads, 33, 16), device) for heads in (4, 2, 2)]
    grad = strided((2, 4, 33, 16), device)
    expected = out_and_gradients(lambda *x: attend(*x, "reference"), tensors, grad)
    monkeypatch.setattr(reordered_attention, "choose_implementation", lambda *_: "triton")
    results = out_and_gradients(lambda *x: attend(*x, "auto"), tensors, grad)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    again = out_and_gradients(lambda *x: checkpoint(attend, *x, "auto", use_reentrant=False), tensors, grad)
    assert all(torch.equal(one, other) for one, other in zip(results, again, strict=True))


def test_operators_are_well_formed(device):
    x = strided((2, 2, 9, 16), device).requires_grad_()
    order = random_order(2, 2, 9, device).int()
    torch.library.opcheck(reorder_kernels.take_rows, (x, order))
    torch.library.opcheck(reorder_kernels.restore_rows, (x, order))
    torch.library.opcheck(reorder_kernels.hash_buckets, (x.detach(), random_directions(2, 16, 4, device=device)))
    buckets = torch.randint(0, 4, (2, 2, 9), device=device, dtype=torch.int32)
    key_range = KeyRange.causal(9, device=device).expand(2, 2)
    arguments = (buckets, buckets[:, :1].contiguous(), key_range.start, key_range.stop, 4, 4)
    torch.library.opcheck(reorder_kernels._sort_by_bucket, arguments)


def test_reordering_compiles_to_one_graph(device):
    directions = random_directions(1, 16, 4, device=device)
    kept = torch.rand(1, 2, 40, device=device) > 0.3
    key_range = KeyRange.causal(40, device=device).expand(1, 2)

    def there_and_back(q, k):
        by_hash = reorder_kernels.sort_by_hash(q, k, directions, key_range)
        by_kept = reorder_kernels.compact_kept(kept, kept[:, :1], key_range)
        out = reorder_kernels.take_rows(q, by_hash.query_order) * by_hash.key_range.stop[..., None]
        return reorder_kernels.restore_rows(out, by_kept.query_order)

    q, k = strided((1, 2, 40, 16), device), strided((1, 1, 40, 16), device)
    grad = strided((1, 2, 40, 16), device)
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    results = [
        out_and_gradients(lambda q, function=function: function(q, k), (q,), grad)
        for function in (compiled, there_and_back)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# ----------------------------------------------------------------------------------------------------------- on a GPU


def check_close(results, expected):
    for one, other in zip(results, expected, strict=True):
        assert (one.float() - other.float()).norm() <= 2e-2 * other.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hash_sparse", "qk_sparse"])
def test_kernels_throughout(name, device):
    length = 2047
    attend = attentions(device, length=length, dim=64)[name]
    tensors = [strided((2, heads, length, 64), device, torch.bfloat16) for heads in (4, 2, 2)]
    grad = strided((2, 4, length, 64), device, torch.bfloat16)
    expected = out_and_gradients(lambda *x: attend(*x, "reference"), tensors, grad)
    results = out_and_gradients(lambda *x: attend(*x, "triton"), tensors, grad)
    check_close(results, expected)
    again = out_and_gradients(lambda *x: attend(*x, "triton"), tensors, grad)
    assert all(torch.equal(one, other) for one, other in zip(results, again, strict=True))
    compiled = torch.compile(lambda *x: attend(*x, "triton"), fullgraph=True)
    check_close(out_and_gradients(compiled, tensors, grad), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hash_sparse", "qk_sparse"])
def test_nothing_waits_for_the_gpu(name, device):
    attend = attentions(device)[name]
    tensors = [strided((2, heads, 33, 16), device, torch.bfloat16) for heads in (4, 2, 2)]
    grad = strided((2, 4, 33, 16), device, torch.bfloat16)
    run = lambda: out_and_gradients(lambda *x: attend(*x, "triton"), tensors, grad)
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_long_sequences(device):
    buckets = torch.randint(0, 32, (2, 12, 65_535), device=device)
    key_range = KeyRange.window(65_535, 5000, device=device).expand(2, 12)
    reordering = reorder_kernels.sort_by_bucket(buckets, buckets[:, ::3], key_range, n_buckets=32)
    check_equal(reordering, reorder.sort_by_bucket(buckets, buckets[:, ::3], key_range))
