"""The bridge to transformers, on tiny random models of the kinds that people use."""

import subprocess
import sys

import pytest
import torch
from tiny_models import CAUSAL, CONFIGS, VOCABULARY, tiny, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, StaticCache

import adasplash
from adasplash.attention.huggingface import CONFIG_FIELD, attention_backends, key_range_of, layer_shape, padding_mask

KINDS = list(CONFIGS)
BACKENDS = {
    "softmax": ("softmax", {}),
    "flash": ("flash", {}),
    "adasplash": ("adasplash", {"learn_alpha": True}),
    "hash_sparse": ("hash_sparse", {"n_buckets": 4}),
    "hash_sparse-entmax": ("hash_sparse", {"n_buckets": 2, "normaliser": "entmax", "attend_self": True}),
    "qk_sparse": ("qk_sparse", {"alibi": "nape"}),
}


@pytest.fixture(autouse=True)
def registered():
    adasplash.register()


def patched(kind, backend, **changes):
    name, options = BACKENDS[backend]
    return adasplash.patch_attention(tiny(kind, **changes), name, **options)


def pads(where, length=24):
    """attention_mask (2, T): the first sample has pads, the second none."""
    mask = torch.ones(2, length, dtype=torch.long)
    if where == "left":
        mask[0, :5] = 0
    elif where == "right":
        mask[0, length - 5 :] = 0
    return mask


def logits(model, *args, seed=7, **kwargs):
    torch.manual_seed(seed)
    return (
        model(*args, use_cache=False, **kwargs).logits
        if model.config.model_type in CAUSAL
        else model(*args, **kwargs).logits
    )


# ---------------------------------------------------------------------------------------------- the same as eager


