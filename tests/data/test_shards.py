import dataclasses
import struct

import numpy as np
import pytest

from adasplash.data import Tokens
from adasplash.data.shards import HEADER, ShardWriter


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a writer asks of a tokenizer."""

    vocab_size: int = 257
    end_token: int = 256
    fingerprint: str = "some tokenizer"


def write(folder, tokenizer, documents, most_tokens=10):
    writer = ShardWriter(folder, tokenizer, most_tokens=most_tokens)
    for ids in documents:
        writer.add(np.asarray(ids, dtype=np.uint32), text_bytes=3 * len(ids))
    return writer.finish()


@pytest.fixture
def documents():
    random = np.random.default_rng(0)
    return [random.integers(0, 256, size=size) for size in (3, 12, 1, 0, 7, 25, 4)]


@pytest.mark.parametrize("vocab_size, width", [(257, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_what_was_written_is_read_in_any_pieces(tmp_path, documents, vocab_size, width):
    tokenizer = Facts(vocab_size, end_token=vocab_size - 1)
    files = write(tmp_path / "train", tokenizer, documents)
    expected = np.concatenate([[*ids, vocab_size - 1] for ids in documents])
    tokens = Tokens(tmp_path / "train", tokenizer.fingerprint)
    assert files > 2 and len(tokens) == len(expected)
    assert tokens.documents == len(documents) and tokens.text_bytes == 3 * sum(map(len, documents))
    assert tokens.bytes_per_token == tokens.text_bytes / len(tokens)
    size = sum(path.stat().st_size for path in (tmp_path / "train").iterdir())
    assert size == files * HEADER.size + width * len(expected)
    for start in range(len(expected) + 1):
        for stop in {start, min(start + 5, len(expected)), len(expected)}:
            piece = tokens.read(start, stop)
            assert piece.dtype == np.int64
            np.testing.assert_array_equal(piece, expected[start:stop])
    with pytest.raises(ValueError, match="Expected 0 <= start <= stop"):
        tokens.read(0, len(expected) + 1)


def overwrite(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda path: overwrite(path, 0, b"NUMPYNPY"), "does not begin as a token shard"),
        (lambda path: path.write_bytes(b""), "does not begin as a token shard"),
        (lambda path: overwrite(path, 8, struct.pack("<I", 99)), "Expected version 1 .* got 99"),
        (lambda path: overwrite(path, 12, struct.pack("<I", 8)), "Expected 2 or 4 bytes a token .* got 8"),
        (lambda path: overwrite(path, 16, struct.pack("<Q", 10**9)), "Expected 2000000064 bytes"),
        (cut_off, r"Expected \d+ bytes in .* got \d+"),
        (lambda path: path.unlink(), "Expected all token shards"),
        (lambda path: path.rename(path.with_suffix(".part")), "Expected all token shards"),
    ],
)
@pytest.mark.parametrize("which", [0, -1])
def test_a_damaged_shard_is_refused_with_what_to_do(tmp_path, documents, damage, sentence, which):
    write(tmp_path / "key" / "train", Facts(), documents)
    damage(sorted((tmp_path / "key" / "train").iterdir())[which])
    with pytest.raises(ValueError, match=sentence) as error:
        Tokens(tmp_path / "key" / "train", Facts().fingerprint)
    assert f"delete the folder '{tmp_path / 'key'}'" in str(error.value)


def test_shards_of_another_tokenizer_are_refused(tmp_path, documents):
    write(tmp_path / "train", Facts(), documents)
    with pytest.raises(ValueError, match="made by another tokenizer"):
        Tokens(tmp_path / "train", "other")


def test_shards_have_no_valid_name_before_they_are_finished(tmp_path, documents):
    writer = ShardWriter(tmp_path / "train", Facts(), most_tokens=10)
    for ids in documents:
        writer.add(ids, text_bytes=0)
    assert not list((tmp_path / "train").glob("*.tokens"))
    writer.finish()
    assert not list((tmp_path / "train").glob("*.part"))
