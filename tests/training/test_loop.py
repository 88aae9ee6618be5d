"""A run as a whole: it learns, resumes exactly, stops when told, and says what is wrong."""

import dataclasses
import errno
import json
import math
import multiprocessing
import re
import shutil
import socket
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adasplash
from adasplash.attention import BACKENDS
from adasplash.attention.huggingface import attention_backends
from adasplash.training import TrainingDiverged, loop, run_folder, train
from adasplash.training.log import read_metrics
from adasplash.training.run_folder import hold, write_config


def losses(folder):
    return {row["step"]: row["train/loss"] for row in read_metrics(folder) if "train/loss" in row}


class Stop(Exception):
    pass


def kill_after(monkeypatch, step):
    """The process dies in the middle of a step, without a chance to save."""
    original = loop._Run._train_step

    def dying(self, stop):
        if self.step == step:
            raise Stop
        return original(self, stop)

    monkeypatch.setattr(loop._Run, "_train_step", dying)


@pytest.mark.parametrize("attention", sorted(BACKENDS))
def test_every_backend_trains_evaluates_and_exports(tiny, attention):
    summary = train(tiny(attention={"name": attention}, steps=4))
    assert summary["status"] == "finished" and math.isfinite(summary["val/loss"])
    folder = tiny().run_dir
    model = adasplash.from_pretrained(f"{folder}/export")
    assert model.config.adasplash_attention["name"] == attention
    rows = read_metrics(Path(folder))
    assert all("step" in row for row in rows)
    names = {name for row in rows for name in row}
    assert {"train/loss", "train/lr", "train/grad_norm", "val/loss", "val/perplexity", "val/bits_per_byte"} <= names
    assert {"perf/tokens_per_s", "perf/step_ms"} <= names
    assert ("attention/density/layer01" in names) == (attention in ("adasplash", "hash_sparse", "qk_sparse"))


def test_it_learns(tiny):
    summary = train(tiny(steps=150, optim={"learning_rate": 1e-2}, eval={"tokens": 512, "every": 150}))
    assert summary["val/loss"] < summary["unigram_entropy"] - 0.2


@pytest.mark.parametrize(
    "attention", [{"name": "adasplash"}, {"name": "qk_sparse"}, {"name": "hash_sparse", "resample": True}]
)
def test_resumed_twice_equals_never_stopped_bit_for_bit(tiny, tmp_path, monkeypatch, attention):
    """Also with random masks and directions, whose random numbers go on where they were."""
    whole = tiny(attention=attention, run_dir=str(tmp_path / "whole"), steps=7)
    train(whole)
    stopped = dataclasses.replace(whole, run_dir=str(tmp_path / "stopped"))
    for step in (3, 5):
        with monkeypatch.context() as patch:
            kill_after(patch, step)
            with pytest.raises(Stop):
                train(stopped)
    train(stopped)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    steps = [(row["step"], "val/loss" in row) for row in read_metrics(tmp_path / "stopped")]
    assert len(steps) == len(set(steps))  # no row twice


def test_a_signal_saves_and_stops(tiny, tmp_path, monkeypatch):
    original = loop._Run._train_step

    def interrupted(self, stop):
        if self.step == 2:
            stop.received = 15
        return original(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_train_step", interrupted)
        summary = train(tiny(checkpoint={"every": 100}))
    assert (summary["status"], summary["signal"], summary["step"]) == ("stopped", 15, 3)
    assert train(tiny(checkpoint={"every": 100}))["status"] == "finished"
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


def test_finished_runs_are_not_run_again_and_never_starts_beside(tiny, tmp_path, capsys):
    train(tiny())
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train(tiny())["status"] == "finished"
    assert "is finished" in capsys.readouterr().out
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"val/loss": None}))
    assert train(tiny())["status"] == "finished"
    assert "is finished (step 6, val/loss not finite)" in capsys.readouterr().out
    assert train(tiny(resume="never"))["run_dir"] == str(tmp_path / "run-2")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_finished_run_that_goes_on_has_not_ended(tiny, tmp_path, monkeypatch):
    train(tiny(steps=4, eval={"tokens": 64, "every": 3}))
    with monkeypatch.context() as patch:
        kill_after(patch, 7)
        with pytest.raises(Stop):
            train(tiny(steps=9))
    assert not (tmp_path / "run" / "summary.json").exists() and (tmp_path / "run" / "export").exists()
    validated = [row["step"] for row in read_metrics(tmp_path / "run") if "val/loss" in row]
    assert validated == [0, 3, 4, 6]  # the last one of the shorter run, too
    assert train(tiny(steps=9))["step"] == 9


