"""Who decays, who goes to Muon, and how the learning rate moves."""

import math

import pytest
import torch
from torch import nn

from adasplash.training.optimizer import OptimConfig, build_optimizers, learning_rate_factor, set_learning_rate


class Tiny(nn.Module):
    """An embedding, a hidden matrix, a norm, a 3-D weight, a scalar, and an output head, tied or not."""

    def __init__(self, tied: bool):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.convolution = nn.Conv1d(4, 4, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def get_output_embeddings(self):
        return self.head

    def forward(self, tokens):
        x = self.norm(self.hidden(self.table(tokens))) * self.scale
        return self.head(self.convolution(x.mT).mT)


def names_by_group(model, optimizers):
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        (type(optimizer).__name__, group["weight_decay"], {names[id(p)] for p in group["params"]})
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_where_it_belongs(kind, tied):
    model = Tiny(tied)
    groups = names_by_group(model, build_optimizers(model, OptimConfig(kind=kind, weight_decay=0.3)))
    decaying = {"table.weight", "convolution.weight"} | (set() if tied else {"head.weight"})
    plain = {"hidden.bias", "norm.weight", "norm.bias", "convolution.bias", "scale"}
    if kind == "adamw":
        assert groups == [("AdamW", 0.3, decaying | {"hidden.weight"}), ("AdamW", 0.0, plain)]
    else:
        assert groups == [("AdamW", 0.3, decaying), ("AdamW", 0.0, plain), ("Muon", 0.3, {"hidden.weight"})]


def test_frozen_parameters_are_left_out_and_all_frozen_is_told():
    model = Tiny(True)
    model.hidden.requires_grad_(False)
    groups = names_by_group(model, build_optimizers(model, OptimConfig(kind="muon")))
    assert not any(name.startswith("hidden") for _, _, names in groups for name in names)
    with pytest.raises(ValueError, match="none that requires a gradient"):
        build_optimizers(model.requires_grad_(False), OptimConfig())


def test_matrices_alone_need_no_adamw():
    optimizers = build_optimizers(nn.Linear(3, 3, bias=False), OptimConfig(kind="muon"))
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["Muon"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_it_lowers_a_loss(kind):
    model = Tiny(True)
    optimizers = build_optimizers(model, OptimConfig(kind=kind, learning_rate=1e-2))
    tokens, losses = torch.randint(5, (4, 12)), []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens[:, 1:-1].flatten())
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_the_learning_rate_is_a_share_of_each_groups_own_peak():
    optimizers = build_optimizers(Tiny(True), OptimConfig(kind="muon", learning_rate=1e-3, muon_learning_rate=0.04))
    for factor in (0.5, 0.25):  # of the peak, not of the last
        set_learning_rate(optimizers, factor)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == [1e-3 * factor, 1e-3 * factor, 0.04 * factor]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1001])
def test_it_rises_once_then_falls_to_its_end(schedule, steps):
    config = OptimConfig(schedule=schedule)
    factors = [learning_rate_factor(step, steps, config) for step in range(steps)]
    assert all(config.final_fraction <= factor <= 1 for factor in factors[round(0.05 * steps) :])
    assert min(factors) > 0 and max(factors) == 1
    top = factors.index(1)
    assert top == round(0.05 * steps)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    if steps > 100:
        assert factors[-1] == pytest.approx(config.final_fraction, abs=0.01)


def test_wsd_stays_then_falls_in_a_straight_line():
    config = OptimConfig(schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2, final_fraction=0.0)
    factors = [learning_rate_factor(step, 100, config) for step in range(100)]
    assert factors[10:81] == [1.0] * 71
    falls = [before - after for before, after in zip(factors[80:], factors[81:], strict=False)]
    assert falls == pytest.approx([0.05] * 19)


def test_cosine_is_half_way_down_in_the_middle():
    config = OptimConfig(warmup_fraction=0.0, final_fraction=0.2)
    assert learning_rate_factor(0, 100, config) == 1
    assert learning_rate_factor(50, 100, config) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"kind": "adam"}, "Did you mean 'adamw'"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"learning_rate": 0.0}, "learning_rate above 0"),
        ({"learning_rate": math.nan}, "learning_rate above 0"),
        ({"muon_learning_rate": math.inf}, "muon_learning_rate above 0"),
        ({"eps": -1.0}, "eps above 0"),
        ({"gradient_clip": 0.0}, "gradient_clip above 0"),
        ({"weight_decay": math.nan}, "weight_decay of at least 0"),
        ({"betas": (0.9, 1.0)}, "betas of at least 0 and below 1"),
        ({"final_fraction": 1.5}, "final_fraction between 0 and 1"),
        ({"schedule": "wsd", "warmup_fraction": 0.9}, r"at most 1 for schedule wsd, got 0.9 \+ 0.2"),
    ],
)
def test_bad_values_are_told(values, told):
    with pytest.raises(ValueError, match=told):
        OptimConfig(**values)


def test_an_infinite_clip_is_no_clip():
    assert OptimConfig(gradient_clip=math.inf).gradient_clip == math.inf
