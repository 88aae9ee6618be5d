"""The kernels of softmax attention against float64, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch
from dense_attention import dense_attention
from kernel_runs import poisoned, with_gradients

from adasplash.ops.jit import INTERPRETED
from adasplash.ops.key_range import KeyRange
from adasplash.ops.softmax_attention import operator
from adasplash.ops.softmax_attention.operator import softmax_attention_kernels
from adasplash.ops.tile_table import Tiles

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
)


@pytest.fixture
def small_tiles(monkeypatch):
    """Short sequences then have tiles of all sorts: whole, at both edges, never visited."""
    tiles = {"forward": Tiles(32, 16, 4, 2), "rows": Tiles(16, 32, 4, 2), "columns": Tiles(16, 32, 4, 2)}
    monkeypatch.setattr(operator, "softmax_tiles", lambda *_: tiles)


def between_nans(batch, length, heads, dim, dtype, device):
    """(B, H, T, D), strided as in a model, with NaN on all sides."""
    x = torch.full((batch, length + 2, heads, dim + 3), torch.nan, dtype=dtype, device=device)
    x[:, 1:-1, :, :dim] = torch.randn(batch, length, heads, dim, device=device)
    return x[:, 1:-1, :, :dim].transpose(1, 2)


def inputs(shape, dtype, device):
    """q, k, v and the gradient for the output; shape is B, H, G, Tq, Tk, D."""
    batch, heads, groups, query_length, key_length, dim = shape
    q, grad = (between_nans(batch, query_length, heads, dim, dtype, device) for _ in range(2))
    k, v = (between_nans(batch, key_length, groups, dim, dtype, device) for _ in range(2))
    return q, k, v, grad


def eager(q, k, v, mask, scale, slopes=None, distance=None):
    """Attention written out in the dtype of its inputs: the yardstick."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT) * scale
    if slopes is not None:
        scores = scores - (slopes.reshape(-1, q.shape[1], 1, 1) * distance).to(q.dtype)
    scores = scores.masked_fill(~mask, torch.finfo(q.dtype).min)
    return scores.softmax(-1).masked_fill(~mask, 0.0) @ v


def assert_as_good_as_eager(results, exact, yardstick, grad):
    for name, x, right, other in zip(("out", "dq", "dk", "dv"), results, exact, yardstick, strict=True):
        assert x.isfinite().all(), name
        size = right.norm() or grad.double().norm()  # with one key dq and dk are 0
        error, allowed = ((y.double() - right).norm() / size for y in (x, other))
        assert error <= 2 * allowed + 1e-6, f"{name}: relative error {error:.2e}, eager attention {allowed:.2e}"


def check(shape, dtype, device, key_range, slopes=None, scale=None):
    batch, heads, _, query_length, key_length, dim = shape
    q, k, v, grad = inputs(shape, dtype, device)
    scale = dim**-0.5 if scale is None else scale
    key_range = KeyRange(key_range.start.to(device), key_range.stop.to(device)).expand(batch, heads)
    mask = key_range.dense_mask(key_length)
    on_device = None if slopes is None else slopes.to(device)

    def attend(q, k, v):
        return softmax_attention_kernels(q, k, v, key_range, scale=scale, alibi_slopes=on_device)

    results = poisoned(with_gradients, attend, (q, k, v), grad)
    if slopes is None:
        how, distance = {}, None
    else:  # the reference builds its distances on the CPU
        q, k, v, grad, mask, *results = (x.cpu() for x in (q, k, v, grad, mask, *results))
        how = {"slopes": slopes}
        distance = (torch.arange(query_length)[:, None] + key_length - query_length - torch.arange(key_length)).abs()
    wide = [x.double() for x in (q, k, v, grad)]
    exact = with_gradients(lambda q, k, v: dense_attention(q, k, v, mask, scale=scale, **how), wide[:3], wide[3])
    yardstick = with_gradients(lambda q, k, v: eager(q, k, v, mask, scale, slopes, distance), (q, k, v), grad)
    assert_as_good_as_eager(results, exact, yardstick, grad)
    blind = ~mask.any(-1)
    assert (results[0][blind] == 0).all() and (results[1][blind] == 0).all()


