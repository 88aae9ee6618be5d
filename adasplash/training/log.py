"""What a run says: metrics.jsonl always, a live line on a terminal, wandb where asked for."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from ..files import write_atomically

METRICS = "metrics.jsonl"
WATCHED = {
    "train/loss": "loss",
    "val/loss": "val/loss",
    "val/perplexity": "perplexity",
    "val/bits_per_byte": "bits/byte",
}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, in order; what is none is left out, as a last line that a kill has torn."""
    rows = []
    try:
        lines = (folder / METRICS).read_text().splitlines()
    except OSError:
        return rows
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


class NullLog:
    """For every rank but the first."""

    wandb_id = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def log(self, step: int, row: dict[str, float]) -> None:
        pass

    def print(self, text: str) -> None:
        pass

    def finish(self, summary: dict[str, Any], plots: list[str]) -> None:
        pass


class RunLog:
    """Writes metrics.jsonl and log.txt in the run folder, and shows progress.

    Args:
        wandb: off | offline | online; any trouble with it prints one warning, and the local file goes on.
        resume_step: rows after this step are dropped: they are about to be written again.
        validates_first: so is the validation at this step.
    """

    def __init__(
        self,
        folder: Path,
        *,
        wandb: str,
        config: dict,
        name: str,
        wandb_id: str | None,
        resume_step: int,
        validates_first: bool,
        total_steps: int,
    ):
        self.folder, self.total_steps = folder, total_steps
        kept = [row for row in read_metrics(folder) if _survives(row, resume_step, validates_first)]
        write_atomically(folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        self.metrics = open(folder / METRICS, "a", buffering=1)
        self.text = open(folder / "log.txt", "a", buffering=1)
        self.live = None
        self.wandb, self.wandb_id = None, wandb_id
        if wandb != "off":
            self._guarded(lambda: self._start_wandb(wandb, config, name))
        self.began, self.first_step = time.monotonic(), resume_step

    def __enter__(self):
        if sys.stdout.isatty():
            from rich.live import Live
            from rich.text import Text

            self.live = Live(Text(""), refresh_per_second=4)
            self.live.__enter__()
        return self

    def __exit__(self, *exception):
        self._end_live_line()
        if self.wandb:
            self._guarded(lambda: self.wandb.finish(exit_code=int(exception[0] is not None)))
        self.metrics.close()
        self.text.close()

    def _end_live_line(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def print(self, text: str) -> None:
        """A line for people, also in log.txt."""
        self.text.write(text + "\n")
        self.live.console.print(text, markup=False, highlight=False) if self.live else print(text, flush=True)

    def log(self, step: int, row: dict[str, float]) -> None:
        """A row of metrics; numbers that are not finite are written as null, since JSON has none."""
        row = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self.metrics.write(json.dumps({"step": step, **row}) + "\n")
        if self.wandb:
            self._guarded(lambda: self.wandb.log({"step": step, **row}))
        line = self._line(step, row)
        if self.live and "val/loss" not in row:
            from rich.text import Text

            self.text.write(line + "\n")
            self.live.update(Text(line))
        else:
            self.print(line)

    def _line(self, step: int, row: dict[str, float | None]) -> str:
        """What a row says to people: those of its numbers that they watch."""
        parts = [f"step {step:>6}/{self.total_steps}"]
        parts += [f"{title} {_number(row[name])}" for name, title in WATCHED.items() if name in row]
        if "val/loss" not in row:
            elapsed = time.monotonic() - self.began
            left = elapsed / max(step - self.first_step, 1) * (self.total_steps - step)
            parts += [f"{row.get('perf/tokens_per_s') or 0:,.0f} tokens/s", f"{_duration(left)} left"]
        return "  ".join(parts)

    def finish(self, summary: dict[str, Any], plots: list[str]) -> None:
        """The closing table, the files, and what to do next."""
        self._end_live_line()  # it would be drawn over the table
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{summary['status']} at step {summary['step']}", show_header=False)
        for name, value in summary.items():
            if isinstance(value, int | float) and name not in ("step", "signal"):
                note = "  (nats; a model that knows only how frequent tokens are)" if name == "unigram_entropy" else ""
                table.add_row(name, f"{value:,.4g}" + note if abs(value) < 1e5 else f"{value:,.0f}")
            elif value is None and name in WATCHED:
                table.add_row(name, _number(value))
        Console().print(table)
        files = [METRICS, "config.yaml", "summary.json", "checkpoints/"]
        files += ["export/"] if summary["status"] == "finished" else []
        self.print(f"Written to {self.folder}: {', '.join(files)}")
        for plot in plots:
            self.print(f"  {plot}")
        if summary["status"] == "finished":
            self.print(f"Next: python eval.py run_dir={self.folder}")

    # ---------------------------------------------------------------------------------------------------------- wandb

    def _start_wandb(self, mode: str, config: dict, name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise RuntimeError("the package is missing: pip install 'adasplash-lm[wandb]'") from None
        run = wandb.init(
            project="adasplash", name=name, id=self.wandb_id, resume="allow", mode=mode, config=config, dir=self.folder
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self.wandb, self.wandb_id = run, run.id

    def _guarded(self, call) -> None:
        """Whatever wandb raises, training goes on with the local file."""
        try:
            call()
        except (Exception, SystemExit) as error:
            self.wandb = None
            self.print(f"Warning: wandb is off from here on ({error}); everything is in {self.folder / METRICS}.")


def _survives(row: dict[str, Any], resume_step: int, validates_first: bool) -> bool:
    step = row.get("step", 0)
    return step < resume_step or (step == resume_step and not (validates_first and "val/loss" in row))


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
