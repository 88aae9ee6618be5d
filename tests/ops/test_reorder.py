"""Reordering: in the new order, each query's range holds exactly the keys that belong to it."""

import pytest
import torch

from adasplash import KeyRange
from adasplash.ops.reordered_attention import keep_mask, random_directions
from adasplash.ops.reordered_attention.reference import (
    compact_kept,
    hash_buckets,
    reorder_inputs,
    restore_output,
    restore_rows,
    sort_by_bucket,
    take_rows,
)

# B, H, G, Tq, Tk
SHAPES = [(1, 1, 1, 1, 1), (2, 4, 2, 65, 63), (1, 3, 1, 7, 65), (2, 2, 2, 64, 3)]


def any_range(shape):
    batch, heads, _, query_length, key_length = shape
    start = torch.randint(0, key_length + 1, (batch, heads, query_length))
    return KeyRange(start, torch.randint(0, key_length + 1, (batch, heads, query_length)))


def mask_in_text_order(reordering, key_length, ratio):
    """bool (B, H, Tq, Tk): the reordered ranges, brought back to the order of the text, pair by pair."""
    mask = reordering.key_range.dense_mask(key_length)
    back = torch.zeros_like(mask)
    key_order = reordering.key_order.repeat_interleave(ratio, 1)
    back.scatter_(3, key_order[:, :, None, :].expand_as(mask), mask)
    return torch.zeros_like(mask).scatter(2, reordering.query_order[..., None].expand_as(mask), back)


def is_permutation(order):
    return torch.equal(order.sort(-1).values, torch.arange(order.shape[-1]).expand_as(order))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_buckets", [1, 3, 50])
