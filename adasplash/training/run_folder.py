"""The run folder: everything that leaves a run lands here, and whoever reads a run reads only this.

config.yaml  metrics.jsonl  log.txt  summary.json  checkpoints/  export/  plots/
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

from ..attention import without_idle_alpha

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from ..files import write_atomically
from ..typed import from_mapping
from .checkpoint import newest
from .config import TrainConfig

ROOT = Path("runs")
LOCK = ".lock"

# Keys that may differ between the starts of one run; another value of `steps` moves the schedule, and is announced.
MAY_CHANGE = {"run_dir", "resume", "wandb", "log_every", "device", "compile", "parallel", "checkpoint", "eval", "steps"}
MAY_CHANGE |= {"micro_batch_tokens", "data.cache_dir"}


def write_config(folder: Path, config: TrainConfig) -> None:
    write_atomically(folder / "config.yaml", yaml.safe_dump(config.to_mapping(), sort_keys=False))


def read_config(folder: Path) -> TrainConfig:
    """The configuration a run was started with. Raises ValueError if the folder holds none, or a damaged one."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"'{folder}' is no run folder: expected a config.yaml in it, as train.py writes.")
    try:
        values = yaml.safe_load(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"expected keys and values, got {values!r}")
        if isinstance(values.get("attention"), dict):
            values["attention"] = without_idle_alpha(values["attention"])
        return from_mapping(TrainConfig, values)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"'{path}' cannot be read as a run's configuration ({reason}); put it right, or use another run_dir."
        ) from None


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def remove_summary(folder: Path) -> None:
    """For a run that goes on: what it ended with before is not what it is now."""
    (folder / "summary.json").unlink(missing_ok=True)


def read_summary(folder: Path) -> dict[str, Any]:
    """What the run ended with; {} where it has not ended. Raises ValueError for a damaged file."""
    path = folder / "summary.json"
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text())
        if not (isinstance(summary, dict) and "status" in summary and isinstance(summary.get("step"), int)):
            raise ValueError("expected a mapping with status and step")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{path}' cannot be read as a run's summary ({error}); delete it, and the run goes on from its newest "
            "checkpoint."
        ) from None
    return summary


def choose_folder(config: TrainConfig) -> Path:
    """The folder this run writes to; the same experiment finds the same folder again.

    Raises:
        ValueError: if the folder holds a run with other settings, or `resume` names no run or another folder.
    """
    if config.resume not in ("auto", "never"):
        folder, saved = resumed(config.resume)
        if config.run_dir and Path(config.run_dir).resolve() != folder.resolve():
            raise ValueError(
                f"resume={folder} goes on in that folder, and not in run_dir={config.run_dir}; leave run_dir out."
            )
    else:
        folder = Path(config.run_dir) if config.run_dir else ROOT / config.run_name()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"Expected run_dir as a folder, got the file '{folder}'.")
        if config.resume == "never":
            return _unused(folder)
        if not (folder / "config.yaml").exists():
            return folder
        saved = read_config(folder)
    ours, theirs = _flat(config.to_mapping()), _flat(saved.to_mapping())
    differing = [
        f"{key} = {theirs.get(key)}, now it is {ours.get(key)}"
        for key in ours | theirs
        if ours.get(key) != theirs.get(key) and not {key, key.split(".")[0]} & MAY_CHANGE
    ]
    if differing:
        raise ValueError(
            f"The run in '{folder}' was started with {'; with '.join(differing)}. "
            "Choose another run_dir, or resume=never to start beside it."
        )
    return folder


def check_it_can_go_on(folder: Path) -> None:
    """Raises ValueError where a run was trained, but left nothing to go on from: training anew would overwrite the rest."""
    checkpoints = folder / "checkpoints"
    trained = read_summary(folder).get("step") or (folder / "export").exists() or any(checkpoints.glob("step-*"))
    if trained and newest(checkpoints) is None:
        raise ValueError(
            f"'{folder}' was trained, but holds no whole checkpoint to go on from; put one back, or use resume=never to "
            "train anew beside it."
        )


def resumed(resume: str) -> tuple[Path, TrainConfig]:
    """The folder of a run that `resume` names, and the configuration there. Raises ValueError where it names none."""
    folder = Path(resume)
    if not folder.is_dir():
        raise ValueError(f"Expected resume=auto, resume=never or the folder of a run; '{resume}' is no run folder.")
    return folder, read_config(folder)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _unused(folder: Path) -> Path:
    """The folder itself if nothing is there yet, else the first free name beside it: nothing is overwritten."""
    candidate, number = folder, 1
    while candidate.exists() and any(candidate.iterdir()):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Makes the folder, and no other process trains in it meanwhile. The kernel lets go when a process is killed.

    Raises:
        ValueError: if another process trains there, or the folder cannot be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(folder)
    except OSError as error:
        raise ValueError(f"Cannot write '{folder}' ({error.strerror}); choose another run_dir.") from None
    try:
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        # Before it is let go: the next one must not find its own removed. Windows does not remove an open file, nor lock it.
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        file.close()
        if made:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()


def _lock(folder: Path) -> TextIO:
    """The folder's lock file, open and locked; without a lock where the system or its filesystem has none."""
    while True:
        file = open(folder / LOCK, "a+")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            with file:
                raise ValueError(
                    f"'{folder}' is being trained by {file.read() or 'another process'}; wait until it ends, stop it, "
                    "or use resume=never to train beside it."
                ) from None
        except OSError:
            return file
        # A run that ended between the two lines above has removed the file that was opened.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                file.truncate(0)
                return file
        file.close()
