"""Draws the rows of bench_attention.py, of one run or of many that have left them in one file.

    python scripts/attention_pictures.py benchmarks/attention/rows.jsonl --out benchmarks/attention

attention.png shows time against the keys that have weight: entmax and dense attention with the device, heads, head dim,
tokens, documents and alpha of the first row of entmax attention, from all runs but those at three or more lengths on a
single input. Names with a value, such as adasplash:2, stay out; what was timed more than once counts where it came first.

lengths.png shows time against length: all of the run at the most lengths, if they are three or more.
"""

from __future__ import annotations

import argparse
import itertools
import math
import operator
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attention_peers import PEERS
from rows import Row, read_rows

from adasplash.evaluation.plots import attention_colours, length_label, new_axes, readable_scale, style_axes
from adasplash.evaluation.tables import TextTable, text_table

BASELINES = ("fa4", "cudnn", "fa2")
COLUMNS = {
    "length": "length",
    "inputs": "inputs",
    "implementation": "implementation",
    "heads": "heads",
    "dim": "head dim",
    "documents": "documents",
    "alpha": "alpha",
    "forward_ms": "fwd ms",
    "backward_ms": "bwd ms",
    "sum_ms": "sum ms",
    **{f"over_{name}": f"{name} / it" for name in BASELINES},
    "extra_mib": "MiB",
    "density": "density",
    "support": "support",
    "problem": "problem",
}
SAME = ("heads", "dim", "alpha", "documents")  # in the caption where they are the same in every row
DENSE = [name for name, peer in PEERS.items() if peer.keys == "all"]
RUN = ("device", "torch", "triton", "commit", "command")  # the facts that tell runs apart
MARKERS = "os^Dvp*X"
SWEEP = 3  # lengths make one

# ----------------------------------------------------------------------------------------------------------- comparing


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Adds how often each row's time goes into those of the baselines, of its own run and shape: above 1 it is faster."""
    setting = (*RUN, "length", "heads", "dim", "documents")
    sums = {(row["implementation"], *map(row.get, setting)): row.get("sum_ms") for row in rows}
    result = []
    for row in rows:
        ratios = {}
        for name in BASELINES:
            baseline = sums.get((name, *map(row.get, setting)))
            if baseline and row.get("sum_ms"):
                ratios[f"over_{name}"] = baseline / row["sum_ms"]
        result.append(row | ratios)
    return result


def table(rows: Sequence[Row]) -> TextTable:
    rows = sorted(rows, key=lambda row: row["length"])
    always = [name for name in COLUMNS if name not in SAME]
    return text_table("Attention, forward and backward", with_ratios(rows), COLUMNS, always)


def break_even(points: Sequence[tuple[float, float]], ms: float) -> float | None:
    """The support at which a line through (support, ms), straight on logarithmic axes, first rises to `ms`; None if nowhere."""
    points = [(math.log(x), math.log(y)) for x, y in sorted(points)]
    level = math.log(ms)
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if y < level <= next_y:
            return math.exp(x + (next_x - x) * (level - y) / (next_y - y))
    return None


# ------------------------------------------------------------------------------------------------------------ choosing


