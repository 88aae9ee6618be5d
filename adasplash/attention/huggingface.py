"""The bridge to transformers: one attention function under the one name "adasplash", for every backend.

`patch_attention` puts a backend on each attention layer of a model; the registered function hands q, k and v over to it,
with the masks of transformers turned into a KeyRange. Layers without a backend of their own use what the model's
configuration names, else plain AdaSplash attention, so that `model.set_attn_implementation("adasplash")` is enough.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from ..ops.announce import announce
from ..ops.key_range import KeyRange, check_padding
from . import BACKENDS, backend_options, without_idle_alpha
from .backend import AttentionBackend, Options

NAME = "adasplash"
CONFIG_FIELD = "adasplash_attention"  # in config.json: {"name": backend, **options}
SUBMODULE = "attention_backend"  # on each attention layer

# Arguments that change what attention means, and that no backend has.
UNSUPPORTED = {
    "softcap": "a cap on the scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias of relative positions",
    "indices": "keys chosen by an indexer",
    "block_indices": "blocks of keys chosen by an indexer",
}

# What on a layer says, unless it is None, that it will pass one of them.
PASSED_BY_LAYERS_WITH = {
    "attn_logit_softcapping": "softcap",
    "sinks": "s_aux",
    "has_relative_attention_bias": "position_bias",
}

# The parts of transformers' mask functions that a KeyRange can describe. Sliding windows and packed documents reach the
# attention function by other ways: as sliding_window and position_ids.
KNOWN_PATTERNS = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "and_masks",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
}


def register() -> None:
    """Makes "adasplash" an attention implementation of transformers; may be called again."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)


