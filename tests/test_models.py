"""Building, loading, exporting models, and their losses."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, tiny, tokens
from transformers import AutoModelForCausalLM

import adasplash
import adasplash.models as models
from adasplash.attention.huggingface import CONFIG_FIELD, attention_backends
from adasplash.models import (
    ModelConfig,
    attention_statistics,
    build_model,
    check_length,
    export,
    hidden_states,
    longest_sequence,
    summed_loss,
    token_losses,
    training_flops_per_token,
)

GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 16, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
LLAMA = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "tie_word_embeddings": True,
}
BACKENDS = {
    "softmax": ("softmax", {}),
    "flash": ("flash", {"alibi": "alibi"}),
    "adasplash": ("adasplash", {"alpha": 1.25}),
    "learned": ("adasplash", {"learn_alpha": True, "alpha": 1.4}),
    "scheduled": ("adasplash", {"alpha_start": 1.1, "alpha_steps": 10}),
    "hash_sparse": ("hash_sparse", {"n_buckets": 4, "normaliser": "entmax"}),
    "qk_sparse": ("qk_sparse", {"drop": 0.5}),
}


def build(attention="flash", *, kind="gpt2", config=None, options=None, init_from=None, vocab_size=70, seq_len=32):
    return build_model(
        ModelConfig("tiny", kind, config if config is not None else {"gpt2": GPT2, "llama": LLAMA}[kind]),
        vocab_size=vocab_size,
        end_token=69,
        seq_len=seq_len,
        attention=attention,
        options=options,
        init_from=init_from and str(init_from),
    )


def unsettle(model):
    """Random weights everywhere, the backends' own included, so that nothing passes by being at its start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    for backend in attention_backends(model):
        backend.set_step(7)
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


# ---------------------------------------------------------------------------------------------------------------- build


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_build(kind):
    model = build(kind=kind, attention="adasplash", options={"alpha": 1.7})
    config = model.config
    assert config.vocab_size == 128 and config.bos_token_id == config.eos_token_id == 69  # 70 tokens padded to 64's
    assert config.max_position_embeddings == 32
    assert longest_sequence(model) == (32 if kind == "gpt2" else None)
    assert [backend.options.alpha for backend in attention_backends(model)] == [1.7, 1.7]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model(tokens(1, 32)).logits.shape == (1, 32, 128)


def test_a_full_vocabulary_is_not_padded():
    assert build(vocab_size=128).config.vocab_size == 128


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "gtp2", "config": {}}, "no causal language model of type 'gtp2'.*Did you mean 'gpt2'"),
        ({"kind": "vit", "config": {}}, "no causal language model of type 'vit'"),
        ({"config": {"n_layers": 2}}, "no key 'n_layers' for type gpt2.*Did you mean 'n_layer'"),
        ({"config": {"vocab_size": 5}}, "cannot set 'vocab_size'"),
        ({"config": {"n_positions": 5}}, "cannot set 'n_positions'"),
        ({"kind": "llama", "config": {"max_position_embeddings": 5}}, "cannot set 'max_position_embeddings'"),
        ({"attention": "flahs"}, "Unknown attention 'flahs'.*Did you mean 'flash'"),
        ({"config": {"n_layer": "two"}}, "refuses model.config for type gpt2 .*n_layer.*two"),
        ({"init_from": "no/folder"}, "Expected init_from as the folder .* got 'no/folder'"),
        ({"options": {"alpha": 1.5}}, "Unknown option 'alpha' for attention=flash"),
        ({"kind": "granite", "config": {**LLAMA, "logits_scaling": 2.0}}, "logits_scaling"),
        ({"kind": "cohere", "config": {**LLAMA, "logit_scale": 0.5}}, "logit_scale"),
        ({"kind": "phi", "config": {k: v for k, v in LLAMA.items() if "key_value" not in k}}, "bias on its output"),
    ],
)
def test_build_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


# ------------------------------------------------------------------------------------------------------ load and export


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_export_and_reload(kind, backend, tmp_path):
    name, options = BACKENDS[backend]
    model, ids = unsettle(build(name, kind=kind, options=options)), tokens()
    export(model, tmp_path, {"kind": "bytes"})
    fields = json.loads((tmp_path / "config.json").read_text())[CONFIG_FIELD]
    assert fields["name"] == name and fields.items() >= options.items()
    readme = (tmp_path / "README.md").read_text()
    assert f"attention={name}" in readme and "'kind': 'bytes'" in readme
    again = adasplash.from_pretrained(tmp_path).eval()
    assert [b.options for b in attention_backends(again)] == [b.options for b in attention_backends(model)]
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys() and all(torch.equal(state[key], loaded[key]) for key in state)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_a_reloaded_export_generates_with_a_cache(tmp_path):
    export(unsettle(build("adasplash", kind="llama")), tmp_path)
    model = adasplash.from_pretrained(tmp_path)
    assert model.generation_config.use_cache and model.config.use_cache
    assert model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False, pad_token_id=0).shape[0] == 1


