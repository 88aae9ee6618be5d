"""Corpora: documents of text, with a fingerprint of their content."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .config import DataConfig

FORMATS = {".txt": "text", ".txt.gz": "text", ".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """documents() yields one text after another; the fingerprint changes with the content and nothing else."""

    documents: Callable[[], Iterator[str]]
    fingerprint: str


def load_corpus(config: DataConfig) -> Corpus:
    """The training corpus. Raises ValueError with one sentence for what is missing or unreadable."""
    if config.source == "stdlib":
        return _standard_library()
    if config.source == "files":
        return files_corpus(config.path, config.text_column)
    return _hub_corpus(config)


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not NOT_LIBRARY.intersection(path.relative_to(root).parts))
    # by a digest of the name, so that neighbours in a package do not become neighbours in the text
    files.sort(key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())

    def documents() -> Iterator[str]:
        for path in files:
            try:
                yield path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue

    if not files:
        raise ValueError(f"No source text of the standard library under '{root}'; use data=files data.path=...")
    return Corpus(documents, fingerprint_files(files))


def fingerprint_files(files: list[Path]) -> str:
    """Of the content of the files, in order."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def find_files(path: str) -> list[Path]:
    """The readable files that a path or pattern stands for, sorted."""
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        found = sorted(p for p in Path(expanded).rglob("*") if p.is_file() and ending(p))
        if not found:
            raise ValueError(f"No {', '.join(FORMATS)} file in the folder '{path}'.")
        return found
    found = sorted(Path(p) for p in glob.glob(expanded, recursive=True) if os.path.isfile(p))
    if not found:
        raise ValueError(f"No file matches data path '{path}' (looked from {os.getcwd()}).")
    for file in found:
        if not ending(file):
            raise ValueError(f"Cannot read '{file}': expected a file ending in {', '.join(FORMATS)}.")
    return found


def ending(path: Path) -> str | None:
    return next((known for known in sorted(FORMATS, key=len, reverse=True) if path.name.endswith(known)), None)


def files_corpus(path: str, text_column: str) -> Corpus:
    """Documents of text files (one each) and of the rows of jsonl and parquet files."""
    files = find_files(path)
    for file in files:
        if FORMATS[ending(file)] != "text":
            _check_column(_rows(file, text_column), file, text_column)

    def documents() -> Iterator[str]:
        for file in files:
            if FORMATS[ending(file)] == "text":
                opener = gzip.open if file.name.endswith(".gz") else open
                with opener(file, "rt", encoding="utf-8", errors="replace") as text:
                    yield text.read()
            else:
                for row in _rows(file, text_column):
                    if row[text_column]:
                        yield row[text_column]

    return Corpus(documents, fingerprint_files(files))


def _rows(file: Path, text_column: str):
    import datasets

    try:
        return datasets.load_dataset(FORMATS[ending(file)], data_files=str(file), split="train", streaming=True)
    except Exception as error:
        raise ValueError(f"Cannot read '{file}': {error}") from None


def _check_column(rows, where, text_column: str) -> None:
    try:
        first = next(iter(rows), None)
    except Exception as error:
        raise ValueError(f"Cannot read '{where}': {error}") from None
    if first is None:
        raise ValueError(f"'{where}' has no rows.")
    if text_column not in first:
        raise ValueError(f"'{where}' has no column '{text_column}'; set data.text_column to one of {', '.join(first)}.")
    if not isinstance(first[text_column], str):
        raise ValueError(f"Column '{text_column}' of '{where}' holds {type(first[text_column]).__name__}, not text.")


def _hub_corpus(config: DataConfig) -> Corpus:
    import datasets

    try:
        rows = datasets.load_dataset(config.name, config.subset, split=config.split)
    except Exception as error:
        raise ValueError(
            f"Cannot load the data set '{config.name}' from the Hugging Face hub ({type(error).__name__}: {error}); "
            "check the name and the network, or use data=files with a local copy."
        ) from None
    _check_column(rows, config.name, config.text_column)

    def documents() -> Iterator[str]:
        return (row[config.text_column] for row in rows if row[config.text_column])

    return Corpus(documents, hashlib.sha256(f"{rows._fingerprint} {config.text_column}".encode()).hexdigest())
