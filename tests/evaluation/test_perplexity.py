"""Perplexity against direct computations, on models whose loss is known."""

import functools
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from adasplash import models
from adasplash.data import keep_documents_apart
from adasplash.evaluation import measure_perplexity
from adasplash.evaluation.perplexity import window_places

CPU = torch.device("cpu")


class Text:
    """Tokens in memory."""

    bytes_per_token = 4.0

    def __init__(self, tokens):
        self.tokens = np.asarray(tokens, dtype=np.int64)

    def __len__(self):
        return len(self.tokens)

    def read(self, start, stop):
        assert 0 <= start < stop <= len(self.tokens)
        return self.tokens[start:stop]


def counting_text(length):
    """Every token is its own place in the text."""
    return Text(np.arange(length))


class KnownLoss(nn.Module):
    """loss(target, position) decides; remembers which targets it was asked for."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.asked, self.modes = loss, [], []

    def token_losses(self, input_ids, targets, position_ids=None):
        assert input_ids.shape == targets.shape and input_ids.dtype == targets.dtype == torch.int64
        counted = targets != -100
        assert torch.equal(targets[counted], input_ids[counted] + 1)  # of a counting text: the next token
        self.asked += targets[counted].tolist()
        self.modes.append(self.training)
        position = torch.arange(targets.shape[1]).expand_as(targets)
        return torch.where(counted, self.loss(targets.float(), position.float()), 0.0).float()


@pytest.fixture(autouse=True)
def known_losses(monkeypatch):
    real = models.token_losses

    def token_losses(model, *arguments):
        return model.token_losses(*arguments) if isinstance(model, KnownLoss) else real(model, *arguments)

    monkeypatch.setattr(models, "token_losses", token_losses)


def test_disjoint_windows_against_a_direct_computation():
    model = KnownLoss(lambda target, position: target / 100 + position / 10)
    measured = measure_perplexity(model, counting_text(1 + 3 * 8), seq_len=8, device=CPU)
    expected = np.mean([(i + 1) / 100 + (i % 8) / 10 for i in range(24)])
    assert measured.tokens == 24
    assert measured.stride == measured.seq_len == 8
    assert measured.loss == pytest.approx(expected, rel=1e-6)
    assert measured.perplexity == pytest.approx(math.exp(expected), rel=1e-6)


def test_strided_windows_give_every_target_its_context():
    """seq_len 8, stride 3, 15 targets: windows end at 8, 11, 14 and, moved back, at 15."""
    model = KnownLoss(lambda target, position: position)
    measured = measure_perplexity(model, counting_text(16), seq_len=8, stride=3, device=CPU)
    positions = [*range(8), 5, 6, 7, 5, 6, 7, 7]
    assert model.asked == list(range(1, 16))
    assert measured.loss == pytest.approx(np.mean(positions))
    assert {context: count for context, _, count in measured.by_position} == {1: 1, 2: 1, 3: 1, 4: 1, 6: 4, 8: 7}


def test_every_target_counts_once_whatever_the_lengths():
    numbers = random.Random(0)
    for _ in range(200):
        seq_len = numbers.randint(1, 40)
        stride = numbers.randint(1, seq_len)
        targets = seq_len + numbers.randint(0, 100)
        counted = []
        for begin, first in window_places(targets, seq_len, stride):
            assert 0 <= begin <= targets - seq_len and 0 <= first < seq_len
            assert begin == 0 or begin + seq_len == targets or first == seq_len - stride
            assert begin == 0 or first >= seq_len - stride  # at least that much context
            counted += range(begin + first, begin + seq_len)
        assert counted == list(range(targets))


@pytest.mark.parametrize(
    "length, seq_len, stride, batch_size", [(50, 7, 7, 4), (50, 7, 2, 3), (101, 33, 32, 1), (9, 8, 1, 5)]
)
def test_by_position_adds_up_to_the_total(length, seq_len, stride, batch_size):
    model = KnownLoss(lambda target, position: torch.cos(target) + 2 + position / 7)
    text = counting_text(length)
    measured = measure_perplexity(model, text, seq_len=seq_len, stride=stride, batch_size=batch_size, device=CPU)
    assert sorted(model.asked) == list(range(1, length))
    assert measured.tokens == length - 1 == sum(part.count for part in measured.by_position)
    total = sum(part.loss * part.count for part in measured.by_position)
    assert total / measured.tokens == pytest.approx(measured.loss, rel=1e-12)
    contexts = [part.context for part in measured.by_position]
    assert contexts == sorted(set(contexts)) and contexts[-1] == seq_len


def test_by_position_shows_where_the_loss_is():
    """A model that knows everything from 100 tokens on; the edges of the bins are those of any other length."""
    model = KnownLoss(lambda target, position: (position < 64).float())
    curve = measure_perplexity(model, counting_text(1 + 4 * 500), seq_len=500, device=CPU).by_position
    assert [part.loss for part in curve] == [float(part.context <= 64) for part in curve]
    shorter = measure_perplexity(model, counting_text(1 + 4 * 128), seq_len=128, device=CPU).by_position
    assert [part.context for part in shorter] == [part.context for part in curve][: len(shorter)]
    assert 16 <= len(curve) <= 32


def test_uniform_model_has_the_vocabulary_as_perplexity():
    vocabulary = 50257
    model = KnownLoss(lambda target, position: torch.full_like(target, math.log(vocabulary)))
    measured = measure_perplexity(model, counting_text(30), seq_len=7, device=CPU)
    assert measured.perplexity == pytest.approx(vocabulary, rel=1e-5)
    assert measured.bits_per_byte == pytest.approx(math.log2(vocabulary) / Text.bytes_per_token)


def test_sums_do_not_drown_in_float32():
    """One loss in 2^16 is large: in float32, the small ones would be lost beside it."""
    model = KnownLoss(lambda target, position: torch.where(target == 1, 2.0**30, 1.0))
    measured = measure_perplexity(model, counting_text(1 + 2**16), seq_len=2**8, device=CPU, batch_size=64)
    assert measured.loss * 2**16 == 2.0**30 + 2**16 - 1
    assert measured.perplexity == math.inf


def test_max_tokens_counts_the_first_targets():
    model = KnownLoss(lambda target, position: target)
    measured = measure_perplexity(model, counting_text(1000), seq_len=8, stride=3, max_tokens=21, device=CPU)
    assert measured.tokens == 21
    assert model.asked == list(range(1, 22))


def test_a_transformers_model_against_its_logits_and_comes_back_as_it_was():
    torch.manual_seed(0)
    config = models.ModelConfig(config={"n_layer": 1, "n_head": 2, "n_embd": 16, "resid_pdrop": 0.5})
    model = models.build_model(config, vocab_size=64, end_token=0, seq_len=12, attention="softmax")
    model.train()
    text = Text(torch.randint(64, (31,)))
    state = torch.get_rng_state()
    measured = measure_perplexity(model, text, seq_len=12, stride=5, device=CPU, batch_size=2)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)

    tokens, losses = torch.from_numpy(text.tokens), []
    model.eval()
    for begin, first in [(0, 0), (5, 7), (10, 7), (15, 7), (18, 9)]:
        logits = model(tokens[None, begin : begin + 12]).logits[0]
        losses.append(nn.functional.cross_entropy(logits, tokens[begin + 1 : begin + 13], reduction="none")[first:])
    assert measured.tokens == 30 == sum(map(len, losses))
    assert measured.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_documents_kept_apart_are_measured_as_if_each_were_alone():
    config = models.ModelConfig(config={"n_layer": 1, "n_head": 2, "n_embd": 16})
    model = models.build_model(config, vocab_size=64, end_token=0, seq_len=14, attention="softmax").eval()
    documents = [torch.cat([torch.randint(1, 64, (length,)), torch.zeros(1, dtype=torch.long)]) for length in (5, 2, 4)]
    text = Text(torch.cat([*documents, torch.ones(1, dtype=torch.long)]))
    apart = functools.partial(keep_documents_apart, end_token=0)
    measured = measure_perplexity(model, text, seq_len=14, device=CPU, keep_documents_apart=apart)

    losses = []
    for document in documents:
        logits = model(document[None]).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(logits, document[1:], reduction="none"))
    assert measured.tokens == 11 == sum(map(len, losses))
    assert measured.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert [(part.context, part.count) for part in measured.by_position] == [(1, 3), (2, 3), (3, 2), (4, 2), (6, 1)]


def test_autocast_reaches_the_model():
    seen = []

    def loss(target, position):
        seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return target

    measure_perplexity(KnownLoss(loss), counting_text(9), seq_len=8, device=CPU, autocast=torch.bfloat16)
    measure_perplexity(KnownLoss(loss), counting_text(9), seq_len=8, device=CPU)
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    "length, settings, expected",
    [
        (8, {}, "seq_len . 1 = 9 tokens .* a text of 8 tokens; use a shorter"),
        (100, {"max_tokens": 7}, "max_tokens = 7"),
        (100, {"stride": 9}, "stride from 1 to seq_len = 8, got 9"),
        (100, {"stride": 0}, "stride from 1 to seq_len = 8, got 0"),
        (100, {"batch_size": 0}, "batch_size of at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(length, settings, expected):
    model = KnownLoss(lambda target, position: target)
    with pytest.raises(ValueError, match=expected):
        measure_perplexity(model, counting_text(length), seq_len=8, device=CPU, **settings)


def test_a_length_beyond_the_learned_positions_is_refused():
    model = KnownLoss(lambda target, position: target)
    model.wpe = nn.Embedding(16, 4)
    with pytest.raises(ValueError, match="16 learned positions.*32.*rotary"):
        measure_perplexity(model, counting_text(100), seq_len=32, device=CPU)