def runs_of(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows that have times, by the run that they are of."""
    runs = {}
    for row in rows:
        if row.get("sum_ms"):
            runs.setdefault(tuple(map(row.get, RUN)), []).append(row)
    return list(runs.values())


def lengths_of(run: Sequence[Row]) -> int:
    return len({row["length"] for row in run})


def rows_by_support(rows: Iterable[Row]) -> list[Row]:
    """Those for attention.png, as the help says."""

    def setting(row: Row) -> tuple:
        return row.get("device"), row["heads"], row["dim"], row["batch"] * row["length"], row["documents"]

    chosen = {}
    for run in runs_of(rows):
        if lengths_of(run) < SWEEP or len({row["inputs"] for row in run} - {"any"}) > 1:
            for row in run:
                if row["implementation"] in PEERS:  # its name alone, that is, without a value
                    key = (row["implementation"], row["inputs"], row["length"], row["alpha"], *setting(row))
                    chosen.setdefault(key, row)
    first = next((row for row in chosen.values() if row.get("support")), None)
    if first is None:
        return []
    alphas = (None, first["alpha"])
    return [row for row in chosen.values() if setting(row) == setting(first) and row["alpha"] in alphas]


def rows_by_length(rows: Iterable[Row]) -> list[Row]:
    """Those for lengths.png, as the help says."""
    longest = max(runs_of(rows), key=lengths_of, default=[])
    return longest if lengths_of(longest) >= SWEEP else []


# ------------------------------------------------------------------------------------------------------------- drawing


def kind_of(name: str) -> str:
    return name.split(":")[0]


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each implementation is drawn: its kind has one colour, markers tell apart what follows the colon."""
    names = list(dict.fromkeys(names))
    colours = attention_colours(map(kind_of, names))
    markers = {kind: itertools.cycle(MARKERS) for kind in colours}
    line = {"markersize": 5.5, "linewidth": 1.4}
    return {name: {"color": colours[kind_of(name)], "marker": next(markers[kind_of(name)]), **line} for name in names}


def draw_against_support(rows: Sequence[Row], path: Path) -> Path | None:
    """A panel for each length: ms against support, and lines across for dense attention, which does not depend on it.

    A ring marks the support at which a line meets the fastest dense attention, where it has points on both sides; between
    points it is a guess. Attention to selected keys is not drawn: support means nothing to it. None without an entmax row.
    """
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.get("sum_ms")]
    sparse = [row for row in timed if row.get("support")]
    dense = [row for row in timed if row["implementation"] in DENSE]
    dense.sort(key=lambda row: -row["sum_ms"] / row["length"])  # in the legend as the lines lie
    if not sparse:
        return None
    lengths = sorted({row["length"] for row in sparse})
    styles = line_styles(row["implementation"] for row in [*sparse, *dense])
    figure = Figure(figsize=(1.5 + 3.6 * len(lengths), 4.6), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(lengths), sharex=True, sharey=True, squeeze=False)[0]
    drawn = {}
    for axes, length in zip(panels, lengths, strict=True):
        style_axes(axes)
        readable_scale(axes, "x", [row["support"] for row in sparse])
        readable_scale(axes, "y", [row["sum_ms"] for row in sparse + dense])
        across = [row for row in dense if row["length"] == length]
        for row in across:
            name, dashed = row["implementation"], {"linewidth": 1.4, "linestyle": (0, (5, 2)), "zorder": 1.5}
            drawn[name] = axes.axhline(row["sum_ms"], color=styles[name]["color"], **dashed)
        lines = {}
        for row in sorted(sparse, key=lambda row: row["support"]):
            if row["length"] == length:
                lines.setdefault(row["implementation"], []).append((row["support"], row["sum_ms"]))
        for name, points in lines.items():
            (drawn[name],) = axes.plot(*zip(*points, strict=True), **styles[name])
        axes.set_title(f"length {length_label(length)}", loc="left", fontsize=10)
        axes.set_xlabel("keys with weight per query" + _ring_break_evens(axes, lines, across, styles))
    panels[0].set_ylabel("forward + backward, ms")
    shown = [name for name in styles if name in drawn]
    handles = [drawn[name] for name in shown]
    figure.legend(handles, shown, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)
    return path


def _ring_break_evens(axes, lines: dict[str, list], dense: Sequence[Row], styles: dict[str, dict]) -> str:
    """Draws the rings of a panel; returns what they say, for below its axis, where no line runs through it."""
    fastest = min(dense, key=lambda row: row["sum_ms"], default=None)
    found = {}
    for name, points in lines.items() if fastest else ():
        if support := break_even(points, fastest["sum_ms"]):
            colour = styles[name]["color"]
            axes.plot(support, fastest["sum_ms"], "o", markersize=11, fillstyle="none", color=colour, zorder=4)
            found[name] = f"{name} at about {support:.0f}"
    if not found:
        return ""
    return "\n" + textwrap.fill(f"break-even with {fastest['implementation']}: {', '.join(found.values())}", 46)


def draw_against_length(rows: Sequence[Row], path: Path) -> Path | None:
    """ms against length, a line for each implementation that was timed at several, of several inputs on the first.

    None without a line.
    """
    lines = {}
    for row in rows:
        if row.get("sum_ms"):
            lines.setdefault(row["implementation"], {}).setdefault(row["length"], row["sum_ms"])
    lines = {name: sorted(points.items()) for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure, axes = new_axes()
    readable_scale(axes, "y", [ms for points in lines.values() for _, ms in points])
    lengths = sorted({length for points in lines.values() for length, _ in points})
    names = sorted(lines, key=lambda name: -lines[name][-1][1])  # in the legend as the lines end
    for name, style in line_styles(names).items():
        axes.plot(*zip(*lines[name], strict=True), **style, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [length_label(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("forward + backward, ms")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, metavar="ROWS", help="rows.jsonl, as bench_attention.py writes it")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: that of ROWS)")
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.rows, "bench_attention.py", operator.itemgetter("implementation"))
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    by_support, by_length = rows_by_support(rows), rows_by_length(rows)
    if not by_support and not by_length:
        nothing = f"no row of entmax attention and no run at {SWEEP} lengths"
        print(f"Error: there is nothing to draw in {options.rows}: {nothing}.", file=sys.stderr)
        return 2
    out = options.out or options.rows.parent
    out.mkdir(parents=True, exist_ok=True)
    pictures = (
        draw_against_support(by_support, out / "attention.png"),
        draw_against_length(by_length, out / "lengths.png"),
    )
    print(*filter(None, pictures), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
