"""eval.py on runs: which model it evaluates, and under which name."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")

import tokenizers
from transformers import PreTrainedTokenizerFast

from adasplash.attention.huggingface import attention_backends
from adasplash.training import from_mapping, loop, train

SCHEDULE = {"name": "adasplash", "alpha": 1.5, "alpha_start": 1.1, "alpha_steps": 12}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("eval_script", Path(__file__).parents[2] / "eval.py")
    module = sys.modules["eval_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["eval_script"]


@pytest.fixture
def evaluate(script, tiny):
    """Evaluates the run of `tiny` as the command line does: (rows, alpha of each layer)."""

    def run(**changes):
        models = []
        measure = script.measure_perplexity
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                script, "measure_perplexity", lambda model, *a, **k: models.append(model) or measure(model, *a, **k)
            )
            values = {"run_dir": tiny().run_dir, "evals": ["perplexity"], "max_tokens": 64, "device": "cpu"} | changes
            rows = script.evaluate(from_mapping(script.EvaluateConfig, script.with_the_runs_own(values)))
        return rows, [backend.current_alpha() for backend in attention_backends(models[0])]

    return run


def test_an_unfinished_schedule_is_evaluated_where_it_stands(tiny, evaluate, tmp_path):
    train(tiny(attention=SCHEDULE, steps=6))
    assert "alpha_steps = 12 is more than steps = 6" in (tmp_path / "run" / "log.txt").read_text()
    rows, alphas = evaluate()
    assert [float(alpha) for alpha in alphas] == pytest.approx([1.3, 1.3])
    shutil.rmtree(tmp_path / "run" / "export")
    from_checkpoint, alphas = evaluate()
    assert [float(alpha) for alpha in alphas] == pytest.approx([1.3, 1.3])
    assert from_checkpoint[0]["loss"] == rows[0]["loss"]


def test_the_alpha_that_is_asked_for_is_the_one_of_the_row(tiny, evaluate):
    train(tiny(attention=SCHEDULE, steps=6))
    rows, alphas = evaluate(attention={"alpha": 1.9})
    assert alphas == [1.9, 1.9] and rows[0]["attention_options"]["alpha"] == 1.9


def test_rows_of_the_runs_own_attention_carry_its_options(tiny, evaluate):
    train(tiny(attention={"name": "adasplash", "learn_alpha": True}, steps=2))
    rows, _ = evaluate(attention={"name": "adasplash", "alpha": 1.5})
    assert rows[0]["attention_options"] == {"learn_alpha": True, "alpha": 1.5}
    with pytest.raises(ValueError, match="add learn_alpha=false"):
        evaluate(attention={"alpha": 1.9})


def test_the_schedule_of_an_untrained_model_is_over(script, tiny, tmp_path, monkeypatch):
    models = []
    measure = script.measure_throughput
    monkeypatch.setattr(
        script, "measure_throughput", lambda model, **how: models.append(model) or measure(model, **how)
    )
    monkeypatch.chdir(tmp_path)  # the results go below runs/
    run = tiny(attention=SCHEDULE)
    how = {"evals": ["throughput"], "seq_lens": [32], "repeats": 1, "device": "cpu", "tokenizer": run.tokenizer}
    script.evaluate(script.EvaluateConfig(model=run.model, attention=run.attention, **how))
    assert {float(backend.current_alpha()) for model in models for backend in attention_backends(model)} == {1.5}


def test_what_is_wrong_at_several_places_is_said_once(tiny, evaluate):
    train(tiny(steps=1))
    with pytest.raises(ValueError) as error:
        evaluate(evals=["perplexity", "throughput"], seq_lens=[64, 64])
    (line,) = str(error.value).splitlines()
    assert line.startswith(
        "perplexity at 64, perplexity at 64, throughput at 64, throughput at 64: This model has 32 learned"
    )


@pytest.mark.parametrize(
    ("name", "value"), [("repeats", 0), ("stride", 0), ("max_tokens", 0), ("batch_tokens", -1), ("seq_lens", [0])]
)
def test_counts_are_checked_before_anything_is_done(script, name, value):
    with pytest.raises(ValueError, match=f"Expected {name} of at least 1"):
        from_mapping(script.EvaluateConfig, {"run_dir": "nowhere", name: value})


def test_something_is_to_be_evaluated(script):
    with pytest.raises(ValueError, match="Expected evals among perplexity, .*got none"):
        from_mapping(script.EvaluateConfig, {"run_dir": "nowhere", "evals": []})


def test_tokens_that_the_run_was_not_trained_on_are_refused(tiny, evaluate, tmp_path):
    train(tiny(steps=1))
    summary = tmp_path / "run" / "summary.json"
    other = save_tokenizer(tmp_path / "other")
    for ended in (True, False):
        with pytest.raises(ValueError, match="run' was trained with, bytes, got huggingface .*; leave tokenizer out"):
            evaluate(tokenizer={"kind": "huggingface", "name": str(other)})
        evaluate(tokenizer={"kind": "bytes"})  # the run's own, by name
        if ended:
            summary.unlink()


def test_a_tokenizer_that_has_changed_is_refused_and_a_moved_one_is_not(tiny, evaluate, tmp_path):
    folder = save_tokenizer(tmp_path / "before")
    train(tiny(steps=1, tokenizer={"kind": "huggingface", "name": str(folder)}))
    folder = folder.rename(tmp_path / "after")
    evaluate(tokenizer={"name": str(folder)})
    save_tokenizer(tmp_path / "before", "c")
    with pytest.raises(ValueError, match="which makes other tokens; name the folder of its own files: tokenizer.name="):
        evaluate()


def save_tokenizer(folder, *more):
    """A tokenizer of few words in a folder; it fits a model of the bytes tokenizer."""
    vocabulary = {word: number for number, word in enumerate(["<|endoftext|>", "unknown", "a", "b", *more])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="unknown"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def test_a_run_that_went_on_is_evaluated_at_its_newest_checkpoint(tiny, evaluate, tmp_path, monkeypatch, capsys):
    train(tiny(steps=2))
    exported = evaluate()[0][0]["loss"]
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_close", lambda *_: {})  # as if it were killed before
        train(tiny(steps=6))
    assert evaluate()[0][0]["loss"] < exported
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "checkpoints")
    capsys.readouterr()
    assert evaluate()[0][0]["loss"] == exported
    assert "holds no checkpoint; its export is evaluated" in capsys.readouterr().out
    shutil.move(tmp_path / "checkpoints", tmp_path / "run" / "checkpoints")
    train(tiny(steps=7))
    assert evaluate()[0][0]["loss"] < exported


def test_an_unfinished_run_is_evaluated_with_its_own_attention_by_name(tiny, evaluate, tmp_path):
    train(tiny(attention={"name": "adasplash", "alpha": 1.7}, steps=2))
    shutil.rmtree(tmp_path / "run" / "export")
    expected = evaluate()[0][0]["loss"]
    for same in ({"name": "adasplash"}, {"alpha": 1.7}, {"name": "adasplash", "alpha": 1.7, "alibi": "none"}):
        assert evaluate(attention=same)[0][0]["loss"] == expected
    for other in ({"name": "flash"}, {"alpha": 1.6}):
        with pytest.raises(ValueError, match="has not ended; another attention needs its export"):
            evaluate(attention=other)
