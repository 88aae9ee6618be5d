"""Checkpoints that are whole or not there: written beside, synced, renamed.

Tensors go through torch.distributed.checkpoint in its safetensors format, since its default format pickles; the rest is
JSON. Loading therefore never executes what a file says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

VERSION = 1
NAME = re.compile(r"(?:step|\.replaced)-(\d{8,})")
OURS = (".writing-*", ".removing-*", ".replaced-*", ".latest")  # what a killed writer may leave


# --------------------------------------------------------------------------------------------------- what is stored


def training_state(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Flat names to tensors: model/NAME and optimizerI/PARAMETER/KEY; tied parameters once."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[f"model/{name}"] = tensor
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                assert isinstance(value, Tensor), f"optimiser state '{key}' is no tensor"
                tensors[f"optimizer{index}/{names[id(parameter)]}/{key}"] = value
    return tensors


def restore_training_state(model: nn.Module, optimizers: list[Optimizer], path: Path) -> dict:
    """Fills model and optimisers from a checkpoint; returns its JSON state.

    Raises:
        ValueError: if model or optimisers have other names, shapes or dtypes than the checkpoint.
    """
    parameters = dict(model.named_parameters())
    owned = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    for name, (shape, dtype) in stored_tensors(path).items():
        part, _, rest = name.partition("/")
        if part.startswith("optimizer"):
            parameter_name, _, key = rest.rpartition("/")
            index, parameter = int(part.removeprefix("optimizer")), parameters.get(parameter_name)
            if index >= len(optimizers) or id(parameter) not in owned[index]:
                raise ValueError(f"The checkpoint '{path}' has '{name}', which this model or optim does not.")
            # AdamW's step counter is kept on the CPU unless it is fused
            on_cpu = key == "step" and not optimizers[index].param_groups[0].get("fused")
            device = torch.device("cpu") if on_cpu else parameter.device
            optimizers[index].state[parameter][key] = torch.empty(shape, dtype=dtype, device=device)
    return load(path, training_state(model, optimizers), part=("model/", "optimizer"))


def random_state(rank: int) -> dict[str, Tensor]:
    """States of torch's generators of this rank, named by it."""
    states = {f"random/rank{rank}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states[f"random/rank{rank}/cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(path: Path, rank: int) -> None:
    """Generators as they were; a rank that the checkpoint does not know keeps its own."""
    part = f"random/rank{rank}/"
    wanted = {n: torch.empty(s, dtype=d) for n, (s, d) in stored_tensors(path).items() if n.startswith(part)}
    load(path, wanted, part=part)
    for name, state in wanted.items():
        if name.endswith("/cpu"):
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


# -------------------------------------------------------------------------------------------------- folders on disk


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict, *, keep: int) -> Path:
    """Writes step-XXXXXXXX in `folder`, moves the `latest` pointer, keeps the newest `keep`.

    Killed at any moment, it leaves the newest whole checkpoint as it was, or this one. OSError where it cannot be written,
    of which nothing is left then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _put_back_replaced(folder)
    for leftover in (path for pattern in OURS for path in folder.glob(pattern)):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    writing, final = folder / f".writing-{step:08d}", folder / f"step-{step:08d}"
    try:
        _write(writing, tensors, {**state, "version": VERSION, "step": step})
    except OSError:  # such as a full disk
        shutil.rmtree(writing, ignore_errors=True)
        raise
    if final.exists():  # the same step again: out of the way first, it is replaced in two renames
        final.rename(folder / f".replaced-{step:08d}")
    writing.rename(final)
    _sync(folder)
    pointer = folder / ".latest"
    pointer.write_text(final.name + "\n")
    pointer.replace(folder / "latest")
    for old in _whole(folder)[:-keep]:
        old.rename(folder / f".removing-{old.name}")  # never half a checkpoint under its own name
    for removed in [*folder.glob(".removing-*"), *folder.glob(".replaced-*")]:
        shutil.rmtree(removed)
    return final


def _write(folder: Path, tensors: dict[str, Tensor], state: dict) -> None:
    folder.mkdir()
    # copies, since safetensors refuses names that share memory
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        try:
            dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder)), no_dist=True)
        except dcp.CheckpointException as error:
            raise next(cause for cause, _ in error.failures.values()) from None
    (folder / "state.json").write_text(json.dumps(state))
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _put_back_replaced(folder: Path) -> None:
    """A writer killed between the two renames of a replacement leaves the old checkpoint under its other name.

    Only a writer renames it back: readers may be many at once.
    """
    for replaced in folder.glob(".replaced-*"):
        step = folder / replaced.name.replace(".replaced", "step")
        if not step.exists():
            replaced.rename(step)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _whole(folder: Path) -> list[Path]:
    """Checkpoint folders by step. A renamed folder is a whole one; what was damaged later is skipped with a warning."""
    by_step = {}
    for path in [
        *folder.glob(".replaced-*"),
        *folder.glob("step-*"),
    ]:  # a replaced one counts until its new one is there
        if match := NAME.fullmatch(path.name):
            by_step[int(match[1])] = path
    found = []
    for _, path in sorted(by_step.items()):
        try:
            _check_whole(path)
        except ValueError as error:
            warnings.warn(f"Skipping a damaged checkpoint: {error}", stacklevel=3)
            continue
        found.append(path)
    return found


def _check_whole(path: Path) -> None:
    """Raises ValueError unless state and tensor files are of this version and as long as they say."""
    version = read_state(path).get("version")
    if version != VERSION:
        raise ValueError(f"'{path}' is of version {version}, expected {VERSION}.")
    files = list(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"'{path}' has no tensors.")
    for file in files:
        try:
            with safe_open(file, framework="pt"):  # compares the header with the file's length; reads no tensor
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"'{file}' is not readable ({error}).") from None


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none. Changes nothing in the folder."""
    whole = _whole(folder) if folder.is_dir() else []
    return whole[-1] if whole else None


def read_state(path: Path) -> dict:
    """The JSON state. Raises ValueError where there is none."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' has no readable state.json ({error}).") from None
    if not isinstance(state, dict):
        raise ValueError(f"Expected a mapping in '{path / 'state.json'}', got {type(state).__name__}.")
    return state


def stored_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of a checkpoint's tensors, without reading them."""
    metadata = dcp.HuggingFaceStorageReader(str(path)).read_metadata()
    return {name: (tuple(t.size), t.properties.dtype) for name, t in metadata.state_dict_metadata.items()}


def load(path: Path, tensors: dict[str, Tensor], *, part: str | tuple[str, ...] = "") -> dict:
    """Fills the given tensors in place; returns the JSON state.

    Args:
        part: beginning of the stored names that `tensors` must match one to one; the other names are left alone.

    Raises:
        ValueError: for tensors that the checkpoint lacks, has otherwise, or has in excess; none is filled then.
    """
    stored = {name: kind for name, kind in stored_tensors(path).items() if name.startswith(part)}
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    problems = [f"lacks '{name}'" for name in sorted(wanted.keys() - stored.keys())]
    problems += [f"has '{name}', which is not wanted" for name in sorted(stored.keys() - wanted.keys())]
    problems += [
        f"has '{name}' as {stored[name]}, expected {kind}"
        for name, kind in wanted.items()
        if stored.get(name, kind) != kind
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"The checkpoint '{path}' does not fit: it {'; '.join(problems[:3])}{more}. "
            "Load it with the model and optim it was written with."
        )
    remaining = dict(tensors)
    with torch.no_grad():
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as reader:
                for name in set(reader.keys()) & set(remaining):
                    remaining.pop(name).copy_(reader.get_tensor(name))
    assert not remaining
    return read_state(path)
