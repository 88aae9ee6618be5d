"""The inputs on which attention is timed, and how sparse entmax attention is on them.

The same specification, shape and kind of device give the same tensors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from forms import Form, misfit
from torch import Tensor

INPUTS = {
    "scattered": Form(
        "scattered:FRESH:A",
        "few keys a query, in many tiles, as in GPT-2 trained with entmax attention",
        "0 <= FRESH <= 1",
    ),
    "clustered": Form(
        "clustered:TOPICS",
        "the same weight in few tiles: segments of the text share a topic",
        "a whole number of TOPICS",
    ),
    "gaussian": Form(
        "gaussian[:SCALE]", "independent q and k, q times SCALE: many keys a query, the more the smaller SCALE"
    ),
}
TILE = 64
STREAMS = 3  # of scattered inputs
SEGMENT = 256  # tokens of a segment of clustered inputs, on average


class InputSpec(NamedTuple):
    name: str
    kind: str
    values: tuple[float, ...]


def parse_input(text: str) -> InputSpec:
    """Raises ValueError that names the valid form, or the valid forms and the nearest."""
    match text.split(":"):
        case ["scattered", fresh, a]:
            valid = 0 <= number(fresh) <= 1 and math.isfinite(number(a))
        case ["clustered", topics]:
            valid = number(topics) >= 1 and number(topics) % 1 == 0
        case ["gaussian"]:
            valid = True
        case ["gaussian", scale]:
            valid = math.isfinite(number(scale))
        case _:
            valid = False
    if not valid:
        raise misfit("input", text, INPUTS)
    kind, *values = text.split(":")
    return InputSpec(text, kind, tuple(map(float, values)))


def number(text: str) -> float:
    """NaN, which fails every comparison, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def make_inputs(spec: InputSpec, batch: int, heads: int, length: int, dim: int, device="cuda") -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output, each (batch, heads, length, dim) in bfloat16."""
    shape = (batch, heads, length, dim)
    torch.manual_seed(0)
    if spec.kind == "scattered":
        q, k = scattered(*shape, *spec.values, device=device)
    elif spec.kind == "clustered":
        q, k = clustered(*shape, int(spec.values[0]), device=device)
    else:
        q, k = gaussian(*shape, *spec.values, device=device)
    v = torch.randn_like(q)
    return q, k, v, torch.randn_like(q)


def draw_documents(batch: int, length: int, documents: int, *, device="cuda", seed: int = 0) -> Tensor:
    """Position ids (batch, length) of texts that are packed with so many documents each, of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(length)
    rows = []
    for _ in range(batch):
        cuts = torch.randperm(length - 1, generator=generator)[: documents - 1] + 1
        begins = torch.zeros(length, dtype=torch.long)
        begins[cuts] = cuts
        rows.append(place - begins.cummax(0).values)
    return torch.stack(rows).to(device)


def scattered(batch: int, heads: int, length: int, dim: int, fresh: float, a: float, *, device="cuda", seed: int = 0):
    """q is the sum of a few keys times `a`, with noise; which ones: `copied_places`."""
    generator = torch.Generator(device).manual_seed(seed)
    k = torch.randn(batch * heads, length, dim, generator=generator, device=device)
    copied = torch.zeros_like(k)
    for _ in range(STREAMS):
        places = copied_places(batch * heads, length, fresh, generator)
        copied += k.gather(1, places[..., None].expand_as(k))
    q = a * copied + 0.5 * torch.randn(k.shape, generator=generator, device=device)
    return tuple(x.view(batch, heads, length, dim).bfloat16() for x in (q, k))


def copied_places(rows: int, length: int, fresh: float, generator: torch.Generator) -> Tensor:
    """A place at or before each place, (rows, length): it jumps with probability `fresh`, else advances by one."""
    device = generator.device
    place = torch.arange(length, device=device).expand(rows, length)
    jumps = torch.rand(rows, length, generator=generator, device=device) < fresh
    jumps[:, 0] = True
    landing = (torch.rand(rows, length, generator=generator, device=device) * (place + 1)).long()
    jumped_at = torch.where(jumps, place, 0).cummax(1).values
    return torch.minimum(landing.gather(1, jumped_at) + place - jumped_at, place)


def clustered(batch: int, heads: int, length: int, dim: int, topics: int, *, device="cuda", seed: int = 0):
    """q and k are the topic of their segment, doubled, with noise; the lengths of segments are geometric."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, segments = batch * heads, 4 * length // SEGMENT + 8
    topic_vectors = torch.randn(topics, dim, generator=generator, device=device)
    lengths = torch.empty(rows, segments, device=device).exponential_(1 / SEGMENT, generator=generator)
    ends = (lengths + 1).long().cumsum(1)
    place = torch.arange(length, device=device).repeat(rows, 1)
    segment = torch.searchsorted(ends, place, right=True).clamp(max=segments - 1)
    topic_of_segment = torch.randint(topics, (rows, segments), generator=generator, device=device)
    topic = topic_vectors[topic_of_segment.gather(1, segment)].view(batch, heads, length, dim)
    q = 2.0 * topic + torch.randn(topic.shape, generator=generator, device=device)
    k = 2.0 * topic + torch.randn(topic.shape, generator=generator, device=device)
    return q.bfloat16(), k.bfloat16()


def gaussian(batch: int, heads: int, length: int, dim: int, scale: float = 1.0, *, device="cuda"):
    """From torch's global generator."""
    q, k = (torch.randn(batch, heads, length, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    return scale * q, k


def entmax_threshold(x: Tensor, alpha: float, steps: int) -> Tensor:
    """The tau of p = max(x - tau, 0) ** (1 / (alpha - 1)) with sum p = 1 in each row, by bisection from below."""
    high = x.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(steps):
        middle = (low + high) / 2
        enough = (x - middle).clamp_(min=0).pow_(1 / (alpha - 1)).sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


class Sparsity(NamedTuple):
    """density: share of the causal 64 x 64 tiles that hold a pair with weight; support: keys with weight per query."""

    density: float
    support: float


@torch.no_grad()
def sparsity(q: Tensor, k: Tensor, alpha: float, heads: int = 2, chunk: int = 2048) -> Sparsity:
    """Counted on the first heads of the first sample; the length is a multiple of 64."""
    length, dim = q.shape[-2:]
    heads = min(heads, q.shape[1])
    tiles = pairs = 0
    for head in range(heads):
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            x = (alpha - 1) / math.sqrt(dim) * (q[0, head, start:stop].float() @ k[0, head, :stop].float().T)
            query = torch.arange(start, stop, device=q.device)[:, None]
            x.masked_fill_(torch.arange(stop, device=q.device) > query, -math.inf)
            has_weight = x > entmax_threshold(x, alpha, steps=30)
            pairs += has_weight.sum().item()
            tiles += has_weight.unflatten(1, (-1, TILE)).any(-1).unflatten(0, (-1, TILE)).any(1).sum().item()
    side = length // TILE
    return Sparsity(tiles / (heads * side * (side + 1) / 2), pairs / (heads * length))