def mask_patterns(mask_function: Callable) -> set[str]:
    """Names of the functions that transformers composed a mask function of."""
    names = {mask_function.__qualname__.split(".")[0]}
    for cell in mask_function.__closure__ or ():
        parts = cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,)
        names.update(*(mask_patterns(part) for part in parts if inspect.isfunction(part)))
    return names


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
        ValueError: for pads between kept tokens, or a mask that no range describes (prefixes, blocks).
        RuntimeError: for pads between kept tokens in a compiled graph.
    """
    # a compiler does not see into mask functions
    patterns = set() if torch.compiler.is_compiling() else mask_patterns(mask_function)
    if not patterns <= KNOWN_PATTERNS:
        raise ValueError(
            "The attention backends know causal, bidirectional, sliding-window, padding and packing masks, but this "
            f'model composes {", ".join(sorted(patterns - KNOWN_PATTERNS))}; use attn_implementation="sdpa" for it.'
        )
    causal = "causal_mask_function" in patterns or isinstance(q_offset, Tensor)
    if causal and kv_offset == 0 and (attention_mask is None or attention_mask.shape[1] >= kv_length):
        # A static cache (whose offset may be a tensor) has room for more keys than it holds so far.
        held = int(q_offset) + q_length
        if held < kv_length and attention_mask is None:
            attention_mask = torch.ones(batch_size, held, dtype=torch.bool, device=device)
        elif held < kv_length:
            attention_mask = attention_mask[:, :held]
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:].to(torch.bool)
    if torch.compiler.is_compiling():  # nothing can be looked at here: the graph itself has to refuse
        kept = KeyRange.padding(attention_mask)
        contiguous = (kept.stop - kept.start)[:, 0, 0].clamp(min=0) == attention_mask.sum(-1)
        torch._assert_async(contiguous.all(), "The attention mask has pads between kept tokens; move them to one side.")
        return attention_mask
    if attention_mask.shape[1] == kv_length >= q_length and attention_mask.all():
        return None
    check_padding(attention_mask)
    return attention_mask


def _refuse(module: nn.Module, name: str) -> None:
    raise ValueError(
        f"The attention backends do not support {name} ({UNSUPPORTED[name]}), which {type(module).__name__} passes; "
        'use attn_implementation="eager" for this model.'
    )


def _refuse_weights(asked: bool | None) -> None:
    if asked:
        raise ValueError(
            "The attention backends never hold the weights of attention that output_attentions=True asks for; "
            'use attn_implementation="eager" for them, or adasplash.attention_statistics for how many are not zero.'
        )


def _before_forward(model: PreTrainedModel, arguments: tuple, kwargs: dict) -> None:
    """A hook of patched models, as many do not hand output_attentions on to their layers."""
    if model.config._attn_implementation == NAME:
        _refuse_weights(kwargs.get("output_attentions") or model.config.output_attentions)


def _refuse_unsupported(module: nn.Module, attention_mask, packed, kwargs: dict) -> None:
    if packed not in (None, True, False):
        raise ValueError(f"Expected packed as True, False or None, got {packed!r}.")
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise ValueError(
            f"Expected a padding mask of shape (batch, keys), got one of shape {shape}. Describe packed documents by "
            'position_ids and padding by a 2-D mask, or use attn_implementation="sdpa" for free-form masks.'
        )
    if kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "Expected packed documents as position_ids that start again at each document, got cu_seq_lens_q; "
            "leave cu_seq_lens_q out (return_flash_attn_kwargs=False in the collator)."
        )
    _refuse_weights(kwargs.get("output_attentions"))
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            _refuse(module, name)


def key_range_of(
    q: Tensor,
    key_length: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    packed: bool | None,
    sliding_window: int | None,
) -> KeyRange | None:
    """The range that transformers' arguments describe, beside causality; None where all keys are visible.

    packed: whether position_ids mark documents. None: look (which waits for a GPU) where there is no earlier key, among
        the kept tokens: positions of pads mean nothing.

    Raises:
        ValueError: for packed=True without positions of all keys.
    """
    ranges = []
    query_length = q.shape[2]
    whole = position_ids is not None and query_length == key_length
    if packed and not whole:
        raise ValueError("packed=True needs position_ids of all keys, and so no keys from a cache.")
    if packed is None and whole and query_length > 1:
        restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if attention_mask is not None:
            restarts = restarts & attention_mask[:, 1:] & attention_mask[:, :-1]
        packed = bool(restarts.any())
    if sliding_window is not None:
        ranges.append(KeyRange.window(query_length, sliding_window, key_length, device=q.device))
    if attention_mask is not None:
        ranges.append(KeyRange.padding(attention_mask, query_length))
    if packed:
        ranges.append(KeyRange.documents(position_ids))
    return functools.reduce(operator.and_, ranges) if ranges else None


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
    documents (looking waits for a GPU in every layer, and breaks a compiled graph).

    Dropout of the weights, which no backend has, is left out, and that is said.

    Raises:
        ValueError: for what the backends cannot honour: 4-D masks, softcap, sinks, position biases.
    """
    _refuse_unsupported(module, attention_mask, packed, kwargs)
    if dropout:
        announce(
            f"{type(module).__name__} trains without its attention dropout of {dropout:g}: no backend has dropout."
        )
    if attention_mask is not None:
        seen = attention_mask.shape[1]
        if seen > key.shape[2] or (seen < key.shape[2] and seen < query.shape[2]):
            raise ValueError(
                f"Expected an attention mask of one entry per key, {key.shape[2]}, got one of length {seen}."
            )
        key, value = key[:, :, :seen], value[:, :, :seen]  # a static cache has room for more
    if torch.is_autocast_enabled(query.device.type):  # rotary positions leave q and k in float32, v in autocast's dtype
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
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
    _refuse_layer(module, options)
    shape = {"heads": query.shape[1], "key_heads": key.shape[1], "head_dim": query.shape[3]}
    backend_key = (name, options, *shape.values(), query.device)
    if backend_key not in _default_backends:
        backend = BACKENDS[name](options, **shape).to(query.device)
        if backend.state_names():
            raise ValueError(
                f"This model's attention ({name}) has a state of its own, which plain transformers does not load; "
                "use adasplash.from_pretrained, or adasplash.patch_attention for a new model."
            )
        _default_backends[backend_key] = backend
    return _default_backends[backend_key].train(module.training)


