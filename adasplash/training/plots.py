"""Pictures of a run, drawn from its rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .log import read_metrics


def _figure(width: float, height: float):
    """Size in inches. No pyplot: whoever calls may have figures and a backend of their own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path


def plot_losses(folder: Path) -> Path | None:
    """plots/losses.png: training and validation loss over steps; None where there is nothing to draw."""
    rows = read_metrics(folder)
    curves = {
        name: [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        for name in ("train/loss", "val/loss")
    }
    if not any(curves.values()):
        return None
    figure, axes = _figure(7, 4)
    for (name, points), style in zip(curves.items(), ("-", "o-"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _save(figure, folder / "plots" / "losses.png")


def plot_density(folder: Path, density: Sequence[Sequence[float]]) -> Path | None:
    """plots/density.png: share of active tiles, 0 to 1, of each layer (rows) and head (columns).

    Each cell carries its number where there are few. None where there is nothing to draw.
    """
    if len(density) == 0 or len(density[0]) == 0:
        return None
    layers, heads = len(density), len(density[0])
    numbers = layers * heads <= 400
    width, height = (0.55, 0.4) if numbers else (0.22, 0.18)  # of a cell, in inches
    figure, axes = _figure(max(4.5, 1.8 + width * heads), max(3.6, 1.4 + height * layers))
    image = axes.imshow(density, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for layer, row in enumerate(density if numbers else []):
        for head, value in enumerate(row):
            color = "white" if value > 0.55 else "black"
            axes.text(head, layer, f"{value:.2g}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, heads, 1 if numbers else 4))
    axes.set_yticks(range(0, layers, 1 if numbers else 4))
    figure.colorbar(image, label="density\n(active share of visible tiles)")
    return _save(figure, folder / "plots" / "density.png")
