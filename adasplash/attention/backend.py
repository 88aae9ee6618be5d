"""A backend is one attention layer's way to weigh the keys that a query may see: a selection times a normaliser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ops.announce import announce
from ..ops.checks import check_alpha, check_choice, resolve_key_range, resolve_scale
from ..ops.implementation import IMPLEMENTATIONS, choose_implementation, why_no_kernels
from ..ops.key_range import KeyRange
from ..ops.reordered_attention.reference import Reordering, take_rows
from ..ops.support_statistics import SupportStatistics, support_statistics, visible_tiles
from .alibi import ALIBI_KINDS, alibi_slopes

NORMALISERS = ("softmax", "entmax")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every backend can be told.

    Args:
        implementation: auto | triton | reference. `auto` takes the fastest that runs here, and says which.
        alibi: none | alibi | nape: linear biases on no head, on all, or on every second one (the others see no
            position at all from attention).
    """

    implementation: str = "auto"
    alibi: str = "none"

    def __post_init__(self):
        check_choice("implementation", self.implementation, IMPLEMENTATIONS)
        check_choice("alibi", self.alibi, ALIBI_KINDS)

    @property
    def normaliser_alpha(self) -> float:
        """alpha of the normaliser that is asked for; 1 is softmax."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class NormaliserOptions(Options):
    """For backends whose selection goes with either normaliser.

    Args:
        normaliser: softmax | entmax.
        alpha: of entmax, 1 < alpha <= 2; by default 1.5.
    """

    normaliser: str = "softmax"
    alpha: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_choice("normaliser", self.normaliser, NORMALISERS)
        if self.alpha is None:
            return
        if self.normaliser != "entmax":
            raise ValueError(
                f"alpha = {self.alpha:g} needs normaliser=entmax, got normaliser={self.normaliser}; for softmax leave "
                "alpha out (alpha=null)."
            )
        if not 1.0 < self.alpha <= 2.0:
            raise ValueError(f"Expected 1 < alpha <= 2, got alpha = {self.alpha:g}.")
        check_alpha(self.alpha)

    @property
    def normaliser_alpha(self):
        if self.normaliser == "softmax":
            return 1.0
        return 1.5 if self.alpha is None else self.alpha


class AttentionBackend(nn.Module):
    """One layer's attention, q (B, H, Tq, D), k and v (B, G, Tk, D) -> (B, H, Tq, D).

    Subclasses set `name` and `Options`, and implement `forward`; those that select keys also `select`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: Options, *, heads: int, key_heads: int, head_dim: int):
        super().__init__()
        self.options, self.heads, self.key_heads, self.head_dim = options, heads, key_heads, head_dim
        # Saved with the weights although the options say as much: plain transformers, which would run them with its own
        # softmax, reports unexpected keys when it loads them.
        self.register_buffer("slopes", alibi_slopes(options.alibi, heads))
        if options.normaliser_alpha != 1.0:
            self.register_buffer("alpha", torch.tensor(options.normaliser_alpha))
        self.recorded: list[SupportStatistics] | None = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_range: KeyRange | None = None,
        causal: bool = True,
        scale: float | None = None,
    ) -> Tensor:
        raise NotImplementedError

    def current_alpha(self) -> float | Tensor:
        """Of the normaliser, now: 1 is softmax; a tensor () or (H,) where it is learned or scheduled."""
        return self.options.normaliser_alpha

    def select(self, q: Tensor, k: Tensor, key_range: KeyRange | None, causal: bool) -> Reordering | None:
        """The new order and ranges of a selecting backend; None: all keys in range, in the order of the text."""
        return None

    def state_names(self) -> tuple[str, ...]:
        """Names of the parameters and buffers that the options do not determine: a checkpoint has to bring them."""
        return ()

    def restore(self, stored: dict[str, Tensor], saved: Options) -> None:
        """Takes over the state that a checkpoint holds, by `state_names`, of a backend with the options `saved`.

        Raises ValueError where these options leave no place for it.
        """
        self.load_state_dict(stored, strict=False)

    def set_step(self, step: int) -> None:
        """Tells the training step, for options that follow a schedule."""

    def announce_implementation(self, q: Tensor) -> str:
        """Says, once, what runs here; returns what to ask the operators for.

        Raises ValueError where triton is asked for and cannot run. Whether kernels take all of a call they decide themselves:
        auto stays auto.
        """
        chosen = choose_implementation(self.options.implementation, q.device, q.dtype, self.head_dim)
        reason = why_no_kernels(q.device, q.dtype, self.head_dim)
        because = f" ({reason})" if reason and self.options.implementation == "auto" else ""
        announce(f"attention={self.name}: implementation '{chosen}' on {q.device.type}{because}.")
        return self.options.implementation

    @torch.no_grad()
    def statistics(self, q, k, *, key_range=None, causal=True, scale=None, count: Callable = support_statistics):
        """What `count` makes of this layer on these inputs, by default exact density and support per head.

        count: called with the arguments of `support_statistics`, which mean what `forward` computes.
        """
        visible = resolve_key_range(q, k, key_range, causal)
        tiles = visible_tiles(visible, k.shape[2])
        places = {}
        if (reordering := self.select(q, k, key_range, causal)) is not None:
            q, k = take_rows(q, reordering.query_order), take_rows(k, reordering.key_order)
            visible = reordering.key_range
            places = {"query_positions": reordering.query_order + (k.shape[2] - q.shape[2])}
            places["key_positions"] = reordering.key_order
        alpha = self.current_alpha()
        if isinstance(alpha, Tensor) and alpha.ndim:
            alpha = alpha.view(1, -1, 1, 1)
        scale = resolve_scale(q, scale)
        return count(
            q,
            k,
            visible,
            alpha=alpha,
            scale=scale,
            alibi_slopes=self.slopes,
            tiles=tiles,
            implementation=self.options.implementation,
            **places,
        )

    def extra_repr(self) -> str:
        return f"{self.name}, {self.options}"
