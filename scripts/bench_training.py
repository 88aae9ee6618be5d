"""Training speed and memory of GPT-2 on this GPU, by attention and length, through the training loop itself.

    python scripts/bench_training.py flash:16384 flash:8192 softmax:8192:4 ... [--out rows.jsonl]

A job is ATTENTION:LENGTH[:STEPS], of 40 steps by default. The text is the Python standard library in GPT-2's encoding
(TIKTOKEN_CACHE_DIR). All of a step is one micro-batch, compiled, with the fastest implementation of the attention that
there is.
"""

from __future__ import annotations

import argparse
import json
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

ROOT = Path(__file__).parents[1]
TOKENS = 65536  # a step


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


def run(job: Job, folder: str) -> dict[str, Any]:
    """One row; `folder` takes the run's files."""
    values = {
        "model": yaml.safe_load((ROOT / "configs/model/gpt2.yaml").read_text()),
        "attention": {"name": job.attention},
        "tokenizer": {"kind": "tiktoken", "name": "gpt2"},
        "seq_len": job.seq_len,
        "steps": job.steps,
        "batch_tokens": TOKENS,
        "micro_batch_tokens": TOKENS,
        "device": "cuda",
        "compile": True,
        "run_dir": f"{folder}/{job.attention}-{job.seq_len}",
        "log_every": 5,
        "eval": {"tokens": job.seq_len, "every": job.steps},
        "checkpoint": {"every": job.steps},
    }
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        summary = train(from_mapping(TrainConfig, values))
    except torch.OutOfMemoryError:
        return job._asdict() | {"error": "out of memory"}
    names = ("perf/tokens_per_s", "perf/mfu", "mem/max_gib", "train/loss", "attention/density")
    return job._asdict() | {name: summary[name] for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", type=parse_job, metavar="JOB", help="ATTENTION:LENGTH[:STEPS]")
    parser.add_argument("--out", type=Path, help="JSON rows are appended here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU, and torch finds none.")
    facts = read_facts("bench_training.py", arguments) | {"transformers": transformers.__version__}
    rows = []
    for job in options.jobs:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(job, folder))
        if options.out:
            with open(options.out, "a") as file:
                file.write(json.dumps(rows[-1] | facts) + "\n")
    print(f"{'attention':12s} {'seq_len':>8s} {'tokens/s':>10s} {'GiB':>6s} {'MFU':>6s}")
    for row in rows:
        if "error" in row:
            print(f"{row['attention']:12s} {row['seq_len']:8d} {row['error']}")
        else:
            print(
                f"{row['attention']:12s} {row['seq_len']:8d} {row['perf/tokens_per_s']:10,.0f} "
                f"{row['mem/max_gib']:6.1f} {row['perf/mfu'] or 0:6.3f}"
            )
    print(facts_line(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
