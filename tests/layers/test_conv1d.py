"""nn.Conv1d from calibration to loading: the same as a Conv2d of width 1, whose paths have tests of their own."""

import copy

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.layers import LowRankConv1d, to_dense_layers, to_plain_layers

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 2},
    {"padding": "same", "dilation": 2},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "groups": 2},
]


class Model(nn.Module):
    """Two convolutions and a head; positions have one dimension, or a second one of size 1."""

    def __init__(self, conv, kind):
        super().__init__()
        self.more = () if kind is nn.Conv1d else (1,)
        self.conv, self.point, self.head = conv, kind(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = x.view(*x.shape, *self.more)
        y = self.point(torch.relu(self.conv(x)))
        return self.head(y.flatten(2).mean(-1) if y.dim() > 2 else y.mean(-1))


def pair(**geometry):
    """The same model with Conv1d and with Conv2d of width 1."""
    one = Model(nn.Conv1d(4, 8, 3, **geometry), nn.Conv1d)
    two = {
        name: value if isinstance(value, str) or name == "groups" else (value, 0 if name == "padding" else 1)
        for name, value in geometry.items()
    }
    other = Model(nn.Conv2d(4, 8, (3, 1), **two), nn.Conv2d)
    other.load_state_dict(
        {name: tensor.view(other.state_dict()[name].shape) for name, tensor in one.state_dict().items()}
    )
    return one.eval(), other.eval()


def batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5, 4, 9, generator=generator) for _ in range(4)]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("geometry", "side"), [*((each, "input") for each in GEOMETRIES), (GEOMETRIES[1], "output")])
def test_statistics_and_factors_are_those_of_width_one(geometry, side):
    one, two = pair(**geometry)
    reports = []
    for model in (one, two):
        torch.manual_seed(1)  # labels are drawn
        covariances = lro.calibrate(model, batches(), sensitivity="fisher", side=side)
        reports.append((covariances, lro.compress_(model, covariances, lro.Ranks({"conv": 2, "point": 3}))))
    for fqn in reports[0][0]:
        for name, moments in reports[0][0][fqn].moments().items():
            other = reports[1][0][fqn].moments()[name]
            assert moments.count == other.count
            torch.testing.assert_close(moments.second_moment, other.second_moment)
    assert type(one.conv) is LowRankConv1d and one.conv.rank == 2
    torch.testing.assert_close(one(batches()[0]), two(batches()[0]))
    torch.testing.assert_close(
        [row.relative_error for row in reports[0][1].layers], [row.relative_error for row in reports[1][1].layers]
    )
    assert [row.kind for row in reports[0][1].layers] == ["conv", "conv", "other"]


@pytest.mark.parametrize("geometry", GEOMETRIES[1:], ids=str)
def test_layer_saves_loads_and_converts(geometry, tmp_path):
    dense, _ = pair(**geometry)
    model, x = copy.deepcopy(dense), batches()[0]
    lro.compress_(model, lro.calibrate(model, batches()), lro.Ranks({"conv": 3}))
    lro.save_pretrained(model, tmp_path)
    loaded = lro.load_pretrained(copy.deepcopy(dense), tmp_path)
    assert torch.equal(loaded(x), model(x))
    for convert, kind in ((to_dense_layers, nn.Conv1d), (to_plain_layers, nn.Sequential)):
        converted = convert(model)
        assert type(converted.conv) is kind
        torch.testing.assert_close(converted(x), model(x))
    assert lro.measure_errors(dense, model, batches())["conv"] < 1
    with pytest.raises(lro.CheckpointError, match="has kind 'conv1d' in the checkpoint and 'conv2d'"):
        lro.load_pretrained(pair(**geometry)[1], tmp_path)


def test_full_rank_equals_the_layer_also_without_a_batch():
    conv = nn.Conv1d(4, 6, 3, padding=1)
    layer = LowRankConv1d.from_conv1d(conv, 6)
    for x in (torch.randn(2, 4, 7), torch.randn(4, 7)):
        torch.testing.assert_close(layer(x), conv(x))
    assert layer.weight.shape == conv.weight.shape
    with pytest.raises(TypeError, match=r"conv must be a torch.nn.Conv1d; got Conv2d"):
        LowRankConv1d.from_conv1d(nn.Conv2d(4, 6, 3), 2)


def test_reconstruction_and_midpoint_handle_conv1d():
    model, _ = pair(padding=1)
    covariances = lro.calibrate(model, batches(), sensitivity="fisher")
    covariances = lro.recalibrate(model, covariances, batches(), 2, sensitivity="fisher")
    dense = copy.deepcopy(model)
    lro.compress_(
        model, covariances, lro.Ranks({"conv": 3, "point": 2}), reconstruction=lro.SequentialReconstruction(batches())
    )
    plain = copy.deepcopy(dense)
    lro.compress_(plain, covariances, lro.Ranks({"conv": 3, "point": 2}))
    error = [sum((m(x) - dense(x)).square().sum() for x in batches()) for m in (model, plain)]
    assert error[0] < 1.05 * error[1]


def test_latency_of_conv1d_is_measured():
    latencies = lro.measure_latency(pair()[0], batches()[0], points=2, rounds=1)
    assert sum(name.startswith("Conv1d 4 -> 8, kernel 3") for name in latencies.curves) == 1
