"""Density and support against counting on dense weights."""

import pytest
import torch
from dense_attention import dense_probabilities

import adasplash.ops.range_attention as range_attention_module
from adasplash import KeyRange
from adasplash.ops.support_statistics import TILE, support_statistics


def tiles(mask):
    """Number of TILE x TILE tiles with a True, per head: (H,) of bool (B, H, Tq, Tk), counted one by one."""
    batch, heads = mask.shape[:2]
    counts = torch.zeros(heads)
    for rows in mask.split(TILE, 2):
        for tile in rows.split(TILE, 3):
            counts += tile.flatten(2).any(-1).sum(0)
    return counts


@pytest.mark.parametrize("scores_at_once", [1 << 20, 3000])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, "per head"])
@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 63, 63), (2, 4, 2, 130, 130), (1, 3, 1, 65, 200), (2, 2, 1, 1, 129)], ids=str
)
def test_counts(shape, alpha, scores_at_once, monkeypatch):
    monkeypatch.setattr(range_attention_module, "SCORES_AT_ONCE", {"cpu": scores_at_once})
    batch, heads, groups, query_length, key_length = shape
    q = 4 * torch.randn(batch, heads, query_length, 8, dtype=torch.float64)
    k = torch.randn(batch, groups, key_length, 8, dtype=torch.float64)
    keep = torch.ones(batch, key_length, dtype=torch.bool)
    keep[0, :30] = False
    key_range = KeyRange.causal(query_length, key_length) & KeyRange.padding(keep, query_length)
    key_range = (key_range & KeyRange.window(query_length, 100, key_length)).expand(batch, heads)
    mask = key_range.dense_mask(key_length)
    slopes = torch.linspace(0.0, 0.5, heads)
    alpha = torch.linspace(1.2, 2.0, heads, dtype=torch.float64) if alpha == "per head" else alpha
    found = support_statistics(
        q,
        k,
        key_range,
        alpha=alpha.view(1, -1, 1, 1) if isinstance(alpha, torch.Tensor) else alpha,
        scale=1.0,
        alibi_slopes=slopes,
    )
    weighted = dense_probabilities(q, k, mask, alpha=alpha, scale=1.0, slopes=slopes) > 0
    torch.testing.assert_close(found.support, weighted.sum((0, 2, 3)) / (batch * query_length), check_dtype=False)
    torch.testing.assert_close(found.density, tiles(weighted) / tiles(mask), check_dtype=False)
    visible = mask.sum((0, 2, 3)) / (batch * query_length)
    if isinstance(alpha, float) and alpha == 1.0:
        torch.testing.assert_close(found.support, visible, check_dtype=False)
    else:
        assert (found.support < visible).all()  # the case is not trivial


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("alpha", [1.5, "per head"])
def test_kernels_count_what_the_reference_counts(alpha, device):
    statistics = pytest.importorskip("adasplash.ops.entmax_attention.statistics", reason="needs triton")
    q, k = 3 * torch.randn(1, 4, 70, 16, device=device), torch.randn(1, 2, 70, 16, device=device)
    key_range = (KeyRange.causal(70, device=device) & KeyRange.window(70, 50, device=device)).expand(1, 4)
    alpha = torch.linspace(1.2, 2.0, 4, device=device).view(1, 4, 1, 1) if alpha == "per head" else alpha
    how = {"alpha": alpha, "scale": 0.25}
    expected = support_statistics(q, k, key_range, implementation="reference", **how)
    support, active, tile_mode = statistics.count_support(q, k, key_range, tile=TILE, **how)
    torch.testing.assert_close(support.float().mean((0, 2)), expected.support, atol=1 / 70, rtol=0)
    torch.testing.assert_close(support.amax((0, 2)).float(), expected.largest, atol=1, rtol=0)
    assert torch.equal(
        active.sum((0, 2)),
        tiles(
            dense_probabilities(
                q.cpu(),
                k.cpu(),
                key_range.dense_mask(70).cpu(),
                alpha=alpha.flatten().cpu() if isinstance(alpha, torch.Tensor) else alpha,
                scale=0.25,
            )
            > 0
        ).to(active),
    )
    assert (tile_mode == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, dim", [(torch.float32, 256), (torch.bfloat16, 256), (torch.float32, 128)])
def test_kernels_count_in_wide_heads(dtype, dim):
    q, k = torch.randn(2, 1, 2, 300, dim, device="cuda").to(dtype).unbind()
    key_range = KeyRange.causal(300, device="cuda").expand(1, 2)
    how = {"alpha": 1.5, "scale": 4 * dim**-0.5}
    counted, expected = (support_statistics(q, k, key_range, implementation=i, **how) for i in ("auto", "reference"))
    torch.testing.assert_close(counted.support, expected.support, atol=0.02, rtol=0)


def test_density_notices_empty_tiles():
    q = torch.zeros(1, 1, 4 * TILE, 2)
    k = torch.zeros(1, 1, 4 * TILE, 2)
    q[..., 0], k[:, :, :TILE, 0] = 1.0, 50.0  # everybody looks at the first tile of keys alone
    found = support_statistics(q, k, KeyRange.causal(4 * TILE).expand(1, 1), alpha=1.5, scale=1.0)
    assert found.density.item() == pytest.approx(4 / 10)
    rows = torch.arange(1, 4 * TILE + 1).clamp(max=TILE)
    assert found.support.item() == pytest.approx(rows.float().mean().item())


def test_sequences_that_see_nothing():
    q = torch.randn(1, 2, 5, 4)
    nothing = KeyRange(torch.zeros(1, 2, 5).int(), torch.zeros(1, 2, 5).int())
    found = support_statistics(q, q, nothing, alpha=1.5, scale=1.0)
    assert (found.density == 0).all() and (found.support == 0).all()
