import random

import pytest

from adasplash.training import TrainConfig, from_mapping


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Some documents of random words: little text, but enough for a few steps."""
    words = random.Random(0)
    vocabulary = ["".join(words.choices("abcdefgh", k=words.randint(1, 6))) for _ in range(6)]
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        (folder / f"{number:02d}.txt").write_text(" ".join(words.choices(vocabulary, k=120)))
    return folder


@pytest.fixture
def tiny(text_file, tmp_path):
    """Makes the configuration of a run of seconds; keywords change it."""

    def make(**changes) -> TrainConfig:
        values = {
            "model": {
                "name": "tiny",
                "type": "gpt2",
                "config": {"n_layer": 2, "n_head": 2, "n_embd": 32},
            },
            "attention": {"name": "flash"},
            "data": {
                "source": "files",
                "path": str(text_file),
                "cache_dir": str(tmp_path / "cache"),
                "validation_fraction": 0.2,
            },
            "seq_len": 32,
            "steps": 6,
            "batch_tokens": 128,
            "device": "cpu",
            "run_dir": str(tmp_path / "run"),
            "log_every": 1,
            "eval": {"tokens": 64, "every": 3},
            "checkpoint": {"every": 2},
        }
        return from_mapping(TrainConfig, values | changes)

    return make