@pytest.mark.parametrize("backend", ["softmax", "flash"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_eager(kind, backend):
    model, ids = tiny(kind), tokens()
    model.set_attn_implementation("eager")
    cases = {None: None, "left": pads("left"), "right": pads("right")}
    expected = {where: logits(model, ids, attention_mask=mask) for where, mask in cases.items()}
    assert not torch.allclose(expected[None], expected["left"], atol=1e-3)
    adasplash.patch_attention(model, backend)
    for where, mask in cases.items():
        kept = torch.ones_like(ids) if mask is None else mask
        got = logits(model, ids, attention_mask=mask)
        torch.testing.assert_close(got[kept.bool()], expected[where][kept.bool()], atol=1e-4, rtol=1e-4)


def bart(encoder_heads=2):
    config = AutoConfig.for_model(
        "bart",
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=encoder_heads,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
    )
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def test_encoder_and_decoder_may_have_other_heads():
    model = adasplash.patch_attention(bart(encoder_heads=4), "hash_sparse", n_buckets=4)
    heads = [(backend.heads, backend.head_dim) for backend in attention_backends(model)]
    assert heads == [(4, 8), (2, 16), (2, 16)]
    assert model(tokens(), decoder_input_ids=tokens(length=7)).logits.isfinite().all()


def test_alibi_is_of_one_text():
    with pytest.raises(ValueError, match="alibi=nape needs queries and keys of one text.*BartAttention"):
        adasplash.patch_attention(bart(), "softmax", alibi="nape")


def test_cross_attention_sees_all_of_the_encoder():
    model = bart()
    ids, decoder_ids = tokens(length=24), tokens(length=7)
    run = lambda: [model(ids, attention_mask=m, decoder_input_ids=decoder_ids).logits for m in (None, pads("right"))]
    model.set_attn_implementation("eager")
    expected = run()
    adasplash.patch_attention(model, "softmax")
    for got, want in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_gqa_and_head_dims_are_those_of_the_layer():
    model = tiny("qwen3", head_dim=16)
    assert layer_shape(model.model.layers[0].self_attn) == {"heads": 4, "key_heads": 2, "head_dim": 16}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8}
    model = tiny("deepseek_v3", **latent, num_key_value_heads=4, first_k_dense_replace=2)
    ids = tokens()
    expected = logits(model, ids)
    adasplash.patch_attention(model, "softmax")
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    adasplash.patch_attention(model, "hash_sparse")
    assert attention_backends(model)[0].directions.shape == (4, 10, 8)
    assert logits(model, ids).isfinite().all()


# ---------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "roberta"])
def test_packed_documents_equal_documents_alone(kind, backend):
    model, ids = patched(kind, backend), tokens(1, 24)
    lengths = [9, 1, 14]
    first = 2 if kind == "roberta" else 0
    positions = torch.cat([torch.arange(n) for n in lengths])[None] + first
    alone = torch.cat(
        [
            logits(model, part, position_ids=torch.arange(part.shape[1])[None] + first)
            for part in ids.split(lengths, dim=1)
        ],
        1,
    )
    for packed in (None, True):
        together = logits(model, ids, position_ids=positions, packed=packed)
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    unseparated = logits(model, ids, position_ids=positions, packed=False)
    assert not torch.allclose(unseparated[:, 10:], alone[:, 10:], atol=1e-3)


def test_documents_may_differ_between_samples_and_stand_beside_pads():
    model, ids = patched("llama", "softmax"), tokens(2, 24)
    positions = torch.stack([torch.arange(24) % 8, torch.arange(24) % 12])
    together = logits(model, ids, position_ids=positions)
    for sample, length in ((0, 8), (1, 12)):
        alone = logits(model, ids[sample].view(-1, length)).view(24, -1)
        torch.testing.assert_close(together[sample], alone, atol=1e-4, rtol=1e-4)
    mask = pads("right")
    for packed in (None, True):
        padded = logits(model, ids, position_ids=positions, attention_mask=mask, packed=packed)
        torch.testing.assert_close(padded[mask.bool()], together[mask.bool()], atol=1e-4, rtol=1e-4)


def test_positions_of_pads_mark_no_documents():
    """Those of generation: the pads on the left have the position of the first kept token, or any."""
    q, mask = torch.zeros(2, 1, 24, 8), pads("left").bool()
    positions = torch.arange(24).expand(2, -1).masked_fill(~mask, 1)
    assert torch.equal(*(key_range_of(q, 24, mask, positions, packed, None).start for packed in (None, False)))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CAUSAL)
def test_the_future_does_not_leak(kind, backend, training):
    model, ids = patched(kind, backend).train(training), tokens()
    before = logits(model, ids)
    for place in (23, 12, 1):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] - 2 + 17) % (VOCABULARY - 2) + 2
        after = logits(model, changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-5, rtol=1e-5)
        assert (after[:, place] - before[:, place]).abs().max() > 1e-3


@pytest.mark.parametrize("where", ["left", "right"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_pads_do_not_matter(kind, backend, where):
    model, ids, mask = patched(kind, backend), tokens(), pads(where)
    kept = mask.bool()
    before = logits(model, ids, attention_mask=mask)
    noise = torch.where(kept, ids, tokens())
    torch.testing.assert_close(logits(model, noise, attention_mask=mask)[kept], before[kept], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model, noise)[kept], before[kept], atol=1e-3) or (
        where == "right" and kind in CAUSAL  # where causality alone hides them
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow(kind, backend):
    model = patched(kind, backend).train()
    logits(model, tokens(), attention_mask=pads("left")).log_softmax(-1)[..., 3].sum().backward()
    for name, parameter in model.named_parameters():
        if "pooler" not in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if parameter.ndim == 2 and "embedding" not in name:
                assert parameter.grad.abs().sum() > 0, name


# ---------------------------------------------------------------------------------------------- generation


def greedy(model, ids, mask, steps):
    """Greedy choices by the full forward pass, without any cache."""
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        following = logits(model, ids, attention_mask=mask, position_ids=positions)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CAUSAL)
def test_generate(kind, backend, cache):
    model, ids = patched(kind, backend), tokens(2, 12)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    how = {"max_new_tokens": 5, "do_sample": False} | ({} if cache == "dynamic" else {"cache_implementation": "static"})
    for mask in (torch.ones_like(ids), pads("left", 12)):
        assert torch.equal(model.generate(ids, attention_mask=mask, **how), greedy(model, ids, mask, 5))


def test_shared_qk_refuses_a_cache():
    model = adasplash.patch_attention(tiny("gpt2"), "hash_sparse", shared_qk=True)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pytest.raises(ValueError, match="use_cache=False in generate"):
        model.generate(tokens(), **how)
    assert model.generate(tokens(), use_cache=False, **how).shape == (2, 28)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=40)])
