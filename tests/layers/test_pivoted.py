"""Pivoted layers: the function of two factors with rank^2 parameters fewer, from compress_ to a checkpoint."""

import copy
import json

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.layers import PivotedLinear
from lowrank_ops.subspaces.pivots import MAX_COEFFICIENT, pivoted_rows
from tests.conv1d import Conv1D

# (outputs, inputs, rank)
SIZES = [(24, 40, 16), (40, 24, 9), (16, 16, 16), (16, 40, 1), (12, 8, 0), (8, 0, 0), (0, 8, 0)]


def lowrank(outputs, inputs, rank, bias=True, dtype=torch.float64):
    return lro.LowRankLinear(inputs, outputs, rank, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_the_function_is_that_of_two_factors(size, bias):
    outputs, inputs, rank = size
    layer = lowrank(*size, bias=bias).eval()
    layer.down.requires_grad_(False)
    layer.up.requires_grad_(False)
    pivoted = PivotedLinear.from_lowrank(layer)
    x = torch.randn(3, 5, inputs, dtype=torch.float64)
    torch.testing.assert_close(pivoted(x), layer(x))
    torch.testing.assert_close(pivoted.to_lowrank()(x), layer(x))
    torch.testing.assert_close(pivoted.to_dense()(x), layer(x))
    torch.testing.assert_close(PivotedLinear.from_lowrank(pivoted)(x), layer(x))
    torch.testing.assert_close(pivoted.weight.clone(), layer.weight.clone())
    assert pivoted.weight.shape == (outputs, inputs)
    assert pivoted.down.numel() + pivoted.up.numel() == rank * (outputs + inputs - rank)
    assert not pivoted.training and not pivoted.down.requires_grad and (pivoted.bias is not None) == bias


def test_coefficients_are_bounded_where_partial_pivoting_alone_lets_them_grow():
    growing = torch.eye(12, dtype=torch.float64) - torch.ones(12, 12, dtype=torch.float64).tril(-1)
    growing = torch.linalg.inv(growing)[:, :8]
    for up in (growing, torch.randn(60, 30, dtype=torch.float64) * torch.logspace(0, -8, 30, dtype=torch.float64)):
        pivots, others, coefficients = pivoted_rows(up)
        assert sorted([*pivots.tolist(), *others.tolist()]) == list(range(len(up)))
        assert coefficients.abs().max() <= MAX_COEFFICIENT
        torch.testing.assert_close(coefficients @ up[pivots], up[others], rtol=1e-9, atol=1e-12)


def test_factors_of_less_than_their_rank_are_exact():
    layer = lowrank(24, 16, 8)
    with torch.no_grad():
        layer.up[:, 3:] = layer.up[:, :5]
    x = torch.randn(4, 16, dtype=torch.float64)
    torch.testing.assert_close(PivotedLinear.from_lowrank(layer)(x), layer(x))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_equal_their_parts(layout):
    layer, parts = PivotedLinear(8, 12, rank=4), [torch.randn(3, 8), torch.randn(5, 8)]
    for found, part in zip(layer(torch.nested.nested_tensor(parts, layout=layout)).unbind(), parts, strict=True):
        torch.testing.assert_close(found, layer(part))


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_gives_the_dtype_of_a_linear(bias):
    layer, x = PivotedLinear(24, 16, rank=8, bias=bias), torch.randn(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in layer.parameters())


def test_conversions_remember_a_conv1d():
    model = nn.Sequential(Conv1D(16, 8))
    lowrank_ = nn.Sequential(lro.LowRankLinear.from_linear(model[0], 4))
    pivoted = nn.Sequential(PivotedLinear.from_lowrank(lowrank_[0]))
    for compressed_ in (pivoted, nn.Sequential(pivoted[0].to_lowrank())):
        assert type(lro.layers.to_dense_layers(compressed_)[0]) is Conv1D


def test_training_keeps_the_rank():
    layer, x = PivotedLinear(24, 24, rank=8, dtype=torch.float64), torch.randn(64, 24, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.down.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(layer.down, before)
    assert torch.linalg.matrix_rank(layer.weight.clone()) == 8
    assert torch.autograd.gradcheck(layer, x[:2].clone().requires_grad_())


def test_new_weights_vary_as_those_of_a_linear():
    torch.manual_seed(0)
    layer = PivotedLinear(256, 512, rank=128)
    variance = layer.weight.clone()[:128].var(), layer.weight.clone()[128:].var()
    for found in variance:
        assert found.item() * 3 * 256 == pytest.approx(1, rel=0.1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.wide, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16 * 4, 48), nn.Linear(48, 64)

    def forward(self, x):
        return self.head(self.wide(self.conv(x).flatten(1)).relu())


@pytest.fixture
def calibrated():
    torch.manual_seed(0)
    model, batches = Net().eval(), [torch.randn(64, 3, 4, 4) for _ in range(2)]
    return model, batches, lro.calibrate(model, batches, sensitivity="output")


def compressed(calibrated, policy, pivoted=True, **options):
    model = copy.deepcopy(calibrated[0])
    return model, lro.compress_(model, calibrated[2], lro.CompressionConfig(policy, pivoted=pivoted), **options)


@pytest.mark.parametrize("policy", [lro.ParameterBudget(0.7), lro.FlopBudget(0.7)])
def test_a_budget_allows_larger_ranks(calibrated, policy):
    model, report = compressed(calibrated, policy)
    _, plain = compressed(calibrated, policy, pivoted=False)
    assert isinstance(model.wide, PivotedLinear)
    assert sum(row.predicted_loss for row in report.layers) < sum(row.predicted_loss for row in plain.layers)
    stored = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    assert report.model_parameters == stored
    if isinstance(policy, lro.ParameterBudget):
        assert report.layer_parameters <= 0.7 * report.layer_parameters_before
    x = calibrated[1][0]
    torch.testing.assert_close(lro.layers.to_plain_layers(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_other_policies_and_searches_price_pivoted_layers(calibrated):
    model, batches, covariances = calibrated
    # As two factors, neither rank saves parameters; a convolution is not pivoted.
    _, report = compressed(calibrated, 40)
    assert {row.fqn: row.rank for row in report.layers} == {"conv": None, "wide": 40, "head": 40}
    # The order of the outputs is stored too, which does not pay at small ranks.
    mixed, report = compressed(calibrated, lro.Ranks({"conv": 8, "wide": 40, "head": 8}))
    assert isinstance(mixed.conv, lro.LowRankConv2d) and isinstance(mixed.wide, PivotedLinear)
    assert type(mixed.head) is lro.LowRankLinear
    assert report.model_parameters == sum(part.numel() for part in mixed.state_dict().values())
    config = lro.CompressionConfig(pivoted=True)
    ranks = lro.measured_ranks(model, covariances, batches, 0.7, sensitivity="output", config=config)
    _, report = compressed(calibrated, ranks)
    assert 0.6 < report.layer_parameters / report.layer_parameters_before <= 0.7


def test_reconstructed_factors_are_pivoted(calibrated):
    settings = lro.SequentialReconstruction(calibrated[1])
    model, report = compressed(calibrated, lro.ParameterBudget(0.7), reconstruction=settings)
    ranks = lro.Ranks({row.fqn: row.rank for row in report.layers if row.rank is not None})
    plain, _ = compressed(calibrated, ranks, pivoted=False, reconstruction=settings)
    assert isinstance(model.wide, PivotedLinear) and not isinstance(plain.wide, PivotedLinear)
    torch.testing.assert_close(model(calibrated[1][0]), plain(calibrated[1][0]), rtol=1e-4, atol=1e-5)


def test_checkpoints_name_pivoted_layers(calibrated, tmp_path):
    model, report = compressed(calibrated, lro.ParameterBudget(0.7))
    lro.save_pretrained(model, tmp_path, report)
    loaded = lro.load_pretrained(Net().eval(), tmp_path)
    x = calibrated[1][0]
    assert isinstance(loaded.wide, PivotedLinear) and torch.equal(loaded(x), model(x))
    assert json.loads((tmp_path / "lowrank_config.json").read_text())["version"] == 3


@pytest.mark.parametrize("index", [64, -1, 3])
def test_an_order_that_misses_an_output_is_refused(calibrated, tmp_path, index):
    model, report = compressed(calibrated, lro.ParameterBudget(0.7))
    model.head.order[model.head.order == 4] = index  # as a moving average of integers may
    lro.save_pretrained(model, tmp_path, report)
    with pytest.raises(lro.CheckpointError, match=r"layer 'head': 'head\.order' is not a permutation"):
        lro.load_pretrained(Net(), tmp_path)
    assert isinstance(lro.load_pretrained(Net(), tmp_path, verify=False).head, PivotedLinear)


def test_a_latency_budget_is_refused():
    latencies = lro.measure_latency(nn.Sequential(nn.Linear(16, 16)), torch.randn(2, 16), points=2, rounds=1)
    with pytest.raises(ValueError, match="cannot be combined with a LatencyBudget"):
        lro.CompressionConfig(lro.LatencyBudget(0.5, latencies), pivoted=True)
    with pytest.raises(TypeError, match="pivoted must be a bool; got 1"):
        lro.CompressionConfig(pivoted=1)