def configured_backend(config) -> tuple[str, Options] | None:
    """Name and options that a transformers configuration carries, or None."""
    values = without_idle_alpha(getattr(config, CONFIG_FIELD, None) or {})
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


def layer_shape(layer: nn.Module) -> dict[str, int]:
    """heads, key_heads and head_dim (of queries and keys) of an attention layer."""
    config = layer.config.get_text_config()
    first = lambda *numbers: next(filter(None, numbers))
    # the layer's own first: encoder and decoder may differ
    heads = first(
        *(getattr(layer, name, None) for name in ("num_heads", "num_attention_heads")), config.num_attention_heads
    )
    dims = (getattr(where, name, None) for where in (layer, config) for name in ("qk_head_dim", "head_dim"))
    key_heads = (getattr(where, "num_key_value_heads", None) for where in (layer, config))
    return {
        "heads": heads,
        "key_heads": first(*key_heads, heads),
        "head_dim": first(*dims, config.hidden_size // heads),
    }


def _refuse_layer(layer: nn.Module, options: Options) -> None:
    """Raises ValueError for what the configuration of a model shows beforehand: a compiler would not see it later."""
    for mark, name in PASSED_BY_LAYERS_WITH.items():
        if getattr(layer, mark, None) is not None:
            _refuse(layer, name)
    config = layer.config.get_text_config()
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"The attention backends have no chunked attention, which {type(layer).__name__} uses (layer_types); "
            'use attn_implementation="sdpa" for this model.'
        )
    if options.alibi != "none" and (
        getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)
    ):
        raise ValueError(
            f"alibi={options.alibi} needs queries and keys of one text, but the model of {type(layer).__name__} has "
            "cross-attention; leave alibi out."
        )


def attention_backends(model: nn.Module) -> list[AttentionBackend]:
    """The backends that `patch_attention` placed, in the order of the layers."""
    return [module for module in model.modules() if isinstance(module, AttentionBackend)]


def patch_attention(model: PreTrainedModel, backend: str = "adasplash", **options) -> PreTrainedModel:
    """Gives every attention layer of a transformers model a backend; changes the model in place and returns it.

    One that is refused is left as it was.

    Args:
        model: any transformers model whose attention goes through AttentionInterface.
        backend: softmax | flash | adasplash | hash_sparse | qk_sparse; its options follow as keywords. A learned or
            random state (an alpha per head, hash directions) becomes part of the model and of its state dict.

    Raises:
        ValueError: for unknown names and options, or a model without such layers.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Expected a transformers model, got {model!r:.60}; load it first, "
            "for example with AutoModelForCausalLM.from_pretrained or adasplash.from_pretrained."
        )
    _refuse_weights(model.config.output_attentions)
    register()
    parsed = backend_options(backend, options)
    layers = attention_layers(model)
    for layer in layers:
        _refuse_layer(layer, parsed)
    modules = [BACKENDS[backend](parsed, **layer_shape(layer)) for layer in layers]
    model.set_attn_implementation(NAME)
    # transformers leaves alone, with a warning, what does not go through its AttentionInterface
    reached = [pair for pair in zip(layers, modules, strict=True) if pair[0].config._attn_implementation == NAME]
    if not reached:
        raise ValueError(
            f"{type(model).__name__} has no attention layer that goes through transformers' AttentionInterface; "
            "expected a model such as GPT-2, Llama, RoBERTa or ModernBERT."
        )
    for layer, module in reached:
        device = next(layer.parameters()).device
        setattr(layer, SUBMODULE, module.to(device).train(layer.training))
    setattr(model.config, CONFIG_FIELD, {"name": backend, **dataclasses.asdict(parsed)})
    if _before_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    return model
