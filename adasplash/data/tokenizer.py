"""Tokenizers behind one interface: bytes, tiktoken's encodings, local transformers tokenizers."""

from __future__ import annotations

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .config import TokenizerConfig, check_name


class Tokenizer(ABC):
    """Text to token ids and back; the spelling of a special token in a text is ordinary text.

    vocab_size: every id is below it.
    end_token: the id that ends a document; no text encodes to it.
    fingerprint: of everything that decides the ids.
    """

    vocab_size: int
    end_token: int
    fingerprint: str

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids (T,) uint32, without an end token."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, on all processors."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids."""


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a configuration names.

    Raises:
        ValueError: with one sentence where it is unknown or not on this machine; nothing is ever downloaded.
    """
    if config.kind == "bytes":
        return ByteTokenizer()
    return TiktokenTokenizer(config.name) if config.kind == "tiktoken" else HuggingFaceTokenizer(config.name)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255, and 256 as the end of a document."""

    vocab_size, end_token, fingerprint = 257, 256, "bytes-1"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i != self.end_token).decode(errors="replace")


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken, by its name, from tiktoken's cache on this machine."""

    def __init__(self, name: str):
        import tiktoken

        check_name("tiktoken encoding", name, tiktoken.list_encoding_names())
        parts = _load_encoding(name)
        self._encoding = tiktoken.Encoding(**parts)
        self.vocab_size, self.end_token = self._encoding.n_vocab, self._encoding.eot_token
        content = (parts["pat_str"], sorted(parts["mergeable_ranks"].items()), sorted(parts["special_tokens"].items()))
        self.fingerprint = f"tiktoken-{hashlib.sha256(repr(content).encode()).hexdigest()}"

    def encode(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(i) for i in ids])


def _load_encoding(name: str) -> dict:
    """The parts of an encoding, from cached files alone.

    tiktoken would fetch a file that is missing or damaged without a time-out, and wait for ever where there is no
    network; so its reader is replaced while the encoding is put together.
    """
    import tiktoken.load
    import tiktoken.registry

    folder = next(
        (os.environ[variable] for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR") if variable in os.environ),
        os.path.join(tempfile.gettempdir(), "data-gym-cache"),
    )
    missing: list[str] = []

    def read_cached(address: str, expected_hash: str | None = None) -> bytes:
        key = hashlib.sha1(address.encode()).hexdigest()
        try:
            content = Path(folder, key).read_bytes()
        except OSError:
            content = b""
        if not content or (expected_hash and hashlib.sha256(content).hexdigest() != expected_hash):
            missing.append(f"{key} ({address.rpartition('/')[2]})")
        return content

    parts = None
    original, tiktoken.load.read_file_cached = tiktoken.load.read_file_cached, read_cached
    try:
        parts = tiktoken.registry.ENCODING_CONSTRUCTORS[name]()
    except Exception:
        if not missing:  # else it failed for want of those, which the message below says
            raise
    finally:
        tiktoken.load.read_file_cached = original
    if missing:
        raise ValueError(
            f"The files of tiktoken's encoding '{name}' are not in its cache '{folder}', or are damaged there: expected "
            f"{', '.join(missing)}; set TIKTOKEN_CACHE_DIR to a folder that has them, fill it where there is a network "
            f"with python -c \"import tiktoken; tiktoken.get_encoding('{name}')\", or use tokenizer=bytes."
        )
    return parts


class HuggingFaceTokenizer(Tokenizer):
    """A transformers tokenizer from a local folder."""

    FILES = ("*token*", "vocab*", "merges*", "*.model")  # what decides the ids, and no weights

    def __init__(self, path: str):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"No folder '{path}'; tokenizer=huggingface needs the folder of a saved tokenizer.")
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ValueError(
                f"No transformers tokenizer in the folder '{path}' ({' '.join(str(error).split())[:200]})."
            ) from None
        vocabulary = self._tokenizer.get_vocab()
        # A bare tokenizer.json names no end token; <|endoftext|> is then the usual one.
        ends = (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id, vocabulary.get("<|endoftext|>"))
        self.end_token = next((end for end in ends if end is not None), None)
        if self.end_token is None:
            raise ValueError(f"The tokenizer in '{path}' has no eos and no sep token to end documents; set one in it.")
        self.vocab_size = max(vocabulary.values()) + 1
        content = hashlib.sha256()
        for file in sorted({file for pattern in self.FILES for file in folder.glob(pattern) if file.is_file()}):
            content.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        self.fingerprint = f"huggingface-{content.hexdigest()}"

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        # It runs a batch on all processors by itself, and is not safe to call from several threads.
        encoded = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return [np.asarray(ids, dtype=np.uint32) for ids in encoded["input_ids"]]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)
