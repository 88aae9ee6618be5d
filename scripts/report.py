"""Compares the runs of a sweep: one table and one picture.

    python scripts/report.py runs/*                     # prints the table; writes report/report.md, .csv and .png
    python scripts/report.py runs/gpt2-* --out figures

report.md is for reading; report.csv has one line per run with all digits, unfinished ones too, for further work.
Runs that are unfinished or broken are listed with the reason. Files among the arguments are passed over, but for the
failed-*.txt that a sweep leaves for a job that never became a run.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from adasplash.evaluation.plots import attention_colours, length_label, new_axes, readable_scale
from adasplash.evaluation.results import read_results, result_tables
from adasplash.evaluation.tables import TextTable, print_tables, text_table

Row = dict[str, Any]

COLUMNS = {
    "model": "model",
    "attention": "attention",
    "options": "options",
    "seq_len": "seq_len",
    "steps": "steps",
    "batch_tokens": "tokens/step",
    "learning_rate": "learning rate",
    "seed": "seed",
    "tokenizer": "tokenizer",
    "device": "device",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "tokens_per_s": "tokens/s",
    "mfu": "MFU",
    "memory_gib": "peak GiB",
    "density": "density",
    "skipped_steps": "skipped steps",
    "run": "run",
}
ALWAYS = ("attention", "seq_len", "perplexity", "bits_per_byte", "tokens_per_s", "mfu", "memory_gib", "density", "run")
DENSE = ("softmax", "flash")


class LeftOut(Exception):
    """Why a run is not in the comparison."""


# ------------------------------------------------------------------------------------------------------------ reading


def read_run(folder: Path) -> Row:
    """One run as a row; `problem` says why it cannot be compared, None where it can."""
    row: Row = {"run": folder.name, "problem": None}
    try:
        row |= _configured(folder)
        row |= _measured(folder, row)
    except LeftOut as reason:
        row["problem"] = str(reason)
    return row


def _configured(folder: Path) -> Row:
    if not folder.exists():
        raise LeftOut("there is no such folder")
    if not folder.is_dir():
        raise LeftOut(f"failed before it began: {_last_line(folder)}")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        attention = dict(config["attention"])
        learning_rate = (config.get("optim") or {}).get("learning_rate")
        return {
            "attention": attention.pop("name"),
            "options": attention or None,
            "model": config["model"]["name"],
            "seq_len": int(config["seq_len"]),
            "steps": int(config["steps"]),
            "batch_tokens": config.get("batch_tokens"),
            "learning_rate": None if learning_rate is None else f"{learning_rate:g}",
            "seed": config.get("seed"),
        }
    except FileNotFoundError:
        raise LeftOut("it has no config.yaml, so it is no run") from None
    except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise LeftOut(f"its config.yaml cannot be read ({type(error).__name__}: {_one_line(error)})") from None


def _measured(folder: Path, configured: Row) -> Row:
    try:
        summary = json.loads((folder / "summary.json").read_text())
        status = summary["status"]
    except FileNotFoundError:
        raise LeftOut(f"has not ended: {_progress(folder, configured['steps'])}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LeftOut(f"its summary.json cannot be read ({type(error).__name__}: {_one_line(error)})") from None
    if status != "finished":
        raise LeftOut(f"{status}: {_progress(folder, configured['steps'], summary.get('step'))}")
    perplexity = summary.get("val/perplexity")
    if not isinstance(perplexity, int | float) or not math.isfinite(perplexity):
        raise LeftOut(f"finished, but its val/perplexity is {perplexity}")
    tokenizer = summary.get("tokenizer") or {}
    density = summary.get("attention/density")
    return {
        "loss": summary.get("val/loss"),
        "perplexity": perplexity,
        "bits_per_byte": summary.get("val/bits_per_byte"),
        "tokens_per_s": summary.get("perf/tokens_per_s"),
        "mfu": summary.get("perf/mfu"),
        "memory_gib": summary.get("mem/max_gib"),
        "density": 1.0 if density is None and configured["attention"] in DENSE else density,
        "skipped_steps": summary.get("skipped_steps") or None,
        "device": summary.get("device"),
        "tokenizer": tokenizer.get("name") or tokenizer.get("kind"),
    }


def _progress(folder: Path, steps: int, saved_at: int | None = None) -> str:
    """saved_at: where the run stopped, which may be after the last step that it logged."""
    rows = _metrics(folder)
    reached = [step for step in (saved_at, *(row["step"] for row in rows)) if isinstance(step, int)]
    if not reached:
        return f"no step of {steps} logged"
    perplexities = [row["val/perplexity"] for row in rows if row.get("val/perplexity") is not None]
    so_far = f", val/perplexity {perplexities[-1]:.4g} so far" if perplexities else ""
    return f"step {max(reached)} of {steps}{so_far}"


def _metrics(folder: Path) -> list[Row]:
    """The whole lines of metrics.jsonl; the last one is torn where a run was killed, or is writing just now."""
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def read_evaluations(folder: Path) -> tuple[list[Row], str | None]:
    """The rows that eval.py left in a run, each with the run's name; and what is wrong with the file, if anything."""
    try:
        return [row | {"run": folder.name} for row in read_results(folder / "results.json")], None
    except (OSError, ValueError) as error:
        return [], _one_line(error)


