"""Pictures of a head's support, against the weights with which its backend mixes values."""

import pytest
import torch
from tiny_models import tiny, tokens

import adasplash
import adasplash.evaluation.support as support
from adasplash import draw_support, patch_attention
from adasplash.attention.huggingface import attention_backends
from adasplash.evaluation import plot_support
from adasplash.models import hidden_states
from adasplash.ops.support_map import SupportMap

PNG = b"\x89PNG"
BACKENDS = {
    "flash": ("flash", {}),
    "adasplash": ("adasplash", {"alpha": 1.8, "alibi": "alibi"}),
    "learned": ("adasplash", {"learn_alpha": True}),
    "scheduled": ("adasplash", {"alpha": 2.0, "alpha_start": 1.1, "alpha_steps": 10}),
    "hash_sparse": ("hash_sparse", {"n_buckets": 4, "normaliser": "entmax", "alibi": "nape"}),
    "shared_qk": ("hash_sparse", {"n_buckets": 4, "shared_qk": True, "resample": True, "attend_self": False}),
    "qk_sparse": ("qk_sparse", {"drop": 0.4, "score": "norm", "normaliser": "entmax"}),
}


def patched(kind, name):
    backend, options = BACKENDS[name]
    model = patch_attention(tiny(kind), backend, **options)
    for module in attention_backends(model):
        module.set_step(4)
        if name == "learned":
            module.alpha_logit.data.uniform_(-2, 3)
    return model.train()  # in which hash_sparse may resample, and qk_sparse drops


@pytest.fixture
def drawn(monkeypatch):
    """The maps that would be drawn."""
    maps = []
    monkeypatch.setattr(support, "plot_support", lambda found, path, title: maps.append(found))
    return maps


def mixed(model, layer):
    """A list that receives the weights (H, T, T) of the layer's next forward pass: its output for values of identity."""
    found = []

    def after_forward(backend, inputs, options, output):
        if not found:
            q, k, _ = inputs
            mode, backend.training = backend.training, backend.name == "qk_sparse"  # with the directions just drawn
            identity = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
            found.extend(backend.forward(q, k, identity, **options)[0])
            backend.training = mode

    attention_backends(model)[layer].register_forward_hook(after_forward, with_kwargs=True)
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_what_runs_is_drawn(kind, name, packed, drawn):
    """Of grouped heads and sliding windows too, which mistral has."""
    if kind == "mistral" and name == "shared_qk":
        pytest.skip("not with grouped heads")
    model, ids = patched(kind, name), tokens(1, 33)
    position_ids = torch.arange(33) % 20 if packed else None
    weights = mixed(model, 1)
    for head in (0, 1):
        draw_support(model, ids, layer=1, head=head, position_ids=position_ids)
        draw_support(
            model, ids[0], layer=1, head=head, position_ids=position_ids, queries=(11, 33), keys=(3, 29), cells=9
        )
    for head in (0, 1):
        weighted = weights[head] > 0
        whole, zoomed = drawn[2 * head : 2 * head + 2]
        assert torch.equal(whole.counts.bool(), weighted)
        cells = [[int(cell.sum()) for cell in rows.split(3, 1)] for rows in weighted[11:33, 3:29].split(3)]
        assert zoomed.counts.tolist() == cells and zoomed.size == 3
        assert 0 < whole.counts.sum() <= 33 * 34 / 2


def test_the_model_comes_back_as_it_was(drawn):
    model, ids = patched("gpt2", "shared_qk"), tokens(1, 9)
    state, random = {name: x.clone() for name, x in model.state_dict().items()}, torch.get_rng_state()
    draw_support(model, ids, layer=0, head=0)
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_of_a_compiled_model(drawn):
    model, ids = patched("gpt2", "flash").eval(), tokens(1, 9)  # one graph, in which a hook added later is not seen
    draw_support(model, ids, layer=1, head=0)
    model.base_model.compile(backend="eager")
    with torch.no_grad():
        hidden_states(model, ids)  # the call that is compiled, and made again below
    draw_support(model, ids, layer=1, head=0)
    assert torch.equal(drawn[0].counts, drawn[1].counts)


