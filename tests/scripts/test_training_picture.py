"""The picture of training speeds, from rows as bench_training.py writes them."""

import json

import pytest
import training_picture


def row(attention, supports=()):
    history = [{"step": step, "perf/tokens_per_s": 1e5 + step} for step in (1, 5, 10, 15)]
    history += [{"step": 10, "val/loss": 4.0, "attention/support": support} for support in supports]
    how = {"attention": attention, "seq_len": 16384, "steps": 15, "batch_tokens": 65536}
    return how | {"tokens_per_s_at_the_end": 1e5, "history": history}


def test_what_is_drawn_of_a_row():
    assert training_picture.speeds(row("flash")) == [(0.32768, 100005.0), (0.65536, 100010.0), (0.98304, 100015.0)]
    assert training_picture.supports(row("adasplash", [8.25])) == [(0.65536, 8.25)]
    assert training_picture.supports(row("qk_sparse", [8192.0])) == []  # which all have weight


def test_the_picture_is_written(tmp_path, capsys):
    rows = [row("flash"), row("adasplash", [8.0]), {"attention": "softmax", "seq_len": 16384, "error": "out of memory"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "speed.png"
    assert training_picture.main([str(tmp_path / "rows.jsonl"), "--out", str(out)]) == 0
    assert out.stat().st_size > 5000 and capsys.readouterr().out.strip() == str(out)


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "Expected the file of rows that bench_training.py writes, rows.jsonl, got '"),
        ("\x89PNG", "line 1 is none"),
        ("{}", "line 1 is none"),
        ("[]", "line 1 is none"),
        (json.dumps({"error": "out of memory"}), "There is nothing to draw"),
    ],
)
def test_bad_rows_get_a_sentence(text, said, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    assert training_picture.main([str(path), "--out", str(tmp_path / "speed.png")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "speed.png").exists()


def test_a_folder_is_no_rows_and_no_picture(tmp_path, capsys):
    assert training_picture.main([str(tmp_path), "--out", str(tmp_path / "speed.png")]) == 2
    assert "rows.jsonl, got the folder" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("flash")))
    assert training_picture.main([str(tmp_path / "rows.jsonl"), "--out", str(tmp_path)]) == 2
    assert "ends in .png, .svg, .pdf, got the folder" in capsys.readouterr().err
