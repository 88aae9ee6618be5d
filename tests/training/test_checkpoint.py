"""Checkpoints are exact, and whole or not there."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from torch import nn

from adasplash.training import checkpoint
from adasplash.training.optimizer import OptimConfig, build_optimizers


def model_and_optimizers(kind="adamw"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 7, bias=False))
    model[3].weight = model[0].weight  # tied
    return model, build_optimizers(model, OptimConfig(kind=kind))


def train_step(model, optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()
    x = torch.randint(7, (4, 5))  # drawn from the stored random numbers
    nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_resumed_twice_equals_never_stopped(tmp_path, kind):
    model, optimizers = model_and_optimizers(kind)
    torch.manual_seed(5)
    for _ in range(6):
        train_step(model, optimizers)
    whole = model.state_dict()

    torch.manual_seed(5)
    for piece in range(3):
        model, optimizers = model_and_optimizers(kind)
        if piece:
            newest = checkpoint.newest(tmp_path)
            assert checkpoint.restore_training_state(model, optimizers, newest)["step"] == 2 * piece
            checkpoint.restore_random_state(newest, 0)
        else:
            torch.manual_seed(5)
        for _ in range(2):
            train_step(model, optimizers)
        tensors = checkpoint.training_state(model, optimizers) | checkpoint.random_state(0)
        checkpoint.save(tmp_path, 2 * piece + 2, tensors, {}, keep=1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_round_trip_is_exact_for_every_kind_of_tensor(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.25),
        "half": torch.randn(3, 5).bfloat16(),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "strided": torch.randn(4, 6).T,
        "long": torch.tensor([1 << 40]),
    }
    path = checkpoint.save(tmp_path, 7, tensors, {"note": "x"}, keep=2)
    filled = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    assert checkpoint.load(path, filled)["note"] == "x"
    assert all(torch.equal(filled[name], tensors[name]) for name in tensors)


def test_keeps_the_newest_and_replaces_the_same_step(tmp_path):
    for step in (1, 2, 3, 3):
        checkpoint.save(tmp_path, step, {"x": torch.tensor(float(step))}, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert (tmp_path / "latest").read_text().strip() == "step-00000003"


def test_a_step_replaced_while_killed_is_not_lost(tmp_path):
    """Between the two renames of a replacement the old checkpoint stands under another name, and is found there."""
    checkpoint.save(tmp_path, 3, {"x": torch.tensor(3.0)}, {}, keep=2)
    (tmp_path / "step-00000003").rename(tmp_path / ".replaced-00000003")
    assert checkpoint.newest(tmp_path).name == "step-00000003"


def test_damaged_ones_are_skipped_with_a_warning(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": torch.tensor(1.0)}, {}, keep=3)
    checkpoint.save(tmp_path, 2, {"x": torch.tensor(2.0)}, {}, keep=3)
    (tmp_path / "step-00000002" / "state.json").write_text("{")
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint.newest(tmp_path).name == "step-00000001"


def test_what_does_not_fit_is_told(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"x": torch.zeros(3)}, {}, keep=1)
    with pytest.raises(ValueError, match="lacks .y.; has .x., which is not wanted"):
        checkpoint.load(path, {"y": torch.zeros(3)})
    with pytest.raises(ValueError, match="has 'x' as"):
        checkpoint.load(path, {"x": torch.zeros(4)})


def test_a_pickle_in_the_folder_is_never_run(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"x": torch.ones(3)}, {}, keep=1)
    evil = b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    for name in (".metadata", "__0_0.distcp", "evil.pt"):
        (path / name).write_bytes(evil)
    target = {"x": torch.zeros(3)}
    checkpoint.load(path, target)
    assert target["x"].sum() == 3 and not (tmp_path / "ran").exists()


WRITER = """
import sys, torch
from pathlib import Path
from adasplash.training import checkpoint
folder = Path(sys.argv[1])
newest = checkpoint.newest(folder)
step = checkpoint.read_state(newest)["step"] if newest else 0
print("ready", flush=True)
while True:
    step += 1
    tensors = {f"t{i}": torch.full((n,), float(step)) for i, n in enumerate((1, 1000, 1 << 20))}
    checkpoint.save(folder, step, tensors, {"mark": step}, keep=2)
    print(step, flush=True)
"""


def test_killed_at_random_moments_while_saving(tmp_path):
    """SIGKILL ten times: the newest checkpoint is whole, and at most the one being written is lost."""
    moments = random.Random(0)
    reached = 0
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env={**os.environ}
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.02, 0.4))
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().split()]
        process.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing damaged is to be seen
            newest = checkpoint.newest(tmp_path)
        if newest is None:
            assert not said
            continue
        tensors = {f"t{i}": torch.empty(n) for i, n in enumerate((1, 1000, 1 << 20))}
        state = checkpoint.load(newest, tensors)
        assert all((tensor == state["step"]).all() for tensor in tensors.values())
        assert state["step"] >= max([reached, *said])
        reached = state["step"]
    assert reached > 3
    assert json.loads((newest / "state.json").read_text())["mark"] == reached
