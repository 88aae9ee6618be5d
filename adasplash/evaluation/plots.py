"""Pictures of results. matplotlib is imported where one is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..ops.support_map import SupportMap

# Everywhere the same colour for the same attention; from Okabe and Ito's palette, told apart by all eyes.
COLOURS = {
    "softmax": "#7f7f7f",
    "flash": "#0072b2",
    "adasplash": "#d55e00",
    "hash_sparse": "#009e73",
    "qk_sparse": "#cc79a7",
    # of others, in benchmarks
    "fa4": "#0072b2",  # what flash is on a Hopper
    "fa2": "#56b4e9",
    "cudnn": "#8c564b",
    "flex": "#000000",
    "adasplash2": "#e69f00",
}
FURTHER_COLOURS = ("#17becf", "#9467bd", "#bcbd22", "#1b4f2a", "#e377c2")
DASHES = ("solid", (0, (5, 2)), (0, (1.2, 1.5)), (0, (6, 2, 1.2, 2)))
PICTURES = (".png", ".svg", ".pdf")
FEWEST_TARGETS = 20  # a mean over fewer is noise
DOUBLINGS = (
    9  # of the context, up to the longest window: with less of it every model is bad, which would fill the picture
)


def attention_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each attention, in the order of the known ones, then of the alphabet."""
    names = set(names)
    further = sorted(names - set(COLOURS))
    known = {name: colour for name, colour in COLOURS.items() if name in names}
    return known | {name: FURTHER_COLOURS[i % len(FURTHER_COLOURS)] for i, name in enumerate(further)}


def new_axes(width: float = 7.5, height: float = 4.8):
    """(figure, axes) in the look of this package's pictures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes)
    return figure, axes


def style_axes(axes) -> None:
    """The look of this package's pictures."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(which="both", color="#888888", labelsize=9)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def picture_path(path: str | Path) -> Path:
    """The path of a picture, whose folder is made.

    Raises:
        ValueError: unless it ends as pictures do (matplotlib would write beside it), or if it is a folder.
    """
    path = Path(path)
    if path.is_dir() or path.suffix.lower() not in PICTURES:
        came = "the folder " if path.is_dir() else ""
        raise ValueError(f"Expected the path of a picture that ends in {', '.join(PICTURES)}, got {came}'{path}'.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def plot_support(support: SupportMap, path: str | Path, *, title: str = "") -> Path:
    """The support of a head, as `support_map` counts it, written to `path` (.png, .svg, .pdf); returns the path.

    Cells without a supported pair stay white; single keys are black, tiles the darker the more pairs they hold.

    Raises:
        ValueError: for a path that ends otherwise, or a folder.
    """
    from matplotlib.colors import LogNorm, Normalize

    path = picture_path(path)
    figure, axes = new_axes(6.0, 5.4)
    axes.grid(False)
    size, (top, bottom), (left, right) = support.size, support.queries, support.keys
    shown = support.counts.float().cpu().numpy()
    rows, columns = shown.shape
    # limits of our own: matplotlib's, from the smallest to the largest, draw a window of nothing but support white
    norm = Normalize(0, 1) if size == 1 else LogNorm(0.5, max(2.0, shown.max()))
    image = axes.imshow(
        shown if size == 1 else shown.clip(min=0.5),
        cmap="Greys",
        norm=norm,
        extent=(left, left + columns * size, top + rows * size, top),
        interpolation="nearest",
        aspect="auto",
    )
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="key", ylabel="query")
    axes.set_title(title, loc="left", fontsize=11)
    if size > 1:
        figure.colorbar(image, label=f"supported pairs in {size} x {size}")
    figure.savefig(path)
    return path


def readable_scale(axes, which: str, values: Sequence[float]) -> None:
    """Axis "x" or "y": logarithmic where the values spread by more than a factor of three, ticks at plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = min(values), max(values)
    axis = getattr(axes, f"{which}axis")
    if low > 0 and high / low >= 3:
        axes.set(**{f"{which}scale": "log"})
        decades = math.log10(high / low)
        ticks = ((0.8, (1, 1.5, 2, 3, 4, 5, 7)), (2, (1, 2, 5)), (3.5, (1, 3)), (math.inf, (1,)))
        axis.set_major_locator(LogLocator(subs=next(subs for limit, subs in ticks if decades < limit)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """20000 as 20k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def length_label(seq_len: int) -> str:
    """16384 as 16k: lengths are powers of two more often than not."""
    return f"{seq_len // 1024}k" if seq_len % 1024 == 0 else str(seq_len)


def plot_perplexity_by_position(results: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Perplexity against the tokens in view, one curve per perplexity row; written to `path` (.png, .svg, .pdf).

    A curve that still falls at its right end says that far context helps. Left out are points of fewer than 20 targets,
    and those with less than 1/512 of the longest window in view. None where nothing is left to draw.
    """
    from matplotlib.ticker import FuncFormatter

    rows = [row for row in results if row["evaluation"] == "perplexity" and row["loss"] is not None]
    rows.sort(key=lambda row: (row["attention"], row["seq_len"], -row["stride"]))
    lengths = sorted({row["seq_len"] for row in rows})
    curves = [(row, _curve(row, lengths[-1] / 2**DOUBLINGS)) for row in rows]
    curves = [(row, points) for row, points in curves if points]
    if not curves:
        return None
    colours = attention_colours(row["attention"] for row, _ in curves)
    figure, axes = new_axes()
    for row, points in curves:
        label = f"{row['attention']}, {length_label(row['seq_len'])}"
        if row["stride"] != row["seq_len"]:
            label += f", stride {length_label(row['stride'])}"
        axes.plot(
            *zip(*points, strict=True),
            color=colours[row["attention"]],
            linestyle=DASHES[lengths.index(row["seq_len"]) % len(DASHES)],
            linewidth=1.8,
            marker="o",
            markersize=3,
            label=f"{label}: {_perplexity(row['loss']):.4g}",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_label(round(value))))
    readable_scale(axes, "y", [perplexity for _, points in curves for _, perplexity in points])
    axes.set_xlabel("tokens in view")
    axes.set_ylabel("perplexity")
    axes.set_title("Perplexity by position in the window", loc="left", fontsize=11)
    axes.legend(title="attention, window: overall", title_fontsize=8, fontsize=8, frameon=False, alignment="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _curve(row: dict[str, Any], from_context: float) -> list[tuple[int, float]]:
    """(tokens in view, perplexity) of a row's bins that are worth drawing."""
    return [
        (context, _perplexity(loss))
        for context, loss, count in row["by_position"]
        if count >= FEWEST_TARGETS and context >= from_context and loss is not None
    ]


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