def _last_line(file: Path) -> str:
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------------------------------------ writing


def notes(runs: Sequence[Row]) -> list[str]:
    """What a reader must know before comparing these runs."""
    found = []
    consequences = {"tokenizer": "perplexities do not compare; bits/byte do", "device": "tokens/s do not compare"}
    for key, what in consequences.items():
        names = sorted({str(run[key]) for run in runs})
        if len(names) > 1:
            found.append(f"These runs have {len(names)} {key}s ({', '.join(names)}): {what}.")
    return found


def write_markdown(path: Path, tables: Sequence[TextTable], remarks: Sequence[str], picture: Path | None) -> None:
    parts = ["# Report", *remarks, *(table.markdown() for table in tables)]
    if picture is not None:
        parts.insert(1, f"![Perplexity against tokens per second]({picture.name})")
    path.write_text("\n\n".join(part.rstrip() for part in parts) + "\n")


def write_csv(path: Path, runs: Sequence[Row]) -> None:
    names = [*COLUMNS, "loss", "problem"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for run in runs:
            writer.writerow(run | {"options": json.dumps(run["options"]) if run.get("options") else None})


def plot_runs(runs: Sequence[Row], path: Path) -> None:
    """Perplexity against tokens/s: a colour for each attention, area by density, labelled by seq_len."""
    colours = attention_colours(run["attention"] for run in runs)
    figure, axes = new_axes(8, 5)
    readable_scale(axes, "x", [run["tokens_per_s"] for run in runs])
    readable_scale(axes, "y", [run["perplexity"] for run in runs])
    for attention, colour in colours.items():
        own = sorted((run for run in runs if run["attention"] == attention), key=lambda run: run["seq_len"])
        if len({run["seq_len"] for run in own}) == len(own):  # a line guides the eye from length to length
            x, y = [run["tokens_per_s"] for run in own], [run["perplexity"] for run in own]
            axes.plot(x, y, color=colour, alpha=0.45, linewidth=1.2, zorder=2)
    for run in sorted(runs, key=lambda run: -marker_area(run["density"])):  # the small ones stay on top
        draw_marker(axes, run["tokens_per_s"], run["perplexity"], run["density"], colours[run["attention"]])
    axes.margins(0.12)
    axes.set_xlabel("training throughput, tokens/s")
    axes.set_ylabel("validation perplexity")
    axes.set_title("Lower and further right is better; labels are sequence lengths", loc="left", fontsize=10)
    _legends(figure, axes, colours, runs)
    figure.draw_without_rendering()  # settles the layout, so that places on the page are known
    _label_lengths(figure, axes, runs)
    figure.savefig(path)


def marker_area(density: float | None) -> float:
    """In square points; the root keeps one percent visible beside one hundred."""
    return 24 + 226 * (1.0 if density is None else density) ** 0.5


def draw_marker(axes, x, y, density: float | None, colour: str, label: str | None = None):
    """A disc, or a ring where the density was not recorded."""
    face, edge = (colour, "white") if density is not None else ("white", colour)
    return axes.scatter(x, y, marker_area(density), face, edgecolors=edge, linewidths=1.2, zorder=3, label=label)


def _legends(figure, axes, colours: dict[str, str], runs: Sequence[Row]) -> None:
    entries = [draw_marker(axes, [], [], 0.06, colour, name) for name, colour in colours.items()]
    entries += [axes.scatter([], [], 0, label=text) for text in (" ", "share of keys used")]
    shares = [0.01, 0.1, 1.0] + [None] * any(run["density"] is None for run in runs)
    for share in shares:
        label = "not recorded" if share is None else f"{share:.0%}"
        entries.append(draw_marker(axes, [], [], share, "#9a9a9a", label))
    figure.legend(handles=entries, loc="outside right upper", labelspacing=0.9, frameon=False, fontsize=9)


def _label_lengths(figure, axes, runs: Sequence[Row]) -> None:
    """Puts each label on the side of its point where it covers least of what is drawn already."""
    points = axes.transData.transform([(run["tokens_per_s"], run["perplexity"]) for run in runs])
    unit = figure.dpi / 72  # pixels a typographic point
    radii = [marker_area(run["density"]) ** 0.5 / 2 * unit for run in runs]
    taken = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(points, radii, strict=True)]
    for run, (x, y), radius in zip(runs, points, radii, strict=True):
        text = length_label(run["seq_len"])
        width, height, gap = 5.2 * len(text) * unit, 9 * unit, radius + 3 * unit
        places = {
            ("left", "center"): (gap, 0),
            ("center", "bottom"): (0, gap),
            ("center", "top"): (0, -gap),
            ("right", "center"): (-gap, 0),
        }

        def box(alignment, x=x, y=y, width=width, height=height, places=places):
            left = x + places[alignment][0] - {"left": 0, "center": width / 2, "right": width}[alignment[0]]
            low = y + places[alignment][1] - {"bottom": 0, "center": height / 2, "top": height}[alignment[1]]
            return left, low, left + width, low + height

        best = min(places, key=lambda alignment: sum(_overlap(box(alignment), other) for other in taken))
        taken.append(box(best))
        offset = tuple(part / unit for part in places[best])
        axes.annotate(
            text,
            (run["tokens_per_s"], run["perplexity"]),
            offset,
            textcoords="offset points",
            ha=best[0],
            va=best[1],
            fontsize=8,
            color="#333333",
            zorder=4,
        )


