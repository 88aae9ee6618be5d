"""Checkpoints are exact, and whole or not there."""

import errno
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
from adasplash.training.jobs import expected
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
        "empty": torch.zeros(0, 3),
    }
    tensors |= {"tied": tensors["half"], "part": tensors["half"][:1]}
    path = checkpoint.save(tmp_path, 7, tensors, {"note": "x"}, keep=2)
    filled = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    assert checkpoint.load(path, filled)["note"] == "x"
    assert all(torch.equal(filled[name], tensors[name]) for name in tensors)


def test_keeps_the_newest_and_replaces_the_same_step(tmp_path):
    for step in (1, 2, 3, 3):
        checkpoint.save(tmp_path, step, {"x": torch.tensor(float(step))}, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert (tmp_path / "latest").read_text().strip() == "step-00000003"


def test_a_full_disk_is_told_and_leaves_what_was_saved(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"x": torch.tensor(1.0)}, {}, keep=1)

    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp.HuggingFaceStorageWriter, "write_data", write)
    with pytest.raises(OSError, match="No space left on device") as full:
        checkpoint.save(tmp_path, 2, {"x": torch.tensor(2.0)}, {}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert expected(full.value) == (
        "Error: No space left on device; make room and start again. What was saved before is whole."
    )
    with pytest.raises(OSError):
        expected(OSError(errno.EIO, "Input/output error"))


def test_a_step_replaced_while_killed_is_not_lost(tmp_path):
    """Between the two renames of a replacement the old checkpoint stands under another name, and is found there."""
    checkpoint.save(tmp_path, 3, {"x": torch.tensor(3.0)}, {}, keep=2)
    (tmp_path / "step-00000003").rename(tmp_path / ".replaced-00000003")
    for _ in range(2):  # as often as one looks: readers change nothing
        tensors = {"x": torch.tensor(0.0)}
        checkpoint.load(checkpoint.newest(tmp_path), tensors)
        assert tensors["x"] == 3
    checkpoint.save(tmp_path, 4, {"x": torch.tensor(4.0)}, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]


def test_only_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".writing-00000001").mkdir()
    (tmp_path / ".removing-step-00000001").mkdir()
    (tmp_path / ".latest").write_text("")
    (tmp_path / ".gitignore").write_text("*")
    checkpoint.save(tmp_path, 2, {"x": torch.tensor(2.0)}, {}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".gitignore", "latest", "step-00000002"]


@pytest.mark.parametrize("pointer", [None, "step-00000009"])
def test_the_pointer_is_for_people(tmp_path, pointer):
    assert checkpoint.newest(tmp_path / "nowhere") is None
    checkpoint.save(tmp_path, 1, {"x": torch.tensor(1.0)}, {}, keep=3)
    (tmp_path / "latest").unlink() if pointer is None else (tmp_path / "latest").write_text(pointer)
    assert checkpoint.newest(tmp_path).name == "step-00000001"


def cut(file):
    file.write_bytes(file.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.json", lambda file: file.unlink()),
        ("state.json", cut),
        ("state.json", lambda file: file.write_text("[]")),
        ("state.json", lambda file: file.write_text('{"version": 99, "step": 2}')),
        ("*.safetensors", lambda file: file.unlink()),
        ("*.safetensors", cut),
    ],
)
def test_damaged_ones_are_skipped_with_a_warning(tmp_path, file, damage):
    checkpoint.save(tmp_path, 1, {"x": torch.tensor(1.0)}, {}, keep=3)
    path = checkpoint.save(tmp_path, 2, {"x": torch.tensor(2.0)}, {}, keep=3)
    damage(next(path.glob(file)))
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint.newest(tmp_path).name == "step-00000001"


def test_what_does_not_fit_is_told_and_nothing_is_filled(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"x": torch.ones(3), "z": torch.ones(1)}, {}, keep=1)
    x, z = torch.zeros(3), torch.zeros(1)
    for tensors, told in [
        ({"x": x, "z": z, "y": torch.zeros(3)}, "lacks 'y'"),
        ({"x": x}, "has 'z', which is not wanted"),
        ({"z": z, "x": torch.zeros(4)}, r"has 'x' as \(\(3,\), torch.float32\), expected \(\(4,\)"),
        ({"z": z, "x": torch.zeros(3, dtype=torch.float64)}, "expected .* torch.float64"),
        ({"x": x, "z": z} | {f"y{i}": x for i in range(5)}, "lacks 'y2'; and 2 more"),
    ]:
        with pytest.raises(ValueError, match=told):
            checkpoint.load(path, tensors)
    assert not x.any() and not z.any()


