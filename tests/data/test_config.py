import importlib
import sys

import pytest

import adasplash
from adasplash.data import DataConfig, TokenizerConfig


@pytest.mark.parametrize(
    "kind, settings, sentence",
    [
        (
            DataConfig,
            {"source": "file"},
            "data source 'file'; expected one of stdlib, files, hub. Did you mean 'files'",
        ),
        (DataConfig, {"source": "files"}, "data=files needs data.path"),
        (DataConfig, {"source": "hub"}, "data=hub needs data.name"),
        (DataConfig, {"path": "books"}, "data.path belongs to data=files, got data=stdlib; add data=files, or leave"),
        (DataConfig, {"source": "files", "path": "books", "name": "c4"}, "data.name belongs to data=hub"),
        (DataConfig, {"validation_fraction": 0.0}, "0 < data.validation_fraction <= 0.5, got 0"),
        (DataConfig, {"validation_fraction": 0.7}, "0 < data.validation_fraction <= 0.5, got 0.7"),
        (TokenizerConfig, {"kind": "tiktok"}, "bytes, tiktoken, huggingface. Did you mean 'tiktoken'"),
        (TokenizerConfig, {"kind": "tiktoken"}, "tokenizer=tiktoken needs tokenizer.name"),
        (TokenizerConfig, {"kind": "huggingface"}, "needs tokenizer.name: the folder"),
        (TokenizerConfig, {"name": "gpt2"}, "tokenizer=bytes takes no tokenizer.name"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_right(kind, settings, sentence):
    with pytest.raises(ValueError) as error:
        kind(**settings)
    assert sentence in str(error.value)


def test_import_is_light(monkeypatch):
    for name in ("datasets", "tiktoken", "transformers", "rich"):
        monkeypatch.setitem(sys.modules, name, None)  # to import one of them now raises
    monkeypatch.setattr(adasplash, "data", adasplash.data)  # all of it comes back after the test
    for name in [name for name in sys.modules if name.startswith("adasplash.data")]:
        monkeypatch.delitem(sys.modules, name)
    assert importlib.import_module("adasplash.data").DataConfig is not DataConfig
