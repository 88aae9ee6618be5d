"""The benchmark of training, as far as it runs without a GPU."""

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
