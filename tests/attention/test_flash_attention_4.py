"""FlashAttention-4 as an operator of ours: taken where it fits, in compiled graphs too, with gradients. A stand-in where it is not."""

import sys

import pytest
import torch

import adasplash.attention.flash as flash
import adasplash.attention.flash_attention_4 as flash_attention_4
from adasplash.attention import BACKENDS, backend_options

HEADS, GROUPS, DIM = 4, 2, 64


def build():
    return BACKENDS["flash"](backend_options("flash"), heads=HEADS, key_heads=GROUPS, head_dim=DIM)


def inputs(**how):
    return [torch.randn(2, h, 33, DIM, requires_grad=True, **how) for h in (HEADS, GROUPS, GROUPS)]


@pytest.fixture
def stand_in_for_flash_attention_4(monkeypatch):
    """Functions called as the package's, in torch; returns what they were asked."""
    asked = []

    def forward(q, k, v, *, softmax_scale, causal, return_lse):  # (B, T, H, D) like the package's
        assert return_lse
        asked.append(("forward", softmax_scale, causal))
        out = flash.fused_attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, scale=softmax_scale)
        lse = q.new_zeros((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        return out.transpose(1, 2).contiguous(), lse, None

    def backward(q, k, v, out, d_out, lse, softmax_scale, causal, *, deterministic, dq, dk, dv):
        assert all(x.is_contiguous() for x in (dq, dk, dv))
        asked.append(("backward", softmax_scale, causal))  # by hand: there is no autograd inside an operator
        repeated_k, repeated_v = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, repeated_k) * softmax_scale
        later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
        p = scores.masked_fill(later & causal, -torch.inf).softmax(-1)
        dp = torch.einsum("bqhd,bkhd->bhqk", d_out, repeated_v)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * softmax_scale
        dq.copy_(torch.einsum("bhqk,bkhd->bqhd", ds, repeated_k))
        dk.copy_(torch.einsum("bhqk,bqhd->bkhd", ds, q).unflatten(2, (GROUPS, -1)).sum(3))
        dv.copy_(torch.einsum("bhqk,bqhd->bkhd", p, d_out).unflatten(2, (GROUPS, -1)).sum(3))

    kernels = flash_attention_4.Kernels(forward, backward)
    monkeypatch.setattr("adasplash.ops.announce._announced", set())
    monkeypatch.setattr(flash_attention_4, "installed_kernels", lambda: kernels)
    return asked


def test_flash_takes_flash_attention_4_where_it_is_and_fits(stand_in_for_flash_attention_4, monkeypatch, caplog):
    asked = stand_in_for_flash_attention_4
    q, k, v = inputs()
    q = q.detach().mT.contiguous().mT.requires_grad_()  # another last stride than 1 is no hindrance
    expected = build()(q, k, v, scale=0.3)
    assert not asked and "FlashAttention-4" not in caplog.text  # not on this device
    monkeypatch.setattr(flash_attention_4, "fits", lambda q, k, v: True)
    out = build()(q, k, v, scale=0.3)
    torch.testing.assert_close(out, expected)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for got, want in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert asked == [("forward", 0.3, True), ("backward", 0.3, True)]
    assert "attention=flash: FlashAttention-4." in caplog.text


def test_flash_attention_4_is_an_operator_for_the_compiler(stand_in_for_flash_attention_4, monkeypatch, caplog):
    operator = flash_attention_4.forward_operator
    q, k, v = (x.transpose(1, 2) for x in inputs())
    torch.library.opcheck(operator, (q, k, v, 0.3, True))
    q, k, v = (x.detach() for x in (q, k, v))
    saved = (q, k, v, *operator(q, k, v, 0.3, True))
    torch.library.opcheck(flash_attention_4.backward_operator, (torch.ones_like(saved[3]), *saved, 0.3, True))
    stand_in_for_flash_attention_4.clear()
    monkeypatch.setattr(flash_attention_4, "fits", lambda q, k, v: flash_attention_4.runs_on(q.device))
    runs_on = torch.compiler.assume_constant_result(lambda device: device.type == "cpu")
    monkeypatch.setattr(flash_attention_4, "runs_on", runs_on)
    backend = build()
    q, k, v = inputs()
    out = torch.compile(backend, fullgraph=True, backend="aot_eager")(q, k, v)
    out.sum().backward()
    assert "attention=flash: FlashAttention-4." in caplog.text
    assert [call[0] for call in stand_in_for_flash_attention_4] == ["forward", "backward"]
    torch.testing.assert_close(out, flash.fused_attention(q, k, v, causal=True, scale=q.shape[-1] ** -0.5))


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'flash_attn'"), OSError("libcute.so")])
def test_flash_attention_4_that_cannot_be_loaded_is_not_taken(error, monkeypatch, caplog):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("flash_attn"):
                raise error

    monkeypatch.setattr("adasplash.ops.announce._announced", set())
    monkeypatch.setattr("sys.meta_path", [Finder(), *sys.meta_path])
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    assert flash_attention_4.installed_kernels.__wrapped__() is None
    assert ("cannot be loaded" in caplog.text) == (not isinstance(error, ModuleNotFoundError))


@pytest.mark.gpu
def test_flash_attention_4_compiled_equals_eager():
    if not flash_attention_4.runs_on(torch.device("cuda")):
        pytest.skip("flash-attn-4 is not installed")
    q, k, v = inputs(device="cuda", dtype=torch.bfloat16)
    backend = build()
    torch.library.opcheck(
        flash_attention_4.forward_operator, (*(x.transpose(1, 2) for x in (q, k, v)), 0.125, True), atol=2e-2, rtol=2e-2
    )
    results = []
    for attend in (backend, torch.compile(backend, fullgraph=True)):
        out = attend(q, k, v)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = flash.fused_attention(*exact, causal=True, scale=0.125)
    results.append((out, *torch.autograd.grad(out.square().sum(), exact)))
    for eager, compiled, want in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
        assert (eager.double() - want).norm() <= 2e-2 * want.norm()
