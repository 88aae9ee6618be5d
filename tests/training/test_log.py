"""What a run says stays readable, whatever happens to the run or to wandb."""

import json
import math
import sys
import types

import pytest

from adasplash.training.log import NullLog, RunLog, read_metrics


def open_log(folder, **changes):
    values = {"wandb": "off", "config": {"a": 1}, "name": "x", "wandb_id": None, "resume_step": 0}
    values |= {"validates_first": True, "total_steps": 10}
    return RunLog(folder, **values | changes)


class FakeWandb(types.ModuleType):
    """Remembers what it is told; breaks where asked."""

    def __init__(self, breaks: str | None = None, error: BaseException | None = None):
        super().__init__("wandb")
        self.breaks, self.error, self.id = breaks, error or RuntimeError("no network"), "abc"
        self.calls = []

    def _call(self, called, /, *positional, **named):
        self.calls.append((called, positional, named))
        if called == self.breaks:
            raise self.error
        return self

    def __getattr__(self, name):
        if name not in ("init", "define_metric", "log", "finish"):
            raise AttributeError(name)
        return lambda *positional, **named: self._call(name, *positional, **named)

    def named(self, name):
        return [(positional, named) for called, positional, named in self.calls if called == name]


def test_rows_are_in_the_file_at_once(tmp_path):
    with open_log(tmp_path) as log:
        for step in (1, 2):
            log.log(step, {"train/loss": 1.0 / step})
            assert read_metrics(tmp_path)[-1] == {"step": step, "train/loss": 1.0 / step}
    assert read_metrics(tmp_path / "nowhere") == []


def test_numbers_that_are_not_finite_are_null(tmp_path, capsys):
    with open_log(tmp_path) as log:
        log.log(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 1e-3})
        log.log(2, {"val/loss": math.inf, "val/perplexity": math.inf, "val/bits_per_byte": 1.0})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 1, "train/loss": None, "train/grad_norm": None, "train/lr": 1e-3}
    assert "loss not finite" in capsys.readouterr().out


def test_resuming_drops_what_is_written_again(tmp_path):
    with open_log(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, {"train/loss": float(step)})
        log.log(3, {"val/loss": 3.0})
    with open_log(tmp_path, resume_step=3) as log:
        log.log(3, {"val/loss": 3.5})
        log.log(4, {"train/loss": 4.5})
    assert [row.get("train/loss", row.get("val/loss")) for row in read_metrics(tmp_path)] == [1, 2, 3, 3.5, 4.5]


def test_a_line_torn_by_a_kill_is_left_out_and_does_not_spoil_the_next(tmp_path):
    with open_log(tmp_path) as log:
        log.log(1, {"train/loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('[]\n{"step": 2, "train/lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    with open_log(tmp_path, resume_step=1) as log:
        log.log(2, {"train/loss": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_plain_lines_are_also_in_the_text_file(tmp_path, capsys):
    with open_log(tmp_path) as log:
        log.print("[bold]hello[/bold]")  # no markup
        log.log(5, {"train/loss": 2.5, "perf/tokens_per_s": 12345.6})
        log.log(5, {"val/loss": 2.0, "val/perplexity": 7.4, "val/bits_per_byte": 1.2})
        log.log(6, {"attention/density/layer00": 0.1})  # a row without a loss is a row as well
        log.finish({"status": "finished", "step": 6, "val/loss": 2.0}, ["plots/losses.png"])
    said, written = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    for line in written.splitlines():
        assert line in said
    assert "[bold]hello[/bold]" in written
    assert "loss 2.5000  12,346 tokens/s" in written and "val/loss 2.0000  perplexity 7.4000" in written
    assert "plots/losses.png" in written and f"run_dir={tmp_path}" in written


def test_a_terminal_shows_one_live_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with open_log(tmp_path) as log:
        log.log(1, {"train/loss": 2.5})
        assert log.live is not None
        log.finish({"status": "stopped", "step": 1, "train/loss": 2.5}, [])
        assert log.live is None  # not drawn over the table
    assert "stopped" in capsys.readouterr().out
    assert "loss 2.5000" in (tmp_path / "log.txt").read_text()


def test_time_left_follows_the_pace_since_the_start(tmp_path, monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr("adasplash.training.log.time.monotonic", lambda: clock[0])
    with open_log(tmp_path, resume_step=4) as log:
        clock[0] += 60
        log.log(6, {"train/loss": 1.0})  # two steps in a minute, four to go
    assert "2m00s left" in capsys.readouterr().out


def test_wandb_gets_every_row_over_our_steps(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with open_log(tmp_path, wandb="offline", wandb_id="abc") as log:
        log.log(3, {"train/loss": 1.5})
        assert log.wandb_id == "abc"
    ((_, started),) = fake.named("init")
    assert (started["mode"], started["id"], started["name"], started["config"]) == ("offline", "abc", "x", {"a": 1})
    assert fake.named("define_metric") == [(("step",), {}), (("*",), {"step_metric": "step"})]
    assert fake.named("log") == [(({"step": 3, "train/loss": 1.5},), {})]
    assert fake.named("finish") == [((), {"exit_code": 0})]


def test_wandb_is_told_of_a_failed_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ZeroDivisionError), open_log(tmp_path, wandb="offline"):
        raise ZeroDivisionError
    assert fake.named("finish") == [((), {"exit_code": 1})]


@pytest.mark.parametrize("error", [RuntimeError("no network"), SystemExit(1)])
@pytest.mark.parametrize("breaks", ["init", "define_metric", "log", "finish"])
def test_wandb_never_ends_a_run(tmp_path, monkeypatch, capsys, breaks, error):
    fake = FakeWandb(breaks, error)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with open_log(tmp_path, wandb="online") as log:
        for step in (1, 2, 3):
            log.log(step, {"train/loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().out.count("Warning: wandb is off") == 1
    assert len(fake.named(breaks)) == 1  # not asked again


def test_a_missing_wandb_is_told_with_the_command_that_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with open_log(tmp_path, wandb="offline") as log:
        log.log(1, {"train/loss": 1.0})
    assert "pip install 'adasplash-lm[wandb]'" in capsys.readouterr().out
    assert len(read_metrics(tmp_path)) == 1


def test_wandb_is_not_imported_unless_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail, and be told
    with open_log(tmp_path):
        pass
    assert "wandb" not in capsys.readouterr().out


def test_other_ranks_say_nothing(capsys):
    public = {name for name in vars(RunLog) if not name.startswith("_")}
    assert public <= set(dir(NullLog))
    with NullLog() as log:
        log.log(1, {"train/loss": 1.0})
        log.print("x")
        log.finish({}, [])
    assert capsys.readouterr().out == ""
