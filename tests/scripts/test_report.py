"""The report on made-up run folders."""

import csv
import json

import pytest
import report
import yaml


def make_run(folder, attention="flash", seq_len=512, summary=None, metrics="", **changes):
    """A run folder; summary None: the run has not ended; changes: of the configuration."""
    folder.mkdir(parents=True)
    config = {
        "attention": {"name": attention, **({"alpha": 1.5} if attention == "adasplash" else {})},
        "model": {"name": "small"},
        "seq_len": seq_len,
        "steps": 100,
        "batch_tokens": 4096,
        "optim": {"kind": "adamw", "learning_rate": 6e-4},
        "seed": 0,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes))
    (folder / "metrics.jsonl").write_text(metrics)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def finished(perplexity=20.0, tokens_per_s=1e5, density=None, **more):
    return {
        "status": "finished",
        "step": 100,
        "val/perplexity": perplexity,
        "val/loss": 3.0,
        "val/bits_per_byte": 1.25,
        "perf/tokens_per_s": tokens_per_s,
        "attention/density": density,
        "device": "CPU",
        "tokenizer": {"kind": "bytes", "name": None},
    } | more


def run_report(tmp_path, *paths):
    out = tmp_path / "out"
    assert report.main([*map(str, paths), "--out", str(out)]) == 0
    with open(out / "report.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    return out, rows


def test_finished_runs_are_compared(tmp_path, capsys):
    runs = tmp_path / "runs"
    for seq_len in (512, 1024):
        make_run(runs / f"flash-{seq_len}", "flash", seq_len, finished(24.0, 2e5))
        make_run(runs / f"ours-{seq_len}", "adasplash", seq_len, finished(23.0, 3e5, density=0.07))
    out, rows = run_report(tmp_path, *sorted(runs.iterdir()))
    printed, markdown = capsys.readouterr().out, (out / "report.md").read_text()
    for text in (printed, markdown):
        assert (
            "adasplash" in text and "alpha=1.5" in text and "1,024" in text and "300,000" in text and "0.07000" in text
        )
        assert "learning rate 0.0006" in text  # the same everywhere: said once
    assert "4 of 4 runs compared" in printed
    assert "![" in markdown and "Left out" not in markdown
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list(rows) == ["ours-512", "flash-512", "ours-1024", "flash-1024"]  # by length, the best first
    assert float(rows["flash-512"]["density"]) == 1.0 and float(rows["ours-512"]["density"]) == 0.07
    assert json.loads(rows["ours-512"]["options"]) == {"alpha": 1.5}


def test_the_others_are_listed_with_the_reason(tmp_path, capsys):
    runs = tmp_path / "runs"
    make_run(runs / "good", summary=finished())
    torn = '{"step": 10, "val/perplexity": 99.5}\n{"step": 20, "train/loss": 4.0}\n{"step": 30, "train/lo'
    make_run(runs / "killed", metrics=torn)
    make_run(runs / "stopped", summary={"status": "stopped", "step": 28}, metrics=torn)
    make_run(runs / "young")
    make_run(runs / "nan", summary=finished(perplexity=float("nan")))
    make_run(runs / "half").joinpath("summary.json").write_text('{"status": "fini')
    make_run(runs / "no-length", summary=finished(), seq_len="long")
    make_run(runs / "words", summary=finished(perplexity="low"))
    (runs / "empty").mkdir()
    (runs / "yaml").mkdir()
    (runs / "yaml" / "config.yaml").write_text("attention: [")
    (runs / "failed-1.txt").write_text("python train.py x=1\n\nTraceback\nValueError: Expected an even n_buckets.\n")
    (runs / "multirun.yaml").write_text("{}")
    out, rows = run_report(tmp_path, *runs.iterdir(), runs / "nowhere")
    assert "1 of 12 runs compared" in capsys.readouterr().out
    problems = {name: row["problem"] for name, row in rows.items()}
    assert problems["good"] == ""
    assert problems["killed"] == "has not ended: step 20 of 100, val/perplexity 99.5 so far"
    assert problems["stopped"].startswith("stopped: step 28 of 100")
    assert "no step of 100" in problems["young"]
    assert "val/perplexity is nan" in problems["nan"]
    assert "val/perplexity is low" in problems["words"]
    assert "summary.json cannot be read" in problems["half"]
    assert "no config.yaml" in problems["empty"]
    assert "config.yaml cannot be read" in problems["yaml"] and "config.yaml cannot be read" in problems["no-length"]
    assert "Expected an even n_buckets" in problems["failed-1.txt"]
    assert "no such folder" in problems["nowhere"]
    assert "multirun.yaml" not in problems
    assert all(problem in (out / "report.md").read_text() for problem in problems.values())


def test_only_unfinished_runs_make_a_report_without_a_picture(tmp_path, capsys):
    out, rows = run_report(tmp_path, make_run(tmp_path / "runs" / "young"))
    assert "0 of 1 runs compared" in capsys.readouterr().out
    assert not (out / "report.png").exists() and "![" not in (out / "report.md").read_text()


def test_no_run_at_all_is_one_sentence_and_status_two(tmp_path, capsys):
    file = tmp_path / "multirun.yaml"
    file.write_text("{}")
    for arguments in ([], [str(tmp_path / "runs" / "*")], [str(file)]):
        assert report.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1 and "no run folder" in output.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    run = make_run(tmp_path / "run", summary=finished())
    (tmp_path / "file").write_text("")
    assert report.main([str(run), "--out", str(tmp_path / "file")]) == 2
    assert "--out takes another folder" in capsys.readouterr().err


def test_what_does_not_compare_is_said(tmp_path, capsys):
    make_run(tmp_path / "a", summary=finished())
    make_run(tmp_path / "b", summary=finished(tokenizer={"kind": "tiktoken", "name": "gpt2"}, device="NVIDIA H200"))
    run_report(tmp_path, tmp_path / "a", tmp_path / "b")
    printed = capsys.readouterr().out
    assert "2 tokenizers (bytes, gpt2): perplexities do not compare" in printed
    assert "2 devices (CPU, NVIDIA H200): tokens/s do not compare" in printed


def test_evaluations_stand_beside_the_runs(tmp_path, capsys):
    row = {"evaluation": "perplexity", "attention": "flash", "seq_len": 512, "stride": 128, "perplexity": 17.25}
    make_run(tmp_path / "a", summary=finished()).joinpath("results.json").write_text(json.dumps([row]))
    make_run(tmp_path / "b", summary=finished()).joinpath("results.json").write_text("[{")
    out, _ = run_report(tmp_path, tmp_path / "a", tmp_path / "b")
    markdown = (out / "report.md").read_text()
    assert "## Perplexity" in markdown and "17.25" in markdown and "stride 128" in markdown
    assert "is not JSON" in markdown  # the other file


@pytest.mark.parametrize("density", [None, 0.0])
def test_one_run_is_enough_for_a_picture(tmp_path, density):
    run = make_run(tmp_path / "a", "hash_sparse", 1000, finished(density=density))
    out, _ = run_report(tmp_path, run)
    assert (out / "report.png").stat().st_size > 10_000


def test_marker_areas_grow_with_the_density():
    areas = [report.marker_area(density) for density in (0.0, 0.01, 0.1, 1.0)]
    assert areas == sorted(set(areas)) and areas[0] > 0
