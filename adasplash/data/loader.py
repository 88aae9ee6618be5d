"""Batches of token sequences in an order that (seed, position) decides, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .shards import Tokens

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """input_ids, targets (the next tokens; -100 is not counted) int64 (B, T); position_ids where documents are apart."""

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor | None

    def to(self, device: torch.device) -> Batch:
        def move(x):
            if x is None or device.type == "cpu":
                return x
            return x.pin_memory().to(device, non_blocking=True)

        return Batch(move(self.input_ids), move(self.targets), move(self.position_ids))


class Loader:
    """Windows of seq_len tokens, each once an epoch.

    Args:
        tokens: the text.
        seq_len: T.
        seed: of the order; a new one each epoch.
        end_token: ends a document in `tokens`.
        cross_document: False restarts position_ids after every end token, and leaves out the targets across it.
        shuffle: False takes the windows in the order of the text.

    Raises:
        ValueError: if the text has no whole window.
    """

    def __init__(self, tokens: Tokens, *, seq_len: int, seed: int, end_token: int, cross_document=True, shuffle=True):
        self.tokens, self.seq_len, self.seed, self.end_token = tokens, seq_len, seed, end_token
        self.cross_document, self.shuffle = cross_document, shuffle
        self.windows = (len(tokens) - 1) // seq_len
        if self.windows < 1:
            raise ValueError(
                f"Too little data: sequences of seq_len = {seq_len} need at least {seq_len + 1} tokens in each split, "
                f"got {len(tokens)}. Give more text or a shorter seq_len"
                " (the validation split grows with data.validation_fraction)."
            )
        self.position = 0  # sequences that all ranks together have taken
        self._epoch, self._order = -1, None

    def __len__(self) -> int:
        return self.windows

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.position, self._epoch = state["seed"], state["position"], -1

    def _window(self, position: int) -> int:
        epoch, place = divmod(position, self.windows)
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.windows)
        return int(self._order[place])

    def next_batch(self, count: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Of the next count * world_size sequences those of this rank, in order; all ranks advance alike."""
        first = self.position + rank * count
        starts = [self._window(first + i) * self.seq_len for i in range(count)]
        self.position += count * world_size
        rows = torch.from_numpy(np.stack([self.tokens.read(start, start + self.seq_len + 1) for start in starts]))
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if self.cross_document:
            return Batch(inputs, targets, None)
        place = torch.arange(self.seq_len).expand_as(inputs)
        after_end = torch.zeros_like(inputs, dtype=torch.bool)
        after_end[:, 1:] = inputs[:, :-1] == self.end_token
        begins = torch.where(after_end, place, 0).cummax(-1).values
        return Batch(inputs, targets.masked_fill(inputs == self.end_token, IGNORE_INDEX), place - begins)
