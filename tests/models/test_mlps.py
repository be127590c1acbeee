"""MLPs are found by their shapes and verified by running them; the model stays as it is."""

import pytest
import torch
from torch import nn

from lowrank_ops.models.layers import find_layers
from lowrank_ops.models.mlps import Mlp, find_mlps


class Gated(nn.Module):
    """Gate, up and down projections, named in another order than they are called."""

    def __init__(self, between=lambda h: h, after=lambda module, h, y: y):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 24), nn.Linear(24, 8, bias=False), nn.Linear(8, 24)
        self.between, self.after = between, after

    def forward(self, x):
        h = self.between(nn.functional.silu(self.w1(x)) * self.w3(x))
        return self.after(self, h, self.w2(h))


def keeping(what):
    """Keeps a part of what it computes as an attribute, which others can read."""

    def after(module, h, y):
        module.kept = [what(h, y).detach()]
        return y

    return Gated(after=after)


def counting():
    """Counts its calls and keeps a running mean of its outputs, and the outputs themselves."""

    def after(module, h, y):
        module.calls += 1
        module.outputs.append(y)
        module.mean = 0.9 * module.mean + y.detach().mean()
        return y

    model = Gated(after=after)
    model.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    model.register_buffer("mean", torch.zeros(()))
    model.outputs = []
    model(torch.randn(3, 8))
    return model


class Masked(Gated):
    def forward(self, x, mask):
        return super().forward(x) if mask is None else super().forward(x) * mask


class Squares(nn.Module):
    """Four layers of one shape; only fc1 and fc2 are an MLP."""

    def __init__(self):
        super().__init__()
        self.q, self.fc1, self.fc2, self.k = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return self.fc2(self.fc1(x).relu()) + (self.q(x) @ self.k(x).mT).softmax(-1) @ x


GATED = Mlp(("w1", "w3"), "w2")


def mlps_of(model):
    return find_mlps(model, find_layers(model)[0])


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Dropout(0.5), nn.Linear(24, 4)), [Mlp(("0",), "3")]),
        (nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]), [Mlp(("0",), "1"), Mlp(("2",), "3")]),
        (Gated(), [GATED]),
        (Gated(between=nn.Dropout(0.5)), [GATED]),
        (Masked(), [GATED]),
        (counting(), [GATED]),
        (keeping(lambda h, y: y.abs().mean()), [GATED]),
        (Squares(), [Mlp(("fc1",), "fc2")]),
        (Gated().to(torch.bfloat16), [GATED]),
        (nn.Sequential(Gated(), Gated()), [Mlp(("0.w1", "0.w3"), "0.w2"), Mlp(("1.w1", "1.w3"), "1.w2")]),
        (
            nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 24)),
            [Mlp(("2.linear1",), "2.linear2")],
        ),
    ],
)
def test_mlps_are_found(model, found):
    before = {name: (id(part), part.clone()) for name, part in model.named_parameters()}
    training, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert mlps_of(model) == found
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == training
    for name, part in model.named_parameters():
        assert id(part) == before[name][0] and torch.equal(part, before[name][1])


class Count:
    def __init__(self):
        self.calls = 0

    def __call__(self, module, args):
        self.calls += 1


def hooked(model):
    model.w2.register_forward_pre_hook(Count())
    return model


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(24, 8)),
        nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Linear(24, 8)),
        nn.Sequential(nn.Linear(8, 24), nn.Softmax(-1), nn.Linear(24, 8)),
        nn.Sequential(nn.Linear(8, 24), nn.PReLU(24), nn.Linear(24, 8)),
        Gated(between=lambda h: h / h.norm(dim=-1, keepdim=True)),
        Gated(between=lambda h: h.roll(1, -1)),
        Gated(between=lambda h: h.flip(-1)),
        Gated(between=lambda h: h.view(-1, 2, 12).mean(1, keepdim=True).expand(-1, 2, -1).reshape(h.shape)),
        Gated(after=lambda module, h, y: y + h.sum(-1, keepdim=True)),  # another reader of the channels
        Gated(after=lambda module, h, y: (y, h)),
        Gated(after=lambda module, h, y: y * module.w1.out_features),
        keeping(lambda h, y: h),
        keeping(lambda h, y: h.abs().mean()),
        hooked(Gated()),
        nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(12, 8)),  # does not run
        nn.Sequential(nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 8)),  # has nothing to drop
        nn.ModuleDict({"down": nn.Linear(24, 8), "up": nn.Linear(8, 24)}),
        nn.Linear(8, 8),
    ],
)
def test_what_mixes_or_shows_channels_is_no_mlp(model):
    assert mlps_of(model) == []


@pytest.mark.parametrize("shared", ["w1", "w2"])
def test_layers_that_two_mlps_share_are_in_no_mlp(shared):
    model = nn.Sequential(Gated(), Gated(), Gated())
    setattr(model[1], shared, model[0].get_submodule(shared))
    assert mlps_of(model) == [Mlp(("2.w1", "2.w3"), "2.w2")]


def test_an_mlp_that_is_called_twice_is_found():
    mlp = Gated()
    assert mlps_of(nn.Sequential(mlp, nn.ReLU(), mlp)) == [Mlp(("0.w1", "0.w3"), "0.w2")]


def test_layers_that_may_not_be_changed_are_in_no_mlp():
    model = nn.Sequential(Gated(), Gated())
    layers = {fqn: layer for fqn, layer in find_layers(model)[0].items() if fqn != "0.w3"}
    assert find_mlps(model, layers) == [Mlp(("1.w1", "1.w3"), "1.w2")]
