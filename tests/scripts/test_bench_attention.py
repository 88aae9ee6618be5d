"""The benchmark of attention, as far as it runs without a GPU."""

import json

import attention_inputs
import attention_peers
import bench_attention as bench
import pytest
import torch
from attention_peers import Call

from adasplash import entmax_attention, hash_sparse_attention, qk_sparse_attention
from adasplash.ops.reordered_attention import keep_mask, random_directions


def made(text, heads=2, length=256, dim=32, batch=1):
    return attention_inputs.make_inputs(attention_inputs.parse_input(text), batch, heads, length, dim, device="cpu")


@pytest.mark.parametrize("text", ["adasplash", "adasplash:1.25", "adasplash:learned", "hash_sparse:16", "fa4"])
def test_implementations_are_parsed(text):
    implementation = attention_peers.parse_implementation(text)
    assert implementation.name == text and text.startswith(implementation.kind)


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "fa3",
            "Unknown implementation 'fa3'; expected one of adasplash.*, hash_sparse:BUCKETS, .*adasplash2. Did you",
        ),
        ("hash_spars:16", "Did you mean 'hash_sparse'"),
        ("adasplash:1", r"Expected adasplash\[:ALPHA\|:learned\] with 1 < ALPHA <= 2, got 'adasplash:1'"),
        ("adasplash:x", "Expected adasplash.* got 'adasplash:x'"),
        ("hash_sparse", "Expected hash_sparse:BUCKETS with an even number of BUCKETS, got 'hash_sparse'"),
        ("hash_sparse:3", "an even number of BUCKETS, got 'hash_sparse:3'"),
        ("hash_sparse:learned", "an even number of BUCKETS"),
        ("qk_sparse:1", "0 <= DROP < 1, got 'qk_sparse:1'"),
        ("fa2:2", "Expected fa2, got 'fa2:2'"),
        ("softmax:", "Expected softmax, got 'softmax:'"),
    ],
)
def test_wrong_implementations_are_told_the_valid_form(text, said):
    with pytest.raises(ValueError, match=said):
        attention_peers.parse_implementation(text)


@pytest.mark.parametrize(
    "text, said",
    [
        ("uniform", "Unknown input 'uniform'; expected one of scattered:FRESH:A, clustered:TOPICS, gaussian"),
        ("gausian:.3", "Did you mean 'gaussian'"),
        ("scattered", "Expected scattered:FRESH:A with 0 <= FRESH <= 1, got 'scattered'"),
        ("scattered:.2", "Expected scattered:FRESH:A .* got 'scattered:.2'"),
        ("clustered:0", "Expected clustered:TOPICS with a whole number of TOPICS, got 'clustered:0'"),
        ("clustered:x", "got 'clustered:x'"),
        ("gaussian:1:2", r"Expected gaussian\[:SCALE\], got 'gaussian:1:2'"),
    ],
)
def test_wrong_inputs_are_told_the_valid_form(text, said):
    with pytest.raises(ValueError, match=said):
        attention_inputs.parse_input(text)


def test_the_help_names_every_input_and_implementation(capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["--help"])
    said = capsys.readouterr().out
    forms = [*attention_inputs.INPUTS.values(), *(peer.form for peer in attention_peers.PEERS.values())]
    assert end.value.code == 0 and all(f"  {form.text} " in said and form.summary in said for form in forms)


@pytest.mark.parametrize(
    "arguments",
    [["--implementations", "fa3"], ["--inputs", "uniform"], ["--lengths", "100"], ["--alpha", "1"], ["--alpha", "x"]],
)
def test_wrong_arguments_end_the_program(arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert arguments[1] in capsys.readouterr().err.splitlines()[-1]


def test_says_that_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["scattered:.2:.8", "clustered:3", "gaussian", "gaussian:.3"])
def test_inputs(text):
    first, second = made(text, batch=2), made(text, batch=2)
    assert [(tuple(x.shape), x.dtype) for x in first] == [((2, 2, 256, 32), torch.bfloat16)] * 4
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_scattered_queries_copy_from_places_that_advance_and_are_not_in_the_future():
    places = attention_inputs.copied_places(4, 512, 0.2, torch.Generator().manual_seed(0))
    assert places.shape == (4, 512) and (places >= 0).all() and (places <= torch.arange(512)).all()
    advances = (places.diff(dim=1) == 1).float().mean().item()
    assert 0.75 < advances < 0.87


def test_sparsity_is_counted_as_by_entmax():
    from adasplash import entmax

    q, k, *_ = made("scattered:.2:.8")
    scores = (q[0].float() @ k[0].float().mT / 32**0.5).masked_fill(~torch.ones(256, 256).tril().bool(), -1e9)
    for alpha in (1.5, 2.0):
        has_weight = entmax(scores, alpha) > 0
        tiles = has_weight.unflatten(-1, (4, 64)).any(-1).unflatten(-2, (4, 64)).any(-2)
        counted = attention_inputs.sparsity(q, k, alpha, chunk=128)
        assert counted.density == pytest.approx(tiles.sum().item() / 20)
        assert counted.support == pytest.approx(has_weight.sum().item() / 512, rel=2e-3)