@pytest.mark.parametrize("lost", ["removed", "damaged"])
def test_a_run_without_the_checkpoints_it_had_is_not_trained_anew(tiny, tmp_path, lost):
    train(tiny())
    left = [tmp_path / "run" / name for name in ("metrics.jsonl", "summary.json", "export/model.safetensors")]
    before = [path.read_bytes() for path in left]
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        shutil.rmtree(path) if lost == "removed" else (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="was trained, but holds no whole checkpoint to go on from; put one back, or"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a checkpoint is damaged
            train(tiny(steps=8))
    assert [path.read_bytes() for path in left] == before


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Stop):
            train(tiny())
    assert train(tiny())["status"] == "finished"
    assert "had not come to its first checkpoint" in (tmp_path / "run" / "log.txt").read_text()


def test_fewer_steps_than_were_made_are_refused(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Stop):
            train(tiny())
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError, match="steps of at least 4, where .*step-00000004' stands, got 3; use resume=never"):
        train(tiny(steps=3))
    assert (tmp_path / "run" / "config.yaml").read_text() == before and not (tmp_path / "run" / "export").exists()
    train(tiny(steps=8))
    with pytest.raises(ValueError, match="steps of at least 8, where '.*run' is finished, got 7; use resume=never"):
        train(tiny(steps=7))
    assert "steps: 6 -> 8" in (tmp_path / "run" / "log.txt").read_text()


def test_a_text_or_tokenizer_that_changed_is_refused(tiny, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("to be or not to be " * 100)
    data = dataclasses.asdict(tiny().data) | {"path": str(file)}
    train(tiny(data=data, steps=2))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    file.write_text(file.read_text() + "that is the question")
    with pytest.raises(ValueError, match="The text '.*text.txt' has changed since .* resume=never to train anew"):
        train(tiny(data=data, steps=4))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    (state,) = (tmp_path / "run" / "checkpoints").glob("*/state.json")
    saved = json.loads(state.read_text())
    state.write_text(json.dumps(saved | {"fingerprints": {"tokenizer": "another"}}))
    with pytest.raises(ValueError, match="The tokenizer 'bytes' has changed"):
        train(tiny(data=data, steps=4))
    del saved["fingerprints"]  # as in checkpoints of former versions
    state.write_text(json.dumps(saved))
    assert train(tiny(data=data, steps=4))["step"] == 4


def test_a_folder_in_training_is_refused_until_its_process_ends(tiny, tmp_path):
    """A process that is killed leaves its lock file, and blocks nothing."""
    folder = tmp_path / "run"
    forks = multiprocessing.get_context("fork")  # a new interpreter would take seconds to import torch
    held = forks.Event()

    def hold_it():
        with hold(folder):
            held.set()
            time.sleep(60)

    other = forks.Process(target=hold_it)
    other.start()
    try:
        assert held.wait(10)
        told = f"'{folder}' is being trained by process {other.pid} on {socket.gethostname()}; wait"
        with pytest.raises(ValueError, match=re.escape(told)):
            train(tiny(steps=1))
        assert [path.name for path in folder.iterdir()] == [".lock"]
        assert train(tiny(steps=1, resume="never"))["run_dir"] == f"{folder}-2"
    finally:
        other.kill()
        other.join()
    assert train(tiny(steps=1))["run_dir"] == str(folder) and not (folder / ".lock").exists()


def test_a_filesystem_without_locks_trains(tiny, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert train(tiny(steps=1))["status"] == "finished"


def test_a_system_without_locks_trains(tiny, monkeypatch):
    """As Windows, which does not remove open files either."""

    def refuse(path, *arguments, **how):
        raise PermissionError(errno.EACCES, "in use")

    monkeypatch.setattr(run_folder, "fcntl", None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with run_folder.hold(Path(tiny().run_dir)):
            pass
    assert train(tiny(steps=1))["status"] == "finished"


def test_where_the_first_rank_is_refused_the_folder_no_rank_waits(tiny):
    class Second:
        first = False

        def sum(self, *numbers):
            return [number + 1 for number in numbers]

    with pytest.raises(ValueError, match="The first process was refused the run folder"):
        with loop._held(Path(tiny().run_dir), Second()):
            raise AssertionError("this rank went on")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"type": "gtp2"}}, "no causal language model of type 'gtp2'"),
        ({"model": {"config": {"n_layers": 2}}}, "no key 'n_layers' for type gpt2"),
        ({"init_from": "nowhere"}, "init_from as the folder of a transformers checkpoint, got 'nowhere'"),
    ],
)
def test_what_is_wrong_with_the_model_is_told_before_the_text_is_prepared(tiny, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        train(tiny(**changes))
    assert not (tmp_path / "cache").exists()


def test_starting_from_a_run_names_its_export(tiny, tmp_path):
    train(tiny(steps=1))
    with pytest.raises(ValueError, match="take its model: .*run/export"):
        train(tiny(steps=1, init_from=str(tmp_path / "run"), run_dir=str(tmp_path / "second")))
    summary = train(tiny(steps=1, init_from=str(tmp_path / "run" / "export"), run_dir=str(tmp_path / "second")))
    assert summary["status"] == "finished"


def test_a_start_that_fails_leaves_no_folder(tiny, tmp_path):
    with pytest.raises(ValueError, match="Too little data"):
        train(tiny(seq_len=1 << 14, batch_tokens=1 << 14))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"text", b"seed: 0\nattention: [", b"attention: 3", b"sead: 0", b"\xff"]
)
@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_damaged_files_of_a_run_are_named(tiny, tmp_path, name, content):
    (tmp_path / "run").mkdir()
    if name == "summary.json":
        write_config(tmp_path / "run", tiny().with_device_defaults(False))
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"'.*run/{name}' cannot be read as a run's .*; (put it right|delete it)"):
        train(tiny())


