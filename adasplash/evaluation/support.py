"""From a head of a model to a picture of the keys that it gives weight to."""

from __future__ import annotations

import contextlib
import operator
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import models
from ..ops.checks import check_tensor
from ..ops.support_map import SupportMap, map_head
from .borrowed import borrowed
from .plots import picture_path, plot_support


def draw_support(
    model: nn.Module,
    input_ids: Tensor,
    *,
    layer: int,
    head: int,
    path: str | Path = "support.png",
    position_ids: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
    cells: int = 512,
) -> Path:
    """Draws which keys each query of one head gives weight to, on this text: exactly, as the model computes it.

    That is with its alpha of the moment, ALiBi, windows and documents; of `hash_sparse` and `qk_sparse` what they select,
    in the order of the text. The model runs as it stands: after `model.train()`, `qk_sparse` drops (one draw of what it
    drops is shown). It comes back as it was.

    Args:
        model: of transformers, with a backend on its attention layers.
        input_ids: int64 (T,) or (1, T), one text.
        layer, head: counted from 0.
        path: of the picture (.png, .svg, .pdf); its folder is made.
        position_ids: as input_ids, where they mark packed documents.
        queries, keys: half-open windows (begin, end) of places in the text; by default everything. Where both fit into
            `cells`, single keys are shown, else square tiles.
        cells: the picture has at most so many rows and columns.

    Returns:
        The path.

    Raises:
        ValueError: for a model without backends, a text that `attention_statistics` would refuse or more than one, a
            layer, head or window that is not there, cells < 1, or another kind of path.
    """
    backends = models.backends_of(model)
    layer = _place("layer", layer, len(backends))
    backend = backends[layer]
    head = _place("head", head, backend.heads)
    path = picture_path(path)
    device = next(model.parameters()).device
    input_ids = _one_text("input_ids", input_ids).to(device)
    if position_ids is not None:
        position_ids = _one_text("position_ids", position_ids).to(device)
    models.check_text(model, input_ids, position_ids)
    found: list[SupportMap] = []

    def count(q, k, key_range, *, tiles, implementation, **how):
        return map_head(q, k, key_range, head=head, queries=queries, keys=keys, cells=cells, **how)

    def after_forward(backend, inputs, options, output):
        found.append(backend.statistics(*inputs[:2], **options, count=count))

    handle = backend.register_forward_hook(after_forward, with_kwargs=True)
    try:
        with borrowed(model, device, training=model.training), torch.no_grad(), _uncompiled():
            models.hidden_states(model, input_ids, position_ids)
    finally:
        handle.remove()
    return plot_support(found[0], path, title=f"layer {layer}, head {head}: {backend.name}")


def _place(name: str, value: int, count: int) -> int:
    try:
        place = operator.index(value)  # a number of numpy or torch too
    except TypeError:
        place = -1
    if not 0 <= place < count:
        raise ValueError(f"Expected {name} as a whole number from 0 to {count - 1}, got {value!r}.")
    return place


def _one_text(name: str, x: Tensor) -> Tensor:
    check_tensor(name, x)
    if x.ndim not in (1, 2) or x.ndim == 2 and x.shape[0] != 1:
        raise ValueError(f"Expected {name} of one text, (T,) or (1, T), got {tuple(x.shape)}; give {name}[:1].")
    return x.view(1, -1)


def _uncompiled() -> contextlib.AbstractContextManager:
    """Compiled models leave out hooks. Without torch's compiler, which takes seconds to import, none is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
