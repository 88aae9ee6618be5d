"""The sparsity of a model on a text, against `attention_statistics`."""

import functools
import json

import numpy as np
import pytest
import torch
from tiny_models import tiny

from adasplash import attention_statistics, patch_attention
from adasplash.data import keep_documents_apart
from adasplash.evaluation import measure_sparsity, result_row, result_tables

CPU = torch.device("cpu")


class Text:
    """Random tokens in memory; token 1 ends a document."""

    bytes_per_token = 4.0

    def __init__(self, length):
        self.tokens = np.random.default_rng(0).integers(2, 64, length)
        self.tokens[7::8] = 1

    def __len__(self):
        return len(self.tokens)

    def read(self, start, stop):
        return self.tokens[start:stop]


@pytest.mark.parametrize("apart", [False, True])
def test_numbers(apart):
    model, text = patch_attention(tiny("gpt2"), "adasplash", alpha=1.8).train(), Text(70)
    ids, position_ids = torch.from_numpy(text.read(0, 64))[None], torch.arange(64)[None] % 8 if apart else None
    layers = attention_statistics(model, ids, position_ids)
    how = {"keep_documents_apart": functools.partial(keep_documents_apart, end_token=1)} if apart else {}
    found = measure_sparsity(model, text, seq_len=64, device=CPU, **how)
    assert model.training
    assert found.support == pytest.approx(torch.stack([layer.support for layer in layers]).mean().item())
    assert found.density == pytest.approx(torch.stack([layer.density for layer in layers]).mean().item())
    assert found.largest_support == max(layer.largest.max().item() for layer in layers) <= (8 if apart else 64)
    assert found.by_layer_and_head["support"] == [layer.support.tolist() for layer in layers]
    row = result_row(found, model="tiny", attention="adasplash", tokenizer="bytes", device="CPU", dtype="fp32")
    assert row["evaluation"] == "sparsity" and json.loads(json.dumps(row)) == row
    (table,) = result_tables([row])
    assert {"density", "keys per query", "at most"} <= set(table.headings)


def test_errors():
    model = patch_attention(tiny("gpt2"))
    with pytest.raises(ValueError, match="seq_len from 1 to the 50 tokens of the text, got 64"):
        measure_sparsity(model, Text(50), seq_len=64, device=CPU)
    with pytest.raises(ValueError, match="64 learned positions, but seq_len is 65"):
        measure_sparsity(model, Text(70), seq_len=65, device=CPU)
