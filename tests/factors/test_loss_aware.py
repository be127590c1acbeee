"""Factors in the metric of the loss: optimal, finite where matrices are singular, and reported as they are."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.calibration import LayerStatistics, Moments
from lowrank_ops.factors import Factors, factorize
from lowrank_ops.subspaces import LayerSubspaces
from lowrank_ops.subspaces.loss import DAMPING


def moments_of(rows: Tensor) -> Moments:
    return Moments(rows.T @ rows, rows.sum(0), len(rows))


def problem(
    out_features: int = 7, in_features: int = 9, x_rank: int = 9, g_rank: int = 7, seed: int = 0
) -> tuple[nn.Linear, Tensor, Tensor]:
    """A layer, inputs with a mean and unequal variances, and gradients, both of a given rank."""
    torch.manual_seed(seed)
    layer = nn.Linear(in_features, out_features).double()
    x = (
        torch.randn(200, x_rank).double()
        @ torch.randn(x_rank, in_features).double()
        * torch.logspace(0, -2, in_features)
    )
    g = (
        torch.randn(150, g_rank).double()
        @ torch.randn(g_rank, out_features).double()
        * torch.logspace(0, -2, out_features)
    )
    return layer, x + 3, g


def spaces_of(layer: nn.Module, rows: Tensor, g: Tensor, centered: bool = True, side: str = "input") -> LayerSubspaces:
    statistics = LayerStatistics(side, moments_of(rows), moments_of(g))
    return LayerSubspaces.of_layer(layer, statistics, centered=centered)


def metric(g: Tensor) -> Tensor:
    moment = g.T @ g / len(g)
    return moment + DAMPING * moment.trace() / len(moment) * torch.eye(len(moment)).double()


def metric_error(layer: nn.Linear, factors: Factors, x: Tensor, m: Tensor) -> float:
    """E of e^T M e over the rows, e the error of the output."""
    error = F.linear(x, factors.up @ factors.down, factors.bias) - layer(x).detach()
    return float(((error @ m) * error).sum() / len(x))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_error_in_the_metric_is_what_was_dropped(rank: int, centered: bool) -> None:
    layer, x, g = problem()
    spaces = spaces_of(layer, x, g, centered)
    factors = factorize(spaces, rank, "loss")
    dropped = float(spaces.loss.subspace.spectrum[rank:].sum())
    assert metric_error(layer, factors, x, metric(g)) == pytest.approx(dropped, rel=1e-6)
    assert factors.projection == "loss"
    undamped = g.T @ g / len(g)
    assert factors.predicted_loss == pytest.approx(0.5 * metric_error(layer, factors, x, undamped), rel=1e-6)
    plain = torch.eye(7).double()
    assert factors.predicted_error == pytest.approx(metric_error(layer, factors, x, plain), rel=1e-6)


@pytest.mark.parametrize("rank", [2, 5])
def test_no_other_factors_have_less_error_in_the_metric(rank: int) -> None:
    layer, x, g = problem()
    spaces, m = spaces_of(layer, x, g), metric(g)
    best = metric_error(layer, factorize(spaces, rank, "loss"), x, m)
    for projection in ("output", "utilized", "weight"):
        assert best < metric_error(layer, factorize(spaces, rank, projection), x, m)

    torch.manual_seed(1)  # gradient descent from a point nearby finds no less
    factors = factorize(spaces, rank, "loss")
    down, up, bias = (
        t.clone(memory_format=torch.contiguous_format).requires_grad_()
        for t in (factors.down, factors.up, factors.bias)
    )
    target = layer(x).detach()
    optimizer = torch.optim.LBFGS([down, up, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        error = F.linear(x, up @ down, bias) - target
        loss = ((error @ m) * error).sum() / len(x)
        loss.backward()
        return loss

    with torch.no_grad():
        for parameter in (down, up, bias):
            parameter += 0.01 * parameter.std() * torch.randn_like(parameter)
    optimizer.step(closure)
    assert float(closure().detach()) > best * (1 - 1e-6)


@settings(max_examples=40, deadline=None)
@given(
    out_features=st.integers(1, 8),
    in_features=st.integers(1, 8),
    x_rank=st.integers(0, 8),
    g_rank=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_singular_matrices_are_safe(out_features: int, in_features: int, x_rank: int, g_rank: int, seed: int) -> None:
    layer, x, g = problem(out_features, in_features, x_rank, g_rank, seed)
    spaces = spaces_of(layer, x, g)
    assert spaces.loss.subspace.spectrum.min() >= 0
    for rank in range(min(out_features, in_features) + 1):
        factors = factorize(spaces, rank, "loss")
        assert all(part.isfinite().all() for part in (factors.down, factors.up, factors.bias))
    scale = 1 + float(layer(x).detach().square().mean())
    assert metric_error(layer, factors, x, torch.eye(out_features).double()) < 1e-9 * scale  # full rank: exact


@pytest.mark.parametrize("rounding", [0.3, 0.999, 5.0])
def test_rounding_of_gradient_sums_does_not_weaken_the_damping(rounding: float) -> None:
    """A moment that rounding made indefinite by about the damping: every eigenvalue of the metric stays near it."""
    layer, x, _ = problem()
    spectrum = torch.tensor([3, 2, 1, 1, 0, 0, -rounding * DAMPING], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(7, 7).double()).Q
    gradients = Moments((basis * spectrum) @ basis.T, torch.zeros(7).double(), 1)
    statistics = LayerStatistics("input", moments_of(x), gradients)
    space = LayerSubspaces.of_layer(layer, statistics, centered=True).loss
    assert float(torch.linalg.eigvalsh(space.root @ space.root.T)[0]) > 0.4 * DAMPING
    assert float(space.metric.trace()) == pytest.approx(7, rel=0.01)


def test_without_gradients_it_is_the_output_projection() -> None:
    """Zero gradients: the metric is a multiple of the identity, and no loss is predicted."""
    layer, x, g = problem()
    spaces = spaces_of(layer, x, 0 * g)
    loss, output = (factorize(spaces, 3, projection) for projection in ("loss", "output"))
    torch.testing.assert_close(loss.up @ loss.down, output.up @ output.down)
    assert loss.predicted_loss == 0 and not spaces.loss.subspace.spectrum.any()


def test_isotropic_gradients_give_the_output_projection() -> None:
    layer, x, _ = problem()
    spaces = spaces_of(layer, x, torch.eye(7).double())
    loss, output = (factorize(spaces, 3, projection) for projection in ("loss", "output"))
    torch.testing.assert_close(loss.up @ loss.down, output.up @ output.down)
    torch.testing.assert_close(loss.bias, output.bias)


def test_streamed_output_gives_the_same_factors() -> None:
    layer, x, g = problem()
    of_input = factorize(spaces_of(layer, x, g), 3, "loss")
    y = F.linear(x, layer.weight.detach())
    of_output = factorize(spaces_of(layer, y, g, side="output"), 3, "loss")
    torch.testing.assert_close(of_output.up @ of_output.down, of_input.up @ of_input.down)
    torch.testing.assert_close(of_output.bias, of_input.bias)
    assert of_output.predicted_loss == pytest.approx(of_input.predicted_loss)


def test_gradients_of_another_layer_are_refused() -> None:
    layer, x, g = problem()
    with pytest.raises(ValueError, match=r"output_gradients has features \(5,\) on the output side, the layer \(7,\)"):
        spaces_of(layer, x, g[:, :5])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 24),
        nn.Tanh(),
        nn.Linear(24, 5),
    ).double()


def images(count: int = 4) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(32, 4, 4, 4).double() for _ in range(count)]


@pytest.mark.parametrize("fqn", ["0", "3"])
def test_predicted_loss_is_the_measured_divergence(fqn: str) -> None:
    """For one layer and a small error the Kullback-Leibler divergence is what the Fisher information predicts."""
    dense, batches = network(), images()
    covariances = lro.calibrate(dense, batches, sensitivity="fisher", num_probes=30)
    layer = dict(dense.named_modules())[fqn]
    rank = {"0": 7, "3": 12}[fqn]
    make = lro.LowRankConv2d.from_conv2d if fqn == "0" else lro.LowRankLinear.from_linear
    spaces = LayerSubspaces.of_layer(layer, covariances[fqn], centered=True)
    predicted = factorize(spaces, rank, "loss").predicted_loss
    compressed = network()
    compressed[int(fqn)] = make(layer, rank, covariances[fqn], projection="loss")
    x = torch.cat(batches)
    with torch.no_grad():
        log_p, log_q = (model(x).log_softmax(-1) for model in (dense, compressed))
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert predicted > 1e-6
    # rows of one sample are taken as independent, which positions of an image are only roughly
    assert divergence == pytest.approx(predicted, rel=0.2 if fqn == "3" else 0.6)


def test_report_shows_the_loss_and_names_fallbacks() -> None:
    model, batches = network(), images()
    layers = dict(lro.calibrate(model, batches, sensitivity="fisher"))
    layers["3"] = replace(layers["3"], output_gradients=None)
    covariances = lro.Covariances(layers)
    config = lro.CompressionConfig(lro.Ranks({"0": 3, "3": 8}), projection="loss")
    report = lro.compress_(model, covariances, config)
    by_name = {layer.fqn: layer for layer in report.layers}
    assert by_name["0"].projection == "loss" and by_name["0"].predicted_loss > 0
    assert by_name["3"].projection == "output" and by_name["3"].predicted_loss is None
    assert by_name["5"].projection is None and by_name["5"].predicted_loss == 0
    assert "3: projection 'output', because calibration recorded no output gradients for it" in report.table()
    assert "0: projection" not in report.table() and "loss increase" in report.table()


def test_report_without_output_gradients_shows_no_loss() -> None:
    model = network()
    report = lro.compress_(model, lro.calibrate(model, images()), lro.CompressionConfig(lro.Ranks({"3": 8})))
    assert "loss" not in report.table()


def test_loss_aware_factors_spare_the_outputs_that_matter() -> None:
    """A layer whose largest outputs are ignored: output PCA keeps the wrong ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 4)).double()
    with torch.no_grad():
        model[0].weight[:12] *= 20  # large
        model[1].weight[:, :12] *= 1e-3  # and ignored
    x = torch.randn(500, 24).double()
    covariances = lro.calibrate(model, [x], sensitivity="output")
    expected = model(x).detach()
    errors = {}
    for projection in ("output", "loss"):
        compressed = nn.Sequential(*model)
        config = lro.CompressionConfig(lro.Ranks({"0": 8}), projection=projection)
        lro.compress_(compressed, covariances, config)
        errors[projection] = float((compressed(x).detach() - expected).square().mean() / expected.var())
    assert errors["loss"] < 0.01 and errors["output"] > 0.5


