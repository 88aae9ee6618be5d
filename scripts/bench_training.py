"""Training speed and memory of GPT-2 on this GPU, by attention and length, through the training loop itself.

python scripts/bench_training.py flash:16384 flash:8192 softmax:8192:4 ... [--out rows.jsonl]

A job is ATTENTION:LENGTH[:STEPS]. The text is the Python standard library in GPT-2's encoding (TIKTOKEN_CACHE_DIR).
All of a step is one micro-batch, compiled, with the fastest implementation of the attention that there is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
import transformers
import yaml

from adasplash.training import TrainConfig, from_mapping, train

ROOT = Path(__file__).parents[1]
TOKENS = 65536  # a step


def run(attention: str, length: int, steps: int, folder: str) -> dict:
    values = {
        "model": yaml.safe_load((ROOT / "configs/model/gpt2.yaml").read_text()),
        "attention": {"name": attention},
        "tokenizer": {"kind": "tiktoken", "name": "gpt2"},
        "seq_len": length,
        "steps": steps,
        "batch_tokens": TOKENS,
        "micro_batch_tokens": TOKENS,
        "device": "cuda",
        "compile": True,
        "run_dir": f"{folder}/{attention}-{length}",
        "log_every": 5,
        "eval": {"tokens": length, "every": steps},
        "checkpoint": {"every": steps},
    }
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    summary = train(from_mapping(TrainConfig, values))
    names = ("perf/tokens_per_s", "perf/mfu", "mem/max_gib", "train/loss", "attention/density")
    return {"attention": attention, "seq_len": length, "steps": steps, **{name: summary[name] for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", metavar="ATTENTION:LENGTH[:STEPS]")
    parser.add_argument("--out", type=Path, help="JSON rows are appended here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip() or None,
    }
    rows = []
    for job in arguments.jobs:
        attention, length, steps = (*job.split(":"), "40")[:3]
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = run(attention, int(length), int(steps), folder)
            except torch.OutOfMemoryError:
                row = {"attention": attention, "seq_len": int(length), "error": "out of memory"}
        rows.append(row | facts)
        if arguments.out:
            with open(arguments.out, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(f"{'attention':12s} {'seq_len':>8s} {'tokens/s':>10s} {'GiB':>6s} {'MFU':>6s}   {facts}")
    for row in rows:
        if "error" in row:
            print(f"{row['attention']:12s} {row['seq_len']:8d} {row['error']}")
        else:
            print(
                f"{row['attention']:12s} {row['seq_len']:8d} {row['perf/tokens_per_s']:10,.0f} "
                f"{row['mem/max_gib']:6.1f} {row['perf/mfu'] or 0:6.3f}"
            )


if __name__ == "__main__":
    main()
