"""The kernels of entmax attention: under Triton's interpreter or on a GPU, on small shapes."""

import itertools

import pytest
import torch
from dense_attention import dense_probabilities
from entmax_roads import (
    DEVICE,
    NEEDS,
    ROADS,
    compare,
    forward,
    gradients,
    inputs,
    is_compiling,
    key_ranges,
    listed_keys,
    operator,
    relative,
    take,
)
from torch import Tensor

from adasplash import KeyRange
from adasplash.ops import tile_table
from adasplash.ops.checks import resolve_key_range
from adasplash.ops.range_attention import range_attention, text_positions
from adasplash.ops.tile_table import entmax_tiles, list_shapes

lists = pytest.importorskip("adasplash.ops.entmax_attention.lists", reason="needs triton")
triton, tl = lists.triton, lists.tl
load_listed, store_listed, THRESHOLD_ROWS = lists.load_listed, lists.store_listed, lists.THRESHOLD_ROWS.value
pytestmark = NEEDS


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
@pytest.mark.parametrize("alpha", [1.5, 1.4])
def test_what_is_not_finite_shows(road, dtype, slope, alpha, monkeypatch):
    """NaN in a query or a key comes out as NaN wherever it is seen, and nowhere else: training has to notice it."""
    take(road, monkeypatch)
    q, k, v, _ = inputs(1, 2, 2, 70, 70, 16, dtype)
    visible = resolve_key_range(q, k, KeyRange.window(70, 30, device=DEVICE), True)
    how = {"alpha": alpha, "scale": 0.25}
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
@pytest.mark.parametrize("alpha", [1.5, torch.tensor([1.4])])
def test_gradients_of_rows_that_are_not_finite(road, alpha, monkeypatch):
    """They are NaN or nothing, but not numbers that look right."""
    take(road, monkeypatch)
    q, k, v, d_out = inputs(1, 1, 1, 70, 70, 16)
    visible = resolve_key_range(q, k, None, True)
    k[0, 0, 20] = torch.nan
    d_out[:, :, :20] = 0.0  # all others see that key
    attend = lambda q, k, v, alpha: operator.entmax_attention_kernels(q, k, v, visible, alpha=alpha, scale=0.25)
    alpha = alpha.to(DEVICE) if isinstance(alpha, torch.Tensor) else alpha
    for gradient in gradients(attend, q, k, v, d_out, alpha)[1:]:
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
def test_lists_hold_exactly_the_support(alpha, monkeypatch):
    take("lists", monkeypatch)
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


def test_blocks_in_tile_mode_apart_from_each_other(monkeypatch):
    """dk and dv walk an edge, whole blocks that are not neighbours, and an incomplete one, between others on lists."""
    monkeypatch.setattr(operator, "KEYS_PER_QUERY", 16)
    block_rows = entmax_tiles(16, torch.float32, torch.device(DEVICE))["collect"].block_m
    length = 4 * block_rows + 34
    q, k, v, d_out = inputs(1, 2, 1, length, length, 16)
    sharpness = torch.tensor([0.1, 0.1, 20.0, 0.1, 0.1], device=DEVICE)
    q *= sharpness.repeat_interleave(block_rows)[:length, None]
    list_blocks = operator._list_blocks

    def checked(in_tiles):
        assert is_compiling() or in_tiles.tolist() == [[1, 1, 0, 1, 1]] * 2
        return list_blocks(in_tiles)

    monkeypatch.setattr(operator, "_list_blocks", checked)
    compare(q, k, v, d_out)


@pytest.mark.parametrize("large", [[210], [75], [75, 210]], ids=["queries", "keys", "both"])
def test_lists_of_either_size(large, monkeypatch):
    take("lists", monkeypatch)
    monkeypatch.setattr(operator, "_need_high_halves", lambda numbers: numbers in large)
    compare(*inputs(1, 3, 1, 70, 75, 16))


@triton.jit
def copy_listed_kernel(FROM, TO, count, high_from, high_to, AT_ONCE: tl.constexpr):
    at = tl.arange(0, AT_ONCE)
    store_listed(TO, at, load_listed(FROM, at, at < count, high_from), at < count, high_to)


def test_lists_hold_numbers_of_either_size():
    low, high = [0, 1, 65535, 0, 65535, 7], [0, 0, 0, 1, 32767, 0]
    numbers = torch.tensor([*low, *high], device=DEVICE).to(torch.uint16)
    two, one = (torch.full((size,), 9, dtype=torch.uint16, device=DEVICE) for size in (16, 8))
    copy_listed_kernel[(1,)](numbers, two, 6, 6, 8, AT_ONCE=8)
    assert two.tolist() == [*low, 9, 9, *high, 9, 9]
    copy_listed_kernel[(1,)](two, one, 6, 8, 0, AT_ONCE=8)
    assert one.tolist() == [*low, 9, 9]


def test_slabs_have_no_room_that_is_not_used():
    q = torch.empty(1, 1, 1, 64, device=DEVICE, dtype=torch.bfloat16)
    assert [operator._keys_per_query(q, length) for length in (1, 1024, 8192, 2**16, 2**17)] == [17, 24, 80, 96, 48]


def test_blocks_that_are_faster_in_tile_mode_take_it(monkeypatch):
    """The slabs have room for all keys, but lists for many of them are worth it among very many only."""
    q, k, v, _ = inputs(1, 1, 1, 70, 300, 16, sharpness=0.1)
    visible = resolve_key_range(q, k, None, False)
    arguments = operator.operator_arguments(q, k, v, visible, alpha=1.25, scale=0.25)
    monkeypatch.setattr(operator, "FEW_KEYS", 0)
    for scores_per_key, in_tiles in ((1, False), (100, True)):
        monkeypatch.setattr(operator, "SCORES_PER_KEY", scores_per_key)
        assert (forward(*arguments[:-1], 300).in_tiles == in_tiles).all()


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
@pytest.mark.parametrize("alpha, right", [(1.5, True), (1.25, True), (1.45, True), (1.01, False)])
def test_tile_mode_from_a_bound_far_below_the_threshold(alpha, right, monkeypatch):
    """Steps of third order must not go past a row's largest score: there its weights would all be 0. Where the sum of the powers
    overflows, it shows."""
    take("tiles", monkeypatch)
    kernel = operator.tiles_forward_kernel

    class Launcher:
        warmup = kernel.warmup

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                by_name = dict(zip(kernel.arg_names, arguments, strict=False))
                by_name["BOUND"] -= 300.0
                return kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(operator, "tiles_forward_kernel", Launcher())
    q, k, v, _ = inputs(1, 1, 1, 64, 64, 16, sharpness=8.0)
    visible = resolve_key_range(q, k, None, True)
    out = operator.entmax_attention_kernels(q, k, v, visible, alpha=alpha, scale=1.0)
    if right:
        assert relative(out, range_attention(q, k, v, visible, alpha=alpha, scale=1.0)) < 1e-4
    else:
        assert out.isnan().all()


def test_an_empty_batch():
    leaves = [x.requires_grad_() for x in inputs(0, 2, 1, 20, 20, 16)[:3]]
    visible = resolve_key_range(*leaves[:2], None, True)
    out = operator.entmax_attention_kernels(*leaves, visible, alpha=1.5, scale=0.25)
    out.sum().backward()
    assert out.shape == leaves[0].grad.shape == (0, 2, 20, 16)