def calls(q, k, v):
    """(name, alpha, call) of functions of the package, with what the benchmark says they may see."""
    for alpha in (1.25, 1.5, 2.0):
        yield f"alpha {alpha}", alpha, Call(lambda alpha=alpha: entmax_attention(q, k, v, alpha=alpha))
    torch.manual_seed(1)
    directions = random_directions(2, 32, 4)
    torch.manual_seed(1)
    allowed = attention_peers.prepare_hash_sparse(q, k, v, 4).allowed
    yield "hash", 1.0, Call(lambda: hash_sparse_attention(q, k, v, directions=directions), allowed=allowed)
    torch.manual_seed(1)
    masks = {"query_kept": keep_mask(q, 0.5), "key_kept": keep_mask(k, 0.5)}
    torch.manual_seed(1)
    allowed = attention_peers.prepare_qk_sparse(q, k, v, 0.5).allowed
    yield "qk", 1.0, Call(lambda: qk_sparse_attention(q, k, v, **masks), allowed=allowed)
    yield "fa2", 1.0, Call(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_right_results_pass_and_wrong_ones_do_not():
    q, k, v, out_gradient = (x.float() for x in made("scattered:.2:.8", length=384, batch=2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for name, alpha, call in calls(q, k, v):
        found = bench.errors(call, *leaves, out_gradient, alpha)
        assert set(found) == {"out", "dq", "dk", "dv"} and max(found.values()) < 1e-4, name
        assert bench.what_is_wrong(found) is None and q.grad is None
        other_alpha = 1.75 if alpha != 1.0 else 1.5
        found = bench.errors(call, *leaves, out_gradient, other_alpha)
        assert "wrong (error" in bench.what_is_wrong(found), name
    assert bench.what_is_wrong({"out": 1e-3, "dq": float("nan")}) == "wrong (error nan in dq)"


def test_a_run_leaves_rows_with_its_facts_and_pictures(monkeypatch, tmp_path, capsys):
    def measure(implementation, inputs, length, options):
        row = bench.describe(implementation, inputs, length, options)
        return row | {"problem": None, "forward_ms": 1.0, "backward_ms": 2.0, "sum_ms": 3.0, "extra_mib": 5}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "count_sparsity", lambda *_: {"density": 0.5, "support": 7.0})
    arguments = (
        "--lengths 512,1024 --inputs gaussian,clustered:3 --implementations adasplash,hash_sparse:16,fa2,adasplash2"
    )
    assert bench.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    names = [(row["implementation"], row["inputs"], row["alpha"]) for row in rows if row["length"] == 512]
    assert names == [
        *(("adasplash", inputs, 1.5) for inputs in ("gaussian", "clustered:3")),
        *(("hash_sparse:16", inputs, None) for inputs in ("gaussian", "clustered:3")),
        ("fa2", "any", None),
    ]
    assert {row["command"] for row in rows} == {f"bench_attention.py {arguments} --out {tmp_path}"}
    assert [row.get("support") for row in rows[:5]] == [7.0, 7.0, None, None, None]
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "attention.png", "lengths.png"}
    assert "adasplash2 is left out: not given" in capsys.readouterr().out


def test_a_peer_that_is_not_here_is_left_out_and_one_that_fails_says_so(tmp_path):
    adasplash2 = attention_peers.parse_implementation("adasplash2")
    assert "--adasplash2" in attention_peers.why_left_out(adasplash2, None, 1.5)
    assert "no adasplash/adasplash_v2.py" in attention_peers.why_left_out(adasplash2, tmp_path, 1.5)
    (tmp_path / "adasplash").mkdir()
    (tmp_path / "adasplash" / "adasplash_v2.py").write_text("")
    assert "alpha 1.5" in attention_peers.why_left_out(adasplash2, tmp_path, 2.0)
    assert attention_peers.why_left_out(adasplash2, tmp_path, 1.5) is None
    assert attention_peers.why_left_out(attention_peers.parse_implementation("fa2"), None, 1.5) is None


def test_packed_documents_do_not_see_each_other():
    q, k, v, _ = made("gaussian", batch=2)
    positions = attention_inputs.draw_documents(2, 256, 5, device="cpu")
    assert ((positions == 0).sum(-1) == 5).all() and positions.max() < 256
    call = attention_peers.prepare(attention_peers.parse_implementation("softmax"), q, k, v, 1.0, positions)
    document = (positions == 0).cumsum(-1)
    assert torch.equal(call.allowed[1], (document[0, :, None] == document[0])[-attention_peers.CHECKED_QUERIES :])
    reason = attention_peers.why_left_out(attention_peers.parse_implementation("cudnn"), None, 1.5, documents=5)
    assert "softmax, fa2, fa4" in reason


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["softmax", "fa2"])
def test_packed_documents_are_timed_by_what_is_right(name, tmp_path, capsys):
    arguments = ["--lengths", "512", "--inputs", "gaussian", "--implementations", name, "--documents", "3"]
    assert bench.main([*arguments, "--tokens", "1024", "--seconds-per-timing", ".01", "--out", str(tmp_path)]) == 0
    assert " ms" in capsys.readouterr().out and "wrong" not in (tmp_path / "rows.jsonl").read_text()
