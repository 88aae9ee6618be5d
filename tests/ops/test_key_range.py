"""KeyRange against dense masks built from the definition of each kind of mask."""

import pytest
import torch

from adasplash import KeyRange
from adasplash.ops.checks import resolve_key_range
from adasplash.ops.key_range import check_padding

LENGTHS = [(1, 1), (2, 2), (63, 63), (65, 65), (1, 65), (3, 63), (65, 2), (64, 128)]


def mask_of(query_length, key_length, allowed):
    """bool (Tq, Tk) from allowed(place of the query, key), the last query standing beside the last key."""
    place = torch.arange(query_length)[:, None] + key_length - query_length
    return allowed(place, torch.arange(key_length)[None, :]) & torch.ones(query_length, key_length, dtype=torch.bool)


def same(key_range, mask):
    got = key_range.dense_mask(mask.shape[-1])
    return torch.equal(got, mask.expand_as(got)) and got.shape[-2:] == mask.shape[-2:]


def random_range(batch=2, heads=3, query_length=65, key_length=70):
    """Any ranges at all: empty ones, reversed ones, whole ones."""
    start = torch.randint(0, key_length + 1, (batch, heads, query_length))
    stop = torch.randint(0, key_length + 1, (batch, heads, query_length))
    start[..., ::7], stop[..., ::7] = 0, key_length
    return KeyRange(start, stop)


def padding_masks(length):
    """Left, right, both sides, none, all pads."""
    keep = torch.ones(5, length, dtype=torch.bool)
    keep[0, : length // 3] = False
    keep[1, length - length // 3 :] = False
    keep[2, : length // 4], keep[2, length - length // 4 :] = False, False
    keep[4] = False
    return keep


def test_dense_mask_is_the_definition():
    key_range = random_range(query_length=9, key_length=11)
    mask = key_range.dense_mask(11)
    for index in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        b, h, i, j = index
        assert mask[b, h, i, j] == (key_range.start[b, h, i] <= j < key_range.stop[b, h, i])


@pytest.mark.parametrize("query_length, key_length", LENGTHS)
def test_causal_and_bidirectional(query_length, key_length):
    causal = mask_of(query_length, key_length, lambda i, j: j <= i)
    assert same(KeyRange.causal(query_length, key_length), causal)
    assert same(KeyRange.bidirectional(query_length, key_length), torch.ones_like(causal))
    assert same(KeyRange.causal(query_length), mask_of(query_length, query_length, lambda i, j: j <= i))


@pytest.mark.parametrize("query_length, key_length", LENGTHS)
@pytest.mark.parametrize("width", [1, 2, 40, 1000])
def test_window(query_length, key_length, width):
    window = KeyRange.window(query_length, width, key_length)
    both = mask_of(query_length, key_length, lambda i, j: (i - j).abs() < width)
    assert same(window, both)
    one_sided = mask_of(query_length, key_length, lambda i, j: (j <= i) & (j > i - width))
    assert same(window & KeyRange.causal(query_length, key_length), one_sided)


@pytest.mark.parametrize("length", [1, 2, 63, 65])
@pytest.mark.parametrize("query_length", [1, 5, None])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_padding(length, query_length, dtype):
    keep = padding_masks(length)
    key_range = KeyRange.padding(keep.to(dtype), query_length)
    assert same(key_range, keep[:, None, None, :].expand(-1, 1, query_length or length, -1))
    assert torch.equal(key_range.empty[:, 0, 0], ~keep.any(-1))


@pytest.mark.parametrize("lengths", [[1], [2], [1, 1, 1], [63], [1, 62, 2], [30, 1, 1, 33], [5] * 13])
@pytest.mark.parametrize("first_position", [0, 2])
def test_documents(lengths, first_position):
    positions = torch.cat([torch.arange(n) for n in lengths])[None] + first_position
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assert same(KeyRange.documents(positions), document[:, None] == document[None, :])


def test_documents_differ_between_samples_and_repeated_positions_are_documents_of_one():
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2], [0, 0, 0, 1, 1]])
    documents = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 2, 2, 3]])
    assert same(KeyRange.documents(positions), (documents[:, :, None] == documents[:, None, :])[:, None])


def test_intersection_is_and_of_masks_and_broadcasts():
    one, other = random_range(batch=2, heads=1), random_range(batch=1, heads=3)
    assert torch.equal((one & other).dense_mask(70), one.dense_mask(70) & other.dense_mask(70))
    assert (one & other).start.shape == (2, 3, 65)


def test_rows_expand_empty():
    key_range = random_range(batch=1, heads=1)
    mask = key_range.dense_mask(70)
    assert torch.equal(key_range.rows(3, 11).dense_mask(70), mask[:, :, 3:11])
    assert torch.equal(key_range.expand(2, 4).dense_mask(70), mask.expand(2, 4, -1, -1))
    assert torch.equal(key_range.empty, ~mask.any(-1))
    assert key_range.query_length == 65 and key_range.start.dtype == torch.int32


