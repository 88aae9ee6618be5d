"""What is drawn of the benchmark of attention, on made-up rows and on those that are kept."""

import json
import math
from pathlib import Path

import attention_pictures as pictures
import pytest
from attention_peers import PEERS

from adasplash.evaluation import attention_colours

KEPT = Path(__file__).parents[2] / "benchmarks" / "attention" / "rows.jsonl"


def timed(implementation, inputs, milliseconds, **more):
    times = {"forward_ms": milliseconds / 3, "backward_ms": milliseconds * 2 / 3, "sum_ms": milliseconds}
    length = more.pop("length", 8192)
    shape = {
        "length": length,
        "batch": 65536 // length,
        "heads": 12,
        "dim": 64,
        "documents": 1,
        "alpha": None,
        "problem": None,
    }
    return {"implementation": implementation, "inputs": inputs, **shape, **times, "extra_mib": 100, **more}


ROWS = [
    timed("adasplash", "gaussian", 8.0, density=1.0, support=23.0, alpha=1.5),
    timed("adasplash", "scattered:.2:.8", 4.0, density=0.72, support=2.9, alpha=1.5),
    timed("fa2", "any", 12.0),
    {"implementation": "flex", "inputs": "any", "length": 8192, "problem": "wrong (error 0.3 in dq)"},
]


def test_the_table_shows_ratios_and_no_time_beside_a_wrong_result():
    table = pictures.table(ROWS)
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    assert [row["fa2 / it"] for row in rows] == ["1.500", "3.000", "1.000", "–"]
    assert rows[1]["density"] == "0.7200" and rows[1]["support"] == "2.900" and rows[1]["problem"] == "–"
    assert rows[3]["problem"] == "wrong (error 0.3 in dq)" and rows[3]["fwd ms"] == rows[3]["sum ms"] == "–"
    assert "fa4 / it" not in table.headings


def test_the_picture_needs_an_entmax_row(tmp_path):
    assert pictures.draw_against_support(ROWS[2:], tmp_path / "attention.png") is None
    assert pictures.draw_against_support(ROWS, tmp_path / "attention.png").stat().st_size > 1000


def test_the_picture_rings_the_break_even_with_attention_that_drops_nothing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_xlabel", lambda self, text: said.append(text))
    crossing = [timed("adasplash", "gaussian:.5", 18.0, support=40.0), timed("qk_sparse:.7", "any", 1.0)]
    pictures.draw_against_support(ROWS + crossing, tmp_path / "attention.png")
    support = pictures.break_even([(23.0, 8.0), (40.0, 18.0)], 12.0)
    assert said == [f"keys with weight per query\nbreak-even with fa2: adasplash at about {support:.0f}"]


def test_break_even_is_where_a_line_rises_to_a_time():
    assert pictures.break_even([(16, 4.0), (4, 1.0)], 2.0) == pytest.approx(8)  # straight on logarithmic axes
    assert pictures.break_even([(2, 5.0), (4, 1.0), (8, 3.0), (16, 12.0)], 6.0) == pytest.approx(8 * 2**0.5)
    assert pictures.break_even([(2, 1.0), (4, 2.0)], 6.0) is None
    assert pictures.break_even([(2, 8.0), (4, 9.0)], 6.0) is None
    assert pictures.break_even([(2, 8.0)], math.inf) is None


def test_the_picture_of_lengths_needs_two_of_them(tmp_path):
    longer = [row | {"length": 2 * row["length"]} for row in ROWS]
    assert pictures.draw_against_length(ROWS[:1], tmp_path / "lengths.png") is None
    assert pictures.draw_against_length(ROWS + longer, tmp_path / "lengths.png").stat().st_size > 1000


def test_ratios_are_with_the_same_run():
    runs = [
        timed("fa2", "any", 12.0, command="first"),
        timed("adasplash", "gaussian", 8.0, command="first"),
        timed("fa2", "any", 6.0, command="second"),
        timed("adasplash", "gaussian", 8.0, command="second"),
        timed("adasplash", "gaussian", 8.0, command="second", dim=128),
        timed("adasplash", "gaussian", 8.0, command="third"),
    ]
    ratios = [row.get("over_fa2") for row in pictures.with_ratios(runs)]
    assert ratios == [1.0, 1.5, 1.0, 0.75, None, None]


