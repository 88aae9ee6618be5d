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
    """Sequences to train on.

    Args:
        input_ids: (B, T) int64.
        targets: (B, T) int64, the next tokens; -100 where none is to be predicted.
        position_ids: (B, T) int64, from 0 in each document, where documents are kept apart; else None.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same on another device; to a GPU without waiting for the copy."""

        def move(x: Tensor | None) -> Tensor | None:
            if x is None or device.type == "cpu":
                return x
            return x.pin_memory().to(device, non_blocking=True)

        return Batch(move(self.input_ids), move(self.targets), move(self.position_ids))


def keep_documents_apart(input_ids: Tensor, targets: Tensor, end_token: int) -> tuple[Tensor, Tensor]:
    """(targets, position_ids) of packed documents, (B, T): no target after an end token, places from 0 in each document."""
    ends = input_ids == end_token
    place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    begins = torch.where(ends.roll(1, dims=1), place, 0).cummax(dim=1).values  # roll: place 0 is 0 either way
    return targets.masked_fill(ends, IGNORE_INDEX), place - begins


class Loader:
    """Windows of seq_len tokens, each once an epoch; window w is tokens w*T .. w*T + T, the last only as a target.

    Args:
        tokens: the text.
        seq_len: T.
        seed: of the order, which is another one each epoch.
        end_token: ends a document in `tokens`.
        cross_document: False gives position_ids that begin at 0 in each document, and no target after an end token.
        shuffle: False takes the windows in the order of the text, whatever the seed.

    Raises:
        ValueError: for a negative seed, or if the text has no whole window.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_len: int,
        seed: int,
        end_token: int,
        cross_document: bool = True,
        shuffle: bool = True,
    ):
        if seq_len < 1 or seed < 0:
            raise ValueError(f"Expected seq_len >= 1 and seed >= 0, got seq_len = {seq_len}, seed = {seed}.")
        self.tokens, self.seq_len, self.seed, self.end_token = tokens, seq_len, seed, end_token
        self.cross_document, self.shuffle = cross_document, shuffle
        self._windows = (len(tokens) - 1) // seq_len
        if self._windows < 1:
            raise ValueError(
                f"Too little data: a sequence of seq_len = {seq_len} needs {seq_len + 1} tokens in each split, got "
                f"{len(tokens)}; give more text, a shorter seq_len or, where it is the validation text that is short, "
                "more of that: a larger data.validation_fraction, or a longer data.validation_path where one is given."
            )
        self.position = 0  # sequences that all ranks together have taken
        self._order_of: tuple[int, int] | None = None  # (seed, epoch) of the order at hand

    def __len__(self) -> int:
        """Windows an epoch."""
        return self._windows

    def state_dict(self) -> dict[str, int]:
        """All that decides what comes next, whatever the number of ranks."""
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.position = int(state["seed"]), int(state["position"])

    def next_batch(self, count: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Of the next count * world_size sequences those of this rank, (count, T); the position moves past all.

        Raises:
            ValueError: unless count >= 1 and 0 <= rank < world_size.
        """
        if count < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"Expected count >= 1 and 0 <= rank < world_size, got count = {count}, rank = {rank}, "
                f"world_size = {world_size}."
            )
        first = self.position + rank * count
        starts = [self._window(position) * self.seq_len for position in range(first, first + count)]
        self.position += count * world_size
        rows = torch.from_numpy(np.stack([self.tokens.read(start, start + self.seq_len + 1) for start in starts]))
        input_ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if self.cross_document:
            return Batch(input_ids, targets, None)
        return Batch(input_ids, *keep_documents_apart(input_ids, targets, self.end_token))

    def _window(self, position: int) -> int:
        epoch, place = divmod(position, self._windows)
        if not self.shuffle:
            return place
        if self._order_of != (self.seed, epoch):
            self._order_of = (self.seed, epoch)
            # RandomState, whose streams numpy promises to keep: a run resumed under another version goes on alike.
            bits = np.random.MT19937(np.random.SeedSequence((self.seed, epoch)))
            self._order = np.random.RandomState(bits).permutation(self._windows)
        return int(self._order[place])
