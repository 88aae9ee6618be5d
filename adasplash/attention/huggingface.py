"""The bridge to transformers: one attention function under the one name "adasplash", for every backend.

`patch_attention` puts a backend on each attention layer of a model; the registered function hands q, k and v over to it,
with the masks of transformers turned into a KeyRange. Layers without a backend of their own use what the model's
configuration names, else plain AdaSplash attention, so that `model.set_attn_implementation("adasplash")` is enough.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from ..ops.key_range import KeyRange, check_padding
from . import BACKENDS, backend_options
from .backend import AttentionBackend, Options

NAME = "adasplash"
CONFIG_FIELD = "adasplash_attention"  # in config.json: {"name": backend, **options}
SUBMODULE = "attention_backend"  # on each attention layer

# Arguments that change what attention means, and that no backend has.
UNSUPPORTED = {
    "softcap": "a cap on the scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias of relative positions",
}


def register() -> None:
    """Makes "adasplash" an attention implementation of transformers; may be called again."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    device=None,
    **kwargs,
) -> Tensor | None:
    """What transformers hands on as attention_mask: None, or bool (B, number of valid keys), True where kept.

    Raises:
        ValueError: for pads between kept tokens.
    """
    seen = q_offset + q_length
    if attention_mask is not None:
        # a static cache is longer than what it holds: the mask's length says how much that is
        attention_mask = attention_mask[:, -kv_length:].to(torch.bool)
        if not torch.compiler.is_compiling():
            if attention_mask.shape[1] == kv_length and attention_mask.all():
                return None
            check_padding(attention_mask)
        return attention_mask
    if kv_offset == 0 and (isinstance(seen, Tensor) or seen < kv_length):
        return torch.ones(batch_size, int(seen), dtype=torch.bool, device=device)
    return None


def _refuse_unsupported(module: nn.Module, attention_mask, dropout: float, kwargs: dict) -> None:
    if dropout:
        raise ValueError(
            f"The attention backends have no dropout, but {type(module).__name__} asks for {dropout}. "
            "Set the model's attention dropout to 0 (attn_pdrop, attention_dropout or attention_probs_dropout_prob)."
        )
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise ValueError(
            f"Expected a padding mask of shape (batch, keys), got one of shape {shape}. Describe packed documents by "
            'position_ids and padding by a 2-D mask, or use attn_implementation="sdpa" for free-form masks.'
        )
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"The attention backends do not support {name} ({meaning}), which {type(module).__name__} passes; "
                'use attn_implementation="eager" for this model.'
            )


def key_range_of(
    q: Tensor,
    key_length: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    packed: bool | None,
    sliding_window: int | None,
) -> KeyRange | None:
    """The range that transformers' arguments describe, beside causality; None where all keys are visible.

    packed: whether position_ids mark documents. None: look (which waits for a GPU), as transformers itself does, only
        where there is neither a mask nor a cache.
    """
    ranges = []
    query_length = q.shape[2]
    if sliding_window is not None:
        ranges.append(KeyRange.window(query_length, sliding_window, key_length, device=q.device))
    if attention_mask is not None:
        ranges.append(KeyRange.padding(attention_mask, query_length))
    elif position_ids is not None and query_length == key_length and query_length > 1:
        if packed is None:
            packed = bool((position_ids[:, 1:] != position_ids[:, :-1] + 1).any())
        if packed:
            ranges.append(KeyRange.documents(position_ids))
    if not ranges:
        return None
    return ranges[0] if len(ranges) == 1 else ranges[0] & ranges[1]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    packed: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The registered function: query (B, H, Tq, D), key and value (B, G, Tk, D) -> (B, Tq, H, D).

    `packed` can be given to the model's forward: True or False says, without looking, whether position_ids mark packed
    documents (looking breaks a compiled graph).

    Raises:
        ValueError: for what the backends cannot honour: 4-D masks, dropout, softcap, sinks, position biases.
    """
    _refuse_unsupported(module, attention_mask, dropout, kwargs)
    if attention_mask is not None and attention_mask.shape[1] < key.shape[2]:
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    key_range = key_range_of(query, key.shape[2], attention_mask, position_ids, packed, sliding_window)
    backend = getattr(module, SUBMODULE, None)
    if backend is None:
        backend = _default_backend(module, query, key)
    if backend.recorded is not None:
        backend.recorded.append(backend.statistics(query, key, key_range=key_range, causal=causal, scale=scaling))
    out = backend(query, key, value, key_range=key_range, causal=causal, scale=scaling)
    return out.transpose(1, 2), None


_default_backends: dict[tuple, AttentionBackend] = {}


def _default_backend(module: nn.Module, query: Tensor, key: Tensor) -> AttentionBackend:
    """For layers that nobody patched: the backend that the model's configuration names, else AdaSplash."""
    name, options = configured_backend(module.config) or ("adasplash", backend_options("adasplash"))
    shape = {"heads": query.shape[1], "key_heads": key.shape[1], "head_dim": query.shape[3]}
    backend_key = (name, options, *shape.values(), query.device)
    if backend_key not in _default_backends:
        backend = BACKENDS[name](options, **shape).to(query.device).eval()
        if list(backend.parameters()) or name == "hash_sparse":
            raise ValueError(
                f"This model's attention ({name}) has weights of its own, which plain transformers does not load; "
                "use adasplash.from_pretrained, or adasplash.patch_attention for a new model."
            )
        _default_backends[backend_key] = backend
    return _default_backends[backend_key]


def configured_backend(config) -> tuple[str, Options] | None:
    """Name and options that a transformers configuration carries, or None."""
    values = dict(getattr(config, CONFIG_FIELD, None) or {})
    return (name, backend_options(name, values)) if (name := values.pop("name", None)) else None


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of a transformers model that call the attention function, in the order of the layers."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "is_causal", None), bool)
        and hasattr(module, "config")
        and not isinstance(module, PreTrainedModel)
    ]


def attention_backends(model: nn.Module) -> list[AttentionBackend]:
    """The backends that `patch_attention` placed, in the order of the layers."""
    return [module for module in model.modules() if isinstance(module, AttentionBackend)]


def patch_attention(model: PreTrainedModel, backend: str | Options = "adasplash", **options) -> PreTrainedModel:
    """Gives every attention layer of a transformers model a backend; changes the model in place and returns it.

    Args:
        model: any transformers model whose attention goes through AttentionInterface.
        backend: softmax | flash | adasplash | hash_sparse | qk_sparse; its options follow as keywords. A learned or
            random state (an alpha per head, hash directions) becomes part of the model and of its state dict.

    Raises:
        ValueError: for unknown names and options, or a model without such layers.
    """
    register()
    parsed = backend_options(backend, options)
    layers = attention_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no attention layer that goes through transformers' AttentionInterface; "
            "expected a model such as GPT-2, Llama, RoBERTa or ModernBERT."
        )
    text_config = model.config.get_text_config()
    heads = text_config.num_attention_heads
    key_heads = getattr(text_config, "num_key_value_heads", None) or heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    weight = next(model.parameters())
    for layer in layers:
        module = BACKENDS[backend](parsed, heads=heads, key_heads=key_heads, head_dim=head_dim)
        setattr(layer, SUBMODULE, module.to(weight.device).train(model.training))
    model.set_attn_implementation(NAME)
    setattr(model.config, CONFIG_FIELD, {"name": backend, **dataclasses.asdict(parsed)})
    return model
