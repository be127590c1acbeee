"""Factors: optimal, equal to the paper's double projection, and with a predicted error that is the measured one."""

import numpy as np
import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.factors import factorize
from lowrank_ops.subspaces import layer_subspaces

PROJECTIONS = ("output", "utilized", "input", "weight")


def rows_of_rank(rank, features, count=400):
    return (torch.randn(count, rank) + 0.5).double() @ torch.randn(rank, features).double()


def spaces_of(layer, x, side="input", centered=True):
    covariances = lro.calibrate(nn.Sequential(layer), [x], side=side)
    return layer_subspaces({"0": layer}, covariances, centered=centered)["0"]


def measured_error(layer, factors, x):
    """E|y - y'|^2 over the rows of the output."""
    with torch.no_grad():
        if isinstance(layer, nn.Conv2d):
            new = lro.LowRankConv2d.from_factors(layer, factors)
            return float((layer(x) - new(x)).square().sum(1).mean())
        return float((layer(x) - lro.LowRankLinear.from_factors(layer, factors)(x)).square().sum(-1).mean())


LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), lambda: rows_of_rank(10, 24)),
    "no bias": (lambda: nn.Linear(24, 16, bias=False), lambda: rows_of_rank(30, 24)),
    "wide": (lambda: nn.Linear(12, 40), lambda: rows_of_rank(5, 12)),
    "conv": (lambda: nn.Conv2d(3, 16, 3, padding=1, stride=2), lambda: torch.randn(5, 3, 9, 9).double() + 1),
    "grouped": (lambda: nn.Conv2d(6, 20, 3, groups=2), lambda: torch.randn(5, 6, 7, 7).double() + 1),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    layer, x = (make() for make in LAYERS[request.param])
    return layer.double(), x


# --- predicted errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 4, 9])
def test_the_predicted_error_is_the_measured_one(layer_and_input, projection, centered, rank):
    layer, x = layer_and_input
    spaces = spaces_of(layer, x, centered=centered)
    factors = factorize(spaces, rank, projection)
    assert factors.rank == rank and factors.projection == projection
    tolerance = 1e-6 * factors.output_variance
    assert abs(factors.predicted_error - measured_error(layer, factors, x)) < tolerance


def test_full_rank_is_exact(layer_and_input):
    layer, x = layer_and_input
    spaces = spaces_of(layer, x)
    rank = min(spaces.dimensions[1:])
    for projection in set(PROJECTIONS) - {"input"}:  # keeps that many input directions only
        factors = factorize(spaces, rank, projection)
        assert measured_error(layer, factors, x) < 1e-12 * factors.output_variance


def test_the_output_variance_is_that_of_the_output(layer_and_input):
    layer, x = layer_and_input
    with torch.no_grad():
        y = layer(x).movedim(1, -1).flatten(0, -2)
    for centered in (True, False):
        factors = factorize(spaces_of(layer, x, centered=centered), 2)
        y0 = y - (y.mean(0) if centered else 0 if layer.bias is None else layer.bias.detach())
        assert abs(factors.output_variance - float(y0.square().sum(-1).mean())) < 1e-9 * factors.output_variance


# --- optimality -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_output_is_optimal(layer_and_input, rank):
    layer, x = layer_and_input
    spaces = spaces_of(layer, x)
    best = factorize(spaces, rank, "output")
    dropped = float(spaces.output.spectrum[..., rank:].sum())
    assert abs(best.predicted_error - dropped) < 1e-12 * best.output_variance
    for projection in ("utilized", "input", "weight"):
        other = measured_error(layer, factorize(spaces, rank, projection), x)
        assert best.predicted_error <= other + 1e-9 * best.output_variance
    for scale in (1e-3, 1e-1, 1.0):  # no factors nearby do better, with the bias that is best for them
        down = best.down + scale * best.down.std() * torch.randn_like(best.down)
        up = best.up + scale * best.up.std() * torch.randn_like(best.up)
        lost = spaces.weight - up @ down
        assert float(((lost @ spaces.moment) * lost).sum()) >= dropped - 1e-9 * best.output_variance


def test_output_equals_the_truncated_svd_of_the_outputs():
    """An independent statement: the best approximation of the outputs themselves, rows and all."""
    layer, x = nn.Linear(24, 16).double(), rows_of_rank(30, 24)
    y = layer(x).detach().numpy()
    u, s, vt = np.linalg.svd(y - y.mean(0), full_matrices=False)
    expected = (u[:, :5] * s[:5]) @ vt[:5] + y.mean(0)
    found = lro.LowRankLinear.from_factors(layer, factorize(spaces_of(layer, x), 5))(x).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(y).max())


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_centered_is_never_worse(layer_and_input, rank):
    layer, x = layer_and_input
    affine, linear = (
        measured_error(layer, factorize(spaces_of(layer, x, centered=centered), rank, "output"), x)
        for centered in (True, False)
    )
    assert affine <= linear * (1 + 1e-9) + 1e-12


def test_centering_may_be_worse_for_input_components():
    """The mean lies in a feature of less variance, to which the output is more sensitive."""
    layer = nn.Linear(2, 2, bias=False).double()
    layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    x = torch.randn(400, 2, dtype=torch.float64) * torch.tensor([1.5, 1.0]) + torch.tensor([0.0, 5.0])
    affine, linear = (
        measured_error(layer, factorize(spaces_of(layer, x, centered=centered), 1, "input"), x)
        for centered in (True, False)
    )
    assert affine > linear


