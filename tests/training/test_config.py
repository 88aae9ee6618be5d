"""The typed border: keys, types, defaults, and the run's name."""

import dataclasses
import re
from pathlib import Path

import pytest

from adasplash.training import TrainConfig, check_overrides, from_mapping, groups_of

ROOT = Path(__file__).parents[2]
GROUPS = groups_of(ROOT / "configs")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"seqlen": 3}, "'seqlen'. Did you mean 'seq_len'"),
        ({"optim": {"learnin_rate": 3}}, "'optim.learnin_rate'. Did you mean 'learning_rate'"),
        ({"steps": "many"}, "steps of type int, got 'many'"),
        ({"steps": True}, "steps of type int, got True"),
        ({"steps": 0}, "steps of at least 1, got 0"),
        ({"attention": {"name": "adaspash"}}, "Did you mean 'adasplash'"),
        ({"attention": {"name": "adasplash", "alhpa": 1.5}}, "Did you mean 'alpha'"),
        ({"attention": {"name": "adasplash", "alpha": 3.0}}, "1 < alpha <= 2"),
        ({"attention": {"alpha": 1.25}}, "name it too: attention=NAME"),
        (
            {"attention": {"name": "adasplash", "learn_alpha": "no"}},
            "learn_alpha of type bool (true or false), got 'no'",
        ),
        ({"attention": "flash"}, "Expected attention of type AttentionConfig, got 'flash'"),
        ({"wandb": "yes"}, "off, offline, online"),
        ({"seq_len": 48, "batch_tokens": 100}, "nearest is batch_tokens=96"),
        ({"optim": {"betas": [0.9]}}, "Expected optim.betas as a list of 2, got [0.9]."),
        ({"seed": -1}, "seed of at least 0 and below 2**63, got -1"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep of at least 1"),
    ],
)
def test_bad_values_are_told_in_a_sentence(values, told):
    with pytest.raises(ValueError) as error:
        from_mapping(TrainConfig, values)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("attention=adaspash", "Did you mean 'adasplash'"),
        ("attention=flash,sofmax", "Did you mean 'softmax'"),
        ("seqlen=3", "Did you mean 'seq_len'"),
        ("path=x", "Did you mean 'data.path'"),
        ("optim.lr=1", "'optim.lr'. optim has kind, learning_rate, "),
        ("attention.alhpa=2", "Did you mean 'attention.alpha'"),
        ("attention", "Expected key=value on the command line, got 'attention'. Did you mean 'attention=VALUE'?"),
        ("seq_len 128", "got 'seq_len'. Did you mean 'seq_len=128'?"),
        ("seq_len seed=1", "got 'seq_len'. Did you mean 'seq_len=VALUE'?"),
        ("learning_rate 0.1", "Did you mean 'optim.learning_rate=0.1'?"),
        ("--seq_len=128", "write seq_len=128."),
        ("--seq-len 128", "write seq_len=128."),
        ("--attention=flash", "write attention=flash."),
        ("--model.config.n_layer=2", "write model.config.n_layer=2."),
        ("optim.betas=0.9", "Expected optim.betas as a list, got 0.9; write optim.betas=[0.9,...]."),
        ("optim.betas=0.9,0.98", "write optim.betas=[0.9,0.98]."),
        ("attention=softmax,flash", "Several values of attention, got softmax,flash, need -m"),
        ("seq_len=8192,16384", "Several values of seq_len, got 8192,16384, need -m"),
        ("data.path=a,b", "need -m, which does one after another; without it give one. Several files are given as a"),
    ],
)
def test_command_line_typos_name_the_nearest(word, told):
    with pytest.raises(ValueError) as error:
        check_overrides(word.split(), TrainConfig, GROUPS)
    assert told in str(error.value)


@dataclasses.dataclass(frozen=True)
class Lengths:
    seq_lens: list[int] | None = None


