"""Compression with groups: which layers form them, that they are low-rank all or none, and are kept in checkpoints."""

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.layers.group import groups_in


class Block(nn.Module):
    """Attention-like and MLP-like projections; the value layer has few outputs, so a low rank saves little there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.ModuleDict(
            {"q": nn.Linear(48, 48), "k": nn.Linear(48, 48, bias=False), "v": nn.Linear(48, 24), "o": nn.Linear(48, 48)}
        )
        self.mlp = nn.ModuleDict({"gate": nn.Linear(48, 96), "up": nn.Linear(48, 96), "down": nn.Linear(96, 48)})
        self.head = nn.Linear(48, 8)

    def forward(self, x):
        q, k, v = (self.attention[name](x) for name in "qkv")
        x = self.attention["o"](q * k) + torch.cat([v, v], -1)
        x = self.mlp["down"](self.mlp["gate"](x).relu() * self.mlp["up"](x))
        return self.head(x)


QKV, GATE_UP = ("attention.q", "attention.k", "attention.v"), ("mlp.gate", "mlp.up")


@pytest.fixture
def model():
    return Block()


def compressed(model, rank=8, group=True, **options):
    covariances = lro.calibrate(model, [torch.randn(200, 48)])
    return lro.compress_(model, covariances, lro.CompressionConfig(rank, group=group, **options))


def test_groups_share_their_input_and_are_reported(model):
    x = torch.randn(5, 48)
    report = compressed(model)
    assert report.groups == (QKV, GATE_UP) == tuple(map(tuple, groups_in(model)))
    assert report.to_dict()["groups"] == [list(QKV), list(GATE_UP)]
    assert "groups of layers with one input: 2, such as attention.q, attention.k, attention.v" in report.table()
    twin = Block()
    compressed(twin, group=False)
    assert not groups_in(twin) and twin.state_dict().keys() == model.state_dict().keys()
    assert lro.CompressionConfig.from_json(report.config.to_json()) == report.config
    assert model(x).shape == twin(x).shape


@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("allocation", ["uniform", "variance"])
def test_members_are_low_rank_all_or_none(model, fraction, allocation):
    policy = lro.ParameterBudget(fraction, allocation=allocation)
    covariances = lro.calibrate(model, [torch.randn(200, 48)])
    report = lro.compress_(model, covariances, lro.CompressionConfig(policy, group=True))
    ranks = {layer.fqn: layer.rank for layer in report.layers}
    for names in (QKV, GATE_UP):
        assert len({ranks[fqn] is None for fqn in names}) == 1
        assert (names in report.groups) is (ranks[names[0]] is not None)
    assert report.layer_parameters <= fraction * report.layer_parameters_before


def test_a_policy_that_would_mix_is_asked_again(model):
    """Rank 16 saves parameters in all layers but the narrow one."""
    ranks = {layer.fqn: layer.rank for layer in compressed(Block(), 16, group=False).layers}
    assert ranks["attention.v"] is None and ranks["attention.q"] == 16
    report = compressed(model, 16)
    ranks = {layer.fqn: layer.rank for layer in report.layers}
    assert ranks["attention.v"] == 8 and ranks["attention.q"] == 16 and report.groups == (QKV, GATE_UP)


def test_layers_that_are_dense_by_hand_are_in_no_group(model):
    report = compressed(model, overrides={"attention.k": None, "mlp.up": None})
    assert report.groups == (("attention.q", "attention.v"),)
    by_hand = Block()
    covariances = lro.calibrate(by_hand, [torch.randn(200, 48)])
    report = lro.compress_(by_hand, covariances, lro.CompressionConfig(lro.Ranks({"attention.q": 8}), group=True))
    assert report.groups == () and "no layers share an input" in report.table()


def test_layers_without_kernels_for_groups_are_refused():
    with pytest.raises(ValueError, match="pivoted=True cannot be combined with group=True"):
        lro.CompressionConfig(group=True, pivoted=True)
    with pytest.raises(ValueError, match="group=True cannot be combined with a ByteBudget"):
        lro.CompressionConfig(lro.ByteBudget(0.5), group=True)
    with pytest.raises(TypeError, match="group must be a bool"):
        lro.CompressionConfig(group=1)


def test_checkpoints_keep_groups(model, tmp_path):
    report = compressed(model)
    lro.save_pretrained(model, tmp_path, report)
    loaded = lro.load_pretrained(Block(), tmp_path)
    assert tuple(map(tuple, groups_in(loaded))) == report.groups
    x = torch.randn(5, 48)
    assert torch.equal(loaded(x), model(x))
    model.attention["k"] = nn.Linear(48, 48, bias=False)  # a group of which one layer is gone is not saved
    lro.save_pretrained(model, tmp_path)
    assert groups_in(lro.load_pretrained(Block(), tmp_path)) == [list(GATE_UP)]
    plain = lro.layers.to_plain_layers(loaded)
    torch.testing.assert_close(plain(x), loaded(x))
    assert not groups_in(plain)
