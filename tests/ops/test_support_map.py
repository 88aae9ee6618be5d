"""The map of a head's support against dense weights."""

import inspect

import pytest
import torch
from dense_attention import dense_probabilities

import adasplash.ops.range_attention as range_attention_module
from adasplash import KeyRange, entmax_attention, support_map


def in_cells(weighted, size):
    """Pairs of bool (Tq, Tk) in cells of size x size, one by one."""
    return torch.stack([torch.stack([cell.sum() for cell in rows.split(size, 1)]) for rows in weighted.split(size, 0)])


@pytest.mark.parametrize("scores_at_once", [1 << 20, 700])
@pytest.mark.parametrize("cells, size", [(100, 1), (20, 4), (7, 12), (1, 80)])
def test_cells(cells, size, scores_at_once, monkeypatch):
    monkeypatch.setattr(range_attention_module, "SCORES_AT_ONCE", {"cpu": scores_at_once})
    q, k = 4 * torch.randn(90, 8), torch.randn(95, 8)
    mask = torch.ones(90, 95, dtype=torch.bool).tril(5)  # the last query stands beside the last key
    for how, meant in (
        ({}, {"alpha": 1.5}),
        ({"alpha": 2.0, "scale": 0.5}, {"alpha": 2.0, "scale": 0.5}),
        (
            {"alpha": torch.tensor([1.3]), "alibi_slopes": torch.tensor([0.2])},
            {"alpha": 1.3, "slopes": torch.tensor([0.2])},
        ),
    ):
        window = KeyRange.window(90, 30, 95)
        found = support_map(q, k, key_range=window, queries=(10, 90), keys=(5, 85), cells=cells, **how)
        seen = mask & window.dense_mask(95)
        weighted = dense_probabilities(q[None, None], k[None, None], seen, **meant)[0, 0] > 0
        assert weighted.sum() < seen.sum()  # the case is not trivial
        assert torch.equal(found.counts, in_cells(weighted[10:90, 5:85], size))
        assert found[1:] == (size, (10, 90), (5, 85))


def test_defaults_are_those_of_entmax_attention():
    theirs = inspect.signature(entmax_attention).parameters
    shared = {name: ours for name, ours in inspect.signature(support_map).parameters.items() if name in theirs}
    assert {"alpha", "key_range", "causal", "scale", "alibi_slopes"} <= set(shared)
    assert all(ours.default == theirs[name].default for name, ours in shared.items())


def test_everything_is_shown_unless_windows_are_given():
    q = torch.randn(5, 4)
    found = support_map(q, q, alpha=1.0, causal=False)
    assert torch.equal(found.counts, torch.ones(5, 5).long()) and found[1:] == (1, (0, 5), (0, 5))


def test_errors():
    q = torch.randn(9, 4)
    cases = [
        ({"q": q[None, None]}, r"q of one head, \(length, dim\), got \(1, 1, 9, 4\); give q\[b, h\]"),
        ({"k": [1.0]}, "k as a tensor, got list"),
        ({"k": q[:, :3]}, "dim 4 as q has"),
        ({"key_range": KeyRange.causal(8)}, r"key_range of shape \(1 or 1, 1 or 1, 9\), got \(1, 1, 8\)"),
        ({"key_range": KeyRange.causal(9).expand(1, 2)}, r"got \(1, 2, 9\)"),
        ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes of shape \(1,\)"),
        ({"alpha": 3.0}, "1 <= alpha <= 2"),
        ({"queries": (3, 10)}, r"queries as a window \(begin, end\) inside 0..9, got \(3, 10\)"),
        ({"queries": (3, 3)}, "queries as a window"),
        ({"keys": 5}, "keys as a window .* got 5"),
        ({"cells": 0}, "cells as a whole number of at least 1, got 0"),
        ({"cells": 2.5}, "cells as a whole number of at least 1, got 2.5"),
    ]
    for how, message in cases:
        with pytest.raises(ValueError, match=message):
            support_map(**{"q": q, "k": q} | how)
