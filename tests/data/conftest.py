import os
import socket
from pathlib import Path

import pytest

from adasplash.data import DataConfig, TokenizerConfig, build_tokenizer


@pytest.fixture(scope="module", autouse=True)
def no_network():
    """Whatever reaches for the network fails at once, and is found out even where that error is caught."""
    attempts = []

    def refuse(*arguments, **options):
        attempts.append(arguments)
        raise OSError("no network in tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield
    assert attempts == []


@pytest.fixture(scope="session")
def real_data() -> Path:
    if "ADASPLASH_TEST_DATA" not in os.environ:
        pytest.skip("ADASPLASH_TEST_DATA names no folder with real data")
    return Path(os.environ["ADASPLASH_TEST_DATA"])


@pytest.fixture
def gpt2(real_data, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(real_data / "tokenizers" / "tiktoken_cache"))
    return build_tokenizer(TokenizerConfig("tiktoken", "gpt2"))


@pytest.fixture
def byte_tokenizer():
    return build_tokenizer(TokenizerConfig())


@pytest.fixture
def texts(tmp_path):
    """Forty short documents in files, and the configuration that reads them into a cache of the test's own."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(f"Document {number}: é " + "abc " * number)
    return DataConfig(source="files", path=str(folder), validation_fraction=0.1, cache_dir=str(tmp_path / "cache"))
