"""Perplexity of a token stream, and how it falls with the number of tokens in view."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .. import models
from .borrowed import borrowed

IGNORE_INDEX = -100


class TokenStream(Protocol):
    """One long text as tokens; documents follow each other."""

    bytes_per_token: float  # UTF-8 bytes of text per token

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...  # int64 (stop - start,)


class PositionBin(NamedTuple):
    """Targets predicted from at most `context` tokens, and from more than the previous bin's.

    loss: their mean, nats per token; count: how many.
    """

    context: int
    loss: float
    count: int


@dataclass(frozen=True)
class Perplexity:
    """
    seq_len, stride: of the windows, in tokens.
    tokens: targets counted, each once.
    loss: nats per token, the mean over them; perplexity: exp(loss).
    bits_per_byte: bits per UTF-8 byte of the text, to compare models with different tokenizers.
    by_position: the same loss by tokens in view; bins without targets are left out.
    """

    seq_len: int
    stride: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float
    by_position: tuple[PositionBin, ...]


def measure_perplexity(
    model: nn.Module,
    tokens: TokenStream,
    *,
    seq_len: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    device: torch.device,
    autocast: torch.dtype | None = None,
    keep_documents_apart: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Perplexity:
    """Perplexity over windows of seq_len tokens that advance by `stride`.

    With stride = seq_len (the default) the windows are disjoint: fast, and a target sees seq_len / 2 tokens on
    average. With a smaller stride only the last `stride` targets of a window count (all of the first window's): a
    target sees at least seq_len - stride tokens, at seq_len / stride times the cost.

    Every target counts exactly once, so that all window lengths are measured on the same targets. For that the last
    window is moved back to end where the text ends; its targets that were counted before do not count again.

    Args:
        model: on `device`; it comes back as it was.
        tokens: the text.
        max_tokens: count at most this many targets, the first ones.
        batch_size: windows per forward pass.
        autocast: dtype of the matrix products; None for the model's own.
        keep_documents_apart: makes (targets, position_ids) of (input_ids, targets), all int64 (B, T), for a model that
            was trained so; by default documents are seen as one text.

    Raises:
        ValueError: if the text has no whole window, the model has fewer positions, or stride is not in 1..seq_len.
    """
    stride = seq_len if stride is None else stride
    for name, value in (("seq_len", seq_len), ("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} of at least 1, got {value}.")
    if not 1 <= stride <= seq_len:
        raise ValueError(f"Expected a stride from 1 to seq_len = {seq_len}, got {stride}; others leave targets out.")
    models.check_length(model, seq_len)
    targets = len(tokens) - 1 if max_tokens is None else min(len(tokens) - 1, max_tokens)
    if targets < seq_len:
        limit = "" if max_tokens is None else f" and max_tokens = {max_tokens}"
        raise ValueError(
            f"Expected at least seq_len + 1 = {seq_len + 1} tokens and a max_tokens of at least seq_len, got a text of "
            f"{len(tokens)} tokens{limit}; use a shorter seq_len or more text."
        )

    totals, counts = np.zeros(seq_len), np.zeros(seq_len, dtype=np.int64)  # by number of earlier tokens in view
    windows = window_places(targets, seq_len, stride)
    with borrowed(model, device, training=False), torch.autocast(device.type, autocast, enabled=autocast is not None):
        while batch := list(itertools.islice(windows, batch_size)):
            text = torch.from_numpy(np.stack([tokens.read(begin, begin + seq_len + 1) for begin, _ in batch]))
            first = torch.tensor([first for _, first in batch])[:, None]
            counted = torch.arange(seq_len) >= first  # (B, T)
            expected, place, position_ids = text[:, 1:].masked_fill(~counted, IGNORE_INDEX), torch.arange(seq_len), None
            if keep_documents_apart:
                expected, place = keep_documents_apart(text[:, :-1], expected)
                position_ids = place.to(device)
            losses = models.token_losses(model, text[:, :-1].to(device), expected.to(device), position_ids)
            counted = (expected != IGNORE_INDEX).flatten()
            place = place.expand_as(expected).flatten()[counted]
            totals += np.bincount(place, losses.double().cpu().flatten()[counted], minlength=seq_len)
            counts += np.bincount(place, minlength=seq_len)

    loss = float(totals.sum() / counts.sum())
    return Perplexity(
        seq_len=seq_len,
        stride=stride,
        tokens=int(counts.sum()),
        loss=loss,
        perplexity=math.exp(loss) if not loss > 700 else math.inf,
        bits_per_byte=loss / math.log(2) / tokens.bytes_per_token,
        by_position=tuple(_bins(totals, counts)),
    )


def window_places(targets: int, seq_len: int, stride: int) -> Iterator[tuple[int, int]]:
    """Windows over the targets 0 .. targets - 1: (the first token, the first position whose target counts)."""
    counted = 0
    end = seq_len
    while counted < targets:
        end = min(end, targets)
        begin = end - seq_len
        yield begin, counted - begin
        counted = end
        end += stride


def _bins(totals: np.ndarray, counts: np.ndarray) -> Iterator[PositionBin]:
    """Two bins per doubling of the context; the edges do not depend on seq_len, so that curves can be compared."""
    seq_len = len(totals)
    edges = {round(2 ** (half / 2)) for half in range(2 * seq_len.bit_length())}
    edges = sorted(edge for edge in edges if edge < seq_len) + [seq_len]
    for lower, upper in itertools.pairwise([0, *edges]):
        if count := int(counts[lower:upper].sum()):  # position p has p + 1 tokens in view
            yield PositionBin(upper, float(totals[lower:upper].sum() / count), count)
