"""Token shards on disk: a checked header, then the tokens; documents end with the end token.

Header (64 bytes, little endian): magic, version, bytes per token, tokens, text bytes, documents, tokenizer fingerprint.
Files of a split: 00000-of-00002.tokens, 00001-of-00002.tokens.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .tokenizer import Tokenizer

MAGIC, VERSION = b"ADASHARD", 1
HEADER = struct.Struct("<8sIIQQQ24s")
DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
SHARD_TOKENS = 100_000_000


def _digest(fingerprint: str) -> bytes:
    return hashlib.sha256(fingerprint.encode()).digest()[:24]


class Tokens:
    """The shards of a split, read as one sequence of tokens.

    Args:
        folder: with the split's shard files.
        fingerprint: of the tokenizer that must have made them.

    Attributes:
        text_bytes: UTF-8 bytes of the text that the tokens stand for.
        documents: how many there are; each ends with the end token.

    Raises:
        ValueError: for a file that is missing, not whole, of another format or of another tokenizer.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self._files: list[tuple[Path, np.dtype]] = []
        self._begins = [0]  # of each file, in tokens; and at last their number
        self.text_bytes = self.documents = 0
        paths = sorted(Path(folder).glob("*.tokens"))
        names = [f"{number:05d}-of-{len(paths):05d}.tokens" for number in range(len(paths))]
        if not paths or [path.name for path in paths] != names:
            found = ", ".join(path.name for path in paths) or "none"
            raise ValueError(f"Expected all token shards of a split in '{folder}', got {found}; {_remedy(folder)}.")
        for path in paths:
            self._open(path, fingerprint)

    def _open(self, path: Path, fingerprint: str) -> None:
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"'{path}' does not begin as a token shard does; {_remedy(path.parent)}.")
        _, version, width, count, text_bytes, documents, made_by = HEADER.unpack(header)
        if version != VERSION:
            raise ValueError(f"Expected version {VERSION} in '{path}', got {version}; {_remedy(path.parent)}.")
        if width not in DTYPES:
            raise ValueError(f"Expected 2 or 4 bytes a token in '{path}', got {width}; {_remedy(path.parent)}.")
        if made_by != _digest(fingerprint):
            raise ValueError(f"'{path}' was made by another tokenizer; use that one, or another cache folder.")
        expected, size = HEADER.size + count * width, path.stat().st_size
        if size != expected:
            raise ValueError(
                f"Expected {expected} bytes in '{path}' ({count} tokens), got {size}; {_remedy(path.parent)}."
            )
        self._files.append((path, DTYPES[width]))
        self._begins.append(self._begins[-1] + count)
        self.text_bytes += text_bytes
        self.documents += documents

    def __len__(self) -> int:
        return self._begins[-1]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token, end tokens counted among the tokens."""
        return self.text_bytes / len(self)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1, (stop - start,) int64. Raises ValueError outside of 0..len."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"Expected 0 <= start <= stop <= {len(self)}, got start = {start}, stop = {stop}.")
        out = np.empty(stop - start, dtype=np.int64)
        done, number = start, bisect.bisect_right(self._begins, start) - 1
        while done < stop:
            (path, dtype), begin, end = self._files[number], self._begins[number], self._begins[number + 1]
            upto = min(stop, end)
            # Mapped anew each time: a mapping that stays counts every page it ever touched as this process's memory.
            shard = np.memmap(path, dtype=dtype, mode="r", offset=HEADER.size)
            out[done - start : upto - start] = shard[done - begin : upto - begin]
            done, number = upto, number + 1
        return out


def _remedy(folder: Path) -> str:
    return f"delete the folder '{Path(folder).parent}' to have it built again"


class ShardWriter:
    """Appends documents to shards in a folder; `finish` gives them their names, which makes them valid.

    Args:
        folder: made here.
        tokenizer: whose ids come.
        most_tokens: a new file begins with the first document after so many.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, most_tokens: int = SHARD_TOKENS):
        folder.mkdir(parents=True)
        self._folder, self._most = folder, most_tokens
        self._end_token, self._digest = tokenizer.end_token, _digest(tokenizer.fingerprint)
        self._dtype = DTYPES[2 if tokenizer.vocab_size <= 1 << 16 else 4]
        self._file: BinaryIO | None = None
        self._parts: list[Path] = []
        self._count = self._bytes = self._documents = 0

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """A document: its ids (T,) without end token, and the UTF-8 bytes of its text."""
        if self._file is None:
            self._parts.append(self._folder / f"{len(self._parts):05d}.part")
            self._file = open(self._parts[-1], "wb")
            self._file.write(bytes(HEADER.size))
        self._file.write(np.append(ids, self._end_token).astype(self._dtype).tobytes())
        self._count += len(ids) + 1
        self._bytes += text_bytes
        self._documents += 1
        if self._count >= self._most:
            self._close()

    def _close(self) -> None:
        facts = (self._count, self._bytes, self._documents, self._digest)
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, self._dtype.itemsize, *facts))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._count = self._bytes = self._documents = 0

    def finish(self) -> int:
        """Completes the files. Returns how many there are."""
        if self._file is not None:
            self._close()
        for number, part in enumerate(self._parts):
            part.rename(self._folder / f"{number:05d}-of-{len(self._parts):05d}.tokens")
        return len(self._parts)
