"""How sparse a model's attention is on a text, by layer and head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import models
from .borrowed import borrowed
from .perplexity import TokenStream


@dataclass(frozen=True)
class Sparsity:
    """
    seq_len: of the one window that is counted, in tokens.
    density, support, tile_mode: as in `SupportStatistics`, the mean over layers and heads; largest_support: of them all.
    by_layer_and_head: the same four by name, each a list of layers, each a list of heads.
    """

    seq_len: int
    density: float
    support: float
    largest_support: float
    tile_mode: float
    by_layer_and_head: dict[str, list[list[float]]]


def measure_sparsity(
    model: nn.Module,
    tokens: TokenStream,
    *,
    seq_len: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    keep_documents_apart: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Sparsity:
    """Counts, exactly, the keys that get weight in the first seq_len tokens; arguments as in `measure_perplexity`.

    Raises:
        ValueError: if the text or the model's positions are fewer than seq_len, or the model has no backends.
    """
    if not 1 <= seq_len <= len(tokens):
        raise ValueError(f"Expected seq_len from 1 to the {len(tokens)} tokens of the text, got {seq_len}.")
    text = torch.from_numpy(tokens.read(0, seq_len))[None]
    position_ids = keep_documents_apart(text, text)[1].to(device) if keep_documents_apart else None
    with borrowed(model, device, training=False), torch.autocast(device.type, autocast, enabled=autocast is not None):
        layers = models.attention_statistics(model, text.to(device), position_ids)
    found = {
        "density": [layer.density for layer in layers],
        "support": [layer.support for layer in layers],
        "largest_support": [layer.largest for layer in layers],
        "tile_mode": [layer.tile_mode for layer in layers],
    }
    overall = {name: torch.cat(heads).mean().item() for name, heads in found.items()}
    overall["largest_support"] = torch.cat(found["largest_support"]).max().item()
    return Sparsity(seq_len, **overall, by_layer_and_head={name: [h.tolist() for h in found[name]] for name in found})