@pytest.mark.parametrize("projection", ["output", "utilized", "input"])
def test_the_mean_output_is_exact(layer_and_input, projection):
    layer, x = layer_and_input
    factors = factorize(spaces_of(layer, x), 3, projection)
    new = (lro.LowRankConv2d if isinstance(layer, nn.Conv2d) else lro.LowRankLinear).from_factors(layer, factors)
    mean, expected = (module(x).movedim(1, -1).flatten(0, -2).mean(0) for module in (new, layer))
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)


# --- the paper's projection -------------------------------------------------------------------------------------


def directions(rows, share):
    """The principal directions of ``rows`` that hold ``share`` of the variance, in columns; NumPy only."""
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values[::-1], vectors[:, ::-1]
    return vectors[:, : int((values.cumsum() < share * values.sum()).sum()) + 1]


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(24, 16), (12, 40), (40, 12)])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_utilized_is_the_papers_double_projection(shape, centered, rank):
    layer = nn.Linear(*shape).double()
    x = rows_of_rank(30, shape[0]) * torch.logspace(0, -2, shape[0]).double()
    spaces = spaces_of(layer, x, centered=centered)
    weight = layer.weight.detach().numpy()
    factors = factorize(spaces, rank, "utilized")

    inputs = x.numpy() - (x.numpy().mean(0) if centered else 0)
    shares = [float(space.explained(rank)) for space in (spaces.input, spaces.output)]
    share = max(shares) * (1 - 1e-12)  # the largest at which the utilized rank is still ``rank``
    source, target = directions(inputs, share), directions(inputs @ weight.T, share)
    assert min(source.shape[1], target.shape[1]) == rank == spaces.utilized_rank(share)
    expected = target @ target.T @ weight @ source @ source.T
    np.testing.assert_allclose((factors.up @ factors.down).numpy(), expected, atol=1e-9)


def test_utilized_past_the_numerical_rank_is_exact():
    layer, x = nn.Linear(24, 16).double(), rows_of_rank(4, 24)
    factors = factorize(spaces_of(layer, x), 9, "utilized")
    assert measured_error(layer, factors, x) < 1e-12 * factors.output_variance


# --- baselines --------------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [True, False])
def test_input_keeps_the_principal_components_of_the_input(centered):
    layer = nn.Linear(24, 16).double()
    x = rows_of_rank(30, 24) * torch.logspace(0, -2, 24).double()
    factors = factorize(spaces_of(layer, x, centered=centered), 5, "input")
    inputs, weight, bias = x.numpy(), layer.weight.detach().numpy(), layer.bias.detach().numpy()
    mean = inputs.mean(0) if centered else np.zeros(24)
    source = np.linalg.svd(inputs - mean, full_matrices=False)[2][:5]
    expected = ((inputs - mean) @ source.T @ source + mean) @ weight.T + bias
    found = lro.LowRankLinear.from_factors(layer, factors)(x).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-8 * np.abs(expected).max())
    rows = factors.down / factors.down.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(rows @ rows.T, np.eye(5), atol=1e-9)


def test_input_at_the_inputs_rank_is_exact():
    layer, x = nn.Linear(24, 16).double(), rows_of_rank(4, 24)
    factors = factorize(spaces_of(layer, x), 4, "input")
    assert measured_error(layer, factors, x) < 1e-12 * factors.output_variance


def test_weight_is_the_truncated_svd_and_ignores_the_data():
    layer, x = nn.Linear(24, 16).double(), rows_of_rank(4, 24)
    factors = factorize(spaces_of(layer, x), 5, "weight")
    u, s, vt = np.linalg.svd(layer.weight.detach().numpy())
    np.testing.assert_allclose((factors.up @ factors.down).numpy(), (u[:, :5] * s[:5]) @ vt[:5], atol=1e-10)
    assert torch.equal(factors.bias, layer.bias)


# --- sides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [True, False])
def test_a_streamed_output_gives_the_same_factors(layer_and_input, centered):
    layer, x = layer_and_input
    by_input, by_output = (factorize(spaces_of(layer, x, side, centered), 3, "output") for side in ("input", "output"))
    torch.testing.assert_close(by_output.up @ by_output.down, by_input.up @ by_input.down, rtol=0, atol=1e-8)
    torch.testing.assert_close(by_output.predicted_error, by_input.predicted_error, rtol=1e-8, atol=1e-12)
    if by_input.bias is not None:
        torch.testing.assert_close(by_output.bias, by_input.bias, rtol=1e-8, atol=1e-8)
    assert (by_output.bias is None) == (by_input.bias is None)


def test_projections_that_need_the_input_are_refused():
    layer = nn.Linear(24, 16).double()
    spaces = spaces_of(layer, rows_of_rank(9, 24), side="output")
    assert factorize(spaces, 3, "weight").predicted_error is None
    for projection in ("utilized", "input"):
        with pytest.raises(ValueError, match=rf"projection='{projection}' needs the input space.*side='input'"):
            factorize(spaces, 3, projection)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_zero_and_constant_inputs_have_defined_factors(projection):
    layer = nn.Linear(24, 16).double()
    for x in (torch.zeros(50, 24).double(), torch.full((50, 24), 0.1).double()):
        factors = factorize(spaces_of(layer, x), 0, projection)
        assert factors.down.shape == (0, 24) and factors.up.shape == (16, 0)
        if projection != "weight":
            torch.testing.assert_close(factors.bias, layer(x[0]).detach())
            assert factors.predicted_error == 0 == factors.output_variance
