"""Training speed and memory of GPT-2 on this GPU, by attention and length, through the training loop itself.

    python scripts/bench_training.py flash:16384 flash:8192 softmax:8192:4 ... [--text books] [--out rows.jsonl]

A job is ATTENTION:LENGTH[:STEPS], of 40 steps by default. The text is the Python standard library, or the files that --text
names, in GPT-2's encoding (TIKTOKEN_CACHE_DIR). All of a step is one micro-batch, compiled, with the fastest implementation
of the attention that there is. Entmax attention becomes faster as training makes it sparser: a row holds its whole history,
which training_picture.py draws.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml
from facts import facts_line, read_facts

from adasplash.attention import BACKENDS
from adasplash.ops.checks import check_choice
from adasplash.training import TrainConfig, from_mapping, train
from adasplash.training.log import read_metrics

ROOT = Path(__file__).parents[1]
TOKENS = 65536  # a step
LAST = 5  # logged intervals that make the speed at the end


class Job(NamedTuple):
    attention: str
    seq_len: int
    steps: int


def parse_job(text: str) -> Job:
    """Raises argparse's error, with the valid form or the nearest attention."""
    attention, *numbers = text.split(":")
    if len(numbers) not in (1, 2) or not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"Expected ATTENTION:LENGTH[:STEPS], as flash:16384:30, got '{text}'.")
    try:
        check_choice("attention", attention, BACKENDS)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Job(attention, *map(int, [*numbers, "40"][:2]))


def mean_over_layers(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl with attention/WHAT in place of attention/WHAT/layerNN."""
    layers = {}
    for name, value in row.items():
        if "/layer" in name:
            layers.setdefault(name.split("/layer")[0], []).append(value)
    kept = {name: value for name, value in row.items() if "/layer" not in name}
    return kept | {name: statistics.fmean(found) for name, found in layers.items()}


def run(job: Job, folder: str, text: str | None = None) -> dict[str, Any]:
    """One row; `folder` takes the run's files. text: as data.path, None for the standard library."""
    values = {
        "model": yaml.safe_load((ROOT / "configs/model/gpt2.yaml").read_text()),
        "attention": {"name": job.attention},
        "data": {"source": "files", "path": text} if text else {"source": "stdlib"},
        "tokenizer": {"kind": "tiktoken", "name": "gpt2"},
        "seq_len": job.seq_len,
        "steps": job.steps,
        "batch_tokens": TOKENS,
        "micro_batch_tokens": TOKENS,
        "device": "cuda",
        "compile": True,
        "run_dir": f"{folder}/{job.attention}-{job.seq_len}",
        "log_every": 5,
        "eval": {"tokens": job.seq_len, "every": min(job.steps, 100)},
        "checkpoint": {"every": job.steps},
    }
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        summary = train(from_mapping(TrainConfig, values))
    except torch.OutOfMemoryError:
        return job._asdict() | {"error": "out of memory"}
    history = [mean_over_layers(row) for row in read_metrics(Path(summary["run_dir"]))]
    rates = [row["perf/tokens_per_s"] for row in history if "perf/tokens_per_s" in row]
    names = ("perf/tokens_per_s", "perf/mfu", "mem/max_gib", "train/loss", "attention/density")
    measured = {name: summary[name] for name in names} | {"tokens_per_s_at_the_end": statistics.median(rates[-LAST:])}
    return job._asdict() | measured | {"text": text, "batch_tokens": TOKENS, "history": history}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", type=parse_job, metavar="JOB", help="ATTENTION:LENGTH[:STEPS]")
    parser.add_argument("--text", help="files to train on, as data.path takes them (default: the standard library)")
    parser.add_argument("--out", type=Path, help="JSON rows are appended here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU, and torch finds none.")
    facts = read_facts("bench_training.py", arguments) | {"transformers": transformers.__version__}
    rows = []
    for job in options.jobs:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(job, folder, options.text))
        if options.out:
            with open(options.out, "a") as file:
                file.write(json.dumps(rows[-1] | facts) + "\n")
    print(f"{'attention':12s} {'seq_len':>8s} {'tokens/s':>10s} {'at the end':>10s} {'GiB':>6s} {'MFU':>6s}")
    for row in rows:
        if "error" in row:
            print(f"{row['attention']:12s} {row['seq_len']:8d} {row['error']}")
        else:
            print(
                f"{row['attention']:12s} {row['seq_len']:8d} {row['perf/tokens_per_s']:10,.0f} "
                f"{row['tokens_per_s_at_the_end']:10,.0f} {row['mem/max_gib']:6.1f} {row['perf/mfu'] or 0:6.3f}"
            )
    print(facts_line(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
