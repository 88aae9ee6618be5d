"""The kernels of entmax attention: under Triton's interpreter on small shapes, on a GPU also at full size."""

import itertools

import pytest
import torch
from dense_attention import dense_attention, dense_probabilities
from torch import Tensor

from adasplash import KeyRange, entmax
from adasplash.ops import tile_table
from adasplash.ops.checks import resolve_key_range
from adasplash.ops.range_attention import range_attention, text_positions
from adasplash.ops.tile_table import entmax_tiles, list_shapes

operator = pytest.importorskip("adasplash.ops.entmax_attention.operator", reason="needs triton")
THRESHOLD_ROWS = pytest.importorskip("adasplash.ops.entmax_attention.lists").THRESHOLD_ROWS.value
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not operator.INTERPRETED, reason="needs a GPU or Triton's interpreter"),
    pytest.mark.usefixtures("large_programs"),
]

# Where the pairs go: all on lists, all in tile mode, some blocks here and some there, columns as sinks. Numbers of keys per
# query that a block's list has room for, and of the longest column on lists.
ROADS = {"lists": (64, 64), "tiles": (0, 64), "both": (2, 64), "sinks": (64, 3)}


@pytest.fixture(params=ROADS)
def road(request, monkeypatch):
    take(request.param, monkeypatch)


def forward(*arguments):
    return operator.Forward(*operator.entmax_attention_forward(*arguments))


def take(road: str, monkeypatch):
    room, longest_column = ROADS[road]
    monkeypatch.setattr(operator, "KEYS_PER_QUERY", room)
    monkeypatch.setattr(operator, "LONGEST_COLUMN", longest_column)
    list_blocks, prepare = operator._list_blocks, operator.operator_arguments

    def is_mixed(in_tiles):
        return bool(in_tiles.any() and not in_tiles.all())

    def checked(in_tiles):
        if road != "both":
            assert in_tiles.any() == (road == "tiles"), "another road was taken"
        elif in_tiles.shape[1] > 1:  # a lone block has but one road
            assert is_mixed(in_tiles), "one road was taken by all"
        return list_blocks(in_tiles)

    def with_room_for_some(*args, **kwargs):
        """The supports of long inputs differ: the first room that some blocks fit in, and others not."""
        *arguments, _ = prepare(*args, **kwargs)
        if operator.KEYS_PER_QUERY == room:
            monkeypatch.setattr(operator, "_list_blocks", list_blocks)
            rooms = (3, 6, 12, 24) if DEVICE == "cpu" else (2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)
            mixed = (n for n in rooms if is_mixed(forward(*arguments, n).in_tiles))
            monkeypatch.setattr(operator, "KEYS_PER_QUERY", next(mixed, room))
            monkeypatch.setattr(operator, "_list_blocks", checked)
        return *arguments, operator.KEYS_PER_QUERY

    monkeypatch.setattr(operator, "_list_blocks", checked)
    if road == "both":
        monkeypatch.setattr(operator, "operator_arguments", with_room_for_some)


def inputs(batch, heads, groups, query_length, key_length, dim, dtype=torch.float32, sharpness=2.0) -> list[Tensor]:
    """q, k, v and a gradient for the output, strided as transformers hands them over; supports of long ones differ."""
    growing = torch.linspace(0.5, 1.0, query_length, device=DEVICE)[:, None, None] if query_length > 128 else 1.0
    q = sharpness * growing * torch.randn(batch, query_length, heads, dim, device=DEVICE)
    k, v = torch.randn(2, batch, key_length, groups, dim, device=DEVICE).unbind()
    d_out = torch.randn(batch, heads, query_length, dim, device=DEVICE)
    return [x.to(dtype) for x in (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), d_out)]


def gradients(function, q, k, v, d_out, alpha, dtype=None) -> list[Tensor]:
    """[out, dq, dk, dv] and, for a tensor alpha, its gradient; computed in another dtype where one is given."""
    leaves = [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in (q, k, v)]
    learned = isinstance(alpha, Tensor)
    if learned:
        alpha = alpha.detach().to(dtype or alpha.dtype).clone().requires_grad_()
    out = function(*leaves, alpha)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves), *([alpha.grad] if learned else [])]


