import dataclasses
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from adasplash.data import DataConfig, prepare
from adasplash.data.prepare import cache_folder
from adasplash.data.shards import ShardWriter

quiet = lambda line: None


def documents_of(tokens, tokenizer) -> list[str]:
    ids = tokens.read(0, len(tokens)).tolist()
    assert ids[-1] == tokenizer.end_token
    documents, begin = [], 0
    for place, token in enumerate(ids):
        if token == tokenizer.end_token:
            documents.append(tokenizer.decode(ids[begin:place]))
            begin = place + 1
    return documents


def test_every_document_lands_whole_in_one_split(texts, byte_tokenizer):
    splits = prepare(texts, byte_tokenizer, announce=quiet)
    written = [path.read_text() for path in sorted(Path(texts.path).iterdir())]
    assert documents_of(splits.validation, byte_tokenizer) == written[9::10]
    assert documents_of(splits.train, byte_tokenizer) == [t for i, t in enumerate(written) if i % 10 != 9]
    assert splits.validation.documents == 4
    assert splits.validation.text_bytes == sum(len(text.encode()) for text in written[9::10])


def test_groups_of_documents_change_nothing(texts, byte_tokenizer, tmp_path, monkeypatch):
    whole = prepare(texts, byte_tokenizer, announce=quiet)
    monkeypatch.setattr(sys.modules["adasplash.data.prepare"], "BATCH_CHARACTERS", 50)
    grouped = prepare(dataclasses.replace(texts, cache_dir=str(tmp_path / "other")), byte_tokenizer, announce=quiet)
    assert documents_of(grouped.train, byte_tokenizer) == documents_of(whole.train, byte_tokenizer)


def test_validation_files(texts, byte_tokenizer, tmp_path):
    (tmp_path / "held.txt").write_text("held out")
    config = dataclasses.replace(texts, validation_path=str(tmp_path / "held.txt"))
    splits = prepare(config, byte_tokenizer, announce=quiet)
    assert documents_of(splits.validation, byte_tokenizer) == ["held out"] and splits.train.documents == 40


@pytest.mark.parametrize("sizes", [(1000,), (300, 600, 0, 100), (10, 900, 90)])
def test_with_few_documents_the_end_of_the_text_is_held_out(tmp_path, byte_tokenizer, sizes):
    (tmp_path / "texts").mkdir()
    text = "".join(chr(ord("a") + place % 26) for place in range(1000))
    begin = 0
    for number, size in enumerate(sizes):
        (tmp_path / "texts" / f"{number}.txt").write_text(text[begin : begin + size])
        begin += size
    config = DataConfig(source="files", path=str(tmp_path / "texts"), cache_dir=str(tmp_path / "cache"))
    splits = prepare(config, byte_tokenizer, announce=quiet)
    assert "".join(documents_of(splits.validation, byte_tokenizer)) == text[950:]
    assert "".join(documents_of(splits.train, byte_tokenizer)) == text[:950]
    assert splits.train.text_bytes == 950