@pytest.mark.parametrize("backend", ["adasplash", "hash_sparse", "flash"])
def test_plain_transformers_notices_weights_that_it_cannot_use(backend, tmp_path, monkeypatch):
    name, options = BACKENDS[backend]
    export(build(name, options=options), tmp_path)
    said = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning", lambda message, *_: said.append(message))
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any("attention_backend" in message and "UNEXPECTED" in message for message in said)


def test_plain_transformers_can_use_the_attention_by_name(tmp_path):
    model, ids = unsettle(build("adasplash", options={"alpha": 1.25})), tokens()
    export(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="adasplash").eval()
    assert torch.equal(logits(plain, ids), logits(model, ids))
    assert not torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids), atol=1e-3
    )


def test_another_backend_or_option_on_load(tmp_path):
    model, ids = unsettle(build("hash_sparse", options={"n_buckets": 4})), tokens()
    export(model, tmp_path)
    directions = attention_backends(model)[0].directions

    changed = adasplash.from_pretrained(tmp_path, normaliser="entmax", alpha=1.7)
    backend = attention_backends(changed)[0]
    assert (backend.name, backend.options.n_buckets, backend.options.alpha) == ("hash_sparse", 4, 1.7)
    assert torch.equal(backend.directions, directions)
    assert torch.equal(attention_backends(adasplash.from_pretrained(tmp_path, "hash_sparse"))[0].directions, directions)

    dense = adasplash.from_pretrained(tmp_path, "softmax").eval()
    assert {backend.name for backend in attention_backends(dense)} == {"softmax"}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(logits(dense, ids), logits(expected, ids))

    with pytest.raises(ValueError, match="do not fit these options.*directions"):
        adasplash.from_pretrained(tmp_path, n_buckets=8)
    with pytest.raises(ValueError, match="Unknown option 'buckets'"):
        adasplash.from_pretrained(tmp_path, buckets=8)


def test_an_export_with_an_alpha_that_never_did_anything_loads(tmp_path):
    model, ids = unsettle(build("hash_sparse", options={"n_buckets": 4})), tokens()
    export(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[CONFIG_FIELD]["alpha"] = 1.5  # as older exports have it
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(adasplash.from_pretrained(tmp_path).eval(), ids), logits(model, ids))


def test_options_rule_over_what_the_checkpoint_happens_to_hold(tmp_path):
    export(build("adasplash", options={"alpha": 1.25, "alibi": "alibi"}), tmp_path)
    backend = attention_backends(adasplash.from_pretrained(tmp_path, alpha=1.75, alibi="nape"))[0]
    assert backend.alpha == 1.75 and backend.current_alpha() == 1.75 and backend.slopes[1] == 0


def test_another_alpha_than_the_scheduled_one_is_had_at_once(tmp_path):
    model, ids = unsettle(build("adasplash", options={"alpha_start": 1.1, "alpha_steps": 10})), tokens()
    export(model, tmp_path)  # at step 7
    changed = adasplash.from_pretrained(tmp_path, alpha=1.9).eval()
    assert [backend.current_alpha() for backend in attention_backends(changed)] == [1.9, 1.9]
    fixed = adasplash.from_pretrained(tmp_path, alpha=1.9, alpha_start=None, alpha_steps=0).eval()
    assert torch.equal(logits(changed, ids), logits(fixed, ids))


def test_another_alpha_than_the_learned_ones_needs_a_word(tmp_path):
    export(unsettle(build("adasplash", options={"learn_alpha": True, "alpha": 1.4})), tmp_path)
    with pytest.raises(ValueError, match="alpha = 1.9 would change nothing.*alpha=1.4, or add learn_alpha=false"):
        adasplash.from_pretrained(tmp_path, alpha=1.9)
    changed = adasplash.from_pretrained(tmp_path, alpha=1.9, learn_alpha=False)
    assert [backend.current_alpha() for backend in attention_backends(changed)] == [1.9, 1.9]
    kept = attention_backends(adasplash.from_pretrained(tmp_path, alpha=1.4))[0]
    assert kept.current_alpha().unique().numel() == 2