def padding(batch, query_length, key_length):
    """The first sample has pads alone, the second pads on the left, the last on the right too."""
    keep = torch.ones(batch, key_length, dtype=torch.bool)
    keep[0], keep[1, : key_length // 3], keep[-1, -5:] = False, False, False
    return KeyRange.padding(keep, query_length)


def anything(batch, heads, query_length, key_length):
    """Ranges without any order, some of them empty, another set for each head."""
    return KeyRange(*torch.randint(0, key_length + 1, (2, batch, heads, query_length)))


CASES = {  # B, H, G, Tq, Tk, D; range; number of ALiBi slopes; scale
    "causal": ((1, 2, 2, 71, 71, 16), lambda: KeyRange.causal(71), (), None),
    "causal, fewer queries": ((1, 3, 1, 33, 70, 20), lambda: KeyRange.causal(33, 70), (3,), None),
    "causal, more queries": ((1, 2, 1, 65, 37, 16), lambda: KeyRange.causal(65, 37), (), 0.7),
    "bidirectional": ((1, 2, 1, 40, 67, 16), lambda: KeyRange.bidirectional(40, 67), (), None),
    "window": ((1, 2, 2, 90, 90, 16), lambda: KeyRange.window(90, 25) & KeyRange.causal(90), (2,), None),
    "documents": ((1, 1, 1, 90, 90, 16), lambda: KeyRange.documents(torch.arange(90)[None] % 41), (), None),
    "padding": ((3, 1, 1, 50, 50, 16), lambda: padding(3, 50, 50) & KeyRange.causal(50), (), None),
    "everything": (
        (2, 6, 2, 48, 48, 40),
        lambda: padding(2, 48, 48) & KeyRange.window(48, 30) & KeyRange.documents(torch.arange(48)[None] % 37),
        (2, 6),
        0.3,
    ),
    "anything": ((2, 4, 2, 35, 67, 16), lambda: anything(2, 4, 35, 67), (4,), None),
    "one query": ((1, 2, 1, 1, 33, 16), lambda: KeyRange.causal(1, 33), (), None),
    "one key": ((1, 2, 1, 20, 1, 16), lambda: KeyRange.bidirectional(20, 1), (), None),
}
HALF = ("causal", "causal, fewer queries", "padding", "anything")  # in float16; the others in float32


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, device, small_tiles):
    shape, key_range, slopes, scale = CASES[case]
    dtype = torch.float16 if case in HALF else torch.float32
    check(shape, dtype, device, key_range(), slopes=0.3 * torch.rand(slopes) if slopes else None, scale=scale)


def test_tiles_of_the_table(device):
    check((1, 1, 1, 150, 150, 64), torch.float16, device, KeyRange.causal(150))


