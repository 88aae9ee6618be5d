"""One training run: evaluate, save, stop, step, log."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attention.huggingface import attention_backends
from ..data import IGNORE_INDEX, Loader, build_tokenizer, prepare
from ..models import build_model, export, summed_loss, training_flops_per_token
from . import checkpoint
from .config import TrainConfig
from .hardware import device_name, peak_flops
from .log import NullLog, RunLog, read_metrics
from .optimizer import build_optimizers, learning_rate_factor, set_learning_rate
from .parallel import Ranks, exchange_gradients, parallelize, start_ranks
from .plots import plot_density, plot_losses
from .run_folder import (
    check_it_can_go_on,
    choose_folder,
    hold,
    read_config,
    read_summary,
    remove_summary,
    write_config,
    write_summary,
)
from .validation import Validation, unigram_entropy

SPARSE = ("adasplash", "hash_sparse", "qk_sparse")


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class LanguageModelLoss(nn.Module):
    """Summed token loss as a module's forward: what is compiled, and what data parallelism wraps."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor, position_ids: Tensor | None) -> Tensor:
        return summed_loss(self.model, input_ids, targets, position_ids)


class StopSignal:
    """Remembers SIGINT and SIGTERM, so that the loop can save before it stops; a second one stops at once."""

    def __init__(self):
        self.received: int | None = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _receive(self, number, frame):
        self.received = number
        signal.signal(number, self.before[number])

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def micro_batch_size(sequences: int, most: int) -> int:
    """The largest divisor of `sequences` that is at most `most`."""
    return next(size for size in range(max(1, min(sequences, most)), 0, -1) if sequences % size == 0)


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains as configured, or goes on where the same run stopped.

    Returns:
        The summary that also stands in the run folder's summary.json; its "status" is finished, or stopped where a
        signal came.

    Raises:
        ValueError: for settings or data that do not fit; nothing was started then.
        TrainingDiverged: if the loss or gradient stays non-finite.
    """
    with start_ranks(config.parallel, config.device) as ranks:
        config = config.with_device_defaults(ranks.device.type == "cuda")
        folder = choose_folder(config)
        summary = read_summary(folder)
        if summary.get("status") == "finished" and summary["step"] > config.steps:
            raise ValueError(
                f"Expected steps of at least {summary['step']}, where '{folder}' is finished, got {config.steps}; "
                "use resume=never to train fewer steps beside it."
            )
        if summary.get("status") == "finished" and summary["step"] == config.steps:
            if ranks.first:
                loss = summary.get("val/loss")
                print(
                    f"'{folder}' is finished (step {summary['step']}, val/loss "
                    f"{'not finite' if loss is None else format(loss, '.4f')}). "
                    "Use resume=never to train again beside it, or other settings."
                )
            return summary
        check_it_can_go_on(folder)
        ranks.barrier()  # all have looked for the folder before the first makes it
        with _held(folder, ranks):
            return _Run(config, folder, ranks).train()


@contextlib.contextmanager
def _held(folder: Path, ranks: Ranks) -> Iterator[None]:
    """`hold` by the first rank; where it is refused all ranks raise, so that none waits for another."""
    with contextlib.ExitStack() as stack:
        refusal = None
        if ranks.first:
            try:
                stack.enter_context(hold(folder))
            except ValueError as error:
                refusal = error
        (refused,) = ranks.sum(refusal is not None)
        if refused:
            raise refusal or ValueError("The first process was refused the run folder; see there.")
        yield


class _Run:
    """The parts of a run, put together in the order in which data flows; `train` is the loop."""

    def __init__(self, config: TrainConfig, folder: Path, ranks: Ranks):
        self.config, self.folder, self.ranks = config, folder, ranks
        self.autocast = functools.partial(
            torch.autocast, ranks.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"
        )
        if config.batch_tokens % (config.seq_len * ranks.world_size):
            raise ValueError(
                f"Expected batch_tokens as a multiple of seq_len x processes = {config.seq_len} x {ranks.world_size}, "
                f"got {config.batch_tokens}."
            )
        self.sequences = config.batch_tokens // config.seq_len // ranks.world_size  # per step, of this rank
        self.micro_batch = micro_batch_size(self.sequences, config.micro_batch_tokens // config.seq_len)

        tokenizer = build_tokenizer(config.tokenizer)
        # before the text is prepared, which may take hours: what is wrong with the model is told at once
        torch.manual_seed(config.seed)
        self.model = build_model(
            config.model,
            vocab_size=tokenizer.vocab_size,
            end_token=tokenizer.end_token,
            seq_len=config.seq_len,
            attention=config.attention.name,
            options=config.attention.options,
            init_from=config.init_from,
        )
        if not ranks.first:
            ranks.barrier()  # the first rank prepares, the others find it done
        tokens = prepare(config.data, tokenizer, announce=print if ranks.first else lambda message: None)
        if ranks.first:
            ranks.barrier()
        loader = functools.partial(
            Loader, seq_len=config.seq_len, end_token=tokenizer.end_token, cross_document=config.data.cross_document
        )
        self.loader = loader(tokens.train, seed=config.seed)
        self.validation_tokens = tokens.validation
        self.fingerprints = {"text": tokens.fingerprint, "tokenizer": tokenizer.fingerprint}
        self.validation = Validation(
            loader(tokens.validation, seed=0, shuffle=False),
            tokens.validation,
            sequences=config.eval.tokens // config.seq_len,
            micro_batch=max(1, config.micro_batch_tokens // config.seq_len),
            ranks=ranks,
            autocast=self.autocast,
        )

        self.model.to(ranks.device)
        self.model.train()
        torch.manual_seed(config.seed + 1 + ranks.rank)
        if config.activation_checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", None)  # its name since transformers 5.20
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        self.backends = attention_backends(self.model)
        self.optimizers = build_optimizers(self.model, config.optim)
        loss = LanguageModelLoss(self.model)
        self.loss = parallelize(torch.compile(loss, dynamic=False) if config.compile else loss, ranks)

        self.step = self.skipped = self.skipped_in_a_row = 0
        self.density: list[list[float]] | None = None
        self.tokenizer_facts = {
            "kind": config.tokenizer.kind,
            "name": config.tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        }
        self._open_folder()

    def _open_folder(self) -> None:
        """Restores the newest whole checkpoint, if there is one, and opens the log where it stood."""
        newest = checkpoint.newest(self.folder / "checkpoints")
        state = {}
        if newest is not None:
            reached, steps_before = checkpoint.read_state(newest)["step"], read_config(self.folder).steps
            if reached > self.config.steps:
                raise ValueError(
                    f"Expected steps of at least {reached}, where '{newest}' stands, got {self.config.steps}; "
                    "use resume=never to train fewer steps beside it."
                )
            self._check_same_text(checkpoint.read_state(newest).get("fingerprints", {}))
            state = checkpoint.restore_training_state(self.model, self.optimizers, newest)
            self.step, self.skipped = state["step"], state["skipped"]
            self.skipped_in_a_row = state["skipped_in_a_row"]
            self.loader.load_state_dict(state["loader"])
            checkpoint.restore_random_state(newest, self.ranks.rank)
        if not self.ranks.first:
            self.log = NullLog()
            return
        write_config(self.folder, self.config)
        remove_summary(self.folder)
        starts_anew = newest is None and bool(read_metrics(self.folder))
        self.log = RunLog(
            self.folder,
            wandb=self.config.wandb,
            config=self.config.to_mapping(),
            name=self.folder.name,
            wandb_id=state.get("wandb_id"),
            resume_step=self.step,
            validates_first=self._validates(),
            total_steps=self.config.steps,
        )
        parameters = sum(p.numel() for p in self.model.parameters())
        self.log.print(
            f"{self.config.model.name} ({parameters / 1e6:.1f}M parameters), attention={self.config.attention.name}, "
            f"{self.config.steps} steps of {self.config.batch_tokens:,} tokens in sequences of {self.config.seq_len:,}, "
            f"{self.config.precision} on {self.ranks.world_size} x {device_name(self.ranks.device)} -> {self.folder}"
        )
        if (needed := self.config.attention.options.get("alpha_steps", 0)) > self.config.steps:
            self.log.print(
                f"attention.alpha_steps = {needed} is more than steps = {self.config.steps}: the run ends before its "
                "alpha has come to attention.alpha."
            )
        if starts_anew:
            self.log.print("The run had not come to its first checkpoint: it starts anew.")
        if newest is not None:
            self.log.print(f"Resuming at step {self.step} from {newest}")
            if steps_before != self.config.steps:
                self.log.print(
                    f"steps: {steps_before} -> {self.config.steps}; the learning rate follows the new number."
                )

    def _check_same_text(self, saved: dict[str, str]) -> None:
        """Raises ValueError where text or tokenizer are not those of the checkpoint; older checkpoints do not say."""
        for what, fingerprint in self.fingerprints.items():
            if saved.get(what, fingerprint) != fingerprint:
                data, tokenizer = self.config.data, self.config.tokenizer
                text = data.path or data.name or data.source
                name = text if what == "text" else tokenizer.name or tokenizer.kind
                raise ValueError(
                    f"The {what} '{name}' has changed since the last checkpoint in '{self.folder}', so that the metrics "
                    f"before and after would not compare; put the old {what} back, or use resume=never to train anew "
                    "beside it."
                )

    # ------------------------------------------------------------------------------------------------------- the loop

    def train(self) -> dict[str, Any]:
        config, log = self.config, self.log
        resumed_at = self.step
        interval = _Interval(self.ranks.device)
        with StopSignal() as stop, log:
            stopping = False
            while True:
                last = self.step >= config.steps
                if self._validates():
                    self._evaluate()
                    interval.reset()
                # After a step that was skipped the model may be lost, and older checkpoints go as new ones come.
                due = self.step % config.checkpoint.every == 0 and not self.skipped_in_a_row
                if self.step > resumed_at and (due or last or stopping):
                    self._save()
                    interval.reset()
                if last or stopping:
                    break
                loss, norm, factor, stopping = self._train_step(stop)
                interval.add_step()
                if self.step % config.log_every == 0 or self.step == config.steps or self.step == resumed_at + 1:
                    row = {"train/loss": loss, "train/grad_norm": norm, "train/lr": config.optim.learning_rate * factor}
                    if self.skipped:
                        row["train/skipped_steps"] = self.skipped
                    log.log(self.step, row | self._performance(interval))
                    interval.reset()
            return self._close("finished" if last else "stopped", stop.received)

    def _validates(self) -> bool:
        """Whether the model is validated at this step, before it is trained on."""
        return self.step % self.config.eval.every == 0 or self.step >= self.config.steps

    def _train_step(self, stop: StopSignal) -> tuple[float, float, float, bool]:
        """One optimiser step. Returns (mean loss, gradient norm, learning rate factor, whether to stop after it)."""
        config, ranks = self.config, self.ranks
        for backend in self.backends:
            backend.set_step(self.step)
        batches = [
            self.loader.next_batch(self.micro_batch, ranks.rank, ranks.world_size)
            for _ in range(self.sequences // self.micro_batch)
        ]
        counted = sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)
        counted, stopping = ranks.sum(counted, stop.received is not None)
        total = torch.zeros((), device=ranks.device)
        for index, batch in enumerate(batches):
            batch = batch.to(ranks.device)
            with exchange_gradients(self.loss, index == len(batches) - 1), self.autocast():
                loss = self.loss(batch.input_ids, batch.targets, batch.position_ids)
                # a mean over all target tokens of the step, of all ranks; averaging gradients divides by world_size
                (loss * (ranks.world_size / counted)).backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.gradient_clip)
        norm = norm.item()
        (mean,) = ranks.sum(total.item() / counted)
        factor = learning_rate_factor(self.step, config.steps, config.optim)
        if math.isfinite(mean) and math.isfinite(norm):
            set_learning_rate(self.optimizers, factor)
            for optimizer in self.optimizers:
                optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self._skip(mean, norm)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return mean, norm, factor, bool(stopping)

    def _skip(self, loss: float, norm: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.log.print(f"Step {self.step + 1}: loss {loss:g}, gradient norm {norm:g}; the step is skipped.")
        if self.skipped_in_a_row >= self.config.max_nonfinite:
            raise TrainingDiverged(
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient, up to step {self.step + 1}. "
                "Train anew beside it, with resume=never and a lower optim.learning_rate, a longer optim.warmup_fraction "
                "or precision=fp32."
            )

    def _evaluate(self) -> None:
        for backend in self.backends:
            backend.set_step(self.step)
        row = self.validation.measure(self.model)
        # counting takes as long as two forward passes, and before the first step there is nothing to learn from it
        if self.step and self.config.attention.name in SPARSE:
            metrics, self.density = self.validation.density(self.model)
            row |= metrics
        self.log.log(self.step, row)

    def _save(self) -> None:
        tensors = checkpoint.training_state(self.model, self.optimizers)
        tensors |= self.ranks.gather_tensors(checkpoint.random_state(self.ranks.rank))
        if self.ranks.first:
            state = {
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                "loader": self.loader.state_dict(),
                "fingerprints": self.fingerprints,
                "wandb_id": self.log.wandb_id,
            }
            checkpoint.save(self.folder / "checkpoints", self.step, tensors, state, keep=self.config.checkpoint.keep)
        self.ranks.barrier()

    def _performance(self, interval: _Interval) -> dict[str, float]:
        seconds = interval.seconds_per_step()
        rate = self.config.batch_tokens / seconds
        row = {"perf/tokens_per_s": rate, "perf/step_ms": 1000 * seconds}
        if (peak := peak_flops(self.ranks.device)) is not None:
            flops = training_flops_per_token(self.model, self.config.seq_len)
            row["perf/mfu"] = rate * flops / (peak * self.ranks.world_size)
        if self.ranks.device.type == "cuda":
            row["mem/max_gib"] = torch.cuda.max_memory_allocated(self.ranks.device) / 2**30
        return row

    # -------------------------------------------------------------------------------------------------------- the end

    def _close(self, status: str, signal_number: int | None) -> dict[str, Any]:
        if not self.ranks.first:
            return {"status": status, "step": self.step, "run_dir": str(self.folder), "signal": signal_number}
        rows = read_metrics(self.folder)
        newest = lambda name: next((row[name] for row in reversed(rows) if name in row), None)  # None: not finite
        rates = [row["perf/tokens_per_s"] for row in rows if row.get("perf/tokens_per_s")]
        summary = {
            "status": status,
            "step": self.step,
            "run_dir": str(self.folder),
            "signal": signal_number,
            **{name: newest(name) for name in ("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte")},
            "unigram_entropy": unigram_entropy(self.validation_tokens),
            "perf/tokens_per_s": statistics.median(rates[1:] or rates) if rates else None,
            "perf/mfu": newest("perf/mfu"),
            "mem/max_gib": newest("mem/max_gib"),
            "skipped_steps": self.skipped,
            "attention/density": None if self.density is None else float(np.mean(self.density)),
            "attention/density by layer and head": self.density,
            "device": device_name(self.ranks.device),
            "tokenizer": self.tokenizer_facts,
        }
        plots = [plot_losses(self.folder)]
        if self.density is not None:
            plots.append(plot_density(self.folder, self.density))
        if status == "finished":
            export(self.model, self.folder / "export", self.tokenizer_facts)
        write_summary(self.folder, summary)
        self.log.finish(json.loads(json.dumps(summary)), [str(plot) for plot in plots if plot])
        return summary


class _Interval:
    """Time per step since the last reset; what is not training (validation, saving) is reset away."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.began, self.steps = time.perf_counter(), 0

    def add_step(self) -> None:
        self.steps += 1

    def seconds_per_step(self) -> float:
        return (time.perf_counter() - self.began) / max(self.steps, 1)