@pytest.mark.parametrize("query_block", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize(
    "key_range",
    [
        KeyRange.causal(65, 70),
        KeyRange.causal(65, 2),
        KeyRange.window(65, 5, 70) & KeyRange.causal(65, 70),
        KeyRange.padding(padding_masks(70), 65),
        KeyRange(torch.full((1, 1, 65), 5), torch.full((1, 1, 65), 5)),
        "random",
    ],
)
def test_tile_bounds(key_range, query_block):
    key_range = random_range() if key_range == "random" else key_range
    mask = key_range.dense_mask(70)
    bounds = key_range.tile_bounds(query_block)
    assert all(x.shape == (*mask.shape[:2], -(-65 // query_block)) and x.dtype == torch.int32 for x in bounds)
    for block, rows in enumerate(mask.split(query_block, 2)):
        for b, h in torch.cartesian_prod(torch.arange(mask.shape[0]), torch.arange(mask.shape[1])).tolist():
            any_start, any_stop, all_start, all_stop = (int(x[b, h, block]) for x in bounds)
            seen = rows[b, h].any(0).nonzero().flatten().tolist()
            if seen:
                assert (any_start, any_stop) == (seen[0], seen[-1] + 1)
            else:
                assert any_stop <= any_start
            assert [j for j in range(70) if all_start <= j < all_stop] == rows[b, h].all(0).nonzero().flatten().tolist()


def test_check_padding_finds_the_broken_sample():
    for length in (1, 2, 3, 65):
        check_padding(padding_masks(length))
        check_padding(padding_masks(length).long())
    keep = padding_masks(65)
    keep[3, 30] = False
    with pytest.raises(ValueError, match="sample 3 has pads between"):
        check_padding(keep)
    with pytest.raises(ValueError, match="sample 0"):
        check_padding(torch.tensor([[1, 0, 1]]))


def test_resolve_clamps_to_the_keys_there_are():
    q, k = torch.zeros(2, 3, 5, 4), torch.zeros(2, 1, 7, 4)
    wide = KeyRange(torch.full((1, 1, 5), -3), torch.full((1, 1, 5), 99))
    for causal, constructor in ((True, KeyRange.causal), (False, KeyRange.bidirectional)):
        resolved = resolve_key_range(q, k, wide, causal)
        assert torch.equal(resolved.start, constructor(5, 7).expand(2, 3).start)
        assert torch.equal(resolved.stop, constructor(5, 7).expand(2, 3).stop)


def test_errors():
    three = torch.zeros(1, 1, 3, dtype=torch.int32)
    wrong = [(three, three[..., :2]), (three[0], three[0]), (three.float(), three), (three, three.bool()), (three, [3])]
    for start, stop in wrong:
        with pytest.raises(ValueError, match="KeyRange expects"):
            KeyRange(start, stop)
    with pytest.raises(ValueError, match="as many queries, got 3 and 1"):
        KeyRange.causal(3) & KeyRange.causal(1)
    with pytest.raises(ValueError, match="KeyRange on both sides of &, got NoneType"):
        KeyRange.causal(3) & None
    with pytest.raises(ValueError, match="width of at least 1, got 0"):
        KeyRange.window(3, 0)
    with pytest.raises(ValueError, match="padding mask of shape"):
        KeyRange.padding(torch.ones(3, dtype=torch.bool))
    added_to_scores = torch.tensor([[0.0, 0.0, -torch.inf]])
    for keep, came in ((added_to_scores, "torch.float32; give mask == 0"), ([[1, 1, 0]], "list")):
        for function in (KeyRange.padding, check_padding):
            with pytest.raises(ValueError, match=f"mask of bools or integers, 1 where a key is kept, got {came}"):
                function(keep)
    with pytest.raises(ValueError, match="position_ids as an integer tensor, got torch.float32"):
        KeyRange.documents(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="position_ids of shape"):
        KeyRange.documents(torch.arange(3))
    q = torch.zeros(2, 3, 5, 4)
    with pytest.raises(ValueError, match=r"key_range of shape \(1 or 2, 1 or 3, 5\), got \(1, 1, 3\)"):
        resolve_key_range(q, q, KeyRange.causal(3), True)


def test_the_largest_integer_is_no_limit():
    stop = torch.full((1, 1, 3), torch.iinfo(torch.int64).max)
    assert KeyRange(torch.zeros_like(stop), stop).dense_mask(4).all()
    assert KeyRange(torch.full_like(stop, torch.iinfo(torch.int64).min), stop).dense_mask(4).all()
