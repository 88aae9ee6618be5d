"""Language models: transformers' own, with a backend on their attention. Build, load, export, and their losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from .attention import AttentionBackend, Options
from .attention.huggingface import SUBMODULE, attention_backends, configured_backend, patch_attention, register
from .ops.announce import announce
from .ops.checks import check_tensor, nearest
from .ops.cross_entropy import summed_cross_entropy, token_cross_entropy
from .ops.support_statistics import SupportStatistics

VOCABULARY_MULTIPLE = 64  # matrix products with an odd vocabulary are several times slower on a GPU
ATTENTION_DROPOUTS = {"attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"}
DERIVED_KEYS = ("vocab_size", "bos_token_id", "eos_token_id", "max_position_embeddings")


@dataclass(frozen=True)
class ModelConfig:
    """A transformers model by its type.

    Args:
        name: what the run is called after.
        type: transformers' model_type (gpt2, llama, ...), of a causal language model.
        config: keys of that type's configuration; vocabulary and longest sequence come from the data and `seq_len`, and
            every dropout is 0 unless it is set here.
    """

    name: str = "small"
    type: str = "gpt2"
    config: dict[str, Any] = field(default_factory=dict)


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    end_token: int,
    seq_len: int,
    attention: str,
    options: dict | None = None,
    init_from: str | None = None,
) -> PreTrainedModel:
    """A causal language model with the attention backend on every layer; float32, on the CPU.

    Args:
        vocab_size: of the tokenizer; a new model's vocabulary is padded to a multiple of 64.
        init_from: folder of a transformers checkpoint to start from, instead of `config` and random weights.

    Raises:
        ValueError: for unknown types and keys, or a checkpoint that does not fit the tokenizer or seq_len.
    """
    if init_from is not None:
        if not Path(init_from).is_dir():  # a name of the hub would be looked for on the network
            raise ValueError(f"Expected init_from as the folder of a transformers checkpoint, got '{init_from}'.")
        model = from_pretrained(init_from, attention, **(options or {}))
        if model.config.vocab_size < vocab_size:
            raise ValueError(
                f"The tokenizer has {vocab_size} tokens, but the checkpoint {init_from} only {model.config.vocab_size}; "
                "use the tokenizer that it was trained with."
            )
        check_length(model, seq_len)
        _check_plain_head(model)
        return model
    if config.type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"transformers {transformers.__version__} has no causal language model of type '{config.type}'."
            f"{nearest(config.type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
        )
    defaults = AutoConfig.for_model(config.type)
    attributes = type(defaults).attribute_map  # of other names, as in GPT-2's max_position_embeddings: n_positions
    known = set(defaults.to_dict()) | set(attributes)
    for key in config.config:
        if key not in known:
            raise ValueError(f"model.config has no key '{key}' for type {config.type}.{nearest(key, known)}")
        if key in DERIVED_KEYS or key in {attributes.get(name) for name in DERIVED_KEYS}:
            raise ValueError(
                f"model.config cannot set '{key}', which follows from the tokenizer or seq_len; leave it out."
            )
    given = {attributes.get(key, key) for key in config.config}
    for key in ATTENTION_DROPOUTS & given:
        if config.config.get(key):
            raise ValueError(
                f"model.config.{key} = {config.config[key]!r}, but no backend has attention dropout; leave it out."
            )
    no_dropout = {
        key: 0.0
        for key, value in defaults.to_dict().items()
        if key not in given and isinstance(value, float) and ("dropout" in key or "pdrop" in key)
    }
    padded = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    try:
        model_config = AutoConfig.for_model(
            config.type,
            **no_dropout,
            **config.config,
            vocab_size=padded,
            bos_token_id=end_token,
            eos_token_id=end_token,
            max_position_embeddings=seq_len,
        )
    except Exception as error:  # of its own kinds, by version
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers refuses model.config for type {config.type} ({reason}).") from None
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    _check_plain_head(model)
    return patch_attention(model, attention, **(options or {}))


def _check_plain_head(model: PreTrainedModel) -> None:
    """The losses below apply the output embedding to the last hidden state, and nothing else."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(model.config, name, None) not in (None, 1.0, 1):
            raise ValueError(
                f"{type(model).__name__} scales or caps its logits ({name}), which training here does not."
            )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(f"{type(model).__name__} has a bias on its output layer, which training here does not apply.")


# ---------------------------------------------------------------------------------------------------- load and export