def test_tokens_may_be_kept_elsewhere_on_resume(tiny, tmp_path):
    config = tiny(steps=2)
    train(config)
    elsewhere = dataclasses.replace(config.data, cache_dir=str(tmp_path / "elsewhere"))
    assert train(dataclasses.replace(config, steps=3, data=elsewhere))["step"] == 3


def test_resume_names_the_folder(tiny, tmp_path):
    train(tiny(steps=1))
    folder = str(tmp_path / "run")
    with pytest.raises(ValueError, match="goes on in that folder, and not in run_dir=elsewhere; leave run_dir out"):
        train(tiny(steps=1, resume=folder, run_dir="elsewhere"))
    assert train(tiny(steps=1, resume=folder))["status"] == "finished"


def test_a_run_with_an_alpha_that_never_did_anything_goes_on(tiny, tmp_path):
    train(tiny(attention={"name": "qk_sparse"}, steps=1))
    stored = tmp_path / "run" / "config.yaml"
    stored.write_text(stored.read_text().replace("name: qk_sparse\n", "name: qk_sparse\n  alpha: 1.25\n"))
    assert train(tiny(attention={"name": "qk_sparse"}, steps=2))["step"] == 2


def test_a_folder_of_another_run_is_refused(tiny):
    train(tiny(steps=1))
    with pytest.raises(ValueError, match="started with seed = 0, now it is 1"):
        train(tiny(steps=1, seed=1))
    told = r"with optim.learning_rate = 0.001, now it is 0.01; with optim.eps = 1e-08, now it is 1e-07\. Choose"
    with pytest.raises(ValueError, match=told):
        train(tiny(steps=1, optim={"learning_rate": 1e-2, "eps": 1e-7}))
    with pytest.raises(ValueError, match="with model.config.n_layer = 2, now it is None. Choose"):
        train(tiny(steps=1, model={"name": "tiny", "config": {"n_head": 2, "n_embd": 32}}))