def test_another_model_or_optim_is_refused(tmp_path):
    model, optimizers = model_and_optimizers("adamw")
    train_step(model, optimizers)
    path = checkpoint.save(tmp_path, 1, checkpoint.training_state(model, optimizers), {}, keep=1)
    with pytest.raises(ValueError, match="optimizer0/1.weight/.*, which this model or optim does not"):
        checkpoint.restore_training_state(*model_and_optimizers("muon"), path)

    path = checkpoint.save(tmp_path, 2, checkpoint.training_state(model, []), {}, keep=1)
    with pytest.raises(ValueError, match="has 'model/2.bias', which is not wanted"):
        checkpoint.restore_training_state(nn.Sequential(*model[:2]), [], path)
    model[3].weight = nn.Parameter(model[0].weight.clone())
    with pytest.raises(ValueError, match="lacks 'model/3.weight'"):  # no longer tied
        checkpoint.restore_training_state(model, [], path)


def test_names_are_those_of_parameters_and_tied_ones_come_once():
    model, optimizers = model_and_optimizers("muon")
    train_step(model, optimizers)
    names = checkpoint.training_state(model, optimizers)
    assert {"model/0.weight", "optimizer0/0.weight/exp_avg", "optimizer0/1.bias/step"} <= names.keys()
    assert "optimizer1/1.weight/momentum_buffer" in names
    assert not any("3.weight" in name for name in names)


def test_other_ranks_random_numbers_are_their_own(tmp_path):
    torch.manual_seed(1)
    states = {name.replace("rank0", "rank1"): state for name, state in checkpoint.random_state(0).items()}
    expected = torch.rand(3)
    torch.manual_seed(2)
    path = checkpoint.save(tmp_path, 1, states | checkpoint.random_state(0), {}, keep=1)
    checkpoint.restore_random_state(path, 1)
    assert torch.equal(torch.rand(3), expected)


def test_a_pickle_in_the_folder_is_never_run(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"x": torch.ones(3)}, {}, keep=1)
    evil = b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    for name in (".metadata", "__0_0.distcp", "evil.pt"):
        (path / name).write_bytes(evil)
    target = {"x": torch.zeros(3)}
    checkpoint.load(path, target)
    assert target["x"].sum() == 3 and not (tmp_path / "ran").exists()


# Starts a writer for each line it reads: torch is imported once. Every step is saved and then replaced.
WRITERS = """
import os, sys, torch
from pathlib import Path
from adasplash.training import checkpoint
folder = Path(sys.argv[1])
for _ in sys.stdin:
    if os.fork():
        os.wait()
        print("killed", flush=True)
        continue
    newest = checkpoint.newest(folder)
    step = checkpoint.read_state(newest)["step"] if newest else 0
    print(os.getpid(), flush=True)
    while True:
        step += 1
        tensors = {f"t{i}": torch.full((n,), float(step)) for i, n in enumerate((1, 1000, 1 << 20))}
        for _ in range(2):
            checkpoint.save(folder, step, tensors, {"mark": step}, keep=2)
        print(step, flush=True)
"""


def test_killed_at_random_moments_while_saving(tmp_path):
    """SIGKILL ten times: the newest checkpoint is whole, and at most the one being written is lost."""
    moments = random.Random(0)
    reached = 0
    command = [sys.executable, "-c", WRITERS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(10):
            print(file=process.stdin, flush=True)
            writer = int(process.stdout.readline())
            time.sleep(moments.uniform(0.02, 0.4))
            os.kill(writer, signal.SIGKILL)
            said = [int(line) for line in iter(process.stdout.readline, "killed\n")]
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nothing damaged is to be seen
                newest = checkpoint.newest(tmp_path)
            if newest is None:
                assert not said
                continue
            tensors = {f"t{i}": torch.empty(n) for i, n in enumerate((1, 1000, 1 << 20))}
            state = checkpoint.load(newest, tensors)
            assert state["mark"] == state["step"] >= max([reached, *said])
            assert all((tensor == state["step"]).all() for tensor in tensors.values())
            reached = state["step"]
        process.stdin.close()
    assert reached > 3
