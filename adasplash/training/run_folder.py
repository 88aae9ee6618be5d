"""The run folder: everything that leaves a run lands here, and whoever reads a run reads only this.

config.yaml  metrics.jsonl  log.txt  summary.json  checkpoints/  export/  plots/
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ..attention import without_idle_alpha
from ..files import write_atomically
from ..typed import from_mapping
from .config import TrainConfig

ROOT = Path("runs")

# Keys that may differ between the starts of one run; another value of `steps` moves the schedule, and is announced.
MAY_CHANGE = {"run_dir", "resume", "wandb", "log_every", "device", "compile", "parallel", "checkpoint", "eval", "steps"}
MAY_CHANGE |= {"micro_batch_tokens"}


def write_config(folder: Path, config: TrainConfig) -> None:
    write_atomically(folder / "config.yaml", yaml.safe_dump(config.to_mapping(), sort_keys=False))


def read_config(folder: Path) -> TrainConfig:
    """The configuration a run was started with. Raises ValueError if the folder holds none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"'{folder}' is no run folder: expected a config.yaml in it, as train.py writes.")
    values = yaml.safe_load(path.read_text())
    return from_mapping(TrainConfig, values | {"attention": without_idle_alpha(values.get("attention", {}))})


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any]:
    """What the run ended with; {} where it has not ended."""
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def choose_folder(config: TrainConfig) -> Path:
    """The folder this run writes to; the same experiment finds the same folder again.

    Raises:
        ValueError: if the folder holds a run with other settings, or `resume` names no run or another folder.
    """
    if config.resume not in ("auto", "never"):
        folder = Path(config.resume)
        saved = read_config(folder)
        if config.run_dir and Path(config.run_dir).resolve() != folder.resolve():
            raise ValueError(
                f"resume={folder} goes on in that folder, and not in run_dir={config.run_dir}; leave run_dir out."
            )
    else:
        folder = Path(config.run_dir) if config.run_dir else ROOT / config.run_name()
        if config.resume == "never":
            return _unused(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"Expected run_dir as a folder, got the file '{folder}'.")
        if not (folder / "config.yaml").exists():
            return folder
        saved = read_config(folder)
    ours, theirs = config.to_mapping(), saved.to_mapping()
    differing = [key for key in ours if ours[key] != theirs[key] and key not in MAY_CHANGE]
    if differing:
        key = differing[0]
        raise ValueError(
            f"The run in '{folder}' was started with {key} = {theirs[key]}, now it is {ours[key]}. "
            "Choose another run_dir, or resume=never to start beside it."
        )
    return folder


def _unused(folder: Path) -> Path:
    """The folder itself if nothing is there yet, else the first free name beside it: nothing is overwritten."""
    candidate, number = folder, 1
    while candidate.exists() and any(candidate.iterdir()):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