def sweep(*lengths, inputs=("gaussian",), **more):
    """A run's rows, of adasplash on some inputs, and of others."""
    rows = []
    for length in lengths:
        rows += [timed("fa4", "any", length / 1000, length=length, **more)]
        rows += [timed("hash_sparse:16", "gaussian", length / 2000, length=length, **more)]
        rows += [timed("adasplash", name, 5.0, length=length, alpha=1.5, support=9.0, **more) for name in inputs]
    return rows


def test_each_picture_takes_its_rows():
    usual = sweep(8192, 16384, inputs=("gaussian", "clustered:3"), command="usual")
    again = sweep(16384, inputs=("gaussian", "clustered:8"), command="again")
    wide = sweep(16384, command="wide", dim=128)
    packed = sweep(16384, command="packed", documents=8)
    other_alpha = [timed("adasplash", "gaussian", 3.0, alpha=2.0, support=4.0, command="alpha")]
    with_value = [timed("adasplash:1.5", "gaussian", 3.0, alpha=1.5, support=4.0, command="value")]
    lengths = sweep(4096, 8192, 16384, 32768, command="lengths")
    rows = [*lengths, *usual, *again, *wide, *packed, *other_alpha, *with_value, ROWS[-1]]
    new = [row for row in again if row["inputs"] == "clustered:8"]
    assert pictures.rows_by_support(rows) == [row for row in usual if row["implementation"] != "hash_sparse:16"] + new
    assert pictures.rows_by_length(rows) == lengths
    assert pictures.rows_by_length(usual) == pictures.rows_by_length([]) == pictures.rows_by_support(lengths) == []
    both = sweep(8192, 16384, 65536, inputs=("gaussian", "clustered:3"))  # as one run with the defaults
    assert len(pictures.rows_by_support(both)) == 9 and pictures.rows_by_length(both) == both


def test_an_implementation_has_a_colour_of_its_own_and_markers_tell_values_apart():
    assert len(set(attention_colours(PEERS).values())) == len(PEERS)
    styles = pictures.line_styles(["hash_sparse:4", "fa4", "hash_sparse:8"])
    assert styles["fa4"]["color"] == attention_colours(["fa4"])["fa4"]
    assert styles["hash_sparse:4"]["color"] == styles["hash_sparse:8"]["color"]
    assert styles["hash_sparse:4"]["marker"] != styles["hash_sparse:8"]["marker"]


def test_the_program_draws_both_pictures(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in sweep(8192, 16384, 65536, inputs=("gaussian", "clustered:3")))
    )
    assert pictures.main([str(file), "--out", str(tmp_path / "new")]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["attention.png", "lengths.png"]
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "new" / name) for name in ("attention.png", "lengths.png")
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "Expected the file of rows that bench_attention.py writes, rows.jsonl, got '"),
        ('{"implementation": "fa4"}\n{"tor', "line 2 is none"),
        ("3\n", "line 1"),
        ("", "nothing to draw"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(text, said, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    if text is not None:
        file.write_text(text)
    assert pictures.main([str(file)]) == 2
    output = capsys.readouterr()
    assert said in output.err and output.err.count("\n") == 1 and output.out == ""


@pytest.mark.skipif(not KEPT.exists(), reason="needs the rows in benchmarks/")
def test_the_kept_rows_make_the_pictures_of_the_benchmark(tmp_path):
    rows = pictures.read_rows(KEPT, "bench_attention.py", dict)
    by_support, by_length = pictures.rows_by_support(rows), pictures.rows_by_length(rows)
    assert {"adasplash", "fa4"} <= {row["implementation"] for row in by_support} <= set(PEERS)
    assert len({(row["heads"], row["dim"], row["documents"]) for row in by_support}) == 1
    assert len({row["command"] for row in by_length}) == 1 and len({row["length"] for row in by_length}) >= 3
    assert pictures.main([str(KEPT), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in KEPT.parent.glob("*.png")}
