"""What text, and which tokens."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

SOURCES = ("stdlib", "files", "hub")
TOKENIZERS = ("bytes", "tiktoken", "huggingface")


def check_name(what: str, name: str, valid: Iterable[str]) -> None:
    """Raises ValueError that lists the valid names and the nearest."""
    valid = list(valid)
    if name not in valid:
        close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"Unknown {what} '{name}'; expected one of {', '.join(valid)}.{hint}")


@dataclass(frozen=True)
class DataConfig:
    """A corpus and how it is cut.

    Args:
        source: stdlib (source text of Python's standard library) | files | hub (Hugging Face).
        path: for files: a file, a folder or a pattern of .txt, .txt.gz, .jsonl, .jsonl.gz, .parquet.
        name, subset, split: for hub.
        text_column: of jsonl, parquet and hub data.
        validation_path: held-out files; without it every k-th document is held out, k = round(1 / validation_fraction).
        cross_document: whether a packed sequence may look across the ends of documents.
        cache_dir: where token shards are kept; by default $ADASPLASH_CACHE, $XDG_CACHE_HOME/adasplash or
            ~/.cache/adasplash.

    Raises:
        ValueError: for an unknown source, or settings that do not fit it.
    """

    source: str = "stdlib"
    path: str | None = None
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"
    validation_path: str | None = None
    validation_fraction: float = 0.05
    cross_document: bool = True
    cache_dir: str | None = None

    def __post_init__(self):
        check_name("data source", self.source, SOURCES)
        if self.source == "files" and not self.path:
            raise ValueError("data=files needs data.path: a file, a folder or a pattern such as 'texts/*.jsonl.gz'.")
        if self.source == "hub" and not self.name:
            raise ValueError("data=hub needs data.name, the name of a Hugging Face data set.")
        for field, source in (("path", "files"), ("name", "hub"), ("subset", "hub")):
            if getattr(self, field) and self.source != source:
                raise ValueError(
                    f"data.{field} belongs to data={source}, got data={self.source}; "
                    f"add data={source}, or leave data.{field} out."
                )
        if not 0.0 < self.validation_fraction <= 0.5:
            raise ValueError(f"Expected 0 < data.validation_fraction <= 0.5, got {self.validation_fraction:g}.")


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokens.

    Args:
        kind: bytes | tiktoken | huggingface.
        name: an encoding of tiktoken such as gpt2, or the folder of a transformers tokenizer.

    Raises:
        ValueError: for an unknown kind, or a name that it lacks or does not take.
    """

    kind: str = "bytes"
    name: str | None = None

    def __post_init__(self):
        check_name("tokenizer", self.kind, TOKENIZERS)
        if self.kind == "bytes" and self.name:
            raise ValueError(f"tokenizer=bytes takes no tokenizer.name, got '{self.name}'; choose tokenizer=tiktoken?")
        if self.kind != "bytes" and not self.name:
            what = "an encoding such as gpt2" if self.kind == "tiktoken" else "the folder of a transformers tokenizer"
            raise ValueError(f"tokenizer={self.kind} needs tokenizer.name: {what}.")
