"""Corpora: documents of text, with a fingerprint of their content."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import DataConfig

FORMATS = {".txt": "text", ".txt.gz": "text", ".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}
# Of the standard library only what it is made of: no installed packages, no tests, no character tables.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Text, to be read any number of times.

    Args:
        documents: yields one document after another, in the same order each time; the order is part of the content.
            Raises ValueError for what cannot be read.
        fingerprint: changes with the content and with nothing else.
        files: that it is read from, where it is read from files.
    """

    documents: Callable[[], Iterator[str]]
    fingerprint: str
    files: tuple[Path, ...] = ()


def load_corpora(config: DataConfig) -> tuple[Corpus, Corpus | None]:
    """The corpus, and the held-out one where validation_path names it.

    Raises:
        ValueError: with one sentence for what is missing, or in both.
    """
    if config.source == "stdlib":
        corpus = _standard_library()
    elif config.source == "files":
        corpus = _files_corpus(config.path, config.text_column)
    else:
        corpus = _hub_corpus(config)
    if not config.validation_path:
        return corpus, None
    held_out = _files_corpus(config.validation_path, config.text_column)
    if both := {file.resolve() for file in corpus.files} & {file.resolve() for file in held_out.files}:
        raise ValueError(
            f"'{sorted(both)[0]}' is in data.path and in data.validation_path; "
            "give data.path a pattern that leaves the held-out files out, such as 'texts/train-*.jsonl.gz'."
        )
    return corpus, held_out


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in NOT_LIBRARY]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    if not files:
        raise ValueError(f"No source text of the standard library under '{root}'; use data=files with data.path.")

    def documents() -> Iterator[str]:
        for file in files:
            try:
                yield file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue

    return Corpus(documents, _fingerprint(files))


def _files_corpus(path: str, text_column: str) -> Corpus:
    """One document a text file, one a row of jsonl and parquet files."""
    files = find_files(path)

    def documents() -> Iterator[str]:
        for file in files:
            if _format(file) == "text":
                yield _read_text(file)
            else:
                yield from _texts(_read_rows(file), file, text_column)

    return Corpus(documents, _fingerprint(files, text_column), tuple(files))


def find_files(path: str) -> list[Path]:
    """The files that a file name, a folder or a pattern stands for, sorted.

    Raises:
        ValueError: if there are none, or one of an ending that cannot be read.
    """
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        found = sorted(file for file in Path(expanded).rglob("*") if file.is_file() and _format(file))
        if not found:
            raise ValueError(f"No {', '.join(FORMATS)} file in the folder '{path}'.")
        return found
    matches = [expanded] if os.path.isfile(expanded) else glob.glob(expanded, recursive=True)
    found = sorted(Path(match) for match in matches if os.path.isfile(match))
    if not found:
        raise ValueError(f"No file matches the data path '{path}' (looked from '{os.getcwd()}').")
    for file in found:
        if not _format(file):
            raise ValueError(f"Cannot read '{file}'; expected a file ending in {', '.join(FORMATS)}.")
    return found


def _format(file: Path) -> str | None:
    return next((kind for ending, kind in FORMATS.items() if file.name.endswith(ending)), None)


def _fingerprint(files: list[Path], text_column: str = "") -> str:
    total = hashlib.sha256(text_column.encode())
    for path in files:
        with open(path, "rb") as file:
            total.update(_format(path).encode() if _format(path) else b"")
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _read_text(file: Path) -> str:
    try:
        with (gzip.open if file.name.endswith(".gz") else open)(file, "rt", encoding="utf-8") as text:
            return text.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is not UTF-8 text ({error.reason} at byte {error.start}); convert it.") from None
    except (OSError, EOFError) as error:
        raise ValueError(f"Cannot read '{file}' ({_one_line(error)}).") from None


def _read_rows(file: Path) -> Iterator[dict[str, Any]]:
    import datasets

    # Not load_dataset, which reports each use of local files to a counter on the network. Streaming, so that no second
    # copy is written to disk. The name is taken for a pattern.
    readers = {"json": datasets.Dataset.from_json, "parquet": datasets.Dataset.from_parquet}
    try:
        yield from readers[_format(file)](glob.escape(str(file.absolute())), streaming=True)
    except StopIteration:  # how an empty file shows
        return
    except Exception as error:
        raise ValueError(f"Cannot read '{file}' ({_one_line(error)}).") from None


def _texts(rows: Iterable[dict[str, Any]], where: object, text_column: str) -> Iterator[str]:
    for row in rows:
        if text_column not in row:
            raise ValueError(
                f"'{where}' has no column '{text_column}'; set data.text_column to one of {', '.join(row)}."
            )
        text = row[text_column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(
                f"Expected text in the column '{text_column}' of '{where}', got {type(text).__name__}; "
                f"set data.text_column to another of {', '.join(row)}."
            )
        yield text


def _hub_corpus(config: DataConfig) -> Corpus:
    import datasets

    try:
        rows = datasets.load_dataset(config.name, config.subset, split=config.split)
    except Exception as error:
        raise ValueError(
            f"Cannot load the data set '{config.name}' from the Hugging Face hub ({_one_line(error)}); "
            "check the name, the subset, the split and the network, or use data=files with a local copy."
        ) from None
    fingerprint = hashlib.sha256(f"{rows._fingerprint} {config.text_column}".encode()).hexdigest()
    return Corpus(lambda: _texts(rows, config.name, config.text_column), fingerprint)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
