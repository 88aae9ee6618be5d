"""The benchmark of training, as far as it runs without a GPU."""

import json
import re

import bench_training
import pytest
import torch


def test_jobs_are_parsed():
    assert bench_training.parse_job("flash:16384") == ("flash", 16384, 40)
    assert bench_training.parse_job("hash_sparse:8192:30") == ("hash_sparse", 8192, 30)


@pytest.mark.parametrize(
    "job, said",
    [
        ("flahs:1024", "Unknown attention 'flahs'; expected one of .* Did you mean 'flash'"),
        ("flash", r"Expected ATTENTION:LENGTH\[:STEPS\].* got 'flash'"),
        ("flash:long", "got 'flash:long'"),
        ("flash:0", "got 'flash:0'"),
        ("flash:64:5:6", "got 'flash:64:5:6'"),
    ],
)
def test_wrong_jobs_end_the_program(job, said, capsys):
    with pytest.raises(SystemExit) as end:
        bench_training.main([job])
    assert end.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_says_that_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        bench_training.main(["flash:1024"])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("error: this benchmark needs an NVIDIA GPU, and torch finds none.\n")


def test_rows_hold_the_facts_of_the_run(monkeypatch, tmp_path, capsys):
    def train(config):
        if config.attention.name == "softmax":
            raise torch.OutOfMemoryError
        folder = tmp_path / "run"
        folder.mkdir()
        rates = [{"step": step, "perf/tokens_per_s": 1000.0 * step} for step in range(1, 8)]
        counted = {"step": 7, "attention/support/layer00": 30.0, "attention/support/layer01": 10.0, "val/loss": 4.0}
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*rates, counted])))
        measured = {"perf/tokens_per_s": 1e5, "perf/mfu": None, "mem/max_gib": 30.0, "train/loss": 4.0}
        return measured | {"attention/density": None, "step": config.steps, "run_dir": str(folder)}

    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench_training, "train", train)
    out = tmp_path / "rows.jsonl"
    assert bench_training.main(["flash:16384:3", "softmax:8192", "--out", str(out)]) == 0
    flash, softmax = map(json.loads, out.read_text().splitlines())
    assert (flash["attention"], flash["seq_len"], flash["steps"], flash["perf/tokens_per_s"]) == (
        "flash",
        16384,
        3,
        1e5,
    )
    assert flash["tokens_per_s_at_the_end"] == 5000.0
    assert flash["history"][-1] == {"step": 7, "attention/support": 20.0, "val/loss": 4.0}
    assert softmax["error"] == "out of memory" and softmax["steps"] == 40
    assert {"device", "torch", "triton", "transformers", "commit", "command"} <= set(flash) & set(softmax)
    assert "100,000" in capsys.readouterr().out
