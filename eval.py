"""Evaluate: python eval.py run_dir=runs/NAME seq_lens=[8192,16384]   (perplexity and throughput of a trained run)
python eval.py model=gpt2 attention=adasplash seq_lens=[8192,16384] evals=[throughput]   (untrained: throughput alone)

Hydra composes configs/eval.yaml with the command line; results land in results.json of the run folder.
Several jobs: python eval.py -m run_dir=runs/ONE,runs/OTHER
"""

import functools
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from adasplash.attention import Options, backend_options
from adasplash.attention.huggingface import attention_backends
from adasplash.data import DataConfig, Tokenizer, TokenizerConfig, build_tokenizer, keep_documents_apart, prepare
from adasplash.evaluation import (
    measure_perplexity,
    measure_sparsity,
    measure_throughput,
    merge_results,
    plot_perplexity_by_position,
    print_tables,
    result_row,
    result_tables,
)
from adasplash.models import ModelConfig, build_model, from_pretrained
from adasplash.ops.checks import check_choice
from adasplash.training import Jobs, TrainConfig, check_overrides, from_mapping, groups_of, read_config, read_summary
from adasplash.training.checkpoint import load, newest, training_state
from adasplash.training.config import AttentionConfig, check_counts
from adasplash.training.hardware import device_name

CONFIGS = Path(__file__).parent / "configs"
EVALUATIONS = ("perplexity", "sparsity", "throughput")

jobs = Jobs("eval.py", "eval-failed")


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate: a run (run_dir), or an untrained model.

    Args:
        evals: of perplexity, sparsity (of attention, by layer and head), throughput.
        seq_lens: lengths to measure; by default the run's own, or 8192 and 16384.
        stride: of the perplexity windows; by default disjoint windows.
        max_tokens: of the validation text; by default all of it.
        batch_tokens: tokens per forward pass; by default one sequence.
        attention, data, tokenizer: others than the run's own, or single options of them that differ. Documents are kept
            apart, or not, as the run was trained (data.cross_document).
    """

    run_dir: str | None = None
    evals: list[str] = field(default_factory=lambda: ["perplexity", "throughput"])
    seq_lens: list[int] | None = None
    stride: int | None = None
    max_tokens: int | None = None
    batch_tokens: int | None = None
    repeats: int = 5
    device: str = "auto"
    precision: str = "auto"
    compile: bool | None = None
    seed: int = 0
    model: ModelConfig | None = None
    attention: AttentionConfig | None = None
    data: DataConfig | None = None
    tokenizer: TokenizerConfig | None = None

    def __post_init__(self):
        if not self.evals:
            raise ValueError(f"Expected evals among {', '.join(EVALUATIONS)}, got none.")
        for name in self.evals:
            check_choice("evaluation", name, EVALUATIONS)
        check_choice("device", self.device.split(":")[0], ("auto", "cpu", "cuda"))
        check_choice("precision", self.precision, ("auto", "fp32", "bf16"))
        if (self.run_dir is None) == (self.model is None):
            raise ValueError("Expected either run_dir=FOLDER of a trained run, or model=NAME for an untrained one.")
        if self.run_dir is None and set(self.evals) - {"throughput"}:
            raise ValueError("An untrained model has nothing but throughput worth measuring; use evals=[throughput].")
        check_counts(self, "stride", "max_tokens", "batch_tokens", "repeats")
        if any(length < 1 for length in self.seq_lens or []):
            raise ValueError(f"Expected seq_lens of at least 1, got {self.seq_lens}.")


def with_the_runs_own(values: dict) -> dict:
    """Single options of attention, data or tokenizer change the run's own; one that is chosen by name replaces it."""
    if not values["run_dir"]:
        return values
    run = read_config(Path(values["run_dir"])).to_mapping()
    chosen_by = {"attention": "name", "data": "source", "tokenizer": "kind"}
    changed = [key for key, chosen in chosen_by.items() if values.get(key) and chosen not in values[key]]
    if values.get("attention") and values["attention"].get("name") == run["attention"]["name"]:
        changed.append("attention")  # a checkpoint's own backend keeps its options, as `from_pretrained` has it
    return values | {key: run[key] | values[key] for key in changed}


