"""How tests run the kernels of entmax attention: on chosen roads, with inputs whose supports differ, beside float64."""

import pytest
import torch
from torch import Tensor

from adasplash import KeyRange, entmax
from adasplash.ops.checks import resolve_key_range
from adasplash.ops.range_attention import range_attention, text_positions

operator = pytest.importorskip("adasplash.ops.entmax_attention.operator", reason="needs triton")
is_compiling = pytest.importorskip("adasplash.ops.kernel_operator", reason="needs triton").is_compiling
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS = [
    pytest.mark.skipif(DEVICE == "cpu" and not operator.INTERPRETED, reason="needs a GPU or Triton's interpreter"),
    pytest.mark.usefixtures("large_programs"),
]

# Where the pairs go: all on lists, all in tile mode, some blocks here and some there, columns as sinks. Numbers of keys per
# query that a block's list has room for, and of the longest column on lists.
ROADS = {"lists": (64, 64), "tiles": (0, 64), "both": (2, 64), "sinks": (64, 3)}


def forward(*arguments):
    return operator.Forward(*operator.entmax_attention_forward(*arguments))


def take(road: str, monkeypatch):
    room, longest_column = ROADS[road]
    monkeypatch.setattr(operator, "KEYS_PER_QUERY", room)
    monkeypatch.setattr(operator, "FEW_KEYS", 2**16)  # whatever fits in the slab, for most inputs here are short
    monkeypatch.setattr(operator, "LONGEST_COLUMN", longest_column)
    list_blocks, prepare = operator._list_blocks, operator.operator_arguments

    def is_mixed(in_tiles):
        return bool(in_tiles.any() and not in_tiles.all())

    def checked(in_tiles):
        if is_compiling():
            pass
        elif road != "both":
            assert in_tiles.any() == (road == "tiles"), "another road was taken"
        elif in_tiles.shape[1] > 1:  # a lone block has but one road
            assert is_mixed(in_tiles), "one road was taken by all"
        return list_blocks(in_tiles)

    def with_room_for_some(*args, **kwargs):
        """The supports of long inputs differ: the first room that some blocks fit in, and others not."""
        *arguments, _ = prepare(*args, **kwargs)
        if operator.KEYS_PER_QUERY == room:
            monkeypatch.setattr(operator, "_list_blocks", list_blocks)
            rooms = (3, 6, 12, 24) if DEVICE == "cpu" else (2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)
            mixed = (n for n in rooms if is_mixed(forward(*arguments, n).in_tiles))
            monkeypatch.setattr(operator, "KEYS_PER_QUERY", next(mixed, room))
            monkeypatch.setattr(operator, "_list_blocks", checked)
        return *arguments, operator.KEYS_PER_QUERY

    monkeypatch.setattr(operator, "_list_blocks", checked)
    if road == "both":
        monkeypatch.setattr(operator, "operator_arguments", with_room_for_some)


def inputs(batch, heads, groups, query_length, key_length, dim, dtype=torch.float32, sharpness=2.0) -> list[Tensor]:
    """q, k, v and a gradient for the output, strided as transformers hands them over; supports of long ones differ."""
    growing = torch.linspace(0.5, 1.0, query_length, device=DEVICE)[:, None, None] if query_length > 128 else 1.0
    q = sharpness * growing * torch.randn(batch, query_length, heads, dim, device=DEVICE)
    k, v = torch.randn(2, batch, key_length, groups, dim, device=DEVICE).unbind()
    d_out = torch.randn(batch, heads, query_length, dim, device=DEVICE)
    return [x.to(dtype) for x in (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), d_out)]


def gradients(function, q, k, v, d_out, alpha, dtype=None) -> list[Tensor]:
    """[out, dq, dk, dv] and, for a tensor alpha, its gradient; computed in another dtype where one is given."""
    leaves = [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in (q, k, v)]
    learned = isinstance(alpha, Tensor)
    if learned:
        alpha = alpha.detach().to(dtype or alpha.dtype).clone().requires_grad_()
    out = function(*leaves, alpha)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves), *([alpha.grad] if learned else [])]