def test_step_by_step_with_a_cache_equals_the_whole(kind, cache):
    """Also where the mask is absent, of the tokens so far, or of all that a static cache may come to hold."""
    model, ids = patched(kind, "softmax"), tokens(2, 20)
    expected = logits(model, ids)
    for mask_length in (None, 20, 40):
        memory = cache(config=model.config)
        if mask_length == 40 and isinstance(memory, DynamicCache):
            continue
        parts = []
        for begin, end in ((0, 6), (6, 7), (7, 15), (15, 16), (16, 20)):
            mask = None if mask_length is None else torch.ones(2, end if mask_length == 20 else 40)
            parts.append(model(ids[:, begin:end], past_key_values=memory, attention_mask=mask).logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- numbers and compilers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "modernbert"])
def test_autocast(kind, backend):
    """Rotary positions leave q and k in float32 beside v in bf16."""
    model, ids = patched(kind, backend), tokens()
    exact = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits(model, ids)
    rounded.float().sum().backward()
    assert rounded.isfinite().all()
    if "hash" not in backend:  # a token near the border of two buckets may change sides
        assert (rounded - exact).norm() < 0.05 * exact.norm()


def run_with_positions(model, ids):
    return model(ids, position_ids=torch.arange(24)[None], packed=False, use_cache=False).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_flash_is_traced_as_one_graph(kind):
    model, ids = patched(kind, "flash").train(), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        out = run_with_positions(run, ids)
        grads.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
    torch.testing.assert_close(run_with_positions(compiled, ids), run_with_positions(model, ids))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_compiled_flash_equals_eager(tmp_path, monkeypatch):
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"no C++ compiler: {error}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, ids = patched("gpt2", "flash", n_layer=1), tokens()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(run_with_positions(compiled, ids), run_with_positions(model, ids), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- registration

REGISTRATION = """
import sys
{first}
{second}
import torch
from transformers import AutoModelForCausalLM, GPT2Config
config = GPT2Config(vocab_size=8, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=1)
model = AutoModelForCausalLM.from_config(config).eval()
model.set_attn_implementation("adasplash")
ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
plain = model(ids).logits
adasplash.patch_attention(model, "adasplash", alpha=1.5)
assert torch.equal(plain, model(ids).logits)
adasplash.patch_attention(model, "adasplash", alpha=2.0)
assert not torch.equal(plain, model(ids).logits)
"""


@pytest.mark.parametrize(
    "first, second",
    [
        ("import transformers", "import adasplash"),
        ("import adasplash; assert 'transformers' not in sys.modules", "adasplash.register()"),
    ],
)
def test_set_attn_implementation_alone(first, second):
    program = REGISTRATION.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layers_that_nobody_patched_use_what_the_configuration_names():
    model, ids = tiny("llama"), tokens()
    model.set_attn_implementation("adasplash")
    entmax = logits(model, ids)
    setattr(model.config, CONFIG_FIELD, {"name": "adasplash", "alpha": 2.0})
    sparsemax = logits(model, ids)
    assert not torch.allclose(entmax, sparsemax, atol=1e-3)
    adasplash.patch_attention(model, "adasplash", alpha=2.0)
    assert torch.equal(logits(model, ids), sparsemax)
    for field in (
        {"name": "hash_sparse"},
        {"name": "adasplash", "learn_alpha": True},
        {"name": "adasplash", "alpha_start": 1.1, "alpha_steps": 3},
    ):
        model = tiny("llama")
        model.set_attn_implementation("adasplash")
        setattr(model.config, CONFIG_FIELD, field)
        with pytest.raises(ValueError, match="use adasplash.from_pretrained"):
            model(ids)


