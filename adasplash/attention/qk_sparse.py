"""attention=qk_sparse: kept queries look at kept keys (Pagliardini et al. 2023, arXiv 2306.01160, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.checks import check_choice, resolve_key_range
from ..ops.reordered_attention import keep_mask, qk_sparse_attention
from ..ops.reordered_attention.reference import compact_kept
from .backend import AttentionBackend, NormaliserOptions

SCORES = ("random", "norm")


@dataclass(frozen=True, kw_only=True)
class QKSparseOptions(NormaliserOptions):
    """Args:
    drop: share of the queries, and of the keys, that is left out in training; dropped queries output 0.
    drop_keys: share of the keys, where it differs.
    score: random | norm: at random, or those of the smallest norm.
    per_head: each head decides for itself.
    drop_in_evaluation: drop there too, as the paper does; makes evaluation and generation random.
    """

    drop: float = 0.3
    drop_keys: float | None = None
    score: str = "random"
    per_head: bool = True
    drop_in_evaluation: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_choice("score", self.score, SCORES)
        for name in ("drop", "drop_keys"):
            share = getattr(self, name)
            if share is not None and not 0.0 <= share < 1.0:
                raise ValueError(f"Expected 0 <= {name} < 1, got {share:g}.")


class QKSparse(AttentionBackend):
    name = "qk_sparse"
    Options = QKSparseOptions

    def kept(self, q, k):
        """bool (B, H, Tq) and (B, G, Tk), or (None, None) where nothing is dropped."""
        options = self.options
        if not (self.training or options.drop_in_evaluation):
            return None, None
        drop_keys = options.drop if options.drop_keys is None else options.drop_keys
        how = {"score": options.score, "per_head": options.per_head}
        return keep_mask(q, options.drop, **how), keep_mask(k, drop_keys, **how)

    def select(self, q, k, key_range, causal):
        query_kept, key_kept = self.kept(q, k)
        if query_kept is None:
            return None
        return compact_kept(query_kept, key_kept, resolve_key_range(q, k, key_range, causal))

    def forward(self, q, k, v, *, key_range=None, causal=True, scale=None):
        implementation = self.announce_implementation(q)
        query_kept, key_kept = self.kept(q, k)
        return qk_sparse_attention(
            q,
            k,
            v,
            query_kept=query_kept,
            key_kept=key_kept,
            alpha=self.current_alpha(),
            key_range=key_range,
            causal=causal,
            scale=scale,
            alibi_slopes=self.slopes,
            implementation=implementation,
        )
