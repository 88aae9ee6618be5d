"""The typed configuration of a training run. Entry points hand in plain mappings; below here, only these dataclasses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..attention import BACKENDS, backend_options
from ..data import DataConfig, TokenizerConfig
from ..models import ModelConfig
from ..ops.checks import check_choice, nearest
from .optimizer import OptimConfig


def check_counts(config: Any, *names: str) -> None:
    """Raises ValueError for a number below 1 among the (dotted) names of a configuration; None is no number yet."""
    for name in names:
        value = operator.attrgetter(name)(config)
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} of at least 1, got {value}.")


@dataclass(frozen=True)
class AttentionConfig:
    """Which backend, and its options (see `python -m adasplash` and the backend's Options class)."""

    name: str = "flash"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        parsed = backend_options(self.name, self.options)
        # as their types say, so that alpha=2 and alpha=2.0 are one experiment
        object.__setattr__(self, "options", {key: getattr(parsed, key) for key in self.options})

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> AttentionConfig:
        """From {"name": ..., **options}, the form it has in configuration files."""
        options = dict(values)
        if options and "name" not in options:
            raise ValueError(f"attention.{next(iter(options))} belongs to a backend; name it too: attention=NAME.")
        return cls(options.pop("name", cls.name), options)


@dataclass(frozen=True)
class ParallelConfig:
    """kind: none (one process) | ddp (one process per GPU, started by torchrun)."""

    kind: str = "none"

    def __post_init__(self):
        check_choice("parallel", self.kind, ("none", "ddp"))


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints (None: a tenth of the run); keep: how many of the newest stay."""

    every: int | None = None
    keep: int = 2


@dataclass(frozen=True)
class EvalConfig:
    """every: steps between validations (None: a fifth of the run); tokens: validation tokens used each time."""

    every: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. None means: chosen by the device, see `with_device_defaults`.

    Args:
        seq_len: tokens per sequence.
        steps: optimiser steps.
        batch_tokens: tokens per step, over all ranks and accumulated micro-batches; a multiple of seq_len.
        micro_batch_tokens: tokens per forward pass of one rank, at least one sequence.
        precision: auto | fp32 | bf16 (autocast).
        compile: torch.compile; None: on a GPU.
        activation_checkpointing: keep only each layer's input for the backward pass.
        resume: auto (go on where this run stopped) | never (start anew, beside it) | folder of a run.
        init_from: folder of a transformers checkpoint to start from.
        wandb: off | offline | online.
        max_nonfinite: training stops after so many skipped steps (non-finite loss or gradient) in a row.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    seq_len: int | None = None
    steps: int | None = None
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    compile: bool | None = None
    activation_checkpointing: bool = False
    run_dir: str | None = None
    resume: str = "auto"
    init_from: str | None = None
    wandb: str = "off"
    log_every: int = 10
    max_nonfinite: int = 10

    def __post_init__(self):
        check_choice("device", self.device.split(":")[0], ("auto", "cpu", "cuda"))
        check_choice("precision", self.precision, ("auto", "fp32", "bf16"))
        check_choice("wandb", self.wandb, ("off", "offline", "online"))
        check_counts(self, "seq_len", "steps", "batch_tokens", "micro_batch_tokens", "log_every", "max_nonfinite")
        check_counts(self, "checkpoint.every", "checkpoint.keep", "eval.every", "eval.tokens")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"Expected seed of at least 0 and below 2**63, got {self.seed}.")
        if self.seq_len and self.batch_tokens and self.batch_tokens % self.seq_len:
            near = max(1, round(self.batch_tokens / self.seq_len)) * self.seq_len
            raise ValueError(
                f"Expected batch_tokens as a multiple of seq_len = {self.seq_len}, got {self.batch_tokens}; "
                f"the nearest is batch_tokens={near}."
            )

    def with_device_defaults(self, cuda: bool) -> TrainConfig:
        """The same configuration with every None and auto decided, for a run with or without a GPU."""
        seq_len = self.seq_len or (8192 if cuda else 512)
        steps = self.steps or (1000 if cuda else 120)

        def tokens(given: int | None, usual: int) -> int:
            return given or max(seq_len, usual // seq_len * seq_len)

        batch_tokens = tokens(self.batch_tokens, 131072 if cuda else 2048)
        return dataclasses.replace(
            self,
            seq_len=seq_len,
            steps=steps,
            batch_tokens=batch_tokens,
            micro_batch_tokens=tokens(self.micro_batch_tokens, 65536 if cuda else 4096),
            precision=self.precision if self.precision != "auto" else ("bf16" if cuda else "fp32"),
            compile=cuda if self.compile is None else self.compile,
            checkpoint=dataclasses.replace(self.checkpoint, every=self.checkpoint.every or max(1, steps // 10)),
            eval=dataclasses.replace(
                self.eval,
                every=self.eval.every or max(1, steps // 5),
                tokens=tokens(self.eval.tokens, 1 << 20 if cuda else 1 << 13),
            ),
        )

    def to_mapping(self) -> dict[str, Any]:
        """Plain, as written to config.yaml; attention's options stand beside its name there."""
        values = dataclasses.asdict(self)
        values["attention"] = {"name": self.attention.name, **self.attention.options}
        values["optim"]["betas"] = list(self.optim.betas)
        return values

    def run_name(self) -> str:
        """The same for the same experiment, so that starting it again finds its run folder."""
        values = self.to_mapping()
        for key in ("run_dir", "resume", "wandb", "log_every", "device", "compile", "checkpoint", "parallel"):
            values.pop(key)
        values["data"].pop("cache_dir", None)
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
        return f"{self.model.name}-{self.attention.name}-{self.seq_len}-{digest}"


def valid_keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """All dotted keys of a configuration class and their types, attention's options of every backend included."""
    keys = {}
    for name, hint in typing.get_type_hints(cls).items():
        keys[prefix + name] = hint
        candidates = [a for a in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(a)]
        if AttentionConfig in candidates:
            options = {f.name for backend in BACKENDS.values() for f in dataclasses.fields(backend.Options)}
            keys |= {f"{prefix}{name}.{option}": Any for option in sorted(options | {"name"})}
        elif candidates:
            keys |= valid_keys(candidates[0], f"{prefix}{name}.")
    return keys


def groups_of(configs: Path) -> dict[str, list[str]]:
    """Configuration groups and the names of their members, from a folder of YAML files."""
    folders = sorted(folder for folder in configs.iterdir() if folder.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


# Hydra's options whose value is the next word.
HYDRA_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"}
HYDRA_WITH_VALUE |= {"--config-dir", "-cd", "--experimental-rerun", "--info", "-i"}


def check_overrides(overrides: list[str], cls: type, groups: dict[str, list[str]]) -> list[str]:
    """Checks `key=value` words of a command line before they are composed.

    Args:
        groups: configuration groups and the names of their files.

    Returns:
        The words as Hydra takes them: `++` before each typed key, so that it can be set whether or not a file lists it,
        and quotes around a text (the pattern of a path, say) with brackets in it.

    Raises:
        ValueError: for an unknown key or group member, with the nearest valid one; for words, lists and several values
            that Hydra would take for something else, with what to write.
    """
    keys = valid_keys(cls)
    free = tuple(f"{key}." for key, hint in _free_mappings(cls))
    sweep = any(word in ("-m", "--multirun") or word.startswith("hydra.mode=") for word in overrides)
    checked = []
    for before, word, after in zip(["", *overrides], overrides, [*overrides[1:], ""], strict=False):
        key, equals, value = word.lstrip("+~").partition("=")
        alone = after if after and not after.startswith("-") and "=" not in after else "VALUE"
        if before in HYDRA_WITH_VALUE or key.split(".")[0] == "hydra":
            checked.append(word)
            continue
        if word.startswith("-"):
            key = key.lstrip("-").replace("-", "_")
            if key in keys or key in groups or key.startswith(free):
                raise ValueError(
                    f"Expected key=value without dashes, got '{word}'; write {key}={value if equals else alone}."
                )
            checked.append(word)
            continue
        if not equals and not word.startswith("~"):
            known = [k for k in [*keys, *groups] if k == key or k.endswith(f".{key}")]
            hint = f" Did you mean '{known[0]}={alone}'?" if known else nearest(word, [*keys, *groups])
            raise ValueError(f"Expected key=value on the command line, got '{word}'.{hint}")
        if key in groups:
            members = value.split(",") if equals and not any(c in value for c in "([{") else []
            for member in (text.strip(" '\"") for text in members):
                if member not in groups[key] and member != "null":
                    raise ValueError(
                        f"Unknown {key} '{member}'; expected one of {', '.join(sorted(groups[key]))}."
                        f"{nearest(member, groups[key])}"
                    )
        elif key not in keys and not key.startswith(free):
            by_end = [k for k in keys if k.split(".")[-1] == key]
            group, _, name = key.rpartition(".")
            beside = [k.removeprefix(f"{group}.") for k in keys if group and k.rpartition(".")[0] == group]
            if by_end:
                hint = f" Did you mean '{by_end[0]}'?"
            elif beside and not nearest(name, beside):  # 'optim.eps' is near 'optim.lr' for what both begin with
                hint = f" {group} has {', '.join(beside)}."
            else:
                hint = nearest(key, [*keys, *groups])
            raise ValueError(f"Unknown configuration key '{key}'.{hint}")
        elif not word.startswith("~"):
            _check_list(key, keys.get(key), value)
            choices = sweep and re.match(r"\w+\(", value)  # as choice(a,b), range(1,9)
            if (
                keys.get(key) in (str, str | None)
                and set(value) & set("()[]{}=")
                and not (set(value) & set(",'\"") or choices)
            ):
                value = f"'{value}'"
            word = f"++{key}={value}"
        if not sweep and _is_several(value):
            files = " Several files are given as a folder or a pattern, such as 'texts/*.txt'."
            raise ValueError(
                f"Several values of {key}, got {value}, need -m, which does one after another; without it give one."
                f"{files if key.endswith('path') else ''}"
            )
        checked.append(word)
    return checked


def _check_list(key: str, hint: Any, value: str) -> None:
    """Raises ValueError for a value without brackets where a list belongs."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) in (list, tuple)]
    if not kinds or value in ("", "null") or any(c in value for c in "[($"):
        return
    items = value.split(",")
    if typing.get_origin(kinds[0]) is tuple and len(items) < len(typing.get_args(kinds[0])):
        items.append("...")
    raise ValueError(f"Expected {key} as a list, got {value}; write {key}=[{','.join(items)}].")


def _is_several(value: str) -> bool:
    """Whether Hydra takes it for several values: with a comma outside of brackets and quotes."""
    depth, quote, before = 0, "", ""
    for character in value:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "," and not depth and before != "\\":
            return True
        else:
            depth += (character in "([{") - (character in ")]}")
        before = character
    return False


def _free_mappings(cls: type, prefix: str = ""):
    """Fields whose keys are not known here (model.config belongs to transformers)."""
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) is dict:
            yield prefix + name, hint
        for candidate in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(candidate) and candidate is not AttentionConfig:
                yield from _free_mappings(candidate, f"{prefix}{name}.")
