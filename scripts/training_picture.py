"""Draws how fast the jobs of bench_training.py trained, step by step.

    python scripts/training_picture.py benchmarks/training/rows.jsonl --out benchmarks/training/speed.png

Where the model was evaluated stands how many keys a query of entmax attention gave weight to. Dashes: how a shorter job of
another attention, which is as fast at every step, would have gone on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rows import Row, read_rows

from adasplash.evaluation.plots import attention_colours, length_label, new_axes, picture_path


def speeds(row: Row) -> list[tuple[float, float]]:
    """(millions of tokens seen, tokens/s) of each logged interval but the first, in which kernels are compiled."""
    rated = [entry for entry in row["history"] if "perf/tokens_per_s" in entry][1:]
    return [(entry["step"] * row["batch_tokens"] / 1e6, entry["perf/tokens_per_s"]) for entry in rated]


def supports(row: Row) -> list[tuple[float, float]]:
    """(millions of tokens seen, mean number of keys with weight) of each evaluation of entmax attention."""
    counted = [entry for entry in row["history"] if "attention/support" in entry and row["attention"] == "adasplash"]
    return [(entry["step"] * row["batch_tokens"] / 1e6, entry["attention/support"]) for entry in counted]


def draw(rows: Sequence[Row], path: Path) -> Path:
    path = picture_path(path)
    figure, axes = new_axes()
    colours = attention_colours(row["attention"] for row in rows)
    several = len({row["seq_len"] for row in rows}) > 1
    longest = max(tokens for row in rows for tokens, _ in speeds(row))
    for row in rows:
        points = speeds(row)
        label = f"{row['attention']}, {length_label(row['seq_len'])}" if several else row["attention"]
        colour = colours[row["attention"]]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=label)
        if row["attention"] != "adasplash":  # as fast at every step, so that a few steps stand for a whole run
            ends = (points[-1][0], longest), (row["tokens_per_s_at_the_end"],) * 2
            axes.plot(*ends, color=colour, linewidth=0.8, linestyle=(0, (5, 2)))
        for tokens, support in supports(row):
            above = max(speed for place, speed in points if abs(place - tokens) <= longest / 40)
            axes.annotate(
                f"{support:.0f}", (tokens, above), (0, 4), textcoords="offset points", ha="center", color=colour
            )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("million tokens seen; numbers: keys with weight per query, mean over layers")
    axes.set_ylabel("training speed, tokens/s")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)
    return path


def rows_with_speeds(path: Path) -> list[Row]:
    """Raises ValueError where a line is no row, or there is none to draw."""
    rows = read_rows(path, "bench_training.py", lambda row: "error" in row or speeds(row))
    rows = [row for row in rows if "error" not in row and speeds(row)]
    if not rows:
        raise ValueError(f"There is nothing to draw in {path}: no job got beyond its first logged steps.")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, metavar="ROWS", help="rows.jsonl, as bench_training.py writes it")
    parser.add_argument("--out", type=Path, required=True, help="the picture: .png, .svg or .pdf")
    options = parser.parse_args(arguments)
    try:
        print(draw(rows_with_speeds(options.rows), options.out))
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
