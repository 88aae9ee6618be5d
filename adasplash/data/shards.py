"""Token shards: a checked header, then the tokens; documents end with the end token.

Header (64 bytes, little endian): magic, version, bytes per token, tokens, text bytes, documents, tokenizer fingerprint.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MAGIC, VERSION = b"ADASHARD", 1
HEADER = struct.Struct("<8sIIQQQ24s")
SHARD_TOKENS = 100_000_000


def digest(fingerprint: str) -> bytes:
    return hashlib.sha256(fingerprint.encode()).digest()[:24]


class Tokens:
    """The shards of a split, read as one sequence of tokens.

    Args:
        folder: with the split's shard files.
        fingerprint: of the tokenizer that must have made them.

    Raises:
        ValueError: for a file that is not whole, of another format, or of another tokenizer.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.paths, self.ends, self.dtypes = sorted(folder.glob("*.tokens")), [], []
        if not self.paths:
            raise ValueError(f"No token shards in '{folder}'.")
        self.text_bytes = self.documents = total = 0
        for path in self.paths:
            with open(path, "rb") as file:
                header = file.read(HEADER.size)
            if len(header) < HEADER.size or not header.startswith(MAGIC):
                raise ValueError(f"'{path}' is no token shard; delete its folder to build it again.")
            _, version, width, count, text_bytes, documents, made_by = HEADER.unpack(header)
            if version != VERSION or width not in (2, 4):
                raise ValueError(f"'{path}' has version {version}, expected {VERSION}; delete its folder to rebuild.")
            if path.stat().st_size != HEADER.size + count * width:
                raise ValueError(f"'{path}' is cut off: expected {count} tokens; delete its folder to build it again.")
            if made_by != digest(fingerprint):
                raise ValueError(f"'{path}' was made by another tokenizer; use that one, or another cache folder.")
            total += count
            self.ends.append(total)
            self.dtypes.append(np.dtype(f"<u{width}"))
            self.text_bytes += text_bytes
            self.documents += documents

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token of the stream, end tokens counted among the tokens."""
        return self.text_bytes / max(len(self), 1)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 as int64."""
        assert 0 <= start <= stop <= len(self)
        pieces = []
        for path, end, dtype, begin in zip(self.paths, self.ends, self.dtypes, [0, *self.ends], strict=False):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                shard = np.memmap(path, dtype=dtype, mode="r", offset=HEADER.size)
                pieces.append(shard[low - begin : high - begin].astype(np.int64))
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


class ShardWriter:
    """Appends documents to shard files of a folder; a file gets its header, and thereby becomes valid, when closed."""

    def __init__(self, folder: Path, *, vocab_size: int, end_token: int, fingerprint: str, most: int = SHARD_TOKENS):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.end_token, self.fingerprint, self.most = folder, end_token, fingerprint, most
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.file, self.number, self.total = None, 0, 0

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        if self.file is None:
            self.file = open(self.folder / f"{self.number:05d}.tokens", "wb")
            self.file.write(bytes(HEADER.size))
            self.count = self.bytes = self.documents = 0
        self.file.write(np.append(ids, self.end_token).astype(self.dtype).tobytes())
        self.count += len(ids) + 1
        self.total += len(ids) + 1
        self.bytes += text_bytes
        self.documents += 1
        if self.count >= self.most:
            self.close()

    def close(self) -> None:
        if self.file is None:
            return
        facts = (self.count, self.bytes, self.documents, digest(self.fingerprint))
        self.file.seek(0)
        self.file.write(HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, *facts))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file, self.number = None, self.number + 1


def batches(documents: Iterator[str], most_characters: int = 1 << 23) -> Iterator[list[str]]:
    """Documents in groups of bounded size, so that a corpus never has to fit into memory."""
    group, size = [], 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= most_characters:
            yield group
            group, size = [], 0
    if group:
        yield group
