"""The backends by name, their options, and what they do with their state; on tensors alone, without transformers."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from dense_attention import dense_attention, dense_probabilities

import adasplash.attention.flash as flash
import adasplash.ops.range_attention as range_attention_module
from adasplash import KeyRange, entmax_attention
from adasplash.attention import BACKENDS, backend_options, without_idle_alpha
from adasplash.attention.alibi import alibi_slopes
from adasplash.ops.reordered_attention.reference import hash_buckets

HEADS, GROUPS, DIM = 4, 2, 8


def build(name, training=False, **options):
    backend = BACKENDS[name](backend_options(name, options), heads=HEADS, key_heads=GROUPS, head_dim=DIM)
    return backend.train(training)


def inputs(query_length=33, key_length=None, dtype=torch.float32, groups=GROUPS):
    key_length = key_length or query_length
    q = 2 * torch.randn(2, HEADS, query_length, DIM, dtype=dtype)
    return q, torch.randn(2, groups, key_length, DIM, dtype=dtype), torch.randn(2, groups, key_length, DIM, dtype=dtype)


def causal_mask(query_length, key_length):
    return KeyRange.causal(query_length, key_length).dense_mask(key_length)


# ------------------------------------------------------------------------------------------------ registry and options


def test_registry():
    assert sorted(BACKENDS) == ["adasplash", "flash", "hash_sparse", "qk_sparse", "softmax"]
    for name, backend in BACKENDS.items():
        assert backend.name == name
        options = backend_options(name)
        assert options == backend.Options() and hash(options) is not None
        assert backend_options(name, dataclasses.asdict(options)) == options


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("hash_spars", {}, "Unknown attention 'hash_spars'; expected one of softmax, .*Did you mean 'hash_sparse'"),
        ("adasplash", {"alhpa": 1.5}, "Unknown option 'alhpa' for attention=adasplash.*Did you mean 'alpha'"),
        (
            "flash",
            {"alpha": 1.5},
            "'alpha' for attention=flash; expected alibi, implementation. It belongs to attention=adasplash, hash_sparse,",
        ),
        ("adasplash", {"alpha": "abc"}, "Expected alpha of type float, got 'abc'"),
        ("adasplash", {"alpha": None}, "Expected alpha of type float, got None"),
        ("adasplash", {"alpha": [1.2, 1.3]}, "Expected alpha of type float, got \\[1.2, 1.3"),
        ("adasplash", {"learn_alpha": "no"}, "Expected learn_alpha of type bool \\(true or false\\), got 'no'"),
        ("hash_sparse", {"n_buckets": 16.5}, "Expected n_buckets of type int, got 16.5"),
        ("qk_sparse", {"drop": "half"}, "Expected drop of type float, got 'half'"),
        ("flash", {"implementation": "trition"}, "Did you mean 'triton'"),
        ("softmax", {"alibi": "alibis"}, "Did you mean 'alibi'"),
        ("adasplash", {"alpha": 1.0}, "1 < alpha <= 2.*for softmax use attention=flash"),
        ("adasplash", {"alpha": 2.5}, "got alpha = 2.5"),
        ("adasplash", {"alpha_start": 1.0, "alpha_steps": 5}, "1 < alpha_start <= 2"),
        ("adasplash", {"alpha_start": 1.1}, "alpha_start needs alpha_steps"),
        ("adasplash", {"alpha_steps": 7}, "alpha_steps = 7 needs an alpha_start"),
        ("adasplash", {"learn_alpha": True, "alpha_start": 1.1, "alpha_steps": 2}, "exclude each other"),
        ("adasplash", {"learn_alpha": True, "alpha": 2.0}, "cannot start at alpha = 2"),
        ("adasplash", {"learn_alpha": True, "alpha": 1.005}, "strictly between 1.01 and 2"),
        ("hash_sparse", {"n_buckets": 7}, "even n_buckets of at least 2, got 7"),
        ("hash_sparse", {"n_buckets": 0}, "even n_buckets"),
        ("hash_sparse", {"normaliser": "entmx"}, "Did you mean 'entmax'"),
        ("qk_sparse", {"alpha": 1.0, "normaliser": "entmax"}, "1 < alpha <= 2"),
        (
            "hash_sparse",
            {"alpha": 1.25},
            "alpha = 1.25 needs normaliser=entmax, got normaliser=softmax; .*leave alpha out",
        ),
        ("qk_sparse", {"drop": 1.0}, "0 <= drop < 1, got 1"),
        ("qk_sparse", {"drop_keys": -0.1}, "0 <= drop_keys < 1"),
        ("qk_sparse", {"score": "normal"}, "Did you mean 'norm'"),
    ],
)
def test_option_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        backend_options(name, options)


def test_options_are_plain_values_of_their_types():
    """Those of numpy and torch, too: the options are written as JSON and as YAML."""
    for number in (16.0, np.int64(16), torch.tensor(16)):
        assert type(backend_options("hash_sparse", {"n_buckets": number}).n_buckets) is int
    options = backend_options("adasplash", {"alpha": np.float32(1.25), "learn_alpha": np.bool_(True)})
    assert (options.alpha, options.learn_alpha) == (1.25, True)
    assert json.dumps(dataclasses.asdict(options))


@pytest.mark.parametrize("name", ["hash_sparse", "qk_sparse"])
def test_alpha_belongs_to_entmax(name):
    alphas = [
        ({}, 1.0),
        ({"alpha": None}, 1.0),
        ({"normaliser": "entmax"}, 1.5),
        ({"normaliser": "entmax", "alpha": 1.25}, 1.25),
    ]
    assert [backend_options(name, options).normaliser_alpha for options, _ in alphas] == [alpha for _, alpha in alphas]


def test_an_alpha_that_was_stored_beside_softmax_is_left_out():
    stored = {"name": "hash_sparse", "alpha": 1.25, "n_buckets": 4}
    assert without_idle_alpha(stored) == {"name": "hash_sparse", "n_buckets": 4}
    for used in ({"name": "adasplash", "alpha": 1.25}, stored | {"normaliser": "entmax"}, {}):
        assert without_idle_alpha(used) == used


def test_triton_says_why_not():
    q, k, v = inputs()
    for name in BACKENDS:
        with pytest.raises(ValueError, match="implementation=triton cannot run here: the kernels need a GPU"):
            build(name, implementation="triton")(q, k, v)


def test_the_implementation_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr("adasplash.ops.announce._announced", set())
    q, k, v = inputs()
    for _ in range(3):
        build("adasplash")(q, k, v)
    assert [record.message for record in caplog.records if "adasplash" in record.message] == [
        "attention=adasplash: implementation 'reference' on cpu (the kernels need a GPU)."
    ]


# ------------------------------------------------------------------------------------------------ what they compute


@pytest.mark.parametrize("alibi", ["none", "alibi", "nape"])
@pytest.mark.parametrize("lengths", [(1, 1), (33, 33), (1, 33), (5, 33), (33, 5)])
@pytest.mark.parametrize("name", ["softmax", "flash", "adasplash", "qk_sparse"])
def test_all_keys_in_range(name, lengths, alibi, monkeypatch):
    monkeypatch.setattr(
        range_attention_module, "SCORES_AT_ONCE", {"cpu": 2 * HEADS * 33 * 10}
    )  # rows in several blocks
    q, k, v = (x.requires_grad_() for x in inputs(*lengths))
    backend = build(name, alibi=alibi)
    alpha = 1.5 if name == "adasplash" else 1.0
    keep = torch.ones(2, lengths[1], dtype=torch.bool)
    keep[0, : lengths[1] // 3], keep[1] = False, False
    ranges = [
        (None, True, causal_mask(*lengths)),
        (None, False, torch.ones(lengths, dtype=torch.bool)),
        (KeyRange.padding(keep, lengths[0]), True, causal_mask(*lengths) & keep[:, None, None]),
    ]
    for key_range, causal, mask in ranges:
        out = backend(q, k, v, key_range=key_range, causal=causal, scale=0.5)
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        expected = dense_attention(*exact, mask, alpha=alpha, scale=0.5, slopes=alibi_slopes(alibi, HEADS))
        torch.testing.assert_close(out, expected.float(), atol=2e-5, rtol=1e-4)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert all(x.isfinite().all() for x in grads)
        if alpha == 1.0:
            wanted = torch.autograd.grad(expected.square().sum(), exact)
            for got, want in zip(grads, wanted, strict=True):
                torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-3)


def test_flash_reference_is_the_same_and_keeps_no_square_mask(monkeypatch):
    q, k, v = inputs(65)
    reference = build("flash", implementation="reference", alibi="alibi")(q, k, v)
    torch.testing.assert_close(build("flash", alibi="alibi")(q, k, v), reference)
    monkeypatch.setattr(range_attention_module, "SCORES_AT_ONCE", {"cpu": 2 * HEADS * 65 * 3})
    saved = []
    q.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        build("flash", alibi="alibi")(q, k, v)
    assert saved and max(saved) < 65 * 65


@pytest.mark.gpu
def test_flash_is_right_with_what_it_takes_here(caplog, monkeypatch):
    monkeypatch.setattr("adasplash.ops.announce._announced", set())
    backend = BACKENDS["flash"](backend_options("flash"), heads=4, key_heads=2, head_dim=64)
    q, k, v = (torch.randn(2, h, 507, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2))
    out = backend(q, k, v)
    assert "attention=flash: " in caplog.text
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*exact, causal_mask(507, 507).cuda(), alpha=1.0)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    got = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    for grad, want in zip(got, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert (grad.double() - want).norm() <= 2e-2 * want.norm()


def test_flash_needs_no_mask_where_there_is_none(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("took the masked path")

    monkeypatch.setattr(flash, "masked_fused_attention", never)
    backend = build("flash")
    for lengths, causal in (((33, 33), True), ((1, 33), True), ((5, 33), False)):
        backend(*inputs(*lengths), causal=causal)
    with pytest.raises(AssertionError, match="masked path"):
        backend(*inputs(5, 33), causal=True)


def test_hash_sparse_attends_within_buckets():
    q, k, v = inputs()
    backend = build("hash_sparse", n_buckets=4, normaliser="entmax", alpha=1.3)
    directions = backend.directions
    assert directions.shape == (GROUPS, DIM, 2)
    buckets = hash_buckets(q, directions.repeat_interleave(2, 0))[..., None]
    same = buckets == hash_buckets(k, directions).repeat_interleave(2, 1)[..., None, :]
    expected = dense_attention(q, k, v, causal_mask(33, 33) & same, alpha=1.3)
    torch.testing.assert_close(backend(q, k, v), expected.float(), atol=1e-5, rtol=1e-4)


def test_hash_directions_are_a_state_that_only_training_draws_anew():
    q, k, v = inputs()
    for resample, training, changes in ((False, True, False), (True, False, False), (True, True, True)):
        backend = build("hash_sparse", training, resample=resample)
        before = backend.directions.clone()
        backend(q, k, v)
        assert torch.equal(backend.directions, before) != changes
        torch.testing.assert_close(backend.directions.norm(dim=1), torch.ones(GROUPS, 8))
    assert list(backend.state_dict()) == ["directions"] and backend.state_names() == ("directions",)


def test_shared_qk():
    with pytest.raises(ValueError, match="as many key heads as query heads, got 4 and 2"):
        build("hash_sparse", shared_qk=True)
    options = backend_options("hash_sparse", {"shared_qk": True, "attend_self": False})
    backend = BACKENDS["hash_sparse"](options, heads=HEADS, key_heads=HEADS, head_dim=DIM)
    q, k, v = inputs(groups=HEADS)
    out = backend(q, k, v)
    assert (out[:, :, 0] == 0).all()  # the first token has nobody but itself
    torch.testing.assert_close(out, backend(q, torch.zeros_like(k), v))
    with pytest.raises(ValueError, match="use_cache=False"):
        backend(q[:, :, -1:], k, v)


@pytest.mark.parametrize("score", ["random", "norm"])
def test_qk_sparse_drops_in_training_alone_unless_asked(score):
    q, k, v = inputs(200)
    dropped = lambda backend: (backend(q, k, v) == 0).all(-1).float().mean((0, 2))  # share of the queries, per head
    assert (dropped(build("qk_sparse", score=score)) == 0).all()
    for backend in (
        build("qk_sparse", True, score=score, drop=0.3),
        build("qk_sparse", score=score, drop=0.3, drop_in_evaluation=True),
    ):
        assert ((dropped(backend) - 0.3).abs() < 0.1).all()
    query_kept, key_kept = build("qk_sparse", True, score=score, drop=0.1, drop_keys=0.6).kept(q, k)
    assert abs(query_kept.float().mean() - 0.9) < 0.05 and abs(key_kept.float().mean() - 0.4) < 0.05
    query_kept, _ = build("qk_sparse", True, score=score, per_head=False).kept(q, k)
    assert torch.equal(query_kept, query_kept[:, :1].expand_as(query_kept))


# ------------------------------------------------------------------------------------------------------------ alpha


def test_learned_alpha_starts_where_told_and_trains():
    backend = build("adasplash", True, learn_alpha=True, alpha=1.3)
    torch.testing.assert_close(backend.current_alpha(), torch.full((HEADS,), 1.3))
    q, k, v = inputs()
    torch.testing.assert_close(backend(q, k, v), entmax_attention(q, k, v, alpha=1.3), atol=1e-4, rtol=1e-3)
    optimizer = torch.optim.SGD(backend.parameters(), lr=10.0)
    target = entmax_attention(q, k, v, alpha=1.8)
    losses = []
    for _ in range(30):
        loss = (backend(q, k, v) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert (backend.current_alpha() > 1.3).all()
    assert list(backend.state_names()) == ["alpha_logit"]


@pytest.mark.parametrize("logit", [-100.0, 100.0])
def test_a_learned_alpha_cannot_leave_its_bounds(logit):
    backend = build("adasplash", learn_alpha=True)
    with torch.no_grad():
        backend.alpha_logit.fill_(logit)
    q, k, v = inputs()
    out = backend(q, k, v)
    out.sum().backward()
    assert out.isfinite().all() and backend.alpha_logit.grad.isfinite().all()
    assert ((backend.current_alpha() >= 1.01) & (backend.current_alpha() <= 2.0)).all()


def test_alpha_schedule():
    backend = build("adasplash", alpha_start=1.1, alpha=1.5, alpha_steps=10)
    q, k, v = inputs()
    for step, alpha in ((None, 1.1), (0, 1.1), (5, 1.3), (10, 1.5), (99, 1.5), (2, 1.18)):
        if step is not None:
            backend.set_step(step)
        assert float(backend.current_alpha()) == pytest.approx(alpha)
        torch.testing.assert_close(backend(q, k, v), entmax_attention(q, k, v, alpha=alpha), atol=1e-4, rtol=1e-3)
    backend.set_step(10)
    assert backend.current_alpha() == 1.5 and isinstance(backend.current_alpha(), float)
    fixed = build("adasplash", alpha=1.25)
    fixed.set_step(7)
    assert fixed.current_alpha() == 1.25


def test_alpha_of_a_schedule_survives_saving():
    options = {"alpha_start": 1.1, "alpha": 1.5, "alpha_steps": 10}
    for step, alpha in ((5, 1.3), (10, 1.5)):
        trained, fresh = build("adasplash", **options), build("adasplash", **options)
        trained.set_step(step)
        fresh.load_state_dict(trained.state_dict())
        assert float(fresh.current_alpha()) == pytest.approx(alpha)
        assert isinstance(fresh.current_alpha(), float) == (step == 10)


@pytest.mark.parametrize(
    "name, options, saved",
    [
        ("softmax", {}, []),
        ("flash", {"alibi": "alibi"}, ["slopes"]),
        ("adasplash", {}, ["alpha"]),
        ("adasplash", {"learn_alpha": True}, ["alpha", "alpha_logit"]),
        ("hash_sparse", {}, ["directions"]),
        ("qk_sparse", {}, []),
        ("qk_sparse", {"normaliser": "entmax"}, ["alpha"]),
    ],
)
def test_whatever_is_not_plain_softmax_leaves_a_trace_in_the_weights(name, options, saved):
    assert sorted(build(name, **options).state_dict()) == saved


# ------------------------------------------------------------------------------------------------------------ ALiBi


def test_slopes():
    assert alibi_slopes("none", 8) is None
    torch.testing.assert_close(alibi_slopes("alibi", 8), torch.tensor([2.0**-i for i in range(1, 9)]))
    torch.testing.assert_close(alibi_slopes("alibi", 16)[:3], torch.tensor([2**-0.5, 2**-1.0, 2**-1.5]))
    torch.testing.assert_close(alibi_slopes("nape", 4), torch.tensor([2.0**-4, 0, 2.0**-8, 0]))
    torch.testing.assert_close(alibi_slopes("nape", 3), torch.tensor([2.0**-4, 0, 2.0**-8]))
    with pytest.raises(ValueError, match="Unknown alibi 'napes'.*Did you mean 'nape'"):
        alibi_slopes("napes", 4)


@pytest.mark.parametrize("name", ["softmax", "flash", "adasplash", "hash_sparse"])
def test_unbiased_heads_of_nape_see_no_position(name):
    """Swapping two earlier tokens changes nothing for heads with slope 0, and does for the others."""
    q, k, v = inputs(9)
    k, v = k[:, :1].expand(-1, GROUPS, -1, -1), v[:, :1].expand(-1, GROUPS, -1, -1)
    backend = build(name, alibi="nape", **({"n_buckets": 2} if name == "hash_sparse" else {}))
    order = torch.tensor([5, 1, 2, 3, 4, 0, 6, 7, 8])
    last = lambda k, v: backend(q[:, :, -1:], k, v)
    one, other = last(k, v), last(k[:, :, order], v[:, :, order])
    torch.testing.assert_close(one[:, 1::2], other[:, 1::2])
    assert not torch.allclose(one[:, ::2], other[:, ::2], atol=1e-6)


# -------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("lengths", [(65, 65), (5, 70)])
def test_statistics_of_hash_sparse(lengths):
    q, k, _ = inputs(*lengths, dtype=torch.float64)
    backend = build("hash_sparse", n_buckets=2, normaliser="entmax", alpha=1.2, alibi="alibi")
    directions = backend.directions
    buckets = hash_buckets(q, directions.repeat_interleave(2, 0))[..., None]
    mask = causal_mask(*lengths) & (buckets == hash_buckets(k, directions).repeat_interleave(2, 1)[..., None, :])
    weighted = dense_probabilities(q, k, mask, alpha=1.2, slopes=alibi_slopes("alibi", HEADS)) > 0
    found = backend.statistics(q, k)
    torch.testing.assert_close(found.support, weighted.sum((0, 2, 3)) / (2 * lengths[0]), check_dtype=False)
    assert ((found.density > 0) & (found.density <= 1)).all()


def test_statistics_of_hash_sparse_density_falls_with_buckets():
    q, k, _ = inputs(512)
    few, many = (build("hash_sparse", n_buckets=n).statistics(q, k) for n in (2, 16))
    assert (many.density < few.density).all() and (many.support < few.support).all()
    assert (few.density < 0.9).all()


def test_statistics_of_the_others():
    q, k, _ = inputs(65)
    visible = (65 + 1) / 2
    for name in ("softmax", "flash", "qk_sparse"):
        found = build(name).statistics(q, k)
        torch.testing.assert_close(found.support, torch.full((HEADS,), visible))
        torch.testing.assert_close(found.density, torch.ones(HEADS))
    dropping = build("qk_sparse", True, drop=0.5).statistics(q, k).support
    assert (dropping < 0.5 * visible).all() and (dropping > 0).all()
    sparser = build("adasplash", alpha=2.0).statistics(q, k).support
    assert (sparser < build("adasplash", alpha=1.2).statistics(q, k).support).all()
    learned = build("adasplash", learn_alpha=True, alpha=1.2)
    torch.testing.assert_close(
        learned.statistics(q, k).support, build("adasplash", alpha=1.2).statistics(q, k).support, atol=0.1, rtol=0
    )


def test_statistics_of_shared_qk_look_at_the_queries():
    options = backend_options("hash_sparse", {"shared_qk": True, "n_buckets": 2})
    backend = BACKENDS["hash_sparse"](options, heads=HEADS, key_heads=HEADS, head_dim=DIM)
    q, k, _ = inputs(65, groups=HEADS)
    found, other = backend.statistics(q, k), backend.statistics(q, torch.zeros_like(k))
    assert torch.equal(found.support, other.support) and (found.support > 1).all()
    assert math.isclose(found.support.mean().item(), 17, rel_tol=0.3)  # half of the 33 that are visible on average