def test_non_finite_steps_are_skipped_and_too_many_stop(tiny, tmp_path, monkeypatch):
    original = loop.LanguageModelLoss.forward
    calls = []

    def sometimes(self, *inputs):
        calls.append(None)
        return original(self, *inputs) * (float("nan") if len(calls) == 2 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(loop.LanguageModelLoss, "forward", sometimes)
        summary = train(tiny())
    assert summary["skipped_steps"] == 1 and math.isfinite(summary["val/loss"])
    assert losses(tmp_path / "run")[2] is None
    json.loads((tmp_path / "run" / "summary.json").read_text())

    monkeypatch.setattr(loop.LanguageModelLoss, "forward", lambda self, *inputs: original(self, *inputs) * float("inf"))
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        train(tiny(run_dir=str(tmp_path / "diverged"), max_nonfinite=3))


def test_a_model_that_is_lost_does_not_replace_checkpoints_nor_look_finished(tiny, tmp_path, monkeypatch, capsys):
    original = loop.LanguageModelLoss.forward

    def lost_after_three_steps(self, *inputs):
        calls.append(None)
        return original(self, *inputs) * (float("nan") if len(calls) > 3 else 1.0)

    monkeypatch.setattr(loop.LanguageModelLoss, "forward", lost_after_three_steps)
    monkeypatch.setattr(
        loop.Validation, "measure", lambda self, model: {"val/loss": math.nan if len(calls) > 3 else 2.0}
    )
    calls = []
    with pytest.raises(TrainingDiverged, match="up to step 7. Train anew beside it, with resume=never and a lower"):
        train(tiny(steps=20, max_nonfinite=4, checkpoint={"every": 1, "keep": 2}))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")) == [
        "step-00000002",
        "step-00000003",
    ]
    calls = []
    summary = train(tiny(run_dir=str(tmp_path / "short")))
    assert (summary["status"], summary["train/loss"], summary["val/loss"]) == ("finished", None, None)
    assert capsys.readouterr().out.count("not finite") >= 2


def test_accumulation_does_not_change_the_loss(tiny, tmp_path):
    """Documents apart, so that the micro-batches count different numbers of targets."""
    data = dataclasses.asdict(tiny().data) | {"cross_document": False}
    for micro in (32, 128):
        train(tiny(data=data, micro_batch_tokens=micro, run_dir=str(tmp_path / f"micro-{micro}")))
    small, large = (losses(tmp_path / f"micro-{micro}") for micro in (32, 128))
    assert small.keys() == large.keys()
    assert all(abs(small[step] - large[step]) < 1e-4 for step in small)


def test_activation_checkpointing_and_schedules_leave_the_loss(tiny, tmp_path):
    for on in (False, True):
        train(tiny(attention={"name": "qk_sparse"}, activation_checkpointing=on, run_dir=str(tmp_path / f"{on}")))
    plain, recomputed = losses(tmp_path / "False"), losses(tmp_path / "True")
    assert all(abs(plain[step] - recomputed[step]) < 1e-5 for step in plain)


def test_alpha_is_scheduled_in_training(tiny, tmp_path, monkeypatch):
    attention = {"name": "adasplash", "alpha_start": 1.1, "alpha_steps": 4}
    validated = []
    original = loop.Validation.measure

    def measure(self, model):
        validated.append(float(attention_backends(model)[0].current_alpha()))
        return original(self, model)

    monkeypatch.setattr(loop.Validation, "measure", measure)
    train(tiny(attention=attention))
    assert validated == pytest.approx([1.1, 1.4, 1.5])  # at steps 0, 3 and 6
    state = load_file(tmp_path / "run" / "export" / "model.safetensors")
    alphas = [value.item() for name, value in state.items() if name.endswith("attention_backend.alpha")]
    assert alphas == pytest.approx([1.5, 1.5])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seq_len": 1 << 20, "batch_tokens": 1 << 20}, "Too little|too little|needs? at least"),
        ({"device": "cuda"}, "no GPU"),
        ({"parallel": {"kind": "ddp"}}, "torchrun"),
        ({"resume": "sometimes"}, "resume=auto, resume=never or the folder of a run; 'sometimes' is no run folder"),
        ({"run_dir": __file__}, "run_dir as a folder, got the file"),
        ({"run_dir": __file__, "resume": "never"}, "run_dir as a folder, got the file"),
        ({"run_dir": "/dev/null/run"}, "Cannot write '/dev/null/run' .* choose another run_dir"),
    ],
)
def test_bad_starts_are_told_in_a_sentence(tiny, changes, told):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=told):
        train(tiny(**changes))
