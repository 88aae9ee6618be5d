"""Optimisers and the schedule of their learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from ..ops.checks import check_choice


@dataclass(frozen=True)
class OptimConfig:
    """kind: adamw | muon (Muon for the hidden matrices, AdamW for the rest).

    Args:
        learning_rate: peak, of AdamW; muon_learning_rate: of Muon.
        gradient_clip: largest norm of the gradient.
        schedule: cosine | wsd (warm up, stay, decay linearly).
        warmup_fraction, decay_fraction (of wsd): shares of the steps; final_fraction: of the peak, at the end.
    """

    kind: str = "adamw"
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    gradient_clip: float = 1.0
    schedule: str = "cosine"
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2
    final_fraction: float = 0.1

    def __post_init__(self):
        check_choice("optim", self.kind, ("adamw", "muon"))
        check_choice("optim.schedule", self.schedule, ("cosine", "wsd"))
        for name in ("learning_rate", "muon_learning_rate", "eps", "gradient_clip"):
            finite = name == "gradient_clip" or math.isfinite(getattr(self, name))  # an infinite clip does not clip
            if not (finite and getattr(self, name) > 0):
                raise ValueError(f"Expected optim.{name} above 0, got {getattr(self, name)}.")
        for name in ("warmup_fraction", "decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Expected optim.{name} between 0 and 1, got {getattr(self, name)}.")
        if not self.weight_decay >= 0:
            raise ValueError(f"Expected optim.weight_decay of at least 0, got {self.weight_decay}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Expected optim.betas of at least 0 and below 1, got {self.betas}.")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                "Expected optim.warmup_fraction + optim.decay_fraction of at most 1 for schedule wsd, "
                f"got {self.warmup_fraction} + {self.decay_fraction}."
            )


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[Optimizer]:
    """AdamW alone, or AdamW and Muon; weights of two and more dimensions decay, biases, gains and scalars do not.

    Raises:
        ValueError: if no parameter requires a gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]  # tied ones come once
    if not parameters:
        raise ValueError("Expected a model with parameters to train, got none that requires a gradient.")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if (head := getattr(model, "get_output_embeddings", lambda: None)()) is not None:
        tables.add(id(head.weight))
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in tables] if config.kind == "muon" else []
    by_muon = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in by_muon]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = []
    if rest:
        fused = all(p.is_cuda for p in rest)
        adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)
        optimizers.append(adamw)
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def learning_rate_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at `step` of 0..steps-1; never 0 at the first step."""
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))
    decay = max(1, round(config.decay_fraction * steps))
    left = min(1.0, (steps - step) / decay)
    return config.final_fraction + (1 - config.final_fraction) * left


def set_learning_rate(optimizers: list[Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