def test_too_little_text_is_said(tmp_path, byte_tokenizer):
    (tmp_path / "tiny.txt").write_text("a few words")
    config = DataConfig(source="files", path=str(tmp_path / "tiny.txt"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="too little text: none is left for validation"):
        prepare(config, byte_tokenizer, announce=quiet)
    assert not list((tmp_path / "cache").iterdir())


def shard_folders(config) -> set[str]:
    return {folder.name for folder in Path(config.cache_dir).iterdir()}


def test_the_cache_is_by_content(texts, byte_tokenizer, tmp_path):
    lines = []
    prepare(texts, byte_tokenizer, announce=lines.append)
    assert "Building" in lines[0] and not any("Cached" in line for line in lines)
    first = shard_folders(texts)

    for file in Path(texts.path).iterdir():
        os.utime(file, (1, 1))
    Path(texts.path).rename(tmp_path / "moved")
    moved = dataclasses.replace(texts, path=str(tmp_path / "moved"))
    lines.clear()
    prepare(moved, byte_tokenizer, announce=lines.append)
    assert len(lines) == 1 and "Cached" in lines[0] and shard_folders(texts) == first

    file = tmp_path / "moved" / "07.txt"
    before = file.stat()
    file.write_text(file.read_text().replace("Document", "document"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    splits = prepare(moved, byte_tokenizer, announce=lines.append)
    assert "Building" in lines[1] and len(shard_folders(texts)) == 2
    assert documents_of(splits.train, byte_tokenizer)[7].startswith("document 7")


def test_other_settings_are_other_shards(texts, byte_tokenizer, gpt2):
    prepare(texts, byte_tokenizer, announce=quiet)
    splits = prepare(texts, gpt2, announce=quiet)
    prepare(dataclasses.replace(texts, validation_fraction=0.2), byte_tokenizer, announce=quiet)
    assert len(shard_folders(texts)) == 3
    assert documents_of(splits.train, gpt2)[3] == (Path(texts.path) / "03.txt").read_text()


def test_a_damaged_cache_is_refused(texts, byte_tokenizer):
    prepare(texts, byte_tokenizer, announce=quiet)
    (folder,) = Path(texts.cache_dir).iterdir()
    shard = next((folder / "train").iterdir())
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match="to have it built again"):
        prepare(texts, byte_tokenizer, announce=quiet)


def test_a_cache_that_cannot_be_written_is_said(texts, byte_tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"Cannot write .* \(Not a directory\); set data.cache_dir or ADASPLASH_CACHE"):
        prepare(dataclasses.replace(texts, cache_dir=str(tmp_path / "file" / "cache")), byte_tokenizer, announce=quiet)


def test_where_the_cache_is(tmp_path, monkeypatch):
    for variable in ("ADASPLASH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_folder(DataConfig()) == Path.home() / ".cache" / "adasplash"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(DataConfig()) == tmp_path / "xdg" / "adasplash"
    monkeypatch.setenv("ADASPLASH_CACHE", str(tmp_path / "own"))
    assert cache_folder(DataConfig()) == tmp_path / "own"
    assert cache_folder(DataConfig(cache_dir=str(tmp_path / "given"))) == tmp_path / "given"


def start(target, *arguments) -> multiprocessing.Process:
    """In a process of its own; forked, since importing torch anew takes seconds."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def prepare_quietly(config, tokenizer):
    prepare(config, tokenizer, announce=quiet)


def prepare_and_be_killed(config, tokenizer):
    finish = ShardWriter.finish

    def finish_and_be_killed(writer):
        finish(writer)  # of the training split: whole, but alone
        os.kill(os.getpid(), signal.SIGKILL)

    ShardWriter.finish = finish_and_be_killed
    prepare(config, tokenizer, announce=quiet)


def test_a_killed_build_leaves_nothing_that_counts_and_is_cleared_away(texts, byte_tokenizer):
    process = start(prepare_and_be_killed, texts, byte_tokenizer)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = shard_folders(texts)
    assert left.startswith(".building-") and list((Path(texts.cache_dir) / left / "train").glob("*.tokens"))
    lines = []
    splits = prepare(texts, byte_tokenizer, announce=lines.append)
    assert "Building" in lines[0] and splits.train.documents == 36
    assert len(shard_folders(texts)) == 1 and left not in shard_folders(texts)


def test_processes_at_the_same_time(texts, byte_tokenizer):
    processes = [start(prepare_quietly, texts, byte_tokenizer) for _ in range(4)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(shard_folders(texts)) == 1
    assert prepare(texts, byte_tokenizer, announce=quiet).train.documents == 36


def test_the_loser_of_a_race_takes_the_winners_shards(texts, byte_tokenizer, monkeypatch):
    """Here the other process is done just as this one wants to be."""
    module = sys.modules["adasplash.data.prepare"]
    original = module._groups

    def groups(documents):
        yield from original(documents)
        monkeypatch.setattr(module, "_groups", original)
        prepare(texts, byte_tokenizer, announce=quiet)

    monkeypatch.setattr(module, "_groups", groups)
    assert prepare(texts, byte_tokenizer, announce=quiet).train.documents == 36
    assert len(shard_folders(texts)) == 1


def test_real_books(real_data, gpt2, tmp_path):
    config = DataConfig(source="files", path=str(real_data / "books" / "medium.jsonl.gz"), cache_dir=str(tmp_path))
    splits = prepare(config, gpt2, announce=quiet)
    assert splits.train.documents + splits.validation.documents == 98
    assert len(splits.train) + len(splits.validation) == 1_012_736 + 98
    assert splits.train.text_bytes + splits.validation.text_bytes == 4_242_628


def test_the_fingerprint_follows_the_text_and_how_it_is_cut(texts, byte_tokenizer, tmp_path):
    """Not where it is cached."""
    first = prepare(texts, byte_tokenizer, announce=quiet).fingerprint
    elsewhere = dataclasses.replace(texts, cache_dir=str(tmp_path / "other"))
    assert prepare(elsewhere, byte_tokenizer, announce=quiet).fingerprint == first
    cut = dataclasses.replace(texts, validation_fraction=0.2)
    (Path(texts.path) / "zz.txt").write_text("more")
    fingerprints = {first, *(prepare(config, byte_tokenizer, announce=quiet).fingerprint for config in (texts, cut))}
    assert len(fingerprints) == 3
