"""How many tokens a second a model reads, or learns from, and in how much memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .. import models
from .borrowed import borrowed


@dataclass(frozen=True)
class Throughput:
    """
    backward: whether a pass is forward and backward (in training mode), or forward alone; both with the loss.
    tokens_per_s: median over the repeats; tokens_per_s_p20, tokens_per_s_p80: its 20th and 80th percentile.
    ms: median of one pass.
    memory_gib: peak, by `memory_kind`.
    status: "ok", or "out of memory"; the measured values are None then.
    """

    seq_len: int
    batch_size: int
    backward: bool
    repeats: int
    status: str = "ok"
    tokens_per_s: float | None = None
    tokens_per_s_p20: float | None = None
    tokens_per_s_p80: float | None = None
    ms: float | None = None
    memory_gib: float | None = None
    memory_kind: str | None = None


def measure_throughput(
    model: nn.Module,
    *,
    seq_len: int,
    batch_size: int,
    vocab_size: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    backward: bool,
    warmup: int = 3,
    repeats: int = 10,
) -> Throughput:
    """Times passes over random tokens, always the same ones; memory that runs out is a result, not an error.

    Args:
        model: on `device`; it comes back as it was. One whose base_model was compiled in place is measured compiled.
        batch_size: sequences per pass.
        autocast: dtype of the matrix products; None for the model's own.
        warmup: passes before the timed ones, which take compilation and tuning.

    Raises:
        ValueError: if the model has fewer positions than seq_len, or a count is too small.
    """
    counts = {"seq_len": seq_len, "batch_size": batch_size, "vocab_size": vocab_size, "repeats": repeats}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"Expected {name} of at least 1, got {value}.")
    models.check_length(model, seq_len)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocab_size, (batch_size, seq_len + 1), generator=generator).to(device)
    input_ids, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def run_pass() -> None:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            if backward:
                loss = models.summed_loss(model, input_ids, targets)
            else:
                models.token_losses(model, input_ids, targets)
        if backward:
            (loss / targets.numel()).backward()
            model.zero_grad(set_to_none=True)

    timed = _timed_on_gpu if device.type == "cuda" else _timed_on_cpu
    settings = {"seq_len": seq_len, "batch_size": batch_size, "backward": backward, "repeats": repeats}
    with borrowed(model, device, training=backward):
        try:
            seconds, memory_gib, memory_kind = timed(run_pass, warmup, repeats, device)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            seconds = None
    if seconds is None:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return Throughput(**settings, status="out of memory")
    p20, median, p80 = np.percentile(batch_size * seq_len / np.array(seconds), [20, 50, 80])
    return Throughput(
        **settings,
        tokens_per_s=float(median),
        tokens_per_s_p20=float(p20),
        tokens_per_s_p80=float(p80),
        ms=1000 * float(np.median(seconds)),
        memory_gib=memory_gib,
        memory_kind=memory_kind,
    )


def _timed_on_gpu(run_pass: Callable, warmup: int, repeats: int, device: torch.device) -> tuple[list, float, str]:
    """(seconds of each repeat, GiB, what they mean)."""
    with torch.cuda.device(device):
        for _ in range(warmup):
            run_pass()
        torch.cuda.reset_peak_memory_stats(device)  # tuning in the warm-up may have taken more
        events = []
        for _ in range(repeats):
            events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            events[-1][0].record()
            run_pass()
            events[-1][1].record()
        torch.cuda.synchronize(device)
        seconds = [begin.elapsed_time(end) / 1000 for begin, end in events]
        return seconds, torch.cuda.max_memory_allocated(device) / 2**30, "allocated on the GPU, weights included"


def _timed_on_cpu(run_pass: Callable, warmup: int, repeats: int, device: torch.device) -> tuple[list, float, str]:
    """(seconds of each repeat, GiB, what they mean)."""
    before = _peak_resident_gib()
    for _ in range(warmup):
        run_pass()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run_pass()
        seconds.append(time.perf_counter() - begin)
    # The system only knows the peak since the process began: what stays below an earlier peak shows as 0.
    return seconds, _peak_resident_gib() - before, "growth of the process's peak resident memory"


def _peak_resident_gib() -> float:
    import resource  # Unix only

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _out_of_memory(error: BaseException) -> bool:
    """On a CPU torch raises a plain RuntimeError, as cuBLAS does for its workspace."""
    signs = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)
