"""What tests of kernels share."""

import pytest
import torch

from adasplash.ops.tile_table import ListShape, list_shapes

pytest.register_assert_rewrite("entmax_roads")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def large_programs(device, monkeypatch):
    """In the interpreter the list kernels take many rows at once: its time goes by operations, whatever their size."""
    if device == "cuda":
        return
    operator = pytest.importorskip("adasplash.ops.entmax_attention.operator")
    lists = pytest.importorskip("adasplash.ops.entmax_attention.lists")
    shape = ListShape(rows=32, pairs=8, warps=1, turns=2)
    monkeypatch.setattr(operator, "list_shapes", lambda dim: dict.fromkeys(list_shapes(dim), shape))
    for name, size in {"THRESHOLD_ROWS": 32, "THRESHOLD_PAIRS": 16}.items():
        monkeypatch.setattr(lists, name, type(getattr(lists, name))(size))


@pytest.fixture(params=["lists", "tiles", "both", "sinks"])
def road(request, monkeypatch):
    """Where the pairs of entmax attention go; a test with this goes each of the ways."""
    from entmax_roads import take

    take(request.param, monkeypatch)
