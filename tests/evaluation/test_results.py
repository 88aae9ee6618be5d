"""The results file, its tables and its picture."""

import json
import math

import pytest

from adasplash.evaluation import (
    Perplexity,
    PositionBin,
    Throughput,
    attention_colours,
    merge_results,
    plot_perplexity_by_position,
    read_results,
    result_row,
    result_tables,
)

FACTS = {"model": "small", "tokenizer": "bytes", "device": "CPU", "dtype": "fp32"}


def perplexity_row(seq_len=64, stride=64, loss=2.0, attention="flash", **more):
    curve = tuple(PositionBin(2**i, loss + 1 / (i + 1), 100) for i in range(7))
    measured = Perplexity(seq_len, stride, 640, loss, math.exp(loss), loss / math.log(2), curve)
    return result_row(measured, attention=attention, **FACTS, **more)


def throughput_row(backward=True, status="ok", **more):
    values = {} if status != "ok" else {"tokens_per_s": 1234.0, "ms": 5.5, "memory_gib": 0.25}
    measured = Throughput(seq_len=64, batch_size=2, backward=backward, repeats=3, status=status, **values)
    return result_row(measured, attention="flash", **FACTS, **more)


def test_a_row_says_all_that_its_numbers_depend_on():
    row = perplexity_row(data="stdlib")
    for name in ("model", "attention", "seq_len", "stride", "tokens", "tokenizer", "device", "dtype", "data"):
        assert row[name] is not None, name
    for name in ("torch", "transformers", "date"):
        assert row[name][0].isdigit(), name
    assert row["evaluation"] == "perplexity" and throughput_row()["evaluation"] == "throughput"


def test_new_rows_replace_the_same_measurement_and_leave_the_others(tmp_path):
    path = tmp_path / "results.json"
    first = [perplexity_row(loss=2.0), perplexity_row(stride=16), throughput_row(), throughput_row(backward=False)]
    assert merge_results(path, first) == first == read_results(path)
    newer = [perplexity_row(loss=1.5), perplexity_row(attention="adasplash", attention_options={"alpha": 1.5})]
    merged = merge_results(path, newer)
    assert merged == read_results(path) == [newer[0], *first[1:], newer[1]]
    other_alpha = perplexity_row(attention="adasplash", attention_options={"alpha": 2.0})
    assert merge_results(path, [other_alpha]) == [*merged, other_alpha]
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_loss_that_is_not_finite_is_null_in_standard_json(tmp_path):
    merge_results(tmp_path / "results.json", [perplexity_row(loss=math.nan)])
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)[0]["loss"] is None


@pytest.mark.parametrize("content", ['[{"evaluation": "perpl', '{"a": 1}', "[1, 2]", '[{"loss": 2.0}]'])
def test_a_file_with_something_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="results.json"):
        merge_results(path, [perplexity_row()])
    assert path.read_text() == content


def test_tables_show_what_differs_and_caption_what_does_not():
    rows = [
        perplexity_row(),
        perplexity_row(seq_len=128, stride=32),
        throughput_row(),
        throughput_row(status="out of memory"),
    ]
    perplexity, throughput = result_tables(rows)
    assert {"attention", "seq_len", "stride", "perplexity"} <= set(perplexity.headings)
    assert "model" not in perplexity.headings and "model small" in perplexity.caption
    assert [row[perplexity.headings.index("seq_len")] for row in perplexity.rows] == ["64", "128"]
    assert perplexity.rows[0][perplexity.headings.index("perplexity")] == "7.389"
    assert "out of memory" in throughput.markdown() and "1,234" in throughput.markdown()
    assert all(
        line.count("|") == len(perplexity.headings) + 1 for line in perplexity.markdown().splitlines() if "|" in line
    )


def test_tables_come_by_what_was_evaluated():
    assert result_tables([]) == []
    assert [table.title for table in result_tables([throughput_row()])] == ["Throughput"]


def test_the_picture_is_drawn(tmp_path):
    rows = [perplexity_row(), perplexity_row(seq_len=32, stride=8, attention="adasplash"), throughput_row()]
    path = plot_perplexity_by_position(rows, tmp_path / "new" / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.parametrize("rows", [[], [throughput_row()], [perplexity_row(loss=math.nan)]])
def test_without_a_curve_there_is_no_picture(tmp_path, rows):
    assert plot_perplexity_by_position(rows, tmp_path / "curve.png") is None and not any(tmp_path.iterdir())


def test_an_attention_keeps_its_colour_in_any_company():
    alone = attention_colours(["adasplash"])
    among = attention_colours(["flash", "mine", "adasplash", "softmax", "flash"])
    assert among["adasplash"] == alone["adasplash"]
    assert len(set(among.values())) == len(among) == 4
