"""attention=softmax: all keys in range, softmax, written out in torch. The reference the others are compared with."""

from __future__ import annotations

from ..ops.announce import announce
from ..ops.softmax_attention import softmax_attention
from .backend import AttentionBackend


class Softmax(AttentionBackend):
    name = "softmax"

    def forward(self, q, k, v, *, key_range=None, causal=True, scale=None):
        return softmax_attention(
            q,
            k,
            v,
            key_range=key_range,
            causal=causal,
            scale=scale,
            alibi_slopes=self.slopes,
            implementation=self.announce_implementation(q),
        )

    def announce_implementation(self, q):
        if self.options.implementation == "auto":
            announce("attention=softmax: implementation 'reference', softmax written out in torch.")
            return "reference"
        return super().announce_implementation(q)