def test_patching_again_replaces():
    model, ids = patched("gpt2", "hash_sparse").train(), tokens()
    assert len(attention_backends(model)) == 2
    adasplash.patch_attention(model, "adasplash", alpha=1.7)
    assert [backend.name for backend in attention_backends(model)] == ["adasplash", "adasplash"]
    assert getattr(model.config, CONFIG_FIELD)["alpha"] == 1.7
    assert all(backend.training for backend in attention_backends(model))
    assert not [key for key in model.state_dict() if "directions" in key]
    assert model(ids).logits.shape == (2, 24, VOCABULARY)


# ---------------------------------------------------------------------------------------------- errors


def test_attention_dropout_is_left_out_and_that_is_said(caplog, monkeypatch):
    monkeypatch.setattr("adasplash.ops.announce._announced", set())
    model = adasplash.patch_attention(tiny("gpt2", attn_pdrop=0.1, resid_pdrop=0.0, embd_pdrop=0.0), "flash")
    ids = tokens()
    expected = model.eval()(ids).logits
    assert "dropout" not in caplog.text
    torch.testing.assert_close(model.train()(ids).logits, expected)
    assert "GPT2Attention trains without its attention dropout of 0.1: no backend has dropout." in caplog.text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"attention_mask": torch.ones(2, 1, 24, 24, dtype=torch.bool)}, "shape \\(2, 1, 24, 24\\).*position_ids"),
        ({"attention_mask": torch.ones(2, 20)}, "one entry per key, 24, got one of length 20"),
        ({"attention_mask": torch.ones(2, 24).index_fill(1, torch.tensor([9]), 0)}, "pads between kept tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 10, 24])}, "position_ids that start again"),
        ({"packed": "yes"}, "packed as True, False or None, got 'yes'"),
    ],
)
def test_what_no_range_describes_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        patched("gpt2", "flash")(tokens(), use_cache=False, **arguments)


def test_modernbert_keeps_its_positions_from_its_attention():
    with pytest.raises(ValueError, match="packed=True needs position_ids of all keys"):
        patched("modernbert", "flash")(tokens(), position_ids=torch.arange(24)[None] % 9, packed=True)


def test_packed_needs_all_keys():
    model, ids = patched("llama", "flash"), tokens()
    cache = model(ids[:, :10], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="packed=True needs position_ids of all keys"):
        model(ids[:, 10:], past_key_values=cache, packed=True)


MIXTURE = {"num_local_experts": 2}


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("gemma2", {"head_dim": 8}, "softcap.*Gemma2Attention.*eager"),
        ("gpt_oss", {"head_dim": 8, **MIXTURE}, "s_aux \\(attention sinks\\)"),
    ],
)
def test_what_no_backend_has_is_refused(kind, changes, message):
    model = tiny(kind, **changes)
    with pytest.raises(ValueError, match=message):
        adasplash.patch_attention(model, "softmax")
    model.set_attn_implementation("adasplash")
    with pytest.raises(ValueError, match=message):
        model(tokens())


def test_chunks_are_refused_before_a_compiler_could_overlook_them():
    model = tiny("llama4_text", head_dim=8, attention_chunk_size=8, intermediate_size_mlp=32, **MIXTURE)
    with pytest.raises(ValueError, match="no chunked attention, which Llama4TextAttention uses"):
        adasplash.patch_attention(model, "flash")
    model.set_attn_implementation("adasplash")
    with pytest.raises(ValueError, match="chunked"):
        model(tokens())


