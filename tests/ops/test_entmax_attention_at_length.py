"""The kernels of entmax attention on a GPU, at full size."""

import pytest
import torch
from dense_attention import dense_attention
from entmax_roads import (
    DEVICE,
    NEEDS,
    ROADS,
    compare,
    forward,
    gradients,
    inputs,
    key_ranges,
    listed_keys,
    operator,
    relative,
    take,
)

from adasplash import KeyRange
from adasplash.ops.checks import resolve_key_range
from adasplash.ops.range_attention import range_attention, text_positions
from adasplash.ops.tile_table import entmax_tiles

pytestmark = [*NEEDS, pytest.mark.gpu]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_dims_and_dtypes(dim, dtype, road):
    compare(*inputs(1, 2, 1, 507, 507, dim, dtype))


@pytest.mark.parametrize("length", [63, 127, 507, 4095])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1), (8, 1)])
def test_lengths_and_groups(length, heads):
    compare(*inputs(1, *heads, length, length, 64, torch.bfloat16))


@pytest.mark.parametrize("alpha", [1.01, 1.25, 1.5, 1.75, 2.0, "learned"])
@pytest.mark.parametrize("road", ROADS)
def test_alphas(alpha, road, monkeypatch):
    take("tiles" if alpha == 1.01 else road, monkeypatch)  # at 1.01 supports are far too large for lists
    if alpha == "learned":
        alpha = torch.tensor([1.3, 1.6], device=DEVICE)
    compare(*inputs(1, 2, 1, 1023, 1023, 64, torch.bfloat16, sharpness=4.0), alpha=alpha)


@pytest.mark.parametrize("kind", ["window", "left padding", "right padding", "documents", "everything"])
def test_key_ranges_at_length(kind, road):
    compare(*inputs(2, 2, 1, 2047, 2047, 64, torch.bfloat16), key_range=key_ranges(2047)[kind])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "q_size, k_size, sharpness",
    [(1, 1, 2), (1, 1, 50), (1e3, 1, 2), (1e3, 1e-4, 2), (1e-4, 1e3, 2), (1e-3, 1e-3, 2), (2e3, 2e3, 2)],
)
@pytest.mark.parametrize(
    "dim, alpha, bias",
    [
        (64, 1.5, "none"),
        (128, 1.5, "none"),
        (64, "learned", "none"),
        (64, 1.5, "alibi"),
        (64, 1.5, "alibi, both sides"),
        (64, 1.5, "alibi, all far away"),
    ],
)
def test_no_key_of_the_support_is_missed(dtype, q_size, k_size, sharpness, dim, alpha, bias):
    """Keys that barely belong to it would not be missed in the output; whatever the kernel scales and rounds, here they are."""
    length = 2048
    q = (q_size * torch.randn(1, 2, length, dim, device=DEVICE)).to(dtype)
    k = (k_size * torch.randn(1, 2, length, dim, device=DEVICE)).to(dtype)
    scale = sharpness / (dim**0.5 * q_size * k_size)
    i = torch.arange(length, device=DEVICE)
    stop = {"alibi, both sides": torch.full_like(i, length), "alibi, all far away": (i - 500).clamp(min=0)}.get(
        bias, i + 1
    )
    key_range = KeyRange(*(x.int().expand(1, 2, length) for x in (torch.zeros_like(stop), stop)))
    slopes = None if bias == "none" else torch.tensor([0.5, 0.0625], device=DEVICE)
    query_positions, key_positions = text_positions(q, k)
    places = {"query_positions": query_positions, "key_positions": key_positions}
    alpha = torch.tensor([1.5, 1.5]) if alpha == "learned" else alpha
    how = {"alpha": alpha, "scale": scale, "alibi_slopes": slopes, **places}
    arguments = operator.operator_arguments(q, k, k, key_range, **how)
    found = forward(*arguments)
    block_rows = entmax_tiles(dim, dtype, torch.device(DEVICE))["collect"].block_m
    on_lists = (found.in_tiles == 0).repeat_interleave(block_rows, 1)
    assert on_lists.any()

    z = (q.double() @ k.double().mT)[0] * scale / 2
    if slopes is not None:
        z -= slopes.view(-1, 1, 1) / 2 * (i[:, None] - i).abs()
    z = z.masked_fill(~key_range.dense_mask(length)[0], -torch.inf)
    sorted_z = z.topk(256, -1).values  # Peters, Niculae and Martins 2019, algorithm for alpha = 1.5
    n = torch.arange(1, 257, device=DEVICE)
    mean = sorted_z.cumsum(-1) / n
    spread = (sorted_z**2).cumsum(-1) - n * mean**2
    candidate = mean - ((1 - spread) / n).clamp(min=0).sqrt()
    support = (candidate <= sorted_z).sum(-1, keepdim=True)
    threshold = candidate.gather(-1, support.clamp(min=1) - 1)
    listed = listed_keys(found, length, block_rows)
    rounding = 3e-5 + 1e-6 * z[z.isfinite()].abs().max()
    belongs = (z > threshold + rounding) & on_lists[..., None]
    assert belongs.any() and not (belongs & ~listed).any()
    assert not (listed & (z < threshold - rounding)).any()


def flat_scores(length, needles):
    """q, k, v and a gradient for the output: hundreds of keys for each query, or one each, far from it, in place of them."""
    q, k, v, d_out = inputs(1, 2, 2, length, length, 64, torch.bfloat16, sharpness=0.3)
    if needles:
        k[:, :, :256] *= 10
        q = q + 0.025 * k[:, :, torch.randint(256, (length,), device=DEVICE)]
    return q, k, v, d_out