@pytest.mark.parametrize(("value", "list_of"), [("256", "[256]"), ("256,512", "[256,512]")])
def test_a_list_without_brackets_is_told_how_to_write_it(value, list_of):
    with pytest.raises(ValueError, match=re.escape(f"as a list, got {value}; write seq_lens={list_of}.")):
        check_overrides([f"seq_lens={value}"], Lengths, {})
    for right in (list_of, "null", "[256],[512]"):
        assert check_overrides(["-m", f"seq_lens={right}"], Lengths, {}) == ["-m", f"++seq_lens={right}"]


@pytest.mark.parametrize(
    "words",
    [
        "--cfg job",
        "--config-dir folder --multirun",
        "-m attention=softmax,flash",
        "attention=softmax,flash --multirun",
        "hydra.mode=MULTIRUN attention=softmax,flash",
        "--help",
        "--info",
        "++hydra.verbose=true",
        "+hydra.job.name=x",
        "~hydra.job.name",
        "~experiment",
        "attention='flash'",
    ],
)
def test_options_of_hydra_pass(words):
    assert check_overrides(words.split(), TrainConfig, GROUPS) == words.split()


def test_commas_in_brackets_and_quotes_are_of_one_value():
    words = ["run_dir='a,b'", "optim.betas=[0.9,0.99]", "model.config={n_layer: 2, n_head: 2}", r"data.path=a\,b"]
    assert check_overrides(words, TrainConfig, GROUPS) == [f"++{word}" for word in words]


def test_right_command_lines_pass_and_any_typed_key_can_be_set():
    """`++` is how a key is set that no YAML file lists."""
    words = ["-m", "attention=softmax,flash", "hydra.verbose=true", "experiment=null", "~optim.betas"]
    words += ["seq_len=8192,16384", "attention.alpha=1.25", "+model.config.n_layer=2", "optim.betas=[0.9,0.99]"]
    words += ["data.path=choice(a,b)", "data.path=a=b", "data.path=texts (old)/[0-9].txt", "run_dir='a (b)'"]
    expected = words[:5] + ["++" + word.lstrip("+") for word in words[5:]]
    expected[-3:-1] = ["++data.path='a=b'", "++data.path='texts (old)/[0-9].txt'"]
    assert check_overrides(words, TrainConfig, GROUPS) == expected


def test_mapping_round_trip():
    config = from_mapping(
        TrainConfig, {"attention": {"name": "adasplash", "alpha": 1.25}, "optim": {"betas": [0.8, 0.9]}}
    )
    assert from_mapping(TrainConfig, config.to_mapping()) == config
    assert config.optim.betas == (0.8, 0.9)


def test_defaults_follow_the_device():
    cpu, gpu = (TrainConfig().with_device_defaults(cuda) for cuda in (False, True))
    assert (cpu.precision, cpu.compile, gpu.precision, gpu.compile) == ("fp32", False, "bf16", True)
    for config in (cpu, gpu, TrainConfig(seq_len=16384).with_device_defaults(False)):
        assert config.batch_tokens % config.seq_len == 0 and config.batch_tokens >= config.seq_len
        assert config.with_device_defaults(False) == config  # decided once


def test_run_name_follows_the_experiment_and_nothing_else():
    config = TrainConfig().with_device_defaults(False)
    same = dataclasses.replace(config, wandb="offline", run_dir="elsewhere", resume="never", log_every=1)
    assert same.run_name() == config.run_name()
    assert dataclasses.replace(config, seed=1).run_name() != config.run_name()
    whole, fraction = (from_mapping(TrainConfig, {"attention": {"name": "adasplash", "alpha": a}}) for a in (2, 2.0))
    assert whole.run_name() == fraction.run_name()


def test_every_configuration_file_composes_into_a_typed_one():
    pytest.importorskip("hydra")
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for group, members in GROUPS.items():
            for member in members:
                extra = {"files": ["data.path=x"], "hub": ["data.name=x"], "huggingface": ["tokenizer.name=x"]}
                model = [] if group == "model" else ["model=small"]
                overrides = [*model, f"{group}={member}", *extra.get(member, [])]
                composed = compose("train", overrides)
                values = OmegaConf.to_container(composed, resolve=True)
                from_mapping(TrainConfig, values)
