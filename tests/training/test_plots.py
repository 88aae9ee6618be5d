"""Pictures come from rows alone, and touch nobody else's."""

import json
import sys

import numpy as np
import pytest

from adasplash.training.plots import plot_density, plot_losses


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.parametrize(
    "rows", [[], [{"step": 1, "train/lr": 1e-3}], [{"step": 1, "train/loss": None}, {"step": 1, "val/loss": None}]]
)
def test_nothing_to_plot_is_none(tmp_path, rows):
    assert plot_losses(tmp_path) is None  # no metrics at all
    write_rows(tmp_path, rows)
    assert plot_losses(tmp_path) is None
    assert not (tmp_path / "plots").exists()
    assert plot_density(tmp_path, []) is None and plot_density(tmp_path, np.zeros((2, 0))) is None


def test_losses_are_drawn_past_missing_values(tmp_path):
    rows = [{"step": step, "train/loss": None if step == 3 else 5.0 - step} for step in range(5)]
    write_rows(tmp_path, [*rows, {"step": 4, "val/loss": 1.5}])
    path = plot_losses(tmp_path)
    assert path == tmp_path / "plots" / "losses.png"
    both = pixels(path)
    write_rows(tmp_path, rows)
    alone = pixels(plot_losses(tmp_path))
    assert both.shape == alone.shape and (both != alone).any()


def darkness(path):
    """Share of ink of a picture, 0 to 1."""
    return 1 - pixels(path)[..., :3].mean()


@pytest.mark.parametrize("shape", [(2, 2), (12, 12), (48, 25)])
def test_denser_is_darker_and_the_scale_is_absolute(tmp_path, shape):
    sparse, dense = (darkness(plot_density(tmp_path, np.full(shape, value))) for value in (0.1, 0.9))
    assert dense > sparse + 0.1


def test_lists_and_arrays_are_one(tmp_path):
    density = np.linspace(0, 1, 6).reshape(2, 3)
    array = pixels(plot_density(tmp_path, density))
    assert (pixels(plot_density(tmp_path, density.tolist())) == array).all()


def test_a_deep_model_keeps_a_size_one_can_look_at(tmp_path):
    height, width, _ = pixels(plot_density(tmp_path, np.full((48, 32), 0.1))).shape
    assert max(height, width) < 1600


def test_the_callers_figures_and_backend_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    assert plot_density(tmp_path, [[0.5]]).is_file()
