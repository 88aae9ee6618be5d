"""Validation during training: the loss on held-out text, and how sparse attention is there."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from ..data import IGNORE_INDEX, Loader, Tokens
from ..models import attention_statistics, token_losses
from .parallel import Ranks


def unigram_entropy(tokens: Tokens, most: int = 1 << 20) -> float:
    """Nats per token of a model that knows the frequencies of the tokens and nothing else."""
    counts = np.bincount(tokens.read(0, min(len(tokens), most)))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


class Validation:
    """Measures a model on the first tokens of the validation text; the same ones every time, whatever the ranks.

    Args:
        loader: unshuffled, over the validation text.
        sequences: how many of its sequences, over all ranks.
        micro_batch: sequences per forward pass.
    """

    def __init__(self, loader: Loader, tokens: Tokens, *, sequences: int, micro_batch: int, ranks: Ranks, autocast):
        self.loader, self.ranks, self.autocast = loader, ranks, autocast
        self.sequences, self.micro_batch = min(sequences, len(loader)), micro_batch
        self.bytes_per_token = tokens.bytes_per_token

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """val/loss in nats per token, val/perplexity, val/bits_per_byte; leaves the random numbers as they were."""
        total = count = 0.0
        with _evaluating(model, self.ranks.device):
            for begin in range(self.ranks.rank * self.micro_batch, self.sequences, self._stride):
                batch = self._batch(begin, min(self.micro_batch, self.sequences - begin))
                with self.autocast():
                    losses = token_losses(model, batch.input_ids, batch.targets, batch.position_ids)
                total += losses.double().sum().item()
                count += int((batch.targets != IGNORE_INDEX).sum())
        total, count = self.ranks.sum(total, count)
        loss = total / max(count, 1)
        return {
            "val/loss": loss,
            "val/perplexity": math.exp(min(loss, 700.0)),
            "val/bits_per_byte": loss / math.log(2) / self.bytes_per_token,
        }

    @torch.no_grad()
    def density(self, model: nn.Module) -> tuple[dict[str, float], list[list[float]]]:
        """Metrics attention/WHAT/layerNN, and the density of each layer and head.

        WHAT: density, support (mean over the queries), largest_support, and tile_mode (see `SupportStatistics`).
        """
        batch = self._batch(0, 1)
        with _evaluating(model, self.ranks.device), self.autocast():
            layers = attention_statistics(model, batch.input_ids, batch.position_ids)
        metrics = {}
        for index, layer in enumerate(layers):
            numbers = {
                "density": layer.density.mean(),
                "support": layer.support.mean(),
                "largest_support": layer.largest.max(),
                "tile_mode": layer.tile_mode.mean(),
            }
            metrics |= {f"attention/{what}/layer{index:02d}": number.item() for what, number in numbers.items()}
        return metrics, [layer.density.tolist() for layer in layers]

    @property
    def _stride(self) -> int:
        return self.micro_batch * self.ranks.world_size

    def _batch(self, begin: int, count: int):
        self.loader.load_state_dict({**self.loader.state_dict(), "position": begin})
        return self.loader.next_batch(count).to(self.ranks.device)


class _evaluating:
    """Evaluation mode, and a stream of random numbers of its own."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model = model
        self.fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def __enter__(self):
        self.was_training = self.model.training
        self.model.eval()
        self.fork.__enter__()

    def __exit__(self, *exception):
        self.fork.__exit__(*exception)
        self.model.train(self.was_training)
