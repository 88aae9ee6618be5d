"""Tiny random transformers models."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

VOCABULARY = 64
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 66,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
CONFIGS = {
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 7},
    "roberta": {**_ENCODER, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    "modernbert": {**_ENCODER, **_SPECIAL, "global_attn_every_n_layers": 2, "local_attention": 8},
}
CAUSAL = ("gpt2", "llama", "mistral")


def tiny(kind: str, **changes) -> PreTrainedModel:
    """In evaluation mode; weights large enough that attention is far from uniform."""
    config = AutoConfig.for_model(kind, **CONFIGS.get(kind, _LLAMA_LIKE) | changes)
    family = AutoModelForMaskedLM if kind in ("roberta", "modernbert") else AutoModelForCausalLM
    model = family.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length))