def test_pads_between_kept_tokens_are_refused_in_a_compiled_graph():
    model = torch.compile(patched("gpt2", "flash", n_layer=1), backend="aot_eager")
    run = lambda mask: model(tokens(), attention_mask=mask, packed=False, use_cache=False).logits
    for mask in (pads("left"), pads("right"), torch.zeros(2, 24, dtype=torch.long)):
        assert run(mask).isfinite().all()
    with pytest.raises(RuntimeError, match="pads between kept tokens"):
        run(pads("left").index_fill(1, torch.tensor([9]), 0))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_weights_of_attention_are_refused(kind):
    model = patched(kind, "adasplash")
    adasplash.patch_attention(model, "flash")
    with pytest.raises(ValueError, match="never hold the weights of attention.*eager"):
        model(tokens(), output_attentions=True)
    model.set_attn_implementation("eager")
    assert model(tokens(), output_attentions=True).attentions[0].shape[-2:] == (24, 24)
    model = tiny(kind)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="never hold the weights of attention.*eager"):
        adasplash.patch_attention(model, "flash")


@pytest.mark.parametrize("model", ["gpt2", torch.nn.Linear(2, 2)])
def test_what_is_no_model_of_transformers_is_refused(model):
    with pytest.raises(ValueError, match="Expected a transformers model, got .*load it first"):
        adasplash.patch_attention(model, "flash")


def test_a_refused_model_is_left_as_it_was():
    model, ids = tiny("llama"), tokens()
    expected, implementation = logits(model, ids), model.config._attn_implementation
    with pytest.raises(ValueError, match="shared_qk needs as many key heads"):
        adasplash.patch_attention(model, "hash_sparse", shared_qk=True)
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model, ids), expected) and not hasattr(model.config, CONFIG_FIELD)


def test_prefixes_and_blocks_are_refused():
    with pytest.raises(ValueError, match='composes or_masks.*use attn_implementation="sdpa"'):
        from transformers.masking_utils import causal_mask_function, or_masks

        padding_mask(2, 24, 24, mask_function=or_masks(causal_mask_function, lambda b, h, q, k: k < 3))


@pytest.mark.parametrize("kind", ["gptj", "bloom"])
def test_models_beside_the_interface_are_refused(kind):
    sizes = {"vocab_size": 64, "n_embd": 32, "hidden_size": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    with pytest.raises(ValueError, match="no attention layer that goes through transformers' AttentionInterface"):
        adasplash.patch_attention(model, "flash")


def test_unknown_backend_and_option():
    with pytest.raises(ValueError, match="Did you mean 'adasplash'"):
        adasplash.patch_attention(tiny("gpt2"), "adaspalsh")
    with pytest.raises(ValueError, match="Did you mean 'n_buckets'"):
        adasplash.patch_attention(tiny("gpt2"), "hash_sparse", buckets=4)


@pytest.mark.gpu
def test_training_with_kernels_overlays_the_reference():
    """The loss curve on walks in steps of 1 and 2, done twice; the yardstick is what bfloat16 alone changes."""

    def losses(implementation, dtype, steps=80, length=512):
        torch.manual_seed(0)
        config = AutoConfig.for_model("gpt2", **CONFIGS["gpt2"] | {"n_embd": 128, "n_positions": length})
        model = AutoModelForCausalLM.from_config(config).cuda().train()
        adasplash.patch_attention(model, "adasplash", implementation=implementation)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        curve = []
        for _ in range(steps):
            ids = torch.randint(1, 3, (8, length // 2), device="cuda").cumsum(-1).repeat(1, 2) % VOCABULARY
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.detach())
        return torch.stack(curve)

    exact = losses("reference", torch.float32)
    allowed = (losses("reference", torch.bfloat16) - exact).abs().mean()
    assert exact[-1] < 0.5 * exact[0]  # it learns something
    assert (losses("triton", torch.float32) - exact).abs().mean() <= 2 * allowed + 1e-3
    assert (losses("triton", torch.bfloat16) - exact).abs().mean() <= 2 * allowed + 1e-3
