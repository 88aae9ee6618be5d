"""The kernels that reorder against the reference in torch, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1)."""

import inspect

import pytest
import torch
from kernel_runs import poisoned, with_gradients
from torch.utils.checkpoint import checkpoint

from adasplash import KeyRange, hash_sparse_attention, qk_sparse_attention
from adasplash.ops.jit import INTERPRETED
from adasplash.ops.reordered_attention import attention, operator, random_directions, reference
from adasplash.ops.reordered_attention.reference import Reordering

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
)

# B, H, G, Tq, Tk
SHAPES = [(1, 1, 1, 1, 1), (2, 2, 1, 63, 63), (1, 2, 1, 507, 507), (1, 3, 3, 5, 256), (1, 2, 2, 129, 3)]


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


def same_bits(results, others):
    return all(torch.equal(one, other) for one, other in zip(results, others, strict=True))


def check_equal(reordering, expected):
    for name in ("query_order", "key_order", "query_count", "key_count"):
        one = getattr(reordering, name)
        assert one.dtype == torch.int32 and torch.equal(one.long(), getattr(expected, name)), name
    assert torch.equal(reordering.key_range.start, expected.key_range.start)
    assert torch.equal(reordering.key_range.stop, expected.key_range.stop)


def test_both_modules_offer_the_same():
    for name in ("sort_by_hash", "compact_kept", "reorder_inputs", "restore_output"):
        one, other = (inspect.signature(getattr(steps, name)) for steps in (reference, operator))
        assert one == other, name


# ----------------------------------------------------------------------------------------------------- order and ranges