def test_a_state_that_new_options_need_starts_fresh_and_says_so(tmp_path, caplog):
    export(build("adasplash"), tmp_path)
    model = adasplash.from_pretrained(tmp_path, learn_alpha=True)
    torch.testing.assert_close(attention_backends(model)[0].current_alpha(), torch.full((2,), 1.5))
    assert any("starts fresh" in record.message for record in caplog.records)


def test_a_checkpoint_of_plain_transformers(tmp_path):
    model, ids = tiny("llama"), tokens()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(adasplash.from_pretrained(tmp_path, "flash").eval(), ids), logits(model, ids))
    assert attention_backends(adasplash.from_pretrained(tmp_path))[0].name == "adasplash"
    half = adasplash.from_pretrained(tmp_path, "flash", dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16


def test_masked_language_models_load_too(tmp_path):
    model, ids = tiny("modernbert"), tokens()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = adasplash.from_pretrained(tmp_path, "softmax").eval()
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, (0, 0, 0)), ({"resid_pdrop": 0.2}, (0, 0.2, 0)), ({"embd_pdrop": 0.3}, (0, 0, 0.3))],
)
def test_a_new_model_has_no_dropout_unless_told(given, expected):
    config = models.ModelConfig(config={"n_layer": 1, "n_head": 2, "n_embd": 16, **given})
    built = models.build_model(config, vocab_size=64, end_token=0, seq_len=8, attention="adasplash").config
    assert (built.attn_pdrop, built.resid_pdrop, built.embd_pdrop) == expected


@pytest.mark.parametrize("value", [0.1, "0.1"])
def test_attention_dropout_is_refused_in_a_new_model(value):
    config = models.ModelConfig(config={"attn_pdrop": value})
    with pytest.raises(ValueError, match="model.config.attn_pdrop = .*0.1.*, but no backend has attention dropout"):
        models.build_model(config, vocab_size=64, end_token=0, seq_len=8, attention="adasplash")


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_missing_and_needless_weights(tmp_path, caplog):
    export(build("hash_sparse"), tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({"transformer.odd.weight": torch.ones(3)}))
    adasplash.from_pretrained(tmp_path)
    assert any("no use for transformer.odd.weight" in record.message for record in caplog.records)
    change_weights(tmp_path, lambda weights: weights.pop("transformer.h.1.attn.attention_backend.directions"))
    with pytest.raises(ValueError, match="own weights are missing.*h.1.attn.attention_backend.directions"):
        adasplash.from_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("transformer.h.0.mlp.c_fc.weight"))
    with pytest.raises(ValueError, match="lacks weights of GPT2LMHeadModel.*h.0.mlp.c_fc.weight"):
        adasplash.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="No transformers model at"):
        adasplash.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="No transformers model at"):
        adasplash.from_pretrained(tmp_path)