def relative(result: Tensor, truth: Tensor) -> float:
    size = truth.double().norm().item()
    return (result.double() - truth.double()).norm().item() / (size or 1.0)


def compare(q, k, v, d_out, *, alpha=1.5, key_range=None, causal=True, slopes=None, factor=2):
    """Kernels and eager attention of the same dtype against float64: at most `factor` times eager's error; the same bits again."""
    visible = resolve_key_range(q, k, key_range, causal)
    scale = q.shape[-1] ** -0.5
    how = {"scale": scale, "alibi_slopes": slopes}

    def per_head(a):
        return a.view(1, -1, 1, 1) if isinstance(a, Tensor) else a

    def kernels(q, k, v, a):
        query_positions, key_positions = text_positions(q, k)
        places = {"query_positions": query_positions, "key_positions": key_positions}
        return operator.entmax_attention_kernels(q, k, v, visible, alpha=a, **how, **places)

    def reference(q, k, v, a):
        return range_attention(q, k, v, visible, alpha=per_head(a), **how)

    def eager(q, k, v, a):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = (q @ k.mT).float() * scale
        if slopes is not None:
            i = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
            scores = scores - slopes.view(-1, 1, 1) * (i - torch.arange(k.shape[2], device=q.device)).abs()
        scores = scores.masked_fill(~visible.dense_mask(k.shape[2]), -torch.inf)
        return entmax(scores, per_head(a)).to(v.dtype) @ v

    results = gradients(kernels, q, k, v, d_out, alpha)
    truths = gradients(reference, q, k, v, d_out, alpha, torch.float64)
    yardsticks = gradients(eager, q, k, v, d_out, alpha)
    names = ("out", "dq", "dk", "dv", "dalpha")
    for name, result, truth, yardstick in zip(names, results, truths, yardsticks, strict=False):
        assert result.isfinite().all(), name
        floor = 2e-5 if name == "dalpha" else 2e-6
        assert relative(result, truth) <= factor * relative(yardstick, truth) + floor, name
    if DEVICE != "cpu":  # the interpreter runs one program after the other
        for name, result, again in zip(names, results, gradients(kernels, q, k, v, d_out, alpha), strict=False):
            assert torch.equal(result, again), f"{name} differs between two runs"
    return results


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25, "learned"])
def test_every_road_and_alpha(road, alpha):
    if alpha == "learned":
        alpha = torch.tensor([1.3, 1.6], device=DEVICE)
    compare(*inputs(1, 2, 1, 70, 70, 16), alpha=alpha)


@pytest.mark.parametrize("road", ["lists", "tiles"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 16), (2, 3, 1, 7, 66, 20), (1, 2, 2, 66, 3, 16), (1, 2, 2, 1, 33, 16)]
)
def test_odd_shapes_and_grouped_heads(shape, road, monkeypatch):
    take(road, monkeypatch)
    compare(*inputs(*shape))