def trained_model(run_dir: Path, run: TrainConfig, attention: AttentionConfig | None):
    """The run's exported model, or that of its newest checkpoint where it has not ended; with another attention if asked."""
    chosen = (attention.name, attention.options) if attention else (None, {})
    checkpoint = newest(run_dir / "checkpoints")
    ended = read_summary(run_dir).get("status") == "finished"  # a run that goes on keeps its export until it ends again
    if (run_dir / "export" / "config.json").exists() and (ended or checkpoint is None):
        if not ended:
            print(
                "The run has not ended and holds no checkpoint; its export is evaluated, of where it had ended before."
            )
        return from_pretrained(run_dir / "export", chosen[0], **chosen[1])
    if checkpoint is None:
        raise ValueError(
            f"'{run_dir}' holds no model yet: neither export/ nor a checkpoint. Train on: resume={run_dir}"
        )
    if attention and typed_attention(attention) != typed_attention(run.attention):
        raise ValueError(f"'{run_dir}' has not ended; another attention needs its export. Train on: resume={run_dir}")
    tokenizer = build_tokenizer(run.tokenizer)
    how = {"vocab_size": tokenizer.vocab_size, "end_token": tokenizer.end_token, "seq_len": run.seq_len}
    model = build_model(run.model, attention=run.attention.name, options=run.attention.options, **how)
    print(f"The run has not ended; its newest checkpoint is evaluated: {checkpoint}")
    step = load(checkpoint, training_state(model, []), part="model/")["step"]
    for backend in attention_backends(model):
        backend.set_step(step)
    return model


def typed_attention(attention: AttentionConfig) -> tuple[str, Options]:
    """Name and options with every default in its place, so that an option named at its default makes no other attention."""
    return attention.name, backend_options(attention.name, attention.options)


def tokenizer_of_run(run_dir: Path, run: TrainConfig, chosen: TokenizerConfig | None) -> Tokenizer:
    """The run's tokenizer, or the chosen one if it makes the same tokens, as one in a moved folder does."""
    tokenizer = build_tokenizer(chosen or run.tokenizer)
    fingerprint = read_summary(run_dir).get("tokenizer", {}).get("fingerprint")  # its files may have changed since
    if tokenizer.fingerprint != (fingerprint or build_tokenizer(run.tokenizer).fingerprint):
        todo = "leave tokenizer out" if chosen else "name the folder of its own files: tokenizer.name=FOLDER"
        raise ValueError(
            f"Expected the tokenizer that '{run_dir}' was trained with, {tokenizer_name(run.tokenizer)}, got "
            f"{tokenizer_name(chosen or run.tokenizer)}, which makes other tokens; {todo}."
        )
    return tokenizer


def tokenizer_name(tokenizer: TokenizerConfig) -> str:
    return " ".join(filter(None, (tokenizer.kind, tokenizer.name)))


def results_folder(config: EvaluateConfig) -> Path:
    if config.run_dir:
        return Path(config.run_dir)
    return Path("runs") / f"untrained-{config.model.name}-{(config.attention or AttentionConfig()).name}"