@pytest.mark.parametrize("needles", [False, True])
def test_blocks_whose_first_tiles_mark_too_much(needles):
    """They are for tile mode, unless keys far away turn out to outweigh all those near the queries."""
    q, k, v, d_out = flat_scores(4095, needles)
    compare(q, k, v, d_out)
    visible = resolve_key_range(q, k, None, True)
    arguments = operator.operator_arguments(q, k, v, visible, alpha=1.5, scale=0.125)
    in_tiles = forward(*arguments).in_tiles[:, 24:]
    assert (in_tiles == 0).all() if needles else in_tiles.all()

    whole = forward(*arguments).out
    q[0, 0, 4000] = torch.nan
    out = forward(*operator.operator_arguments(q, k, v, visible, alpha=1.5, scale=0.125)).out
    assert out[0, 0, 4000].isnan().all()
    others = torch.arange(4095, device=DEVICE) // 128 != 4000 // 128
    assert torch.equal(out[:, :, others], whole[:, :, others])
    assert out[0, 0, 4001:].isfinite().all()


def test_a_query_too_large_to_square_troubles_no_other():
    q, k, v, _ = inputs(1, 1, 1, 40, 40, 64, torch.bfloat16)
    visible = resolve_key_range(q, k, None, True)
    attend = lambda: operator.entmax_attention_kernels(q, k, v, visible, alpha=1.5, scale=0.125)
    whole = attend()
    q[0, 0, 5] *= 1e20
    out = attend()
    others = torch.arange(40, device=DEVICE) != 5
    torch.testing.assert_close(out[:, :, others], whole[:, :, others])
    key = (q[0, 0, 5].double() @ k[0, 0, :6].double().mT).argmax()
    assert out[0, 0, 5].isnan().all() or relative(out[0, 0, 5], v[0, 0, key]) < 1e-2  # either is right, zeros are not


def test_strides_and_offsets_beyond_32_bits():
    """The second sequence of each begins more than 2 ** 31 elements after the first."""
    apart = 2**31 + 2**20
    buffer = torch.empty(apart + 2**21, dtype=torch.bfloat16, device=DEVICE)

    def far_apart(x):
        view = buffer[: 2**21].as_strided(x.shape, (apart, *x.stride()[1:]), far_apart.offset)
        far_apart.offset += x[0].numel()
        return view.copy_(x)

    far_apart.offset = 0
    *qkv, d_out = (x.contiguous() for x in inputs(2, 2, 1, 1023, 1023, 64, torch.bfloat16))
    visible = resolve_key_range(*qkv[:2], None, True)
    attend = lambda q, k, v, alpha: operator.entmax_attention_kernels(q, k, v, visible, alpha=alpha, scale=0.125)

    def run(q, k, v, d_out):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, 1.5)
        return out, *torch.autograd.grad(out, leaves, d_out)

    for result, truth in zip(run(*map(far_apart, qkv), far_apart(d_out)), run(*qkv, d_out), strict=True):
        assert torch.equal(result, truth)


def test_more_heads_than_an_axis_of_a_grid_holds():
    q, k, v, d_out = inputs(33000, 2, 2, 5, 5, 16, torch.float16)
    results = compare(q[-3:], k[-3:], v[-3:], d_out[-3:])
    visible = resolve_key_range(q, k, None, True)
    attend = lambda q, k, v, alpha: operator.entmax_attention_kernels(q, k, v, visible, alpha=alpha, scale=0.25)
    for whole, result in zip(gradients(attend, q, k, v, d_out, 1.5), results, strict=True):
        assert torch.equal(whole[-3:], result)


@pytest.mark.parametrize("sharpness", [2.0, 0.3])
def test_128k_tokens(sharpness):
    """Against the float64 reference on the last rows: none is lost. The flatter scores are computed in tile mode."""
    length = 131072
    q, k, v, d_out = inputs(1, 2, 1, length, length, 64, torch.bfloat16, sharpness)
    visible = resolve_key_range(q, k, None, True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = operator.entmax_attention_kernels(*leaves, visible, alpha=1.5, scale=0.125)
    out.backward(d_out)
    assert all(x.grad.isfinite().all() for x in leaves)
    tail = slice(length - 64, length)
    truth = range_attention(
        q[:, :, tail].double(), k.double(), v.double(), visible.rows(length - 64, length), alpha=1.5, scale=0.125
    )
    assert relative(out[:, :, tail], truth) < 5e-3


def test_compiles_without_graph_breaks():
    from adasplash import entmax_attention

    q, k, v, _ = inputs(1, 4, 2, 300, 300, 64, torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: 2 * entmax_attention(q, k, v), fullgraph=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = compiled(*leaves)
    out.float().sum().backward()
    assert torch.equal(out, 2 * entmax_attention(q, k, v))
    assert leaves[0].grad.isfinite().all()


def test_dense_attention_agrees_with_the_dense_computation():
    from adasplash import entmax_attention

    q, k, v, _ = inputs(1, 2, 1, 300, 300, 64, torch.float32)
    mask = torch.ones(300, 300, dtype=torch.bool).tril()
    truth = dense_attention(q.cpu(), k.cpu(), v.cpu(), mask, alpha=1.5)
    assert relative(entmax_attention(q, k, v).cpu(), truth) < 1e-5