def test_errors(tmp_path):
    model, ids = patched("gpt2", "adasplash"), tokens(1, 9)
    cases = [
        ({"model": tiny("gpt2")}, "with a backend on its attention layers, got a GPT2LMHeadModel without"),
        ({"layer": 2}, "layer as a whole number from 0 to 1, got 2"),
        ({"layer": "1"}, "layer as a whole number from 0 to 1, got '1'"),
        ({"layer": 0.5}, "layer as a whole number from 0 to 1, got 0.5"),
        ({"head": -1}, "head as a whole number from 0 to 1, got -1"),
        ({"input_ids": tokens(2, 9)}, r"input_ids of one text, \(T,\) or \(1, T\), got \(2, 9\); give input_ids\[:1\]"),
        ({"input_ids": [1, 2]}, "input_ids as a tensor, got list"),
        ({"input_ids": tokens(1, 65)}, "64 learned positions"),
        ({"keys": (0, 10)}, "keys as a window"),
        ({"path": tmp_path / "x"}, "path of a picture that ends in .png, .svg, .pdf, got '.*x'"),
        ({"path": tmp_path / "x.txt"}, "path of a picture that ends in"),
        ({"path": str(tmp_path)}, "path of a picture that ends in .png, .svg, .pdf, got the folder"),
    ]
    for how, message in cases:
        with pytest.raises(ValueError, match=message):
            draw_support(**{"model": model, "input_ids": ids, "layer": 0, "head": 0, "path": tmp_path / "x.png"} | how)
    assert not any(module._forward_hooks for module in model.modules()) and not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="with a backend on its attention layers"):
        adasplash.attention_statistics(tiny("gpt2"), ids)


TEXTS = [
    ({"input_ids": torch.rand(1, 9)}, "input_ids as whole numbers, int64 or int32, got torch.float32"),
    ({"input_ids": tokens(1, 0)}, r"input_ids of shape \(batch, length\), at least one token, got \(1, 0\)"),
    ({"input_ids": torch.tensor([[3, 64]])}, "input_ids from 0 to 63, the model's vocabulary, got 3 to 64"),
    ({"input_ids": torch.tensor([[-1, 3]])}, "input_ids from 0 to 63, the model's vocabulary, got -1 to 3"),
    ({"input_ids": tokens(1, 65)}, "64 learned positions, but seq_len is 65"),
    ({"position_ids": torch.rand(1, 9)}, "position_ids as whole numbers"),
    ({"position_ids": torch.arange(8)[None]}, r"position_ids as input_ids, \(1, 9\), got \(1, 8\)"),
]


@pytest.mark.parametrize("how, message", TEXTS)
def test_texts_that_a_model_cannot_read(how, message, drawn):
    model, how = patched("gpt2", "adasplash"), {"input_ids": tokens(1, 9)} | how
    with pytest.raises(ValueError, match=message):
        draw_support(model, **how, layer=0, head=0)
    with pytest.raises(ValueError, match=message):
        adasplash.attention_statistics(model, **how)


def test_packed_documents_may_be_longer_together_than_the_positions(drawn):
    model, how = patched("gpt2", "flash"), {"input_ids": tokens(1, 80), "position_ids": torch.arange(80)[None] % 40}
    (layer, _) = adasplash.attention_statistics(model, **how)
    draw_support(model, **how, layer=torch.tensor(0), head=1)
    assert drawn[0].counts.sum() == 40 * 41 and layer.support[1] == 20.5


@pytest.mark.parametrize("cells", [64, 8])
def test_the_picture(cells, tmp_path):
    path = draw_support(
        patched("gpt2", "adasplash"), tokens(1, 64), layer=1, head=0, path=str(tmp_path / "new" / "x.png"), cells=cells
    )
    assert path == tmp_path / "new" / "x.png" and path.read_bytes().startswith(PNG) and path.stat().st_size > 5000


@pytest.mark.parametrize("size, full", [(1, 1), (4, 16)])
def test_full_cells_are_black_and_empty_ones_white(size, full, tmp_path):
    from matplotlib.image import imread

    for count, low, high in ((full, 0.0, 0.1), (0, 0.9, 1.0)):
        window = (0, 2 * size)
        found = SupportMap(torch.full((2, 2), count), size, window, window)
        image = imread(plot_support(found, tmp_path / "x.png"))
        pixel = image[image.shape[0] // 3, image.shape[1] // 3, :3].mean()
        assert low <= pixel <= high