def evaluate(config: EvaluateConfig) -> list[dict]:
    """Measures, writes results.json and a plot, prints the tables; returns the new rows."""
    cuda = torch.cuda.is_available() if config.device == "auto" else config.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch finds no GPU here; use device=cpu or device=auto.")
    device = torch.device(config.device if config.device != "auto" else ("cuda" if cuda else "cpu"))
    precision = config.precision if config.precision != "auto" else ("bf16" if cuda else "fp32")
    autocast = torch.bfloat16 if precision == "bf16" else None
    compiled = cuda if config.compile is None else config.compile
    torch.manual_seed(config.seed)
    on_text = [name for name in ("perplexity", "sparsity") if name in config.evals]

    folder = results_folder(config)
    if config.run_dir:
        run = read_config(folder)
        tokenizer = config.tokenizer or run.tokenizer
        data = config.data or run.data
        attention = config.attention or run.attention
        seq_lens = config.seq_lens or [run.seq_len]
        name = run.model.name
        # throughput alone needs no tokenizer, which may be on another machine
        encoder = tokenizer_of_run(folder, run, config.tokenizer) if on_text or config.tokenizer else None
        model = trained_model(folder, run, config.attention)
    else:
        # the vocabulary decides a good part of the speed: GPT-2's own, unless a tokenizer is named
        tokenizer = config.tokenizer or TokenizerConfig("tiktoken", "gpt2")
        data = None
        attention = config.attention or AttentionConfig()
        seq_lens = config.seq_lens or [8192, 16384]
        name = config.model.name
        vocab_size = build_tokenizer(config.tokenizer).vocab_size if config.tokenizer else 50257
        how = {"vocab_size": vocab_size, "end_token": vocab_size - 1, "seq_len": max(seq_lens)}
        model = build_model(config.model, attention=attention.name, options=attention.options, **how)
        for backend in attention_backends(model):
            backend.set_step(10**9)  # nothing was trained: schedules are taken as over
    model.to(device)
    if compiled:
        model.base_model.compile(dynamic=False)

    facts = {
        "model": name,
        "attention": attention.name,
        "attention_options": attention.options,
        "tokenizer": tokenizer_name(tokenizer),
        "device": device_name(device),
        "dtype": precision,
        "compile": compiled,
    }
    rows, failures = [], {}  # failures: what is wrong, and where
    batch_size = {length: max(1, (config.batch_tokens or length) // length) for length in seq_lens}
    if on_text:
        text = prepare(data, encoder).validation
        apart = None if data.cross_document else functools.partial(keep_documents_apart, end_token=encoder.end_token)
        where = {"data": data.path or data.name or data.source, "cross_document": data.cross_document}
        for what, length in itertools.product(on_text, seq_lens):
            how = {"seq_len": length, "device": device, "autocast": autocast, "keep_documents_apart": apart}
            try:
                if what == "sparsity":
                    measured = measure_sparsity(model, text, **how)
                else:
                    how |= {"stride": config.stride, "max_tokens": config.max_tokens, "batch_size": batch_size[length]}
                    measured = measure_perplexity(model, text, **how)
            except ValueError as error:
                failures.setdefault(str(error), []).append(f"{what} at {length}")
                continue
            rows.append(result_row(measured, **facts, **where))
    if "throughput" in config.evals:
        for length in seq_lens:
            for backward in (False, True):
                how = {"batch_size": batch_size[length], "vocab_size": model.config.vocab_size, "device": device}
                how |= {"autocast": autocast, "backward": backward, "repeats": config.repeats}
                try:
                    rows.append(result_row(measure_throughput(model, seq_len=length, **how), **facts))
                except ValueError as error:
                    failures.setdefault(str(error), []).append(f"throughput at {length}")
                    break
    if rows:
        folder.mkdir(parents=True, exist_ok=True)
        merged = merge_results(folder / "results.json", rows)
        print_tables(result_tables(rows))
        print(f"Written: {folder / 'results.json'}")
        if plot := plot_perplexity_by_position(merged, folder / "plots" / "perplexity_by_position.png"):
            print(f"         {plot}")
    if failures:
        raise ValueError("\n".join(f"{', '.join(where)}: {what}" for what, where in failures.items()))
    return rows


@hydra.main(version_base="1.3", config_path="configs", config_name="eval")
def main(composed: DictConfig) -> None:
    values = OmegaConf.to_container(composed, resolve=True)
    hydra_config = HydraConfig.get()

    def work() -> dict[str, str]:
        config = from_mapping(EvaluateConfig, with_the_runs_own(values))
        evaluate(config)
        return {"status": "evaluated", "run_dir": str(results_folder(config))}

    jobs.run(work, hydra_config.overrides.task, sweep=hydra_config.mode == RunMode.MULTIRUN)


if __name__ == "__main__":
    try:
        sys.argv[1:] = check_overrides(sys.argv[1:], EvaluateConfig, groups_of(CONFIGS))
    except ValueError as error:
        sys.exit(f"Error: {error}")
    try:
        main()
    except KeyboardInterrupt:
        jobs.report()
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if jobs.report() else 0)