def from_pretrained(
    path: str | Path, attention: str | None = None, *, dtype=torch.float32, **options
) -> PreTrainedModel:
    """A transformers checkpoint with its attention backend; attention dropout, which no backend has, is left out in training.

    Args:
        path: local folder (or a hub name, which downloads); an export of this package names its backend itself.
        attention: a backend in place of the checkpoint's own (adasplash, where it names none).
        dtype: of the weights.
        options: of the backend, as keywords; the others are those that the checkpoint was saved with, if the backend is
            its own.

    Raises:
        ValueError: if there is no such folder, it holds no model, or weights are missing from it.
    """
    register()
    _check_folder(path)
    with _expecting_a_model(path, OSError, ValueError):
        config = AutoConfig.from_pretrained(path)
    saved_name, saved = configured_backend(config) or ("adasplash", None)
    architecture = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
    # the backend's own tensors are unexpected to transformers; everything else is checked here
    with _expecting_a_model(path, OSError), _quiet():
        model, info = architecture.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"The checkpoint '{path}' lacks weights of {architecture.__name__}: "
            f"{', '.join(sorted(info['missing_keys'])[:3])}, {len(info['missing_keys'])} in all."
        )
    unused = sorted(key for key in info["unexpected_keys"] if f".{SUBMODULE}." not in key)
    if unused:
        announce(f"{architecture.__name__} has no use for {', '.join(unused[:3])} of '{path}', {len(unused)} in all.")
    attention = attention or saved_name
    if saved is not None and attention == saved_name:
        patch_attention(model, attention, **vars(saved) | options)
        _load_backend_state(model, path, saved)
    else:
        patch_attention(model, attention, **options)
    return model


def _check_folder(path: str | Path) -> None:
    """Raises ValueError for a folder that is not there, and no name of the hub either, or that is a run's."""
    folder = Path(path)
    is_path = isinstance(path, Path) or path.startswith(("/", "./", "../", "~")) or path.count("/") > 1
    if is_path and not folder.exists():
        raise ValueError(f"Expected the folder of a transformers model, got '{path}', which is not there.")
    if (folder / "config.yaml").is_file() and not (folder / "config.json").exists():  # as train.py writes it
        export = folder / "export"
        todo = f"take its model: {export}" if export.exists() else "it has no export/ yet, which its end writes"
        raise ValueError(f"Expected the folder of a transformers model, got the run folder '{path}'; {todo}.")


