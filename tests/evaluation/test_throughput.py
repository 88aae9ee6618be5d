"""Throughput on models small enough to time in no time."""

import time

import pytest
import torch
from torch import nn

from adasplash import models
from adasplash.evaluation import measure_throughput

CPU = torch.device("cpu")


class Sleeper(nn.Module):
    """A pass takes `seconds`, in a buffer that training mode changes; counts its passes."""

    def __init__(self, seconds=0.0, failure=None):
        super().__init__()
        self.seconds, self.failure, self.passes, self.texts = seconds, failure, 0, []
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("drawn", torch.zeros(()))

    def loss(self, input_ids):
        self.passes += 1
        self.texts.append(input_ids.clone())
        if self.failure:
            raise self.failure
        if self.training:
            self.drawn += torch.rand(())
        time.sleep(self.seconds)
        return self.weight * input_ids.sum()


@pytest.fixture(autouse=True)
def sleeping_losses(monkeypatch):
    monkeypatch.setattr(models, "summed_loss", lambda model, input_ids, targets: model.loss(input_ids))
    monkeypatch.setattr(models, "token_losses", lambda model, input_ids, targets: model.loss(input_ids).detach())


SETTINGS = {"seq_len": 16, "batch_size": 2, "vocab_size": 50, "device": CPU, "warmup": 2, "repeats": 5}


@pytest.mark.parametrize("backward", [False, True])
def test_rate_and_time_agree_and_warm_up_is_left_out(backward):
    model = Sleeper(0.01)
    measured = measure_throughput(model, backward=backward, **SETTINGS)
    assert model.passes == 7
    assert measured.status == "ok" and measured.repeats == 5 and measured.backward == backward
    assert 10 <= measured.ms < 100
    assert measured.tokens_per_s_p20 <= measured.tokens_per_s <= measured.tokens_per_s_p80 <= 32 / 0.01
    assert measured.tokens_per_s == pytest.approx(32 / measured.ms * 1000)
    assert measured.memory_gib >= 0 and "resident" in measured.memory_kind


def test_the_model_comes_back_as_it_was():
    model = Sleeper().eval()
    model.weight.grad = torch.tensor(3.0)
    state = torch.get_rng_state()
    measure_throughput(model, backward=True, **SETTINGS)
    assert not model.training
    assert model.weight.grad == 3 and model.drawn == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_the_tokens_are_random_and_always_the_same():
    first, second = Sleeper(), Sleeper()
    for model in (first, second):
        measure_throughput(model, backward=False, **SETTINGS)
        torch.rand(3)
    assert all(torch.equal(text, first.texts[0]) for text in first.texts + second.texts)
    assert first.texts[0].shape == (2, 16) and 0 <= first.texts[0].min() and first.texts[0].max() < 50
    assert len(first.texts[0].unique()) > 10


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_memory_that_runs_out_is_a_row(failure):
    measured = measure_throughput(Sleeper(failure=failure), backward=True, **SETTINGS)
    assert measured.status == "out of memory"
    assert (measured.seq_len, measured.batch_size, measured.backward) == (16, 2, True)
    assert measured.tokens_per_s is measured.ms is measured.memory_gib is None


def test_other_errors_stay_errors():
    with pytest.raises(RuntimeError, match="shapes"):
        measure_throughput(Sleeper(failure=RuntimeError("shapes do not match")), backward=False, **SETTINGS)


def test_what_cannot_be_measured_is_refused():
    model = Sleeper()
    with pytest.raises(ValueError, match="repeats of at least 1, got 0"):
        measure_throughput(model, backward=False, **SETTINGS | {"repeats": 0})
    model.wpe = nn.Embedding(8, 2)
    with pytest.raises(ValueError, match="8 learned positions.*16"):
        measure_throughput(model, backward=False, **SETTINGS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    device = torch.device("cuda")
    config = models.ModelConfig(config={"n_layer": 1, "n_head": 2, "n_embd": 64, "attn_pdrop": 0.0})
    model = models.build_model(config, vocab_size=64, end_token=0, seq_len=256, attention="flash").to(device)
    settings = SETTINGS | {"device": device, "seq_len": 256, "autocast": torch.bfloat16}
    forward = measure_throughput(model, backward=False, **settings)
    both = measure_throughput(model, backward=True, **settings)
    assert 0 < forward.ms < both.ms and 0 < forward.memory_gib <= both.memory_gib
    assert "GPU" in both.memory_kind
    allocated = torch.cuda.memory_allocated()
    too_much = measure_throughput(model, backward=True, **settings | {"batch_size": 1 << 21})
    assert too_much.status == "out of memory" and torch.cuda.memory_allocated() == allocated
