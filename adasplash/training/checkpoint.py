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
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

VERSION = 1
NAME = re.compile(r"step-(\d{8})")


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
    """Fills model and optimisers from a checkpoint; returns its JSON state."""
    parameters = dict(model.named_parameters())
    for name, (shape, dtype) in stored_tensors(path).items():
        part, _, rest = name.partition("/")
        if part.startswith("optimizer"):
            parameter_name, _, key = rest.rpartition("/")
            index, parameter = int(part.removeprefix("optimizer")), parameters.get(parameter_name)
            if parameter is None or index >= len(optimizers):
                raise ValueError(f"The checkpoint '{path}' has '{name}', which this model or optim does not.")
            # AdamW's step counter is kept on the CPU unless it is fused
            fused = optimizers[index].param_groups[0].get("fused")
            device = parameter.device if shape or fused else torch.device("cpu")
            optimizers[index].state[parameter][key] = torch.empty(shape, dtype=dtype, device=device)
    return load(path, training_state(model, optimizers))


def random_state(rank: int) -> dict[str, Tensor]:
    """States of torch's generators of this rank, named by it."""
    states = {f"random/rank{rank}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states[f"random/rank{rank}/cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(path: Path, rank: int) -> None:
    """Generators as they were; a rank that the checkpoint does not know keeps its own."""
    wanted = {n: torch.empty(s, dtype=d) for n, (s, d) in stored_tensors(path).items() if f"random/rank{rank}/" in n}
    load(path, wanted)
    for name, state in wanted.items():
        if name.endswith("/cpu"):
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


# -------------------------------------------------------------------------------------------------- folders on disk


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict, *, keep: int) -> Path:
    """Writes step-XXXXXXXX in `folder`, moves the `latest` pointer, keeps the newest `keep`.

    Killed at any moment, it leaves the newest whole checkpoint as it was, or this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*"):  # of a writer that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    writing, final = folder / f".writing-{step:08d}", folder / f"step-{step:08d}"
    writing.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(writing)), no_dist=True)
    (writing / "state.json").write_text(json.dumps({"version": VERSION, "step": step, **state}))
    for file in writing.iterdir():
        _sync(file)
    _sync(writing)
    if final.exists():  # the same step again: out of the way first, it is replaced in two renames
        final.rename(folder / f".replaced-{step:08d}")
    writing.rename(final)
    _sync(folder)
    pointer = folder / ".latest"
    pointer.write_text(final.name + "\n")
    pointer.replace(folder / "latest")
    for old in _whole(folder)[:-keep]:
        shutil.rmtree(old)
    for replaced in folder.glob(".replaced-*"):
        shutil.rmtree(replaced)
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _whole(folder: Path) -> list[Path]:
    """Checkpoint folders by step. A renamed folder is a whole one; what was damaged later is skipped with a warning."""
    found = []
    for path in sorted(p for p in folder.glob("step-*") if NAME.fullmatch(p.name)):
        try:
            version = read_state(path).get("version")
        except ValueError as error:
            warnings.warn(f"Skipping a damaged checkpoint: {error}", stacklevel=3)
            continue
        if version != VERSION:
            warnings.warn(f"Skipping '{path}' of version {version}, expected {VERSION}.", stacklevel=3)
            continue
        found.append(path)
    return found


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none."""
    whole = _whole(folder) if folder.is_dir() else []
    return whole[-1] if whole else None


def read_state(path: Path) -> dict:
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"'{path}' has no readable state.json ({error}).") from None


def stored_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of a checkpoint's tensors, without reading them."""
    metadata = dcp.HuggingFaceStorageReader(str(path)).read_metadata()
    return {name: (tuple(t.size), t.properties.dtype) for name, t in metadata.state_dict_metadata.items()}


def load(path: Path, tensors: dict[str, Tensor]) -> dict:
    """Fills the given tensors in place; returns the JSON state.

    Raises:
        ValueError: for tensors that the checkpoint lacks or has otherwise.
    """
    stored = stored_tensors(path)
    missing = sorted(set(tensors) - set(stored))
    if missing:
        raise ValueError(f"The checkpoint '{path}' lacks {len(missing)} tensors, for example '{missing[0]}'.")
    for name, tensor in tensors.items():
        if stored[name] != (tuple(tensor.shape), tensor.dtype):
            raise ValueError(
                f"The checkpoint '{path}' has '{name}' as {stored[name]}, expected {(tuple(tensor.shape), tensor.dtype)}."
            )
    remaining = dict(tensors)
    with torch.no_grad():
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as reader:
                for name in set(reader.keys()) & set(remaining):
                    remaining.pop(name).copy_(reader.get_tensor(name))
    assert not remaining
    return read_state(path)