def relative(result: Tensor, truth: Tensor) -> float:
    size = truth.double().norm().item()
    return (result.double() - truth.double()).norm().item() / (size or 1.0)


def compare(q, k, v, d_out, *, alpha=1.5, key_range=None, causal=True, slopes=None, factor=2):
    """Kernels and eager attention of the same dtype against float64: at most `factor` times eager's error; the same bits again."""
    visible = resolve_key_range(q, k, key_range, causal)
    scale = q.shape[-1] ** -0.5
    how = {"scale": scale, "alibi_slopes": slopes}

    def per_head(a):
        return a.view(1, -1, 1, 1) if isinstance(a, Tensor) else a

    def kernels(q, k, v, a):
        query_positions, key_positions = text_positions(q, k)
        places = {"query_positions": query_positions, "key_positions": key_positions}
        return operator.entmax_attention_kernels(q, k, v, visible, alpha=a, **how, **places)

    def reference(q, k, v, a):
        return range_attention(q, k, v, visible, alpha=per_head(a), **how)

    def eager(q, k, v, a):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = (q @ k.mT).float() * scale
        if slopes is not None:
            i = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
            scores = scores - slopes.view(-1, 1, 1) * (i - torch.arange(k.shape[2], device=q.device)).abs()
        scores = scores.masked_fill(~visible.dense_mask(k.shape[2]), -torch.inf)
        return entmax(scores, per_head(a)).to(v.dtype) @ v

    results = gradients(kernels, q, k, v, d_out, alpha)
    truths = gradients(reference, q, k, v, d_out, alpha, torch.float64)
    yardsticks = gradients(eager, q, k, v, d_out, alpha)
    names = ("out", "dq", "dk", "dv", "dalpha")
    for name, result, truth, yardstick in zip(names, results, truths, yardsticks, strict=False):
        assert result.isfinite().all(), name
        floor = 2e-5 if name == "dalpha" else 2e-6
        assert relative(result, truth) <= factor * relative(yardstick, truth) + floor, name
    if DEVICE != "cpu":  # the interpreter runs one program after the other
        for name, result, again in zip(names, results, gradients(kernels, q, k, v, d_out, alpha), strict=False):
            assert torch.equal(result, again), f"{name} differs between two runs"
    return results


def key_ranges(length):
    keep = torch.ones(1, length, dtype=torch.bool, device=DEVICE)
    keep[:, : length // 3] = False
    position = torch.arange(length, device=DEVICE)[None]
    return {
        "window": KeyRange.window(length, 9, device=DEVICE),
        "left padding": KeyRange.padding(keep),
        "right padding": KeyRange.padding(keep.flip(-1)),
        "documents": KeyRange.documents(position % 23),
        "everything": KeyRange.documents(position % 41)
        & KeyRange.padding(keep)
        & KeyRange.window(length, 17, device=DEVICE),
    }


def listed_keys(found, key_length, block_rows) -> Tensor:
    """Which keys stand on the lists, bool (B * H, Tq, Tk), of rows of any length."""
    heads, blocks = found.in_tiles.shape
    keys = found.keys.int()
    if key_length > 2**16:
        keys, high = keys.chunk(2)
        keys = keys + (high << 16)
    first, count = (x[..., : found.out.shape[2]].flatten(0, 1) for x in (found.first, found.count))
    row = torch.arange(count.shape[1], device=count.device)
    slab = torch.arange(heads, device=count.device)[:, None] * blocks + row // block_rows
    begin = (slab * (keys.numel() // (heads * blocks)) + first).flatten()
    length = count.flatten().long()
    at = torch.arange(int(length.sum()), device=count.device)
    at += torch.repeat_interleave(begin - (length.cumsum(0) - length), length)
    listed = torch.zeros(count.numel(), key_length, dtype=torch.bool, device=count.device)
    listed[torch.repeat_interleave(torch.arange(count.numel(), device=count.device), length), keys[at]] = True
    return listed.view(heads, -1, key_length)
