"""attention=adasplash: all keys in range, alpha-entmax: most weights are exactly zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.checks import check_alpha
from ..ops.entmax_attention import entmax_attention
from .backend import AttentionBackend, Options

# Nearer to 1 the gradient for alpha loses all its digits in float32 (it has a pole there).
LEAST_LEARNED_ALPHA = 1.01


@dataclass(frozen=True, kw_only=True)
class AdaSplashOptions(Options):
    """Args:
    alpha: 1 < alpha <= 2; larger is sparser (1.5 is entmax, 2 sparsemax).
    learn_alpha: one alpha per head, trained from `alpha` on (Correia, Niculae and Martins 2019).
    alpha_start: where given, alpha goes linearly from here to `alpha` over the first `alpha_steps` steps
        (AdaSplash, section 4: 1.01 to 1.5 when continuing from a softmax model).
    alpha_steps: length of that schedule in training steps.
    """

    alpha: float = 1.5
    learn_alpha: bool = False
    alpha_start: float | None = None
    alpha_steps: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("alpha", "alpha_start"):
            value = getattr(self, name)
            if value is not None and not 1.0 < value <= 2.0:
                raise ValueError(f"Expected 1 < {name} <= 2, got {name} = {value:g}; for softmax use attention=flash.")
            if value is not None:
                check_alpha(value)
        if self.alpha_start is not None and self.alpha_steps < 1:
            raise ValueError(f"alpha_start needs alpha_steps of at least 1, got {self.alpha_steps}.")
        if self.alpha_start is None and self.alpha_steps:
            raise ValueError(f"alpha_steps = {self.alpha_steps} needs an alpha_start to go from.")
        if self.learn_alpha and self.alpha_start is not None:
            raise ValueError("learn_alpha and alpha_start exclude each other: alpha is either learned or scheduled.")
        if self.learn_alpha and not LEAST_LEARNED_ALPHA < self.alpha < 2.0:
            raise ValueError(
                f"learn_alpha keeps alpha strictly between {LEAST_LEARNED_ALPHA} and 2, so that it cannot start at "
                f"alpha = {self.alpha:g}."
            )

    @property
    def normaliser_alpha(self):
        return self.alpha


class AdaSplash(AttentionBackend):
    name = "adasplash"
    Options = AdaSplashOptions

    def __init__(self, options, *, heads, key_heads, head_dim):
        super().__init__(options, heads=heads, key_heads=key_heads, head_dim=head_dim)
        self.scheduled = False  # whether alpha is on its way: a plain number, where it is one, has faster kernels
        self.alpha_logit = None
        if options.learn_alpha:
            share = (options.alpha - LEAST_LEARNED_ALPHA) / (2.0 - LEAST_LEARNED_ALPHA)
            self.alpha_logit = nn.Parameter(torch.full((heads,), math.log(share / (1.0 - share))))
        self.set_step(0)

    def state_names(self):
        if self.options.learn_alpha:
            return ("alpha_logit",)
        return () if self.options.alpha_start is None else ("alpha",)

    def restore(self, stored, saved):
        if stored and self.options.alpha != saved.alpha:
            if self.options.learn_alpha:
                raise ValueError(
                    f"alpha = {self.options.alpha:g} would change nothing: the checkpoint brings an alpha per head, "
                    f"learned from {saved.alpha:g} on. Keep those with alpha={saved.alpha:g}, or add learn_alpha=false "
                    "for one alpha everywhere."
                )
            # the stored alpha is of a schedule with another end: this one has come to the alpha that is asked for
            self.set_step(self.options.alpha_steps)
        else:
            super().restore(stored, saved)

    def set_step(self, step):
        options = self.options
        if options.alpha_start is not None:
            share = min(1.0, step / options.alpha_steps)
            self.alpha.fill_(options.alpha_start + share * (options.alpha - options.alpha_start))
            self.scheduled = share < 1.0

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if self.options.alpha_start is not None:
            self.scheduled = bool(self.alpha != self.options.alpha)

    def current_alpha(self) -> float | Tensor:
        if self.alpha_logit is not None:
            return LEAST_LEARNED_ALPHA + (2.0 - LEAST_LEARNED_ALPHA) * torch.sigmoid(self.alpha_logit.float())
        return self.alpha if self.scheduled else self.options.alpha

    def forward(self, q, k, v, *, key_range=None, causal=True, scale=None):
        implementation = self.announce_implementation(q)
        return entmax_attention(
            q,
            k,
            v,
            alpha=self.current_alpha(),
            key_range=key_range,
            causal=causal,
            scale=scale,
            alibi_slopes=self.slopes,
            implementation=implementation,
        )