def sort_by_bucket(query_buckets, key_buckets, key_range, n_buckets):
    return operator._reordering(
        *operator.launch_sort(query_buckets, key_buckets, key_range.start, key_range.stop, n_buckets)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_buckets", [16, 34])
def test_sort_by_bucket(shape, n_buckets, device):
    batch, heads, groups, query_length, key_length = shape
    query_buckets = torch.randint(0, n_buckets, (batch, heads, query_length), device=device)
    key_buckets = torch.randint(0, n_buckets, (batch, groups, key_length), device=device)
    key_range = any_range(shape, device)
    reordering = poisoned(sort_by_bucket, query_buckets, key_buckets, key_range, n_buckets)
    check_equal(reordering, reference.sort_by_bucket(query_buckets, key_buckets, key_range))


@pytest.mark.parametrize("bucket", [0, 15])
def test_one_bucket_holds_everything(bucket, device):
    buckets = torch.full((1, 1, 300), bucket, device=device)
    causal = KeyRange.causal(300, device=device).expand(1, 1)
    reordering = sort_by_bucket(buckets, buckets, causal, 16)
    check_equal(reordering, reference.sort_by_bucket(buckets, buckets, causal))
    assert torch.equal(reordering.key_range.stop, causal.stop)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_compact_kept(shape, share, device):
    batch, heads, groups, query_length, key_length = shape
    query_kept = torch.rand(batch, heads, query_length, device=device) < share
    key_kept = (torch.rand(batch, 1, key_length, device=device) < share).expand(-1, groups, -1)
    key_range = any_range(shape, device)
    reordering = poisoned(operator.compact_kept, query_kept, key_kept, key_range)
    check_equal(reordering, reference.compact_kept(query_kept, key_kept, key_range))
    dropped = ~query_kept.gather(-1, reordering.query_order.long())
    assert reordering.key_range.empty[dropped].all()


# -------------------------------------------------------------------------------------------------------------- hashing


@pytest.mark.parametrize(
    "n_buckets, dim, dtype", [(2, 8, torch.float32), (16, 64, torch.bfloat16), (34, 80, torch.float32)], ids=str
)
def test_hash_buckets(n_buckets, dim, dtype, device):
    q, k = strided((2, 4, 131, dim), device, dtype), strided((2, 2, 70, dim), device, dtype).contiguous()
    directions = random_directions(2, dim, n_buckets, device=device)
    for x, buckets in zip((q, k), poisoned(operator.launch_hash, q, k, directions), strict=True):
        buckets = buckets.long()
        wide = x.double() @ directions.double().repeat_interleave(x.shape[1] // 2, 0)
        projected = torch.cat([wide, -wide], -1)
        chosen = projected.gather(-1, buckets[..., None])[..., 0]
        torch.testing.assert_close(chosen, projected.amax(-1), atol=1e-5, rtol=1e-5)  # the largest but for rounding
        assert (buckets == projected.argmax(-1)).double().mean() > 0.999


def test_of_equals_the_first_is_the_bucket(device):
    directions = torch.eye(8, device=device)[None, :, :4]
    rows = [[0, 0, 0, 0], [1, 1, 0, 0], [-1, 1, 0, 0], [-1, -1, -1, 0], [0, 0, 0, -2], [0, 2, -2, 2], [torch.nan] * 4]
    x = torch.tensor([[row + [9] * 4 for row in rows]], device=device)[None].flatten(1, 2)[:, None].float()
    buckets, same_buckets = (found[0, 0].tolist() for found in operator.launch_hash(x, x, directions))
    assert buckets == same_buckets
    assert buckets[:6] == reference.hash_buckets(x, directions)[0, 0, :6].tolist() == [0, 0, 1, 4, 7, 1]
    assert 0 <= buckets[6] < 8  # whatever the input, places can be counted


# ----------------------------------------------------------------------------------------------------------------- rows


def random_reordering(shape, device, share=1.0):
    """Any order, of whose rows at most a share counts; the ranges say nothing."""
    batch, heads, groups, query_length, key_length = shape
    orders, counts = [], []
    for rows, length in ((heads, query_length), (groups, key_length)):
        orders.append(torch.rand(batch, rows, length, device=device).argsort(-1))
        most = int(share * length)
        counts.append(torch.randint(0 if share < 1 else most, most + 1, (batch, rows), device=device))
    return Reordering(*orders, KeyRange.causal(query_length, key_length, device=device), *counts)


def counted(x, count):
    """x (B, H, T, D) with zeros for all but the first `count` (B, H) rows."""
    return x * (torch.arange(x.shape[2], device=x.device) < count[..., None])[..., None]


def inputs_and_gradients(reorder_inputs, tensors, grads, reordering):
    leaves = [x.detach().requires_grad_() for x in tensors]
    taken = reorder_inputs(*leaves, reordering)
    return *(x.detach() for x in taken), *torch.autograd.grad(taken, leaves, grads)


def output_and_gradient(restore_output, x, grad, reordering):
    leaf = x.detach().requires_grad_()
    out = restore_output(leaf, reordering)
    return out.detach(), *torch.autograd.grad(out, leaf, grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dims, dtype", [((16, 16), torch.bfloat16), ((5, 40), torch.float32)], ids=str)
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_rows(shape, dims, dtype, share, device):
    """What counts as in torch, zeros for the rest, forward and backward; the same bits again."""
    batch, heads, groups, query_length, key_length = shape
    shapes = [(batch, heads, query_length), (batch, groups, key_length), (batch, groups, key_length)]
    shapes = [(*rows, dim) for rows, dim in zip(shapes, (dims[0], *dims), strict=True)]
    tensors, grads = ([strided(x, device, dtype) for x in shapes] for _ in range(2))
    by = random_reordering(shape, device, share)
    counts = (by.query_count, by.key_count, by.key_count)
    results = poisoned(inputs_and_gradients, operator.reorder_inputs, tensors, grads, by)
    counting_grads = [counted(x, count) for x, count in zip(grads, counts, strict=True)]
    taken, gradients = (
        inputs_and_gradients(reference.reorder_inputs, tensors, counting_grads, by)[part]
        for part in (slice(3), slice(3, 6))
    )
    assert same_bits(results, (*(counted(x, count) for x, count in zip(taken, counts, strict=True)), *gradients))
    assert all(x.is_contiguous() for x in results[:3])
    assert same_bits(results, inputs_and_gradients(operator.reorder_inputs, tensors, grads, by))

    results = poisoned(output_and_gradient, operator.restore_output, tensors[0], grads[0], by)
    out, gradient = output_and_gradient(reference.restore_output, counted(tensors[0], by.query_count), grads[0], by)
    assert same_bits(results, (out, counted(gradient, by.query_count)))
    assert results[0].transpose(1, 2).is_contiguous() and results[1].is_contiguous()
    assert same_bits(results, output_and_gradient(operator.restore_output, tensors[0], grads[0], by))


def test_restored_is_what_was_taken(device):
    by = random_reordering((2, 4, 2, 63, 65), device)
    q, k, v = strided((2, 4, 63, 16), device), strided((2, 2, 65, 16), device), strided((2, 2, 65, 16), device)
    assert torch.equal(operator.restore_output(operator.reorder_inputs(q, k, v, by)[0], by), q)


def test_gradient_without_strides(device):
    leaves = [torch.randn(1, 2, 9, 16, device=device, requires_grad=True) for _ in range(3)]
    sum(x.sum() for x in operator.reorder_inputs(*leaves, random_reordering((1, 2, 2, 9, 9), device))).backward()
    assert all(torch.equal(x.grad, torch.ones_like(x)) for x in leaves)


# ------------------------------------------------------------------------------------------------------------- together


def attentions(device, groups=2, heads=4, length=33, dim=16):
    """(q, k, v, implementation) -> out. The directions are axes, so that rounding moves no row to another bucket."""
    directions = torch.eye(dim, device=device)[None, :, :4].repeat(groups, 1, 1)
    kept = {"query_kept": torch.rand(2, heads, length, device=device) > 0.3}
    kept["key_kept"] = torch.rand(2, groups, length, device=device) > 0.3

    def hash_sparse(q, k, v, implementation):
        how = {"directions": directions, "attend_self": False, "implementation": implementation}
        return hash_sparse_attention(q, k, v, **how)

    def qk_sparse(q, k, v, implementation, **more):
        return qk_sparse_attention(q, k, v, **kept, implementation=implementation, **more)

    return {"hash_sparse": hash_sparse, "qk_sparse": qk_sparse}


@pytest.mark.parametrize("name", ["hash_sparse", "qk_sparse"])
def test_attention_and_checkpointing(name, device, monkeypatch):
    attend = attentions(device)[name]
    tensors = [strided((2, heads, 33, 16), device) for heads in (4, 2, 2)]
    grad = strided((2, 4, 33, 16), device)
    expected = with_gradients(lambda *x: attend(*x, "reference"), tensors, grad)
    monkeypatch.setattr(attention, "choose_implementation", lambda *_: "triton")
    results = with_gradients(lambda *x: attend(*x, "auto"), tensors, grad)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert same_bits(results, poisoned(with_gradients, lambda *x: attend(*x, "auto"), tensors, grad))
    again = with_gradients(lambda *x: checkpoint(attend, *x, "auto", use_reentrant=False), tensors, grad)
    assert same_bits(results, again)


def test_alibi_measures_distances_in_the_text(device, monkeypatch):
    attend = attentions(device)["qk_sparse"]
    tensors = [strided((2, heads, 33, 16), device) for heads in (4, 2, 2)]
    slopes = torch.rand(4, device=device)
    expected = attend(*tensors, "reference", alibi_slopes=slopes)
    monkeypatch.setattr(attention, "choose_implementation", lambda *_: "triton")
    torch.testing.assert_close(attend(*tensors, "auto", alibi_slopes=slopes), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("apart", [(True, True, True), (False, False, False), (True, False, True)], ids=str)
@pytest.mark.parametrize("name", ["hash_sparse", "qk_sparse"])
def test_gradients_are_laid_out_as_their_tensors(name, apart, device, monkeypatch):
    """Heads one after the other in memory, or beside each other: nobody has to copy a gradient."""
    monkeypatch.setattr(attention, "choose_implementation", lambda *_: "triton")
    tensors = [torch.randn(2, heads, 33, 16, device=device) for heads in (4, 2, 2)]
    tensors = [
        x if heads_apart else x.transpose(1, 2).contiguous().transpose(1, 2)
        for x, heads_apart in zip(tensors, apart, strict=True)
    ]
    attend = attentions(device)[name]
    out, *gradients = with_gradients(lambda *x: attend(*x, "auto"), tensors, torch.randn_like(tensors[0]))
    assert out.transpose(1, 2).is_contiguous()
    for gradient, x in zip(gradients, tensors, strict=True):
        assert gradient.stride() == x.stride()


def test_gradients_of_slices_lie_dense(device):
    """q, k and v from one projection, (B, T, 3, H, D): their gradients have the heads beside each other as well."""
    together = torch.randn(1, 9, 3, 2, 16, device=device)
    tensors = [x.transpose(1, 2) for x in together.unbind(2)]
    grads = [torch.randn_like(x) for x in tensors]
    by = random_reordering((1, 2, 2, 9, 9), device)
    for gradient in inputs_and_gradients(operator.reorder_inputs, tensors, grads, by)[3:]:
        assert gradient.transpose(1, 2).is_contiguous()


def test_operators_are_well_formed(device):
    q = strided((2, 2, 9, 16), device).requires_grad_()
    k, v = (torch.randn(2, 1, 7, 16, device=device, requires_grad=True) for _ in range(2))
    by = random_reordering((2, 2, 1, 9, 7), device, 0.6)
    orders_and_counts = (by.query_order, by.key_order, by.query_count, by.key_count)
    torch.library.opcheck(operator._reorder_inputs, (q, k, v, *orders_and_counts))
    torch.library.opcheck(operator._restore_output, (q, by.query_order, by.query_count))
    q, k, v = q.detach(), k.detach(), v.detach()
    for apart in ([True] * 3, [False, True, False]):
        torch.library.opcheck(operator._reorder_inputs_backward, (q, k, v, *orders_and_counts, apart))
    torch.library.opcheck(operator._restore_output_backward, (q, by.query_order, by.query_count))
    key_range = KeyRange.causal(9, 7, device=device).expand(2, 2)
    key_range = key_range.start, key_range.stop
    directions = random_directions(1, 16, 4, device=device)
    torch.library.opcheck(operator._sort_by_hash, (q, k, directions, *key_range))
    kept = torch.rand(2, 2, 9, device=device) > 0.3
    torch.library.opcheck(operator._compact_kept, (kept, kept[:, :1, :7], *key_range))


def test_reordering_compiles_to_one_graph(device):
    directions = random_directions(1, 16, 4, device=device)
    kept = torch.rand(1, 2, 40, device=device) > 0.3
    key_range = KeyRange.causal(40, device=device).expand(1, 2)

    def there_and_back(q, k):
        by_hash = operator.sort_by_hash(q, k, directions, key_range)
        by_kept = operator.compact_kept(kept, kept[:, :1], key_range)
        taken, keys, values = operator.reorder_inputs(q, k, 2 * k, by_hash)
        out = taken * by_hash.key_range.stop[..., None] + keys * values
        return operator.restore_output(out, by_kept)

    tensors = strided((1, 2, 40, 16), device), torch.randn(1, 1, 40, 16, device=device)
    grad = strided((1, 2, 40, 16), device)
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    results, expected = (with_gradients(function, tensors, grad) for function in (compiled, there_and_back))
    assert same_bits(results, expected)


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
    expected = with_gradients(lambda *x: attend(*x, "reference"), tensors, grad)
    results = with_gradients(lambda *x: attend(*x, "triton"), tensors, grad)
    check_close(results, expected)
    assert same_bits(results, with_gradients(lambda *x: attend(*x, "triton"), tensors, grad))
    compiled = torch.compile(lambda *x: attend(*x, "triton"), fullgraph=True)
    check_close(with_gradients(compiled, tensors, grad), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hash_sparse", "qk_sparse"])
def test_nothing_waits_for_the_gpu(name, device):
    attend = attentions(device)[name]
    tensors = [strided((2, heads, 33, 16), device, torch.bfloat16) for heads in (4, 2, 2)]
    grad = strided((2, 4, 33, 16), device, torch.bfloat16)
    run = lambda: with_gradients(lambda *x: attend(*x, "triton"), tensors, grad)
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
    reordering = sort_by_bucket(buckets, buckets[:, ::3], key_range, 32)
    check_equal(reordering, reference.sort_by_bucket(buckets, buckets[:, ::3], key_range))


@pytest.mark.gpu
def test_more_rows_than_one_axis_of_a_grid_holds(device):
    q, k, v = torch.randn(3, 6000, 4, 3, 16, device=device).unbind()
    kept = torch.rand(6000, 4, 3, device=device) > 0.5
    ranges = KeyRange.causal(3, device=device).expand(6000, 4)
    ours, theirs = (steps.compact_kept(kept, kept, ranges) for steps in (operator, reference))
    assert torch.equal(ours.query_order.long(), theirs.query_order.long())
    for x, y in zip(operator.reorder_inputs(q, k, v, ours), reference.reorder_inputs(q, k, v, theirs), strict=True):
        seen = torch.arange(3, device=device) < ours.query_count[..., None]
        assert torch.equal(x[seen], y[seen])
