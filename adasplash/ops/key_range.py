"""KeyRange: the one description of who may look at whom.

Query i may look at the keys start[i] <= j < stop[i], and at nothing else. Every mask this project needs is such a
range or the intersection of two, so no attention function carries a causal, window, padding or packing flag of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class TileBounds(NamedTuple):
    """For each block of queries the keys that any row sees, and those that every row sees; int32 (B, H, blocks).

    Key tiles outside [any_start, any_stop) need no visit, tiles inside [all_start, all_stop) need no mask.
    """

    any_start: Tensor
    any_stop: Tensor
    all_start: Tensor
    all_stop: Tensor


@dataclass(frozen=True, eq=False)  # comparing tensors has no truth value
class KeyRange:
    """Half-open ranges of visible keys, one per query.

    Args:
        start: first visible key, integer tensor (B or 1, H or 1, Tq); stored as int32.
        stop: one past the last visible key, same shape. A range with stop <= start is empty: such a query outputs 0.

    Raises:
        ValueError: if start and stop are not tensors of an integer type, or not of one three-dimensional shape.
    """

    start: Tensor
    stop: Tensor

    def __post_init__(self):
        for bound in (self.start, self.stop):
            if _dtype(bound) not in INTEGERS:
                raise ValueError(f"KeyRange expects start and stop as integer tensors, got {_dtype(bound)}.")
        if self.start.ndim != 3 or self.start.shape != self.stop.shape:
            raise ValueError(
                "KeyRange expects start and stop of one shape (B or 1, H or 1, Tq), "
                f"got {tuple(self.start.shape)} and {tuple(self.stop.shape)}."
            )
        for name in ("start", "stop"):
            bound = getattr(self, name)
            if bound.dtype == torch.int64:  # the largest integer stands for "no limit"
                bound = bound.clamp(-(2**31), 2**31 - 1)
            object.__setattr__(self, name, bound.to(torch.int32))

    # ------------------------------------------------------------------------------------------------ constructors

    @classmethod
    def causal(cls, query_length: int, key_length: int | None = None, *, device=None) -> KeyRange:
        """[0, i + 1): the last query sees all keys, whatever the lengths (decoding with a cache, for example)."""
        key_length = query_length if key_length is None else key_length
        stop = torch.arange(1, query_length + 1, device=device, dtype=torch.int32) + (key_length - query_length)
        return cls(torch.zeros_like(stop)[None, None], stop.clamp(min=0)[None, None])

    @classmethod
    def bidirectional(cls, query_length: int, key_length: int | None = None, *, device=None) -> KeyRange:
        """[0, Tk): every query sees every key."""
        key_length = query_length if key_length is None else key_length
        start = torch.zeros(1, 1, query_length, device=device, dtype=torch.int32)
        return cls(start, torch.full_like(start, key_length))

    @classmethod
    def padding(cls, keep: Tensor, query_length: int | None = None) -> KeyRange:
        """[first, last + 1) of the kept keys of each sample; pads may stand on the left, on the right or on both sides.

        Args:
            keep: (B, Tk), bool or integers 0 and 1, the usual `attention_mask`. The kept keys of a sample must be
                contiguous; this is not checked here, since it would wait for the GPU (`check_padding` does).
            query_length: Tq; by default Tk.

        Raises:
            ValueError: if keep is not two-dimensional, or of a floating type, in which 0 may mean "keep".
        """
        keep = _bool_mask(keep)
        if keep.ndim != 2:
            raise ValueError(f"Expected a padding mask of shape (batch, keys), got {tuple(keep.shape)}.")
        key_length = keep.shape[-1]
        place = torch.arange(key_length, device=keep.device, dtype=torch.int32)
        start = torch.where(keep, place, key_length).amin(-1)  # (B,)
        stop = torch.where(keep, place + 1, 0).amax(-1)
        shape = (keep.shape[0], 1, key_length if query_length is None else query_length)
        return cls(start[:, None, None].expand(shape), stop[:, None, None].expand(shape))

    @classmethod
    def documents(cls, position_ids: Tensor) -> KeyRange:
        """[document start, document end) for packed sequences.

        Args:
            position_ids: (B or 1, T), integers; a new document starts wherever a position does not follow the one
                before it.

        Raises:
            ValueError: if position_ids is not a two-dimensional tensor of integers.
        """
        if _dtype(position_ids) not in INTEGERS:
            raise ValueError(f"Expected position_ids as an integer tensor, got {_dtype(position_ids)}.")
        if position_ids.ndim != 2:
            raise ValueError(f"Expected position_ids of shape (batch or 1, length), got {tuple(position_ids.shape)}.")
        length = position_ids.shape[-1]
        place = torch.arange(length, device=position_ids.device).expand_as(position_ids)
        first = torch.ones_like(position_ids, dtype=torch.bool)
        first[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        start = torch.where(first, place, 0).cummax(-1).values
        # the end of a document is the next start after the place: a running minimum from the right
        starts_ahead = torch.where(first, place, length).roll(-1, -1)
        starts_ahead[:, -1] = length
        stop = starts_ahead.flip(-1).cummin(-1).values.flip(-1)
        return cls(start[:, None], stop[:, None])

    @classmethod
    def window(cls, query_length: int, width: int, key_length: int | None = None, *, device=None) -> KeyRange:
        """[i - width + 1, i + width): sliding window; intersect with `causal` for the one-sided form.

        The last query stands beside the last key, as in `causal`. Raises ValueError for a width below 1.
        """
        if width < 1:
            raise ValueError(f"A sliding window needs a width of at least 1, got {width}.")
        key_length = query_length if key_length is None else key_length
        place = torch.arange(query_length, device=device, dtype=torch.int32) + (key_length - query_length)
        start = (place - width + 1).clamp(0, key_length)
        return cls(start[None, None], (place + width).clamp(0, key_length)[None, None])

    # ------------------------------------------------------------------------------------------------ operations

    def __and__(self, other: KeyRange) -> KeyRange:
        """Keys that both ranges allow. Raises ValueError unless other is a KeyRange of as many queries."""
        if not isinstance(other, KeyRange):
            raise ValueError(f"Expected a KeyRange on both sides of &, got {type(other).__name__}.")
        if self.query_length != other.query_length:
            raise ValueError(
                f"Expected two ranges of as many queries, got {self.query_length} and {other.query_length}."
            )
        return KeyRange(torch.maximum(self.start, other.start), torch.minimum(self.stop, other.stop))

    @property
    def query_length(self) -> int:
        return self.start.shape[-1]

    @property
    def empty(self) -> Tensor:
        """bool (B or 1, H or 1, Tq): queries that see no key at all."""
        return self.stop <= self.start

    def rows(self, begin: int, end: int) -> KeyRange:
        """The ranges of queries begin..end-1."""
        return KeyRange(self.start[..., begin:end], self.stop[..., begin:end])

    def expand(self, batch: int, heads: int) -> KeyRange:
        """The same ranges with shape (B, H, Tq)."""
        shape = (batch, heads, self.query_length)
        return KeyRange(self.start.expand(shape), self.stop.expand(shape))

    def dense_mask(self, key_length: int) -> Tensor:
        """bool (B or 1, H or 1, Tq, Tk), True where the query may look. For tests and short sequences."""
        key = torch.arange(key_length, device=self.start.device)
        return (key >= self.start[..., None]) & (key < self.stop[..., None])

    def tile_bounds(self, query_block: int) -> TileBounds:
        """What each block of `query_block` queries sees, jointly and severally. Empty rows widen no block."""
        length = self.query_length
        blocks = -(-length // query_block)
        far = torch.iinfo(torch.int32).max

        def by_block(values: Tensor, filler: int) -> Tensor:  # (B, H, Tq) -> (B, H, blocks, query_block)
            padded = torch.nn.functional.pad(values, (0, blocks * query_block - length), value=filler)
            return padded.unflatten(-1, (blocks, query_block))

        return TileBounds(
            any_start=by_block(self.start.masked_fill(self.empty, far), far).amin(-1),
            any_stop=by_block(self.stop.masked_fill(self.empty, 0), 0).amax(-1),
            all_start=by_block(self.start, 0).amax(-1),
            all_stop=by_block(self.stop, far).amin(-1),
        )


def _dtype(x: object) -> torch.dtype | str:
    """Of a tensor; of anything else the name of its type."""
    return x.dtype if isinstance(x, Tensor) else type(x).__name__


def _bool_mask(keep: Tensor) -> Tensor:
    """A padding mask as bool. Raises ValueError for floats: in a mask that is added to scores, 0 means "keep"."""
    if _dtype(keep) not in (torch.bool, *INTEGERS):
        raise ValueError(
            f"Expected a padding mask of bools or integers, 1 where a key is kept, got {_dtype(keep)}; "
            "give mask == 0 for a mask that is added to scores, mask.bool() for one of 0.0 and 1.0."
        )
    return keep.to(torch.bool)


def check_padding(keep: Tensor) -> None:
    """Raises ValueError if the kept keys of a sample are not contiguous: one range cannot describe such a mask."""
    keep = _bool_mask(keep)
    if keep.shape[-1] < 2:
        return
    runs = keep[:, :1].int() + (keep[:, 1:] & ~keep[:, :-1]).sum(-1, keepdim=True)
    broken = (runs > 1).squeeze(-1)
    if broken.any():
        raise ValueError(
            f"The attention mask of sample {int(broken.nonzero()[0])} has pads between kept tokens; "
            "expected pads on the left or the right only. Move the pads to one side, "
            "or pack the pieces and mark them by position_ids."
        )