def key_ranges(length):
    keep = torch.ones(1, length, dtype=torch.bool, device=DEVICE)
    keep[:, : length // 3] = False
    position = torch.arange(length, device=DEVICE)[None]
    return {
        "window": KeyRange.window(length, 9, device=DEVICE),
        "left padding": KeyRange.padding(keep),
        "right padding": KeyRange.padding(keep.flip(-1)),
        "documents": KeyRange.documents(position % 23),
        "everything": KeyRange.documents(position % 41)
        & KeyRange.padding(keep)
        & KeyRange.window(length, 17, device=DEVICE),
    }


@pytest.mark.parametrize("road", ["lists", "tiles", "both"])
@pytest.mark.parametrize("kind", ["window", "left padding", "right padding", "documents", "everything"])
def test_key_ranges(kind, road, monkeypatch):
    take(road, monkeypatch)
    out, *_ = compare(*inputs(1, 1, 1, 70, 70, 16), key_range=key_ranges(70)[kind])
    if kind == "left padding":
        assert (out[:, :, : 70 // 3] == 0).all()


@pytest.mark.parametrize("road", ["lists", "tiles"])
def test_rows_that_see_nothing_among_rows_that_see_all(road, monkeypatch):
    """With ranges whose two ends lie in memory each in its own way."""
    take(road, monkeypatch)
    start = torch.zeros(2, 1, 96, dtype=torch.int32, device=DEVICE)
    stop = torch.full((1, 96, 2), 96, dtype=torch.int32, device=DEVICE).permute(2, 0, 1)
    stop[:, :, 5] = 0
    stop[1, :, 70] = 0
    out, *_ = compare(*inputs(2, 1, 1, 96, 96, 16), key_range=KeyRange(start, stop), causal=False)
    assert (out[:, :, 5] == 0).all() and (out[1, :, 70] == 0).all()


def test_nearly_equal_scores_in_tile_mode(monkeypatch):
    """Differences of z far below 1: how near tau is near enough goes by them."""
    take("tiles", monkeypatch)
    compare(*inputs(1, 1, 1, 66, 66, 16, torch.float16, sharpness=0.01), alpha=2.0, causal=False)


def test_gradient_of_an_alpha_near_one_in_tile_mode(monkeypatch):
    take("tiles", monkeypatch)
    compare(*inputs(1, 1, 1, 66, 66, 16, torch.float16), alpha=torch.tensor([1.05], device=DEVICE))


@pytest.mark.parametrize("alpha, few, gap", [(1.5, 4, 0.6), (1.5, 1, 0.95), (1.5, 4, 0.95), (1.45, 2, 0.8)])
def test_few_keys_above_many_in_tile_mode(alpha, few, gap, monkeypatch):
    """Weights as uneven as can be, which slows down the search for tau; the values go with the scores, and the keys have
    something in common, so that sum u (dP - delta), which is 0 but for errors, shows in dq."""
    take("tiles", monkeypatch)
    dtype = torch.float16 if DEVICE == "cpu" else torch.bfloat16
    q, k, v, d_out = inputs(1, 1, 1, 64, 96, 16, torch.float32, sharpness=1.0)
    k *= 0.1
    q[..., 0], q[..., 1] = 4.0, 0.1
    k[..., 0], k[..., 1] = 0.0, 2.0
    k[:, :, :few, 0] = gap / (alpha - 1.0)
    v[:, :, :few] += 1.0
    compare(*(x.to(dtype) for x in (q, k, v, d_out)), alpha=alpha, causal=False)


@pytest.mark.parametrize(
    "alpha, length, gap, value", [(2.0, 512, 0.5, 30.0), (1.75, 512, 0.6, 10.0), (1.5, 256, 0.6, 10.0)]
)
@pytest.mark.parametrize("road", ["lists", "tiles"])
def test_an_output_far_from_the_mean_that_gradients_need(alpha, length, gap, value, road, monkeypatch):
    """One key has half of the weight, and another value than all others, which count as much for the gradient."""
    if road == "lists":
        monkeypatch.setitem(ROADS, road, (length, length))
    take(road, monkeypatch)
    dtype = torch.float16 if DEVICE == "cpu" else torch.bfloat16
    q, k, v, d_out = inputs(1, 1, 1, 32, length, 16, torch.float32, sharpness=1.0)
    k *= 0.02
    q[..., 0], q[..., 1] = 4.0, 0.02
    k[..., 0], k[..., 1] = 0.0, 10.0
    k[:, :, 0, 0] = gap / (alpha - 1.0)
    v[:, :, 0] += value
    compare(*(x.to(dtype) for x in (q, k, v, d_out)), alpha=alpha, causal=False)


@pytest.mark.parametrize("slope", [None, 0.125])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("road", ["lists", "tiles"])
def test_what_is_not_finite_shows(road, dtype, slope, monkeypatch):
    """NaN in a query or a key comes out as NaN wherever it is seen, and nowhere else: training has to notice it."""
    take(road, monkeypatch)
    q, k, v, _ = inputs(1, 2, 2, 70, 70, 16, dtype)
    visible = resolve_key_range(q, k, KeyRange.window(70, 30, device=DEVICE), True)
    how = {"alpha": 1.5, "scale": 0.25}
    if slope:
        query_positions, key_positions = text_positions(q, k)
        slopes = torch.full((2,), slope, device=DEVICE)
        how |= {"alibi_slopes": slopes, "query_positions": query_positions, "key_positions": key_positions}
    attend = lambda: operator.entmax_attention_kernels(q, k, v, visible, **how)
    whole = attend()
    q[0, 0, 3, 5] = torch.nan
    k[0, 1, 20, 2] = torch.nan
    out = attend()
    broken = torch.zeros(1, 2, 70, dtype=torch.bool, device=DEVICE)
    broken[0, 0, 3] = True
    broken[0, 1, 20:50] = True
    assert torch.equal(out.isnan().all(-1), broken)
    torch.testing.assert_close(out[~broken], whole[~broken])


@pytest.mark.parametrize("road", ["lists", "tiles", "sinks"])
def test_gradients_of_rows_that_are_not_finite(road, monkeypatch):
    """They are NaN or nothing, but not numbers that look right."""
    take(road, monkeypatch)
    q, k, v, d_out = inputs(1, 1, 1, 70, 70, 16)
    visible = resolve_key_range(q, k, None, True)
    k[0, 0, 20] = torch.nan
    d_out[:, :, :20] = 0.0  # all others see that key
    attend = lambda q, k, v, alpha: operator.entmax_attention_kernels(q, k, v, visible, alpha=alpha, scale=0.25)
    for gradient in gradients(attend, q, k, v, d_out, 1.5)[1:]:
        assert (gradient.isnan() | (gradient == 0)).all()


@pytest.mark.parametrize("road", ["lists", "tiles", "sinks"])
def test_gradients_of_keys_that_no_row_sees_which_is_not_finite(road, monkeypatch):
    take(road, monkeypatch)
    q, k, v, d_out = inputs(1, 1, 1, 70, 70, 16)
    visible = KeyRange.documents(torch.arange(70, device=DEVICE)[None] % 35)
    k[0, 0, 10] = torch.nan
    attend = lambda q, k, v, alpha: operator.entmax_attention_kernels(q, k, v, visible, alpha=alpha, scale=0.25)
    out, _, dk, dv = gradients(attend, q, k, v, d_out, 1.5)
    assert all(x[:, :, 35:].isfinite().all() for x in (out, dk, dv))


@pytest.mark.parametrize("little_shared_memory", [False, True])
def test_shapes_of_programs_go_together(little_shared_memory, monkeypatch):
    monkeypatch.setattr(tile_table, "has_little_shared_memory", lambda device: little_shared_memory)
    for dim, dtype in itertools.product(range(1, 257), (torch.float32, torch.bfloat16, torch.float16)):
        tiles, shapes = entmax_tiles(dim, dtype, torch.device(DEVICE)), list_shapes(dim)
        rows = [tiles[name].block_m for name in ("forward", "rows", "columns", "sinks")]
        rows += [shapes[name].rows * shapes[name].turns for name in ("forward", "backward", "transpose")]
        assert all(tiles["collect"].block_m % n == 0 for n in rows), (dim, dtype)
        assert all(shape.block_m >= 16 for shape in tiles.values()), (dim, dtype)  # the least of a dot
        assert shapes["forward"].rows * shapes["forward"].turns % THRESHOLD_ROWS == 0, dim


@pytest.mark.parametrize("road", ["lists", "tiles"])
def test_bidirectional_and_alibi(road, monkeypatch):
    take(road, monkeypatch)
    compare(*inputs(1, 1, 1, 40, 70, 16), causal=False)
    compare(*inputs(1, 2, 2, 70, 70, 16), slopes=torch.tensor([0.5, 0.0625], device=DEVICE))


@pytest.mark.parametrize("road", ["lists", "tiles"])
@pytest.mark.parametrize("sharpness", [0.0, 1e-4, 50.0])
def test_extreme_scores(sharpness, road, monkeypatch):
    """0: all scores of a row are equal, so that the support is everything; 50: one key takes all.

    At 50 the few gradients that are left hang on the last bits of z - tau, and the kernels round tau once more. With two rows
    that have any, as in one sequence, eager attention may by luck be right to the last bit.
    """
    take(road, monkeypatch)
    batch = 4 if sharpness > 10 else 1
    compare(*inputs(batch, 1, 1, 40, 40, 16, sharpness=sharpness), factor=4 if sharpness > 10 else 2)


def test_one_key_that_all_queries_attend_to(monkeypatch):
    take("sinks", monkeypatch)
    q, k, v, d_out = inputs(1, 2, 1, 70, 70, 16)
    k[:, :, 0] = 3 * q.mean((1, 2))[:, None]
    q += 2 * k[:, :, :1].repeat_interleave(2, 1)
    compare(q, k, v, d_out)


def test_half_precision(road):
    compare(*inputs(1, 1, 1, 66, 66, 16, torch.float16))


def test_outputs_are_written_whole(monkeypatch):
    """Every element of a fresh buffer is NaN: none may come through."""
    take("both", monkeypatch)
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def poison(x):
        return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(-7)

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    compare(*inputs(1, 2, 1, 70, 70, 16), alpha=torch.tensor([1.4, 1.6], device=DEVICE))


@pytest.mark.parametrize("alpha", [1.5, 1.25])
def test_lists_hold_exactly_the_support(alpha):
    q, k, v, _ = inputs(1, 2, 1, 70, 70, 16)
    visible = resolve_key_range(q, k, None, True)
    alphas = torch.full((2,), alpha, device=DEVICE)
    none = (None, None, None)
    found = forward(q, k, v, visible.start, visible.stop, alphas, *none, 0.25, operator.formula_of(alpha), 64)
    assert not found.in_tiles.any()
    mask = visible.dense_mask(70).cpu()
    p = dense_probabilities(q.cpu(), k.cpu(), mask, alpha=alpha, scale=0.25)[0]
    block_rows = entmax_tiles(16, q.dtype, q.device)["collect"].block_m
    listed = listed_keys(found, 70, block_rows).cpu()
    assert listed[p > 1e-9].all()
    assert ((listed & (p == 0)).sum(-1) <= 1).all()  # a key on the edge may round to either side


@pytest.mark.parametrize("alpha", [1.5, "learned"])
def test_operator_contracts(alpha):
    """Fake tensors, autograd registration and aliasing, as torch.compile relies on them."""
    learned = alpha == "learned"
    q, k, v, d_out = inputs(1, 2, 1, 20, 20, 16)
    alpha = torch.tensor([1.4, 1.6], device=DEVICE, requires_grad=True) if learned else alpha
    visible = resolve_key_range(q, k, None, True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    arguments = operator.operator_arguments(*leaves, visible, alpha=alpha, scale=0.25)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        operator.entmax_attention_forward, arguments, test_utils=(*tests, "test_autograd_registration")
    )
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    saved = operator.entmax_attention_forward(*arguments)
    backward = (d_out, *arguments[:9], *saved, *arguments[9:], learned)
    torch.library.opcheck(operator.entmax_attention_backward, backward, test_utils=tests)


@pytest.mark.parametrize("size", [5e9, 1e15])
@pytest.mark.parametrize("road", ["lists", "tiles"])
def test_huge_scores(size, road, monkeypatch):
    """Scores before their scale near float32's largest number."""
    take(road, monkeypatch)
    q, k, v, _ = inputs(1, 1, 1, 64, 64, 16)
    visible = resolve_key_range(q, k, None, True)
    q, k, scale = q * size, k * size, 0.25 / size**2
    out = operator.entmax_attention_kernels(q, k, v, visible, alpha=1.5, scale=scale)
    assert relative(out, range_attention(q, k, v, visible, alpha=1.5, scale=scale)) < 1e-4


def test_a_query_of_zeros_beside_a_key_too_large_to_square():
    q, k, v, _ = inputs(1, 1, 1, 40, 40, 16)
    visible = resolve_key_range(q, k, None, True)
    q[0, 0, 30:], k[0, 0, 39] = 0.0, 1e20
    q[0, 0, 39, 0] = 1e-20
    out = operator.entmax_attention_kernels(q, k, v, visible, alpha=1.5, scale=0.25)
    torch.testing.assert_close(out, range_attention(q, k, v, visible, alpha=1.5, scale=0.25))


@pytest.mark.skipif(not operator.INTERPRETED, reason="reaches into the launch")
def test_tile_mode_from_a_bound_far_below_the_threshold(monkeypatch):
    """Steps of third order must not go past a row's largest score: there its weights would all be 0."""
    take("tiles", monkeypatch)
    kernel = operator.tiles_forward_kernel

    class Launcher:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                by_name = dict(zip(kernel.arg_names, arguments, strict=False))
                by_name["BOUND"] -= 300.0
                return kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(operator, "tiles_forward_kernel", Launcher())
    q, k, v, _ = inputs(1, 1, 1, 64, 64, 16, sharpness=8.0)
    visible = resolve_key_range(q, k, None, True)
    out = operator.entmax_attention_kernels(q, k, v, visible, alpha=1.5, scale=1.0)
    assert relative(out, range_attention(q, k, v, visible, alpha=1.5, scale=1.0)) < 1e-4


def test_an_empty_batch():
    leaves = [x.requires_grad_() for x in inputs(0, 2, 1, 20, 20, 16)[:3]]
    visible = resolve_key_range(*leaves[:2], None, True)
    out = operator.entmax_attention_kernels(*leaves, visible, alpha=1.5, scale=0.25)
    out.sum().backward()
    assert out.shape == leaves[0].grad.shape == (0, 2, 20, 16)


# ------------------------------------------------------------------------------------------------ on a GPU, at full size


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_dims_and_dtypes(dim, dtype, road):
    compare(*inputs(1, 2, 1, 507, 507, dim, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [63, 127, 507, 4095])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1), (8, 1)])
def test_lengths_and_groups(length, heads):
    compare(*inputs(1, *heads, length, length, 64, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("alpha", [1.01, 1.25, 1.5, 1.75, 2.0, "learned"])
@pytest.mark.parametrize("road", ROADS)
def test_alphas(alpha, road, monkeypatch):
    take("tiles" if alpha == 1.01 else road, monkeypatch)  # at 1.01 supports are far too large for lists
    if alpha == "learned":
        alpha = torch.tensor([1.3, 1.6], device=DEVICE)
    compare(*inputs(1, 2, 1, 1023, 1023, 64, torch.bfloat16, sharpness=4.0), alpha=alpha)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["window", "left padding", "right padding", "documents", "everything"])
def test_key_ranges_at_length(kind, road):
    compare(*inputs(2, 2, 1, 2047, 2047, 64, torch.bfloat16), key_range=key_ranges(2047)[kind])


def listed_keys(found, key_length, block_rows) -> Tensor:
    """Which keys stand on the lists, bool (B * H, Tq, Tk), of rows of any length."""
    heads, blocks = found.in_tiles.shape
    keys, first, count = found.keys, found.first.flatten(0, 1), found.count.flatten(0, 1)
    row = torch.arange(count.shape[1], device=count.device)
    slab = torch.arange(heads, device=count.device)[:, None] * blocks + row // block_rows
    begin = (slab * (keys.numel() // (heads * blocks)) + first).flatten()
    length = count.flatten().long()
    at = torch.arange(int(length.sum()), device=count.device)
    at += torch.repeat_interleave(begin - (length.cumsum(0) - length), length)
    listed = torch.zeros(count.numel(), key_length, dtype=torch.bool, device=count.device)
    listed[torch.repeat_interleave(torch.arange(count.numel(), device=count.device), length), keys[at].long()] = True
    return listed.view(heads, -1, key_length)


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_more_heads_than_an_axis_of_a_grid_holds():
    q, k, v, d_out = inputs(33000, 2, 2, 5, 5, 16, torch.float16)
    results = compare(q[-3:], k[-3:], v[-3:], d_out[-3:])
    visible = resolve_key_range(q, k, None, True)
    attend = lambda q, k, v, alpha: operator.entmax_attention_kernels(q, k, v, visible, alpha=alpha, scale=0.25)
    for whole, result in zip(gradients(attend, q, k, v, d_out, 1.5), results, strict=True):
        assert torch.equal(whole[-3:], result)


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_compiles_without_graph_breaks():
    from adasplash import entmax_attention

    q, k, v, _ = inputs(1, 4, 2, 300, 300, 64, torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: 2 * entmax_attention(q, k, v), fullgraph=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = compiled(*leaves)
    out.float().sum().backward()
    assert torch.equal(out, 2 * entmax_attention(q, k, v))
    assert leaves[0].grad.isfinite().all()


@pytest.mark.gpu
def test_dense_attention_agrees_with_the_dense_computation():
    from adasplash import entmax_attention

    q, k, v, _ = inputs(1, 2, 1, 300, 300, 64, torch.float32)
    mask = torch.ones(300, 300, dtype=torch.bool).tril()
    truth = dense_attention(q.cpu(), k.cpu(), v.cpu(), mask, alpha=1.5)
    assert relative(entmax_attention(q, k, v).cpu(), truth) < 1e-5
