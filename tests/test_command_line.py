"""The commands of the README as a user starts them: processes of their own, on a model of seconds."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")

ROOT = Path(__file__).parent.parent
TRAIN = (sys.executable, "-u", str(ROOT / "train.py"))
EVALUATE = (sys.executable, str(ROOT / "eval.py"))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py"))
TINY = ("model.config={n_layer: 2, n_head: 2, n_embd: 32}", "device=cpu", "seq_len=32", "batch_tokens=128")
# keys that no file lists are set as the others are
TINY += ("steps=120", "log_every=1", "eval.tokens=64", "eval.every=40", "data=files", "data.validation_fraction=0.2")
TINY += ("data.cross_document=false", "optim.betas=[0.9,0.98]")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with a text and a cache."""
    folder = tmp_path_factory.mktemp("workplace")
    words = random.Random(0)
    vocabulary = ["".join(words.choices("abcdefgh", k=words.randint(1, 6))) for _ in range(6)]
    (folder / "texts").mkdir()
    for number in range(20):
        (folder / "texts" / f"{number:02d}.txt").write_text(" ".join(words.choices(vocabulary, k=120)))
    return folder


@pytest.fixture(scope="session")
def start(workplace):
    """Starts a command in the workplace."""
    settings = {"ADASPLASH_CACHE": str(workplace / "cache"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start_process(*command):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": workplace}
        return subprocess.Popen(command, env={**os.environ, **settings}, **options)

    return start_process


@pytest.fixture(scope="session")
def run(start):
    """Runs a command to its end: (exit code, what it said)."""

    def run_process(*command):
        with start(*command) as process:
            said = process.communicate(timeout=120)[0]
        return process.returncode, said

    return run_process


@pytest.fixture(scope="session")
def whole(workplace, run):
    """A run that nothing stopped."""
    code, said = run(*TRAIN, *TINY, "data.path=texts", "run_dir=whole")
    assert code == 0, said
    return workplace / "whole"


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def test_a_run_and_its_evaluation(whole, run):
    assert {"config.yaml", "metrics.jsonl", "log.txt", "summary.json", "checkpoints", "export", "plots"} <= {
        path.name for path in whole.iterdir()
    }
    code, said = run(*EVALUATE, "run_dir=whole", "seq_lens=[16,32]", "stride=8", "repeats=1")
    assert code == 0, said
    rows = json.loads((whole / "results.json").read_text())
    assert [(row["evaluation"], row["seq_len"]) for row in rows[:2]] == [("perplexity", 16), ("perplexity", 32)]
    assert len(rows) == 6 and not rows[0]["cross_document"]  # as the run was trained
    code, said = run(*EVALUATE, "run_dir=whole", "evals=[perplexity,sparsity]", "data.cross_document=true")
    assert code == 0, said
    rows = json.loads((whole / "results.json").read_text())
    assert [row["evaluation"] for row in rows[-2:]] == ["perplexity", "sparsity"] and "keys per query" in said
    assert rows[-1]["cross_document"] and rows[-1]["data"] == "texts"  # all else is the run's own


def test_an_untrained_model_is_timed(workplace, run):
    throughput = ("attention=qk_sparse", "attention.drop=0.5", "seq_lens=[32]", "evals=[throughput]", "repeats=1")
    code, said = run(*EVALUATE, *TINY[:2], "model=small", *throughput)
    assert code == 0, said
    (folder,) = (workplace / "runs").glob("untrained-*")
    rows = json.loads((folder / "results.json").read_text())
    assert [row["backward"] for row in rows] == [False, True] and rows[0]["attention_options"]["drop"] == 0.5


def test_a_typo_is_one_sentence_with_the_nearest_key(run):
    code, said = run(*TRAIN, "optim.learnin_rate=1")
    assert code == 1
    assert said == "Error: Unknown configuration key 'optim.learnin_rate'. Did you mean 'optim.learning_rate'?\n"


def test_a_sweep_goes_on_after_a_failure_and_skips_what_is_finished(workplace, run):
    sweep = (*TRAIN, "-m", *TINY[:-1], "data.path=texts", "attention=softmax,hash_sparse", "attention.n_buckets=4")
    sweep += ("steps=2", "optim.betas=[0.9,0.98],[0.8,0.9]")
    for again in (False, True):
        code, said = run(*sweep)
        assert code == 1
        finished = [line for line in said.splitlines() if line.startswith("  finished")]
        failed = [line for line in said.splitlines() if line.startswith("  failed")]
        assert len(finished) == len(failed) == 2, said
        assert "attention.n_buckets=4" in failed[0] and "attention=softmax" in failed[0]
        log = (workplace / failed[0].split("->")[1].strip()).read_text()
        assert "Unknown option 'n_buckets' for attention=softmax" in log and "Traceback" in log
        assert said.count("is finished (step 2") == (2 if again else 0)


def test_a_sweep_of_evaluations_goes_on_after_a_failure(whole, workplace, run):
    code, said = run(*EVALUATE, "-m", "run_dir=nowhere,whole", "evals=[throughput]", "repeats=1", "seq_lens=[16]")
    assert code == 1
    *_, failed, evaluated = said.splitlines()
    assert failed.startswith("  failed    run_dir=nowhere") and evaluated.startswith("  evaluated run_dir=whole"), said
    assert evaluated.endswith("->  whole")
    log = workplace / failed.split("->")[1].strip()
    assert "'nowhere' is no run folder" in log.read_text() and not log.match("failed-*")  # which report.py would list
    code, said = run(*EVALUATE, "run_dir=nowhere")  # alone: one sentence, no table
    assert code == 1 and said.startswith("Error: 'nowhere' is no run folder") and said.count("\n") == 1


def test_two_processes_learn_as_one(whole, workplace, run):
    code, said = run(*TORCHRUN, *TINY, "data.path=texts", "run_dir=two", "parallel=ddp")
    assert code == 0, said
    alone, together = losses(whole), losses(workplace / "two")
    assert alone.keys() == together.keys()
    assert all(abs(alone[step] - together[step]) < 1e-3 for step in alone)


def stop(process, at_step, number):
    """Sends a signal once the log has come to a step; returns what was said after it."""
    for line in process.stdout:
        if line.split()[:1] == ["step"] and int(line.split()[1].split("/")[0]) >= at_step:
            process.send_signal(number)
            break
    return process.communicate(timeout=60)[0]


def test_a_run_stopped_then_killed_goes_on_as_if_nothing_had_been(whole, workplace, start, run):
    folder = workplace / "stopped"
    with start(*TRAIN, *TINY, "data.path=texts", "run_dir=stopped", "checkpoint.every=50") as process:
        said = stop(process, 5, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said and "python train.py resume=stopped" in said
    reached = max(losses(folder))
    assert reached < 50 and (folder / "checkpoints" / f"step-{reached:08d}").is_dir()

    with start(*TRAIN, "resume=stopped", "checkpoint.every=10") as process:
        stop(process, reached + 15, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL

    code, said = run(*TRAIN, "resume=stopped")
    assert code == 0 and "Resuming at step" in said, said
    assert losses(folder) == losses(whole)
