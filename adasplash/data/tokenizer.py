"""Tokenizers behind one interface: bytes, tiktoken's encodings, local transformers tokenizers."""

from __future__ import annotations

import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from .config import TokenizerConfig, check_name

THREADS = min(8, os.cpu_count() or 1)


class Tokenizer(Protocol):
    """Text to token ids; special tokens in a text are ordinary text.

    vocab_size: ids are below it; end_token: the id that ends a document; fingerprint: of everything that decides the ids.
    """

    vocab_size: int
    end_token: int
    fingerprint: str

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]: ...

    def decode(self, ids) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes 0..255, and 256 as the end of a document."""

    vocab_size, end_token, fingerprint = 257, 256, "bytes-1"

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8) for text in texts]

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")


class TiktokenTokenizer:
    """An encoding of tiktoken, from its cache or a download that the user is told about."""

    def __init__(self, name: str):
        import tiktoken

        check_name("tiktoken encoding", name, tiktoken.list_encoding_names())
        _check_tiktoken_cache(name)
        self.encoding = tiktoken.get_encoding(name)
        self.vocab_size, self.end_token = self.encoding.n_vocab, self.encoding.eot_token
        self.fingerprint = f"tiktoken-{name}-{self.vocab_size}"

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        ids = self.encoding.encode_ordinary_batch(texts, num_threads=THREADS)
        return [np.asarray(document, dtype=np.uint32) for document in ids]

    def decode(self, ids) -> str:
        return self.encoding.decode([int(i) for i in ids])


def _check_tiktoken_cache(name: str) -> None:
    """tiktoken downloads what its cache lacks, without a time-out of its own: without a network it would hang."""
    import tiktoken.load
    import tiktoken_ext.openai_public as public

    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    folder = Path(tempfile.gettempdir(), "data-gym-cache") if folder is None else Path(folder)
    addresses: list[str] = []

    class Named(Exception):
        pass

    def note(address: str, *arguments) -> bytes:
        addresses.append(address)
        raise Named

    constructor = public.ENCODING_CONSTRUCTORS.get(name)
    if constructor is None:  # from another plug-in: its own business
        return
    original, tiktoken.load.read_file_cached = tiktoken.load.read_file_cached, note
    try:
        constructor()
    except Named:
        pass
    finally:
        tiktoken.load.read_file_cached = original
    missing = [a for a in addresses if not (folder / hashlib.sha1(a.encode()).hexdigest()).is_file()]
    if not missing or os.environ.get("ADASPLASH_DOWNLOAD") == "1":
        return
    names = ", ".join(hashlib.sha1(address.encode()).hexdigest() for address in missing)
    raise ValueError(
        f"tiktoken's encoding '{name}' is not in its cache '{folder}' (missing {names}). Set TIKTOKEN_CACHE_DIR to a "
        "folder that has it, set ADASPLASH_DOWNLOAD=1 to let tiktoken download it, or use tokenizer=bytes."
    )


class HuggingFaceTokenizer:
    """A transformers tokenizer from a local folder."""

    def __init__(self, path: str):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"No folder '{path}': tokenizer=huggingface needs the folder of a saved tokenizer.")
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ValueError(f"No transformers tokenizer in '{path}': {error}") from None
        ends = (
            self.tokenizer.eos_token_id,
            self.tokenizer.sep_token_id,
            self.tokenizer.get_vocab().get("<|endoftext|>"),
        )
        end = next((i for i in ends if i is not None), None)
        if end is None:
            raise ValueError(f"The tokenizer in '{path}' has neither an end nor a separator token to part documents.")
        self.end_token, self.vocab_size = end, len(self.tokenizer)
        content = hashlib.sha256()
        for file in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".model")):
            content.update(file.name.encode() + file.read_bytes())
        self.fingerprint = f"huggingface-{content.hexdigest()[:16]}"

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        def encode(text: str) -> np.ndarray:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return np.asarray(ids, dtype=np.uint32)

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(encode, texts))

    def decode(self, ids) -> str:
        return self.tokenizer.decode([int(i) for i in ids])


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer a configuration names. Raises ValueError with one sentence where it cannot be had."""
    if config.kind == "bytes":
        return ByteTokenizer()
    return TiktokenTokenizer(config.name) if config.kind == "tiktoken" else HuggingFaceTokenizer(config.name)