@contextlib.contextmanager
def _expecting_a_model(path: str | Path, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"No transformers model at '{path}': expected a folder with config.json and model.safetensors ({reason})"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging = transformers.logging
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


def _load_backend_state(model: PreTrainedModel, path: str | Path, saved: Options) -> None:
    """Fills the backends' state from the checkpoint's safetensors files.

    saved: the options that it was written with. With these all of the state has to be there; what options that are new
        need starts fresh.
    """
    folder = Path(path) if Path(path).is_dir() else Path(cached_file(str(path), "config.json")).parent
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored |= {key: tensors.get_tensor(key) for key in tensors.keys() if f".{SUBMODULE}." in key}
    names = {module: name for name, module in model.named_modules()}
    for backend in attention_backends(model):
        prefix = names[backend]
        found = {name: stored[f"{prefix}.{name}"] for name in backend.state_names() if f"{prefix}.{name}" in stored}
        if missing := [f"{prefix}.{name}" for name in backend.state_names() if name not in found]:
            if backend.options == saved:
                raise ValueError(f"The attention's own weights are missing at '{path}', for example '{missing[0]}'.")
            announce(f"'{missing[0]}' is not in '{path}' and starts fresh.")
        try:
            backend.restore(found, saved)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(
                f"The attention's weights at '{path}' do not fit these options; "
                f"load it with the options that it was trained with ({reason})"
            ) from None


def export(model: PreTrainedModel, folder: str | Path, tokenizer: dict[str, Any] | None = None) -> None:
    """Writes a transformers folder: config.json (which names the backend), model.safetensors.

    `from_pretrained` of this package reloads it with its backend. Plain transformers reloads the weights for its own
    softmax; where the backend has state, it reports those keys as unexpected.
    """
    with _quiet():
        model.save_pretrained(folder)
    name, options = configured_backend(model.config)
    (Path(folder) / "README.md").write_text(
        f"# {model.config.model_type} trained with attention={name}\n\n"
        f"Load with `adasplash.from_pretrained(folder)`. Attention: `{options}`.\n"
        "Loaded by plain transformers, the same weights run with softmax attention, which is another model.\n"
        + (f"Tokenizer: `{tokenizer}`.\n" if tokenizer else "")
    )


# ------------------------------------------------------------------------------------------------------------- losses


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Last hidden states (B, T, C) of tokens (B, T). position_ids, where given, mark packed documents."""
    return model.base_model(
        input_ids=input_ids, position_ids=position_ids, packed=position_ids is not None, use_cache=False
    ).last_hidden_state


def summed_loss(
    model: PreTrainedModel, input_ids: Tensor, targets: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Sum of the token losses in nats, float32 scalar, differentiable; the logits never exist at once.

    input_ids, targets (next tokens; -100 is not counted), position_ids: int64 (B, T).
    """
    hidden = hidden_states(model, input_ids, position_ids)
    return summed_cross_entropy(hidden.flatten(0, 1), model.get_output_embeddings().weight, targets.flatten())


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, input_ids: Tensor, targets: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Loss of each target in nats, float32 (B, T), 0 where the target is -100; arguments as in `summed_loss`."""
    hidden = hidden_states(model, input_ids, position_ids)
    losses = token_cross_entropy(hidden.flatten(0, 1), model.get_output_embeddings().weight, targets.flatten())
    return losses.view_as(targets)


# -------------------------------------------------------------------------------------------------------------- facts


def longest_sequence(model: PreTrainedModel) -> int | None:
    """The number of learned positions; None for models without such a table (rotary positions, ALiBi)."""
    tables = ("wpe", "position_embeddings", "embed_positions")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in tables:
            # OPT and RoBERTa leave the first rows of the table to padding
            unused = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            return module.num_embeddings - unused
    return None


def check_length(model: PreTrainedModel, seq_len: int) -> None:
    """Raises ValueError if the model has learned positions, and fewer than seq_len."""
    longest = longest_sequence(model)
    if longest is not None and seq_len > longest:
        raise ValueError(
            f"This model has {longest} learned positions, but seq_len is {seq_len}; "
            f"use seq_len={longest}, train at that length, or take a model with rotary positions (model=llama-160m)."
        )


def check_text(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> None:
    """Raises ValueError unless the tokens (B, T) are a text that the model can read; waits for a GPU."""
    for name, x in (("input_ids", input_ids), ("position_ids", position_ids)):
        if x is None:
            continue
        check_tensor(name, x)
        if x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"Expected {name} as whole numbers, int64 or int32, got {x.dtype}.")
        if x.ndim != 2 or not x.numel():
            raise ValueError(f"Expected {name} of shape (batch, length), at least one token, got {tuple(x.shape)}.")
    lowest, highest = input_ids.min().item(), input_ids.max().item()
    vocabulary = model.get_input_embeddings().num_embeddings
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(
            f"Expected input_ids from 0 to {vocabulary - 1}, the model's vocabulary, got {lowest} to {highest}; "
            "use the tokenizer that it was trained with."
        )
    length = input_ids.shape[1]
    if position_ids is not None:
        if position_ids.shape[0] not in (1, input_ids.shape[0]) or position_ids.shape[1] != length:
            raise ValueError(
                f"Expected position_ids as input_ids, {tuple(input_ids.shape)}, got {tuple(position_ids.shape)}."
            )
        length = min(length, position_ids.max().item() + 1)  # documents that are packed may be longer together
    check_length(model, length)


def training_flops_per_token(model: PreTrainedModel, seq_len: int) -> float:
    """Floating point operations per token, forward and backward, of a dense causal model (for MFU).

    6 per weight of the matrix products (output layer included, embeddings not), and 6 T C per layer for attention:
    a sparse backend's MFU is thus the dense-equivalent one.
    """
    config = model.config.get_text_config()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings)
    head = model.get_output_embeddings().weight
    weights += head.numel() if id(head) in embeddings else 0
    return 6.0 * weights + 6.0 * config.num_hidden_layers * seq_len * config.hidden_size


def backends_of(model: nn.Module) -> list[AttentionBackend]:
    """The backends on a model's attention layers, first layer first. Raises ValueError where it has none."""
    if not (backends := attention_backends(model)):
        raise ValueError(
            f"Expected a model with a backend on its attention layers, got a {type(model).__name__} without; "
            "adasplash.patch_attention(model) gives it one."
        )
    return backends


@torch.no_grad()
def attention_statistics(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None
) -> list[SupportStatistics]:
    """Exact density and support of every layer on a text, first layer first.

    The model runs as it stands: `qk_sparse` drops in training mode only.

    Args:
        model: with a backend on its attention layers.
        input_ids: int64 (B, T), on the model's device; position_ids: likewise, where they mark packed documents.

    Returns:
        For each layer the density, mean and largest support and share of queries in tile mode of each head, float32 (H,).

    Raises:
        ValueError: for a model without backends, or a text that is empty, or has ids or positions that the model lacks.
    """
    backends = backends_of(model)
    check_text(model, input_ids, position_ids)
    for backend in backends:
        backend.recorded = []
    try:
        hidden_states(model, input_ids, position_ids)
        return [
            SupportStatistics(*(torch.stack(parts).mean(0) for parts in zip(*backend.recorded, strict=True)))
            for backend in backends
        ]
    finally:
        for backend in backends:
            backend.recorded = None


__all__ = [
    "ModelConfig",
    "Options",
    "attention_statistics",
    "backends_of",
    "build_model",
    "check_length",
    "check_text",
    "export",
    "from_pretrained",
    "hidden_states",
    "longest_sequence",
    "summed_loss",
    "token_losses",
    "training_flops_per_token",
]