def _overlap(a: tuple, b: tuple) -> float:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, as train.py writes them")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for the report (default: report)")
    options = parser.parse_args(arguments)
    paths = [path for path in options.runs if not path.is_file() or path.match("failed-*.txt")]
    if not any(path.exists() for path in paths):
        given = " ".join(str(path) for path in options.runs) or "no argument"
        print(f"Error: no run folder given (got {given}); as in: python scripts/report.py runs/*", file=sys.stderr)
        return 2

    runs = [read_run(path) for path in paths]
    finished = [run for run in runs if run["problem"] is None]
    finished.sort(key=lambda run: (run["seq_len"], run["perplexity"]))
    left_out = [run for run in runs if run["problem"] is not None]
    repeated = [name for name, count in Counter(run["run"] for run in runs).items() if count > 1]
    evaluations, remarks = [], notes(finished)
    if repeated:
        remarks.append(f"Several runs are called {', '.join(repeated)}.")
    for path in paths:
        rows, problem = read_evaluations(path)
        evaluations += rows
        remarks += [problem] if problem else []

    tables = [text_table("Runs", finished, COLUMNS, ALWAYS)] if finished else []
    tables += result_tables(evaluations)
    if left_out:
        tables.append(text_table("Left out", left_out, {"run": "run", "problem": "why"}, ("run", "problem")))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"Error: cannot write to '{options.out}' ({error.strerror}); --out takes another folder.", file=sys.stderr
        )
        return 2
    drawn = [run for run in finished if run["tokens_per_s"]]
    picture = options.out / "report.png" if drawn else None
    if picture is not None:
        plot_runs(drawn, picture)
    write_markdown(options.out / "report.md", tables, remarks, picture)
    write_csv(options.out / "report.csv", finished + left_out)

    print_tables(tables)
    print(*remarks, f"{len(finished)} of {len(runs)} runs compared -> {options.out}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
