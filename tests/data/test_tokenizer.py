import shutil
import time

import numpy as np
import pytest

from adasplash.data import TokenizerConfig, build_tokenizer

TEXT = "Hello  world , it's fine .\n\n\tdef f(x):\n    return 'naïve — 漢字 🎈'  \n"
SPECIAL = "before <|endoftext|> between </s> after"
KINDS = [
    "bytes",
    "tiktoken:gpt2",
    "tiktoken:r50k_base",
    *(f"huggingface:{n}" for n in ("gpt2", "roberta-base", "olmo-neox")),
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    kind, _, name = request.param.partition(":")
    if kind == "bytes":
        return build_tokenizer(TokenizerConfig())
    folder = request.getfixturevalue("real_data") / "tokenizers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "tiktoken_cache"))
        return build_tokenizer(TokenizerConfig(kind, str(folder / name) if kind == "huggingface" else name))


@pytest.mark.parametrize("text", [TEXT, SPECIAL, ""], ids=["text", "special", "empty"])
def test_text_comes_back_and_never_holds_an_end_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert not np.isin(tokenizer.end_token, ids)
    assert 0 <= tokenizer.end_token < tokenizer.vocab_size and (ids < tokenizer.vocab_size).all()


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    texts = [TEXT * repeat + str(repeat) for repeat in range(8)]
    batch = tokenizer.encode_batch(texts)
    assert len(batch) == 8
    for text, ids in zip(texts, batch, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.fixture
def cache(real_data, tmp_path, monkeypatch):
    """A copy of tiktoken's cache, to be damaged."""
    shutil.copytree(real_data / "tokenizers" / "tiktoken_cache", tmp_path / "cache", copy_function=shutil.copyfile)
    (tmp_path / "cache").chmod(0o755)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_known_ids(gpt2, byte_tokenizer):
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert (gpt2.vocab_size, gpt2.end_token) == (50257, 50256)
    assert byte_tokenizer.encode("aé").tolist() == [97, 195, 169]
    assert (byte_tokenizer.vocab_size, byte_tokenizer.end_token) == (257, 256)


def test_the_fingerprint_is_of_the_content(real_data, cache, tmp_path):
    by_name = {name: build_tokenizer(TokenizerConfig("tiktoken", name)).fingerprint for name in ("gpt2", "r50k_base")}
    assert by_name["gpt2"] == by_name["r50k_base"]  # two spellings of one vocabulary
    shutil.copytree(real_data / "tokenizers" / "gpt2", tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy").chmod(0o755)
    build = lambda folder: build_tokenizer(TokenizerConfig("huggingface", str(folder))).fingerprint
    assert build(tmp_path / "copy") == build(real_data / "tokenizers" / "gpt2")
    file = tmp_path / "copy" / "tokenizer.json"
    file.write_text(file.read_text().replace("}", "} ", 1))
    assert build(tmp_path / "copy") != build(real_data / "tokenizers" / "gpt2")


def refusal(config) -> str:
    with pytest.raises(ValueError) as error:
        build_tokenizer(config)
    return str(error.value)


@pytest.mark.parametrize("name", ["gpt2", "r50k_base", "cl100k_base", "o200k_harmony"])
@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_an_empty_tiktoken_cache_is_an_error_at_once(tmp_path, monkeypatch, name, variable):
    """tiktoken itself would ask the network here, with no time-out."""
    import tiktoken  # noqa: F401  the import is not what is timed

    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    started = time.perf_counter()
    message = refusal(TokenizerConfig("tiktoken", name))
    assert time.perf_counter() - started < 1.0
    assert str(tmp_path) in message and "TIKTOKEN_CACHE_DIR" in message and "tokenizer=bytes" in message
    if name == "gpt2":
        assert "6d1cbeee0f20b3d9449abfede4726ed8212e3aee (vocab.bpe)" in message
        assert "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 (encoder.json)" in message


def test_a_file_that_is_damaged_or_missing_in_the_tiktoken_cache_is_named(cache):
    """tiktoken itself would delete the damaged one and ask the network."""
    file = cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-100]), file.unlink):
        damage()
        message = refusal(TokenizerConfig("tiktoken", "gpt2"))
        assert "encoder.json" in message and "vocab.bpe" not in message
    assert build_tokenizer(TokenizerConfig("tiktoken", "r50k_base")).vocab_size == 50257


def test_unknown_encoding():
    message = refusal(TokenizerConfig("tiktoken", "gpt-2"))
    assert "cl100k_base" in message and "Did you mean 'gpt2'" in message


def test_no_transformers_tokenizer(tmp_path):
    assert "No folder 'gpt2'" in refusal(TokenizerConfig("huggingface", "gpt2"))
    assert "No transformers tokenizer in the folder" in refusal(TokenizerConfig("huggingface", str(tmp_path)))
