"""From a corpus to token shards on disk, once: later calls find them by content."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .config import DataConfig
from .corpus import Corpus, load_corpora
from .shards import VERSION, ShardWriter, Tokens
from .tokenizer import Tokenizer

SPLITS = ("train", "validation")
BATCH_CHARACTERS = 1 << 24


@dataclass(frozen=True)
class TokenSplits:
    """fingerprint: of the text of both, whatever the tokenizer."""

    train: Tokens
    validation: Tokens
    fingerprint: str


def prepare(data: DataConfig, tokenizer: Tokenizer, *, announce: Callable[[str], None] = print) -> TokenSplits:
    """Token shards of the training and the validation text, built where they are not in the cache yet.

    Memory holds some millions of characters of text at a time, or one document where that is longer.

    Args:
        data: the corpus and how it is cut.
        tokenizer: makes the tokens.
        announce: takes the lines that say what happens.

    Raises:
        ValueError: for a corpus that cannot be read or has too little text, and for a damaged cache.
    """
    corpus, held_out = load_corpora(data)
    every = round(1 / data.validation_fraction)
    rule = held_out.fingerprint if held_out else f"1 of {every}"
    folder = cache_folder(data) / f"tokens-{_digest(VERSION, corpus.fingerprint, tokenizer.fingerprint, rule)}"
    found = folder.exists()
    if not found:
        announce(f"Building token shards in '{folder}'")
        _build(hold_out(corpus, every) if held_out is None else _both(corpus, held_out), tokenizer, folder)
    tokens = (Tokens(folder / split, tokenizer.fingerprint) for split in SPLITS)
    splits = TokenSplits(*tokens, fingerprint=_digest(corpus.fingerprint, rule))
    announce(
        f"{'Cached tokens' if found else 'Tokens'}: {len(splits.train):,} for training ({splits.train.documents:,} "
        f"documents), {len(splits.validation):,} for validation ({splits.validation.documents:,}), in '{folder}'"
    )
    return splits


def _digest(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:24]


def cache_folder(data: DataConfig) -> Path:
    """cache_dir, $ADASPLASH_CACHE, $XDG_CACHE_HOME/adasplash or ~/.cache/adasplash: the first that is set."""
    if chosen := data.cache_dir or os.environ.get("ADASPLASH_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adasplash"


def hold_out(corpus: Corpus, every: int) -> Iterator[tuple[str, str]]:
    """(split, text) of every document: each `every`-th is for validation.

    With fewer documents than that, the last 1 / every of the text is, and a document across the cut is divided.
    """
    if sum(1 for _ in itertools.islice(corpus.documents(), every)) == every:
        for number, text in enumerate(corpus.documents(), start=1):
            yield SPLITS[number % every == 0], text
        return
    characters = sum(len(text) for text in corpus.documents())
    cut = characters - characters // every
    for text in corpus.documents():
        yield "train", text[:cut]
        yield "validation", text[cut:]
        cut = max(0, cut - len(text))


def _both(corpus: Corpus, held_out: Corpus) -> Iterator[tuple[str, str]]:
    for split, part in zip(SPLITS, (corpus, held_out), strict=True):
        for text in part.documents():
            yield split, text


def _build(documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, folder: Path) -> None:
    """In a folder of its own, renamed at the end: two builders do not meet, a killed one leaves nothing valid."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        building = Path(tempfile.mkdtemp(prefix=f".building-{socket.gethostname()}-{os.getpid()}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"Cannot write token shards in '{folder.parent}' ({error.strerror}); set data.cache_dir or ADASPLASH_CACHE."
        ) from None
    try:
        writers = {split: ShardWriter(building / split, tokenizer) for split in SPLITS}
        with _progress() as advance:
            for group in _groups(documents):
                ids = tokenizer.encode_batch([text for _, text in group])
                for (split, text), tokens in zip(group, ids, strict=True):
                    writers[split].add(tokens, len(text.encode()))
                    advance(len(tokens) + 1)
        for split, writer in writers.items():
            if writer.finish() == 0:
                raise ValueError(f"The corpus has too little text: none is left for {split}; give more text.")
        building.chmod(0o777 & ~_umask())  # mkdtemp makes it private, the cache may be shared
        try:
            building.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """What killed builds of this machine have left."""
    for left in cache.glob(f".building-{socket.gethostname()}-*"):
        try:
            os.kill(int(left.name.split("-")[-2]), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except PermissionError:  # alive, somebody else's
            continue


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _groups(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Documents with any text, in groups of bounded size."""
    group, size = [], 0
    for split, text in documents:
        if not text:
            continue
        group.append((split, text))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """On a terminal, a live line with the tokens so far; takes how many there are more."""
    if not sys.stderr.isatty():
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.completed:,.0f} tokens"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokens", total=None)
        yield lambda tokens: bar.advance(task, tokens)