def test_places_in_the_text(device, small_tiles):
    """ALiBi measures distances between the given positions: reordering queries and keys together changes nothing."""
    q, k, v, grad = inputs((1, 2, 1, 20, 33, 16), torch.float32, device)
    slopes = torch.tensor([0.5, 0.1], device=device)
    key_range = KeyRange.bidirectional(20, 33, device=device).expand(1, 2)
    query_order, key_order = torch.randperm(20, device=device), torch.randperm(33, device=device)
    positions = (query_order + 13).expand(1, 2, 20), key_order.expand(1, 1, 33)

    def plain(q, k, v):
        return softmax_attention_kernels(q, k, v, key_range, scale=0.2, alibi_slopes=slopes)

    def reordered(q, k, v):
        q, k, v = q[:, :, query_order], k[:, :, key_order], v[:, :, key_order]
        places = {"query_positions": positions[0], "key_positions": positions[1]}
        out = softmax_attention_kernels(q, k, v, key_range, scale=0.2, alibi_slopes=slopes, **places)
        return out[:, :, query_order.argsort()]

    for one, other in zip(
        with_gradients(plain, (q, k, v), grad), with_gradients(reordered, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_repeated_runs_with_large_scores(device, small_tiles):
    """Scores of some 1e5 keep everything finite, and every run gives the same bits."""
    q, k, v, grad = inputs((1, 2, 1, 40, 40, 16), torch.float32, device)
    key_range = KeyRange.causal(40, device=device).expand(1, 2)

    def attend(q, k, v):
        return softmax_attention_kernels(100 * q, 100 * k, v, key_range, scale=1.0)

    first, second = with_gradients(attend, (q, k, v), grad), with_gradients(attend, (q, k, v), grad)
    for one, other in zip(first, second, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


def test_tiles_that_nobody_sees_are_never_visited(device, small_tiles):
    q, k, v, grad = inputs((1, 2, 1, 40, 70, 16), torch.float32, device)
    k[:, :, 32:], v[:, :, 32:] = torch.nan, torch.nan  # all see the first 20 keys
    key_range = KeyRange.bidirectional(40, 20, device=device).expand(1, 2)
    attend = lambda q, k, v: softmax_attention_kernels(q, k, v, key_range, scale=0.25)
    for x in poisoned(with_gradients, attend, (q, k, v), grad):
        assert x.isfinite().all()
    assert (x[:, :, 20:] == 0).all()  # dv


def test_as_torch_operators(device, small_tiles):
    q, k, v, _ = inputs((1, 2, 1, 18, 20, 16), torch.float32, device)
    start, stop = (x.expand(1, 2, 18).contiguous() for x in vars(KeyRange.causal(18, 20, device=device)).values())
    leaves = [x.contiguous().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(
        operator.softmax_attention_forward, (*leaves, start, stop, None, None, None, 0.25), rtol=1e-4, atol=1e-5
    )


def test_errors(device):
    q, k, v, _ = inputs((1, 1, 1, 4, 4, 16), torch.float32, device)
    with pytest.raises(ValueError, match="scale above 0, got -1"):
        softmax_attention_kernels(q, k, v, KeyRange.causal(4, device=device), scale=-1.0)


# ------------------------------------------------------------------------------------------------------- at full size


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 192, 256])
def test_dims(dim, device):
    check((1, 4, 2, 507, 507, dim), torch.bfloat16, device, KeyRange.causal(507))
    check((1, 2, 2, 300, 411, dim), torch.float32, device, KeyRange.causal(300, 411))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [63, 64, 65, 127, 129, 507, 1000, 2049, 4095])
def test_lengths(length, device):
    for key_range in (KeyRange.causal(length), KeyRange.window(length, 200), KeyRange.bidirectional(length)):
        check((2, 2, 1, length, length, 64), torch.bfloat16, device, key_range)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_all_sorts_of_ranges(dtype, device):
    length = 1111
    position = torch.arange(length)[None]
    for key_range in (
        KeyRange.documents(position % 300) & KeyRange.causal(length),
        padding(3, length, length) & KeyRange.causal(length),
        anything(3, 6, length, length),
    ):
        check((3, 6, 2, length, length, 64), dtype, device, key_range)
        check((3, 6, 2, length, length, 64), dtype, device, key_range, slopes=torch.rand(6))


@pytest.mark.gpu
def test_repeated_runs_at_full_size(device):
    q, k, v, grad = inputs((1, 12, 4, 8191, 8191, 64), torch.bfloat16, device)
    key_range = KeyRange.causal(8191, device=device).expand(1, 12)

    def attend(q, k, v):
        return softmax_attention_kernels(q, k, v, key_range, scale=0.125)

    first = with_gradients(attend, (q, k, v), grad)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, with_gradients(attend, (q, k, v), grad), strict=True))
