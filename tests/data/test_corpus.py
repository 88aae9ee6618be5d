import gzip
import json

import pytest

from adasplash.data import DataConfig
from adasplash.data.corpus import load_corpora

datasets = pytest.importorskip("datasets")

ROWS = [{"text": "first\nline two", "id": 1}, {"text": None, "id": 2}, {"text": "third é", "id": 3}]
EXPECTED = ["first\nline two", "third é"]


def corpus_of(path, **settings):
    return load_corpora(DataConfig(source="files", path=str(path), **settings))[0]


def write_rows(path, rows=ROWS):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def test_the_standard_library_is_several_megabytes_of_the_same_text_each_time():
    first, second = load_corpora(DataConfig())[0], load_corpora(DataConfig())[0]
    documents = list(first.documents())
    assert documents == list(second.documents()) and first.fingerprint == second.fingerprint
    assert sum(map(len, documents)) > 3_000_000
    assert any("class OrderedDict(dict):" in text for text in documents)
    assert not any("import pytest" in text for text in documents)  # nothing installed, no tests


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "odd [1]*.jsonl"])
def test_rows_of_json_lines_are_documents(tmp_path, name):
    assert list(corpus_of(write_rows(tmp_path / name)).documents()) == EXPECTED


def test_rows_of_parquet_are_documents(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert list(corpus_of(tmp_path / "rows.parquet").documents()) == EXPECTED


def test_a_text_file_is_one_document_and_a_folder_is_read_sorted(tmp_path):
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("two\n\nparagraphs")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "notes.md").write_text("not a format")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "inner").mkdir()
    write_rows(tmp_path / "inner" / "c.jsonl")
    assert list(corpus_of(tmp_path).documents()) == ["one", "two\n\nparagraphs", *EXPECTED]
    assert list(corpus_of(tmp_path / "*.txt").documents()) == ["one"]
    assert list(corpus_of(tmp_path / "**" / "*.jsonl").documents()) == EXPECTED


def test_the_fingerprint_follows_content_and_column(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    before = corpus_of(path).fingerprint
    moved = path.rename(tmp_path / "moved.jsonl")
    assert corpus_of(moved).fingerprint == before
    assert corpus_of(moved, text_column="id").fingerprint != before
    write_rows(moved, ROWS[:2])
    assert corpus_of(moved).fingerprint != before


def failure(corpus) -> str:
    with pytest.raises(ValueError) as error:
        list(corpus().documents())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    assert "No file matches the data path" in failure(lambda: corpus_of(tmp_path / "none*.txt"))
    message = failure(lambda: corpus_of(rows, text_column="content"))
    assert "no column 'content'" in message and "text, id" in message
    assert "got int" in failure(lambda: corpus_of(rows, text_column="id"))
    (tmp_path / "empty").mkdir()
    assert "No .txt, .txt.gz, .jsonl, .jsonl.gz, .parquet file in the folder" in failure(
        lambda: corpus_of(tmp_path / "empty")
    )
    (tmp_path / "table.csv").write_text("a,b")
    assert "table.csv'; expected a file ending in .txt, " in failure(lambda: corpus_of(tmp_path / "table.csv"))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert "latin.txt' is not UTF-8" in failure(lambda: corpus_of(tmp_path / "latin.txt"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-12])
    assert "Cannot read" in failure(lambda: corpus_of(tmp_path / "cut.txt.gz"))
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert "broken.jsonl" in failure(lambda: corpus_of(tmp_path / "broken.jsonl"))


def test_held_out_files_must_not_be_training_files(tmp_path):
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text(name)
    both = DataConfig(source="files", path=str(tmp_path), validation_path=str(tmp_path / "valid.txt"))
    with pytest.raises(ValueError, match=r"valid.txt' is in data.path and in data.validation_path"):
        load_corpora(both)


def test_a_hub_data_set_is_read_by_its_split_and_column(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(source="hub", name="some/set", subset="en", split="train[:10%]")
    assert list(load_corpora(config)[0].documents()) == EXPECTED
    assert asked == [(("some/set", "en"), {"split": "train[:10%]"})]
    assert "no column 'body'" in failure(
        lambda: load_corpora(DataConfig(source="hub", name="some/set", text_column="body"))[0]
    )


def test_a_hub_that_cannot_be_reached_is_said_in_one_sentence(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = failure(lambda: load_corpora(DataConfig(source="hub", name="some/set"))[0])
    assert "'some/set'" in message and "no route" in message and "data=files" in message
