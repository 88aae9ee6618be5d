"""The chunked loss against torch's, and that it never holds all the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import adasplash.ops.cross_entropy as cross_entropy
from adasplash.ops.cross_entropy import summed_cross_entropy, token_cross_entropy

CHUNK = 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", CHUNK)


def problem(tokens, vocabulary=37, width=6, dtype=torch.float32):
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[::3] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_sum_tokens_and_gradients(tokens):
    hidden, weight, targets = problem(tokens)
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, targets, reduction="sum")
    loss = summed_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        token_cross_entropy(hidden, weight, targets), F.cross_entropy(logits, targets, reduction="none")
    )
    for got, want in zip(
        torch.autograd.grad(loss * 0.3, (hidden, weight)),
        torch.autograd.grad(expected * 0.3, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_nothing_counted():
    hidden, weight, targets = problem(11)
    loss = summed_cross_entropy(hidden, weight, targets.fill_(-100))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_one_gradient_alone_and_none():
    hidden, weight, targets = problem(11)
    whole = torch.autograd.grad(summed_cross_entropy(hidden, weight, targets), (hidden, weight))
    alone = torch.autograd.grad(summed_cross_entropy(hidden.detach(), weight, targets), weight)[0]
    torch.testing.assert_close(alone, whole[1])
    alone = torch.autograd.grad(summed_cross_entropy(hidden, weight.detach(), targets), hidden)[0]
    torch.testing.assert_close(alone, whole[0])
    assert not summed_cross_entropy(hidden.detach(), weight.detach(), targets).requires_grad
    assert not token_cross_entropy(hidden, weight, targets).requires_grad


def test_large_logits():
    hidden, weight, targets = problem(11)
    loss = summed_cross_entropy(1e4 * hidden, weight, targets)
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    torch.testing.assert_close(loss, F.cross_entropy(1e4 * hidden @ weight.T, targets, reduction="sum"))


def test_a_negative_target_other_than_the_ignored_one_is_an_error():
    hidden, weight, targets = problem(11)
    targets[4] = -1
    with pytest.raises((IndexError, RuntimeError), match="index"):
        summed_cross_entropy(hidden, weight, targets)


def test_bf16_under_autocast_errs_no_more_than_the_plain_computation():
    hidden, weight, targets = problem(200, vocabulary=500, width=64)
    hidden64, weight64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = F.cross_entropy(hidden64 @ weight64.T, targets, reduction="sum")
    exact = (exact, *torch.autograd.grad(exact, (hidden64, weight64)))
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
        ours = summed_cross_entropy(hidden, weight, targets)
        tokens = token_cross_entropy(hidden, weight, targets)
    plain = (plain, *torch.autograd.grad(plain, (hidden, weight)))
    torch.testing.assert_close(tokens.sum(), ours)
    ours = (ours, *torch.autograd.grad(ours, (hidden, weight)))
    for got, usual, want in zip(ours, plain, exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= 2 * (usual - want).abs().max() + 1e-6


def test_gradient_accumulates_in_float32_over_chunks():
    """Many small contributions to one row of the weight: summed in bf16 most of them would be lost."""
    hidden, weight, targets = problem(4000, vocabulary=5, width=4)
    targets[:] = 0
    with torch.autocast("cpu", torch.bfloat16):
        summed_cross_entropy(hidden.detach() + 3, weight, targets).backward()
    hidden64, weight64 = hidden.detach().double() + 3, weight.detach().double().requires_grad_()
    F.cross_entropy(hidden64 @ weight64.T, targets, reduction="sum").backward()
    assert (weight.grad - weight64.grad).norm() < 0.01 * weight64.grad.norm()


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_the_logits_never_exist_at_once():
    hidden, weight, targets = problem(20 * CHUNK, vocabulary=300, width=4)
    with Largest() as largest:
        summed_cross_entropy(hidden, weight, targets).backward()
        token_cross_entropy(hidden, weight, targets)
    assert largest.elements == CHUNK * 300  # one chunk of logits, here more than the weight
    with Largest() as largest:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    assert largest.elements >= 20 * CHUNK * 300  # so the counting counts