def test_projections_agree_at_full_rank() -> None:
    layer, x, g = problem()
    spaces = spaces_of(layer, x, g)
    dense = layer.weight.detach()
    for projection in ("output", "loss"):
        factors = factorize(spaces, 7, projection)
        torch.testing.assert_close(factors.up @ factors.down, dense)
        torch.testing.assert_close(factors.bias, layer.bias.detach())


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("centered", [True, False])
def test_predicted_loss_of_every_projection_is_its_formula(centered: bool, side: str) -> None:
    """Also of the weight's SVD, whose error is about zero in spaces about the mean."""
    layer, x, g = problem()
    weight = layer.weight.detach()
    rows = x if side == "input" else x @ weight.T
    moment = g.T @ g / len(g)
    for projection in ("output", "weight") if side == "input" else ("output",):
        factors = factorize(spaces_of(layer, rows, g, centered, side), 3, projection)
        lost = x @ (weight - factors.up @ factors.down).T
        if centered and projection != "weight":
            lost = lost - lost.mean(0)
        assert factors.predicted_loss is not None
        assert factors.predicted_loss == pytest.approx(0.5 * float(((lost @ moment) * lost).sum() / len(x)))


@pytest.mark.parametrize("side", ["input", "output"])
def test_output_variance_is_unweighted_after_a_weighted_decomposition(side: str) -> None:
    layer, x, g = problem()
    rows = x if side == "input" else x @ layer.weight.detach().T
    weighted = LayerStatistics(side, moments_of(rows), moments_of(g), moments_of(3 * rows[:50]))
    spaces = LayerSubspaces.of_layer(layer, weighted, centered=True)
    assert spaces.loss is not None
    _ = spaces.loss.subspace.spectrum
    assert spaces.output_variance == pytest.approx(float(layer(x).detach().var(0, correction=0).sum()))