def test_a_run_folder_and_a_missing_folder_are_told_from_a_name_of_the_hub(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0")
    with pytest.raises(ValueError, match="got the run folder '.*'; it has no export/ yet"):
        adasplash.from_pretrained(tmp_path)
    export(build(), tmp_path / "export")
    with pytest.raises(ValueError, match="got the run folder '.*'; take its model: .*export"):
        adasplash.from_pretrained(str(tmp_path))
    adasplash.from_pretrained(tmp_path / "export")
    for nowhere in (tmp_path / "nowhere", "/nowhere", "./nowhere", "runs/nowhere/export"):
        with pytest.raises(
            ValueError, match="the folder of a transformers model, got '.*nowhere.*', which is not there"
        ):
            adasplash.from_pretrained(nowhere)


def test_a_model_of_the_hub_brings_its_state(tmp_path, monkeypatch):
    """Simulated: transformers' cache keeps such a checkpoint in a folder of its own."""
    model = build("hash_sparse")
    export(model, tmp_path)
    monkeypatch.setattr(models, "cached_file", lambda name, file: str(tmp_path / file))
    other = build("hash_sparse")
    models._load_backend_state(other, "somebody/some-model", attention_backends(other)[0].options)
    assert torch.equal(attention_backends(other)[1].directions, attention_backends(model)[1].directions)


def test_init_from(tmp_path):
    model, ids = unsettle(build("softmax")), tokens()
    export(model, tmp_path)
    sparse = build("adasplash", options={"alpha_start": 1.01, "alpha_steps": 5}, init_from=tmp_path).eval()
    assert torch.equal(sparse.transformer.wte.weight, model.transformer.wte.weight)
    torch.testing.assert_close(logits(sparse, ids), logits(model, ids), atol=0.3, rtol=0)  # alpha of 1.01: near softmax
    with pytest.raises(ValueError, match="32 learned positions, but seq_len is 64"):
        build(init_from=tmp_path, seq_len=64)
    with pytest.raises(ValueError, match="tokenizer has 200 tokens, but the checkpoint .* only 128"):
        build(init_from=tmp_path, vocab_size=200)
    tiny("granite", logits_scaling=3.0).save_pretrained(tmp_path / "granite")
    with pytest.raises(ValueError, match="logits_scaling"):
        build(init_from=tmp_path / "granite", vocab_size=VOCABULARY)


# --------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_losses(kind):
    model, ids = unsettle(build("adasplash", kind=kind)), tokens()
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    expected = F.cross_entropy(logits(model, ids).flatten(0, 1), targets.flatten(), reduction="none").view(2, 24)
    losses = token_losses(model, ids, targets)
    torch.testing.assert_close(losses, expected)
    assert (losses[:, -1] == 0).all() and not losses.requires_grad
    loss = summed_loss(model, ids, targets)
    torch.testing.assert_close(loss, losses.sum())
    loss.backward()
    weight = model.get_output_embeddings().weight
    ours = weight.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    torch.testing.assert_close(ours, weight.grad, atol=1e-4, rtol=1e-3)


def test_losses_of_packed_documents_are_those_of_the_documents():
    model, ids = unsettle(build("adasplash", kind="llama")), tokens(1, 24)
    targets = ids.roll(-1, 1)
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    together = token_losses(model, ids, targets, positions)
    alone = torch.cat([token_losses(model, ids[:, part], targets[:, part]) for part in (slice(9), slice(9, 24))], 1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(token_losses(model, ids, targets)[:, 9:], alone[:, 9:], atol=1e-3)


def test_losses_say_whether_positions_mark_documents(monkeypatch):
    """Unsaid, every layer would look, and wait for the GPU."""
    said = []
    spy = lambda *arguments: said.append(arguments[4])  # packed
    monkeypatch.setattr("adasplash.attention.huggingface.key_range_of", spy)
    model, ids = build(kind="llama"), tokens()
    hidden_states(model, ids)
    hidden_states(model, ids, torch.arange(24)[None])
    assert said == [False, False, True, True]


# ---------------------------------------------------------------------------------------------------------------- facts


def test_lengths():
    model = build(seq_len=32)
    check_length(model, 32)
    with pytest.raises(ValueError, match="32 learned positions, but seq_len is 33; use seq_len=32"):
        check_length(model, 33)
    check_length(build(kind="llama"), 10**6)
    opt = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 8, "word_embed_proj_dim": 32}
    for model, longest in ((tiny("roberta"), 64), (tiny("opt", **opt, max_position_embeddings=40), 40)):
        assert longest_sequence(model) == longest  # two rows of the tables stand for padding
        model(tokens(1, longest))
        with pytest.raises((IndexError, RuntimeError)):
            model(tokens(1, longest + 1))


def test_attention_statistics():
    model, ids = unsettle(build("adasplash", options={"alpha": 2.0})), tokens()
    statistics = attention_statistics(model, ids)
    assert len(statistics) == 2
    for layer in statistics:
        assert layer.density.shape == layer.support.shape == (2,)
        assert (layer.support >= 1).all() and (layer.support < 12.5).all()
    packed = attention_statistics(model, ids, (torch.arange(24) % 4).expand(2, -1))
    assert all((layer.support <= 2.5).all() for layer in packed)
    assert all(backend.recorded is None for backend in attention_backends(model))
    dense = attention_statistics(build("flash"), ids)
    assert all((layer.support == 12.5).all() and (layer.density == 1).all() for layer in dense)


def test_statistics_stop_recording_after_an_error():
    model = build("adasplash")
    model.transformer.h[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention_statistics(model, tokens())
    assert all(backend.recorded is None for backend in attention_backends(model))


def test_flops():
    """6 per weight of the matrix products, and 6 T C per layer; tied embeddings count once, as the output layer."""
    per_layer = 12 * 16 * 16
    attention = 6 * 2 * 32 * 16
    assert training_flops_per_token(build(), 32) == 6 * (2 * per_layer + 128 * 16) + attention
    tied, untied = (build(kind="llama", config={**LLAMA, "tie_word_embeddings": tied}) for tied in (True, False))
    assert training_flops_per_token(tied, 32) == training_flops_per_token(untied, 32)