def test_sort_by_bucket(shape, n_buckets):
    batch, heads, groups, query_length, key_length = shape
    query_buckets = torch.randint(0, n_buckets, (batch, heads, query_length))
    key_buckets = torch.randint(0, n_buckets, (batch, groups, key_length))
    key_range = any_range(shape)
    reordering = sort_by_bucket(query_buckets, key_buckets, key_range)
    assert is_permutation(reordering.query_order) and is_permutation(reordering.key_order)
    same_bucket = query_buckets[..., None] == key_buckets.repeat_interleave(heads // groups, 1)[..., None, :]
    expected = key_range.dense_mask(key_length) & same_bucket
    assert torch.equal(mask_in_text_order(reordering, key_length, heads // groups), expected)
    assert (reordering.query_count == query_length).all() and (reordering.key_count == key_length).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_compact_kept(shape, share):
    batch, heads, groups, query_length, key_length = shape
    query_kept = torch.rand(batch, heads, query_length) < share
    key_kept = torch.rand(batch, groups, key_length) < share
    key_range = any_range(shape)
    reordering = compact_kept(query_kept, key_kept, key_range)
    assert is_permutation(reordering.query_order) and is_permutation(reordering.key_order)
    both = query_kept[..., None] & key_kept.repeat_interleave(heads // groups, 1)[..., None, :]
    expected = key_range.dense_mask(key_length) & both
    assert torch.equal(mask_in_text_order(reordering, key_length, heads // groups), expected)
    for kept, order, count in (
        (query_kept, reordering.query_order, reordering.query_count),
        (key_kept, reordering.key_order, reordering.key_count),
    ):  # kept ones in front
        assert torch.equal(kept.gather(-1, order), torch.arange(kept.shape[-1]) < count[..., None])


def test_text_order_is_kept_within_a_bucket():
    buckets = torch.randint(0, 5, (2, 3, 65))
    reordering = sort_by_bucket(buckets, buckets, KeyRange.causal(65).expand(2, 3))
    for order in (reordering.query_order, reordering.key_order):
        sorted_buckets = buckets.gather(-1, order)
        step, place_step = sorted_buckets.diff(dim=-1), order.diff(dim=-1)
        assert (step >= 0).all() and (place_step[step == 0] > 0).all()


def test_one_bucket_holds_everything():
    buckets = torch.full((1, 2, 65), 7)
    causal = KeyRange.causal(65).expand(1, 2)
    reordering = sort_by_bucket(buckets, buckets, causal)
    assert torch.equal(reordering.query_order, torch.arange(65).expand(1, 2, -1))
    assert torch.equal(reordering.key_range.dense_mask(65), causal.dense_mask(65))


def test_take_and_restore_are_inverse_and_differentiable():
    x = torch.randn(2, 3, 65, 4, requires_grad=True)
    order = torch.rand(2, 3, 65).argsort(-1)
    taken = take_rows(x, order)
    assert torch.equal(taken[1, 2, 5], x[1, 2, order[1, 2, 5]])
    restored = restore_rows(taken, order)
    assert torch.equal(restored, x)
    weight = torch.randn_like(x)
    (restored * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_inputs_and_output_follow_their_orders():
    q, k, v = torch.randn(2, 4, 65, 8), torch.randn(2, 2, 63, 8), torch.randn(2, 2, 63, 5)
    reordering = sort_by_bucket(
        torch.randint(0, 3, (2, 4, 65)), torch.randint(0, 3, (2, 2, 63)), KeyRange.causal(65, 63).expand(2, 4)
    )
    taken, *keys_and_values = reorder_inputs(q, k, v, reordering)
    assert torch.equal(restore_output(taken, reordering), q)
    for x, x_taken in zip((k, v), keys_and_values, strict=True):
        assert torch.equal(x_taken, take_rows(x, reordering.key_order))


def test_hash_buckets_are_angular():
    directions = random_directions(3, 8, 16)
    assert directions.shape == (3, 8, 8)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(3, 8))
    x = torch.randn(2, 3, 65, 8)
    buckets = hash_buckets(x, directions)
    assert buckets.shape == (2, 3, 65) and buckets.min() >= 0 and buckets.max() < 16
    assert torch.equal(hash_buckets(5 * x, directions), buckets)  # length does not matter
    assert torch.equal(hash_buckets(-x, directions), (buckets + 8) % 16)  # the opposite bucket
    own = hash_buckets(directions.mT[None], directions)  # a direction falls into its own bucket
    assert torch.equal(own, torch.arange(8).expand(1, 3, -1))
    assert hash_buckets(x, directions).unique().numel() > 10


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("score", ["random", "norm"])
def test_keep_mask(score, per_head):
    x = torch.randn(2, 4, 1000, 8)
    kept = keep_mask(x, 0.3, score=score, per_head=per_head)
    assert kept.shape == (2, 4, 1000) and kept.dtype == torch.bool
    assert (kept == kept[:, :1]).all() == (not per_head)
    share = kept.float().mean((0, 2))
    if score == "norm":
        assert (kept.sum(-1) == 700).all()
        norm = x.norm(dim=-1) if per_head else x.norm(dim=-1).mean(1, keepdim=True).expand(-1, 4, -1)
        assert all(norm[b, h][kept[b, h]].min() > norm[b, h][~kept[b, h]].max() for b in range(2) for h in range(4))
    else:
        assert ((share - 0.7).abs() < 0.05).all()
        assert not torch.equal(kept, keep_mask(x, 0.3, score=score, per_head=per_head))
    assert keep_mask(x, 0.0, score=score).all()


def test_keep_mask_error():
    with pytest.raises(ValueError, match="Unknown score 'nrom'"):
        keep_mask(torch.ones(1, 1, 2, 2), 0.5, score="nrom")
    with pytest.raises(ValueError, match=r"x of shape \(batch, heads, length, dim\), got \(2, 2\)"):
        keep_mask(torch.ones(2, 2), 0.5)
    for score in ("random", "norm"):
        for drop in (1.0, -0.1, float("nan"), "half"):
            with pytest.raises(ValueError, match=f"0 <= drop < 1, got {drop}"):
                keep_mask(torch.ones(1, 1, 2, 2), drop, score=score)
