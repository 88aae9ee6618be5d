"""From a corpus to token shards on disk, once: later calls find them by content."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .config import DataConfig
from .corpus import Corpus, files_corpus, load_corpus
from .shards import VERSION, ShardWriter, Tokens, batches
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenSplits:
    train: Tokens
    validation: Tokens


def cache_folder(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    if chosen := os.environ.get("ADASPLASH_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adasplash"


def prepare(config: DataConfig, tokenizer: Tokenizer, *, announce: Callable[[str], None] = print) -> TokenSplits:
    """Token shards of the training and the validation text, built where they are not in the cache yet.

    Raises:
        ValueError: for a corpus that cannot be read or has too little text.
    """
    corpus = load_corpus(config)
    held_out = files_corpus(config.validation_path, config.text_column) if config.validation_path else None
    split = held_out.fingerprint if held_out else f"every {round(1 / config.validation_fraction)}"
    key = f"{VERSION} {corpus.fingerprint} {tokenizer.fingerprint} {split}"
    folder = cache_folder(config) / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not folder.exists():
        _build(corpus, held_out, tokenizer, config, folder, announce)
    splits = TokenSplits(*(Tokens(folder / name, tokenizer.fingerprint) for name in ("train", "validation")))
    announce(
        f"Tokens: {len(splits.train):,} for training, {len(splits.validation):,} for validation "
        f"({splits.train.documents:,} and {splits.validation.documents:,} documents) in {folder}"
    )
    return splits


def _build(corpus: Corpus, held_out: Corpus | None, tokenizer, config: DataConfig, folder: Path, announce) -> None:
    """Into a folder of its own, renamed at the end: two builders do not meet, a killed one leaves nothing valid."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    how = {"vocab_size": tokenizer.vocab_size, "end_token": tokenizer.end_token, "fingerprint": tokenizer.fingerprint}
    announce(f"Building token shards in {folder} ...")
    try:
        writers = {name: ShardWriter(building / name, **how) for name in ("train", "validation")}
        every = round(1 / config.validation_fraction)
        with _Progress() as progress:
            number = 0
            for texts in batches(corpus.documents()):
                for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                    out = held_out is None and number % every == every - 1
                    writers["validation" if out else "train"].add(ids, len(text.encode("utf-8", "replace")))
                    number += 1
                    progress.add(len(ids))
            for texts in batches(held_out.documents()) if held_out else ():
                for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                    writers["validation"].add(ids, len(text.encode("utf-8", "replace")))
                    progress.add(len(ids))
        for name, writer in writers.items():
            if not writer.total:
                raise ValueError(
                    f"The corpus has {number} documents, which leaves none for {name}; give more documents, "
                    f"a data.validation_path, or a data.validation_fraction of at least 1/{max(number, 2)}."
                )
            writer.close()
        try:
            building.rename(folder)
        except OSError:
            if not folder.exists():  # else somebody else was faster: the same content
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


class _Progress:
    """A live line of how many tokens there are, on a terminal."""

    def __enter__(self):
        self.bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} tokens"), TimeElapsedColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("tokens", total=None)
        return self

    def add(self, tokens: int) -> None:
        if self.bar:
            self.bar.advance(self.task, tokens)

    def __exit__(self, *exception):
        if self.bar:
            self.bar.stop()
