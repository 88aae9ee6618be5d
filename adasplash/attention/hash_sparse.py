"""attention=hash_sparse: keys of the query's own hash bucket (Pagliardini et al. 2023, arXiv 2306.01160, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.reordered_attention import (
    hash_reordering,
    hash_sparse_attention,
    keys_of_queries,
    random_directions,
)
from .backend import AttentionBackend, NormaliserOptions


@dataclass(frozen=True, kw_only=True)
class HashSparseOptions(NormaliserOptions):
    """Args:
    n_buckets: even; about 1 / n_buckets of the pairs remain. Buckets are of queries and keys as their positions have turned
        them: with pads on the left the model wants position_ids that count the kept tokens.
    shared_qk: the keys are the normalised queries, as in the paper. Not with grouped heads, nor with a cache.
    attend_self: whether a query sees the key at its own place (the paper's training kernel: no; causal models only).
    resample: draw new directions in every training step, as the paper does; in evaluation the ones drawn last.
    """

    n_buckets: int = 16
    shared_qk: bool = False
    attend_self: bool = True
    resample: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.n_buckets < 2 or self.n_buckets % 2:
            raise ValueError(f"Expected an even n_buckets of at least 2, got {self.n_buckets}.")


class HashSparse(AttentionBackend):
    name = "hash_sparse"
    Options = HashSparseOptions

    def __init__(self, options, *, heads, key_heads, head_dim):
        super().__init__(options, heads=heads, key_heads=key_heads, head_dim=head_dim)
        if options.shared_qk and heads != key_heads:
            raise ValueError(f"shared_qk needs as many key heads as query heads, got {heads} and {key_heads}.")
        # (G, D, n_buckets / 2), drawn once and saved with the weights
        self.register_buffer("directions", random_directions(key_heads, head_dim, options.n_buckets))

    def state_names(self):
        return ("directions",)

    def select(self, q, k, key_range, causal):
        if self.options.shared_qk:
            k = keys_of_queries(q)
        return hash_reordering(
            q,
            k,
            self.directions,
            key_range,
            causal=causal,
            attend_self=self.options.attend_self,
            implementation=self.options.implementation,
        )

    def statistics(self, q, k, **kwargs):
        if self.options.shared_qk:
            k = keys_of_queries(q)
        return super().statistics(q, k, **kwargs)

    def forward(self, q, k, v, *, key_range=None, causal=True, scale=None):
        implementation = self.announce_implementation(q)
        if self.options.resample and self.training:
            fresh = random_directions(*self.directions.shape[:2], self.options.n_buckets, device=q.device)
            self.directions.copy_(fresh)
        return hash_sparse_attention(
            q,
            k,
            v,
            directions=self.directions,
            shared_qk=self.options.shared_qk,
            attend_self=self.options.attend_self,
            alpha=self.current_alpha(),
            key_range=key_range,
            causal=causal,
            scale=scale,
            alibi_slopes=self.slopes,
            implementation=implementation,
        )
