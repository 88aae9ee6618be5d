"""Pictures of a run, drawn from its rows alone."""

from __future__ import annotations

from pathlib import Path

from .log import read_metrics


def _figure(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return plt, figure, axes


def _save(plt, figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
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
    plt, figure, axes = _figure(7, 4)
    for (name, points), style in zip(curves.items(), ("-", "o-"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _save(plt, figure, folder / "plots" / "losses.png")


def plot_density(folder: Path, density: list[list[float]]) -> Path:
    """plots/density.png: share of active tiles of each layer (rows) and head (columns)."""
    layers, heads = len(density), len(density[0])
    plt, figure, axes = _figure(1.8 + 0.55 * heads, 1.4 + 0.4 * layers)
    image = axes.imshow(density, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    if layers * heads <= 400:
        for layer, row in enumerate(density):
            for head, value in enumerate(row):
                axes.text(
                    head,
                    layer,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value < 0.6 else "black",
                )
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    figure.colorbar(image, label="density (active share of visible tiles)")
    return _save(plt, figure, folder / "plots" / "density.png")
